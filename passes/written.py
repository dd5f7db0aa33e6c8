"""Buffers that forward gives new values (power iterations, moving averages, queues of keys), as on one device.

A new value leaves as batch norm's statistics do: in place of a gradient of the buffer. The call that carries it passes
on a value of the model as it is, one that receives a gradient, behind what the new value is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function

from cost_model.tensor import TensorMeta
from passes.dependence import differentiable_nodes, receiving_nodes
from passes.graph import ModelGraph, drop_dead_calls
from passes.layer_vocabulary import DIFFERENTIABLE
from passes.rewriter import GraphBuilder
from passes.vocabulary import define, like


@define("written(Tensor x, Tensor buffer, Tensor value, int replicas) -> Tensor")
def written(x: Tensor, buffer: Tensor, value: Tensor, replicas: int) -> Tensor:
    """x; with its gradient ``buffer`` gets ``value``."""
    return like(x)


class _Written(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: Tensor, value: Tensor, replicas: int) -> Any:
        ctx.save_for_backward(value)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (value,) = ctx.saved_tensors
        return grads[0], value, None, None


DIFFERENTIABLE[torch.ops.autopar.written.default] = _Written.apply
_LEFT = " as forward leaves it"


def left(parameter: str) -> str:
    """The name of what stands for a parameter's new value, which nothing reads, but the parameter itself afterwards."""
    return parameter + _LEFT


def parameter_left(name: str) -> str | None:
    """The parameter whose new value has this name."""
    return name.removesuffix(_LEFT) if name.endswith(_LEFT) else None


def write_buffers(model: ModelGraph, values: Mapping[fx.Node, fx.Node]) -> ModelGraph:
    """The graph with calls that give buffers their new values; whoever else reads one sends no gradient."""
    carrying = differentiable_nodes(model) & receiving_nodes(model)
    built = GraphBuilder()
    built.graph, built.metas = model.graph, dict(model.metas)
    loss = next(n for n in model.graph.nodes if n.name == model.outputs[0])
    parameters = {i.node for i in model.inputs if parameter_left(i.target)}
    for buffer, made in values.items():
        if buffer.name in parameters:  # written at the end of forward: as early as it is known, for cuts to lie behind
            made = _undetached(made)
        for user in [user for user in buffer.users if user.op == "call_function"]:
            user.replace_input_with(buffer, _detached(built, buffer, user.prev))
        value = _detached(built, made, made)
        order = list(model.graph.nodes)
        behind = (n for n in order[order.index(value) + 1 :] if n.name in carrying and _is_tensor(model, n))
        carrier = next(behind, loss)
        with model.graph.inserting_after(max(carrier, value, key=order.index)):
            args = (carrier, buffer, value, 1)
            passed: fx.Node = built.call(written, args, built.tensor(carrier), like=carrier)
        carrier.replace_all_uses_with(passed, lambda user, passed=passed: user is not passed)
        loss = passed if carrier is loss else loss
    next(n for n in model.graph.nodes if n.op == "output").args = ((loss,),)
    drop_dead_calls(model.graph)
    return replace(model, metas=built.metas, outputs=(loss.name,))


def _is_tensor(model: ModelGraph, node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(model.metas[node.name], TensorMeta)


def _undetached(made: fx.Node) -> fx.Node:
    """What a value is detached from."""
    while made.target is torch.ops.aten.detach.default:
        made = made.all_input_nodes[0]
    return made


def _detached(built: GraphBuilder, source: fx.Node, place: fx.Node) -> fx.Node:
    """A value without its gradient, made right behind a place."""
    with built.graph.inserting_after(place):
        made: fx.Node = built.call(torch.ops.aten.detach.default, (source,), built.tensor(source))
    return made
