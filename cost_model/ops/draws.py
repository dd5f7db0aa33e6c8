"""Random numbers: functions of a key and of coordinates, each along one dim, so that every dim may be split."""

from __future__ import annotations

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.elementwise import gradient_passes
from cost_model.ops.table import Op, OpCall, no_backward, register, register_priced, saves_nothing, saving, sweep
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta

BITS = "int32"
"""What numbers are made from: a word for each, mixed from those of its row and column."""
MIXING_FLOPS = 8.0
"""Integer operations on each word, by count."""


def _drawn_factors(call: OpCall) -> FactorMap:
    """key, coordinates a, b, ... -> a b ..."""
    dims = [f"d{i}" for i in range(len(call.outputs[0].shape))]
    return parse_map(f"{', '.join(['', *dims])} -> {' '.join(dims)}", call.inputs, call.outputs)


def _dropout_factors(call: OpCall) -> FactorMap:
    """x, key, coordinates -> x and its mask."""
    dims = [f"d{i}" for i in range(len(call.outputs[0].shape))]
    whole = " ".join(dims)
    return parse_map(f"{', '.join([whole, '', *dims])} -> {whole}, {whole}", call.inputs, call.outputs)


def _drawn_price(call: OpCall) -> OpCost:
    """Words are made in cache, where they are read once more than they are written, and the result is written; each row
    has one of its own, that those of its elements are mixed with."""
    (out,) = call.outputs
    words = TensorMeta(out.shape, BITS)
    rows = out.numel // max(1, out.shape[-1]) if out.shape else 1
    return OpCost("random", MIXING_FLOPS * out.numel, sweep("random", words, words, out).nbytes, "float32", rows=rows)


def _drop_price(call: OpCall) -> OpCost:
    """x times a mask, then times a number in place."""
    x, mask = call.inputs
    return sweep("elementwise", x, mask, *call.outputs * 3, flops=2 * x.numel)


def _dropout_price(call: OpCall) -> OpCost:
    """A mask drawn and applied."""
    out, mask = call.outputs
    words = TensorMeta(out.shape, BITS)
    drawn = sweep("random", words, words, mask, out, *(out,) * 3, mask, flops=(MIXING_FLOPS + 2) * out.numel)
    return OpCost("random", (MIXING_FLOPS + 2) * out.numel, drawn.nbytes, out.dtype)


def _dropout_backward(call: OpCall) -> tuple[OpCost, ...]:
    return gradient_passes(call.outputs[0], "omo oo")


register(Op("autopar.dropout.default", _dropout_factors, _dropout_price, _dropout_backward, saving("out1")))
for _name in ("uniform", "normal", "random_integers"):
    register(Op(f"autopar.{_name}.default", _drawn_factors, _drawn_price, no_backward, saves_nothing))
register_priced("autopar.keep.default autopar.random_keys.default", _drawn_price)
register_priced("autopar.drop.default", _drop_price)
