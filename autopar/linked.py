"""Linked: the program of every rank as code and as prices see it; what ``autopar.link`` makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from cost_model.placement import Placements
from cost_model.plan import Plan
from cost_model.program import Program
from cost_model.schedule import Step, stage_schedule
from cost_model.shards import Bucket, ParameterShard
from cost_model.tensor import TensorMeta
from passes.codegen import render_module
from passes.graph import GraphInput
from passes.schedule_code import PartStep, Reduction, SpanStep, render_step
from passes.stage import StageCode
from passes.trace import Traced
from passes.verify import verify_emitted, verify_step


@dataclass(frozen=True)
class LinkedStage:
    """chunks: its virtual stages, mostly one; shards: its parameters and buffers; layout: (dtype, parameters in order)
    of its flat gradient buffers; reductions: over them and over buckets; gathers: of updated parameters;
    prologue_inputs: batch inputs its prologue reads."""

    chunks: tuple[StageCode, ...]
    shards: tuple[ParameterShard, ...]
    layout: tuple[tuple[str, tuple[str, ...]], ...]
    reductions: tuple[Reduction | SpanStep | PartStep, ...]
    gathers: tuple[PartStep, ...]
    prologue_source: str
    prologue_ops: Mapping[str, str] = field(hash=False)
    prologue_inputs: tuple[GraphInput, ...]

    @property
    def inputs(self) -> tuple[GraphInput, ...]:
        """All that its chunks read, but what they receive."""
        return merged_inputs(self.chunks)

    @property
    def places(self) -> dict[str, Placements]:
        """How each parameter and buffer lies on the tp axes, by its name in the model."""
        held = ((i, code.placements[i.node]) for code in self.chunks for i in code.inputs if i.is_held)
        return {i.target: place for i, place in held}

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Of all chunks, one that several of them share once."""
        return merged_buckets(self.chunks)

    @property
    def updates(self) -> tuple[str, ...]:
        """Buffers that a backward gives a new value."""
        return tuple(dict.fromkeys(name for code in self.chunks for name in code.updates))

    @cached_property
    def updated(self) -> dict[str, TensorMeta]:
        """What the optimizer updates: whole parameters outside buckets, and of buckets the pieces of the rank that
        has most of them."""
        trained = [bucket for bucket in self.buckets if bucket.trainable]
        ranks = range(max((bucket.dp for bucket in self.buckets), default=1))
        most = max(ranks, key=lambda rank: len({p.parameter for b in trained for p in b.pieces(rank)}))
        pieces = {p.parameter: TensorMeta((p.numel,), b.updated.dtype) for b in trained for p in b.pieces(most)}
        return {shard.name: shard.updated for shard in self.alone} | pieces

    @property
    def alone(self) -> tuple[ParameterShard, ...]:
        """Parameters outside buckets that are trained."""
        bucketed = {name for bucket in self.buckets for name, _ in bucket.parameters}
        return tuple(shard for shard in self.shards if shard.trainable and shard.name not in bucketed)

    @property
    def masters(self) -> tuple[TensorMeta, ...]:
        """Copies of parameters in another dtype that the optimizer updates."""
        copies = [shard.updated for shard in self.alone if shard.updated != shard.meta]
        return (*copies, *(b.updated for b in self.buckets if b.trainable and b.updated != b.part))

    @property
    def batch_inputs(self) -> dict[GraphInput, bool]:
        """Batch inputs that the stage reads -> whether a rank reads the rows of its replica only: what enters the
        prologue is read whole."""
        whole = {i.target for i in self.prologue_inputs if not i.is_held}
        read = (i for i in (*self.inputs, *self.prologue_inputs) if i.kind == "batch")
        return {i: i.batched and i.target not in whole for i in read}

    @property
    def metas(self) -> dict[str, TensorMeta]:
        """Of each parameter and buffer, as this stage's ranks hold it."""
        return {shard.name: shard.meta for shard in self.shards}

    @property
    def gathered(self) -> tuple[GraphInput, ...]:
        """Batch inputs that hold samples and are read whole all the same."""
        return tuple(i for i, own_rows in self.batch_inputs.items() if i.batched and not own_rows)


