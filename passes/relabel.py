"""Relabel: the code of a stage as that of another that is the same but for names.

Stages of many equal blocks are made from a few of them (``passes.shorten``), so stages of different lengths, or of
other places in the chain, are made from the same few but for the names of parameters and the numbers of segments. The
result is for prices: calls, and the activation received, keep the names they have in the stage that was made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from cost_model.program import Block, Instruction, Value
from passes.calls import Plain
from passes.graph import GraphInput, ModelGraph
from passes.pieces import AMBIENT, segment_of, segments_of
from passes.stage import StageCode

OWN = frozenset({"parameter", "buffer", "constant"})
"""Inputs that stages have each for themselves; the batch and what is computed once a step are the same for all."""


@dataclass(frozen=True)
class Made:
    """Stages that were made, and their codes, by what they are but for names."""

    known: dict[Hashable, tuple[ModelGraph, StageCode]] = field(default_factory=dict)

    def once(self, key: Hashable, model: ModelGraph, build: Callable[[ModelGraph], StageCode]) -> StageCode:
        """The code of a stage, made where none of the same key was before."""
        known = self.known.get(key)
        code = None if known is None else relabelled(known[1], known[0], model)
        if code is None:
            code = build(model)
            self.known[key] = model, code
        return code


def outline(
    model: ModelGraph, choices: Mapping[str, str], levels: Mapping[int, str], shared: Collection[str]
) -> tuple[str, ...]:
    """Equal for stages that become the same code but for names. choices, levels: as in ``build_stage``; shared:
    parameters, by node, that other stages hold too, which count by name."""
    made = defaultdict[str, list[str]](list)
    for key, label in sorted(choices.items()):
        kind, _, name = key.partition(":")
        made[name].append(f"{kind}={label}")
    places = {n.name: place for place, n in enumerate(model.graph.nodes)}
    numbers = {AMBIENT: AMBIENT, **{number: place for place, number in enumerate(segments_of(model))}}
    lines = [f"{model.batch} {[places[name] for name in model.outputs]}"]
    lines += [f"{place} {levels.get(number)}" for number, place in numbers.items()]
    for item in model.inputs:
        known = f"{_unnamed(item, shared)} {item.node in shared}"
        lines.append(f"{known} {model.metas[item.node]} {made.get(item.node)}")
    for node in model.nodes():
        args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: Plain(f"%{places[n.name]}"))
        where = f"{numbers[segment_of(node)]} {node.meta.get('carried')}"
        lines.append(f"{node.target}{args} {where} {model.metas[node.name]} {made.get(node.name)}")
    return tuple(lines)


def _unnamed(item: GraphInput, shared: Collection[str]) -> GraphInput:
    """An input as it is known beside its place: without its names, where these are its stage's own."""
    own = item.kind == "activation" or (item.kind in OWN and item.node not in shared)
    return replace(item, node="", target="") if own else item


def relabelled(code: StageCode, before: ModelGraph, after: ModelGraph) -> StageCode | None:
    """The code of one stage under the names of another of equal outline; None where a name of the other is one
    that the code has for something else."""
    return _Relabel(code, before, after).run()


class _Relabel:
    def __init__(self, code: StageCode, before: ModelGraph, after: ModelGraph) -> None:
        self.code = code
        pairs = [(a, b) for a, b in zip(before.inputs, after.inputs, strict=True) if a.kind != "activation"]
        self.inputs = {a.node: b for a, b in pairs}
        self.pairs = {(a.node, b.node) for a, b in pairs} | {(a.target, b.target) for a, b in pairs}
        self.names = dict(self.pairs)
        self.segments = dict(zip(segments_of(before), segments_of(after), strict=True))

    def run(self) -> StageCode | None:
        code, new = self.code, set(self.names.values())
        if len({len(self.pairs), len(self.names), len(new)}) > 1 or new & (set(_names(code)) - self.names.keys()):
            return None
        if all(a == b for a, b in self.pairs) and all(a == b for a, b in self.segments.items()):
            return code
        forward, backward, *weight = map(self._block, code.blocks)
        return replace(
            code,
            ops={},
            functions="",
            forward=forward,
            backward=backward,
            weight=weight[0] if weight else None,
            saved=self._all(code.saved),
            kept=self._all(code.kept),
            inputs=tuple(self.inputs.get(i.node, i) for i in code.inputs),
            placements={self._name(name): place for name, place in code.placements.items()},
            metas={self._name(name): meta for name, meta in code.metas.items()},
            constants=tuple(map(self._value, code.constants)),
            gradients=self._all(code.gradients),
            updates=self._all(code.updates),
            buckets=tuple(
                replace(bucket, parameters=tuple((self._name(name), numel) for name, numel in bucket.parameters))
                for bucket in code.buckets
            ),
            groups=tuple((group, self._all(names)) for group, names in code.groups),
        )

    def _block(self, block: Block) -> Block:
        return replace(
            block,
            inputs=tuple(map(self._value, block.inputs)),
            instructions=tuple(map(self._instruction, block.instructions)),
            outputs=self._all(block.outputs),
        )

    def _instruction(self, line: Instruction) -> Instruction:
        return replace(
            line,
            inputs=self._all(line.inputs),
            outputs=tuple(map(self._value, line.outputs)),
            frees=self._all(line.frees),
            segment=self.segments.get(line.segment, line.segment),
            awaits=None if line.awaits is None else self._name(line.awaits),
        )

    def _value(self, value: Value) -> Value:
        name, storage = self._name(value.name), self._name(value.storage)
        same = name == value.name and storage == value.storage
        return value if same else replace(value, name=name, storage=storage)

    def _all(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(self._name, names))

    def _name(self, name: str) -> str:
        return self.names.get(name, name)


def _names(code: StageCode) -> Iterator[str]:
    """Of everything that the code's blocks hold."""
    yield from code.placements
    for block in code.blocks:
        for value in (*block.inputs, *(v for line in block.instructions for v in line.outputs)):
            yield value.name
            yield value.storage
