"""Elementwise ops: operands aligned from the right as in broadcasting, one pass over memory each."""

from __future__ import annotations

from collections.abc import Callable

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.rows import alike
from cost_model.ops.table import (
    PRODUCTS,
    Op,
    OpCall,
    Ref,
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

Linear = Callable[[OpCall], tuple[tuple[int, ...], ...]]
Backward = Callable[[OpCall], tuple[OpCost, ...]]
Saves = Callable[[OpCall], tuple[str, ...]]

TRANSCENDENTAL_FLOPS = 8.0
"""Flops counted per element of an exp, tanh or erf: the order of a polynomial approximation, by convention."""

SHORT_POWERS = frozenset({-2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0})
"""Exponents torch computes without ``pow`` (pow_tensor_optimized_scalar_kernel, ATen/native/cpu/PowKernel.cpp)."""


def nowhere_linear(call: OpCall) -> tuple[tuple[int, ...], ...]:
    return ()


def linear_in_first(call: OpCall) -> tuple[tuple[int, ...], ...]:
    """Linear in the first operand, whatever the second is."""
    return ((0,),)


def _jointly(call: OpCall) -> tuple[tuple[int, ...], ...]:
    """Linear in both operands at once (add, sub); with a Python number in place of one it is affine, not linear."""
    return ((0, 1),) if len(call.inputs) == 2 else ()


def _each(call: OpCall) -> tuple[tuple[int, ...], ...]:
    """Linear in either operand while the other is held (mul)."""
    return tuple((i,) for i in range(len(call.inputs)))


def between_floats(call: OpCall) -> tuple[tuple[int, ...], ...]:
    """A change of dtype is linear between floating dtypes only."""
    return ((0,),) if call.inputs[0].is_floating and call.outputs[0].is_floating else ()


def aligned(linear: Linear) -> Callable[[OpCall], FactorMap]:
    """Factor map of an elementwise op; a bool result is never a sum."""

    def factors(call: OpCall) -> FactorMap:
        groups = linear(call) if call.outputs[0].dtype != "bool" else ()
        operands = ", ".join(["..."] * len(call.inputs))
        return parse_map(f"{operands} -> ...", call.inputs, call.outputs, linear=groups)

    return factors


def broadcast_gradient(operand: TensorMeta, out: TensorMeta) -> tuple[OpCost, ...]:
    """Sum of the gradient over the dims along which ``operand`` was broadcast."""
    return () if operand.numel == out.numel else (sweep("reduction", out, operand, flops=out.numel),)


def differentiated(call: OpCall) -> list[TensorMeta]:
    """Operands taken to need a gradient: floating, and not a constant of one element beside larger ones."""
    out = call.outputs[0]
    return [m for m in call.inputs if m.is_floating and out.is_floating and (m.numel > 1 or out.numel == 1)]


def gradient_passes(out: TensorMeta, passes: str, *operands: TensorMeta) -> tuple[OpCost, ...]:
    """Passes over memory, one word each, one letter a tensor read or written.

    o: a tensor of the output's size; m: a mask of that size; a, b: the operands. A leading t marks transcendental
    arithmetic: "oo tooo" is a plain pass over two tensors, then a costly one over three.
    """
    metas = {"o": out, "m": TensorMeta(out.shape, "bool"), **dict(zip("ab", operands, strict=False))}
    made = []
    for word in passes.split():
        kind = "transcendental" if word.startswith("t") else "elementwise"
        work = out.numel * (TRANSCENDENTAL_FLOPS if kind == "transcendental" else 1.0)
        made.append(sweep(kind, *(metas[letter] for letter in word.removeprefix("t")), flops=work))
    return tuple(made)


def gradient_of(passes: str) -> Backward:
    """For each operand the given passes, then the sum over the dims along which it was broadcast."""

    def backward(call: OpCall) -> tuple[OpCost, ...]:
        out = call.outputs[0]
        made = gradient_passes(out, passes)
        return tuple(c for m in differentiated(call) for c in (*made, *broadcast_gradient(m, out)))

    return backward


def _difference_backward(negated: int) -> Backward:
    """The gradient is passed on, negated for the operand that is subtracted."""

    def backward(call: OpCall) -> tuple[OpCost, ...]:
        plain = gradient_of("")(call)
        subtracted = call.inputs[negated : negated + 1]
        is_needed = any(m in differentiated(call) for m in subtracted)
        return (*gradient_passes(call.outputs[0], "oo"), *plain) if is_needed else plain

    return backward


def _mul_backward(call: OpCall) -> tuple[OpCost, ...]:
    """Gradient times the other operand."""
    return _product_backward(call, "oob", "ooa")


def _div_backward(call: OpCall) -> tuple[OpCost, ...]:
    """g / b for the dividend; -g * ((a / b) / b) for the divisor."""
    return _product_backward(call, "oob", "oob oob oo ooo")


def _product_backward(call: OpCall, first: str, second: str) -> tuple[OpCost, ...]:
    """Passes for the first and the second operand, then their broadcast sums; by a Python number, one plain pass."""
    if len(call.inputs) == 1:
        return gradient_of("oo")(call)
    (left, right), wanted, out = call.inputs, differentiated(call), call.outputs[0]
    of_left = gradient_passes(out, first, left, right) if left in wanted else ()
    of_right = gradient_passes(out, second, left, right) if right in wanted else ()
    return *of_left, *of_right, *(c for m in wanted for c in broadcast_gradient(m, out))


def _other_operands(call: OpCall) -> tuple[str, ...]:
    """A product saves its operands, unless one is a Python number."""
    return ("in0", "in1") if len(call.inputs) == 2 and call.outputs[0].is_floating else ()


def _mask_of(call: OpCall) -> tuple[str, ...]:
    """The bool operand is all that the backward of a selection reads."""
    return tuple(f"in{i}" for i, m in enumerate(call.inputs) if m.dtype == "bool" and call.outputs[0].is_floating)


def _scalar_pow_kind(call: OpCall) -> str:
    exponent = call.args.get("exponent")
    short = isinstance(exponent, int | float) and float(exponent) in SHORT_POWERS
    return "elementwise" if short else "transcendental"


def _pow_price(call: OpCall) -> OpCost:
    kind = _scalar_pow_kind(call)
    if kind == "elementwise":
        return alike("aten.mul.Tensor", pass_of(kind))(call)
    return pass_of(kind, TRANSCENDENTAL_FLOPS)(call)


def _pow_backward(call: OpCall) -> tuple[OpCost, ...]:
    """g * (n * a ** (n - 1)): one power and two products."""
    power = "oo" if _scalar_pow_kind(call) == "elementwise" else "too"
    return gradient_of(f"{power} oo ooo")(call)


def elementwise(
    names: str,
    kind: str,
    linear: Linear,
    backward: Backward,
    saves: Saves = saves_nothing,
    flops: float = 1.0,
    like: str | None = None,
) -> None:
    """Entries of elementwise ATen ops, given by name and overload. like: the op whose kernel takes as long."""
    price = pass_of(kind, TRANSCENDENTAL_FLOPS if kind == "transcendental" else flops)
    for name in names.split():
        register(Op(f"aten.{name}", aligned(linear), alike(like, price) if like else price, backward, saves))


elementwise("add.Tensor", "elementwise", _jointly, gradient_of(""))
elementwise("sub.Tensor", "elementwise", _jointly, _difference_backward(1))
elementwise("rsub.Tensor", "elementwise", _jointly, _difference_backward(0))
elementwise("add.Scalar sub.Scalar", "elementwise", nowhere_linear, no_backward)
elementwise("rsub.Scalar", "elementwise", nowhere_linear, gradient_of("oo"))
elementwise("mul.Tensor mul.Scalar", "elementwise", _each, _mul_backward, _other_operands)
PRODUCTS.add("aten.mul.Tensor")
elementwise("div.Tensor div.Scalar", "elementwise", linear_in_first, _div_backward, _other_operands)
elementwise("neg.default", "elementwise", linear_in_first, gradient_of("oo"))
elementwise("abs.default", "elementwise", nowhere_linear, gradient_of("oo ooo"), saving("in0"))
elementwise("sqrt.default", "elementwise", nowhere_linear, gradient_of("oo ooo"), saving("out0"))
elementwise("rsqrt.default", "elementwise", nowhere_linear, gradient_of("oo oo ooo"), saving("out0"))
elementwise("reciprocal.default", "elementwise", nowhere_linear, gradient_of("ooo oo ooo"), saving("out0"))
elementwise("relu.default", "elementwise", nowhere_linear, gradient_of("ooo"), saving("out0"))
elementwise("clamp.default", "elementwise", nowhere_linear, gradient_of("om om mmm omo"), saving("in0"))
_EXTREMUM = gradient_of("oo oom omoo oom omo")
elementwise("maximum.default minimum.default", "elementwise", nowhere_linear, _EXTREMUM, saving("in0", "in1"))
elementwise("exp.default", "transcendental", nowhere_linear, gradient_of("ooo"), saving("out0"))
elementwise("log.default", "transcendental", nowhere_linear, gradient_of("ooo"), saving("in0"))
elementwise("tanh.default sigmoid.default", "transcendental", nowhere_linear, gradient_of("ooo"), saving("out0"))
elementwise("gelu.default silu.default", "transcendental", nowhere_linear, gradient_of("tooo"), saving("in0"))
elementwise("erf.default", "transcendental", nowhere_linear, gradient_of("oo oo too oo ooo"), saving("in0"))
elementwise(
    "cos.default", "transcendental", nowhere_linear, gradient_of("too oo ooo"), saving("in0"), like="aten.cos.default"
)
elementwise(
    "sin.default", "transcendental", nowhere_linear, gradient_of("too ooo"), saving("in0"), like="aten.cos.default"
)
elementwise(
    "where.self where.ScalarOther where.ScalarSelf where.Scalar masked_fill.Scalar masked_fill.Tensor",
    "elementwise",
    nowhere_linear,
    gradient_of("omo"),
    _mask_of,
)
elementwise(
    """eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar
    ge.Tensor ge.Scalar""",
    "elementwise",
    nowhere_linear,
    no_backward,
    like="aten.eq.Tensor",
)
elementwise(
    """logical_and.default logical_or.default logical_not.default bitwise_not.default
    bitwise_and.Tensor bitwise_and.Scalar bitwise_or.Tensor bitwise_or.Scalar
    __and__.Tensor __and__.Scalar __or__.Tensor __or__.Scalar""",
    "elementwise",
    nowhere_linear,
    no_backward,
)
register(Op("aten.pow.Tensor_Scalar", aligned(nowhere_linear), _pow_price, _pow_backward, saving("in0")))

register_priced(
    """aten.tanh_backward.default aten.sigmoid_backward.default aten.threshold_backward.default
    aten.leaky_relu_backward.default aten.hardtanh_backward.default aten.hardsigmoid_backward.default
    aten.hardswish_backward.default aten.hardshrink_backward.default aten.softshrink_backward.default
    aten.maximum.out aten.minimum.out aten.pow_.Scalar aten.rsqrt_.default aten.abs_.default aten.sign_.default
    aten.add_.Tensor aten.add_.Scalar aten.sub_.Tensor aten.sub_.Scalar aten.mul_.Tensor aten.mul_.Scalar
    aten.div_.Tensor aten.div_.Scalar aten.neg_.default aten.sqrt_.default aten.reciprocal_.default
    aten.addcmul_.default aten.addcdiv_.default aten.lerp_.Scalar aten.lerp_.Tensor aten.clamp_.default
    aten.masked_fill_.Scalar aten.masked_fill_.Tensor aten.relu_.default
    aten.logical_and_.default aten.exp_.default aten.bitwise_and_.Tensor""",
    pass_of("elementwise"),
)
register_priced(
    """aten.gelu_backward.default aten.silu_backward.default aten.softplus_backward.default aten.elu_backward.default
    aten.mish_backward.default aten.log_sigmoid_backward.default aten.log_sigmoid_forward.default
    aten.logit_backward.default aten.glu_backward.default""",
    pass_of("transcendental", TRANSCENDENTAL_FLOPS),
)
register_priced("aten.copy_.default", lambda call: sweep("copy", *call.outputs, call.inputs[1]))
register_priced("aten.zero_.default aten.fill_.Scalar", lambda call: sweep("copy", *call.outputs))

FOREACH = """add.List add.Scalar add.Tensor sub.List sub.Scalar mul.List mul.Scalar mul.Tensor mul.ScalarList
div.List div.Scalar div.ScalarList div.Tensor addcmul.Scalar addcdiv.Scalar addcdiv.ScalarList addcdiv.Tensor
add.ScalarList lerp.Scalar lerp.List sqrt.default neg.default abs.default reciprocal.default sign.default
rsqrt.default maximum.List clamp_max.Scalar clamp_min.Scalar"""
UPDATED = ("self", "state_sums", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "momentum_buffer_list")
"""Arguments that list ops write in place."""
ADAM_FLOPS, SGD_FLOPS, FOREACH_FLOPS = 13.0, 4.0, 2.0
"""Per element. Adam: weight decay 2, moments 3 and 4, root 1, bias quotient 1, epsilon 1, step 1 (a fused quotient)."""


def _updated(call: OpCall) -> list[TensorMeta]:
    """Tensors that the op writes in place."""
    lists = [call.args.get(name) for name in UPDATED]
    refs = [item for items in lists if isinstance(items, list | tuple) for item in items]
    return [call.inputs[ref.index] for ref in refs if isinstance(ref, Ref)]


def _list_price(flops_per_element: float) -> Callable[[OpCall], OpCost]:
    """Price of an op over lists: all tensors read once, the results (or the lists updated in place) written once."""

    def price(call: OpCall) -> OpCost:
        written = call.outputs or _updated(call)
        return sweep("optimizer", *call.inputs, *written, flops=flops_per_element * sum(m.numel for m in written))

    return price


for _op, _overload in (name.split(".") for name in FOREACH.split()):
    register_priced(f"aten._foreach_{_op}.{_overload}", _list_price(FOREACH_FLOPS))
    register_priced(f"aten._foreach_{_op}_.{_overload}", _list_price(FOREACH_FLOPS))
register_priced("aten._foreach_zero_.default aten._foreach_copy_.default", lambda call: sweep("copy", *call.inputs))
register_priced("aten._foreach_pow.ScalarAndTensor aten._foreach_pow.List", _list_price(TRANSCENDENTAL_FLOPS))
register_priced("aten._foreach_norm.Scalar", _list_price(FOREACH_FLOPS))
register_priced("aten._fused_adamw_.default aten._fused_adam_.default", _list_price(ADAM_FLOPS))
register_priced("aten._fused_sgd_.default aten._fused_adagrad_.default", _list_price(SGD_FLOPS))
