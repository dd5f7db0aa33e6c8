"""Lookups by index, and the scatters that are their backward."""

from __future__ import annotations

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.table import (
    Op,
    OpCall,
    Ref,
    register,
    register_priced,
    saving,
    sweep,
)
from cost_model.program import OpCost


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
    return OpCost("gather", 0.0, float(ids.nbytes + read + out.nbytes), out.dtype)


def _embedding_backward(call: OpCall) -> tuple[OpCost, ...]:
    """Fills the weight's gradient with zeros, then adds each row of the output's gradient."""
    weight, ids = call.inputs
    (out,) = call.outputs
    return (sweep("scatter", out, ids, weight, flops=out.numel),)


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
    return parse_map(f"{operands} -> {' '.join(out)}", call.inputs, call.outputs, whole=whole)


def _index_price(call: OpCall) -> OpCost:
    """Reads the indices and as many elements as it writes."""
    (out,) = call.outputs
    return OpCost("gather", 0.0, float(sum(m.nbytes for m in call.inputs[1:]) + 2 * out.nbytes), out.dtype)


def _index_backward(call: OpCall) -> tuple[OpCost, ...]:
    """Zeros of the source's size, then one addition per element taken."""
    source, *indices = call.inputs
    (out,) = call.outputs
    if not source.is_floating:
        return ()
    return sweep("copy", source), sweep("scatter", source, source, out, *indices, flops=out.numel)


def _scatter_price(call: OpCall) -> OpCost:
    """Copies ``self`` to the output, then reads indices and values and writes as many elements."""
    return sweep("scatter", *call.outputs, *call.inputs, flops=sum(m.numel for m in call.inputs[1:]))


def _indices(call: OpCall) -> tuple[str, ...]:
    """The backward of a lookup reads the indices only."""
    return saving(*(f"in{i}" for i in range(1, len(call.inputs))))(call)


register(Op("aten.embedding.default", _embedding_factors, _embedding_price, _embedding_backward, _indices))
register(Op("aten.index.Tensor", _index_factors, _index_price, _index_backward, _indices))

register_priced("aten.gather.default aten.index_select.default", _index_price)
register_priced(
    """aten.embedding_dense_backward.default aten.index_put.default aten.index_put_.default
    aten.scatter.value aten.scatter.src aten.scatter_.value aten.scatter_.src
    aten.scatter_add.default aten.scatter_add_.default aten.index_add.default aten.index_add_.default""",
    _scatter_price,
)
