"""Convolutions: batch, channels in, channels out and groups may be split; spatial dims and kernels are whole.

With one group the channels in are contracted, as in a matrix product. With more, dims of channels are (group, rest):
groups are parallel, channels in within a group contracted, channels out within a group parallel.
"""

from __future__ import annotations

import math

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.table import Op, OpCall, register, register_priced, saving, sweep
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta


def _groups(call: OpCall) -> int:
    groups = call.args.get("groups", 1)
    assert isinstance(groups, int)
    return groups


def _is_transposed(call: OpCall) -> bool:
    return "conv_transpose" in call.op or bool(call.args.get("transposed"))


def _spatial(call: OpCall) -> int:
    return len(call.inputs[1].shape) - 2


def _factors(call: OpCall) -> FactorMap:
    """weight: [out, in / groups, *kernel]; transposed: [in, out / groups, *kernel]."""
    count, groups = _spatial(call), _groups(call)
    batch = "n" if len(call.inputs[0].shape) == count + 2 else ""
    before, after, kernel = (" ".join(f"{kind}{i}" for i in range(count)) for kind in ("x", "y", "k"))
    weight = f"(g c) o {kernel}" if _is_transposed(call) else f"(g o) c {kernel}"
    bias = ", (g o)" if len(call.inputs) == 3 else ""
    return parse_map(
        f"{batch} (g c) {before}, {weight}{bias} -> {batch} (g o) {after}",
        call.inputs,
        call.outputs,
        whole=f"{before} {after} {kernel}",
        addends=(2,) if bias else (),
        sizes={"g": groups},
    )


def _gemm(weight: TensorMeta, groups: int, transposed: bool, positions: int) -> tuple[int, int, int, int]:
    """As the product of a matrix of patches: per group, positions x channels out x (channels in x kernel)."""
    first, second, *kernel = weight.shape
    outs, ins = (second, first // groups) if transposed else (first // groups, second)
    return groups, positions, outs, ins * math.prod(kernel)


def _cost(call: OpCall, gemm: tuple[int, int, int, int], nbytes: int) -> OpCost:
    return OpCost("matmul", 2.0 * math.prod(gemm), float(nbytes), call.inputs[0].dtype, gemm)


def _positions(call: OpCall) -> int:
    """Where the kernel is laid: output positions, or input positions of a transposed convolution."""
    of = call.inputs[0] if _is_transposed(call) else call.outputs[0]
    count = _spatial(call)
    batch = of.shape[0] if len(of.shape) == count + 2 else 1
    return batch * math.prod(of.shape[len(of.shape) - count :])


def _price(call: OpCall) -> OpCost:
    gemm = _gemm(call.inputs[1], _groups(call), _is_transposed(call), _positions(call))
    return _cost(call, gemm, sum(m.nbytes for m in (*call.inputs, *call.outputs)))


def _planned_backward(call: OpCall) -> tuple[OpCost, ...]:
    """One product for the gradient of the input and one for that of the weight; the bias is summed."""
    groups, m, n, k = _gemm(call.inputs[1], _groups(call), _is_transposed(call), _positions(call))
    nbytes = sum(t.nbytes for t in (*call.inputs[:2], *call.outputs))
    out = call.outputs[0]
    bias = (sweep("reduction", out, call.inputs[2], flops=out.numel),) if len(call.inputs) == 3 else ()
    return (_cost(call, (groups, m, k, n), nbytes), _cost(call, (groups, k, n, m), nbytes), *bias)


def _traced_backward(call: OpCall) -> OpCost:
    """aten.convolution_backward(grad_output, input, weight, ...): a product for each gradient that is wanted."""
    gradient, source, weight = call.inputs
    transposed, wanted = bool(call.args.get("transposed")), call.args["output_mask"]
    assert isinstance(wanted, list | tuple)
    of = source if transposed else gradient
    positions = of.shape[0] * math.prod(of.shape[2:])
    gemm = _gemm(weight, _groups(call), transposed, positions)
    products = float(sum(bool(w) for w in wanted[:2]))
    nbytes = products * sum(m.nbytes for m in (gradient, source, weight))
    return OpCost(
        "matmul", 2.0 * math.prod(gemm) * max(products, 1.0), max(nbytes, float(gradient.nbytes)), source.dtype
    )


for _name in (
    "conv1d.default conv2d.default conv3d.default conv1d.padding conv2d.padding conv3d.padding "
    "conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input convolution.default"
).split():
    register(Op(f"aten.{_name}", _factors, _price, _planned_backward, saving("in0", "in1")))
register_priced("aten.convolution_backward.default", _traced_backward)
