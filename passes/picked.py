"""Picked: rows that a mask does not pick reach no other row, and nothing but what counts them as nothing.

What ``passes.pick`` marks is followed through the clean graph: each of its rows is a part of its own, and calls whose
factor maps keep all parts apart may come in between, up to where rows that are not picked are zero, or are ignored.
"""

from __future__ import annotations

from torch import fx

from cost_model.ops import entry_of
from cost_model.placement import Shard
from cost_model.strategies import follow
from cost_model.tensor import TensorMeta
from passes.calls import call_of, tensor_args
from passes.graph import ModelGraph, is_getitem, op_name
from passes.restate_masks import refused
from passes.rewriter import FIRST, LAST, LOSS, MASK, PICKED
from passes.vocabulary import collect

_ROWS = Shard(0)


def check_picked(model: ModelGraph) -> None:
    """UnsupportedError where a row that is not picked might count."""
    if not any(PICKED in node.meta for node in model.nodes()):
        return
    rows: dict[str, int] = {}
    for node in model.nodes():
        mark = node.meta.get(PICKED)
        many = {rows[operand.name] for operand in tensor_args(node) if operand.name in rows}
        of_rows = any(operand.name in rows for operand in tensor_args(node)[:1])
        if of_rows and (mark == FIRST or node.target is collect):  # rows of rows, or what the caller would see of them
            raise refused(node)
        if mark == FIRST or (mark == MASK and not many):
            rows[node.name] = model.tensor(node.name).shape[0]
        elif len(many) > 1:
            raise refused(node)
        elif many and _are_rows(model, node, mark, rows, *many):
            rows[node.name] = many.pop()
    if any(name in rows for name in model.outputs):
        raise refused(next(n for n in model.nodes() if n.name in model.outputs))


def picked_notes(model: ModelGraph) -> tuple[str, ...]:
    """What programs compute that one device does not."""
    calls = sum(node.meta.get(PICKED) == FIRST for node in model.nodes())
    said = f"what masks pick in {calls} call(s) is computed for all rows, of which those not picked count for nothing"
    return (said,) if calls else ()


def _are_rows(model: ModelGraph, node: fx.Node, mark: str | None, rows: dict[str, int], count: int) -> bool:
    """Whether a call of rows makes rows; UnsupportedError where it mixes them."""
    meta = model.metas[node.name]
    if mark == LOSS:
        return isinstance(meta, TensorMeta) and meta.shape[:1] == (count,)
    if not is_getitem(node) and not _keeps_apart(model, node, rows, count):
        raise refused(node)
    return mark != LAST


def _keeps_apart(model: ModelGraph, node: fx.Node, rows: dict[str, int], count: int) -> bool:
    """Whether a row of each result is made of one row of each operand; what else there is may have rows of its own."""
    entry = entry_of(op_name(node))
    rule = entry.factors(call_of(node, model.metas)) if entry is not None else None
    if rule is None:
        return False
    given = [operand.name in rows for operand in tensor_args(node)]
    strategy = follow(rule, "in", given.index(True), _ROWS, count)
    if strategy is None or any(place != _ROWS for place in strategy.outputs):
        return False
    return all(place == _ROWS for place, own in zip(strategy.inputs, given, strict=True) if own)
