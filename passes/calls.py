"""fx nodes as the op table sees them: names, metas and arguments by schema name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from cost_model.ops import OpCall, Ref
from cost_model.tensor import TensorMeta
from passes.graph import Meta, op_name


def schema_arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument by its schema name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload), node.target
    arguments, given, named = {}, node.args, node.kwargs
    for position, (name, by_position, default) in enumerate(_parameters(node.target)):
        if by_position and position < len(given):
            arguments[name] = given[position]
        else:
            arguments[name] = named.get(name, default)
    return arguments


@functools.cache
def _parameters(op: torch._ops.OpOverload) -> tuple[tuple[str, bool, Any], ...]:
    """Of each parameter of an op: its name, whether it may be given by its position, its default."""
    return tuple(
        (a.name, not a.kwarg_only, a.default_value if a.has_default_value() else None) for a in op._schema.arguments
    )


def tensor_args(node: fx.Node) -> list[fx.Node]:
    """Tensor operands in schema order, lists flattened; one entry per use."""
    found: list[fx.Node] = []
    values = schema_arguments(node).values() if isinstance(node.target, torch._ops.OpOverload) else node.args
    for value in values:
        fx.map_arg(value, found.append)
    return found


def call_of(node: fx.Node, metas: Mapping[str, Meta]) -> OpCall:
    """The node as an ``OpCall``; without a meta it makes nothing."""
    inputs: list[TensorMeta] = []

    def refer(operand: fx.Node) -> Ref:
        meta = metas[operand.name]
        assert isinstance(meta, TensorMeta), operand
        inputs.append(meta)
        return Ref(len(inputs) - 1)

    arguments = {name: _map(value, refer) for name, value in schema_arguments(node).items()}
    out = metas.get(node.name, ())
    outputs = (out,) if isinstance(out, TensorMeta) else tuple(m for m in out if m is not None)
    return OpCall(op=op_name(node), inputs=tuple(inputs), outputs=outputs, args=arguments)


def _map(value: Any, refer: Any) -> object:
    if isinstance(value, fx.Node):
        return refer(value)
    if isinstance(value, list | tuple):
        return [_map(item, refer) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value


class Plain(str):
    """Prints without quotes inside containers."""

    def __repr__(self) -> str:
        return str(self)
