"""The nouns of the forward graph: an fx graph of ATen calls whose one output is the scalar loss."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from cost_model.errors import VerificationError
from cost_model.tensor import TensorMeta

Meta = TensorMeta | tuple[TensorMeta | None, ...]
RESERVED = frozenset(
    """torch params buffers constants batch step received saved grads accumulate comm kernels device run
    setup prologue forward backward""".split()
)
"""Names that generated functions use for themselves; no value may have one."""


@dataclass(frozen=True)
class GraphInput:
    """A placeholder.

    kind: "parameter", "buffer", "constant", "batch" (a tensor of the user's batch), "step" (computed once per step
    from the global batch), "scale" (of the loss) or "activation" (received from the stage before).
    target: the model's own name for parameters and buffers; the leaf's path for batch inputs.
    batched: dim 0 is the batch.
    changes: a buffer that a step gives a new value, which takes the place of a gradient (see ``batch_norm``).
    counts: a buffer that every step adds a number to.
    """

    node: str
    kind: str
    target: str
    trainable: bool
    batched: bool
    changes: bool = False
    counts: bool = False

    @property
    def is_held(self) -> bool:
        """Whether it is of the model; inputs of the batch may have the same names."""
        return self.kind in ("parameter", "buffer", "constant")

    @property
    def has_gradient(self) -> bool:
        """Whether backward gives it one, or a new value in place of one."""
        return self.trainable or self.changes or self.kind == "activation"


@dataclass(frozen=True)
class ModelGraph:
    """Invariants: every call_function node has a meta; the output node has exactly the ``outputs`` given.

    batch: samples this graph's shapes stand for; outputs: node names.
    """

    graph: fx.Graph
    metas: Mapping[str, Meta] = field(hash=False)
    inputs: tuple[GraphInput, ...]
    outputs: tuple[str, ...]
    batch: int

    def __post_init__(self) -> None:
        names = [n.name for n in self.graph.nodes if n.op == "placeholder"]
        if names != [i.node for i in self.inputs]:
            raise VerificationError("inputs", f"placeholders {names} but inputs {[i.node for i in self.inputs]}")

    def nodes(self) -> list[fx.Node]:
        """Calls in execution order."""
        return [n for n in self.graph.nodes if n.op == "call_function"]

    def tensor(self, name: str) -> TensorMeta:
        meta = self.metas[name]
        assert isinstance(meta, TensorMeta), name
        return meta

    def with_inputs(self, inputs: Iterable[GraphInput]) -> ModelGraph:
        return replace(self, inputs=tuple(inputs))


def meta_of(value: Any) -> Meta | None:
    """TensorMeta of a (fake) tensor, a tuple of them for tuple outputs, None for anything else."""
    if isinstance(value, torch.Tensor):
        return TensorMeta(tuple(map(int, value.shape)), _dtype_name(value.dtype))
    if isinstance(value, tuple | list):
        return tuple(m if isinstance(m := meta_of(v), TensorMeta) else None for v in value)
    return None


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def op_name(node: fx.Node) -> str:
    """What a node calls, by the name that the op table knows it by."""
    return _op_name(node.target) if isinstance(node.target, OpOverload) else str(node.target)


@functools.cache
def _op_name(op: OpOverload) -> str:
    return str(op)


def is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def copied_node(graph: fx.Graph, node: fx.Node, mapped: Mapping[fx.Node, Any], name: str | None = None) -> fx.Node:
    """Append a copy of a node, meta and all, with operands replaced through ``mapped``, keeping its name, or taking the
    one given, where it is free.

    ``Graph.node_copy`` looks through all arguments of a call for symbolic numbers, which no graph here holds, and takes
    twice as long for it; a call that is given its arguments afterwards is not looked through.
    """
    made = graph.create_node(node.op, node.target, name=name or node.name, type_expr=node.type)
    made.args = fx.map_arg(node.args, mapped.__getitem__)
    if node.kwargs:
        made.kwargs = fx.map_arg(node.kwargs, mapped.__getitem__)
    made.meta.update(node.meta)
    return made


def drop_dead_calls(graph: fx.Graph) -> None:
    """Erase calls whose results nothing uses, but for those that do more than make them.

    ``Graph.eliminate_dead_code`` checks the whole graph first and asks of every call what it may do, used or not.
    """
    for node in reversed(graph.nodes):
        if not node.users and not node.is_impure():
            graph.erase_node(node)


def source_of(node: fx.Node) -> str:
    """The user's line that made a node, from the trace."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
    return " ".join(lines[-2:]) or "no source line"
