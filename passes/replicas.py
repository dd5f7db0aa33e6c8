"""What replicas exchange where a loss is no sum over samples.

Where a call is not linear in a sum over the batch (a product of two means, a square of one), that sum is made whole
first: one all_reduce over the replicas forward, one of its gradient backward. Where a call mixes samples (all against
all, a softmax over them), its operands are gathered, in the order in which one device sees the samples; gradients are
scattered back. What follows is the same on every replica, and its gradients add up because each enters with its share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function

from passes.batch import (
    BATCH_NORM,
    REPLICA_GATHER,
    REPLICA_SHARE,
    REPLICA_SUM,
    WRITTEN,
    BatchAnalysis,
    analyse_batch,
    is_view,
)
from passes.graph import ModelGraph, drop_dead_calls, op_name
from passes.layer_vocabulary import DIFFERENTIABLE
from passes.rewriter import GraphBuilder
from passes.trace import Traced
from passes.vocabulary import all_reduce, define, gather, like


@define("replica_sum(Tensor x, int replicas) -> Tensor")
def replica_sum(x: Tensor, replicas: int) -> Tensor:
    """The sum of what all replicas hold."""
    return like(x)


@define("replica_share(Tensor x, int replicas) -> Tensor")
def replica_share(x: Tensor, replicas: int) -> Tensor:
    """This replica's part of what all of them hold alike."""
    return like(x)


@define("replica_gather(Tensor x, int dim, int outer, int replicas) -> Tensor")
def replica_gather(x: Tensor, dim: int, outer: int, replicas: int) -> Tensor:
    """The samples of all replicas, which lie along ``dim`` as outer x batch x inner."""
    return x.new_empty([extent * replicas if d == dim else extent for d, extent in enumerate(x.shape)])


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


def _gather(x: Tensor, dim: int, outer: int, replicas: int) -> Tensor:
    """Shard -> Varying."""
    return x.view_as(x) if replicas == 1 else gather(x, "dp", replicas, dim, outer, True)


DIFFERENTIABLE[torch.ops.autopar.replica_sum.default] = _sum
DIFFERENTIABLE[torch.ops.autopar.replica_share.default] = _share
DIFFERENTIABLE[torch.ops.autopar.replica_gather.default] = _gather


def exchange_between_replicas(traced: Traced) -> tuple[Traced, BatchAnalysis]:
    """The model with what replicas exchange, where its batch splits so and only so, and how its batch splits then."""
    whole, other = traced.global_graph, traced.other
    if traced.alone is not None:
        return traced, BatchAnalysis(traced.alone)
    analysis = analyse_batch(whole, other, exchange=True)
    if analysis.reason is not None or not (analysis.summed or analysis.shares_loss or analysis.joined) or other is None:
        return traced, analysis
    made = (_Exchange(model, whole, analysis).run() for model in (whole, other))
    traced = replace(traced, global_graph=next(made), other=next(made))
    return traced, analyse_batch(traced.global_graph, traced.other)


