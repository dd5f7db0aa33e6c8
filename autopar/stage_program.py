"""Stage program: what prices and memory see of a linked stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autopar.gradient_norm import FOUND, NORM
from autopar.linked import LinkedStage
from autopar.optimizer_price import OptimizerPrice
from cost_model.mesh import Mesh
from cost_model.placement import split_axes
from cost_model.plan import Plan, StagePlan
from cost_model.program import Chunk, Collective, StageProgram, StepWork, Value
from passes.stage import StageCode
from passes.trace import Traced

_LOSS_BYTES = 8  # one float64


def stage_program(
    traced: Traced,
    stage: LinkedStage,
    index: int,
    plan: Plan,
    price: OptimizerPrice,
    fed: Sequence[Collective],
    *,
    clips: bool,
    has_optimizer: bool,
) -> StageProgram:
    collectives = [*fed, *(r.collective for r in stage.reductions)]
    groups = [*(None for _ in fed), *(r.group for r in stage.reductions)]
    casts = [*(0 for _ in fed), *(r.beside_bytes for r in stage.reductions)]
    if len(plan.placement) > 1:
        collectives += [FOUND] if plan.precision.scales_loss else []
        collectives += [NORM] if clips else []
        collectives.append(Collective("all_reduce", "world", _LOSS_BYTES))
    own = zip(stage.chunks, plan.chunks(index), strict=True)
    return StageProgram(
        stage=index,
        chunks=tuple(_chunk(code, part, plan.mesh(index)) for code, part in own),
        parameters=stage.shards,
        persistent=_persistent(traced, stage, plan.mesh(index).dp),
        step=StepWork(
            tuple(collectives),
            price.costs,
            price.state_bytes,
            price.workspace_bytes,
            tuple(g.collective for g in stage.gathers),
            tuple(meta.nbytes for meta in stage.updated.values()),
            tuple(meta.nbytes for meta in stage.masters) if has_optimizer else (),
            (*casts, *(0 for _ in collectives[len(casts) :])),
            (*groups, *(None for _ in collectives[len(groups) :])),
        ),
        buckets=stage.buckets,
    )


def _chunk(code: StageCode, plan: StagePlan, mesh: Mesh) -> Chunk:
    entry = next((code.placements[i.node] for i in code.inputs if i.kind == "activation"), None)
    return Chunk(
        segments=tuple(range(plan.first_segment, plan.last_segment)),
        forward=code.forward,
        backward=code.backward,
        saved=code.saved,
        sent=code.sent,
        received=code.received,
        constants=code.constants,
        weight=code.weight,
        kept=code.kept,
        sent_split=code.sent is not None and mesh.tp > 1 and bool(split_axes(code.exit)),
        received_split=mesh.tp > 1 and entry is not None and bool(split_axes(entry)),
    )


def _persistent(traced: Traced, stage: LinkedStage, dp: int) -> tuple[Value, ...]:
    """What a rank holds all step beside parameters: its part of the batch's inputs, step values, new buffers."""
    whole = traced.global_graph
    metas = {i.node: whole.tensor(i.node) for i in stage.inputs if i.kind in ("step", "scale")}
    for item, own_rows in stage.batch_inputs.items():
        meta = whole.tensor(item.node)
        metas[item.node] = replace(meta, shape=(meta.shape[0] // dp, *meta.shape[1:])) if own_rows else meta
    values = [Value(name, meta, name, meta.nbytes) for name, meta in metas.items()]
    changed = [(name, stage.metas[name]) for name in stage.updates]
    return (*values, *(Value(f"new {name}", meta, f"new {name}", meta.nbytes) for name, meta in changed))
