"""The registry, and the forms in which an op call reaches an entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from cost_model.factors import FactorMap
from cost_model.placement import Shard
from cost_model.program import OpCost
from cost_model.tensor import COMPLEX, TensorMeta


@dataclass(frozen=True)
class Ref:
    """Stands in ``OpCall.args`` for the tensor ``inputs[index]``."""

    index: int


@dataclass(frozen=True)
class OpCall:
    """One call: metas of its tensor inputs (in schema order, lists flattened) and outputs, all arguments by name.

    args holds every schema argument, defaults filled in; tensors are Refs (lists of them lists of Refs, None stays).
    """

    op: str
    inputs: tuple[TensorMeta, ...]
    outputs: tuple[TensorMeta, ...]
    args: Mapping[str, object] = field(hash=False)


@dataclass(frozen=True)
class Op:
    """name: str(op overload), e.g. "aten.linear.default".

    factors: the call's factor map; None when only replication is possible (backward ops: never asked).
    price: work of the call; None for views and other free ops.
    backward_price: costs of the ops its backward will run (planning only; the traced backward is priced itself).
    saves: which tensors the backward reads, as "in0", "out1", ...; what shape-only uses need is not saved.
    """

    name: str
    factors: Callable[[OpCall], FactorMap | None]
    price: Callable[[OpCall], OpCost | None]
    backward_price: Callable[[OpCall], tuple[OpCost, ...]]
    saves: Callable[[OpCall], tuple[str, ...]]


OPS: dict[str, Op] = {}

KINDS = frozenset(
    """matmul batched_matmul convolution convolution_backward attention attention_backward elementwise transcendental
    softmax softmax_backward norm norm_backward reduction gather scatter copy random loss loss_backward optimizer
    other""".split()
)


INSIDE: dict[str, Callable[[OpCall, Shard, int], tuple[tuple[str, int], ...]]] = {}
"""Of ops that finish a split by collectives of their own: kind and bytes of each, forward and backward.

Asked with a rank's call, the shard of its first input and the number of ranks.
"""


INSIDE_COSTS: dict[str, Callable[[OpCall], tuple[OpCost, ...]]] = {}
"""Of those that are other ops where they are split so: what these cost on a rank, forward and backward."""


BETWEEN_REPLICAS: dict[str, Callable[[OpCall, int], tuple[tuple[str, int], ...]]] = {}
"""Of ops by which replicas exchange something: kind and bytes of each collective, forward and backward.

Asked with a rank's call and the number of replicas.
"""


PRODUCTS: set[str] = set()
"""Ops of which the backward reads each operand for the gradients of the others alone."""


WITHIN_BACKWARD: dict[str, Callable[[OpCall], int]] = {}
"""Bytes that backwards make on the way from the gradients of outputs to those of inputs, of ops where that is much."""


def register(op: Op) -> None:
    assert op.name not in OPS, f"{op.name} is registered twice"
    OPS[op.name] = op


def entry_of(name: str) -> Op | None:
    """The entry, or None for an op without one (it is replicated, priced by bytes, and named in the notes)."""
    return OPS.get(name)


def bytes_moved(call: OpCall) -> int:
    """Every input read once and every output written once."""
    return sum(m.nbytes for m in (*call.inputs, *call.outputs))


def arithmetic_dtype(*metas: TensorMeta) -> str:
    """The first floating dtype, complex numbers' that of their parts; else the first; float32 without tensors."""
    found = (COMPLEX.get(m.dtype, m.dtype) for m in metas if m.has_gradient)
    return next(found, metas[0].dtype if metas else "float32")


def sweep(kind: str, *metas: TensorMeta, flops: float = 0.0) -> OpCost:
    """One pass that reads or writes each of ``metas`` once; integer arithmetic counts no flops."""
    assert kind in KINDS, kind
    dtype = arithmetic_dtype(*metas)
    floating = any(m.has_gradient for m in metas)
    return OpCost(kind, flops if floating else 0.0, float(sum(m.nbytes for m in metas)), dtype)


def pass_of(kind: str, flops_per_element: float = 1.0) -> Callable[[OpCall], OpCost]:
    """Price of an op that reads its inputs once, writes its outputs once and works once per output element."""

    def price(call: OpCall) -> OpCost:
        work = flops_per_element * sum(m.numel for m in call.outputs)
        return sweep(kind, *call.outputs, *call.inputs, flops=work)

    return price


def backward_only(call: OpCall) -> None:
    """Factors of ops met only in traced backward graphs and optimizers: priced, never planned."""


def unpriced(call: OpCall) -> None:
    """Price of views, and of collectives, which their instruction's ``Collective`` prices."""


def no_backward(call: OpCall) -> tuple[OpCost, ...]:
    """Backward of ops that have none, or one made of views only."""
    return ()


def saves_nothing(call: OpCall) -> tuple[str, ...]:
    return ()


def saving(*names: str) -> Callable[[OpCall], tuple[str, ...]]:
    """The named tensors, as far as the call has them and its first output has a gradient."""

    def saves(call: OpCall) -> tuple[str, ...]:
        if not call.outputs[0].has_gradient:
            return ()
        present = {f"in{i}" for i in range(len(call.inputs))} | {f"out{i}" for i in range(len(call.outputs))}
        return tuple(name for name in names if name in present)

    return saves


def register_priced(names: str, price: Callable[[OpCall], OpCost | None]) -> None:
    """Entries of ops that are never planned: what traced backward graphs and optimizers are made of."""
    for name in names.split():
        register(Op(name, backward_only, price, no_backward, saves_nothing))


def dims_of(call: OpCall, name: str, rank: int) -> tuple[int, ...]:
    """The argument's dims made non-negative; all dims where it is None or empty."""
    value = call.args.get(name)
    listed = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else ()
    return tuple(dim % rank for dim in listed if rank) or tuple(range(rank))


def price_of(call: OpCall) -> OpCost | None:
    """Work of a call; ops without an entry are priced by the bytes they move, never zero."""
    entry = entry_of(call.op)
    if entry is not None:
        cost = entry.price(call)
        return cost if cost is None or cost.op else replace(cost, op=call.op)
    dtype = next((m.dtype for m in (*call.outputs, *call.inputs)), "float32")
    return OpCost(kind="other", flops=0.0, nbytes=float(bytes_moved(call)), dtype=dtype)
