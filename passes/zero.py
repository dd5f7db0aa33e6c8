"""Zero: parameters whose state is split over the dp axis, and what of it a stage's blocks must say.

A parameter at level 3 is gathered where a segment first uses it, in forward and again in backward, and dies with its
last use there. A gradient at level 2 or 3 goes into a bucket that lives as long as its segment's backward takes, is
reduced and scattered, and the rank's part is added to what the rank keeps.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cost_model.axes import Axes
from cost_model.placement import Placements, varying_axes
from cost_model.precision import Precision
from cost_model.shards import Bucket
from cost_model.tensor import TensorMeta
from passes import vocabulary
from passes.fakes import fake_tensor
from passes.fuse import ACCUMULATIONS, parameter_of, product
from passes.graph import GraphInput, ModelGraph, torch_dtype
from passes.pieces import segment_of
from passes.split import SplitGraphs, inputs_first
from passes.storage import own_storage, renamed, storage_of

aten = torch.ops.aten
AXIS = "dp"
BUCKET_BYTES = 64 * 2**20


def zero_key(node: str) -> str:
    return f"zero:{node}"


def scatters(node: str, choices: Mapping[str, str], dp: int) -> bool:
    """Whether a parameter's gradient is reduced and scattered after each microbatch."""
    return dp > 1 and int(choices.get(zero_key(node), "0")) > 1


def stateless(choices: Mapping[str, str]) -> dict[str, str] | None:
    """The choices but for how state is split, where that is seen by no more than the step's end; None where
    microbatches gather or scatter something."""
    levels = {key: int(level) for key, level in choices.items() if key.startswith(zero_key(""))}
    return {k: v for k, v in choices.items() if k not in levels} if max(levels.values(), default=0) < 2 else None


# --- Which parameters lie together


def make_buckets(
    order: Sequence[str],
    model: ModelGraph,
    placements: Mapping[str, Placements],
    metas: Mapping[str, TensorMeta],
    choices: Mapping[str, str],
    degrees: tuple[int, Axes],
    shared: Collection[str],
    suffix: str,
    precision: Precision,
) -> tuple[Bucket, ...]:
    """Buckets of parameters with one level, dtype and way to be reduced; from level 2 on, of the same segments too.

    order: that in which gradients are finished. model: the graph that the inputs belong to. choices: as in
    ``StagePlan``. degrees: dp and the mesh of a replica. shared: parameters, by node, that other stages
    hold too; each has a bucket of its own with its name, so that its parts lie alike in all of them. suffix: of other
    buckets' names, which no two virtual stages of a stage have in common. Without a gradient a parameter is split at
    level 3 only.
    """
    dp, mesh = degrees
    places = {name: index for index, name in enumerate(order)}
    used = _segments_of(model)
    members: dict[tuple[int, tuple[int, ...], str, bool, str, str | None], list[GraphInput]] = {}
    for item in sorted(model.inputs, key=lambda i: places.get(i.target, -1)):
        level = int(choices.get(zero_key(item.node), "0"))
        trainable = item.target in places
        if item.kind == "parameter" and dp > 1 and (level == 3 or (level and trainable)):
            varying = varying_name(placements[item.node], mesh) if trainable else ""
            tied = item.target if item.node in shared else None
            where = used.get(item.node, ()) if level > 1 else ()
            key = (level, where, metas[item.node].dtype, trainable, varying, tied)
            members.setdefault(key, []).append(item)
    found: list[Bucket] = []
    rows = [(key, row) for key, items in members.items() for row in _rows(items, metas, whole=key[0] > 1)]
    for number, ((level, _, dtype, trainable, varying, tied), items) in enumerate(rows):
        parameters = tuple((i.target, metas[i.node].numel) for i in items)
        name = f"zero{level}/{tied or f'{number}{suffix}'}"
        found.append(Bucket(name, level, dtype, dp, parameters, trainable, varying, tied, precision.kept(dtype)))
    return tuple(found)


def varying_name(places: Placements, mesh: Axes) -> str:
    """The axes of a mesh over which a parameter's gradient is a sum, by name; empty where there are none."""
    axes = varying_axes(places) if mesh.size > 1 else ()
    return mesh.name(axes) if axes else ""


