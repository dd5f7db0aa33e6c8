"""Executable: a compiled model that trains on its cluster, whoever drives the ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.link import Linked
from autopar.options import Options
from autopar.payload import model_tensors, rank_payload
from autopar.planning import Decision, Planned, plan_model
from autopar.runtime.comm import join_shards
from autopar.runtime.executor import RankExecutor, check_batch
from autopar.runtime.pool import WorkerPool
from cost_model.cluster import Cluster
from cost_model.errors import AutoparError, BatchError, ClosedError, WorldSizeError
from cost_model.estimate import Estimate
from cost_model.placement import Shard, parse_placement
from cost_model.plan import Plan
from passes.trace import batch_spec


def under_launcher() -> bool:
    """Whether this process is one rank of a launched job (torchrun) rather than a plain script or notebook."""
    return dist.is_initialized() or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


class _LocalRanks:
    """All ranks as worker processes of this one."""

    is_main = True

    def __init__(self, cluster: Cluster) -> None:
        self.pool = WorkerPool(cluster.num_devices, backend=cluster.backend)

    def load(self, payloads: list[Any]) -> None:
        self.pool.call("__init__", payloads)

    def call(self, method: str, payload: Any) -> list[Any]:
        return self.pool.call(method, payload)

    def close(self) -> None:
        self.pool.close()


class _ThisRank:
    """One rank in this process; the launcher runs the others."""

    def __init__(self, cluster: Cluster) -> None:
        join_launched_group(cluster)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.rank == 0
        self.executor: RankExecutor | None = None

    def load(self, payloads: list[Any]) -> None:
        self.executor = RankExecutor(self.rank, self.world_size, payloads[self.rank])

    def call(self, method: str, payload: Any) -> list[Any]:
        mine = getattr(self.executor, method)(payload)
        results: list[Any] = [mine] * self.world_size
        if method != "step":
            dist.all_gather_object(results, mine)
        return results

    def close(self) -> None:
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def join_launched_group(cluster: Cluster) -> None:
    """Join the launcher's process group once; WorldSizeError where its size is not the cluster's."""
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if world_size != cluster.num_devices:
        raise WorldSizeError(world_size, cluster.num_devices)
    if not dist.is_initialized():
        if cluster.backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(cluster.backend)


def agree_with_rank_0(decide: Callable[[], Decision]) -> Decision:
    """Rank 0 plans; every rank gets its decision, or fails with its error."""
    told: list[Any] = [None]
    failure: AutoparError | None = None
    if dist.get_rank() == 0:
        try:
            found = decide()
            told = [("ok", found.plan.to_json(), found.search_s, found.gap, found.notes)]
        except AutoparError as error:
            failure, told = error, [("error", type(error).__name__, str(error))]
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0][0] == "error":
        raise AutoparError(f"rank 0 could not plan: {told[0][1]}: {told[0][2]}")
    _, text, search_s, gap, notes = told[0]
    return Decision(Plan.from_json(text), search_s, gap, notes)


class Executable:
    """A model compiled for a cluster.

    plan, estimate: what was chosen and what it should cost (BatchError before the first batch is known);
    step(batch): one training step, the same mean loss on every rank; code(rank): that rank's program;
    full_state_dict(): whole parameters and buffers by the model's own names; close(): end the ranks.
    Usable as a context manager. notes: everything that was decided silently elsewhere.
    """

    def __init__(self, model: nn.Module, cluster: Cluster, options: Options) -> None:
        self._model, self._cluster, self._options = model, cluster, options
        self._planned: Planned | None = None
        self._ranks: _LocalRanks | _ThisRank | None = None
        self._loaded, self._closed = False, False

    @property
    def is_main(self) -> bool:
        """True in a plain process and on rank 0 of a launched job."""
        rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
        return not under_launcher() or rank == 0

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
        if under_launcher():
            self._start_ranks()
            self._planned = plan_model(self._model, self._cluster, inputs, self._options, agree_with_rank_0)
        else:
            self._planned = plan_model(self._model, self._cluster, inputs, self._options)
        self._linked.verify()

    def code(self, rank: int) -> str:
        """The Python program of one rank."""
        if not 0 <= rank < self._cluster.num_devices:
            raise ValueError(f"rank must be 0..{self._cluster.num_devices - 1}, not {rank}")
        return self._linked.source(rank)

    def summary(self) -> str:
        """Plan and estimate as text."""
        from autopar.report import plan_text

        return plan_text(self.planned, self._cluster)

    def step(self, batch: Any) -> float:
        """Forward, backward and optimizer on one global batch; returns the global mean loss.

        Errors: BatchError for another batch than planned, WorkerError when a rank fails, ClosedError afterwards.
        """
        if self._closed:
            raise ClosedError("the executable is closed; compile again to train on")
        if self._planned is None:
            self.prepare(batch)
        tensors = self.batch_tensors(batch)
        return float(self.call("step", tensors)[0])

    def batch_tensors(self, batch: Any) -> dict[str, Tensor]:
        """The batch's tensor leaves by path, checked against the plan."""
        traced = self._linked.traced
        spec = batch_spec(batch)
        expected = {p: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for p, t in traced.spec.tensors().items()}
        tensors = spec.tensors()
        check_batch(tensors, expected)
        _check_constants(spec, traced.spec)
        return tensors

    def call(self, method: str, payload: Any) -> list[Any]:
        """Call a method on every rank, loading the program first if need be."""
        self._start_ranks()
        assert self._ranks is not None
        if not self._loaded:
            self._load()
        return self._ranks.call(method, payload)

    def _start_ranks(self) -> None:
        if self._closed:
            raise ClosedError("the executable is closed; compile again to train on")
        if self._ranks is None:
            self._ranks = _ThisRank(self._cluster) if under_launcher() else _LocalRanks(self._cluster)

    def _load(self) -> None:
        tensors = model_tensors(self._model, self._linked)
        ranks = range(self._cluster.num_devices)
        mine = {self._ranks.rank} if isinstance(self._ranks, _ThisRank) else set(ranks)
        payloads = [
            rank_payload(self._linked, r, tensors, self.planned.optimizer, self._device(r)) if r in mine else None
            for r in ranks
        ]
        assert self._ranks is not None
        self._ranks.load(payloads)
        self._loaded = True

    def _device(self, rank: int) -> str:
        return "cpu" if self._cluster.backend == "gloo" else f"cuda:{torch.cuda.current_device() if under_launcher() else rank}"

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
        states = self.call("state", None)
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

    def close(self) -> None:
        """End all ranks; may be called again."""
        self._closed = True
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None

    def __enter__(self) -> Executable:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_constants(spec: Any, planned: Any) -> None:
    """Numbers and flags inside a batch are part of the traced program."""
    found = {p: v for p, v in zip(spec.paths, spec.leaves, strict=True) if not isinstance(v, Tensor)}
    wanted = {p: v for p, v in zip(planned.paths, planned.leaves, strict=True) if not isinstance(v, Tensor)}
    for path, value in wanted.items():
        if path not in found or found[path] != value:
            raise BatchError(
                f"batch input {path!r} is {found.get(path)!r} but the plan was traced with {value!r}; compile again"
            )

