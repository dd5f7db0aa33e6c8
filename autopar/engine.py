"""Engine: a compiled model and the ranks that run it, whoever drives them."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from autopar.ambient import autocast_here, check_autocast
from autopar.batch import check_batch, joined_batches, random_leaves, rows_of_replica
from autopar.inference import Inference, build_inference
from autopar.kernel_calls import check_compiler, worth_compiling
from autopar.linked import Linked
from autopar.model_since import ModelSince
from autopar.options import Options, check_target
from autopar.payload import rank_batch, rank_payload
from autopar.planning import Planned, plan_model
from autopar.ranks import Ranks, agree_with_rank_0, is_main, process_index, start_ranks, under_launcher
from autopar.runtime.comm import join_mesh
from autopar.runtime.recipe import blank
from autopar.runtime.weight_file import Place
from autopar.weights import LoadedWeights, ModelValues, check_all_match, drawn_states, find_weights
from cost_model.cluster import Cluster
from cost_model.errors import AutoparError, BatchError, ClosedError, ConfigError
from cost_model.estimate import Estimate
from cost_model.placement import parse_placements
from cost_model.plan import Plan
from passes.batch_spec import BatchSpec, batch_spec
from passes.trace import alias_map

_SAME_BATCH = "pass the same global batch on every rank: autopar splits it"


class Engine:
    """A model, its plan, and the ranks that hold its program and its shards.

    plan, estimate: what was chosen and what it should cost (BatchError before the first batch is known);
    code(rank): that rank's program; full_state_dict(): whole parameters and buffers by the model's own names;
    close(): end the ranks. Usable as a context manager. notes: everything that was decided silently elsewhere.
    """

    def __init__(self, model: nn.Module, cluster: Cluster, options: Options) -> None:
        check_target(model, cluster)
        self._model, self._cluster, self._options = model, cluster, options
        self._planned: Planned | None = None
        self._ranks: Ranks | None = None
        self._loaded, self._compared, self._closed = False, False, False
        self._drawn = {False: 0, True: 0}
        self._inferences: dict[str, Inference] = {}
        self._files: dict[str, Place] = {}
        self.training = model.training

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
        if self._options.local_batches and not under_launcher():
            raise ConfigError(
                "this process feeds all ranks, so it needs whole batches: use local_batches under torchrun"
            )
        if under_launcher():
            self._planned = self._agreed(inputs)
        else:
            self._planned = plan_model(self._model, self._cluster, inputs, self._options)
        self._autocast, self._since = autocast_here(), ModelSince(self._model)
        self._linked.verify()

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

    def batch_tensors(self, batch: Any) -> dict[str, Tensor]:
        """The batch's tensor leaves by path, checked against the plan."""
        found, planned = batch_spec(batch), self._linked.traced.spec
        if self._options.local_batches:
            planned = rows_of_replica(planned, self.plan.mesh(0).dp)
        check_batch(found, planned)
        return found.tensors()

    def sent_parts(self, batch: Any, *, evaluates: bool = False) -> dict[int, dict[str, Tensor]]:
        """``parts`` of a batch that has been checked, everything planned and loaded for it."""
        self._check_open()
        if self._planned is None:
            if self._options.local_batches:
                raise BatchError(
                    "a batch of one replica says nothing of the global one: pass inputs to autopar.compile"
                )
            self.prepare(batch)
        check_autocast(self._autocast)
        self._since.check()
        tensors = self.batch_tensors(batch)
        if not self._compared:
            self._check_batches(self._running() if self._loaded else self._load(), tensors)
            self._compared = True
        return self.parts(tensors, evaluates=evaluates)

    def _check_batches(self, ranks: Ranks, tensors: Mapping[str, Tensor]) -> None:
        """Once: that ranks were given the same batch, or those of a replica the same part."""
        if not self._options.local_batches:
            ranks.check_same("batch", tensors, _SAME_BATCH)
            return
        advice = "pass the same samples on all ranks of a replica: those with one exe.data_parallel_rank"
        ranks.check_same("batch", tensors, advice, self.data_parallel_rank)

    @property
    def data_parallel_size(self) -> int:
        """How many parts the samples of a step are loaded in: the replicas with local_batches, else one."""
        return self.plan.mesh(0).dp if self._options.local_batches else 1

    @property
    def data_parallel_rank(self) -> int:
        """Which of these parts this process loads."""
        return self._linked.coordinates[process_index()][1] if self._options.local_batches else 0

    def parts(self, batch: Mapping[str, Tensor], *, evaluates: bool = False) -> dict[int, dict[str, Tensor]]:
        """What each rank fed by this process reads of a global batch, and starts to draw random numbers from.

        Every call begins a step of its own, of training or of evaluation.
        """
        hosted, rows = self._running().hosted, self.plan.batch // self.data_parallel_size
        samples = range(self.data_parallel_rank * rows, (self.data_parallel_rank + 1) * rows)
        drawn = random_leaves(self._options.seed, self._drawn[evaluates], samples, evaluates=evaluates)
        self._drawn[evaluates] += 1
        return {rank: rank_batch(self._linked, rank, {**batch, **drawn}) for rank in hosted}

    def inferred(self, batch: Any, *, loss: bool) -> Any:
        """The loss of a batch, or what the model returns for it, in the mode that is set; the program is kept.

        With local_batches the replicas' batches are one batch, of which each is given what belongs to its samples.
        """
        self._check_open()
        rows = None
        if self._planned is None:
            self.prepare(batch)
        if self._options.local_batches:
            batch, rows = joined_batches(batch, self.data_parallel_rank, self._running().from_all)
        spec = batch_spec(batch)
        if under_launcher() and not self._options.local_batches:  # all ranks begin one program, which goes by its size
            self._running().check_same("batch", spec.tensors(), _SAME_BATCH)
        described = [(p, tuple(v.shape), str(v.dtype)) if isinstance(v, Tensor) else (p, v) for p, v in _leaves(spec)]
        name = repr((self.training, loss, spec.is_kwargs, described))
        if name not in self._inferences:
            self._attach(name, batch, spec, loss=loss)
        inference = self._inferences[name]
        drawn = random_leaves(self._options.seed, self._drawn[True], range(spec.size), evaluates=True)
        self._drawn[True] += 1
        tensors = {**spec.tensors(), **drawn}
        ranks = self._running().hosted
        requests = {r: {"name": name, "batch": rank_batch(inference.linked, r, tensors)} for r in ranks}
        return inference.result(self.call("infer", requests), rows)

    def _attach(self, name: str, batch: Any, spec: BatchSpec, *, loss: bool) -> None:
        ranks = self._running() if self._loaded else self._load()
        worth = worth_compiling(self._cluster) if self._options.compiles else None
        inference = build_inference(
            name, self._model, batch, spec, self._options, self._linked, training=self.training, loss=loss, worth=worth,
            products=self._cluster.products,
        )  # fmt: skip
        values = ChainMap(dict(inference.linked.traced.constants), self._values())  # type: ignore[arg-type]
        self.call("attach", {rank: inference.payload(rank, values, self._linked) for rank in ranks.hosted})
        self._inferences[name] = inference

    def call(self, method: str, payloads: Mapping[int, Any] | None = None) -> list[Any]:
        """Call a method on every rank, with a payload for each that this process feeds; load the program if need be."""
        self._check_open()
        ranks = self._running() if self._loaded else self._load()
        return ranks.call(method, payloads or self._to_all(None))

    def call_alike(self, method: str, payload: Any) -> list[Any]:
        """Call a method on every rank with the same payload."""
        return self.call(method, self._to_all(payload))

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
        if self._options.compiles:
            check_compiler(self._cluster)
        values = self._values()
        values.check_known()
        tensors = {**values.tensors, **self._linked.traced.constants}
        ranks = self._running()
        seeded = "call torch.manual_seed before building the model, or load one checkpoint, on every rank"
        compared = {name: blank(tensor) for name, tensor in tensors.items()}
        ranks.check_same("model", {**compared, **drawn_states(values.recipes)}, seeded)
        saved, timeout_s = self._model.state_dict().keys(), self._options.timeout_s
        optimizer, initial = self.planned.optimizer, values.request
        ranks.load(
            {
                rank: rank_payload(
                    self._linked, rank, tensors, optimizer, self._device(rank), saved, timeout_s, initial
                )
                for rank in ranks.hosted
            }
        )
        self._loaded = True
        self._since.take()
        return ranks

    def load_weights(self, path: str | os.PathLike[str], *, strict: bool = True) -> LoadedWeights:
        """Take the model's weights from a safetensors file, or a folder of such: each rank reads its shards of them.

        Names are those of the model's state dict, one of several for a shared parameter; precisions may differ. Before
        the first step these are the initial weights; later, optimizer state and step count stay as they are.
        strict=False: what the files lack keeps its values and what the model lacks is left out; both are returned.
        All ranks of a job call it. Errors: WeightsError.
        """
        self._check_open()
        found, loaded = find_weights(path, self._model)
        if strict:
            check_all_match(str(path), loaded)
        self._files |= found
        if self._loaded:
            self.call_alike("fill", {"recipes": {}, "files": found})
        return loaded

    def _values(self) -> ModelValues:
        """Of the model as it is now, and of the files that were loaded."""
        return ModelValues(self._model, self._files)

    def _device(self, rank: int) -> str:
        if self._cluster.backend == "gloo":
            return "cpu"
        return f"cuda:{torch.cuda.current_device() if under_launcher() else rank}"

    def full_state_dict(self) -> dict[str, Tensor]:
        """Whole parameters and buffers, trained so far, by every name of the model's own state dict.

        All ranks of a job call it.
        """
        if self._planned is not None:
            self._since.give()
        current = dict(self._model.state_dict())
        trained = self._gathered() if self._loaded else {}
        first, values = alias_map(self._model), self._values()
        whole = {n: trained[first[n]] if first[n] in trained else values[first[n]] for n in current}
        return {n: whole[n].detach().to(t.dtype, copy=True) for n, t in current.items()}

    def _gathered(self) -> dict[str, Tensor]:
        """Parameters joined from the shards of every stage's first replica."""
        states = self.call("state")
        whole: dict[str, Tensor] = {}
        for stage, part in enumerate(self._linked.stages):
            tp = self.plan.mesh(stage).tp
            ranks = self._linked.program.ranks(stage)[:tp]
            whole.update(states[ranks[0]]["changed"])
            for shard in part.shards:
                if shard.name in states[ranks[0]]["params"]:
                    pieces = [states[r]["params"][shard.name] for r in ranks]
                    whole[shard.name] = join_mesh(
                        pieces, parse_placements(shard.placement), self.plan.axes_of(stage).sizes
                    )
        return whole

    def close(self) -> None:
        """End all ranks; may be called again."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._ranks is not None:
            ranks, self._ranks = self._ranks, None
            ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _leaves(spec: BatchSpec) -> list[tuple[str, Any]]:
    return list(zip(spec.paths, spec.leaves, strict=True))
