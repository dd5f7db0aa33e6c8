"""Link: a plan and a traced model become the whole program, priced and printed, one StageCode per stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from autopar.gradient_norm import NORM, clip_costs
from autopar.optimizer_price import OptimizerPrice, price_optimizer
from autopar.runtime.optim import OptimizerSpec
from autopar.step_work import gathers_of, gradient_layout, reductions_of
from cost_model.plan import Plan
from cost_model.program import Collective, ParameterShard, Program, StageProgram, StepWork, Value
from cost_model.schedule import check_schedule, stage_schedule
from cost_model.tensor import TensorMeta
from passes.batch import BatchAnalysis
from passes.cut import cut_stage, prologue
from passes.graph import GraphInput, ModelGraph
from passes.schedule_code import PartStep, Reduction, render_prologue, render_step
from passes.segment import Segment, segment
from passes.specialise import specialise
from passes.stage import StageCode, build_stage, parameter_shards
from passes.stitch import Templates
from passes.trace import Traced
from passes.verify import verify_cuts, verify_emitted, verify_step

_LOSS_BYTES = 8  # one float64


@dataclass(frozen=True)
class LinkedStage:
    """code: the stage; layout: (dtype, parameters in order) of its flat gradient buffers; reductions: over them
    and over buckets; gathers: of updated parameters;
    prologue_inputs: batch inputs its prologue reads; step_inputs: step constants it uses."""

    code: StageCode
    shards: tuple[ParameterShard, ...]
    layout: tuple[tuple[str, tuple[str, ...]], ...]
    reductions: tuple[Reduction | PartStep, ...]
    gathers: tuple[PartStep, ...]
    prologue_source: str
    prologue_ops: Mapping[str, str] = field(hash=False)
    prologue_inputs: tuple[GraphInput, ...]

    @property
    def updated(self) -> dict[str, TensorMeta]:
        """What the optimizer updates: whole parameters outside buckets, and of buckets the pieces of the rank that
        has most of them."""
        pieces: dict[str, TensorMeta] = {}
        dp = max((bucket.dp for bucket in self.code.buckets), default=1)
        for index in range(dp):
            own = {
                p.parameter: TensorMeta((p.numel,), b.dtype)
                for b in self.code.buckets
                if b.trainable
                for p in b.pieces(index)
            }
            pieces = own if len(own) > len(pieces) else pieces
        bucketed = {name for bucket in self.code.buckets for name, _ in bucket.parameters}
        return {s.name: s.meta for s in self.shards if s.trainable and s.name not in bucketed} | pieces

    @property
    def batch_inputs(self) -> dict[GraphInput, bool]:
        """Batch inputs that the stage reads -> whether a rank reads the rows of its replica only: what enters the
        prologue is read whole."""
        whole = {i.target for i in self.prologue_inputs}
        read = (i for i in (*self.code.inputs, *self.prologue_inputs) if i.kind == "batch")
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
            for item in (*stage.code.inputs, *stage.prologue_inputs):
                holders.setdefault(item.target, index)
        return holders

    def verify(self) -> None:
        """What is emitted is what is priced; VerificationError where it is not."""
        for stage, priced in zip(self.stages, self.program.stages, strict=True):
            verify_emitted(stage.code)
            rank = self.program.devices[(priced.stage, 0, 0)]
            fed = {i.target: self.traced.global_graph.tensor(i.node).nbytes for i in stage.gathered}
            verify_step(self.source(rank), stage.code.buckets, fed, priced.step)

    def source(self, rank: int) -> str:
        """The module that a rank runs."""
        stage, dp, tp = self.coordinates[rank]
        return _rank_source(self, rank, stage, dp, tp)


class Linker:
    """Rewrites plans of one model; traces of equal segments and optimizer prices are kept between plans.

    device_kind: "cpu" or "cuda", where the optimizer runs. max_grad_norm: what every step clips gradients to.
    local_batches: whether a rank is given the rows of its replica only, whatever it reads.
    """

    def __init__(
        self,
        traced: Traced,
        analysis: BatchAnalysis,
        optimizer: OptimizerSpec | None,
        device_kind: str,
        max_grad_norm: float | None = None,
        local_batches: bool = False,
    ) -> None:
        self.traced, self.analysis = traced, analysis
        self.max_grad_norm, self.local_batches = max_grad_norm, local_batches
        self.optimizer, self.device_kind = optimizer, device_kind
        self._templates: Templates = {}
        self._prices: dict[tuple[tuple[str, TensorMeta], ...], OptimizerPrice] = {}

    def link(self, plan: Plan) -> Linked:
        """The whole program of a plan; VerificationError where its stages do not fit together."""
        model = specialise(self.traced, plan.microbatch_size)
        segments = segment(model)
        codes = tuple(self._code(model, segments, plan, index) for index in range(plan.pp))
        for index, zeros in _unreached(codes).items():
            remade = self._code(model, segments, plan, index, zeros)
            codes = (*codes[:index], remade, *codes[index + 1 :])
        verify_cuts(codes)
        tied = _tied(codes)
        stages = tuple(_link_stage(self.traced, code, plan, tied, self.optimizer is not None) for code in codes)
        schedules = [stage_schedule(plan.schedule, s, plan.pp, plan.microbatches) for s in range(plan.pp)]
        check_schedule(schedules, plan.microbatches)
        program = Program(
            dp=plan.dp,
            tp=plan.tp,
            pp=plan.pp,
            microbatches=plan.microbatches,
            schedule=plan.schedule,
            stages=tuple(self._stage_program(s, i, plan) for i, s in enumerate(stages)),
            devices=device_map(plan),
        )
        return Linked(self.traced, plan, stages, program, self.max_grad_norm, self.local_batches)

    def _stage_program(self, stage: LinkedStage, index: int, plan: Plan) -> StageProgram:
        price = self._price(stage)
        clips = self.max_grad_norm is not None
        costs = (*clip_costs(stage), *price.costs) if clips else price.costs
        rows = stage.gathered if self.local_batches and plan.dp > 1 else ()
        fed = [Collective("all_gather", "dp", self.traced.global_graph.tensor(i.node).nbytes) for i in rows]
        return _stage_program(self.traced, stage, index, plan, replace(price, costs=costs), fed, clips=clips)

    def _code(
        self,
        model: ModelGraph,
        segments: tuple[Segment, ...],
        plan: Plan,
        index: int,
        zeros: frozenset[str] = frozenset(),
    ) -> StageCode:
        stage, whole = plan.stages[index], self.traced.global_graph.batch
        cut = cut_stage(model, segments, stage.first_segment, stage.last_segment, self.analysis, whole, plan.dp)
        return build_stage(
            cut,
            stage.choices,
            plan.tp,
            self._templates,
            last=index == plan.pp - 1,
            zeros=zeros,
            recompute=stage.recompute_levels,
            dp=plan.dp,
            shared=_held_by_several(segments, plan),
        )

    def _price(self, stage: LinkedStage) -> OptimizerPrice:
        trainable = tuple(stage.updated.items())
        if self.optimizer is None or not trainable:
            return OptimizerPrice((), 0, 0)
        if trainable not in self._prices:
            self._prices[trainable] = price_optimizer(self.optimizer, dict(trainable), device=self.device_kind)
        return self._prices[trainable]


def device_map(plan: Plan) -> dict[tuple[int, int, int], int]:
    """(stage, dp replica, tp shard) -> device."""
    cells = [(s, d, t) for s in range(plan.pp) for d in range(plan.dp) for t in range(plan.tp)]
    return dict(zip(cells, plan.placement, strict=True))


def _held_by_several(segments: tuple[Segment, ...], plan: Plan) -> frozenset[str]:
    """Parameters, by node, of more than one stage."""
    ranges = [segments[stage.first_segment : stage.last_segment] for stage in plan.stages]
    held = [name for parts in ranges for name in {name for part in parts for name in part.parameters}]
    return frozenset(name for name, count in Counter(held).items() if count > 1)


def _unreached(codes: tuple[StageCode, ...]) -> dict[int, frozenset[str]]:
    """Stage -> parameters that get a gradient elsewhere but not there (a detached use): the copies must stay equal."""
    reached = {name for code in codes for name in code.gradients}
    held = [{i.target for i in code.inputs if i.trainable} for code in codes]
    missing = [frozenset(names & reached - set(code.gradients)) for names, code in zip(held, codes, strict=True)]
    return {index: names for index, names in enumerate(missing) if names}


def _tied(codes: tuple[StageCode, ...]) -> dict[str, str]:
    """Trainable parameters that more than one stage holds: their copies share one gradient."""
    holders: dict[str, int] = {}
    for code in codes:
        for item in code.inputs:
            if item.target in code.gradients:
                holders[item.target] = holders.get(item.target, 0) + 1
    return {name: name for name, count in holders.items() if count > 1}


def _link_stage(
    traced: Traced, code: StageCode, plan: Plan, tied: Mapping[str, str], has_optimizer: bool
) -> LinkedStage:
    shards = parameter_shards(code, plan.dp, plan.tp, tied)
    layout, alone = gradient_layout(code, shards)
    reductions = reductions_of(code, alone, tied)
    names = tuple(i.node for i in code.inputs if i.kind == "step")
    graph = prologue(traced.global_graph, names)
    source, ops = render_prologue(graph)
    gathers = gathers_of(code, has_optimizer=has_optimizer)
    return LinkedStage(code, shards, layout, reductions, gathers, source, ops, graph.inputs if graph else ())


def _stage_program(
    traced: Traced,
    stage: LinkedStage,
    index: int,
    plan: Plan,
    price: OptimizerPrice,
    fed: Sequence[Collective],
    *,
    clips: bool,
) -> StageProgram:
    code = stage.code
    collectives = [*fed, *(r.collective for r in stage.reductions)]
    if plan.dp * plan.tp * plan.pp > 1:
        collectives += [NORM] if clips else []
        collectives.append(Collective("all_reduce", "world", _LOSS_BYTES))
    return StageProgram(
        stage=index,
        segments=tuple(range(plan.stages[index].first_segment, plan.stages[index].last_segment)),
        forward=code.forward,
        backward=code.backward,
        saved=code.saved,
        sent=code.sent,
        received=code.received,
        parameters=stage.shards,
        persistent=_persistent(traced, stage, plan.dp),
        step=StepWork(
            tuple(collectives),
            price.costs,
            price.state_bytes,
            price.workspace_bytes,
            tuple(g.collective for g in stage.gathers),
            tuple(meta.nbytes for meta in stage.updated.values()),
        ),
        buckets=code.buckets,
    )


def _persistent(traced: Traced, stage: LinkedStage, dp: int) -> tuple[Value, ...]:
    """What a rank holds all step beside parameters: its part of the batch's inputs, step values, constants."""
    whole = traced.global_graph
    metas = {i.node: whole.tensor(i.node) for i in stage.code.inputs if i.kind == "step"}
    for item, own_rows in stage.batch_inputs.items():
        meta = whole.tensor(item.node)
        metas[item.node] = replace(meta, shape=(meta.shape[0] // dp, *meta.shape[1:])) if own_rows else meta
    values = [Value(name, meta, name, meta.nbytes) for name, meta in metas.items()]
    code = stage.code
    changed = [(i.target, code.metas[i.node]) for i in code.inputs if i.target in code.updates]
    values += [Value(f"new {name}", meta, f"new {name}", meta.nbytes) for name, meta in changed]
    return (*values, *code.constants)


def _rank_source(linked: Linked, rank: int, stage: int, dp: int, tp: int) -> str:
    plan, linked_stage = linked.plan, linked.stages[stage]
    steps = stage_schedule(plan.schedule, stage, plan.pp, plan.microbatches)
    doc = f"{plan.schedule}, {plan.microbatches} microbatch(es) of {plan.microbatch_size}."
    step = render_step(
        steps,
        linked_stage.reductions,
        linked_stage.gathers,
        sends=plan.pp > 1,
        doc=doc,
        max_grad_norm=linked.max_grad_norm,
        gathered=[i.target for i in linked_stage.gathered] if linked.local_batches and plan.dp > 1 else (),
        dp=plan.dp,
        changed=linked_stage.code.updates,
        counters=linked.traced.counters,
    )
    labels = plan.segment_labels[plan.stages[stage].first_segment : plan.stages[stage].last_segment]
    header = (
        f'"""Rank {rank} of {len(plan.placement)}: stage {stage} of {plan.pp}, replica {dp} of {plan.dp}, '
        f"shard {tp} of {plan.tp}.\n\nSegments: {', '.join(labels)}\n" + '"""'
    )
    body = linked_stage.code.source.split('"""', 2)[2]
    extra = "".join(
        f"{short} = {full}\n"
        for short, full in sorted(linked_stage.prologue_ops.items())
        if f"\n{short} = " not in body
    )
    body = body.replace("import torch\n\n", f"import torch\n\n{extra}", 1)
    return f"{header}{body}\n\n{linked_stage.prologue_source}\n\n\n{step}\n"
