"""Alike: which parts of a plan's chain are the same program but for names, so that one of them prices all.

Two parts are alike where their segments are of the same kinds in the same order, made the same choices, and read the
same ambient values, call by call; parameters that several parts hold count by name.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from cost_model.plan import Plan
from passes.batch import BatchAnalysis
from passes.calls import Plain
from passes.graph import ModelGraph
from passes.segment import Segment
from passes.trace import Traced


class Outliner:
    """Outlines of parts of plans of one model."""

    def __init__(self, traced: Traced, analysis: BatchAnalysis) -> None:
        graphs = (traced.global_graph, *(() if traced.other is None else (traced.other,)))
        self.segments, self.analysis = traced.segments, analysis
        self._views = [_View(graph) for graph in graphs]

    def outline(self, plan: Plan, index: int, shared: frozenset[str]) -> str:
        """Equal for parts that are alike in one plan; ``shared``: parameters, by node, of more than one part."""
        part = plan.stages[index]
        segments = self.segments[part.first_segment : part.last_segment]
        after = self.segments[part.last_segment].carried if part.last_segment < len(self.segments) else ()
        names = _positions(segments, after, shared)
        choices = sorted(f"{key.split(':')[0]}:{_renamed(key, names)}={label}" for key, label in part.choices.items())
        lines = [segment.kind for segment in segments]
        lines += [f"carried on {names.get(name, name)}" for name in after]
        lines += [f"recompute {part.recompute}", *choices, *self._marks(segments, names)]
        for view in self._views:
            lines += _Ambient(view, dict(names), self.analysis).lines(segments)
        return "\n".join(lines)

    def _marks(self, segments: tuple[Segment, ...], names: dict[str, str]) -> Iterator[str]:
        """What the batch does to single calls."""
        own = {name for segment in segments for name in segment.nodes}
        yield from sorted(f"scaled {names[u]} {names.get(o, o)}" for u, o in self.analysis.shared if u in own)
        yield from sorted(f"synchronised {names[name]}" for name in self.analysis.synchronised & own)


class _View:
    """A graph with its nodes and inputs by name."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.nodes = {n.name: n for n in graph.graph.nodes}
        self.inputs = {i.node: i for i in graph.inputs}


def _positions(segments: tuple[Segment, ...], after: tuple[str, ...], shared: frozenset[str]) -> dict[str, str]:
    """Name of a value -> where it stands in the part."""
    names: dict[str, str] = {}
    for number, segment in enumerate(segments):
        rows = (("n", segment.nodes), ("p", segment.parameters), ("c", segment.carried))
        for kind, row in rows:
            for place, name in enumerate(row):
                names.setdefault(name, name if name in shared else f"{number}{kind}{place}")
        if segment.entry is not None:
            names.setdefault(segment.entry, f"{number}in")
    for place, name in enumerate(after):
        names.setdefault(name, f"after{place}")
    return names


def _renamed(key: str, names: dict[str, str]) -> str:
    name = key.partition(":")[2]
    return names.get(name, name)


class _Ambient:
    """Describes what a part's calls read besides each other, each value once, in the order of first use."""

    def __init__(self, view: _View, names: dict[str, str], analysis: BatchAnalysis) -> None:
        self.view, self.names, self.analysis = view, names, analysis
        self.found: list[str] = []

    def lines(self, segments: tuple[Segment, ...]) -> list[str]:
        for segment in segments:
            for name in segment.nodes:
                node = self.view.nodes.get(name)  # None: the model does without this call at the other batch size
                read = "absent" if node is None else " ".join(map(self._name, node.all_input_nodes))
                self.found.append(f"{self.names[name]} reads {read}")
        return self.found

    def _name(self, node: fx.Node) -> str:
        if node.name not in self.names:
            text = self._text(node)
            self.names[node.name] = f"a{len(self.names)}"
            self.found.append(f"{self.names[node.name]} is {text}")
        return self.names[node.name]

    def _text(self, node: fx.Node) -> str:
        meta = self.view.graph.metas[node.name]
        if node.name in self.analysis.hoisted:
            return f"step {node.name} {meta} {node.name in self.analysis.sliced}"
        if node.op == "placeholder":
            item = self.view.inputs[node.name]
            target = item.target if item.kind == "batch" else ""
            return f"{item.kind} {target} {item.trainable} {item.batched} {item.changes} {item.counts} {meta}"
        args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: Plain(self._name(n)))
        return f"{node.target}{args} {meta}"