@dataclass(frozen=True, eq=False)
class Linked:
    """The program of every rank. ``program``: as prices see it; ``stages``: as code."""

    traced: Traced
    plan: Plan
    stages: tuple[LinkedStage, ...]
    program: Program
    max_grad_norm: float | None = None
    local_batches: bool = False

    @cached_property
    def coordinates(self) -> dict[int, tuple[int, int, int]]:
        """rank -> (stage, dp replica, tp shard)."""
        return {device: place for place, device in self.program.devices.items()}

    @cached_property
    def first_holder(self) -> dict[str, int]:
        """Parameter, buffer or constant -> the first stage that holds it; every stage holds the counters."""
        holders = dict.fromkeys(self.traced.counters, 0)
        for index, stage in enumerate(self.stages):
            for item in (*stage.inputs, *stage.prologue_inputs):
                if item.is_held:
                    holders.setdefault(item.target, index)
        return holders

    def at(self, plan: Plan) -> Linked:
        """The same program on the devices of a plan that differs in nothing but these and the cap."""
        return replace(self, plan=plan, program=replace(self.program, devices=device_map(plan)))

    def verify(self) -> None:
        """What is emitted is what is priced; VerificationError where it is not."""
        for stage, priced in zip(self.stages, self.program.stages, strict=True):
            for code in stage.chunks:
                verify_emitted(code)
            rank = self.program.devices[(priced.stage, 0, 0)]
            fed = {i.target: self.traced.global_graph.tensor(i.node).nbytes for i in stage.gathered}
            verify_step(self.source(rank), stage.buckets, fed, priced.step)

    def source(self, rank: int) -> str:
        """The module that a rank runs."""
        stage, dp, tp = self.coordinates[rank]
        return _rank_source(self, rank, stage, dp, tp)


def steps_of(plan: Plan, stage: int) -> tuple[Step, ...]:
    """The order of work of one stage."""
    return stage_schedule(plan.schedule, stage, plan.pp, plan.microbatches, plan.virtual_stages, plan.window)


def merged_inputs(codes: Sequence[StageCode]) -> tuple[GraphInput, ...]:
    """What several parts of the chain read, each once, but what they receive."""
    found = (i for code in codes for i in code.inputs if i.kind != "activation")
    return tuple({i.node: i for i in found}.values())


def merged_buckets(codes: Sequence[StageCode]) -> tuple[Bucket, ...]:
    """The buckets of several parts of the chain, each once."""
    return tuple({bucket.name: bucket for code in codes for bucket in code.buckets}.values())


def device_map(plan: Plan) -> dict[tuple[int, int, int], int]:
    """(stage, dp replica, tp shard) -> device."""
    cells = [(stage, *cell) for stage, mesh in enumerate(plan.meshes) for cell in mesh.cells()]
    return dict(zip(cells, plan.placement, strict=True))


def _rank_source(linked: Linked, rank: int, stage: int, dp: int, tp: int) -> str:
    plan, linked_stage, mesh = linked.plan, linked.stages[stage], linked.plan.mesh(stage)
    doc = f"{plan.schedule_text()}, {plan.microbatches} microbatch(es) of {plan.samples(stage)}."
    step = render_step(
        steps_of(plan, stage),
        linked_stage.reductions,
        linked_stage.gathers,
        sends=plan.pp > 1,
        doc=doc,
        max_grad_norm=linked.max_grad_norm,
        gathered=[i.target for i in linked_stage.gathered] if linked.local_batches and mesh.dp > 1 else (),
        dp=mesh.dp,
        changed=linked_stage.updates,
        counters=linked.traced.counters,
        scales_loss=plan.precision.scales_loss,
    )
    segments = " | ".join(", ".join(labels) for labels in plan.labels(stage))
    doc = (
        f"Rank {rank} of {len(plan.placement)}: stage {stage} of {plan.pp}, replica {dp} of {mesh.dp}, "
        f"shard {tp} of {plan.axes_of(stage)}.\n\nSegments: {segments}"
    )
    ops = {short: full for code in linked_stage.chunks for short, full in code.ops.items()}
    functions = (code.functions for code in linked_stage.chunks)
    return render_module(doc, {**ops, **linked_stage.prologue_ops}, *functions, linked_stage.prologue_source, step)
