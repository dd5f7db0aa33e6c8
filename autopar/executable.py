"""Executable: a compiled model that trains on its cluster, whoever drives the ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from autopar.batch import check_batch
from autopar.checkpoint import (
    check_fits,
    driver_file,
    new_part,
    newest_part,
    publish,
    read_driver,
    set_random_states,
    write_driver,
)
from autopar.link import Linked
from autopar.options import Options, SchedulerFactory, check_target
from autopar.parameter_groups import ParameterGroups, advance, make_scheduler
from autopar.payload import model_tensors, rank_batch, rank_payload
from autopar.planning import Planned, plan_model
from autopar.ranks import Ranks, agree_with_rank_0, decided, is_main, process_index, start_ranks, under_launcher
from autopar.runtime.comm import join_shards
from autopar.runtime.optim import OptimizerSpec
from cost_model.cluster import Cluster
from cost_model.errors import AutoparError, BatchError, ClosedError, ConfigError
from cost_model.estimate import Estimate
from cost_model.placement import Shard, parse_placement
from cost_model.plan import Plan
from passes.trace import batch_spec


class Executable:
    """A model compiled for a cluster.

    plan, estimate: what was chosen and what it should cost (BatchError before the first batch is known);
    step(batch): one training step, the same mean loss on every rank; code(rank): that rank's program;
    full_state_dict(): whole parameters and buffers by the model's own names; close(): end the ranks.
    Usable as a context manager. notes: everything that was decided silently elsewhere.
    """

    def __init__(self, model: nn.Module, cluster: Cluster, options: Options) -> None:
        check_target(model, cluster)
        self._model, self._cluster, self._options = model, cluster, options
        self._planned: Planned | None = None
        self._ranks: Ranks | None = None
        self._groups: ParameterGroups | None = None
        self._scheduler: LRScheduler | None = None
        self._steps = 0
        self._loaded, self._closed = False, False

    @property
    def is_main(self) -> bool:
        """True in a plain process and on rank 0 of a launched job."""
        return is_main()

    @property
    def cluster(self) -> Cluster:
        return self._cluster

    @property
    def planned(self) -> Planned:
        """Plan, estimate and program together; BatchError before the first batch is known."""
        if self._planned is None:
            raise BatchError("nothing is planned yet: pass inputs to autopar.compile, or call step(batch) once")
        return self._planned

    @property
    def plan(self) -> Plan:
        return self.planned.plan

    @property
    def estimate(self) -> Estimate:
        return self.planned.estimate

    @property
    def notes(self) -> tuple[str, ...]:
        return self.estimate.notes

    @property
    def _linked(self) -> Linked:
        return self.planned.linked

    def prepare(self, inputs: Any) -> None:
        """Plan for this global batch and verify the program; done by the first ``step`` if not before."""
        self._check_open()
        if under_launcher():
            self._planned = self._agreed(inputs)
        else:
            self._planned = plan_model(self._model, self._cluster, inputs, self._options)
        self._linked.verify()
        self._groups, self._scheduler = _groups_and_scheduler(self.planned.optimizer, self._options.scheduler)

    def _agreed(self, inputs: Any) -> Planned:
        """The plan of rank 0; without one, nothing is left joined."""
        self._running()
        try:
            return plan_model(self._model, self._cluster, inputs, self._options, agree_with_rank_0)
        except AutoparError:
            self._stop()
            raise

    def code(self, rank: int) -> str:
        """The Python program of one rank."""
        if not 0 <= rank < self._cluster.num_devices:
            raise ConfigError(f"there is no rank {rank}: ranks are 0..{self._cluster.num_devices - 1}")
        return self._linked.source(rank)

    def summary(self) -> str:
        """Plan and estimate as text."""
        from autopar.report import plan_text

        return plan_text(self.planned, self._cluster)

    @property
    def steps(self) -> int:
        """Steps taken so far, those before a loaded checkpoint included."""
        return self._steps

    @property
    def optimizer(self) -> ParameterGroups:
        """The groups of the optimizer, for a learning-rate scheduler of one's own; ConfigError where there is none."""
        if self.planned and self._groups is None:
            raise ConfigError("there is no optimizer: it was compiled with optimizer=None")
        assert self._groups is not None
        return self._groups

    @property
    def scheduler(self) -> LRScheduler | None:
        """The scheduler of ``compile(..., scheduler=)``, which every step advances."""
        return self._scheduler

    def step(self, batch: Any) -> float:
        """Forward, backward and optimizer on one global batch; returns the global mean loss.

        Errors: BatchError for another batch than planned, WorkerError when a rank fails, ClosedError afterwards.
        """
        self._check_open()
        if self._planned is None:
            self.prepare(batch)
        tensors = self.batch_tensors(batch)
        if not self._loaded:
            self._load().check_same("batch", tensors, "pass the same global batch on every rank: autopar splits it")
        self._send_changed_options()
        loss = float(self.call("step", self.parts(tensors))[0])
        self._steps += 1
        if self._groups is not None:
            self._groups.step()
        if self._scheduler is not None:
            advance(self._scheduler, loss)
        return loss

    def _send_changed_options(self) -> None:
        changes = {} if self._groups is None else self._groups.changes()
        if changes:
            self.call("configure", self._to_all(changes))

    def batch_tensors(self, batch: Any) -> dict[str, Tensor]:
        """The batch's tensor leaves by path, checked against the plan."""
        found, planned = batch_spec(batch), self._linked.traced.spec
        check_batch(found, planned)
        return found.tensors()

    def parts(self, batch: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """What each rank fed by this process reads of a global batch."""
        hosted = self._running().hosted
        return {rank: rank_batch(self._linked, rank, batch) for rank in hosted}

    def call(self, method: str, payloads: Mapping[int, Any] | None = None) -> list[Any]:
        """Call a method on every rank, with a payload for each that this process feeds; load the program if need be."""
        self._check_open()
        ranks = self._running() if self._loaded else self._load()
        return ranks.call(method, payloads or self._to_all(None))

    def _to_all(self, payload: Any) -> dict[int, Any]:
        return dict.fromkeys(self._running().hosted, payload)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the executable is closed; compile again to train on")

    def _running(self) -> Ranks:
        if self._ranks is None:
            self._ranks = start_ranks(self._cluster)
        return self._ranks

    def _load(self) -> Ranks:
        """Give every rank its program and its shards of the weights; all processes must hold the same weights."""
        tensors = model_tensors(self._model, self._linked)
        ranks = self._running()
        seeded = "call torch.manual_seed before building the model, or load one checkpoint, on every rank"
        ranks.check_same("model", tensors, seeded)
        optimizer = self.planned.optimizer
        saved = self._model.state_dict().keys()
        ranks.load({r: rank_payload(self._linked, r, tensors, optimizer, self._device(r), saved) for r in ranks.hosted})
        self._loaded = True
        return ranks

    def _device(self, rank: int) -> str:
        if self._cluster.backend == "gloo":
            return "cpu"
        return f"cuda:{torch.cuda.current_device() if under_launcher() else rank}"

    def full_state_dict(self) -> dict[str, Tensor]:
        """Whole parameters and buffers, trained so far, by every name of the model's own state dict."""
        current = dict(self._model.state_dict())
        if not self._loaded:
            return {name: tensor.detach().clone() for name, tensor in current.items()}
        trained = self._gathered()
        aliases = self._linked.traced.aliases
        return {n: trained.get(aliases.get(n, n), t).detach().clone() for n, t in current.items()}

    def _gathered(self) -> dict[str, Tensor]:
        """Parameters joined from the shards of every stage's first replica."""
        states = self.call("state")
        whole: dict[str, Tensor] = {}
        for stage, part in enumerate(self._linked.stages):
            ranks = [self._linked.program.devices[(stage, 0, t)] for t in range(self.plan.tp)]
            for shard in part.shards:
                if shard.name in states[ranks[0]]["params"]:
                    pieces = [states[r]["params"][shard.name] for r in ranks]
                    place = parse_placement(shard.placement)
                    split = isinstance(place, Shard) and self.plan.tp > 1
                    whole[shard.name] = join_shards(pieces, place.dim, place.outer) if split else pieces[0]  # type: ignore[union-attr]
        return whole

    def save(self, folder: str | os.PathLike[str], extra: Any = None) -> None:
        """Write a checkpoint that any plan of the same model and optimizer can load; all ranks of a job call it.

        It holds parameters, optimizer state, the scheduler, the step count, the random states of data loading, and
        ``extra``: plain values and tensors of the caller's own. What was in the folder before stays whole until the
        new one is. Errors: CheckpointError, ConfigError for an extra that cannot be kept, UnsupportedError.
        """
        self._check_open()
        self._send_changed_options()
        state = self._described()
        ranks = self.call("training_state")
        state["groups"] = {index: tree for rank in reversed(ranks) for index, tree in rank["groups"].items()}
        state["states"] = {name: kinds for rank in ranks for name, kinds in rank["states"].items()}
        scheduler = None if self._scheduler is None else self._scheduler.state_dict()
        state |= {"scheduler_state": scheduler, "steps": self._steps, "extra": extra}
        content, root = driver_file(state), Path(folder).resolve()
        name = decided(lambda: new_part(root, self._steps))
        write_driver(root / name, process_index(), content)
        self.call("save", self._to_all(str(root / name)))
        decided(lambda: publish(root, name))

    def load(self, folder: str | os.PathLike[str]) -> Any:
        """Go on from the newest complete checkpoint in a folder, whatever plan wrote it; returns its ``extra``.

        All ranks of a job call it. Errors: CheckpointError where there is none, or one of another model or optimizer.
        """
        self._check_open()
        root = Path(folder).resolve()
        here = self._described()
        part = root / decided(lambda: newest_part(root))
        saved = read_driver(part, process_index())
        check_fits(part, saved, here)
        request = {"folder": str(part), "states": saved["states"], "groups": saved["groups"]}
        self.call("load", self._to_all(request))
        if self._groups is not None:
            self._groups.restore(saved["groups"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(saved["scheduler_state"])
        set_random_states(saved["random"])
        self._steps = saved["steps"]
        return saved["extra"]

    def _described(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the executable that loads it."""
        optimizer, held = self.planned.optimizer, self._linked.first_holder
        return {
            "tensors": {
                name: (tuple(t.shape), str(t.dtype).removeprefix("torch."))
                for name, t in self._model.state_dict().items()
                if name in held
            },
            "optimizer": None if optimizer is None else optimizer.path,
            "groups of parameters": [] if optimizer is None else [list(group.names) for group in optimizer.groups],
            "scheduler": None if self._scheduler is None else type(self._scheduler).__name__,
        }

    def close(self) -> None:
        """End all ranks; may be called again."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._ranks is not None:
            ranks, self._ranks = self._ranks, None
            ranks.close()

    def __enter__(self) -> Executable:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _groups_and_scheduler(
    optimizer: OptimizerSpec | None, factory: SchedulerFactory | None
) -> tuple[ParameterGroups | None, LRScheduler | None]:
    groups = None if optimizer is None else ParameterGroups(optimizer)
    if factory is None:
        return groups, None
    if groups is None:
        raise ConfigError("a scheduler needs an optimizer, and optimizer is None; pass both, or neither")
    return groups, make_scheduler(factory, groups)