def _rows(items: list[GraphInput], metas: Mapping[str, TensorMeta], *, whole: bool) -> Iterator[list[GraphInput]]:
    """Rows of at most ``BUCKET_BYTES``, or of one parameter: what a collective holds besides stays small."""
    row: list[GraphInput] = []
    for item in items:
        if row and not whole and sum(metas[i.node].nbytes for i in (*row, item)) > BUCKET_BYTES:
            yield row
            row = []
        row.append(item)
    yield row


def finished(graphs: SplitGraphs) -> tuple[str, ...]:
    """Parameters in the order in which their gradients are complete."""
    names = [parameter_of(n) for n in graphs.backwards[-1].nodes if n.target in ACCUMULATIONS]
    return tuple(reversed(dict.fromkeys(reversed(names))))


def _segments_of(model: ModelGraph) -> dict[str, tuple[int, ...]]:
    """Input -> segments that use it."""
    inputs = (n for n in model.graph.nodes if n.op == "placeholder")
    return {n.name: tuple(sorted({segment_of(u) for u in n.users if u.op != "output"})) for n in inputs}


# --- What the blocks say


def shard_state(graphs: SplitGraphs, buckets: Sequence[Bucket], parameters: Mapping[str, str]) -> SplitGraphs:
    """The graphs with gathers, buckets and reductions written out. parameters: placeholder -> the model's name."""
    split = [bucket for bucket in buckets if bucket.zero == 3]
    for graph in (graphs.forward, *graphs.backwards) if split else ():
        _gather_all(graph, split, parameters)
    for bucket in buckets:
        if bucket.zero > 1 and bucket.trainable:
            _scatter(graphs.backwards[-1], bucket)
    for graph in (graphs.forward, *graphs.backwards):
        inputs_first(graph)
    return graphs


def shard_name(bucket: Bucket) -> str:
    """The variable that holds a rank's part of a bucket's parameters."""
    return re.sub(r"\W", "_", bucket.name)


def _gather_all(graph: fx.Graph, buckets: Sequence[Bucket], parameters: Mapping[str, str]) -> None:
    """Each segment that uses a parameter of a bucket gathers it before the first such use."""
    places, inputs = {node: place for place, node in enumerate(graph.nodes)}, defaultdict[str, list[fx.Node]](list)
    for node in graph.find_nodes(op="placeholder"):
        inputs[parameters.get(node.name, "")].append(node)
    for bucket in buckets:
        offsets = {node: offset for name, offset in bucket.offsets().items() for node in inputs[name]}
        whole = {node: offsets[node] for node in sorted(offsets, key=places.__getitem__)}
        if whole:
            _gather(
                graph, bucket, whole, sorted({user for node in whole for user in node.users}, key=places.__getitem__)
            )


def _gather(graph: fx.Graph, bucket: Bucket, whole: Mapping[fx.Node, int], using: Iterable[fx.Node]) -> None:
    """whole: placeholders of the bucket's parameters -> where they begin. using: what uses them, in order."""
    users: dict[int, list[fx.Node]] = {}
    for node in using:
        users.setdefault(segment_of(node), []).append(node)
    with graph.inserting_before(next(iter(graph.nodes))):
        shard = graph.placeholder(shard_name(bucket))
    _describe(shard, bucket.part, ("input", shard.name))
    for segment, uses in users.items():
        with graph.inserting_before(uses[0]):
            full = graph.call_function(vocabulary.all_gather, (shard, AXIS, bucket.dp, 0, 1))
            _describe(full, bucket.meta, own_storage(full), segment, _label(uses[0]))
            for node, offset in whole.items():
                if any(node in use.all_input_nodes for use in uses):
                    _unpack(graph, node, full, offset, uses)
    for node in whole:
        graph.erase_node(node)


def _unpack(graph: fx.Graph, parameter: fx.Node, full: fx.Node, offset: int, uses: list[fx.Node]) -> None:
    value = parameter.meta["val"]
    args = (full, list(value.shape), list(value.contiguous().stride()), offset)
    view = graph.call_function(aten.as_strided.default, args)
    view.meta = {**full.meta, "val": value}
    for use in uses:
        use.replace_input_with(parameter, view)
        _move_views(use, storage_of(parameter), full.meta["storage"])


