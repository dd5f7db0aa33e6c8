"""Normalisations and softmax: the normalised dims are whole, all others parallel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.elementwise import gradient_passes
from cost_model.ops.rows import alike, counting, softmax_rows
from cost_model.ops.table import (
    BETWEEN_REPLICAS,
    Op,
    OpCall,
    dims_of,
    pass_of,
    register,
    register_priced,
    saving,
    sweep,
)
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta

NORM_FLOPS = 8.0
"""Per element: mean and variance 4, subtract, scale, weight, bias."""
SOFTMAX_FLOPS = 12.0
"""Per element: maximum, subtract, exponential (8), sum, divide."""


def _normalised_rank(call: OpCall) -> int:
    shape = call.args["normalized_shape"]
    assert isinstance(shape, list | tuple)
    return len(shape)


def _norm_factors(call: OpCall) -> FactorMap:
    """Weight and bias, where given, have the normalised dims; statistics have size 1 there."""
    names = " ".join(f"c{i}" for i in range(_normalised_rank(call)))
    operands = ", ".join([f"... {names}", *[names] * (len(call.inputs) - 1)])
    outs = ", ".join([f"... {names}"] * len(call.outputs))
    return parse_map(f"{operands} -> {outs}", call.inputs, call.outputs, whole=names)


def _norm_rows(call: OpCall) -> int:
    return math.prod(call.inputs[0].shape[: len(call.inputs[0].shape) - _normalised_rank(call)])


def _statistics(call: OpCall, count: int) -> list[TensorMeta]:
    """``count`` float32-or-wider values a row, which the composite op keeps for its backward."""
    rows = call.inputs[0].shape[: len(call.inputs[0].shape) - _normalised_rank(call)]
    dtype = "float64" if call.inputs[0].dtype == "float64" else "float32"
    return [TensorMeta(rows, dtype)] * count


def _norm_price(count: int) -> Callable[[OpCall], OpCost]:
    """count: statistics a row beyond those among the outputs."""

    def price(call: OpCall) -> OpCost:
        work = NORM_FLOPS * call.outputs[0].numel
        return sweep("norm", *call.outputs, *call.inputs, *_statistics(call, count), flops=work)

    return counting(price, _norm_rows)


def _norm_backward(count: int) -> Callable[[OpCall], tuple[OpCost, ...]]:
    """Reads gradient, input, statistics and weight; writes the gradients of input, weight and bias."""

    def backward(call: OpCall) -> tuple[OpCost, ...]:
        source, *affine = call.inputs
        moved = [source, source, source, *_statistics(call, count), *affine, *affine]
        return (sweep("norm_backward", *moved, flops=2 * NORM_FLOPS * source.numel),)

    return backward


def _rms_price(call: OpCall) -> OpCost:
    """Traced as a square, a mean and one or two products, since torch.export keeps it whole but autograd does not."""
    source, *weight = call.inputs
    passes = [source] * (7 if weight else 5)
    return sweep("elementwise", *passes, *weight, flops=len(passes) * source.numel)


def _rms_backward(call: OpCall) -> tuple[OpCost, ...]:
    """Autograd of those: products and sums for weight and scale, then five passes through the mean of squares."""
    source, *weight = call.inputs
    product = (*gradient_passes(source, "ooo oo"), sweep("reduction", source, flops=source.numel))
    return *product * (1 + len(weight)), *gradient_passes(source, "oo oo oo ooo ooo")


def softmax_factors(call: OpCall) -> FactorMap:
    """The dim that is normalised is whole."""
    rank = len(call.inputs[0].shape)
    (dim,) = dims_of(call, "dim", rank) or (0,)
    names = [f"a{i}" for i in range(rank)]
    notation = f"{' '.join(names)} -> {' '.join(names)}"
    return parse_map(notation, call.inputs, call.outputs, whole=names[dim] if names else "")


def _softmax_backward(call: OpCall) -> tuple[OpCost, ...]:
    """Reads gradient and result, writes the input's gradient."""
    (out,) = call.outputs
    cost = sweep("softmax_backward", out, out, *call.inputs, flops=4 * out.numel)
    kernel = "_log_softmax" if "log_softmax" in call.op else "_softmax"
    return (replace(cost, op=f"aten.{kernel}_backward_data.default", rows=softmax_rows(call)),)


def _register_norm(name: str, statistics: int, hidden: int, *saved: str) -> None:
    """statistics: values kept a row; hidden: those of them that are not outputs of this op."""
    register(Op(name, _norm_factors, _norm_price(hidden), _norm_backward(statistics), saving(*saved)))


_register_norm("aten.layer_norm.default", 2, 2, "in0", "in1")
_register_norm("aten.native_layer_norm.default", 2, 0, "in0", "in1", "out1", "out2")
register(Op("aten.rms_norm.default", _norm_factors, _rms_price, _rms_backward, saving("in0", "in1")))
_register_norm("aten._fused_rms_norm.default", 1, 0, "in0", "in1", "out1")
_softmax_price = counting(pass_of("softmax", SOFTMAX_FLOPS), softmax_rows)
for _name, _kernel in (
    ("softmax.int", "_softmax.default"),
    ("_softmax.default", "_softmax.default"),
    ("_safe_softmax.default", "_safe_softmax.default"),
    ("log_softmax.int", "_log_softmax.default"),
    ("_log_softmax.default", "_log_softmax.default"),
):
    _price = alike(f"aten.{_kernel}", _softmax_price)
    register(Op(f"aten.{_name}", softmax_factors, _price, _softmax_backward, saving("out0")))

