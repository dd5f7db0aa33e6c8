"""Lookups by index, and the scatters that are their backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.rows import alike, counting, looked_up, strided_elements
from cost_model.ops.table import (
    Op,
    OpCall,
    Ref,
    dims_of,
    no_backward,
    pass_of,
    register,
    register_priced,
    saves_nothing,
    saving,
    sweep,
)
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta

SOURCE = ((0,),)
"""What is taken from a sum is the sum of what is taken."""


def _written(call: OpCall) -> tuple[tuple[int, ...], ...]:
    """Writing values over or onto a tensor is linear in both, not so keeping the largest or a product.

    A number is written once by every rank.
    """
    is_linear = call.args.get("reduce", "sum") in ("sum", "mean")
    return ((0, 2),) if len(call.inputs) == 3 and is_linear else ()


def _embedding_factors(call: OpCall) -> FactorMap | None:
    """A rank that holds some rows gives zero for the others: Partial.

    ``padding_idx`` names a global row, so with one the rows stay whole; ``scale_grad_by_freq`` counts over all ids.
    """
    if call.args.get("scale_grad_by_freq"):
        return None
    whole = "" if call.args.get("padding_idx", -1) == -1 else "v"
    return parse_map("v c, ... -> ... c", call.inputs, call.outputs, whole=whole, ordered="v")


def _embedding_price(call: OpCall) -> OpCost:
    """Reads the ids and the rows they name (no more than there are), writes one row an id."""
    weight, ids = call.inputs
    (out,) = call.outputs
    read = min(out.nbytes, weight.nbytes)
    return OpCost("gather", 0.0, float(ids.nbytes + read + out.nbytes), out.dtype, rows=ids.numel)


def _embedding_backward(call: OpCall) -> tuple[OpCost, ...]:
    """Fills the weight's gradient with zeros, then adds each row of the output's gradient."""
    weight, ids = call.inputs
    (out,) = call.outputs
    return (_added_rows(weight, out, ids),)


def _added_rows(filled: TensorMeta, gradient: TensorMeta, ids: TensorMeta) -> OpCost:
    """Zeros everywhere, then a row of the gradient to that which each id names."""
    cost = sweep("scatter", filled, gradient, ids, flops=gradient.numel)
    return replace(cost, op="aten.embedding_dense_backward.default", rows=ids.numel)


def _embedding_backward_price(call: OpCall) -> OpCost:
    return _added_rows(call.outputs[0], *call.inputs)


def _index_terms(call: OpCall) -> list[object]:
    """One entry per dim of ``self``: the Ref of its index tensor, or None where the dim is kept."""
    indices = call.args["indices"]
    assert isinstance(indices, list | tuple)
    rank = len(call.inputs[0].shape)
    return [*indices, *[None] * (rank - len(indices))]


def _index_factors(call: OpCall) -> FactorMap | None:
    """Indexed dims are whole, kept dims parallel; the index tensors broadcast to dims of the output.

    Those dims stand where the first index stood if all indices are adjacent, else in front. None for masks.
    """
    tensors = call.inputs[1:]
    if any(m.dtype in ("bool", "uint8") for m in tensors):
        return None
    terms = _index_terms(call)
    indexed = [d for d, term in enumerate(terms) if isinstance(term, Ref)]
    names = [f"w{d}" if d in indexed else f"a{d}" for d in range(len(terms))]
    kept = [names[d] for d in range(len(terms)) if d not in indexed]
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    front = indexed[0] if adjacent else 0
    out = [*kept[:front], "...", *kept[front:]]
    operands = ", ".join([" ".join(names), *["..."] * len(tensors)])
    whole = " ".join(names[d] for d in indexed)
    return parse_map(f"{operands} -> {' '.join(out)}", call.inputs, call.outputs, whole=whole, linear=SOURCE)


def _index_price(call: OpCall) -> OpCost:
    """Reads the indices and as many elements as it writes."""
    (out,) = call.outputs
    return OpCost("gather", 0.0, float(sum(m.nbytes for m in call.inputs[1:]) + 2 * out.nbytes), out.dtype)


def _found(call: OpCall) -> int:
    return looked_up(_index_terms(call), call.inputs[0], call.inputs)


def _index_backward(call: OpCall) -> tuple[OpCost, ...]:
    """Zeros of the source's size, then one addition per element taken."""
    source, *indices = call.inputs
    (out,) = call.outputs
    if not source.is_floating:
        return ()
    put = sweep("scatter", source, source, out, *indices, flops=out.numel)
    name, rows = _WRITERS.get(call.op, (None, lambda call: 0))
    return sweep("copy", source), replace(put, op=name, rows=rows(call))


_WRITERS: dict[str, tuple[str | None, Callable[[OpCall], int]]] = {
    "aten.index.Tensor": ("aten.index_put.default", _found),
    "aten.gather.default": ("aten.scatter_add.default", strided_elements),
}
"""What writes the gradient of a lookup, and how many pieces it finds."""


