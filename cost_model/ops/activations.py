"""The rest of torch's elementwise ops: activations, rounding, comparisons, special functions, scalar variants."""

from __future__ import annotations

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.elementwise import (
    TRANSCENDENTAL_FLOPS,
    elementwise,
    gradient_of,
    gradient_passes,
    nowhere_linear,
)
from cost_model.ops.table import Op, OpCall, dims_of, no_backward, pass_of, register, saving, sweep
from cost_model.program import OpCost

elementwise(
    """leaky_relu.default hardtanh.default relu6.default hardsigmoid.default hardswish.default threshold.default
    hardshrink.default softshrink.default""",
    "elementwise",
    nowhere_linear,
    gradient_of("ooo"),
    saving("in0"),
)
elementwise(
    "softplus.default elu.default celu.default selu.default mish.default log_sigmoid.default logit.default",
    "transcendental",
    nowhere_linear,
    gradient_of("tooo"),
    saving("in0"),
)
elementwise("square.default", "elementwise", nowhere_linear, gradient_of("oo ooo"), saving("in0"))
elementwise(
    "expm1.default exp2.default tan.default", "transcendental", nowhere_linear, gradient_of("ooo"), saving("out0")
)
elementwise(
    """log1p.default log2.default log10.default sinh.default cosh.default asin.default acos.default atan.default
    asinh.default acosh.default atanh.default erfc.default erfinv.default""",
    "transcendental",
    nowhere_linear,
    gradient_of("too ooo"),
    saving("in0"),
)
elementwise(
    """digamma.default lgamma.default polygamma.default special_erfcx.default special_ndtri.default
    special_i0e.default i0.default special_i1.default special_i1e.default special_zeta.default
    special_zeta.self_scalar special_zeta.other_scalar""",
    "transcendental",
    nowhere_linear,
    gradient_of("too ooo"),
    saving("in0"),
)
elementwise(
    """special_bessel_j0.default special_bessel_j1.default special_bessel_y0.default special_bessel_y1.default
    special_modified_bessel_i0.default special_modified_bessel_i1.default special_modified_bessel_k0.default
    special_modified_bessel_k1.default special_scaled_modified_bessel_k0.default
    special_scaled_modified_bessel_k1.default special_spherical_bessel_j0.default special_airy_ai.default""",
    "transcendental",
    nowhere_linear,
    no_backward,
)
elementwise(
    " ".join(
        f"special_{name}.{overload}"
        for name in (
            *(f"{shifted}chebyshev_polynomial_{kind}" for shifted in ("", "shifted_") for kind in "tuvw"),
            *(f"{name}_polynomial_{kind}" for name, kind in (("hermite", "h"), ("hermite", "he"), ("laguerre", "l"))),
            "legendre_polynomial_p",
        )
        for overload in ("default", "x_scalar", "n_scalar")
    ),
    "transcendental",
    nowhere_linear,
    no_backward,
)
elementwise(
    "igamma.default igammac.default", "transcendental", nowhere_linear, gradient_of("tooo"), saving("in0", "in1")
)
elementwise("copysign.Scalar", "elementwise", nowhere_linear, gradient_of("oo ooo"), saving("in0"))
elementwise("copysign.Tensor", "elementwise", nowhere_linear, gradient_of("oo ooo"), saving("in0", "in1"))
elementwise("ldexp.Tensor", "transcendental", nowhere_linear, gradient_of("too ooo"), saving("in0", "in1"))
elementwise(
    "floor.default ceil.default round.default round.decimals trunc.default sign.default sgn.default",
    "elementwise",
    nowhere_linear,
    gradient_of("o"),
)
elementwise("frac.default", "elementwise", nowhere_linear, gradient_of(""))
elementwise("nan_to_num.default", "elementwise", nowhere_linear, gradient_of("om om ooo"), saving("in0"))
elementwise(
    """logical_xor.default bitwise_xor.Tensor bitwise_xor.Scalar __xor__.Tensor __xor__.Scalar
    bitwise_and.Scalar_Tensor bitwise_or.Scalar_Tensor bitwise_xor.Scalar_Tensor isnan.default isinf.default
    isfinite.default signbit.default isclose.default nextafter.default gcd.default lcm.default
    __lshift__.Tensor __lshift__.Scalar __rshift__.Tensor __rshift__.Scalar
    bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_left_shift.Scalar_Tensor
    bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar bitwise_right_shift.Scalar_Tensor""",
    "elementwise",
    nowhere_linear,
    no_backward,
)
elementwise(
    "floor_divide.default floor_divide.Scalar div.Tensor_mode div.Scalar_mode",
    "elementwise",
    nowhere_linear,
    no_backward,
)
elementwise(
    "remainder.Scalar remainder.Tensor remainder.Scalar_Tensor fmod.Scalar fmod.Tensor",
    "elementwise",
    nowhere_linear,
    gradient_of("oo"),
    saving("in0", "in1"),
)
_EXTREMUM = gradient_of("oo oom omoo oom omo")
elementwise(
    "min.other max.other fmin.default fmax.default clamp_min.Tensor clamp_max.Tensor",
    "elementwise",
    nowhere_linear,
    _EXTREMUM,
    saving("in0", "in1"),
)
elementwise("clamp_min.default clamp_max.default", "elementwise", nowhere_linear, gradient_of("om omo"), saving("in0"))
elementwise("clamp.Tensor", "elementwise", nowhere_linear, _EXTREMUM, saving("in0", "in1", "in2"))
elementwise(
    "pow.Tensor_Tensor", "transcendental", nowhere_linear, gradient_of("too oo ooo"), saving("in0", "in1", "out0")
)
elementwise("pow.Scalar", "transcendental", nowhere_linear, gradient_of("oo ooo"), saving("out0"))
elementwise(
    "atan2.default hypot.default logaddexp.default", "transcendental", nowhere_linear, gradient_of("ooo ooo ooo"),
    saving("in0", "in1"),
)  # fmt: skip
elementwise("xlogy.Tensor", "transcendental", nowhere_linear, gradient_of("too ooo"), saving("in0", "in1"))
elementwise(
    "addcmul.default addcdiv.default", "elementwise", nowhere_linear, gradient_of("ooo ooo"),
    saving("in0", "in1", "in2"),
)  # fmt: skip
elementwise("lerp.Scalar", "elementwise", lambda call: ((0, 1),), gradient_of("oo"))
elementwise("lerp.Tensor", "elementwise", lambda call: ((0, 1),), gradient_of("ooo"), saving("in2", "in0", "in1"))