register_priced(
    "aten.native_layer_norm_backward.default aten._fused_rms_norm_backward.default",
    counting(pass_of("norm_backward", 2 * NORM_FLOPS), _norm_rows),
)
register_priced(
    "aten._softmax_backward_data.default aten._log_softmax_backward_data.default",
    counting(pass_of("softmax_backward", 4.0), softmax_rows),
)


def _channel_names(call: OpCall) -> str:
    """Names of the dims after (batch, channels)."""
    return " ".join(f"x{i}" for i in range(len(call.inputs[0].shape) - 2))


def _grouped_factors(call: OpCall) -> FactorMap:
    """Channels are (group, rest): groups are parallel, what a group is made of is whole."""
    spatial, groups = _channel_names(call), call.args.get("num_groups", call.args.get("group"))
    assert isinstance(groups, int)
    operands = ", ".join([f"n (g c) {spatial}", *["(g c)"] * (len(call.inputs) - 1)])
    outs = ", ".join([f"n (g c) {spatial}", *["n g"] * (len(call.outputs) - 1)])
    return parse_map(f"{operands} -> {outs}", call.inputs, call.outputs, whole=f"c {spatial}", sizes={"g": groups})


def _channel_factors(call: OpCall) -> FactorMap:
    """Statistics over the batch and all positions (whole), unless they are given: then everything is parallel."""
    spatial = _channel_names(call)
    operands = ", ".join([f"n c {spatial}", *["c"] * (len(call.inputs) - 1)])
    outs = ", ".join([f"n c {spatial}", *["c"] * (len(call.outputs) - 1)])
    whole = f"n {spatial}" if call.op.startswith("autopar") or call.args.get("training") else ""
    return parse_map(f"{operands} -> {outs}", call.inputs, call.outputs, whole=whole)


def _instance_factors(call: OpCall) -> FactorMap:
    """Statistics of each sample and channel, or given ones."""
    spatial = _channel_names(call)
    whole = spatial if call.args["use_input_stats"] else ""
    operands = ", ".join([f"n c {spatial}", *["c"] * (len(call.inputs) - 1)])
    return parse_map(f"{operands} -> n c {spatial}", call.inputs, call.outputs, whole=whole)


def _channel_price(call: OpCall) -> OpCost:
    """Statistics read the input once more than the normalisation itself."""
    source = call.inputs[0]
    return sweep("norm", source, *call.inputs, *call.outputs, flops=NORM_FLOPS * source.numel)


def _native_batch_norm_price(call: OpCall) -> OpCost:
    """With statistics that are given it is one scale and one shift a channel."""
    if call.args["training"]:
        return _channel_price(call)
    cost = sweep("elementwise", *call.inputs, call.outputs[0], flops=2 * call.inputs[0].numel)
    return replace(cost, op="aten.mul.Tensor")


def _channel_backward(call: OpCall) -> tuple[OpCost, ...]:
    return (_gradients(call.inputs[0], *call.inputs[1:], *call.inputs[1:]),)


def _traced_channel_backward(call: OpCall) -> OpCost:
    """aten.native_(group, batch)_norm_backward(grad_out, input, ...)."""
    return _gradients(call.inputs[1], *call.inputs[2:], *call.outputs[1:])


def _gradients(source: TensorMeta, *small: TensorMeta) -> OpCost:
    """Sums over the output's gradient and the input, then the input's gradient, for which both are read again."""
    return sweep("norm_backward", *[source] * 5, *small, flops=2 * NORM_FLOPS * source.numel)


for _name, _factors in (
    ("aten.group_norm.default", _grouped_factors),
    ("aten.batch_norm.default", _channel_factors),
    ("aten.instance_norm.default", _instance_factors),
):
    register(Op(_name, _factors, _channel_price, _channel_backward, saving("in0", "in1")))


def _statistics_bytes(call: OpCall, replicas: int) -> tuple[tuple[str, int], ...]:
    """Means and variances of channels, then two sums of theirs."""
    x = call.inputs[0]
    both = 2 * x.nbytes // x.numel * x.shape[1]
    return ("all_gather", both * replicas), ("all_reduce", both)


BETWEEN_REPLICAS["autopar.batch_norm.default"] = _statistics_bytes
register(Op("autopar.batch_norm.default", _channel_factors, _channel_price, _channel_backward, saving("in0", "in1")))
register_priced("aten.native_group_norm.default", _channel_price)
register_priced("aten.native_batch_norm.default", _native_batch_norm_price)
register_priced(
    "aten.native_group_norm_backward.default aten.native_batch_norm_backward.default", _traced_channel_backward
)
