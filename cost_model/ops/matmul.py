"""Matrix multiplications."""

from __future__ import annotations

import math
from dataclasses import replace

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.table import PRODUCTS, Op, OpCall, bytes_moved, register, register_priced, saving, sweep
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta

_BATCHED = ("aten.bmm.default", "aten.baddbmm.default")


def gemm_cost(call: OpCall, batch: int, m: int, n: int, k: int) -> OpCost:
    """2 b m n k flops; every operand moved once.

    What multiplies batches does so for a batch of one too: devices may have a faster way for single products.
    """
    flops, kind = 2.0 * batch * m * n * k, "matmul" if batch == 1 and call.op not in _BATCHED else "batched_matmul"
    return OpCost(kind, flops, float(bytes_moved(call)), call.outputs[0].dtype, (batch, m, n, k))


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
PRODUCTS |= {f"aten.{_name}.default" for _name in ("linear", "addmm", "mm", "bmm", "matmul")}


def _baddbmm_price(call: OpCall) -> OpCost:
    (batch, m, k), (_, _, n) = call.inputs[1].shape, call.inputs[2].shape
    return gemm_cost(call, batch, m, n, k)


def _addend_map(call: OpCall) -> FactorMap:
    """The addend broadcasts from the right against [b, m, n]."""
    addend = " ".join(("b", "m", "n")[3 - len(call.inputs[0].shape) :])
    return parse_map(f"{addend}, b m k, b k n -> b m n", call.inputs, call.outputs, addends=(0,))


def _baddbmm_backward(call: OpCall) -> tuple[OpCost, ...]:
    (batch, m, k), (_, _, n) = call.inputs[1].shape, call.inputs[2].shape
    return *_gradients(call, batch, m, n, k), *_bias_gradient(call, call.inputs[0])


def _product_price(call: OpCall) -> OpCost:
    """A gemm whose result goes where gradients are kept; what lies there may be read."""
    left, right = call.inputs[-2:]
    m, n = left.shape[0], right.shape[1]
    made = TensorMeta((m, n), left.dtype)
    reads = made.nbytes if call.op.startswith("autopar.accumulate") else 0
    cost = gemm_cost(OpCall(call.op, (left, right), (made,), call.args), 1, m, n, left.shape[1])
    return replace(cost, nbytes=cost.nbytes + reads)


for _name in ("autopar.accumulate_product.default", "autopar.put_product.default"):
    register_priced(_name, _product_price)


def _quick_product_price(call: OpCall) -> OpCost:
    (m, k), (_, n) = call.inputs[0].shape, call.inputs[1].shape
    return gemm_cost(call, 1, m, n, k)


register_priced("autopar.product.default", _quick_product_price)


def _vector_factors(call: OpCall) -> FactorMap:
    """mv [m, k] x [k], dot [k] x [k], outer [m] x [n]."""
    notation = {"mv": "m k, k -> m", "dot": "k, k -> ", "outer": "m, n -> m n"}[call.op.split(".")[1]]
    return parse_map(notation, call.inputs, call.outputs)


def _vector_gemm(call: OpCall) -> tuple[int, int, int, int]:
    left, right = call.inputs[0].shape, call.inputs[1].shape
    if call.op.startswith("aten.outer"):
        return 1, left[0], right[0], 1
    return 1, left[0] if len(left) > 1 else 1, 1, left[-1]


register(Op("aten.baddbmm.default", _addend_map, _baddbmm_price, _baddbmm_backward, saving("in1", "in2")))
for _name in ("aten.mv.default", "aten.dot.default", "aten.outer.default"):
    register(
        Op(
            _name,
            _vector_factors,
            lambda call: gemm_cost(call, *_vector_gemm(call)),
            lambda call: _gradients(call, *_vector_gemm(call)),
            saving("in0", "in1"),
        )
    )


def _einsum_factors(call: OpCall) -> FactorMap | None:
    """The equation is the map; None where an index repeats within an operand or "..." stands for dims."""
    equation = call.args["equation"]
    assert isinstance(equation, str)
    text = equation.replace(" ", "")
    left, _, right = text.partition("->")
    terms = left.split(",")
    is_implicit = "->" not in text
    if "." in text or is_implicit or any(len(set(term)) < len(term) for term in terms):
        return None
    if any(extent == 1 for meta in call.inputs for extent in meta.shape):
        return None
    notation = f"{', '.join(' '.join(term) for term in terms)} -> {' '.join(right)}"
    return parse_map(notation, call.inputs, call.outputs)


def _einsum_gemm(call: OpCall) -> tuple[int, int, int, int]:
    """Every index once: what is in the output as rows, the rest contracted."""
    equation = call.args["equation"]
    assert isinstance(equation, str)
    left, _, right = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, meta in zip(left.split(","), call.inputs, strict=False):
        sizes.update(zip(term, meta.shape, strict=False))
    summed = math.prod(extent for name, extent in sizes.items() if name not in right)
    return 1, call.outputs[0].numel, 1, summed


register(
    Op(
        "aten.einsum.default",
        _einsum_factors,
        lambda call: gemm_cost(call, *_einsum_gemm(call)),
        lambda call: (gemm_cost(call, *_einsum_gemm(call)),) * len(call.inputs),
        saving(*(f"in{i}" for i in range(8))),
    )
)
register_priced("aten.addmm_.default", lambda call: gemm_cost(call, *_addmm_gemm(call)))
register_priced("aten.baddbmm_.default", _baddbmm_price)


def _experts_factors(call: OpCall) -> FactorMap:
    """Tokens are parallel; experts, and the features inside each, are summed over. An expert is named by its index."""
    return parse_map(
        "t h, t k, t k, e (g i) h, e h i -> t h",
        call.inputs,
        call.outputs,
        whole="h k g",
        ordered="e",
        sizes={"g": 2},
    )


def _experts_flops(call: OpCall) -> float:
    """Three products of a token with each of its experts that are held here, taken to be chosen evenly."""
    tokens = call.inputs[-4].numel
    held, wide, width = call.inputs[-2].shape
    total = call.args["total"]
    assert isinstance(total, int)
    return 2.0 * tokens * held / total * (wide * width + wide // 2 * width)


def _experts_cost(call: OpCall, times: float) -> OpCost:
    nbytes = bytes_moved(call) + 2.0 * call.inputs[-4].numel * call.inputs[-2].shape[1] * 4
    return OpCost("matmul", times * _experts_flops(call), times * nbytes, call.outputs[0].dtype)


def _experts_backward(call: OpCall) -> tuple[OpCost, ...]:
    """Two products for each of the forward's, and the first of those again."""
    return (_experts_cost(call, EXPERTS_BACKWARD),)


EXPERTS_BACKWARD = 2.0 + 2.0 / 3.0
"""Over forward: gradients of both operands of each product, and the product with gate_up, two thirds, once more."""
register(
    Op(
        "autopar.experts.default",
        _experts_factors,
        lambda call: _experts_cost(call, 1.0),
        _experts_backward,
        saving("in0", "in1", "in2", "in3", "in4"),
    )
)
register_priced("autopar.experts_backward.default", lambda call: _experts_cost(call, EXPERTS_BACKWARD))
