"""Rows: those that a mask picks, as all that there are, and which of them are meant; calls of them in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from passes.restate_masks import refused
from passes.rewriter import MASK, PICKED, SOURCE_KEYS

aten = torch.ops.aten
_SHAPED = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}


@dataclass(frozen=True)
class Rows:
    """mask: which of the rows are picked [rows]; absent: which are not; count: the rows."""

    mask: fx.Node
    absent: fx.Node
    count: int


class RowGraph:
    """A graph to which calls of rows are added, with fake values.

    of_mask: the rows that each mask picks; of_symbol: by the unknown number of those that are picked; of_sizes: the
    parts of a value, by what says how long they are and by its length.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.of_mask: dict[fx.Node, Rows] = {}
        self.of_symbol: dict[Any, Rows] = {}
        self.of_sizes: dict[Any, tuple[Rows, ...]] = {}
        self._firsts: dict[tuple[Any, str], fx.Node] = {}
        self._first: dict[fx.Node, fx.Node] = {}

    def rows_of(self, node: fx.Node, mask: fx.Node) -> Rows:
        mask, count = self.first_like(mask), mask.meta["val"].numel()
        if mask not in self.of_mask:
            flat = self.call(aten.reshape.default, (mask, [count]), node)
            if flat.meta["val"].dtype != torch.bool:
                flat = self.call(aten.ne.Scalar, (flat, 0), node)
            absent = self.call(aten.logical_not.default, (flat,), node, MASK)
            self.of_mask[mask] = Rows(flat, absent, count)
        return self.of_mask[mask]

    def first_like(self, mask: fx.Node) -> fx.Node:
        """The first of all calls that make the same of the same values; of those before, known when it is asked for."""
        if mask not in self._first:
            form = str(fx.map_arg((mask.args, dict(mask.kwargs)), lambda operand: self._first.get(operand, operand)))
            draws = torch.Tag.nondeterministic_seeded in getattr(mask.target, "tags", ())
            alone = draws or mask.op != "call_function"
            self._first[mask] = mask if alone else self._firsts.setdefault((mask.target, form), mask)
        return self._first[mask]

    def masked(self, value: fx.Node, rows: Rows, fill: float, mark: str | None, node: fx.Node) -> fx.Node:
        """``value``, whose rows may have become several each, with rows that are not picked filled."""
        shape, absent = value.meta["val"].shape, rows.absent
        each = shape[0] // rows.count
        if each != 1:
            for op, to in ((aten.reshape, (rows.count, 1)), (aten.expand, (rows.count, each)), (aten.reshape, (-1,))):
                absent = self.call(op.default, (absent, list(to)), node)
        if len(shape) > 1:
            absent = self.call(aten.reshape.default, (absent, [shape[0], *[1] * (len(shape) - 1)]), node)
        return self.call(aten.masked_fill.Scalar, (value, absent, fill), node, mark)

    def call(
        self, target: Any, args: tuple[Any, ...], like: fx.Node, mark: str | None = None, **kwargs: Any
    ) -> fx.Node:
        made = self.graph.call_function(target, args, kwargs)
        made.meta.update({key: like.meta[key] for key in SOURCE_KEYS if key in like.meta})
        if mark is not None:
            made.meta[PICKED] = mark
        values, named = fx.map_arg((args, kwargs), lambda operand: operand.meta["val"])
        leaves = pytree.tree_leaves((values, named, like.meta["val"]))
        mode = next(leaf.fake_mode for leaf in leaves if hasattr(leaf, "fake_mode"))
        with mode, torch.no_grad():
            made.meta["val"] = target(*values, **named)
        return made

    def replace(self, node: fx.Node, made: fx.Node) -> None:
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)

    def counted(self, node: fx.Node, rows: Rows, each: int, dtype: torch.dtype) -> fx.Node:
        count = self.call(aten.sum.default, (rows.mask,), node)
        many = self.call(aten.mul.Tensor, (count, each), node) if each != 1 else count
        return self.call(aten._to_copy.default, (many,), node, dtype=dtype)

    def divided(self, node: fx.Node, total: fx.Node, rows: Rows, each: int) -> fx.Node:
        """By how many are picked, in the dtype of the mean; each: elements of a row that were added."""
        mean = self.call(aten.div.Tensor, (total, self.counted(node, rows, each, wide(total))), node)
        return self.call(aten._to_copy.default, (mean,), node, dtype=node.meta["val"].dtype)

    def _of_parts(self, number: Any) -> Any:
        """With the lengths of all parts of a value as its length."""
        symbols = {rows: symbol for symbol, rows in self.of_symbol.items()}
        for (_, count), parts in self.of_sizes.items():
            if all(rows in symbols for rows in parts):
                whole = number.subs(symbols[parts[-1]], count - sum(symbols[rows] for rows in parts[:-1]))
                number = whole if whole.is_Integer else number
        return number

    def is_whole(self, number: fx.Node) -> bool:
        """Whether it is the length of all parts of a value."""
        return bool(self._of_parts(expression(number.meta["val"])).is_Integer)

    def sized(self, node: fx.Node, given: Any) -> Any:
        """Arguments with the numbers of rows there are, where a shape is made of them."""

        def size(value: fx.Node) -> Any:
            number = value.meta.get("val")
            if not isinstance(number, torch.SymInt):
                return value
            counts = {symbol: rows.count for symbol, rows in self.of_symbol.items()}
            found = self._of_parts(expression(number))
            if found.is_Integer:
                return int(found)
            found = found.subs(counts)
            if node.target not in _SHAPED or not found.is_Integer:
                raise refused(node)
            return int(found)

        return fx.map_arg(given, size)


def wide(node: fx.Node) -> torch.dtype:
    """In what values are added and counted: half types in float32."""
    dtype: torch.dtype = node.meta["val"].dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def expression(number: torch.SymInt) -> Any:
    return number.node.expr
