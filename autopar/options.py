"""The keywords shared by ``compile`` and ``estimate``, checked at the door."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autopar.planner.solution import FEWEST_PARTS
from cost_model.cluster import Cluster
from cost_model.errors import ConfigError, UnknownNameError
from cost_model.parallelism import Parallelism
from cost_model.plan import Plan
from cost_model.precision import Precision
from cost_model.units import parse_bytes

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
SchedulerFactory = Callable[[Any], torch.optim.lr_scheduler.LRScheduler]
EAGER, INDUCTOR = "eager", "inductor"
BACKENDS = (EAGER, INDUCTOR)
"""Ops one by one, or neighbouring ones compiled into kernels by torch.compile."""
DEFAULT_OPTIMIZER: OptimizerFactory = functools.partial(torch.optim.AdamW, lr=3e-4)
COLUMNS, FLAT = "columns", "flat"
SOLVERS = (COLUMNS, FLAT)
_EXAMPLES = {
    "loss_fn": "lambda outputs, inputs: a scalar tensor",
    "optimizer": "functools.partial(torch.optim.SGD, lr=0.1), which autopar calls with the parameters",
    "scheduler": "functools.partial(CosineAnnealingLR, T_max=1000), which autopar calls with the optimizer",
}


@dataclass(frozen=True)
class Options:
    """See design section 9 for each field."""

    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None
    optimizer: OptimizerFactory | None = None
    parallelism: Parallelism = Parallelism()
    memory_cap_bytes: int | None = None
    precision: Precision = Precision()
    plan: Plan | None = None
    scheduler: SchedulerFactory | None = None
    max_grad_norm: float | None = None
    timeout_s: float | None = None
    local_batches: bool = False
    seed: int = 0
    solver: str = COLUMNS
    write_lp: Path | None = None
    backend: str = EAGER

    @property
    def compiles(self) -> bool:
        """Whether ops are compiled into kernels."""
        return self.backend != EAGER

    def fewest_segments(self, num_devices: int) -> int:
        """As many as a given plan has, else as there are pinned stages; two where pins leave their number open."""
        if self.plan is not None:
            return len(self.plan.segment_labels)
        pins = self.parallelism
        known = pins.pp
        if known is None:  # degrees are of all stages
            left = num_devices // (int(pins.dp or 1) * int(pins.tp or 1))  # type: ignore[arg-type]
            known = left if pins.dp and pins.tp else min(left, 2)
        parts = pins.virtual_stages or (FEWEST_PARTS if pins.schedule == "interleaved" else 1)
        return max(known * parts, 1)

    @staticmethod
    def of_keywords(keywords: Mapping[str, Any]) -> Options:
        """Keywords of ``compile``, those that are not given at their defaults. Errors: as for ``of``."""
        names = ("loss_fn", "parallelism", "memory_cap", "precision", "plan")
        return Options.of(**{**dict.fromkeys(names), "optimizer": DEFAULT_OPTIMIZER, **keywords})

    @staticmethod
    def of(
        loss_fn: Callable[[Any, Any], torch.Tensor] | None,
        optimizer: OptimizerFactory | None,
        parallelism: Parallelism | None,
        memory_cap: str | int | None,
        precision: Precision | None,
        plan: Plan | None,
        scheduler: SchedulerFactory | None = None,
        max_grad_norm: float | None = None,
        timeout_s: float | None = None,
        local_batches: bool = False,
        seed: int = 0,
        solver: str = COLUMNS,
        write_lp: str | Path | None = None,
        backend: str = EAGER,
    ) -> Options:
        """Checked options; ConfigError or UnsupportedError with a next move."""
        for name, value in (("loss_fn", loss_fn), ("optimizer", optimizer), ("scheduler", scheduler)):
            if value is not None and not callable(value):
                found = type(value).__name__
                raise ConfigError(f"{name} must be callable or None, not {found}: pass {_EXAMPLES[name]}")
        if parallelism is not None and not isinstance(parallelism, Parallelism):
            raise ConfigError(f"parallelism must be an autopar.Parallelism, not {type(parallelism).__name__}")
        if plan is not None and not isinstance(plan, Plan):
            raise ConfigError(f"plan must be an autopar.Plan (see Plan.load), not {type(plan).__name__}")
        if precision is not None and not isinstance(precision, Precision):
            raise ConfigError(f"precision must be an autopar.Precision, not {type(precision).__name__}")
        if precision is None:
            precision = Precision() if plan is None else plan.precision
        cap = None if memory_cap is None else parse_bytes(memory_cap)
        if timeout_s is not None and not timeout_s > 0:
            raise ConfigError(f"timeout_s must be above 0 seconds, or None for torch's default, not {timeout_s!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm must be above 0, or None for no clipping, not {max_grad_norm!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ConfigError(f"seed must be a whole number of 64 bits, not {seed!r}")
        if solver not in SOLVERS:
            raise UnknownNameError("solver", str(solver), SOLVERS)
        if backend not in BACKENDS:
            raise UnknownNameError("backend", backend, BACKENDS)
        norm = None if max_grad_norm is None else float(max_grad_norm)
        return Options(
            loss_fn,
            optimizer,
            parallelism or Parallelism(),
            cap,
            precision,
            plan,
            scheduler,
            norm,
            timeout_s,
            local_batches,
            seed,
            solver,
            _lp_path(write_lp, plan),
            backend,
        )


def _lp_path(write_lp: str | Path | None, plan: Plan | None) -> Path | None:
    """Where an integer program can be written. Errors: ConfigError."""
    if write_lp is None:
        return None
    if plan is not None:
        raise ConfigError("write_lp writes the integer program of a search, and a given plan is not searched; drop one")
    path = Path(write_lp)
    if not path.absolute().parent.is_dir():
        raise ConfigError(
            f"cannot write the integer program to {str(path)!r}: its folder does not exist; make it first"
        )
    return path


def check_target(model: object, cluster: object) -> None:
    """ConfigError unless a model is to be compiled for a cluster."""
    if not isinstance(model, torch.nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ConfigError(f"model must be a torch.nn.Module that has been built, not {found}")
    if not isinstance(cluster, Cluster):
        raise ConfigError(
            f"cluster must be an autopar.Cluster, not a {type(cluster).__name__}; "
            "see autopar.Cluster.load(name_or_path), .local(n) and .from_matrix(...)"
        )
