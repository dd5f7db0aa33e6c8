"""Payload: what one rank receives, plain data only: its source, its shards, its place in every group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS

from autopar.gradient_norm import norm_spans
from autopar.linked import Linked
from autopar.ranks import under_launcher
from autopar.runtime.comm import shard_of
from autopar.runtime.optim import OptimizerSpec
from autopar.runtime.recipe import blank
from cost_model.axes import ACROSS, DP, INSIDE, TP, Axes, axes_name, members
from cost_model.axis_groups import TIED, axis_groups
from cost_model.errors import ConfigError
from cost_model.placement import REPLICATE, Placements, Shard, split_axes
from cost_model.plan import Plan
from cost_model.program import Program
from cost_model.shards import Bucket
from passes.graph import GraphInput, ModelGraph, is_getitem, torch_dtype
from passes.whole_numbers import as_held

WRAP = " to the other end"


def rank_payload(
    linked: Linked,
    rank: int,
    tensors: Mapping[str, Tensor],
    optimizer: OptimizerSpec | None,
    device: str,
    saved: Collection[str],
    timeout_s: float | None,
    initial: Mapping[str, Any],
) -> dict[str, Any]:
    """The tree that ``RankExecutor`` is built from.

    tensors: of the model, and the constants of its trace, by the names that the graph uses; those on the meta device
    are filled by the rank itself, as ``initial`` says. saved: names of the parameters and buffers of a checkpoint.
    """
    stage, dp, _ = linked.coordinates[rank]
    plan, part, held = linked.plan, linked.stages[stage], _held(linked, stage)
    own, values = local_tensors(linked, rank, tensors)
    buckets = [_bucket(b, dp, {n: own.pop(n) for n, _ in b.parameters}, optimizer) for b in part.buckets]
    masters = {s.name: own[s.name].to(torch_dtype(s.updated.dtype)) for s in part.alone if s.updated != s.meta}
    return {
        **program_payload(linked, rank),
        "device": device,
        "timeout_s": timeout_s,
        "scales_loss": plan.precision.scales_loss,
        "stage": stage,
        "dp_index": dp,
        "buckets": buckets,
        "params": _sent({n: tensor.to(torch_dtype(part.metas[n].dtype)) for n, tensor in own.items()}),
        "masters": _sent({} if optimizer is None else masters),
        "buffers": _sent(values),
        "initial": initial,
        "layouts": {
            n: _layout(linked, rank, n, p if i.kind == "parameter" else _whole(linked), tuple(tensors[n].shape))
            for n, (i, p) in held.items()
            if n in saved
        },
        "updates": part.updates,
        "changes": (*part.updates, *linked.traced.counters),
        "gradients": tuple((dtype, tuple(names)) for dtype, names in part.layout),
        "norm_spans": norm_spans(linked, stage, dp),
        "groups": groups(linked),
        "silent": _silent(linked, rank),
        "optimizer": None if optimizer is None else optimizer.to_tree(),
    }


def local_tensors(
    linked: Linked, rank: int, tensors: Mapping[str, Tensor], but: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The shards of parameters that a rank's program reads, and its buffers; without those called ``but``."""
    stage, _, tp = linked.coordinates[rank]
    held = {name: place for name, place in _held(linked, stage).items() if name not in but}
    axes = linked.plan.axes_of(stage)
    params = {n: _local(tensors[n], p, tp, axes) for n, (i, p) in held.items() if i.kind == "parameter"}
    return params, {n: as_held(tensors[n], i.changes) for n, (i, _) in held.items() if i.kind != "parameter"}


def _held(linked: Linked, stage: int) -> dict[str, tuple[GraphInput, Placements]]:
    """What of the model a stage's ranks hold, and how it lies on the tp axes."""
    part, kinds = linked.stages[stage], ("parameter", "buffer", "constant")
    places, whole = part.places, _whole(linked)
    before = {i.target: (i, places.get(i.target, whole)) for i in part.prologue_inputs if i.kind in kinds[1:]}
    counters = {n: (GraphInput(n, "buffer", n, False, False), whole) for n in linked.traced.counters}
    return {**counters, **{i.target: (i, places[i.target]) for i in part.inputs if i.kind in kinds}, **before}