def _move_views(node: fx.Node, before: Hashable, after: Hashable) -> None:
    """Views of a parameter, and views of these, lie in what has been gathered."""
    identity = node.meta.get("storage")
    moved = renamed(identity, lambda storage: after if storage == before else storage)
    if moved != identity:
        node.meta["storage"] = moved
        for user in node.users:
            _move_views(user, before, after)


def _scatter(graph: fx.Graph, bucket: Bucket) -> None:
    """Finished gradients go into the bucket; after the last of them it is reduced."""
    offsets = bucket.offsets()
    done = [n for n in graph.nodes if n.target in ACCUMULATIONS and parameter_of(n) in offsets]
    segment = max(segment_of(n) for n in done)
    row = _row(graph, bucket, done, segment)
    with graph.inserting_before(done[-1]):
        part = graph.call_function(vocabulary.reduce_scatter, (row, AXIS, bucket.dp, 0, 1))
        _describe(part, bucket.reduced_part, ("scattered", part.name), segment, _label(done[-1]))
        assert bucket.gradients is not None
        if bucket.gradients.dtype != bucket.reduced.dtype:
            part = graph.call_function(aten.to.dtype, (part, torch_dtype(bucket.gradients.dtype)))
            _describe(part, bucket.gradients, ("cast", part.name), segment, _label(done[-1]))
        kept = graph.call_function(vocabulary.accumulate, (part, bucket.name))
        kept.meta = {"segment": segment, "label": _label(done[-1])}
    for node in done:
        graph.erase_node(node)


def _row(graph: fx.Graph, bucket: Bucket, done: list[fx.Node], segment: int) -> fx.Node:
    """All gradients of the bucket in a row; a single one that needs no padding is one already."""
    if len(done) == 1 and (only := _whole_row(graph, bucket, done[0])) is not None:
        with graph.inserting_before(done[0]):
            row = graph.call_function(aten.view.default, (only, [bucket.numel]))
        _describe(row, bucket.reduced, only.meta["storage"], segment, _label(done[0]))
        return row
    with graph.inserting_before(done[0]):
        row = graph.call_function(_blank(bucket, done), ([bucket.numel],))
    row.kwargs = {"dtype": torch_dtype(bucket.reduced.dtype), "device": torch.device("cpu")}
    _describe(row, bucket.reduced, ("bucket", row.name), segment, _label(done[0]))
    for node in done:
        write = vocabulary.put if node.target is vocabulary.accumulate else vocabulary.put_product
        with graph.inserting_before(node):
            put = graph.call_function(write, (row, *node.args[:-1], bucket.offsets()[parameter_of(node)]))
        put.meta = {"segment": segment, "label": _label(node)}
    return row


def _blank(bucket: Bucket, done: list[fx.Node]) -> Any:
    """What makes the row: zeros only where gradients leave padding between or behind them."""
    sizes = dict(bucket.parameters)
    covered = sum(sizes[name] for name in {parameter_of(n) for n in done}) == bucket.numel
    return aten.empty.memory_format if covered else aten.zeros.default


def _whole_row(graph: fx.Graph, bucket: Bucket, node: fx.Node) -> fx.Node | None:
    """The only gradient of a bucket, where it is laid out as the bucket's row."""
    if node.target is vocabulary.accumulate_product:
        return product(graph, node) if sum(numel for _, numel in bucket.parameters) == bucket.numel else None
    gradient = node.args[0]
    assert isinstance(gradient, fx.Node)
    value = gradient.meta["val"]
    same = value.numel() == bucket.numel and value.dtype == torch_dtype(bucket.reduced.dtype)
    return gradient if same and value.is_contiguous() else None


def _label(node: object) -> str:
    return str(node.meta.get("label", "")) if isinstance(node, fx.Node) else ""


def _describe(node: fx.Node, meta: TensorMeta, storage: object, segment: int = -1, label: str = "") -> None:
    """Meta of a new contiguous value."""
    value = fake_tensor(meta.shape, torch_dtype(meta.dtype))
    node.meta = {"val": value, "storage": storage, "segment": segment, "label": label}
