"""Matrix multiplications."""

from __future__ import annotations

import math

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.table import Op, OpCall, bytes_moved, register, register_priced, saving, sweep
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta


def gemm_cost(call: OpCall, batch: int, m: int, n: int, k: int) -> OpCost:
    """2 b m n k flops; every operand moved once."""
    flops = 2.0 * batch * m * n * k
    return OpCost("matmul", flops, float(bytes_moved(call)), call.outputs[0].dtype, (batch, m, n, k))


def _gradients(call: OpCall, batch: int, m: int, n: int, k: int) -> tuple[OpCost, OpCost]:
    """The two gemms of the backward: [m, n] x [n, k] for the left operand, [k, m] x [m, n] for the right."""
    return gemm_cost(call, batch, m, k, n), gemm_cost(call, batch, k, n, m)


def _bias_gradient(call: OpCall, bias: TensorMeta) -> tuple[OpCost, ...]:
    out = call.outputs[0]
    return () if bias.shape == out.shape else (sweep("reduction", out, bias, flops=out.numel),)


def _linear_factors(call: OpCall) -> FactorMap:
    with_bias = len(call.inputs) == 3
    notation = "... k, n k, n -> ... n" if with_bias else "... k, n k -> ... n"
    return parse_map(notation, call.inputs, call.outputs, addends=(2,) if with_bias else ())


def _linear_gemm(call: OpCall) -> tuple[int, int, int]:
    (n, k) = call.inputs[1].shape
    return math.prod(call.inputs[0].shape[:-1]), n, k


def _linear_price(call: OpCall) -> OpCost:
    return gemm_cost(call, 1, *_linear_gemm(call))


def _linear_backward(call: OpCall) -> tuple[OpCost, ...]:
    m, n, k = _linear_gemm(call)
    bias = _bias_gradient(call, call.inputs[2]) if len(call.inputs) == 3 else ()
    return gemm_cost(call, 1, m, k, n), gemm_cost(call, 1, n, k, m), *bias


def _addmm_factors(call: OpCall) -> FactorMap:
    """The addend has rank 0, 1 or 2 and broadcasts from the right."""
    addend = ("", "n", "m n")[len(call.inputs[0].shape)]
    return parse_map(f"{addend}, m k, k n -> m n", call.inputs, call.outputs, addends=(0,))


def _addmm_gemm(call: OpCall) -> tuple[int, int, int, int]:
    (m, k), (_, n) = call.inputs[1].shape, call.inputs[2].shape
    return 1, m, n, k


def _addmm_backward(call: OpCall) -> tuple[OpCost, ...]:
    return *_gradients(call, *_addmm_gemm(call)), *_bias_gradient(call, call.inputs[0])


def _mm_factors(call: OpCall) -> FactorMap:
    return parse_map("m k, k n -> m n", call.inputs, call.outputs)


def _bmm_factors(call: OpCall) -> FactorMap:
    return parse_map("b m k, b k n -> b m n", call.inputs, call.outputs)


def _matmul_factors(call: OpCall) -> FactorMap:
    """torch.matmul: a 1-d operand has only k; batch dims broadcast, aligned from the right."""
    left, right = call.inputs
    rows, columns = len(left.shape) > 1, len(right.shape) > 1
    terms = ("... m k" if rows else "k", "... k n" if columns else "k")
    out = " ".join((["..."] if rows or columns else []) + ["m"] * rows + ["n"] * columns)
    return parse_map(f"{terms[0]}, {terms[1]} -> {out}", call.inputs, call.outputs)


def _matmul_gemm(call: OpCall) -> tuple[int, int, int, int]:
    """Batch dims that the right operand lacks are rows of one gemm, as torch folds them."""
    left, right = call.inputs[0].shape, call.inputs[1].shape
    m, k = (left[-2] if len(left) > 1 else 1), left[-1]
    n = right[-1] if len(right) > 1 else 1
    batch = call.outputs[0].numel // max(m * n, 1)
    if len(right) <= 2:
        return 1, batch * m, n, k
    return batch, m, n, k


def _matmul_price(call: OpCall) -> OpCost:
    return gemm_cost(call, *_matmul_gemm(call))


def _matmul_backward(call: OpCall) -> tuple[OpCost, ...]:
    return _gradients(call, *_matmul_gemm(call))


register(
    Op(
        name="aten.linear.default",
        factors=_linear_factors,
        price=_linear_price,
        backward_price=_linear_backward,
        saves=saving("in0", "in1"),
    )
)
register(
    Op(
        name="aten.addmm.default",
        factors=_addmm_factors,
        price=lambda call: gemm_cost(call, *_addmm_gemm(call)),
        backward_price=_addmm_backward,
        saves=saving("in1", "in2"),
    )
)
for _name, _factors in (
    ("aten.mm.default", _mm_factors),
    ("aten.bmm.default", _bmm_factors),
    ("aten.matmul.default", _matmul_factors),
):
    register(Op(_name, _factors, _matmul_price, _matmul_backward, saving("in0", "in1")))


def _baddbmm_price(call: OpCall) -> OpCost:
    (batch, m, k), (_, _, n) = call.inputs[1].shape, call.inputs[2].shape
    return gemm_cost(call, batch, m, n, k)


register_priced("aten.addmm_.default", lambda call: gemm_cost(call, *_addmm_gemm(call)))
register_priced("aten.baddbmm.default aten.baddbmm_.default", _baddbmm_price)