def _whole(linked: Linked) -> Placements:
    return (REPLICATE,) * len(linked.plan.axes_of(0).sizes)


def program_payload(linked: Linked, rank: int) -> dict[str, Any]:
    """What a rank runs, without what it holds."""
    stage, dp, tp = linked.coordinates[rank]
    plan, part = linked.plan, linked.stages[stage]
    return {
        "source": linked.source(rank),
        "imports": imports(linked.traced.global_graph),
        "kernels": {kernel.name: kernel.inputs for code in part.chunks for kernel in code.kernels},
        "batch": tuple(i.target for i in part.batch_inputs),
        "sliced": _slices(linked, stage, dp),
        "microbatches": plan.microbatches,
        "microbatch_size": plan.samples(stage),
        "accumulates": plan.accumulates,
        "window": plan.window,
        "reports_loss": stage == plan.pp - 1 and tp == 0,
        "chunks": [
            {
                "suffix": code.suffix,
                "received": _meta(code.received),
                "sent": _meta(code.sent),
                "splits_backward": code.weight is not None,
                "links": links(linked, rank, number),
            }
            for number, code in enumerate(part.chunks)
        ],
    }


def imports(graph: ModelGraph) -> list[str]:
    """Modules that define ops of the user's own. Errors: ConfigError for ops of a script, which no rank can import."""
    names = {str(n.target).rpartition(".")[0].replace(".", "::") for n in graph.nodes() if not is_getitem(n)}
    defined = {name: OPDEFS[name]._init_fn.__module__ for name in sorted(names) if name in OPDEFS}
    script = next((name for name, module in defined.items() if module == "__main__"), None)
    if script is not None and not under_launcher():
        raise ConfigError(f"{script} is defined in the script itself; define it in a module, which ranks can import")
    return [module for module in dict.fromkeys(defined.values()) if module != "__main__"]


def _bucket(
    bucket: Bucket, index: int, parameters: Mapping[str, Tensor], optimizer: OptimizerSpec | None
) -> dict[str, Any]:
    """A bucket as ``HeldBucket`` takes it: its weights in a row, or this rank's part of the row."""
    row = _row([p.reshape(-1) for p in parameters.values()])
    row = torch.nn.functional.pad(row, (0, bucket.numel - row.numel()))
    part = row[index * bucket.part.numel : (index + 1) * bucket.part.numel]
    has_master = optimizer is not None and bucket.trainable and bucket.updated != bucket.part
    offsets = bucket.offsets()
    return {
        "name": bucket.name,
        "zero": bucket.zero,
        "dp": bucket.dp,
        "trainable": bucket.trainable,
        "parameters": [(name, list(p.shape), offsets[name]) for name, p in parameters.items()],
        "pieces": [(piece.parameter, piece.offset, piece.start, piece.stop) for piece in bucket.pieces(index)],
        "weights": blank(_copied(part if bucket.zero == 3 else row, bucket.dtype)),
        "master": blank(_copied(part, bucket.updated.dtype)) if has_master else None,
        "grads": bucket.types.grads,
        "reduce": bucket.types.reduce,
    }


def _row(parts: Sequence[Tensor]) -> Tensor:
    """Parts in one row; where some are on the meta device and some are not, zeros stand for those that are."""
    if all(part.is_meta for part in parts):
        return torch.cat(list(parts))
    return torch.cat([torch.zeros_like(part, device="cpu") if part.is_meta else part for part in parts])


def _sent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: blank(tensor) for name, tensor in tensors.items()}


def _copied(tensor: Tensor, dtype: str) -> Tensor:
    return tensor.to(torch_dtype(dtype), copy=True)


