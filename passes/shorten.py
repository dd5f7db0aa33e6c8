"""Shorten: a stage of many equal blocks as one of a few, whose code ``passes.lengthen`` makes that of the whole stage.

A block is one segment, or several neighbours that come again and again. Blocks are equal where their calls are, their
choices too, each reading the same values from outside (of those that are carried past it, too), from the block before,
or from tensors of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.calls import Plain
from passes.graph import ModelGraph, copied_node, drop_dead_calls
from passes.pieces import AMBIENT, is_chain, segment_of, segments_of
from passes.rewriter import GraphBuilder

aten = torch.ops.aten

BEFORE, AFTER = 3, 2
"""Blocks that stay before and after those left out: passes look no farther than to the next block, so that the three
in the middle are what any block between others becomes."""
WORTH = 1
"""Blocks left out below which stages are made whole: to lengthen one takes as long as to make a block, but short stages
are made once for all that are alike but for their length."""


@dataclass(frozen=True)
class Run:
    """Equal blocks: ``count`` of ``period`` segments each, from segment ``first`` on.

    own: block -> the inputs that it alone reads, as nodes, in the order of first use.
    """

    first: int
    period: int
    count: int
    own: tuple[tuple[str, ...], ...]

    @property
    def left_out(self) -> int:
        """How many blocks."""
        return self.count - BEFORE - AFTER

    def block(self, segment: int) -> int | None:
        """The block of a segment."""
        block = (segment - self.first) // self.period
        return block if 0 <= block < self.count else None

    def is_left_out(self, segment: int) -> bool:
        """Whether a segment's block is."""
        block = self.block(segment)
        return block is not None and BEFORE <= block < self.count - AFTER


def repeated(model: ModelGraph, choices: Mapping[str, str], levels: Mapping[int, str]) -> tuple[Run, ...]:
    """Runs of equal blocks of a stage that are worth shortening. levels: segment -> how much of it is recomputed."""
    numbers = segments_of(model)
    if len(numbers) < BEFORE + AFTER + WORTH or not is_chain(model):
        return ()
    texts = _Texts(model, choices)
    lines = [(levels.get(number), *texts.of(number)) for number in numbers]
    found, at = [], 0
    while at < len(lines):
        period, count = _longest(lines, at)
        if count:
            starts = range(at, at + period * count, period)
            own = (tuple(n for i in range(s, s + period) for n in texts.own[numbers[i]]) for s in starts)
            found.append(Run(numbers[at], period, count, tuple(own)))
        at += max(1, period * count)
    return tuple(found)


