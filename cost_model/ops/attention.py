"""Attention: batch, heads and queries parallel; key and feature dims whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.table import Op, OpCall, bytes_moved, register, register_priced, saving, sweep
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta

BACKWARD_OVER_FORWARD = 2.5
"""Five gemms (scores again, and the gradients of scores, values, queries, keys) against two."""


@dataclass(frozen=True)
class _Shape:
    """The op's extents. batches: product of all dims before t, heads included; t queries, s keys, d and e features."""

    batches: int
    t: int
    s: int
    d: int
    e: int

    @property
    def flops(self) -> float:
        """Two gemms, t x s x d and t x e x s, for each batch and head."""
        return 2.0 * self.batches * self.t * self.s * (self.d + self.e)


def _shape(query: TensorMeta, key: TensorMeta, value: TensorMeta) -> _Shape:
    *batches, t, d = query.shape
    return _Shape(math.prod(batches), t, key.shape[-2], d, value.shape[-1])


def _cost(call: OpCall, kind: str, shape: _Shape, nbytes: float) -> OpCost:
    """A causal kernel skips the scores above the diagonal, half of a square; of ranks that share the queries the last
    is priced, which skips least. How much of it a device really skips depends on the shape."""
    is_causal = call.args.get("is_causal") or "attention_rows" in call.op
    causal = 1 - min(shape.t / (2 * shape.s), 0.5) if is_causal else 1.0
    more = BACKWARD_OVER_FORWARD if kind == "attention_backward" else 1.0
    gemm = (shape.batches, shape.t, shape.s, shape.d)
    return OpCost(kind, causal * more * shape.flops, nbytes, call.inputs[0].dtype, gemm)


def _price(call: OpCall) -> OpCost:
    return _cost(call, "attention", _shape(*call.inputs[:3]), float(bytes_moved(call)))


def _planned_backward(call: OpCall) -> tuple[OpCost, ...]:
    """Reads q, k, v, out, its gradient and the mask; writes three gradients."""
    query, key, value, *mask = call.inputs
    moved = [query, key, value] * 2 + [call.outputs[0]] * 2 + mask
    return (_cost(call, "attention_backward", _shape(query, key, value), sweep("attention_backward", *moved).nbytes),)


def _traced_backward(call: OpCall) -> OpCost:
    """The outputs are the gradients of query, key and value, in this order and of their shapes."""
    return _cost(call, "attention_backward", _shape(*call.outputs[:3]), float(bytes_moved(call)))


def _leading(rank: int) -> list[str]:
    """Names of the dims before (t, d): b and h for the usual four."""
    return ["b", "h"] if rank == 4 else [f"b{i}" for i in range(rank - 2)]


def _grouped(heads: int, kv_heads: int) -> bool:
    return kv_heads not in (1, heads)


def _mask_term(mask: TensorMeta, leading: list[str]) -> str:
    """A mask broadcasts, aligned from the right, against (leading, t, s)."""
    return " ".join([*leading, "t", "s"][len(leading) + 2 - len(mask.shape) :])


def attention_factors(call: OpCall) -> FactorMap:
    """Grouped queries have heads (g r), r of them to each of g heads of keys and values.

    A rank that holds some queries needs all keys and values (context parallelism); where the mask is causal, which
    queries they are tells which keys they see, so they are consecutive.
    """
    query, key, _, *mask = call.inputs
    leading = _leading(len(query.shape))
    of_keys, sizes = list(leading), {}
    if leading and _grouped(query.shape[-3], key.shape[-3]):
        leading[-1], of_keys[-1] = "(g r)", "g"
        sizes = {"g": key.shape[-3], "r": query.shape[-3] // key.shape[-3]}
    queries, keys = " ".join(leading), " ".join(of_keys)
    operands = [f"{queries} t d", f"{keys} s d", f"{keys} s e", *(_mask_term(m, leading) for m in mask)]
    outs = [f"{queries} t e", f"{queries} t"][: len(call.outputs)]
    notation = f"{', '.join(operands)} -> {', '.join(outs)}"
    is_causal = bool(call.args.get("is_causal"))
    is_square = query.shape[-2] == key.shape[-2] and not mask
    whole = "s d e" if is_square or not is_causal else "t s d e"
    return parse_map(notation, call.inputs, call.outputs, whole=whole, ordered="t", sizes=sizes)


def _sdpa_factors(call: OpCall) -> FactorMap:
    """As attention; causal queries stay whole."""
    rule = attention_factors(call)
    return replace(rule, whole=rule.whole | {"t"} & rule.sizes.keys()) if call.args.get("is_causal") else rule


register(
    Op(
        name="aten.scaled_dot_product_attention.default",
        factors=_sdpa_factors,
        price=_price,
        backward_price=_planned_backward,
        saves=saving("in0", "in1", "in2", "in3", "out0"),
    )
)
register(
    Op(
        name="autopar.attention.default",
        factors=attention_factors,
        price=_price,
        backward_price=_planned_backward,
        saves=saving("in0", "in1", "in2", "in3", "out0", "out1"),
    )
)
register_priced("autopar.attention_rows.default aten._scaled_dot_product_flash_attention_for_cpu.default", _price)
register_priced(
    """autopar.attention_backward.default autopar.attention_rows_backward.default
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default""",
    _traced_backward,
)
