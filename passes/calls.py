"""fx nodes as the op table sees them: names, metas and arguments by schema name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from cost_model.ops import OpCall, Ref
from cost_model.tensor import TensorMeta
from passes.graph import Meta


def schema_arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument by its schema name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload), node.target
    arguments: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            arguments[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            arguments[argument.name] = node.kwargs[argument.name]
        else:
            arguments[argument.name] = argument.default_value if argument.has_default_value() else None
    return arguments


def tensor_args(node: fx.Node) -> list[fx.Node]:
    """Tensor operands in schema order, lists flattened; one entry per use."""
    found: list[fx.Node] = []
    values = schema_arguments(node).values() if isinstance(node.target, torch._ops.OpOverload) else node.args
    for value in values:
        fx.map_arg(value, found.append)
    return found


def call_of(node: fx.Node, metas: Mapping[str, Meta]) -> OpCall:
    """The node as an ``OpCall``."""
    inputs: list[TensorMeta] = []

    def refer(operand: fx.Node) -> Ref:
        meta = metas[operand.name]
        assert isinstance(meta, TensorMeta), operand
        inputs.append(meta)
        return Ref(len(inputs) - 1)

    arguments = {name: _map(value, refer) for name, value in schema_arguments(node).items()}
    out = metas[node.name]
    outputs = (out,) if isinstance(out, TensorMeta) else tuple(m for m in out if m is not None)
    return OpCall(op=str(node.target), inputs=tuple(inputs), outputs=outputs, args=arguments)


def _map(value: Any, refer: Any) -> object:
    if isinstance(value, fx.Node):
        return refer(value)
    if isinstance(value, list | tuple):
        return [_map(item, refer) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value
