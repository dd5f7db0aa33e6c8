"""Ops over the order of a dim: sorting, ranking, scans, extrema with their places, statistics. That dim is whole."""

from __future__ import annotations

from collections.abc import Callable

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.elementwise import gradient_passes
from cost_model.ops.norm import SOFTMAX_FLOPS
from cost_model.ops.rows import alike, counting, reduced_rows
from cost_model.ops.table import (
    Op,
    OpCall,
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

SORT_FLOPS = 20.0
"""Comparisons per element of a sort of about a million elements: log2 of the length, by convention."""


def _along(default: int | None) -> Callable[[OpCall], FactorMap]:
    """The dims named (``default`` where none is) are whole, and of another extent or gone in the outputs."""

    def factors(call: OpCall) -> FactorMap:
        rank = len(call.inputs[0].shape)
        given = call.args.get("dim", default)
        dims = dims_of(call, "dim", rank) if given is not None else tuple(range(rank))
        names = [f"a{i}" for i in range(rank)]
        outs = []
        for out in call.outputs:
            kept = len(out.shape) == rank
            outs.append(" ".join(f"b{i}" if i in dims else n for i, n in enumerate(names) if kept or i not in dims))
        whole = " ".join([*(names[d] for d in dims), *(f"b{d}" for d in dims)])
        operands = ", ".join([" ".join(names)] * len(call.inputs))
        return parse_map(f"{operands} -> {', '.join(outs)}", call.inputs, call.outputs, whole=whole)

    return factors


def _placed_back(call: OpCall) -> tuple[OpCost, ...]:
    """The gradient of each value taken goes to its place among zeros."""
    (source, *_), (out, *_) = call.inputs, call.outputs
    return (sweep("scatter", source, out, flops=out.numel),) if out.is_floating else ()


def _statistic_backward(call: OpCall) -> tuple[OpCost, ...]:
    return gradient_passes(call.inputs[0], "oo ooo oo") if call.outputs[0].is_floating else ()


def _statistic_price(call: OpCall) -> OpCost:
    return sweep("reduction", *call.outputs, *call.inputs, flops=3 * call.inputs[0].numel)


def _logsumexp_price(call: OpCall) -> OpCost:
    """A softmax but for what it writes."""
    (source,) = call.inputs
    return sweep("softmax", source, source, *call.outputs, flops=SOFTMAX_FLOPS * source.numel)


def _register(
    names: str, price: Callable[[OpCall], OpCost], backward: Callable[..., tuple[OpCost, ...]], *saved: str
) -> None:
    for name in names.split():
        register(Op(f"aten.{name}", _along(None), price, backward, saving(*saved) if saved else saves_nothing))


_register("topk.default sort.default sort.stable", pass_of("reduction", SORT_FLOPS), _placed_back, "out1")
_register("argsort.default argsort.stable", pass_of("reduction", SORT_FLOPS), no_backward)
_placed = alike("aten.max.dim", pass_of("reduction"))
_register("max.dim min.dim", _placed, _placed_back, "out1")
_register("median.dim nanmedian.dim mode.default kthvalue.default", pass_of("reduction"), _placed_back, "out1")
_register("cummax.default cummin.default", pass_of("reduction"), _placed_back, "out1")
_register("argmin.default", _placed, no_backward)
_register(
    "amin.default max.default min.default median.default nanmedian.default",
    lambda call: sweep("reduction", *call.outputs, *call.inputs, flops=call.inputs[0].numel),
    _statistic_backward,
    "in0",
    "out0",
)
_register(
    "prod.default prod.dim_int linalg_vector_norm.default norm.ScalarOpt_dim norm.Scalar",
    _statistic_price,
    _statistic_backward,
    "in0",
    "out0",
)
_register(
    """var.correction var.dim var.default std.correction std.dim std.default var_mean.correction
    std_mean.correction""",
    alike("aten.var_mean.correction", counting(_statistic_price, reduced_rows)),
    _statistic_backward,
    "in0",
    "out0",
)
_register("logsumexp.default", _logsumexp_price, _statistic_backward, "in0", "out0")
_register("cumprod.default logcumsumexp.default", pass_of("reduction"), _statistic_backward, "in0", "out0")


def _flipped_factors(call: OpCall) -> FactorMap:
    """Dims that are reversed or rolled are whole."""
    rank = len(call.inputs[0].shape)
    names = [f"a{i}" for i in range(rank)]
    dims = dims_of(call, "dims", rank)
    terms = " ".join(names)
    whole = " ".join(names[d] for d in dims)
    return parse_map(f"{terms} -> {terms}", call.inputs, call.outputs, whole=whole, linear=((0,),))


def _reversed(call: OpCall) -> tuple[OpCost, ...]:
    return (sweep("copy", *call.inputs, *call.outputs),) if call.inputs[0].is_floating else ()


for _name in ("aten.roll.default", "aten.flip.default"):
    register(Op(_name, _flipped_factors, pass_of("copy", 0.0), _reversed, saves_nothing))

register_priced("aten.value_selecting_reduction_backward.default aten.cumprod_backward.default", pass_of("scatter"))
register_priced("aten.linalg_vector_norm.out", pass_of("reduction"))


def _found_factors(call: OpCall) -> FactorMap | None:
    """searchsorted: values beside each other are parallel, the rows that they are looked up in whole."""
    rows, values = call.inputs[:2]
    if len(call.inputs) > 2:
        return None
    batch = [f"a{i}" for i in range(len(rows.shape) - 1)]
    of_values = [*batch, "m"] if batch else [f"m{i}" for i in range(len(values.shape))]
    notation = f"{' '.join([*batch, 'k'])}, {' '.join(of_values)} -> {' '.join(of_values)}"
    return parse_map(notation, call.inputs, call.outputs, whole="k")


def _bucket_factors(call: OpCall) -> FactorMap:
    return parse_map("..., k -> ...", call.inputs, call.outputs, whole="k")


for _name, _factors in (("searchsorted.Tensor", _found_factors), ("bucketize.Tensor", _bucket_factors)):
    register(Op(f"aten.{_name}", _factors, pass_of("other", SORT_FLOPS), no_backward, saves_nothing))
