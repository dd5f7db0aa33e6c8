"""Pieces: a stage's local graph cut again at its segments, so that equal segments are traced once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import fx

from cost_model.tensor import TensorMeta
from passes.graph import GraphInput, ModelGraph
from passes.rewriter import GraphBuilder

AMBIENT = -1
"""Segment number of values that depend on no parameter."""


@dataclass(frozen=True)
class Pieces:
    """ambient: what depends on no parameter, its outputs those that pieces use (None: nothing does);
    chain: one graph for each segment; what each takes from those before is an "activation", or a "value" where it has
    no gradient, and what it gives to those after is among its outputs."""

    ambient: ModelGraph | None
    chain: tuple[ModelGraph, ...]


def cut_pieces(model: ModelGraph, *, whole: bool = False) -> Pieces:
    """Cut at segments; ``whole``, or where values go back to segments before, the stage is one piece."""
    numbers, of = segments_of(model), {n: segment_of(n) for n in model.nodes()}
    if whole or not _goes_onward(model, of):
        of = {n: s if s == AMBIENT else numbers[0] for n, s in of.items()}
        numbers = numbers[:1]
    chain = tuple(_piece(model, of, s) for s in numbers)
    wanted = dict.fromkeys(i.node for piece in chain for i in piece.inputs if i.kind == "ambient")
    return Pieces(_ambient(model, of, tuple(wanted)) if wanted else None, chain)


def segment_of(node: fx.Node) -> int:
    return int(node.meta.get("segment", AMBIENT))


def segments_of(model: ModelGraph) -> list[int]:
    """The segments of a stage's calls, in order."""
    return sorted({segment_of(n) for n in model.nodes()} - {AMBIENT})


def is_chain(model: ModelGraph) -> bool:
    """Every segment takes one value from the segment right before (the first: what is received), and carried ones from
    any before; ambient values take none."""
    numbers, of = segments_of(model), {n: segment_of(n) for n in model.nodes()}
    before = dict(zip(numbers[1:], numbers, strict=False))
    crossing: dict[int, set[fx.Node]] = {}
    for node, segment in of.items():
        for operand in node.all_input_nodes:
            source = of.get(operand, AMBIENT)
            if source not in (segment, AMBIENT):
                if segment == AMBIENT or source > segment:
                    return False
                if not operand.meta.get("carried"):
                    crossing.setdefault(segment, set()).add(operand)
    return all(len(own) == 1 and of[next(iter(own))] == before[s] for s, own in crossing.items())


def _goes_onward(model: ModelGraph, of: dict[fx.Node, int]) -> bool:
    """Every segment takes tensors from segments before it alone and gives some to others; the last makes the output."""
    for node, segment in of.items():
        for operand in node.all_input_nodes:
            source = of.get(operand, AMBIENT)
            if source > segment or (source not in (segment, AMBIENT) and not _is_tensor(model, operand)):
                return False
    numbers = sorted({*of.values()} - {AMBIENT})
    gives = {s for n, s in of.items() if s != AMBIENT for u in n.users if of.get(u, s) != s}
    ends = {s for n, s in of.items() if n.name == model.outputs[0]}
    return ends == {numbers[-1]} and gives >= {*numbers[:-1]}


def _is_tensor(model: ModelGraph, node: fx.Node) -> bool:
    return isinstance(model.metas[node.name], TensorMeta)


def _piece(model: ModelGraph, of: dict[fx.Node, int], segment: int) -> ModelGraph:
    known = {i.node: i for i in model.inputs}
    built, mapped = GraphBuilder(), {}
    own = [n for n in model.nodes() if of[n] == segment]
    inputs: list[GraphInput] = []
    for operand in dict.fromkeys(o for n in own for o in n.all_input_nodes if of.get(o) != segment):
        carried = "activation" if operand.name in known or model.tensor(operand.name).has_gradient else "value"
        kind = "ambient" if of.get(operand) == AMBIENT else carried
        inputs.append(known.get(operand.name) or GraphInput(operand.name, kind, operand.name, False, False))
        mapped[operand] = built.placeholder(operand.name, model.metas[operand.name])
    for node in own:
        mapped[node] = built.copy(node, mapped, model.metas[node.name])
    exits = [n for n in own if n.name == model.outputs[0] or any(of.get(u, segment) != segment for u in n.users)]
    outputs = tuple(mapped[n] for n in exits)
    built.graph.output(outputs)
    return ModelGraph(built.graph, built.metas, tuple(inputs), tuple(n.name for n in outputs), model.batch)


def _ambient(model: ModelGraph, of: dict[fx.Node, int], wanted: tuple[str, ...]) -> ModelGraph:
    built, mapped = GraphBuilder(), {}
    inputs = [i for i in model.inputs if i.kind not in ("parameter", "activation")]
    for node in model.graph.nodes:
        if node.op == "placeholder" and any(node.name == i.node for i in inputs):
            mapped[node] = built.placeholder(node.name, model.metas[node.name])
        elif of.get(node) == AMBIENT:
            mapped[node] = built.copy(node, mapped, model.metas[node.name])
    by_name = {n.name: m for n, m in mapped.items()}
    built.graph.output(tuple(by_name[name] for name in wanted))
    return ModelGraph(built.graph, built.metas, tuple(inputs), tuple(by_name[n].name for n in wanted), model.batch)


def piece_key(piece: ModelGraph, *, last: bool) -> str:
    """Equal for pieces whose traces are equal up to names."""
    names = {i.node: f"i{k}" for k, i in enumerate(piece.inputs)}
    lines = [f"{names[i.node]} {i.kind} {i.trainable} {i.changes} {piece.metas[i.node]}" for i in piece.inputs]
    for index, node in enumerate(piece.nodes()):
        args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Plain(names[n.name]))
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__qualname__", "")
        lines.append(f"n{index} {target} {node.target} {args} {piece.metas[node.name]}")
        names[node.name] = f"n{index}"
    lines.append(f"{[names[output] for output in piece.outputs]} {last}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Plain(str):
    """Prints without quotes inside containers."""

    def __repr__(self) -> str:
        return str(self)
