"""Our collectives as traced programs hold them, and the local copies around them.

They stand in local programs only, so they are never planned. What travels is priced by the instruction's
``Collective``; the price here is the rearrangement in memory beside it.
"""

from __future__ import annotations

from dataclasses import replace

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.table import (
    BETWEEN_REPLICAS,
    Op,
    OpCall,
    no_backward,
    pass_of,
    register,
    register_priced,
    saves_nothing,
    saving,
    sweep,
    unpriced,
)
from cost_model.placement import Shard
from cost_model.program import OpCost


def _is_consecutive(call: OpCall, dim: str) -> bool:
    """Whether the shards along the dim that an argument names lie one behind the other, as the wire wants them."""
    where, outer = call.args[dim], call.args.get("outer", 1)
    assert isinstance(where, int) and isinstance(outer, int)
    return Shard(where, outer).is_consecutive(call.inputs[0].shape)


def _gather_price(call: OpCall) -> OpCost | None:
    """What arrives, rank after rank, is interleaved into the result."""
    return None if _is_consecutive(call, "dim") else sweep("copy", *call.outputs, *call.outputs)


def _scatter_price(call: OpCall) -> OpCost | None:
    """The operand is first laid out rank after rank."""
    return None if _is_consecutive(call, "dim") else sweep("copy", *call.inputs, *call.inputs)


def _shard_price(call: OpCall) -> OpCost:
    """Reads and writes its share only."""
    return sweep("copy", *call.outputs, *call.outputs)


def _exchange_price(call: OpCall) -> OpCost | None:
    """One side is packed, the other unpacked, unless its shards lie one behind the other."""
    packed = [] if _is_consecutive(call, "split_dim") else [*call.inputs] * 2
    unpacked = [] if _is_consecutive(call, "concat_dim") else [*call.outputs] * 2
    return sweep("copy", *packed, *unpacked) if packed or unpacked else None


def _accumulate_price(call: OpCall) -> OpCost:
    """Reads the gradient and its buffer, writes the buffer."""
    return sweep("elementwise", *call.inputs, *call.inputs, *call.inputs)


def _put_price(call: OpCall) -> OpCost:
    """Reads the gradient and writes its place in the bucket."""
    row, gradient = call.inputs
    return sweep("copy", gradient, replace(gradient, dtype=row.dtype))


def _collect_factors(call: OpCall) -> FactorMap:
    """Linear, and whole along the batch or not at all: what is handed over is no shard of a tp axis."""
    return parse_map("... -> ...", call.inputs, call.outputs, linear=((0,),))


def _replica_factors(call: OpCall) -> FactorMap:
    """What replicas exchange element by element."""
    return parse_map("... -> ...", call.inputs, call.outputs, linear=((0,),))


def _replica_gather_factors(call: OpCall) -> FactorMap:
    """The samples of replicas lie between the dim's outer and inner parts; only the inner part is split further."""
    dim, outer = call.args["dim"], call.args["outer"]
    assert isinstance(dim, int) and isinstance(outer, int)
    names = [f"d{d}" for d in range(len(call.inputs[0].shape))]
    before, after = names[:dim], names[dim + 1 :]
    replicas = call.outputs[0].shape[dim] // call.inputs[0].shape[dim]
    notation = " ".join([*before, "(outer own)", *after]) + " -> " + " ".join([*before, "(outer replica own)", *after])
    sizes = {"outer": outer, "replica": replicas}
    return parse_map(notation, call.inputs, call.outputs, whole="outer replica", linear=((0,),), sizes=sizes)


def _summed_bytes(call: OpCall, replicas: int) -> tuple[tuple[str, int], ...]:
    return (("all_reduce", call.inputs[0].nbytes),) * (1 + call.inputs[0].has_gradient)


def _gathered_bytes(call: OpCall, replicas: int) -> tuple[tuple[str, int], ...]:
    whole = call.outputs[0]
    return ("all_gather", whole.nbytes), *((("reduce_scatter", whole.nbytes),) if whole.has_gradient else ())


BETWEEN_REPLICAS["autopar.replica_sum.default"] = _summed_bytes
BETWEEN_REPLICAS["autopar.replica_gather.default"] = _gathered_bytes
register(Op("autopar.replica_gather.default", _replica_gather_factors, _gather_price, no_backward, saves_nothing))


def _written_factors(call: OpCall) -> FactorMap:
    """What passes through may be split; a buffer and its new value are whole."""
    dims = " ".join(f"w{d}" for d in range(len(call.inputs[1].shape)))
    return parse_map(f"..., {dims}, {dims} -> ...", call.inputs, call.outputs, whole=dims, linear=((0,),))


register(Op("autopar.written.default", _written_factors, unpriced, no_backward, saving("in2")))
register(Op("autopar.replica_sum.default", _replica_factors, pass_of("copy"), no_backward, saves_nothing))
register(Op("autopar.replica_share.default", _replica_factors, pass_of("copy"), no_backward, saves_nothing))
register(Op("autopar.collect.default", _collect_factors, pass_of("copy"), no_backward, saves_nothing))
register_priced("autopar.accumulate.default", _accumulate_price)
register_priced("autopar.put.default", _put_price)
register_priced("autopar.all_reduce.default autopar.forward_end.default", unpriced)
register_priced("autopar.all_gather.default", _gather_price)
register_priced("autopar.reduce_scatter.default", _scatter_price)
register_priced("autopar.begin_all_reduce.default autopar.begin_all_gather.default", unpriced)
register_priced("autopar.begin_reduce_scatter.default autopar.complete.default", unpriced)
register_priced("autopar.take_shard.default", _shard_price)
register_priced("autopar.all_to_all.default", _exchange_price)
register_priced("autopar.shard_ids.default", pass_of("elementwise"))
