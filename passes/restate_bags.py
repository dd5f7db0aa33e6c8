"""Restate embedding bags, of which torch knows ids one after the other and where each bag begins.

Bags of one size are a lookup and a reduction along the bag; others add the rows that their ids name up where they
belong, or take the largest there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cost_model.errors import UnsupportedError
from cost_model.tensor import TensorMeta
from passes.graph import source_of
from passes.restate import rewrites

if TYPE_CHECKING:
    from passes.clean import Cleaner

aten = torch.ops.aten
_SUM, _MEAN, _MAX = range(3)
"""Modes, as torch numbers them."""


@rewrites(aten.embedding_bag.padding_idx, aten.embedding_bag.default)
def _bags(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    if a["scale_grad_by_freq"]:
        raise UnsupportedError(
            f"{node.target} scales gradients by how often an id comes in the batch ({source_of(node)}), which no rule "
            "divides: leave scale_grad_by_freq=False"
        )
    words = None if a["include_last_offset"] else _bag_size(a["offsets"], run.tensor(a["indices"]))
    reduced = _of_any_size(run, node, a) if words is None else _of_one_size(run, node, a, words)
    return [reduced, None, None, None]


def _of_one_size(run: Cleaner, node: fx.Node, a: dict[str, Any], words: int) -> Any:
    """[bags, words] ids: rows of the table, those of the padding left out, reduced along the words."""
    ids = run.tensor(a["indices"])
    flat = TensorMeta((ids.numel // words, words), ids.dtype)
    places = run.call(aten.reshape.default, (a["indices"], list(flat.shape)), flat, like=node)
    rows, kept = _rows(run, node, a, places)
    return _reduced(run, node, rows, kept, a["mode"])


def _rows(run: Cleaner, node: fx.Node, a: dict[str, Any], ids: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """[*ids, width], each times its weight, and [*ids], which are no padding: None where there is none."""
    table, padding, shape = run.tensor(a["weight"]), a.get("padding_idx"), run.tensor(ids).shape
    wide = TensorMeta((*shape, table.shape[1]), table.dtype)
    rows = run.call(aten.embedding.default, (a["weight"], ids), wide, like=node)
    kept = None
    if padding is not None:
        kept = run.call(aten.ne.Scalar, (ids, padding % table.shape[0]), TensorMeta(shape, "bool"), like=node)
    if a["per_sample_weights"] is not None:
        weights = TensorMeta((*shape, 1), run.tensor(a["per_sample_weights"]).dtype)
        each = run.call(aten.reshape.default, (a["per_sample_weights"], list(weights.shape)), weights, like=node)
        rows = run.call(aten.mul.Tensor, (rows, each), wide, like=node)
    return rows, kept


def _of_any_size(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> fx.Node:
    """[ids] in bags that begin at the offsets, perhaps with one more where the last ends."""
    (count,), offsets = run.tensor(a["indices"]).shape, a["offsets"]
    rows, kept = _rows(run, node, a, a["indices"])
    meta, bags, mode = run.tensor(rows), run.tensor(offsets).shape[0] - int(a["include_last_offset"]), a["mode"]
    bag = _bag_of(run, node, offsets, count)
    out = TensorMeta((bags, meta.shape[1]), meta.dtype)
    if mode == _MAX:
        return _largest_of_bags(run, node, rows, kept, bag, out)
    if kept is not None:
        rows = _filled(run, node, rows, kept, 0.0)
    total = _added(run, node, rows, bag, out)
    if mode == _SUM:
        return total
    number = _number(run, node, kept, bag, (bags, count), meta.dtype)
    made = run.call(aten.div.Tensor, (total, number), out, like=node)
    assert isinstance(made, fx.Node)
    return made


def _bag_of(run: Cleaner, node: fx.Node, offsets: fx.Node, count: int) -> fx.Node:
    """[ids]: the number of the bag that each lies in."""
    begins = run.tensor(offsets)
    numbers = TensorMeta((count,), begins.dtype)
    places = run.call(aten.arange.default, (count,), numbers, like=node, dtype=getattr(torch, begins.dtype))
    found = TensorMeta((count,), "int64")
    after = run.call(aten.searchsorted.Tensor, (offsets, places), found, like=node, right=True)
    bag = run.call(aten.sub.Scalar, (after, 1), found, like=node)
    assert isinstance(bag, fx.Node)
    return bag


def _added(run: Cleaner, node: fx.Node, rows: fx.Node, bag: fx.Node, out: TensorMeta) -> fx.Node:
    zeros = run.call(aten.full.default, (list(out.shape), 0), out, like=node, dtype=getattr(torch, out.dtype))
    added = run.call(aten.index_add.default, (zeros, 0, bag, rows), out, like=node)
    assert isinstance(added, fx.Node)
    return added


def _number(
    run: Cleaner, node: fx.Node, kept: fx.Node | None, bag: fx.Node, sizes: tuple[int, int], dtype: str
) -> fx.Node:
    """[bags, 1]: how many ids of each count, one for none."""
    bags, count = sizes
    if kept is None:
        ones = TensorMeta((count,), dtype)
        each = run.call(aten.full.default, ([count], 1), ones, like=node, dtype=getattr(torch, dtype))
    else:
        each = run.cast(node, kept, dtype)
    number = _added(run, node, each, bag, TensorMeta((bags,), dtype))
    least = run.call(aten.clamp_min.default, (number, 1), TensorMeta((bags,), dtype), like=node)
    column = run.call(aten.unsqueeze.default, (least, 1), TensorMeta((bags, 1), dtype), like=node)
    assert isinstance(column, fx.Node)
    return column


def _largest_of_bags(
    run: Cleaner, node: fx.Node, rows: fx.Node, kept: fx.Node | None, bag: fx.Node, out: TensorMeta
) -> fx.Node:
    """Of a bag of none zero."""
    meta = run.tensor(rows)
    if kept is not None:
        rows = _filled(run, node, rows, kept, -torch.inf)
    column = run.call(aten.unsqueeze.default, (bag, 1), TensorMeta((meta.shape[0], 1), "int64"), like=node)
    index = run.call(aten.expand.default, (column, list(meta.shape)), TensorMeta(meta.shape, "int64"), like=node)
    lowest = run.call(aten.full.default, (list(out.shape), -torch.inf), out, like=node, dtype=getattr(torch, out.dtype))
    args = (lowest, 0, index, rows, "amax")
    largest = run.call(aten.scatter_reduce.two, args, out, like=node)
    some = run.call(aten.ne.Scalar, (largest, -torch.inf), TensorMeta(out.shape, "bool"), like=node)
    made = run.call(aten.where.ScalarOther, (some, largest, 0.0), out, like=node)
    assert isinstance(made, fx.Node)
    return made


def _filled(run: Cleaner, node: fx.Node, rows: fx.Node, kept: fx.Node, filler: float) -> fx.Node:
    """Rows that are not kept are all ``filler``."""
    meta = run.tensor(rows)
    column, dim = TensorMeta((*meta.shape[:-1], 1), "bool"), len(meta.shape) - 1
    shown = run.call(aten.unsqueeze.default, (kept, dim), column, like=node)
    made = run.call(aten.where.ScalarOther, (shown, rows, filler), meta, like=node)
    assert isinstance(made, fx.Node)
    return made


def _bag_size(offsets: Any, ids: TensorMeta) -> int | None:
    """The size that all bags have; None where offsets are not those of torch's own [bags, words] form."""
    is_range = isinstance(offsets, fx.Node) and offsets.target in (aten.arange.start_step, aten.arange.start)
    if not is_range:
        return None
    start, end, *rest = offsets.args
    step = rest[0] if rest else 1
    return step if isinstance(step, int) and (start, end) == (0, ids.numel) and ids.numel % step == 0 else None


