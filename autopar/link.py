"""Link: a plan and a traced model become the whole program, priced and printed, one StageCode per stage."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from autopar.alike import Outliner
from autopar.gradient_norm import clip_costs, norm_workspace_bytes, unscale_costs
from autopar.linked import Linked, LinkedStage, device_map, merged_buckets, merged_inputs, steps_of
from autopar.optimizer_price import OptimizerPrice, Seen, price_optimizer
from autopar.runtime.optim import OptimizerSpec
from autopar.stage_program import stage_program
from autopar.step_work import cast_costs, gathers_of, gradient_layout, reductions_of, update_casts
from cost_model.axes import Axes
from cost_model.device import BLAS
from cost_model.errors import UnsupportedError
from cost_model.placement import Placements, placements_text
from cost_model.plan import Plan
from cost_model.program import Collective, Program, StageProgram
from cost_model.schedule import splits_backward
from cost_model.schedule_check import check_schedule
from cost_model.shards import Bucket, ParameterShard
from cost_model.tensor import TensorMeta
from passes.batch import BatchAnalysis
from passes.cut import cut_stage, prologue
from passes.graph import ModelGraph
from passes.group import Worth
from passes.lengthen import priced_code
from passes.relabel import Made, outline
from passes.schedule_code import render_prologue
from passes.segment import Segment
from passes.specialise import specialise
from passes.stage import StageCode, build_stage, reduce_axis
from passes.stitch import Templates
from passes.trace import Traced
from passes.verify import verify_cuts
from passes.zero import make_buckets, stateless


class Linker:
    """Rewrites plans of one model; traces of equal segments and optimizer prices are kept between plans.

    device_kind: "cpu" or "cuda", where it all runs. max_grad_norm: what every step clips gradients to.
    local_batches: whether a rank is given the rows of its replica only, whatever it reads.
    given: the buckets of each stage, where parameters are held by another program. worth: whether ops are compiled
    into a kernel, by what that costs; None: none are. products: of ``PRODUCT_LIBRARIES``, what the devices multiply by.
    """

    def __init__(
        self,
        traced: Traced,
        analysis: BatchAnalysis,
        optimizer: OptimizerSpec | None,
        device_kind: str,
        max_grad_norm: float | None = None,
        local_batches: bool = False,
        given: Sequence[tuple[Bucket, ...]] | None = None,
        worth: Worth | None = None,
        products: str = BLAS,
    ) -> None:
        self.traced, self.analysis, self.given = traced, analysis, given
        self.worth, self.products = worth, products
        self.max_grad_norm, self.local_batches = max_grad_norm, local_batches
        self.optimizer, self.device_kind = optimizer, device_kind
        self._templates = Templates()
        self._prices: dict[tuple[tuple[str, TensorMeta], ...], OptimizerPrice] = {}
        self._updates: Seen = {}
        self._outliner = Outliner(traced, analysis)
        self._models: dict[int, ModelGraph] = {}
        self._codes: dict[tuple[Hashable, ...], StageCode] = {}
        self._made = Made()

    def link(self, plan: Plan) -> Linked:
        """The whole program of a plan; VerificationError where its stages do not fit together."""
        codes = tuple(self._code(plan, index) for index in range(len(plan.stages)))
        for index, zeros in _unreached(codes).items():
            codes = (*codes[:index], self._code(plan, index, zeros), *codes[index + 1 :])
        self._check_replicas(plan)
        verify_cuts(codes, [plan.mesh(index % plan.pp) for index in range(len(codes))])
        chunks = [codes[stage :: plan.pp] for stage in range(plan.pp)]
        tied = _tied(chunks)
        stages = tuple(self._stage(own, plan, index, tied) for index, own in enumerate(chunks))
        lists = [steps_of(plan, stage) for stage in range(plan.pp)]
        check_schedule(lists, plan.microbatches, plan.virtual_stages, plan.window)
        program = _program(plan, tuple(self._stage_program(s, i, plan) for i, s in enumerate(stages)))
        return Linked(self.traced, plan, stages, program, self.max_grad_norm, self.local_batches)

    def _check_replicas(self, plan: Plan) -> None:
        """Where numbers of replicas differ, the samples of several go to one. Errors: UnsupportedError."""
        if not isinstance(plan.dp, tuple):
            return
        if self.local_batches:
            raise UnsupportedError(
                f"with dp={plan.dp} ranks read samples of several replicas, and local_batches=True gives them those of "
                "one; use one dp for all stages, or whole batches"
            )
        for stage, (before, after) in enumerate(pairwise(plan.meshes), start=1):
            segment = self.traced.segments[plan.stages[stage].first_segment]
            if before.dp != after.dp and not joins_replicas(segment, self.analysis):
                raise UnsupportedError(
                    f"samples cannot go from {before.dp} to {after.dp} replicas before {segment.label!r}: values are "
                    "carried over that cut, or hold samples in another order; use one dp for all stages"
                )

    def price(self, plan: Plan, exact: int | None = None) -> Program:
        """The program of a plan as ``link`` makes it, but for names: stages that are alike are made once.

        exact: a stage that has its own names all the same.
        """
        if self.given is not None:
            return self.link(plan).program
        self._check_replicas(plan)
        shared = _held_by_several(self.traced.segments, plan)
        keys = [self._key(plan, index, shared, exact) for index in range(len(plan.stages))]
        for index, key in enumerate(keys):
            if key not in self._codes:
                has_names = exact is not None and index % plan.pp == exact
                self._codes[key] = self._code(plan, index) if has_names else self._priced(plan, index)
        codes = tuple(self._codes[key] for key in keys)
        targets = {i.target for i in self.traced.global_graph.inputs if i.node in shared}
        if any(names & targets for names in _unreached(codes).values()):
            return self.link(plan).program
        chunks = [codes[stage :: plan.pp] for stage in range(plan.pp)]
        tied = {name: name for name in _tied(chunks) if name in targets}
        known: dict[tuple[int, ...], StageProgram] = {}
        stages = []
        for index, own in enumerate(chunks):
            same = tuple(map(id, own))
            if same not in known:
                linked = self._stage(own, plan, index, tied)
                known[same] = self._stage_program(linked, index, plan)
            stages.append(_at(known[same], index, plan))
        return _program(plan, tuple(stages))

    def _stage(self, chunks: tuple[StageCode, ...], plan: Plan, stage: int, tied: Mapping[str, str]) -> LinkedStage:
        shards = _parameter_shards(chunks, plan.mesh(stage).dp, plan.axes_of(stage), tied)
        return _link_stage(self.traced, chunks, shards, tied, plan.dp_inner, self.optimizer is not None)

    def _key(self, plan: Plan, index: int, shared: frozenset[str], exact: int | None) -> tuple[Hashable, ...]:
        stage = index % plan.pp
        cuts = tuple(part.first_segment for part in plan.stages)  # other cuts give other chunks of a stage those names
        chunk = (index // plan.pp, cuts) if plan.virtual_stages > 1 else 0
        itself = index if exact is not None and stage == exact else None
        size = (*_build_options(plan, index), plan.mesh(stage))
        return (self._outliner.outline(plan, index, shared), *size, chunk, itself)

    def _model(self, microbatch_size: int) -> ModelGraph:
        if microbatch_size not in self._models:
            self._models[microbatch_size] = specialise(self.traced, microbatch_size)
        return self._models[microbatch_size]

    def _stage_program(self, stage: LinkedStage, index: int, plan: Plan) -> StageProgram:
        price = self._with_casts(stage, self._price(stage))
        clips = self.max_grad_norm is not None
        costs = (*clip_costs(stage), *price.costs) if clips else price.costs
        workspace = max(price.workspace_bytes, norm_workspace_bytes(stage) if clips else 0)
        costs = (*unscale_costs(stage), *costs) if plan.precision.scales_loss else costs
        rows = stage.gathered if self.local_batches and plan.mesh(index).dp > 1 else ()
        fed = [Collective("all_gather", "dp", self.traced.global_graph.tensor(i.node).nbytes) for i in rows]
        price, has_optimizer = replace(price, costs=costs, workspace_bytes=workspace), self.optimizer is not None
        return stage_program(self.traced, stage, index, plan, price, fed, clips=clips, has_optimizer=has_optimizer)

    def _priced(self, plan: Plan, index: int) -> StageCode:
        """The code of a stage as prices see it: of many equal blocks a few are rewritten, and repeated."""
        stage, mesh = plan.stages[index], plan.mesh(index % plan.pp)
        if self.worth is not None:  # kernels of neighbours do not end with a block
            return self._code(plan, index)
        whole = self._cut(plan, index)
        degrees, shared = (mesh.dp, plan.axes_of(index % plan.pp)), _held_by_several(self.traced.segments, plan)

        def buckets(
            order: Sequence[str],
            model: ModelGraph,
            places: Mapping[str, Placements],
            metas: Mapping[str, TensorMeta],
        ) -> tuple[Bucket, ...]:
            suffix, precision = _suffix(plan, index), plan.precision
            return make_buckets(order, model, places, metas, stage.choices, degrees, shared, suffix, precision)

        levels, state = stage.recompute_levels, stateless(stage.choices)
        apart = state is not None and not plan.overlap
        options = (*_build_options(plan, index), _suffix(plan, index), None if apart else mesh.dp)

        def build(cut: ModelGraph) -> StageCode:
            """Made once for all that are the same but for names and, where microbatches do not see it, split state."""
            key = (options, outline(cut, state if apart and state is not None else stage.choices, levels, shared))
            code = self._made.once(key, cut, functools.partial(self._rewritten, plan, index, printed=False))
            return replace(code, buckets=buckets(code.gradients, cut, code.placements, code.metas)) if apart else code

        return priced_code(whole, stage.choices, levels, build, buckets)

    def _code(self, plan: Plan, index: int, zeros: frozenset[str] = frozenset()) -> StageCode:
        return self._rewritten(plan, index, self._cut(plan, index), zeros)

    def _cut(self, plan: Plan, index: int) -> ModelGraph:
        stage, whole = plan.stages[index], self.traced.global_graph.batch
        model, mesh = self._model(plan.samples(index % plan.pp)), plan.mesh(index % plan.pp)
        first, last = stage.first_segment, stage.last_segment
        return cut_stage(model, self.traced.segments, first, last, self.analysis, whole, mesh.dp)

    def _rewritten(
        self, plan: Plan, index: int, cut: ModelGraph, zeros: frozenset[str] = frozenset(), *, printed: bool = True
    ) -> StageCode:
        stage, segments, mesh = plan.stages[index], self.traced.segments, plan.mesh(index % plan.pp)
        return build_stage(
            cut,
            stage.choices,
            plan.axes_of(index % plan.pp),
            self._templates,
            last=index == len(plan.stages) - 1,
            zeros=zeros,
            recompute=stage.recompute_levels,
            dp=mesh.dp,
            shared=_held_by_several(segments, plan),
            suffix=_suffix(plan, index),
            splits_backward=splits_backward(plan.schedule, index % plan.pp),
            precision=plan.precision,
            accumulates=plan.accumulates,
            overlaps=plan.overlap,
            given=None if self.given is None else self.given[index % plan.pp],
            worth=self.worth,
            products=self.products,
            device_kind=self.device_kind,
            segments=[part.label for part in segments],
            printed=printed,
        )

    def _price(self, stage: LinkedStage) -> OptimizerPrice:
        trainable = tuple(stage.updated.items())
        if self.optimizer is None or not trainable:
            return OptimizerPrice((), 0, 0)
        if trainable not in self._prices:
            self._prices[trainable] = price_optimizer(
                self.optimizer, dict(trainable), device=self.device_kind, seen=self._updates
            )
        return self._prices[trainable]

    def _with_casts(self, stage: LinkedStage, price: OptimizerPrice) -> OptimizerPrice:
        """With what is cast around the reductions and around the update; gradients that are cast live through it."""
        casts = [cast for r in stage.reductions for cast in r.casts]
        if self.optimizer is None:
            return replace(price, costs=(*price.costs, *cast_costs(casts)))
        before, after = update_casts(stage.alone, stage.buckets)
        held = sum(target.nbytes for _, target in before)
        costs = (*cast_costs([*casts, *before]), *price.costs, *cast_costs(after))
        return replace(price, costs=costs, workspace_bytes=price.workspace_bytes + held)


def joins_replicas(segment: Segment, analysis: BatchAnalysis) -> bool:
    """Whether the activation before a segment can go from so many replicas to another number of them."""
    return segment.entry in analysis.in_rows and not segment.carried


def _build_options(plan: Plan, index: int) -> tuple[Hashable, ...]:
    """What the code of a part of the chain depends on beside its graph, its choices and its replicas."""
    stage = index % plan.pp
    size = (plan.samples(stage), plan.axes_of(stage), plan.precision, plan.accumulates, plan.overlap)
    return (*size, index == len(plan.stages) - 1, splits_backward(plan.schedule, stage))


def _suffix(plan: Plan, index: int) -> str:
    """What tells the functions of virtual stages apart."""
    return f"_{index // plan.pp}" if plan.virtual_stages > 1 else ""


def _program(plan: Plan, stages: tuple[StageProgram, ...]) -> Program:
    return Program(
        dp=plan.dp,
        tp=plan.tp,
        pp=plan.pp,
        microbatches=plan.microbatches,
        schedule=plan.schedule,
        stages=stages,
        devices=device_map(plan),
        virtual_stages=plan.virtual_stages,
        window=plan.window,
        tp_sizes=() if plan.axes is None else plan.axes.sizes,
        dp_inner=plan.dp_inner,
    )


def _at(stage: StageProgram, index: int, plan: Plan) -> StageProgram:
    """The program of a stage as that of another one."""
    chunks = zip(stage.chunks, plan.chunks(index), strict=True)
    moved = tuple(replace(c, segments=tuple(range(p.first_segment, p.last_segment))) for c, p in chunks)
    return replace(stage, stage=index, chunks=moved)


def _held_by_several(segments: tuple[Segment, ...], plan: Plan) -> frozenset[str]:
    """Parameters, by node, of more than one part of the chain."""
    ranges = [segments[stage.first_segment : stage.last_segment] for stage in plan.stages]
    held = [name for parts in ranges for name in {name for part in parts for name in part.parameters}]
    return frozenset(name for name, count in Counter(held).items() if count > 1)


def _unreached(codes: tuple[StageCode, ...]) -> dict[int, frozenset[str]]:
    """Stage -> parameters that get a gradient elsewhere but not there (a detached use): the copies must stay equal."""
    reached = {name for code in codes for name in code.gradients}
    held = [{i.target for i in code.inputs if i.trainable} for code in codes]
    missing = [frozenset(names & reached - set(code.gradients)) for names, code in zip(held, codes, strict=True)]
    return {index: names for index, names in enumerate(missing) if names}


def _tied(stages: Sequence[Sequence[StageCode]]) -> dict[str, str]:
    """Trainable parameters that more than one stage holds: their copies share one gradient."""
    holders = Counter(name for codes in stages for name in {name for code in codes for name in code.gradients})
    return {name: name for name, count in holders.items() if count > 1}


def _link_stage(
    traced: Traced,
    chunks: tuple[StageCode, ...],
    shards: tuple[ParameterShard, ...],
    tied: Mapping[str, str],
    inner: int,
    has_optimizer: bool,
) -> LinkedStage:
    buckets = merged_buckets(chunks)
    group_of = {name: group for code in chunks for group, names in code.groups for name in names}
    layout, alone = gradient_layout(_finished(chunks), buckets, shards, group_of)
    reductions = reductions_of(buckets, alone, tied, inner)
    names = tuple(i.node for i in merged_inputs(chunks) if i.kind == "step")
    graph = prologue(traced.global_graph, names)
    source, ops = render_prologue(graph)
    gathers = gathers_of(buckets, has_optimizer=has_optimizer)
    return LinkedStage(chunks, shards, layout, reductions, gathers, source, ops, graph.inputs if graph else ())


def _finished(chunks: Sequence[StageCode]) -> tuple[str, ...]:
    """Parameters in the order in which the last microbatch completes their gradients: the last chunk's first."""
    names = [name for code in reversed(chunks) for name in code.gradients]
    return tuple(reversed(dict.fromkeys(reversed(names))))


def _parameter_shards(
    chunks: Sequence[StageCode], dp: int, axes: Axes, tied: Mapping[str, str]
) -> tuple[ParameterShard, ...]:
    """The stage's parameters and buffers; ``tied``: parameter -> its cross-stage group."""
    trained = {name for code in chunks for name in code.gradients}
    found: dict[str, ParameterShard] = {}
    for code in chunks:
        for item in code.inputs:
            if item.is_held:
                place, name = code.placements[item.node], item.target
                axis = reduce_axis(place, dp, axes)
                meta, kept = code.metas[item.node], code.types(item)
                shard = ParameterShard(name, meta, placements_text(place), name in trained, axis, tied.get(name), kept)
                found[name] = shard
    return tuple(found.values())
