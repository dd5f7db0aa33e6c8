"""Inference: a program that gives a model's outputs, or its loss in another mode, beside the one that trains.

It is traced when it is first asked for and runs under the plan of training: on the same ranks, each stage with the
segments whose parameters it holds, every parameter as it lies there already. Its ops follow from that
(``passes.follow``); nothing is searched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.link import Linker
from autopar.linked import Linked
from autopar.model_notes import analysed
from autopar.options import Options
from autopar.payload import local_tensors, program_payload
from autopar.runtime.comm import join_shards
from cost_model.device import BLAS
from cost_model.errors import BatchError, UnsupportedError
from cost_model.mesh import Mesh
from cost_model.placement import Partial, Placement, Shard
from cost_model.plan import Plan, StagePlan
from passes.at_home import read_at_home
from passes.batch import BatchAnalysis
from passes.batch_spec import BatchSpec
from passes.follow import choices
from passes.graph import ModelGraph
from passes.group import Worth
from passes.precision import cast
from passes.segment import Segment, carried_values
from passes.specialise import specialise
from passes.trace import Traced, trace
from passes.vocabulary import collect
from passes.whole_numbers import reading_held

_KEPT = (bool, int, float, str, type(None))


class _Outputs:
    """A loss function that collects every tensor of the model's outputs, and remembers how they hung together.

    inputs: the batch; a model is traced with others, too, for which the numbers among its outputs may be others.
    """

    def __init__(self, inputs: Any) -> None:
        self.leaves: list[Any] = []
        self.spec: Any = None
        self._shapes = _shapes(inputs)

    def __call__(self, outputs: Any, inputs: Any) -> Tensor:
        leaves, spec = pytree.tree_flatten(outputs)
        if _shapes(inputs) == self._shapes:
            self.leaves = [None if isinstance(v, Tensor) or not isinstance(v, _KEPT) else v for v in leaves]
            self.spec = spec
        self.numbers = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if not self.numbers:
            raise UnsupportedError("the model returns no tensor; return one, or a tuple, a list or a dict of them")
        sums = [collect(leaves[number], number).float().sum() for number in self.numbers]
        return torch.stack(sums).sum() if len(sums) > 1 else sums[0]

    def joined(self, tensors: Mapping[int, Tensor]) -> Any:
        """The outputs as the model returns them."""
        return pytree.tree_unflatten([tensors.get(k, leaf) for k, leaf in enumerate(self.leaves)], self.spec)


def _shapes(inputs: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


@dataclass(frozen=True, eq=False)
class Inference:
    """linked: the program; collected: output -> how it lies along the batch; outputs: None where the loss is meant."""

    name: str
    linked: Linked
    collected: Mapping[int, Placement | None]
    outputs: _Outputs | None

    def payload(self, rank: int, tensors: Mapping[str, Tensor], held: Linked) -> dict[str, Any]:
        """What ``RankExecutor.attach`` takes: the program, and of the model what training does not hold there."""
        stage = held.coordinates[rank][0]
        part = held.stages[stage]
        known = {i.target for i in (*part.inputs, *part.prologue_inputs) if i.is_held}
        params, buffers = local_tensors(self.linked, rank, tensors, known)
        return {
            "name": self.name,
            "program": program_payload(self.linked, rank),
            "params": params,
            "buffers": buffers,
        }

    def result(self, ranks: Sequence[Mapping[str, Any]], rows: range | None = None) -> Any:
        """The outputs of the global batch from the parts of all ranks; or the loss. rows: only of these samples, as far
        as outputs belong to samples."""
        if self.outputs is None:
            return float(ranks[0]["loss"])
        return self.outputs.joined({number: self._of(rows, number, ranks) for number in self.collected})

    def _of(self, rows: range | None, number: int, ranks: Sequence[Mapping[str, Any]]) -> Tensor:
        whole, place = self._whole(number, ranks), self.collected[number]
        if rows is None or not isinstance(place, Shard):
            return whole
        sizes = (*whole.shape[: place.dim], place.outer, self.linked.plan.batch, -1, *whole.shape[place.dim + 1 :])
        seen = whole.reshape(sizes)
        return seen.narrow(place.dim + 1, rows.start, len(rows)).flatten(place.dim, place.dim + 2)

    def _whole(self, number: int, ranks: Sequence[Mapping[str, Any]]) -> Tensor:
        """An output from the parts of all replicas and microbatches, in order."""
        plan, place = self.linked.plan, self.collected[number]
        devices = self.linked.program.devices
        for stage in range(plan.pp):
            owners = [ranks[devices[stage, replica, 0]]["collected"] for replica in range(plan.mesh(stage).dp)]
            if number in owners[0]:
                parts = _in_order([owner[number] for owner in owners], by_microbatch=isinstance(plan.dp, tuple))
                if isinstance(place, Shard):
                    return join_shards(parts, place.dim, place.outer)
                return torch.stack(parts).sum(0) if isinstance(place, Partial) else parts[0]
        raise AssertionError(f"no stage has output {number}")


def _in_order(parts: Sequence[Sequence[Tensor]], *, by_microbatch: bool) -> list[Tensor]:
    """The parts of replicas as their samples lie in the batch: replica by replica, or first by microbatch."""
    rows = zip(*parts, strict=True) if by_microbatch else parts
    return [part for row in rows for part in row]


def build_inference(
    name: str,
    model: nn.Module,
    inputs: Any,
    spec: BatchSpec,
    options: Options,
    held: Linked,
    *,
    training: bool,
    loss: bool,
    worth: Worth | None = None,
    products: str = BLAS,
) -> Inference:
    """Trace, follow and link. training: the mode; loss: of the model or ``loss_fn``, else all that the model returns;
    worth, products: as ``Linker`` takes them.

    Errors: those of tracing, UnsupportedError, BatchError.
    """
    outputs = None if loss else _Outputs(inputs)
    with _in_mode(model, training):
        traced = cast(trace(model, inputs, options.loss_fn if outputs is None else outputs), options.precision)
    traced, analysis, _ = analysed(_with_parts(_on_what_is_held(traced, held.traced), _owned(held)), model)
    traced, ends = _cut_alike(traced, held)
    plan = _plan(traced, analysis, held, ends, spec.size)
    buckets = [tuple(replace(b, trainable=False) for b in s.buckets if b.zero == 3) for s in held.stages]
    linked = Linker(traced, analysis, None, "cpu", given=buckets, worth=worth, products=products).link(plan)
    linked.verify()
    return Inference(name, linked, _collected(analysis, outputs), outputs)


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in a mode; each of its parts as it was afterwards."""
    before = [(module, module.training) for module in model.modules()]
    if model.training != training:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _on_what_is_held(traced: Traced, training: Traced) -> Traced:
    """Without gradients, of buffers as training holds them."""
    metas = {i.target: training.global_graph.tensor(i.node) for i in training.global_graph.inputs if i.changes}

    def plain(graph: ModelGraph) -> ModelGraph:
        graph = reading_held(graph, metas)
        return graph.with_inputs(replace(i, trainable=False, changes=False) for i in graph.inputs)

    other = None if traced.other is None else plain(traced.other)
    return replace(traced, global_graph=plain(traced.global_graph), other=other, counters={})


