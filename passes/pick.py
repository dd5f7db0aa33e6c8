"""Pick: what a boolean mask picks, ``x[mask]``, as all that there is, of which the rest counts for nothing.

A mask picks as many rows as are true, and programs are of fixed shapes. Where rows that are picked are in the end only
added up, or their losses averaged, all rows go the same way: those that are not picked hold ``FILL`` and become zero
where rows are added up, labels of theirs are ignored, and means and sizes go by how many are true. Where a graph is
clean, ``passes.picked`` proves by the factor maps of its calls that rows stay apart until then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from passes.alignment_vocabulary import CTC
from passes.calls import schema_arguments
from passes.graph import is_getitem
from passes.parts import SPLITS, part_masks, sizes_of
from passes.places import OF_MASK, VIEWS, Places, counted_mask, follow, is_one_each, joined, of_first_dims, of_mask
from passes.restate_masks import is_unknown, refused
from passes.rewriter import FIRST, LAST, LOSS, MASK
from passes.rows import RowGraph, Rows, expression, wide
from passes.steep import MAY_FAIL, STEEP

aten = torch.ops.aten
FILL = 0.5
"""Of rows that are not picked, as they are picked from."""
_PICKS = (aten.index.Tensor, aten.masked_select.default, aten.index_select.default)
_CHECKS = (
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
)
"""Of how many rows there are."""
_SUMS = {aten.sum.default, aten.sum.dim_IntList}
_OF_MEANS: dict[Any, Any] = {aten.mean.default: aten.sum.default, aten.mean.dim: aten.sum.dim_IntList}
_LABELLED = {aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default}
_PLACED = {aten.index_put.default, aten.index_add.default, aten.index_copy.default}
_BY_NUMBER = {aten.div.Tensor, aten.mul.Tensor, aten.div.Scalar, aten.mul.Scalar}
_NONE, _MEAN = 0, 1


def pick(module: fx.GraphModule) -> None:
    """Restate a graph in place. What cannot be is left as it is, or UnsupportedError."""
    begins = (*_PICKS, *SPLITS)
    if any(node.target in begins and is_unknown(node.meta.get("val")) for node in module.graph.nodes):
        _Pick(module.graph).run()


class _Pick(RowGraph):
    """rows: of each value whose first dim they are; picked: what they were picked from, and the mask; joined: values
    whose length was unknown until their parts were joined."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self.rows: dict[fx.Node, Rows] = {}
        self.picked: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self.places: dict[Any, Places] = {}
        self.splits: dict[Any, tuple[Rows, ...]] = {}
        self.joined: set[fx.Node] = set()

    def run(self) -> None:
        for node in [n for n in self.graph.nodes if n.op == "call_function"]:
            self.first_like(node)
            try:
                self._call_of(node)
            except (RuntimeError, IndexError) as error:  # a call does not take as many rows as there are
                raise refused(node) from error
        for node in reversed(list(self.graph.nodes)):
            is_number = isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool)
            forgotten = node in self.places or node in self.splits or is_number
            if node.target in _CHECKS or (forgotten and not node.users):
                self.graph.erase_node(node)

    def _call_of(self, node: fx.Node) -> None:
        if node.target in _PICKS and is_unknown(node.meta.get("val")):
            self._begin(node)
        elif node.target in SPLITS and is_unknown(node.meta.get("val")):
            self._split(node)
        elif is_getitem(node) and node.args[0] in self.splits:
            self._part(node)
        elif node.target in OF_MASK or self._lists(node):
            self._place(node)
        elif isinstance(node.target, torch._ops.OpOverload) and self._numbers(node) and node.target in _BY_NUMBER:
            self._by_number(node)
        elif any(operand in self.rows for operand in node.all_input_nodes):
            self._go_on(node)
        elif is_unknown(node.meta.get("val")) and self._follows_joined(node):
            self._settle(node)

    def _follows_joined(self, node: fx.Node) -> bool:
        numbers = [operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), torch.SymInt)]
        return any(operand in self.joined for operand in node.all_input_nodes) or any(map(self.is_whole, numbers))

    def _split(self, node: fx.Node) -> None:
        """Parts of a value, one after the other, as long as values say."""
        source, sizes = node.args[0], sizes_of(node)
        known = isinstance(source, fx.Node) and source not in self.rows and not is_unknown(source.meta["val"])
        if not known or sizes is None:
            raise refused(node)
        count = source.meta["val"].shape[0]  # type: ignore[union-attr]
        if (sizes, count) not in self.of_sizes:
            with self.graph.inserting_before(node):
                masks = part_masks(lambda op, *args, **kwargs: self.call(op, args, node, **kwargs), sizes, count)
                self.of_sizes[sizes, count] = tuple(self.rows_of(node, mask) for mask in masks)
        self.splits[node] = self.of_sizes[sizes, count]

    def _part(self, node: fx.Node) -> None:
        """Of a value, those rows that are one part of it."""
        split, number = node.args
        rows, source = self.splits[split][number], split.args[0]  # type: ignore[index, union-attr]
        assert isinstance(source, fx.Node)
        with self.graph.inserting_before(node):
            self._start(node, source, rows.mask, rows)

    def _settle(self, node: fx.Node) -> None:
        """A call of what was of unknown length until its parts were joined again."""
        if is_getitem(node):
            source, place = node.args
            node.meta["val"] = source.meta["val"][place]  # type: ignore[union-attr]
            self.joined.add(node)
        elif isinstance(node.target, torch._ops.OpOverload) and node.target is not aten.sym_size.int:
            args, kwargs = (self.sized(node, value) for value in (node.args, node.kwargs))
            with self.graph.inserting_before(node):
                made = self.call(node.target, args, node, **kwargs)
            self.joined.add(made)
            self.replace(node, made)

    def _lists(self, node: fx.Node) -> bool:
        return node.target not in _PLACED and any(operand in self.places for operand in node.all_input_nodes)

    def _place(self, node: fx.Node) -> None:
        """Where a mask is true, as lists of places: to pick these is to pick by the mask."""
        source: Any = node.args[0]
        if node.target in OF_MASK:
            self.places[node] = of_mask(self.first_like(source))
        elif node.target is not aten.sym_size.int:
            self.places[node] = follow(node, self.places[source])

    def _begin(self, node: fx.Node) -> None:
        with self.graph.inserting_before(node):
            source, mask = self._picked_from(node)
            self._start(node, source, mask, self.rows_of(node, mask))

    def _start(self, node: fx.Node, source: fx.Node, mask: fx.Node, rows: Rows) -> None:
        """Rows, where they are picked: those of ``source`` that a mask of its first dims says."""
        rest = list(source.meta["val"].shape[mask.meta["val"].dim() :])
        flat = self.call(aten.reshape.default, (source, [rows.count, *rest]), node)
        dtype = flat.meta["val"].dtype
        fill = FILL if dtype.is_floating_point or dtype.is_complex else 0
        made = self.masked(flat, rows, fill, FIRST, node)
        self.rows[made], self.picked[made] = rows, (source, mask)
        (many,) = (extent for extent in node.meta["val"].shape if isinstance(extent, torch.SymInt))
        self.of_symbol[expression(many)] = rows
        self.replace(node, made)

    def _picked_from(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """A value whose first dims are those of a mask, and the mask."""
        source, given = node.args[:2]
        assert isinstance(source, fx.Node)
        if any(operand in self.rows for operand in node.all_input_nodes) or is_unknown(source.meta["val"]):
            raise refused(node)
        if node.target is aten.masked_select.default:
            assert isinstance(given, fx.Node)
            shape = torch.broadcast_shapes(source.meta["val"].shape, given.meta["val"].shape)  # type: ignore[no-untyped-call]
            return self._wide(source, shape, node), self._wide(given, shape, node)
        if node.target is aten.index_select.default:
            given = [*[None] * given, node.args[2]]  # type: ignore[operator]
        assert isinstance(given, list | tuple)
        before = next(dim for dim, index in enumerate(given) if index is not None)
        places = self._places_of(given[before:], node)
        return self._spread(source, before, places, node), places.mask

    def _wide(self, value: fx.Node, shape: torch.Size, node: fx.Node) -> fx.Node:
        return value if value.meta["val"].shape == shape else self.call(aten.expand.default, (value, [*shape]), node)

    def _places_of(self, indices: Any, node: fx.Node) -> Places:
        """Of indices of neighbouring dims."""
        if len(indices) == 1 and isinstance(indices[0], fx.Node) and indices[0].meta["val"].dtype == torch.bool:
            return of_mask(indices[0])
        if not all(index in self.places for index in indices):
            raise refused(node)
        return joined([self.places[index] for index in indices], node)

    def _spread(self, source: fx.Node, before: int, places: Places, node: fx.Node) -> fx.Node:
        """``source``, indexed from dim ``before`` on, with the dims of the mask first, along those missing the same."""
        shape, extents = source.meta["val"].shape, places.mask.meta["val"].shape
        at = {dim: before + number for number, dim in enumerate(places.dims)}
        if shape[:before].numel() != 1 or any(shape[at[dim]] != extents[dim] for dim in at):
            raise refused(node)
        if before and not all(user.target in VIEWS for user in node.users):  # who see elements in their order alone
            raise refused(node)
        if not before and places.dims == tuple(range(len(extents))):
            return source
        rest = [dim for dim in range(len(shape)) if dim not in at.values()]
        turned = self.call(aten.permute.default, (source, [*(at[dim] for dim in sorted(at)), *rest]), node)
        for dim in places.missing:
            turned = self.call(aten.unsqueeze.default, (turned, dim), node)
        return self.call(aten.expand.default, (turned, [*extents, *(shape[dim] for dim in rest)]), node)

    def _go_on(self, node: fx.Node) -> None:
        """A call of rows that were picked."""
        known = {self.rows[operand] for operand in node.all_input_nodes if operand in self.rows}
        if not isinstance(node.target, torch._ops.OpOverload):
            source, *place = node.args
            if is_getitem(node) and isinstance(source, fx.Node):
                self.rows[node] = known.pop()
                node.meta["val"] = source.meta["val"][place[0]]
            return
        if node.target is aten.sym_size.int or node.target in _CHECKS:
            return
        with self.graph.inserting_before(node):
            if len(known) == 1:
                self.replace(node, self._restated(node, *known))
            else:
                self.replace(node, self._rejoined(node))

    def _rejoined(self, node: fx.Node) -> fx.Node:
        """The parts of a value, one after the other again: each row is one of one part, of the others nothing."""
        given = schema_arguments(node)
        parts = tuple(self.rows.get(part) for part in given.get("tensors", ()))
        if node.target is not aten.cat.default or given["dim"] != 0 or parts not in self.of_sizes.values():
            raise refused(node)
        made, *more = (self.masked(part, self.rows[part], 0, LAST, node) for part in given["tensors"])
        for part in more:
            made = self.call(aten.add.Tensor, (made, part), node)
        self.joined.add(made)
        return made

    def _restated(self, node: fx.Node, rows: Rows) -> fx.Node:
        if node.target in (*_SUMS, *_OF_MEANS) and self._adds_rows(node):
            return self._added(node, rows)
        given = schema_arguments(node)
        if node.target in _PLACED:
            return self._placed(node, rows, given)
        if node.target is aten.masked_scatter.default:
            return self._scattered(node, rows, given)
        if node.target is CTC:
            return self._aligned(node, given)
        if node.target in _LABELLED and not given["target"].meta["val"].is_floating_point():
            return self._labelled(node, rows, given)
        if "reduction" in given and not is_unknown(node.meta["val"]):
            return self._averaged(node, rows, given)
        if not is_unknown(node.meta["val"]):
            raise refused(node)
        if str(node.target).removeprefix("aten.").startswith(MAY_FAIL) and node.target not in STEEP:
            raise refused(node)
        args, kwargs = (self.sized(node, value) for value in (self._defined(node, rows), node.kwargs))
        made = self.call(node.target, args, node, **kwargs)
        if is_unknown(made.meta["val"]):
            raise refused(node)
        leaves = (leaf for leaf in pytree.tree_leaves(made.meta["val"]) if isinstance(leaf, torch.Tensor))
        if any(not leaf.dim() or leaf.shape[0] % rows.count for leaf in leaves):
            raise refused(node)
        self.rows[made] = rows
        return made

    def _defined(self, node: fx.Node, rows: Rows) -> tuple[Any, ...]:
        """Arguments, those of ``STEEP`` filled with what they are defined for."""
        fills = STEEP.get(node.target, {})
        names = (argument.name for argument in node.target._schema.arguments)  # type: ignore[union-attr]
        return tuple(
            self.masked(arg, rows, fills[name], None, node)
            if name in fills and isinstance(arg, fx.Node) and arg in self.rows
            else arg
            for name, arg in zip(names, node.args, strict=False)
        )

    def _adds_rows(self, node: fx.Node) -> bool:
        dims = node.args[1] if len(node.args) > 1 else None
        rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        return not dims or any(dim % rank == 0 for dim in dims)  # type: ignore[union-attr]

    def _added(self, node: fx.Node, rows: Rows) -> fx.Node:
        source, *rest = node.args
        assert isinstance(source, fx.Node)
        zeroed = self.masked(source, rows, 0, LAST, node)
        target, named = _OF_MEANS.get(node.target, node.target), dict[str, Any](node.kwargs)
        if node.target in _SUMS:
            return self.call(target, (zeroed, *rest), node, **named)
        total = self.call(target, (zeroed, *rest), node, **(named | {"dtype": wide(zeroed)}))
        each = source.meta["val"].numel() // max(total.meta["val"].numel(), 1) // rows.count
        return self.divided(node, total, rows, each)

    def _placed(self, node: fx.Node, rows: Rows, given: dict[str, Any]) -> fx.Node:
        """Rows laid, or added, where they were picked."""
        target, values = given["self"], given["values"] if "values" in given else given["source"]
        if values not in self.rows or given.get("dim", 0) != 0 or given.get("indices", [0])[0] is None:
            raise refused(node)
        places = self._places_of(given.get("indices", [given.get("index")]), node)
        extents, rest = places.mask.meta["val"].shape, values.meta["val"].shape[1:]
        if self.of_mask.get(self.first_like(places.mask)) != rows:
            return self._laid_in_order(target, places, values, given, node)
        if target.meta["val"].shape != (*(extents[dim] for dim in places.dims), *rest):
            raise refused(node)
        if given.get("accumulate", "alpha" in given):
            laid = self._laid(self.masked(values, rows, 0, LAST, node), places, node)
            return self.call(aten.add.Tensor, (target, laid), node, alpha=given.get("alpha", 1))
        if not is_one_each(places):
            raise refused(node)
        return self._over(target, values, places, node)

    def _laid_in_order(
        self, target: fx.Node, places: Places, values: fx.Node, given: dict[str, Any], node: fx.Node
    ) -> fx.Node:
        """Rows that one mask picked laid where another is true."""
        mask, meta = places.mask, target.meta["val"]
        if places.missing or given.get("accumulate", "alpha" in given) or target in self.rows:
            raise refused(node)
        wide = self.call(
            aten.reshape.default, (mask, [*mask.meta["val"].shape, *[1] * (meta.dim() - mask.meta["val"].dim())]), node
        )
        wide = self.call(aten.expand.default, (wide, [*meta.shape]), node)
        return self.call(aten.masked_scatter.default, (target, wide, self._packed(values, node)), node)

    def _over(self, target: fx.Node, values: fx.Node, places: Places, node: fx.Node) -> fx.Node:
        """Rows in place of what is where they were picked."""
        rows, rank = self.rows[values], values.meta["val"].dim()
        laid = self._laid(self.masked(values, rows, 0, LAST, node), places, node)
        chosen = self.call(aten.reshape.default, (rows.mask, [rows.count, *[1] * (rank - 1)]), node)
        return self.call(aten.where.self, (self._laid(chosen, places, node), laid, target), node)

    def _scattered(self, node: fx.Node, rows: Rows, given: dict[str, Any]) -> fx.Node:
        """Rows laid where a mask is true, which is repeated along the other dims: their own, or another's in order."""
        target, wide, values = given["self"], given["mask"], given["source"]
        mask = next(mask for mask, known in self.of_mask.items() if known == rows)
        shape = (*mask.meta["val"].shape, *values.meta["val"].shape[1:])
        (found, is_not), (own, own_not) = of_first_dims(wide), of_first_dims(mask)
        is_own = self.first_like(found) is self.first_like(own) and is_not == own_not
        if values not in self.rows or target in self.rows or wide in self.rows:
            raise refused(node)
        if is_own and {target.meta["val"].dim(), wide.meta["val"].dim()} == {len(shape)}:
            return self._over(target, values, of_mask(mask), node)
        return self.call(node.target, (target, wide, self._packed(values, node)), node)

    def _packed(self, values: fx.Node, node: fx.Node) -> fx.Node:
        """Rows that were picked in their order, then zeros."""
        rows = self.rows[values]
        order = self.call(aten.argsort.stable, (rows.mask,), node, stable=True, dim=0, descending=True)
        return self.call(aten.index_select.default, (self.masked(values, rows, 0, LAST, node), 0, order), node)

    def _laid(self, rows: fx.Node, places: Places, node: fx.Node) -> fx.Node:
        """Rows in the dims that places say, those along others added up."""
        extents, shape = places.mask.meta["val"].shape, rows.meta["val"].shape
        made = self.call(aten.reshape.default, (rows, [*extents, *shape[1:]]), node)
        order = [*places.dims, *places.missing]
        if order != sorted(order):
            last = range(len(extents), len(extents) + len(shape) - 1)
            made = self.call(aten.permute.default, (made, [*order, *last]), node)
        if not places.missing:
            return made
        if made.meta["val"].dtype == torch.bool:
            return self.call(aten.any.dim, (made, len(places.dims)), node)
        return self.call(aten.sum.dim_IntList, (made, list(range(len(places.dims), len(extents)))), node)

    def _labelled(self, node: fx.Node, rows: Rows, given: dict[str, Any]) -> fx.Node:
        """A loss that ignores a label ignores those of rows that are not picked."""
        if given["target"] not in self.rows:
            raise refused(node)
        ignored = self.masked(given["target"], rows, given["ignore_index"], MASK, node)
        made = self.call(node.target, (node.args[0], ignored, *node.args[2:]), node, LOSS, **node.kwargs)
        if is_unknown(node.meta["val"]):
            self.rows[made] = rows
        return made

    def _aligned(self, node: fx.Node, given: dict[str, Any]) -> fx.Node:
        """Labels of all samples, one sample after the other, as many of each as are counted: in rows, those first."""
        counted = counted_mask(given["lengths"])
        labels, mask = self.picked.get(given["labels"], (None, None))
        if mask is None or counted is None or self.first_like(counted) is not self.first_like(mask):
            raise refused(node)
        order = self.call(aten.argsort.stable, (mask,), node, stable=True, dim=1, descending=True)
        packed = self.call(aten.gather.default, (labels, 1, order), node)
        return self.call(node.target, (node.args[0], packed, *node.args[2:]), node)

    def _averaged(self, node: fx.Node, rows: Rows, given: dict[str, Any]) -> fx.Node:
        """Any other loss: that of each element, and their sum or mean."""
        reduction, given["reduction"] = given["reduction"], _NONE
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        named = {argument.name: given[argument.name] for argument in schema if argument.kwarg_only}
        args = tuple(given[argument.name] for argument in schema if not argument.kwarg_only)
        each = self.call(node.target, args, node, **named)
        zeroed = self.masked(each, rows, 0, LAST, node)
        if reduction != _MEAN:
            return self.call(aten.sum.default, (zeroed,), node)
        total = self.call(aten.sum.default, (zeroed,), node, dtype=wide(zeroed))
        return self.divided(node, total, rows, each.meta["val"].numel() // rows.count)

    def _numbers(self, node: fx.Node) -> bool:
        return any(isinstance(operand.meta.get("val"), torch.SymInt) for operand in node.all_input_nodes)

    def _by_number(self, node: fx.Node) -> None:
        """A product with, or a quotient by, how many rows were picked."""
        value, number = node.args[:2]
        if not isinstance(number, fx.Node) or not isinstance(value, fx.Node) or value in self.rows:
            raise refused(node)
        wanted = expression(number.meta["val"])
        parts = [(rows, wanted.coeff(symbol), symbol) for symbol, rows in self.of_symbol.items()]
        found = [(rows, each) for rows, each, symbol in parts if each != 0 and wanted == each * symbol]
        if len(found) != 1 or not found[0][1].is_Integer:
            raise refused(node)
        ((rows, each),) = found
        target = aten.div.Tensor if node.target in (aten.div.Tensor, aten.div.Scalar) else aten.mul.Tensor
        with self.graph.inserting_before(node):
            count = self.counted(node, rows, int(each), wide(node))
            made = self.call(target, (value, count), node)
            self.replace(node, self.call(aten._to_copy.default, (made,), node, dtype=node.meta["val"].dtype))
