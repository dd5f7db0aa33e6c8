"""Whole numbers: buffers of integers or booleans that forward gives new values (a queue's pointer, counts of codes).

New values travel as gradients do, in floating-point numbers (``passes.written``): programs hold such buffers in
float64, which has every integer up to 2^53, and calls read them in the dtype that the model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from cost_model.tensor import TensorMeta
from passes.graph import ModelGraph, torch_dtype
from passes.rewriter import GraphBuilder

aten = torch.ops.aten
_HELD = torch.float64


def are_whole_numbers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def as_held(tensor: Tensor, changes: bool) -> Tensor:
    """What programs hold of a buffer."""
    return tensor.to(_HELD) if changes and are_whole_numbers(tensor) else tensor


def hold_as_floats(graph: fx.Graph, written: Mapping[fx.Node, int]) -> None:
    """Restate a functional graph in place; written: buffer -> the number of the output that is its new value."""
    output = graph.output_node()
    for buffer, place in written.items():
        value = buffer.meta["val"]
        if are_whole_numbers(value):
            buffer.meta["val"] = value.to(_HELD)
            _read_as(graph, buffer, value)
            outputs: list[Any] = list(output.args[0])  # type: ignore[arg-type]
            with graph.inserting_before(output):
                outputs[place] = graph.call_function(aten._to_copy.default, (outputs[place],), {"dtype": _HELD})
            outputs[place].meta["val"] = buffer.meta["val"]
            output.args = (tuple(outputs),)


def _read_as(graph: fx.Graph, buffer: fx.Node, value: Tensor) -> None:
    """Cast where it is read: a value that is made before would be one more to send where the model is cut."""
    for user in list(buffer.users):
        with graph.inserting_before(user):
            read = graph.call_function(aten._to_copy.default, (buffer,), {"dtype": value.dtype})
        read.meta["val"] = value
        user.replace_input_with(buffer, read)


def reading_held(model: ModelGraph, held: Mapping[str, TensorMeta]) -> ModelGraph:
    """The graph of another mode, which reads buffers as the program of training holds them."""
    built = GraphBuilder()
    built.graph, built.metas = model.graph, dict(model.metas)
    nodes = {node.name: node for node in model.graph.find_nodes(op="placeholder")}
    for item in model.inputs:
        meta, other = model.metas[item.node], held.get(item.target)
        if item.kind == "buffer" and other is not None and isinstance(meta, TensorMeta) and meta.dtype != other.dtype:
            buffer = nodes[item.node]
            with model.graph.inserting_before(next(n for n in model.graph.nodes if n.op != "placeholder")):
                read = built.call(aten._to_copy.default, (buffer,), meta, dtype=torch_dtype(meta.dtype))
            buffer.replace_all_uses_with(read, lambda user, read=read: user is not read)
            built.metas[item.node] = replace(meta, dtype=other.dtype)
    return replace(model, metas=built.metas)