def _parted_factors(call: OpCall) -> FactorMap:
    """Several results of the operand's shape."""
    return parse_map(f"... -> {', '.join(['...'] * len(call.outputs))}", call.inputs, call.outputs)


register(Op("aten.frexp.Tensor", _parted_factors, pass_of("elementwise"), gradient_of("too ooo"), saving("out1")))


def _prelu_factors(call: OpCall) -> FactorMap:
    """Dim 1 of the input carries the slopes, unless there is one slope for all."""
    rank = len(call.inputs[0].shape)
    names = [f"a{i}" for i in range(rank)]
    slope = names[1] if rank > 1 and call.inputs[1].numel > 1 else "one"
    terms, slope = " ".join(names), slope if call.inputs[1].shape else ""
    return parse_map(f"{terms}, {slope} -> {terms}", call.inputs, call.outputs)


def _glu_factors(call: OpCall) -> FactorMap:
    """Halves of a dim: (q c) with q = 2, whole, and c parallel."""
    rank = len(call.inputs[0].shape)
    (dim,) = dims_of(call, "dim", rank)
    names = [f"a{i}" for i in range(rank)]
    before = " ".join([*names[:dim], "(q c)", *names[dim + 1 :]])
    after = " ".join([*names[:dim], "c", *names[dim + 1 :]])
    return parse_map(f"{before} -> {after}", call.inputs, call.outputs, whole="q", sizes={"q": 2})


def _glu_backward(call: OpCall) -> tuple[OpCost, ...]:
    return (sweep("transcendental", *call.inputs, *call.inputs, *call.outputs, flops=call.inputs[0].numel),)


def _prelu_backward(call: OpCall) -> tuple[OpCost, ...]:
    """Gradients of input and slope, the latter summed."""
    (out,) = call.outputs
    return *gradient_passes(out, "ooo ooo"), sweep("reduction", out, call.inputs[1], flops=out.numel)


register(
    Op("aten.glu.default", _glu_factors, pass_of("transcendental", TRANSCENDENTAL_FLOPS), _glu_backward, saving("in0"))
)
register(Op("aten.prelu.default", _prelu_factors, pass_of("elementwise"), _prelu_backward, saving("in0", "in1")))
elementwise("_prelu_kernel.default", "elementwise", nowhere_linear, gradient_of("ooo ooo"), saving("in0", "in1"))