def _scatter_price(call: OpCall) -> OpCost:
    """Copies ``self`` to the output, then reads indices and values and writes as many elements."""
    return sweep("scatter", *call.outputs, *call.inputs, flops=sum(m.numel for m in call.inputs[1:]))


def _indices(call: OpCall) -> tuple[str, ...]:
    """The backward of a lookup reads the indices only."""
    return saving(*(f"in{i}" for i in range(1, len(call.inputs))))(call)


register(Op("aten.embedding.default", _embedding_factors, _embedding_price, _embedding_backward, _indices))
register(Op("aten.index.Tensor", _index_factors, counting(_index_price, _found), _index_backward, _indices))


def _named(call: OpCall, rank: int) -> tuple[list[str], int]:
    (dim,) = dims_of(call, "dim", rank) or (0,)
    return [f"a{i}" for i in range(rank)], dim


def _taken_factors(call: OpCall) -> FactorMap | None:
    """index_select: the dim is whole and another extent in the output; the index is whole."""
    names, dim = _named(call, len(call.inputs[0].shape))
    out = [*names[:dim], "taken", *names[dim + 1 :]]
    whole = names[dim] if names else ""
    return parse_map(
        f"{' '.join(names)}, taken -> {' '.join(out)}", call.inputs, call.outputs, whole=whole, linear=SOURCE
    )


def _pointed_factors(call: OpCall) -> FactorMap | None:
    """gather: output and index have one shape; other dims are parallel where the source is no longer there.

    A dim in which the index is shorter than the source reads a part of it and is whole.
    """
    source, index = call.inputs[:2]
    names, dim = _named(call, len(source.shape))
    if not names or len(index.shape) != len(names):
        return None
    parts = [i for i in range(len(names)) if i == dim or source.shape[i] != index.shape[i]]
    of_index = " ".join(f"b{i}" if i in parts else n for i, n in enumerate(names))
    whole = " ".join(f"a{i} b{i}" if i != dim else f"a{i}" for i in parts)
    notation = f"{' '.join(names)}, {of_index} -> {of_index}"
    return parse_map(notation, call.inputs, call.outputs, whole=whole, linear=SOURCE)


def _scattered_factors(call: OpCall) -> FactorMap | None:
    """scatter: like gather, the written tensor being both operand and output; the dim and its index are whole."""
    target, index = call.inputs[:2]
    names, dim = _named(call, len(target.shape))
    if not names or len(index.shape) != len(names):
        return None
    parts = [i for i in range(len(names)) if i == dim or target.shape[i] != index.shape[i]]
    of_index = " ".join(f"b{i}" if i in parts else n for i, n in enumerate(names))
    whole = " ".join(f"a{i} b{i}" for i in parts)
    values = list(call.inputs[2:])
    terms = [" ".join(names), of_index]
    for value in values:
        if value.shape and value.shape != index.shape:
            return None
        terms.append(of_index if value.shape else "")
    notation = f"{', '.join(terms)} -> {' '.join(names)}"
    return parse_map(notation, call.inputs, call.outputs, whole=whole, linear=_written(call))


def _filled_factors(call: OpCall) -> FactorMap:
    """index_add, index_copy, index_fill: the dim written to is whole, values have the index's extent there."""
    names, dim = _named(call, len(call.inputs[0].shape))
    of_value = " ".join([*names[:dim], "w", *names[dim + 1 :]])
    terms = [" ".join(names), "w", *[of_value if m.shape else "" for m in call.inputs[2:]]]
    whole = f"{names[dim]} w" if names else ""
    notation = f"{', '.join(terms)} -> {' '.join(names)}"
    return parse_map(notation, call.inputs, call.outputs, whole=whole, linear=_written(call))


def _put_factors(call: OpCall) -> FactorMap | None:
    """index_put: indexed dims are whole and so are the indices, kept dims parallel; None for masks."""
    indices = call.args["indices"]
    assert isinstance(indices, list | tuple)
    target, *rest = call.inputs
    tensors, values = rest[:-1], rest[-1]
    if any(m.dtype in ("bool", "uint8") for m in tensors):
        return None
    rank = len(target.shape)
    indexed = [d for d, term in enumerate(indices) if isinstance(term, Ref)]
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    broadcast = max(len(m.shape) for m in tensors)
    names = [f"w{d}" if d in indexed else f"a{d}" for d in range(rank)]
    kept = [names[d] for d in range(rank) if d not in indexed]
    front = indexed[0] if adjacent else 0
    spots = [f"i{j}" for j in range(broadcast)]
    of_value = [*kept[:front], *spots, *kept[front:]]
    of_value = of_value[len(of_value) - len(values.shape) :]
    terms = [" ".join(names), *[" ".join(spots[broadcast - len(m.shape) :]) for m in tensors], " ".join(of_value)]
    whole = " ".join([*(names[d] for d in indexed), *spots])
    notation, last = f"{', '.join(terms)} -> {' '.join(names)}", len(call.inputs) - 1
    return parse_map(notation, call.inputs, call.outputs, whole=whole, linear=((0, last),))


