"""Tensors made from nothing, and triangles of tensors. None of them has a gradient, save the triangles."""

from __future__ import annotations

from collections.abc import Callable

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.elementwise import aligned, nowhere_linear
from cost_model.ops.table import (
    Op,
    OpCall,
    no_backward,
    pass_of,
    register,
    register_priced,
    saves_nothing,
    sweep,
    unpriced,
)
from cost_model.program import OpCost


def _sized_factors(call: OpCall) -> FactorMap:
    """Values or sizes are spelled out in the arguments, so every dim is whole; an operand lends its dtype only."""
    operands = [" ".join(f"w{i}_{d}" for d in range(len(m.shape))) for i, m in enumerate(call.inputs)]
    out = " ".join(f"out{d}" for d in range(len(call.outputs[0].shape)))
    whole = " ".join([*operands, out])
    return parse_map(f"{', '.join(operands)} -> {out}", call.inputs, call.outputs, whole=whole)


def _fill_price(call: OpCall) -> OpCost:
    """Writes its output, reads nothing."""
    return sweep("copy", *call.outputs)


def _triangle_factors(call: OpCall) -> FactorMap:
    """The two dims that form the triangle are whole."""
    return parse_map("... m n -> ... m n", call.inputs, call.outputs, whole="m n", linear=((0,),))


def _triangle_backward(call: OpCall) -> tuple[OpCost, ...]:
    return (pass_of("elementwise")(call),) if call.outputs[0].is_floating else ()


def _register_factories(names: str, factors: Callable[[OpCall], FactorMap | None]) -> None:
    for name in names.split():
        register(Op(f"aten.{name}", factors, _fill_price, no_backward, saves_nothing))


_register_factories(
    """arange.default arange.start arange.start_step full.default zeros.default ones.default scalar_tensor.default
    new_zeros.default new_ones.default new_full.default linspace.default logspace.default eye.default eye.m
    tril_indices.default triu_indices.default bartlett_window.default bartlett_window.periodic blackman_window.default
    blackman_window.periodic hamming_window.default hamming_window.periodic hamming_window.periodic_alpha
    hamming_window.periodic_alpha_beta kaiser_window.default kaiser_window.periodic kaiser_window.beta""",
    _sized_factors,
)
_register_factories("zeros_like.default ones_like.default full_like.default", aligned(nowhere_linear))
for _name in ("aten.tril.default", "aten.triu.default"):
    register(Op(_name, _triangle_factors, pass_of("elementwise"), _triangle_backward, saves_nothing))

register_priced("aten.empty.memory_format aten.empty_like.default aten.new_empty.default", unpriced)
