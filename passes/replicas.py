"""Sums that replicas exchange: a loss that is no sum over samples, but made of such sums, on any number of them.

Where a call is not linear in a sum over the batch (a product of two means, a square of one), that sum is made whole
first: one all_reduce over the replicas forward, one of its gradient backward. What follows from it is the same on
every replica, and its gradients add up because each replica enters with its share.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function

from passes.batch import REPLICA_SHARE, REPLICA_SUM, BatchAnalysis, analyse_batch
from passes.graph import ModelGraph
from passes.layer_vocabulary import DIFFERENTIABLE
from passes.rewriter import GraphBuilder
from passes.trace import Traced
from passes.vocabulary import all_reduce, define, like


@define("replica_sum(Tensor x, int replicas) -> Tensor")
def replica_sum(x: Tensor, replicas: int) -> Tensor:
    """The sum of what all replicas hold."""
    return like(x)


@define("replica_share(Tensor x, int replicas) -> Tensor")
def replica_share(x: Tensor, replicas: int) -> Tensor:
    """This replica's part of what all of them hold alike."""
    return like(x)


class _Sum(Function):
    """Partial -> Varying."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, replicas: int) -> Any:
        ctx.alone = replicas == 1
        return x.view_as(x) if ctx.alone else all_reduce(x, "dp", "sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] if ctx.alone else all_reduce(grads[0], "dp", "sum"), None


def _sum(x: Tensor, replicas: int) -> Tensor:
    return _Sum.apply(x, replicas)  # type: ignore[no-any-return,no-untyped-call]


def _share(x: Tensor, replicas: int) -> Tensor:
    return x * (1.0 / replicas)


DIFFERENTIABLE[torch.ops.autopar.replica_sum.default] = _sum
DIFFERENTIABLE[torch.ops.autopar.replica_share.default] = _share


def exchange_sums(traced: Traced) -> Traced:
    """The model with the sums that replicas exchange, where its batch splits with them and only so."""
    analysis = analyse_batch(traced.global_graph, traced.other, exchange=True)
    if analysis.reason is not None or not (analysis.summed or analysis.shares_loss) or traced.other is None:
        return traced
    return replace(
        traced, global_graph=_with_sums(traced.global_graph, analysis), other=_with_sums(traced.other, analysis)
    )


def _with_sums(model: ModelGraph, analysis: BatchAnalysis) -> ModelGraph:
    built, mapped, sums = GraphBuilder(), dict[fx.Node, Any](), dict[str, fx.Node]()
    for node in model.graph.nodes:
        if node.op == "placeholder":
            mapped[node] = built.placeholder(node.name, model.metas[node.name])
        elif node.op == "call_function":
            wanted = [o for o in node.all_input_nodes if (node.name, o.name) in analysis.summed]
            for operand in wanted:
                if operand.name not in sums:
                    sums[operand.name] = _call(built, REPLICA_SUM, mapped[operand], node)
            mapped[node] = built.copy(node, {**mapped, **{o: sums[o.name] for o in wanted}}, model.metas[node.name])
    by_name = {n.name: n for n in model.graph.nodes}
    outs = [mapped[by_name[name]] for name in model.outputs]
    if analysis.shares_loss:
        outs[0] = _call(built, REPLICA_SHARE, outs[0], by_name[model.outputs[0]])
    built.graph.output(tuple(outs))
    return replace(model, graph=built.graph, metas=built.metas, outputs=tuple(n.name for n in outs))


def _call(built: GraphBuilder, target: str, operand: fx.Node, like: fx.Node) -> fx.Node:
    op = getattr(torch.ops.autopar, target.split(".")[1]).default
    made: fx.Node = built.call(op, (operand, 1), built.tensor(operand), like=like)
    return made
