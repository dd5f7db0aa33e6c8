"""Views as factor splits and merges, and the ops that copy a tensor or lay several into one."""

from __future__ import annotations

import math
from collections.abc import Callable

from cost_model.factors import Dims, FactorMap, parse_map
from cost_model.ops.elementwise import aligned, between_floats, linear_in_first
from cost_model.ops.table import (
    Op,
    OpCall,
    dims_of,
    no_backward,
    pass_of,
    register,
    register_priced,
    saves_nothing,
    sweep,
    unpriced,
)
from cost_model.program import OpCost

FIRST = ((0,),)


class _Refinement:
    """Greedy common refinement of two row-major shapes of equal size: the factors both sides are made of.

    Walks both shapes from the outside in and peels off what the current extents have in common. Where they have
    nothing in common (6 x 4 seen as 8 x 3 has 2, then 3 against 4 has none), dims are joined until the products
    agree; those carry factors of one side only, which may not be split.
    """

    def __init__(self, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        self.sizes: dict[str, int] = {}
        self.whole: set[str] = set()
        self._rest = (list(source), list(target))
        self._dims: tuple[list[list[str]], list[list[str]]] = ([[] for _ in source], [[] for _ in target])
        self._at = [0, 0]
        while self._skip_finished():
            self._peel()

    @property
    def dims(self) -> tuple[Dims, Dims]:
        source, target = (tuple(tuple(names) for names in side) for side in self._dims)
        return source, target

    def _skip_finished(self) -> bool:
        for side in (0, 1):
            while self._at[side] < len(self._rest[side]) and self._rest[side][self._at[side]] == 1:
                self._at[side] += 1
        return self._at[0] < len(self._rest[0])

    def _peel(self) -> None:
        common = math.gcd(self._current(0), self._current(1))
        if common == 1:
            self._join()
            return
        name = self._name(common)
        for side in (0, 1):
            self._take(side, name, common)

    def _join(self) -> None:
        """Consume whole dims of either side until the products agree; no factor of them may be split."""
        products = [self._consume(0), self._consume(1)]
        while products[0] != products[1]:
            side = 0 if products[0] < products[1] else 1
            products[side] *= self._consume(side)

    def _consume(self, side: int) -> int:
        extent = self._current(side)
        if extent > 1:
            name = self._name(extent)
            self.whole.add(name)
            self._take(side, name, extent)
        self._at[side] += 1
        return extent

    def _current(self, side: int) -> int:
        return self._rest[side][self._at[side]]

    def _name(self, extent: int) -> str:
        name = f"f{len(self.sizes)}"
        self.sizes[name] = extent
        return name

    def _take(self, side: int, name: str, extent: int) -> None:
        self._rest[side][self._at[side]] //= extent
        self._dims[side][self._at[side]].append(name)


def reshape_factors(call: OpCall) -> FactorMap | None:
    """Any change of shape that keeps row-major order; None for tensors without elements."""
    source, target = call.inputs[0], call.outputs[0]
    if source.numel == 0:
        return None
    refined = _Refinement(source.shape, target.shape)
    before, after = refined.dims
    return FactorMap(
        sizes=refined.sizes,
        inputs=(before,),
        outputs=(after,),
        whole=frozenset(refined.whole),
        linear=(frozenset({0}),),
    )


def _letters(rank: int, prefix: str = "a") -> list[str]:
    return [f"{prefix}{i}" for i in range(rank)]


def _permuted(call: OpCall, order: list[int]) -> FactorMap:
    names = _letters(len(order))
    notation = f"{' '.join(names)} -> {' '.join(names[i] for i in order)}"
    return parse_map(notation, call.inputs, call.outputs, linear=FIRST)


def _transpose_factors(call: OpCall) -> FactorMap:
    rank = len(call.inputs[0].shape)
    order = list(range(rank))
    (first,), (second,) = dims_of(call, "dim0", rank) or (0,), dims_of(call, "dim1", rank) or (0,)
    if rank:
        order[first], order[second] = second, first
    return _permuted(call, order)


def _swap_factors(call: OpCall) -> FactorMap:
    rank = len(call.inputs[0].shape)
    order, keys = list(range(rank)), ("axis0", "axis1") if "axis0" in call.args else ("dim0", "dim1")
    (first,), (second,) = dims_of(call, keys[0], rank), dims_of(call, keys[1], rank)
    order[first], order[second] = second, first
    return _permuted(call, order)


def _move_factors(call: OpCall) -> FactorMap:
    rank = len(call.inputs[0].shape)
    (source,), (target,) = dims_of(call, "source", rank), dims_of(call, "destination", rank)
    order = [d for d in range(rank) if d != source]
    order.insert(target, source)
    return _permuted(call, order)


def _diagonal_factors(call: OpCall) -> FactorMap:
    """The two dims of the diagonal are whole; it stands last."""
    rank = len(call.inputs[0].shape)
    first, second = dims_of(call, "dim1", rank)[0], dims_of(call, "dim2", rank)[0]
    names = _letters(rank)
    out = [n for d, n in enumerate(names) if d not in (first, second)]
    whole = f"{names[first]} {names[second]} along"
    return parse_map(
        f"{' '.join(names)} -> {' '.join(out)} along", call.inputs, call.outputs, whole=whole, linear=FIRST
    )


def _windows_factors(call: OpCall) -> FactorMap:
    """unfold: windows of a dim, which is whole; their places stand where it stood, their contents last."""
    rank = len(call.inputs[0].shape)
    (dim,) = dims_of(call, "dimension", rank)
    names = _letters(rank)
    notation = f"{' '.join(names)} -> {_with(names, dim, 'places')} inside"
    return parse_map(notation, call.inputs, call.outputs, whole=f"{names[dim]} places inside", linear=FIRST)


def _permute_factors(call: OpCall) -> FactorMap:
    return _permuted(call, list(dims_of(call, "dims", len(call.inputs[0].shape))))


def _t_factors(call: OpCall) -> FactorMap:
    return _permuted(call, list(reversed(range(len(call.inputs[0].shape)))))


def _dim_whole(call: OpCall, dim: int, out_dim: str) -> FactorMap:
    """All dims parallel but ``dim``; the outputs have ``out_dim`` there ("" if the dim is gone)."""
    names = _letters(len(call.inputs[0].shape))
    outs = [*names[:dim], out_dim, *names[dim + 1 :]]
    notation = f"{' '.join(names)} -> {', '.join([' '.join(outs)] * len(call.outputs))}"
    return parse_map(notation, call.inputs, call.outputs, whole=f"{names[dim]} {out_dim}", linear=FIRST)


def _dim(call: OpCall) -> int:
    dims = dims_of(call, "dim", len(call.inputs[0].shape))
    return dims[0] if dims else 0


def _select_factors(call: OpCall) -> FactorMap:
    return _dim_whole(call, _dim(call), "")


def _slice_factors(call: OpCall) -> FactorMap:
    """A slice that takes the full range is the identity; any other needs its dim whole."""
    if call.inputs[0].shape == call.outputs[0].shape:
        return parse_map("... -> ...", call.inputs, call.outputs, linear=FIRST)
    return _dim_whole(call, _dim(call), "taken")


def _split_factors(call: OpCall) -> FactorMap:
    """Equal chunks: the dim is (q c) with q chunks of c, and c may be split in all of them; unequal ones: whole."""
    dim = _dim(call)
    names = _letters(len(call.inputs[0].shape))
    extents = {out.shape[dim] for out in call.outputs}
    if len(extents) > 1:
        return _unequal_split(call, dim, names)
    notation = f"{_with(names, dim, '(q c)')} -> {', '.join([_with(names, dim, 'c')] * len(call.outputs))}"
    return parse_map(notation, call.inputs, call.outputs, whole="q", linear=FIRST, sizes={"q": len(call.outputs)})


def _unequal_split(call: OpCall, dim: int, names: list[str]) -> FactorMap:
    parts = [f"part{i}" for i in range(len(call.outputs))]
    notation = f"{' '.join(names)} -> {', '.join(_with(names, dim, part) for part in parts)}"
    return parse_map(notation, call.inputs, call.outputs, whole=f"{names[dim]} {' '.join(parts)}", linear=FIRST)


def _with(names: list[str], dim: int, name: str) -> str:
    return " ".join([*names[:dim], name, *names[dim + 1 :]])


def _joined_inputs(call: OpCall) -> tuple[tuple[int, ...], ...]:
    """Laying tensors side by side is linear in all of them at once."""
    return (tuple(range(len(call.inputs))),)


def _cat_factors(call: OpCall) -> FactorMap | None:
    """The joined dim is whole, but for operands of equal size along dim 0, where samples lie: these are one behind the
    other there, each of as many. None where an operand is the legacy empty tensor of shape [0]."""
    if len({len(m.shape) for m in call.inputs}) > 1:
        return None
    dim = dims_of(call, "dim", len(call.outputs[0].shape))[0]
    names = _letters(len(call.outputs[0].shape))
    if dim == 0 and len({m.shape for m in call.inputs}) == 1:
        notation = f"{', '.join([' '.join(names)] * len(call.inputs))} -> (part {names[0]}) {' '.join(names[1:])}"
        linear, sizes = _joined_inputs(call), {"part": len(call.inputs)}
        return parse_map(notation, call.inputs, call.outputs, whole="part", linear=linear, sizes=sizes)
    parts = [f"part{i}" for i in range(len(call.inputs))]
    notation = f"{', '.join(_with(names, dim, part) for part in parts)} -> {' '.join(names)}"
    whole = f"{names[dim]} {' '.join(parts)}"
    return parse_map(notation, call.inputs, call.outputs, whole=whole, linear=_joined_inputs(call))


def _stack_factors(call: OpCall) -> FactorMap:
    dim = dims_of(call, "dim", len(call.outputs[0].shape))[0]
    names = _letters(len(call.outputs[0].shape))
    operand = " ".join(names[:dim] + names[dim + 1 :])
    notation = f"{', '.join([operand] * len(call.inputs))} -> {' '.join(names)}"
    return parse_map(notation, call.inputs, call.outputs, whole=names[dim], linear=_joined_inputs(call))


def _padded_dims(call: OpCall) -> set[int]:
    """Dims whose (before, after) pair is not (0, 0); pairs are listed from the last dim on."""
    pads = call.args["pad"]
    assert isinstance(pads, list | tuple)
    last = len(call.inputs[0].shape) - 1
    return {last - i // 2 for i, amount in enumerate(pads) if amount != 0}


def _pad_factors(call: OpCall) -> FactorMap:
    """Padded dims whole, the others parallel; linear where the padding is zero."""
    padded = _padded_dims(call)
    names = _letters(len(call.inputs[0].shape))
    after = [f"{name}p" if dim in padded else name for dim, name in enumerate(names)]
    is_zero = call.args.get("mode", "constant") == "constant" and not call.args.get("value")
    notation = f"{' '.join(names)} -> {' '.join(after)}"
    whole = " ".join(name for dim in padded for name in (names[dim], after[dim]))
    return parse_map(notation, call.inputs, call.outputs, whole=whole, linear=FIRST if is_zero else ())


def _cast_price(call: OpCall) -> OpCost | None:
    """``to``: an alias where nothing changes, else a copy; strides are not known here."""
    is_alias = call.inputs[0].dtype == call.outputs[0].dtype and not call.args.get("copy")
    return None if is_alias else pass_of("copy", 0.0)(call)


def _cast_backward(call: OpCall) -> tuple[OpCost, ...]:
    price = _cast_price(call) if call.inputs[0].is_floating and call.outputs[0].is_floating else None
    return () if price is None else (price,)


def _copied_gradient(call: OpCall) -> tuple[OpCost, ...]:
    """The gradients of the parts are laid into, or cut out of, one tensor of the input's size."""
    return (sweep("copy", *call.inputs, *call.inputs),) if call.inputs[0].is_floating else ()


def _padded_gradient(call: OpCall) -> tuple[OpCost, ...]:
    """The gradient of a part is copied into zeros of the input's size (slice_backward, select_backward)."""
    if not call.inputs[0].is_floating or call.inputs[0].shape == call.outputs[0].shape:
        return ()
    return (sweep("copy", *call.inputs, *call.outputs),)


def _expand_backward(call: OpCall) -> tuple[OpCost, ...]:
    source, out = call.inputs[0], call.outputs[0]
    is_sum = source.is_floating and source.numel != out.numel
    return (sweep("reduction", out, source, flops=out.numel),) if is_sum else ()


def _other_dtype_factors(call: OpCall) -> FactorMap:
    """The same bytes as values of another dtype: the last dim is whole where that has another size."""
    (source,), (out,) = call.inputs, call.outputs
    names = [f"a{i}" for i in range(len(source.shape))]
    before = after = " ".join(names)
    if source.shape != out.shape:
        before, after = (" ".join([*names[:-1], last]) for last in ("given", "made"))
    return parse_map(f"{before} -> {after}", call.inputs, call.outputs, whole="" if before == after else "given made")


def _register_views(
    names: str, factors: Callable[[OpCall], FactorMap | None], backward: Callable[[OpCall], tuple[OpCost, ...]]
) -> None:
    for name in names.split():
        register(Op(f"aten.{name}", factors, unpriced, backward, saves_nothing))


_register_views(
    """view.default reshape.default _unsafe_view.default unsqueeze.default squeeze.default squeeze.dim squeeze.dims
    flatten.using_ints unflatten.int""",
    reshape_factors,
    no_backward,
)
_register_views("expand.default", aligned(linear_in_first), _expand_backward)
_register_views("transpose.int", _transpose_factors, no_backward)
_register_views("swapaxes.default swapdims.default", _swap_factors, no_backward)
_register_views("permute.default", _permute_factors, no_backward)
_register_views("movedim.int", _move_factors, no_backward)
_register_views("t.default numpy_T.default", _t_factors, no_backward)
_register_views("diagonal.default", _diagonal_factors, _padded_gradient)
_register_views("unfold.default", _windows_factors, _copied_gradient)
_register_views("select.int", _select_factors, _padded_gradient)
_register_views("slice.Tensor", _slice_factors, _padded_gradient)
_register_views("split.Tensor split_with_sizes.default chunk.default", _split_factors, _copied_gradient)
_register_views("unbind.int", _select_factors, _copied_gradient)
_register_views("detach.default", aligned(linear_in_first), no_backward)
_register_views("view.dtype", _other_dtype_factors, no_backward)
_register_views("alias.default", aligned(linear_in_first), no_backward)


def _register_copies(
    names: str,
    factors: Callable[[OpCall], FactorMap | None],
    price: Callable[[OpCall], OpCost | None],
    backward: Callable[[OpCall], tuple[OpCost, ...]],
) -> None:
    for name in names.split():
        register(Op(f"aten.{name}", factors, price, backward, saves_nothing))


_copy = pass_of("copy", 0.0)
_register_copies("clone.default contiguous.default", aligned(linear_in_first), _copy, no_backward)
_register_copies("to.dtype to.dtype_layout", aligned(between_floats), _cast_price, _cast_backward)
_register_copies("_to_copy.default", aligned(between_floats), _copy, _cast_backward)
_register_copies("cat.default", _cat_factors, _copy, no_backward)
_register_copies("stack.default", _stack_factors, _copy, no_backward)
_register_copies("pad.default constant_pad_nd.default", _pad_factors, _copy, _copied_gradient)

register_priced("aten.as_strided.default aten.lift_fresh.default aten.detach_.default", unpriced)
register_priced("aten.lift_fresh_copy.default autopar.by_rows.default", _copy)


def _written_factors(call: OpCall) -> FactorMap:
    """slice_scatter, select_scatter: the dim written to is whole, and its part in the second operand too."""
    names = _letters(len(call.inputs[0].shape))
    dim = _dim(call)
    part = _with(names, dim, "part" if "slice" in call.op else "")
    notation = f"{' '.join(names)}, {part} -> {' '.join(names)}"
    return parse_map(notation, call.inputs, call.outputs, whole=f"{names[dim]} part", linear=((0, 1),))


def _diagonal_written_factors(call: OpCall) -> FactorMap:
    """The two dims of the diagonal are whole; what is laid into it has it last."""
    rank = len(call.inputs[0].shape)
    first, second = dims_of(call, "dim1", rank)[0], dims_of(call, "dim2", rank)[0]
    names = _letters(rank)
    part = " ".join([*(n for d, n in enumerate(names) if d not in (first, second)), "along"])
    notation, whole = f"{' '.join(names)}, {part} -> {' '.join(names)}", f"{names[first]} {names[second]} along"
    return parse_map(notation, call.inputs, call.outputs, whole=whole, linear=((0, 1),))


_register_copies("diagonal_scatter.default", _diagonal_written_factors, _copy, _copied_gradient)
_register_copies("slice_scatter.default select_scatter.default", _written_factors, _copy, _copied_gradient)

register_priced(
    """aten.slice_backward.default aten.select_backward.default aten.as_strided_copy.default
    aten.unfold_backward.default aten.diagonal_backward.default""",
    _copy,
)