def _owned(held: Linked) -> list[set[str]]:
    """The parameters of each part of the chain."""
    plan = held.plan
    codes = [held.stages[k % plan.pp].chunks[k // plan.pp] for k in range(len(plan.stages))]
    return [{i.target for i in code.inputs if i.kind == "parameter"} for code in codes]


def _with_parts(traced: Traced, owned: Sequence[set[str]]) -> Traced:
    """With parameters read where training holds them."""

    def at_home(graph: ModelGraph) -> ModelGraph:
        homes = {i.node: [k for k, own in enumerate(owned) if i.target in own] for i in graph.inputs if i.is_held}
        return read_at_home(graph, {node: parts for node, parts in homes.items() if parts})

    other = None if traced.other is None else at_home(traced.other)
    return replace(traced, global_graph=at_home(traced.global_graph), other=other)


def _collected(analysis: BatchAnalysis, outputs: _Outputs | None) -> dict[int, Placement | None]:
    """None: of one part, which is the whole."""
    places = dict(analysis.collected)
    return {} if outputs is None else {number: places.get(number) for number in outputs.numbers}


def _plan(traced: Traced, analysis: BatchAnalysis, held: Linked, ends: list[int], batch: int) -> Plan:
    """The plan of training for another graph: parts of the chain by the parameters that they hold; ends: of these."""
    plan, whole = held.plan, _microbatch(held.plan, batch)
    if analysis.synchronised:
        whole = batch
    if analysis.reason is not None and whole // plan.mesh(0).dp < batch:
        raise UnsupportedError(f"the batch cannot be split over {plan.dp} replicas or microbatches: {analysis.reason}")
    model = specialise(traced, whole // plan.mesh(0).dp)
    targets = {i.node: i.target for i in model.inputs if i.kind == "parameter"}
    segments = traced.segments
    crossing = {*carried_values(segments), *(segments[end].entry or "" for end in ends[:-1])}
    chosen: dict[Mesh, dict[str, str]] = {}
    for number, mesh in enumerate(plan.meshes):
        if mesh in chosen:
            continue
        alike = (stage for stage, other in zip(held.stages, plan.meshes, strict=True) if other == mesh)
        places = {name: place for stage in alike for name, place in stage.places.items()}
        lying = {node: places[target] for node, target in targets.items() if target in places}
        chosen[mesh] = choices(specialise(traced, whole // mesh.dp), lying, crossing, plan.axes_of(number))
    parts = enumerate(zip([0, *ends], ends, strict=False))
    return replace(
        plan,
        batch=batch,
        microbatch_size=whole // plan.mesh(0).dp,
        microbatches=batch // whole,
        stages=tuple(StagePlan(*part, chosen[plan.mesh(index % plan.pp)]) for index, part in parts),
        segment_labels=tuple(part.label for part in segments),
    )


def _microbatch(plan: Plan, batch: int) -> int:
    """Samples of one microbatch on all replicas together: as in training where the batch allows. Errors: BatchError."""
    whole, replicas = plan.mesh(0).dp * plan.microbatch_size, math.lcm(*(mesh.dp for mesh in plan.meshes))
    if batch % replicas:
        raise BatchError(f"a batch of {batch} samples does not divide over {plan.dp} replicas; pass a multiple")
    rounds = plan.pp if plan.virtual_stages > 1 else 1  # microbatches that interleaved stages take in turn
    if batch % (replicas * rounds):
        raise BatchError(
            f"a batch of {batch} samples does not divide over {plan.dp} replicas of {rounds} interleaved stages; "
            f"pass a multiple of {replicas * rounds}"
        )
    return batch // rounds if batch % (whole * rounds) else whole


def _cut_alike(traced: Traced, held: Linked) -> tuple[Traced, list[int]]:
    """With a chain that can be cut where the stages' ends are, and these ends. One that is cut nowhere there is cut
    wherever it can be. Errors: UnsupportedError."""
    targets = {i.node: i.target for i in traced.global_graph.inputs if i.kind == "parameter"}
    for known in (traced, replace(traced, least=len(traced.global_graph.nodes()))):
        ends = _ends(known.segments, targets, held)
        if ends is not None:
            return known, ends
    raise UnsupportedError(
        f"the outputs cannot be computed by the {held.plan.pp} stages of the plan, in whose order they do not take the "
        "model's parameters; compile with parallelism=autopar.Parallelism(pp=1)"
    )


def _ends(segments: Sequence[Segment], targets: Mapping[str, str], held: Linked) -> list[int] | None:
    """Where each part of the chain ends: it has the segments whose parameters the same part of training has. None
    where it is cut nowhere there."""
    owned = _owned(held)
    known, part, ends = set().union(*owned), 0, list[int]()
    for index, item in enumerate(segments):
        needed = {targets[name] for name in item.parameters} & known
        while part < len(owned) and not needed <= owned[part]:
            ends.append(index)
            part += 1
    ends += [len(segments)] * (len(owned) - len(ends))
    if part >= len(owned) or any(a >= b for a, b in zip([0, *ends], ends, strict=False)):
        return None
    return ends
