"""Reductions and scans. Summed dims are contracted factors; the dims of any other reduction are whole."""

from __future__ import annotations

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.elementwise import gradient_passes
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
from cost_model.tensor import TensorMeta


def _reduced_map(call: OpCall, dims: tuple[int, ...], *, is_sum: bool, is_linear: bool) -> FactorMap:
    """Reduced dims are gone from the output, or of size 1 under ``keepdim``."""
    rank = len(call.inputs[0].shape)
    names = [f"a{i}" for i in range(rank)]
    keepdim = len(call.outputs[0].shape) == rank
    kept = [f"one{i}" if i in dims else names[i] for i in range(rank) if keepdim or i not in dims]
    whole = "" if is_sum else " ".join(names[i] for i in dims)
    return parse_map(
        f"{' '.join(names)} -> {' '.join(kept)}",
        call.inputs,
        call.outputs,
        whole=whole,
        linear=((0,),) if is_linear else (),
    )


def _dims(call: OpCall) -> tuple[int, ...]:
    return dims_of(call, "dim", len(call.inputs[0].shape))


def _sum_factors(call: OpCall) -> FactorMap:
    return _reduced_map(call, _dims(call), is_sum=True, is_linear=True)


def _mean_factors(call: OpCall) -> FactorMap:
    """A local mean divides by the local count, so averaged dims are whole (a sum over a count has no such limit)."""
    return _reduced_map(call, _dims(call), is_sum=False, is_linear=True)


def _extremum_factors(call: OpCall) -> FactorMap:
    return _reduced_map(call, _dims(call), is_sum=False, is_linear=False)


def _histogram_factors(call: OpCall) -> FactorMap | None:
    """Counts add up; None where the ends of the range are those of the values, which a shard does not know."""
    if call.args["min"] == call.args["max"]:
        return None
    names = " ".join(f"a{i}" for i in range(len(call.inputs[0].shape)))
    return parse_map(f"{names} -> bin", call.inputs, call.outputs, whole="bin")


def _scan_factors(call: OpCall) -> FactorMap:
    """The scanned dim is whole."""
    (dim,) = _dims(call) or (0,)
    names = [f"a{i}" for i in range(len(call.inputs[0].shape))]
    operands = ", ".join([" ".join(names)] * len(call.inputs))
    whole = names[dim] if names else ""
    return parse_map(f"{operands} -> {' '.join(names)}", call.inputs, call.outputs, whole=whole)


def _diff_factors(call: OpCall) -> FactorMap:
    """Each operand and the output has its own extent along the dim, all whole."""
    rank = len(call.inputs[0].shape)
    (dim,) = _dims(call)
    terms, whole = [], []
    for i in range(len(call.inputs) + 1):
        whole.append(f"w{i}")
        terms.append(" ".join(whole[-1] if d == dim else f"a{d}" for d in range(rank)))
    notation = f"{', '.join(terms[:-1])} -> {terms[-1]}"
    return parse_map(notation, call.inputs, call.outputs, whole=" ".join(whole))


def _reduction_price(call: OpCall) -> OpCost:
    """One addition or comparison per input element."""
    return sweep("reduction", *call.outputs, *call.inputs, flops=call.inputs[0].numel)


def _mean_backward(call: OpCall) -> tuple[OpCost, ...]:
    """The expanded gradient divided by the count; a sum's backward is a view."""
    return gradient_passes(call.inputs[0], "oo")


def _extremum_backward(call: OpCall) -> tuple[OpCost, ...]:
    """Gradient shared among the extrema: the mask (x == extremum), its sum, and a product."""
    (source,) = call.inputs
    if not source.is_floating:
        return ()
    count = sweep("reduction", TensorMeta(source.shape, "bool"), *call.outputs)
    return *gradient_passes(source, "om om"), count


def _scan_backward(call: OpCall) -> tuple[OpCost, ...]:
    """The same scan from the other end: flip, scan, flip."""
    (out,) = call.outputs
    if not out.is_floating:
        return ()
    flip = sweep("copy", out, out)
    return flip, sweep("reduction", out, out, flops=out.numel), flip


def _diff_backward(call: OpCall) -> tuple[OpCost, ...]:
    """One end negated, both laid into zeros, their sum."""
    return gradient_passes(call.outputs[0], "oo oo oo ooo") if call.outputs[0].is_floating else ()


def _register_sum(name: str) -> None:
    register(Op(name, _sum_factors, counting(_reduction_price, reduced_rows), no_backward, saves_nothing))


for _name in ("aten.sum.default", "aten.sum.dim_IntList"):
    _register_sum(_name)
_mean_price = alike("aten.sum.dim_IntList", counting(_reduction_price, reduced_rows))
for _name in ("aten.mean.default", "aten.mean.dim"):
    register(Op(_name, _mean_factors, _mean_price, _mean_backward, saves_nothing))
register(Op("aten.amax.default", _extremum_factors, _reduction_price, _extremum_backward, saving("in0", "out0")))
_argmax_price = alike("aten.max.dim", _reduction_price)
register(Op("aten.argmax.default", _extremum_factors, _argmax_price, no_backward, saves_nothing))
for _name in "any.default any.dim any.dims all.default all.dim all.dims".split():
    register(Op(f"aten.{_name}", _extremum_factors, _reduction_price, no_backward, saves_nothing))
register(Op("aten.histc.default", _histogram_factors, _reduction_price, no_backward, saves_nothing))
register(Op("aten.cumsum.default", _scan_factors, _reduction_price, _scan_backward, saves_nothing))
register(Op("aten.diff.default", _diff_factors, pass_of("elementwise"), _diff_backward, saves_nothing))
register_priced("aten._local_scalar_dense.default", lambda call: sweep("copy", *call.inputs))