def _reduced(run: Cleaner, node: fx.Node, rows: fx.Node, kept: fx.Node | None, mode: int) -> Any:
    """[bags, words, width] -> [bags, width]; words that are not kept count nothing, and a bag of none is zero."""
    meta = run.tensor(rows)
    bags, words, _ = meta.shape
    if kept is not None:
        rows = _filled(run, node, rows, kept, -torch.inf if mode == _MAX else 0.0)
    out = TensorMeta((bags, meta.shape[2]), meta.dtype)
    if mode == _MAX:
        largest = run.call(aten.amax.default, (rows, [1]), out, like=node)
        if kept is None:
            return largest
        some = run.call(aten.any.dim, (kept, 1, True), TensorMeta((bags, 1), "bool"), like=node)
        return run.call(aten.where.ScalarOther, (some, largest, 0.0), out, like=node)
    total = run.cast(node, run.summed(node, rows, [1]), meta.dtype)
    if mode == _SUM:
        return total
    if kept is None:
        return run.call(aten.mul.Tensor, (total, 1.0 / words), out, like=node)
    number = run.call(aten.sum.dim_IntList, (kept, [1], True), TensorMeta((bags, 1), "int64"), like=node)
    least = run.call(aten.clamp_min.default, (number, 1), TensorMeta((bags, 1), "int64"), like=node)
    return run.call(aten.div.Tensor, (total, run.cast(node, least, meta.dtype)), out, like=node)