def _scatter_backward(call: OpCall) -> tuple[OpCost, ...]:
    """The gradient of what was there is copied with the places written to cleared; that of values is gathered."""
    (out,), values = call.outputs, call.inputs[-1]
    if not out.is_floating:
        return ()
    return sweep("scatter", out, out), sweep("gather", values, values)


def _reduced_saves(call: OpCall) -> tuple[str, ...]:
    """Sums and means go back by the index alone; which value was kept, or the other factors, is looked up."""
    if call.args["reduce"] in ("sum", "mean"):
        return saving("in1")(call)
    return saving("in0", "in1", "in2", "out0")(call)


def _reduced_backward(call: OpCall) -> tuple[OpCost, ...]:
    """As a scatter's, after the places that were written to are counted."""
    (out,), index = call.outputs, call.inputs[1]
    counted = (sweep("scatter", out, index),) if out.is_floating else ()
    return (*counted, *_scatter_backward(call))


def _one_hot_factors(call: OpCall) -> FactorMap:
    return parse_map("... -> ... classes", call.inputs, call.outputs, whole="classes")


def _repeated_factors(call: OpCall) -> FactorMap:
    """repeat_interleave(x, r, dim): the dim is (a) before and (a r) after; r is whole."""
    copies = call.args["repeats"]
    assert isinstance(copies, int)
    if call.args.get("dim") is None:
        sizes = {f"a{i}": extent for i, extent in enumerate(call.inputs[0].shape)}
        flat = " ".join(sizes)
        sizes["r"] = copies
        return parse_map(f"{flat} -> ({flat} r)", call.inputs, call.outputs, whole="r", linear=((0,),), sizes=sizes)
    names, dim = _named(call, len(call.inputs[0].shape))
    out = [*names[:dim], f"({names[dim]} r)", *names[dim + 1 :]]
    return parse_map(
        f"{' '.join(names)} -> {' '.join(out)}",
        call.inputs,
        call.outputs,
        whole="r",
        linear=((0,),),
        sizes={"r": copies},
    )


def _tiled_factors(call: OpCall) -> FactorMap:
    """repeat(x, counts): each dim is (r a) after, r whole; new dims stand in front."""
    rank, out_rank = len(call.inputs[0].shape), len(call.outputs[0].shape)
    names = [f"a{i}" for i in range(rank)]
    new = out_rank - rank
    out = [f"r{i}" for i in range(new)] + [f"(r{new + i} {n})" for i, n in enumerate(names)]
    whole = " ".join(f"r{i}" for i in range(out_rank))
    shape = (1,) * new + call.inputs[0].shape
    sizes = {
        f"r{i}": out // max(before, 1) for i, (before, out) in enumerate(zip(shape, call.outputs[0].shape, strict=True))
    }
    return parse_map(
        f"{' '.join(names)} -> {' '.join(out)}", call.inputs, call.outputs, whole=whole, linear=((0,),), sizes=sizes
    )


def _summed_back(call: OpCall) -> tuple[OpCost, ...]:
    (source,), (out,) = call.inputs, call.outputs
    return (sweep("reduction", source, out, flops=out.numel),) if source.is_floating and out != source else ()


_gathered_price = counting(_index_price, strided_elements)
_scattered_price = alike("aten.scatter_add.default", counting(_scatter_price, strided_elements))
_put_price = alike("aten.index_put.default", counting(_scatter_price, _found))
register(Op("aten.gather.default", _pointed_factors, _gathered_price, _index_backward, _indices))
register(Op("aten.index_select.default", _taken_factors, _index_price, _index_backward, _indices))
for _name in "scatter.value scatter.src scatter_add.default".split():
    register(Op(f"aten.{_name}", _scattered_factors, _scattered_price, _scatter_backward, saving("in1")))
for _name in "index_add.default index_copy.default index_fill.int_Scalar index_fill.int_Tensor".split():
    register(Op(f"aten.{_name}", _filled_factors, _scatter_price, _scatter_backward, saving("in1")))
register(Op("aten.scatter_reduce.two", _scattered_factors, _scattered_price, _reduced_backward, _reduced_saves))
register(Op("aten.index_reduce.default", _filled_factors, _scatter_price, _reduced_backward, _reduced_saves))
register(Op("aten.index_put.default", _put_factors, _put_price, _scatter_backward, saving("in1", "in2")))
register(Op("aten.one_hot.default", _one_hot_factors, pass_of("scatter", 0.0), no_backward, saves_nothing))
register(Op("aten.repeat_interleave.self_int", _repeated_factors, pass_of("copy", 0.0), _summed_back, saves_nothing))
register(Op("aten.repeat.default", _tiled_factors, pass_of("copy", 0.0), _summed_back, saves_nothing))

register_priced("aten.index_put_.default", _put_price)
register_priced("aten.scatter_.value aten.scatter_.src aten.scatter_add_.default", _scattered_price)
register_priced("aten.index_add_.default", _scatter_price)
register_priced("aten.embedding_dense_backward.default", _embedding_backward_price)