def _longest(lines: Sequence[Hashable], at: int) -> tuple[int, int]:
    """(period, count) of the blocks from ``at`` on of which most segments are left out; count 0: not worth it."""
    best, most = (1, 0), 0
    for period in range(1, (len(lines) - at) // (BEFORE + AFTER + WORTH) + 1):
        end = at + period
        while end < len(lines) and lines[end] == lines[end - period]:
            end += 1
        count = (end - at) // period
        left_out = (count - BEFORE - AFTER) * period
        if count >= BEFORE + AFTER + WORTH and left_out > most:
            best, most = (period, count), left_out
    return best


class _Texts:
    """Says what the calls of each segment are, names aside; ``own``: inputs that a segment alone reads."""

    def __init__(self, model: ModelGraph, choices: Mapping[str, str]) -> None:
        self.model = model
        self.choices = defaultdict[str, list[str]](list)
        for key, label in sorted(choices.items()):
            kind, _, name = key.partition(":")
            self.choices[name].append(f"{kind}={label}")
        self.inputs = {i.node: i for i in model.inputs}
        self.reader = _readers(model)
        self.calls = defaultdict[int, list[fx.Node]](list)
        self.own: dict[int, list[str]] = defaultdict(list)
        self.places: dict[fx.Node, tuple[int, int]] = {}
        for node in model.nodes():
            number = segment_of(node)
            if number != AMBIENT:
                self.places[node] = number, len(self.calls[number])
                self.calls[number].append(node)

    def of(self, number: int) -> tuple[str, ...]:
        return tuple(self._line(node, number) for node in self.calls[number])

    def _line(self, node: fx.Node, number: int) -> str:
        given = node.args[:2] if node.target is aten.select.int else node.args  # which of equal rows it is
        args = fx.map_arg((given, dict(node.kwargs)), lambda n: Plain(self._operand(n, number)))
        return f"{node.target}{args} {self._facts(node)} {node.meta.get('carried')}"

    def _facts(self, node: fx.Node) -> str:
        return f"{self.model.metas[node.name]} {self.choices.get(node.name)}"

    def _is_received(self, node: fx.Node) -> bool:
        """Received values travel in one message, as long as all of them."""
        return node.op == "placeholder" and self.inputs[node.name].kind == "activation"

    def _operand(self, node: fx.Node, number: int) -> str:
        if node in self.places:
            segment, place = self.places[node]
            return f"%{number - segment}.{place}" if not node.meta.get("carried") else f"%{node.name}"
        if self.reader.get(node) != number or self._is_received(node):
            return f"%{node.name}"
        if node.op != "placeholder":
            return f"({self._line(node, number)})"
        item, own = self.inputs[node.name], self.own[number]
        if node.name not in own:
            own.append(node.name)
        known = (item.kind, item.trainable, item.batched, item.changes, item.counts)
        return f"own{own.index(node.name)} {known} {self._facts(node)}"


def _readers(model: ModelGraph) -> dict[fx.Node, int]:
    """Inputs and ambient calls that one segment alone uses -> the segment."""
    found: dict[fx.Node, int] = {}
    for node in reversed(model.graph.nodes):
        if node.op == "output" or (node.op == "call_function" and segment_of(node) != AMBIENT):
            continue
        segments = {segment_of(u) if segment_of(u) != AMBIENT else found.get(u, AMBIENT) for u in node.users}
        if len(segments) == 1 and AMBIENT not in segments:
            found[node] = segments.pop()
    return found


def shortened(model: ModelGraph, runs: Sequence[Run]) -> ModelGraph | None:
    """The stage without the blocks left out; None where others read more of these than the last one's results.

    Segments keep their numbers.
    """
    return _Shorter(model, runs).run()


class _Shorter:
    def __init__(self, model: ModelGraph, runs: Sequence[Run]) -> None:
        self.model, self.runs = model, runs
        self.calls = defaultdict[int, list[fx.Node]](list)
        for node in model.nodes():
            self.calls[segment_of(node)].append(node)
        self.built, self.mapped = GraphBuilder(), dict[fx.Node | None, Any]()

    def run(self) -> ModelGraph | None:
        model, built = self.model, self.built
        kept = [n for n in model.nodes() if not any(run.is_left_out(segment_of(n)) for run in self.runs)]
        used = {self._source(o) for n in kept for o in n.all_input_nodes}
        names = {n.name: n for n in model.graph.nodes}
        ends = [self._source(names[name]) for name in model.outputs]
        if None in used or None in ends:
            return None
        own = {name for run in self.runs for block in run.own[BEFORE : run.count - AFTER] for name in block}
        inputs = [i for i in model.inputs if i.node not in own]
        for item in inputs:
            self.mapped[names[item.node]] = built.placeholder(item.node, model.metas[item.node])
        for node in kept:
            operands = {o: self._source(o) for o in node.all_input_nodes}
            if all(source in self.mapped for source in operands.values()):
                made = copied_node(built.graph, node, {o: self.mapped[source] for o, source in operands.items()})
                built.metas[made.name] = model.metas[node.name]
                self.mapped[node] = made
        outputs = tuple(self.mapped[end] for end in ends if end is not None)
        built.graph.output(outputs)
        drop_dead_calls(built.graph)
        return ModelGraph(built.graph, built.metas, tuple(inputs), tuple(n.name for n in outputs), model.batch)

    def _source(self, node: fx.Node) -> fx.Node | None:
        """What stands for a node: of the last block left out, its twin in the last one before these; None for others
        that are left out."""
        for run in self.runs:
            segment = segment_of(node) if node.op == "call_function" else AMBIENT
            if run.is_left_out(segment):
                if run.block(segment) != run.count - AFTER - 1 or node.meta.get("carried"):
                    return None
                twin = segment - run.left_out * run.period
                return self.calls[twin][self.calls[segment].index(node)]
        return node