def rank_batch(linked: Linked, rank: int, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a rank reads of a batch: the leaves of its stage, and of them the rows of its replica.

    Of a batch that holds only those rows, they are all of it.
    """
    stage, dp, _ = linked.coordinates[rank]
    inputs = linked.stages[stage].batch_inputs
    if linked.local_batches:
        return {i.target: batch[i.target] for i in inputs}
    return {i.target: _own_rows(linked.plan, stage, dp, batch[i.target]) if own else batch[i.target]
            for i, own in inputs.items()}  # fmt: skip


def _own_rows(plan: Plan, stage: int, dp: int, rows: Tensor) -> Tensor:
    """A replica's samples: its part of the batch, or, where numbers of replicas differ, of each microbatch of all."""
    size = plan.samples(stage)
    if not isinstance(plan.dp, tuple):
        return rows.narrow(0, dp * plan.microbatches * size, plan.microbatches * size)
    return rows.view(plan.microbatches, -1, size, *rows.shape[1:])[:, dp].flatten(0, 1)


def _slices(linked: Linked, stage: int, dp: int) -> dict[str, tuple[int, int, int]]:
    """Of each value that holds samples: the row where the replica's begin in it, how many on those of the next
    microbatch are, and how many they are; a sample may have several rows."""
    part, plan = linked.stages[stage], linked.plan
    size, own_rows = plan.samples(stage), {i.target for i, own in part.batch_inputs.items() if own}
    whole = (dp * size, plan.mesh(stage).dp * size) if isinstance(plan.dp, tuple) else (
        dp * plan.microbatches * size, size
    )  # fmt: skip
    counts = {i: code.metas[i.node].shape[0] for code in part.chunks for i in code.inputs if i.batched}
    found = {}
    for i, count in counts.items():
        if i.kind in ("batch", "step"):
            first, on = (0, size) if i.target in own_rows else whole
            found[i.target] = (first * count // size, on * count // size, count)
    return found


def _layout(linked: Linked, rank: int, name: str, places: Placements, shape: tuple[int, ...]) -> dict[str, Any]:
    """The fields of ``autopar.runtime.checkpoint.Layout``; of equal shards the first rank's is written."""
    stage, dp, tp = linked.coordinates[rank]
    is_holder = stage == linked.first_holder[name]
    mesh = linked.plan.axes_of(stage)
    at = mesh.coordinates(tp)
    axes = split_axes(places) if mesh.size > 1 else ()
    splits = [(places[k].dim, places[k].outer, at[k], mesh.sizes[k]) for k in axes]  # type: ignore[union-attr]
    writes = is_holder and not any(place for axis, place in enumerate(at) if axis not in axes)
    return {"shape": shape, "splits": tuple(splits), "writes": writes and dp == 0, "writes_pieces": writes}


def _meta(meta: Any) -> tuple[tuple[int, ...], str] | None:
    return None if meta is None else (meta.shape, meta.dtype)


def _local(tensor: Tensor, places: Placements, index: int, mesh: Axes) -> Tensor:
    """The shard of rank ``index`` of a mesh."""
    at = mesh.coordinates(index)
    shards = [(place, axis) for axis, place in enumerate(places) if isinstance(place, Shard) and mesh.size > 1]
    for place, axis in sorted(shards, key=lambda shard: shard[0].outer, reverse=True):
        tensor = shard_of(tensor, at[axis], mesh.sizes[axis], place.dim, place.outer)
    return tensor.contiguous()


Piece = tuple[int, int, int]
"""(the rank at the other end, first element, behind the last) of what a rank sends or receives."""


def links(linked: Linked, rank: int, chunk: int) -> dict[str, tuple[str, tuple[Piece, ...]]]:
    """What a rank sends and receives for a chunk -> (the process group, the pieces of the tensor).

    From the last stage back to the first messages have groups of their own, so that between two ranks each group
    carries one direction.
    """
    stage, pp = linked.coordinates[rank][0], linked.plan.pp
    back, on = (WRAP if stage == end else "" for end in (0, pp - 1))
    before, own, found = ((stage - 1) % pp, chunk - (stage == 0)), linked.program.stages[stage].chunks[chunk], {}
    if own.received is not None:
        found["receive_forward"] = f"forward{back}", _pieces(linked, rank, before, back=False)
        found["send_backward"] = f"backward{back}", _pieces(linked, rank, before, back=True)
    if own.sent is not None:
        found["send_forward"] = f"forward{on}", _pieces(linked, rank, (stage, chunk), back=False)
        found["receive_backward"] = f"backward{on}", _pieces(linked, rank, (stage, chunk), back=True)
    return found


def _pieces(linked: Linked, rank: int, sender: tuple[int, int], *, back: bool) -> tuple[Piece, ...]:
    """A rank's part in what crosses from a (stage, chunk) to the next one, or comes back."""
    program, (stage, *cell) = linked.program, linked.coordinates[rank]
    first, after = sender[0], (sender[0] + 1) % program.pp
    source, target = (after, first) if back else (first, after)
    found: list[Piece] = []
    for m in program.crossing(*sender, back=back):
        if (stage, *m.source) == (source, *cell):
            found.append((program.devices[target, *m.target], m.start, m.start + m.numel))
        elif (stage, *m.target) == (target, *cell):
            found.append((program.devices[source, *m.source], m.target_start, m.target_start + m.numel))
    return tuple(found)


def _silent(linked: Linked, rank: int) -> list[str]:
    """Axes over which this rank adds nothing: another of its stage gives their gradient."""
    program, own = linked.program, linked.coordinates[rank]
    names = sorted({shard.tied for shard in linked.stages[own[0]].shards if shard.tied})
    found = []
    for name in names:
        group = next(cells for cells in program.tied_groups(name) if own in cells)
        if own != next(cell for cell in group if cell[0] == own[0]):
            found.append(f"{TIED}{name}")
    return found


def _group_size(program: Program, stage: int, axis: str) -> int:
    """Ranks of a stage's groups on an axis; both degrees make one of their own where both are above 1."""
    if axis in (ACROSS, INSIDE):
        return len(axis_groups(program, axis, stage)[0])
    mesh, found = program.meshes[stage], members(axis, len(program.sizes(stage)))
    assert found is not None
    with_dp, axes = found
    shards = math.prod(program.sizes(stage)[axis] for axis in axes)
    if with_dp and axes:
        return mesh.dp * shards if min(mesh.dp, shards) > 1 else 1
    return mesh.dp if with_dp else shards


def _axes(program: Program) -> list[str]:
    """Groups within a stage: of each degree, of tp axes together, of all that some collective is over."""
    count = len(program.tp_sizes)
    every = (axes for number in range(1, count) for axes in itertools.combinations(range(count), number))
    found = [TP, DP, f"{DP}_{TP}", *(axes_name(axes, count) for axes in every)]
    used = {
        c.axis for stage in program.stages for c in stage.collectives() if members(c.axis, max(1, count)) is not None
    }
    groups = (ACROSS, INSIDE) if program.dp_inner > 1 else ()
    return [*found, *sorted(used.difference(found)), *groups]


def groups(linked: Linked) -> dict[str, list[list[int]]]:
    """Every process group by axis name, the same for all ranks and in the same order."""
    program = linked.program
    made: dict[str, list[list[int]]] = {}
    for axis in _axes(program):
        own = [_group_size(program, stage, axis) for stage in range(program.pp)]
        ranks = [list(g) for s, size in enumerate(own) if size > 1 for g in axis_groups(program, axis, s)]
        made.update({axis: ranks} if ranks else {})
    tied = sorted({s.tied: stage.stage for stage in program.stages for s in stage.parameters if s.tied}.items())
    for name, stage in tied:
        made[f"tied:{name}"] = [list(g) for g in axis_groups(program, f"tied:{name}", stage)]
    everyone = list(range(program.num_devices))
    if len(everyone) > 1:
        made["world"] = [list(group) for group in axis_groups(program, "world", 0)]
    if program.pp > 1:
        wraps = ("", WRAP) if program.virtual_stages > 1 else ("",)
        made.update({f"{way}{wrap}": [list(everyone)] for wrap in wraps for way in ("forward", "backward")})
    return made
