"""Complex numbers and Fourier transforms: the dims of a transform are whole, all others parallel, all is linear."""

from __future__ import annotations

import math

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.elementwise import TRANSCENDENTAL_FLOPS, aligned, linear_in_first, nowhere_linear
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
    unpriced,
)
from cost_model.program import OpCost

FIRST = ((0,),)
FFT_FLOPS = 5.0
"""Of a complex transform of n numbers, in n log2(n): radix 2 (Van Loan, Computational Frameworks for the FFT, 1992)."""


def _transform_factors(call: OpCall) -> FactorMap:
    """Transformed dims have an extent of their own in the result (a real transform keeps half of the last)."""
    rank = len(call.inputs[0].shape)
    dims = dims_of(call, "dim", rank)
    names = [f"a{i}" for i in range(rank)]
    outs = [f"b{i}" if i in dims else name for i, name in enumerate(names)]
    whole = " ".join(f"a{i} b{i}" for i in dims)
    return parse_map(f"{' '.join(names)} -> {' '.join(outs)}", call.inputs, call.outputs, whole=whole, linear=FIRST)


def _transform_price(call: OpCall) -> OpCost:
    """A real transform works half as much as one of complex numbers."""
    wide = max(call.inputs[0], call.outputs[0], key=lambda meta: meta.numel)
    points = math.prod(wide.shape[d] for d in dims_of(call, "dim", len(wide.shape)))
    share = 1.0 if call.op == "aten._fft_c2c.default" else 0.5
    flops = share * FFT_FLOPS * wide.numel * math.log2(max(points, 2))
    return sweep("transcendental", *call.inputs, *call.outputs, flops=flops)


def _transform_backward(call: OpCall) -> tuple[OpCost, ...]:
    return (_transform_price(call),)


def _parted_factors(call: OpCall) -> FactorMap:
    """view_as_real: the last dim holds both parts of a number."""
    return parse_map("... -> ... parts", call.inputs, call.outputs, whole="parts", linear=FIRST)


def _both_linear(call: OpCall) -> tuple[tuple[int, ...], ...]:
    return ((0, 1),)


for _name in ("_fft_r2c", "_fft_c2c", "_fft_c2r"):
    register(
        Op(f"aten.{_name}.default", _transform_factors, _transform_price, _transform_backward, saves_nothing),
    )
register(Op("aten.view_as_real.default", _parted_factors, unpriced, no_backward, saves_nothing))
register(Op("aten.conj_physical.default", aligned(linear_in_first), pass_of("copy", 0.0), no_backward, saves_nothing))
register(Op("aten.complex.default", aligned(_both_linear), pass_of("copy", 0.0), no_backward, saves_nothing))
for _name in ("polar", "angle"):
    register(
        Op(
            f"aten.{_name}.default",
            aligned(nowhere_linear),
            pass_of("transcendental", TRANSCENDENTAL_FLOPS),
            lambda call: (pass_of("transcendental", TRANSCENDENTAL_FLOPS)(call),),
            saving("in0", "in1"),
        )
    )
register_priced("aten._conj.default aten.view_as_complex.default", unpriced)