class _Exchange:
    """A graph at either batch size with what is exchanged; calls on all samples are in both as for the global batch."""

    def __init__(self, model: ModelGraph, whole: ModelGraph, analysis: BatchAnalysis) -> None:
        self.model, self.whole, self.analysis = model, whole, analysis
        self.gathered = dict(analysis.gathered)
        self.built = GraphBuilder()
        self.own: dict[str, fx.Node] = {}
        self.sums: dict[str, fx.Node] = {}
        self.of_all: dict[str, fx.Node] = {}

    def run(self) -> ModelGraph:
        for node, twin in zip(self.model.graph.nodes, self.whole.graph.nodes, strict=True):
            if node.op == "placeholder":
                self.own[node.name] = self.built.placeholder(node.name, self.model.metas[node.name])
            elif node.op == "call_function" and node.name in self.analysis.joined:
                self.own[node.name] = self._copy_of_all(twin)
            elif node.op == "call_function":
                operands = {o: self._summed(node, o) or self.own[o.name] for o in node.all_input_nodes}
                self.own[node.name] = self.built.copy(node, operands, self.model.metas[node.name])
        outs = [self.own[name] for name in self.model.outputs]
        if self.analysis.shares_loss:
            outs[0] = self._call(REPLICA_SHARE, outs[0], (1,), outs[0])
        self.built.graph.output(tuple(outs))
        drop_dead_calls(self.built.graph)
        return replace(self.model, graph=self.built.graph, metas=self.built.metas, outputs=tuple(n.name for n in outs))

    def _summed(self, user: fx.Node, operand: fx.Node) -> fx.Node | None:
        if (user.name, operand.name) not in self.analysis.summed:
            return None
        if operand.name not in self.sums:
            self.sums[operand.name] = self._call(REPLICA_SUM, self.own[operand.name], (1,), user)
        return self.sums[operand.name]

    def _copy_of_all(self, node: fx.Node) -> fx.Node:
        """node: of the graph of the global batch."""
        operands = {o: self._summed(node, o) or self._of_all(o) for o in node.all_input_nodes}
        return self.built.copy(node, operands, self.whole.metas[node.name])

    def _of_all(self, node: fx.Node) -> fx.Node:
        """A value of the graph of the global batch, made of all samples where it depends on them."""
        name = node.name
        if name in self.of_all:
            return self.of_all[name]
        if name in self.gathered:
            place = self.gathered[name]
            made = self._call(REPLICA_GATHER, self.own[name], (place.dim, place.outer, 1), node)
        elif name not in self.analysis.again:
            made = self.own[name]
        elif node.op == "placeholder":
            made = self.built.call(torch.ops.aten.clone.default, (self.own[name],), self.whole.metas[name], like=node)
        else:
            made = self._copy_of_all(node)
        self.of_all[name] = made
        return made

    def _call(self, target: str, operand: fx.Node, rest: tuple[int, ...], like: fx.Node) -> fx.Node:
        op = getattr(torch.ops.autopar, target.split(".")[1]).default
        # what is made of all samples takes names too, so that the operand may have another than it had
        meta = self.whole.metas[like.name] if target == REPLICA_GATHER else self.built.metas[operand.name]
        made: fx.Node = self.built.call(op, (operand, *rest), meta, like=like)
        return made


def _first_use(value: fx.Node, model: ModelGraph) -> fx.Node:
    """The first call that reads a value, its views apart."""
    user = next(iter(value.users))
    return _first_use(user, model) if is_view(user, model) else user


def exchange_notes(model: ModelGraph, synchronised: Collection[str]) -> Iterator[str]:
    """What the replicas of a model exchange, in words. synchronised: ``BatchAnalysis.synchronised``."""
    calls = [n for n in model.nodes() if n.name in synchronised]
    counts, gathers = Counter(op_name(n) for n in calls), [n for n in calls if op_name(n) == REPLICA_GATHER]
    if counts[BATCH_NORM]:
        yield (
            f"the statistics of {counts[BATCH_NORM]} batch norm(s) are those of the global batch, as on one device: "
            "replicas exchange them (an all_gather forward, an all_reduce backward), and each replica has one "
            "microbatch"
        )
    if counts[REPLICA_SUM]:
        yield (
            f"the loss is no sum over samples: replicas exchange {counts[REPLICA_SUM]} sum(s) that it is made of (an "
            "all_reduce forward, another backward), and each replica has one microbatch"
        )
    if counts[WRITTEN]:
        yield (
            f"forward gives {counts[WRITTEN]} buffer(s) or parameter(s) a new value, as on one device: of all samples, "
            "or of parameters alone, and each replica has one microbatch"
        )
    if gathers:
        yield (
            f"samples meet each other, first in {_first_use(gathers[0], model).target}: replicas gather "
            f"{len(gathers)} value(s) of all samples (an all_gather forward, a reduce_scatter backward), each computes "
            "what follows for all of them, and each has one microbatch"
        )
