"""compile and estimate: the two ways in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autopar.executable import Executable
from autopar.kernel_calls import with_kernel_calls
from autopar.options import (
    COLUMNS,
    DEFAULT_OPTIMIZER,
    EAGER,
    OptimizerFactory,
    Options,
    SchedulerFactory,
)
from autopar.planning import plan_model
from cost_model.cluster import Cluster
from cost_model.estimate import Estimate
from cost_model.parallelism import Parallelism
from cost_model.plan import Plan
from cost_model.precision import Precision


def compile(
    model: nn.Module,
    cluster: Cluster,
    inputs: Any = None,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    optimizer: OptimizerFactory | None = DEFAULT_OPTIMIZER,
    parallelism: Parallelism | None = None,
    memory_cap: str | int | None = None,
    precision: Precision | None = None,
    plan: Plan | None = None,
    scheduler: SchedulerFactory | None = None,
    max_grad_norm: float | None = None,
    timeout_s: float | None = None,
    local_batches: bool = False,
    seed: int = 0,
    solver: str = COLUMNS,
    write_lp: str | Path | None = None,
    backend: str = EAGER,
) -> Executable:
    """Compile a model for a cluster; planned now if ``inputs`` is given, else at the first ``step(batch)``.

    inputs: one global batch, dict (keyword arguments) or tuple (positional), dim 0 of its tensors is the batch;
    real, meta or fake tensors. loss_fn(outputs, inputs) -> scalar; without it the output is the loss or has ``.loss``.
    The program trains copies of the model's weights, taken at the first step: the model itself keeps its values
    (``exe.full_state_dict()`` has those trained). Which parameters train (``requires_grad``) is part of the plan.
    optimizer: a callable that takes parameters; None: gradients only. parallelism: pins; None is the planner's.
    memory_cap: bytes per device ("30GiB"); default: the device's memory less a reserve. plan: an earlier plan.
    scheduler: a callable that takes the optimizer, e.g. functools.partial(CosineAnnealingLR, T_max=1000), advanced by
    every step. max_grad_norm: gradients are clipped to it over all ranks. timeout_s: how long a rank waits for another.
    local_batches: under a launcher, each rank passes to ``step`` the samples of its replica only, replica
    ``exe.data_parallel_rank`` of ``exe.data_parallel_size``; ``inputs`` is one global batch all the same.
    seed: of dropout and all else that forward draws, which no plan changes: one device draws the same.
    solver: "columns" (dynamic programs inside segments, an integer program over stages, a proven gap) or "flat" (one
    integer program of all choices, exact, for small graphs). write_lp: a file for the integer program of the plan.
    backend: "eager" runs ops one by one; "inductor" has torch.compile make kernels of neighbouring ops that move
    memory, where the estimate says that it is worth it. Products, attention and collectives stay as they are.
    Errors: TraceError, InfeasiblePlanError, ParallelismError, BatchError, PlanMismatchError, UnsupportedError
    (ProblemSizeError where a flat program would be too large), MissingCompilerError.
    """
    options = Options.of(
        loss_fn,
        optimizer,
        parallelism,
        memory_cap,
        precision,
        plan,
        scheduler,
        max_grad_norm,
        timeout_s,
        local_batches,
        seed,
        solver,
        write_lp,
        backend,
    )
    executable = Executable(model, with_kernel_calls(cluster, options), options)
    if inputs is not None:
        executable.prepare(inputs)
    return executable


def estimate(
    model: nn.Module,
    cluster: Cluster,
    inputs: Any,
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    optimizer: OptimizerFactory | None = DEFAULT_OPTIMIZER,
    parallelism: Parallelism | None = None,
    memory_cap: str | int | None = None,
    precision: Precision | None = None,
    plan: Plan | None = None,
    scheduler: SchedulerFactory | None = None,
    max_grad_norm: float | None = None,
    timeout_s: float | None = None,
    local_batches: bool = False,
    seed: int = 0,
    solver: str = COLUMNS,
    write_lp: str | Path | None = None,
    backend: str = EAGER,
) -> Estimate:
    """Time and memory of the program that ``compile`` would run; no devices, no weights, nothing is run.

    Keywords and errors as for ``compile``.
    """
    options = Options.of(
        loss_fn,
        optimizer,
        parallelism,
        memory_cap,
        precision,
        plan,
        scheduler,
        max_grad_norm,
        timeout_s,
        local_batches,
        seed,
        solver,
        write_lp,
        backend,
    )
    return plan_model(model, with_kernel_calls(cluster, options), inputs, options).estimate
