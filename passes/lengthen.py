"""Lengthen: the code of a shortened stage becomes what the whole stage costs, block by block.

What passes made of the three blocks in the middle is laid side by side. Where it is the same but for names, and every
name is that of the block before moved on by one, it is what they make of any block between others, and is repeated
under new names. The result is for prices: it prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar

from cost_model.placement import Placements
from cost_model.program import Block, Instruction, Value
from cost_model.shards import Bucket
from cost_model.tensor import TensorMeta
from passes.families import MIDDLE, Families, Rename, UnlikeError
from passes.graph import GraphInput, ModelGraph
from passes.shorten import AFTER, BEFORE, Run, repeated, shortened
from passes.stage import StageCode
from passes.zero import shard_name

T = TypeVar("T")
_Facts = tuple[object, ...]


@dataclass(frozen=True)
class _Kind(Generic[T]):
    """How things of blocks are called, what becomes of one under other names so many blocks further on (None: it stays
    where it is), and what all of a family have in common."""

    name: Callable[[T], str]
    renamed: Callable[[T, Rename, int | None], T]
    facts: Callable[[T], _Facts]


Buckets = Callable[[Sequence[str], ModelGraph, Mapping[str, Placements], Mapping[str, TensorMeta]], tuple[Bucket, ...]]
"""Those of a stage: by the order in which gradients are finished, its graph, how its inputs lie and what they are."""
Build = Callable[[ModelGraph], StageCode]
"""Makes the code of a stage's cut graph."""


def priced_code(
    whole: ModelGraph, choices: Mapping[str, str], levels: Mapping[int, str], build: Build, buckets: Buckets
) -> StageCode:
    """The code of a stage's cut graph for prices, of whose equal blocks few are built; the others are left out of its
    text. choices, levels: as in ``build_stage``."""
    runs = repeated(whole, choices, levels)
    short = shortened(whole, runs) if runs else None
    if short is None:
        return build(whole)
    try:
        code = build(short)
        for place, run in enumerate(runs):
            longer = shortened(whole, runs[place + 1 :])
            if longer is None:
                raise UnlikeError
            code = _Lengthen(code, longer, run).run(buckets)
    except UnlikeError:
        return build(whole)
    return code


@dataclass(frozen=True)
class _Place:
    """Where things of the middle blocks stand one after the other: from where on, how many of each."""

    begin: int
    length: int
    ascending: bool

    @property
    def end(self) -> int:
        return self.begin + len(MIDDLE) * self.length

    def rows(self, row: Sequence[T]) -> list[tuple[T, ...]]:
        """Those of one place in the middle blocks, in the order of these."""
        parts = self.parts(row)
        return list(zip(*(parts if self.ascending else parts[::-1]), strict=True))

    def parts(self, row: Sequence[T]) -> list[Sequence[T]]:
        """As they stand."""
        return [row[start : start + self.length] for start in range(self.begin, self.end, self.length)]


class _Lengthen:
    def __init__(self, code: StageCode, whole: ModelGraph, run: Run) -> None:
        self.code, self.equal, self.left_out = code, run, run.left_out
        self.names = Families(run.left_out)
        self.whole, self.known = whole, {i.node: i for i in whole.inputs}
        self._lines = _Kind[Instruction](_maker, lambda i, rename, by: _renamed(i, rename, self._moved(i, by)), _work)
        self._inputs = _Kind[GraphInput](
            lambda i: i.node, lambda i, rename, _: self.known.get(rename(i.node), i), lambda i: (i.kind, i.trainable)
        )

    def run(self, buckets: Buckets) -> StageCode:
        code, twins = self.code, self._twins()
        if code.groups or code.kernels or not self._places(code.forward):
            raise UnlikeError
        self._give_inputs()
        gradients = self._spread(code.gradients, _NAMES)
        inputs = self._spread(code.inputs, self._inputs)
        placements = {i.node: code.placements[twins.get(i.node, i.node)] for i in inputs}
        metas = {i.node: code.metas[twins.get(i.node, i.node)] for i in inputs}
        made = buckets(gradients, self.whole, placements, metas)
        self._give_buckets(made)
        forward, backward, *weight = (self._block(block) for block in code.blocks)
        constants = self._spread(code.constants, _VALUES)
        _check_handed(forward, (backward, *weight), {v.name for v in constants})
        return replace(
            code,
            ops={},
            functions="",
            forward=forward,
            backward=backward,
            weight=weight[0] if weight else None,
            saved=self._spread(code.saved, _NAMES),
            kept=self._spread(code.kept, _NAMES),
            inputs=inputs,
            placements=placements,
            metas=metas,
            constants=constants,
            gradients=gradients,
            updates=self._spread(code.updates, _NAMES),
            buckets=made,
        )

    # --- Names that are known

    def _short(self, row: Sequence[str]) -> list[str]:
        """Of one for each block, those of blocks that were not left out."""
        return [*row[:BEFORE], *row[BEFORE + self.left_out :]]

    def _give_inputs(self) -> None:
        for nodes in zip(*self.equal.own, strict=True):
            targets = [self.known[node].target for node in nodes]
            self.names.give(nodes, self._short(nodes))
            if targets != list(nodes):
                self.names.give(targets, self._short(targets))

    def _twins(self) -> dict[str, str]:
        """Input of a block left out -> that of the last one before."""
        rows = zip(*self.equal.own, strict=True)
        return {name: row[BEFORE - 1] for row in rows for name in row[BEFORE : BEFORE + self.left_out]}

    def _give_buckets(self, made: Sequence[Bucket]) -> None:
        """Buckets that calls name are those of the whole stage with the same parameters."""
        short, whole = (
            {name: bucket for bucket in buckets if bucket.zero > 1 for name, _ in bucket.parameters}
            for buckets in (self.code.buckets, made)
        )
        for name, bucket in short.items():
            row = self.names.given(name)
            for text in (_name, shard_name):
                if row is None:
                    self.names.alone[text(bucket)] = text(whole[name])
                else:
                    self.names.give(
                        [text(whole[each]) for each in row], [text(short[each]) for each in self._short(row)]
                    )

    # --- Names that the middle blocks tell

    def _link(self, block: Block) -> None:
        lines = block.instructions
        rows = [row for place in self._places(block) for row in place.rows(lines)]
        for row in rows:
            for values in zip(*(i.outputs for i in row), strict=True):
                self.names.link([v.name for v in values])
        for row in rows:
            self._link_row(row)
        self._link_makers([line for part in self._between(block) for line in part])
        given = {v.name: v for v in block.inputs}
        for name in given:
            if self.names.index.get(name) == 0:
                self.names.link([v.storage for v in self._twins_of(name, given)])

    def _link_row(self, row: Sequence[Instruction]) -> None:
        """Instructions that stand at one place in the middle blocks, which must be the same but for names."""
        if len(set(map(_work, row))) > 1:
            raise UnlikeError
        for names in zip(*(i.inputs for i in row), strict=True):
            self.names.link(names)
        for values in zip(*(i.outputs for i in row), strict=True):
            self.names.link([v.storage for v in values])
        for names in zip(*(i.frees for i in row), strict=True):
            self.names.link(names)

    def _link_makers(self, lines: Sequence[Instruction]) -> None:
        """Instructions that stand elsewhere and make what the middle blocks alone read; the last readers first."""
        makers = {v.name: line for line in lines for v in line.outputs}
        for line in reversed(lines):
            if line.outputs and self.names.index.get(line.outputs[0].name) == 0:
                self._link_row(self._twins_of(line.outputs[0].name, makers))

    def _twins_of(self, name: str, things: Mapping[str, T]) -> list[T]:
        """The things of the middle blocks."""
        found = [things[each] for each in self.names.row(name) if each is not None and each in things]
        if len(found) < len(MIDDLE):
            raise UnlikeError
        return found

    def _places(self, block: Block) -> list[_Place]:
        """Where the instructions of the middle blocks stand one after the other. Errors: UnlikeError.

        What begins ahead of its block stands within the one before, and what is waited for late within the next: they
        are moved on with those.
        """
        lines, found, starts = block.instructions, [], dict[int, int]()
        numbers = [self.equal.block(i.segment) if i.segment >= 0 and not i.begins else None for i in lines]
        blocks = [None if number is None else self._counted(number) for number in numbers]
        for at, number in enumerate(blocks):
            if len(starts) == BEFORE + AFTER and number == next(iter(starts)):
                found.append(_place_of(starts))
                starts = {}
            if number is not None:
                starts.setdefault(number, at)
        if starts:
            found.append(_place_of(starts))
        middle = [number for place in found for number in place.parts(blocks)[1] if number is not None]
        if len(middle) != blocks.count(0):
            raise UnlikeError
        return found

    def _between(self, block: Block) -> list[Sequence[Instruction]]:
        """The instructions before, between and after those places."""
        places = self._places(block)
        begins, ends = [0, *(place.end for place in places)], [*(place.begin for place in places), None]
        return [block.instructions[begin:end] for begin, end in zip(begins, ends, strict=True)]

    def _counted(self, number: int) -> int:
        """A block as ``Families`` count it."""
        return number - BEFORE + 1 - (self.left_out if number >= BEFORE else 0)

    # --- The whole stage

    def _block(self, block: Block) -> Block:
        """A function for the whole stage; what it is given and hands on is known under its name in others too."""
        outer, self.names = self.names, self.names.copy()
        self._link(block)
        made = self._whole(block)
        values = {v.name: v for v in (*block.inputs, *(v for i in block.instructions for v in i.outputs))}
        handed = dict.fromkeys([*(v.name for v in block.inputs), *block.outputs])
        outer.learn(self.names, [*handed, *(values[name].storage for name in handed)])
        self.names = outer
        return made

    def _whole(self, block: Block) -> Block:
        first, *others = (self._spread(part, self._lines) for part in self._between(block))
        made = [*first]
        for place, after in zip(self._places(block), others, strict=True):
            made += self._unrolled(place.parts(block.instructions), place.ascending, self._lines)
            made += after
        inputs, outputs = self._spread(block.inputs, _VALUES), self._spread(block.outputs, _NAMES)
        whole = replace(block, inputs=inputs, instructions=tuple(made), outputs=outputs)
        _check_defined(whole)
        return whole

    def _unrolled(self, parts: Sequence[Sequence[T]], ascending: bool, kind: _Kind[T]) -> list[T]:
        """Parts of the middle blocks as they stand, with those of the blocks left out between."""
        steps = range(1, self.left_out + 1)
        if any(len({kind.facts(thing) for thing in row}) > 1 for row in zip(*parts, strict=True)):
            raise UnlikeError
        moves = [0, 0, *steps, self.left_out]
        blocks = [parts[0], *[parts[1]] * (self.left_out + 1), parts[2]]
        made: list[T] = []
        for by, part in zip(moves if ascending else moves[::-1], blocks, strict=True):
            rename = self.names.renamed(by)
            made += [kind.renamed(thing, rename, by) for thing in part]
        return made

    def _moved(self, line: Instruction, by: int | None) -> int:
        """The segment of an instruction so many blocks further on; what stands in the place of a middle block may be of
        its neighbours."""
        run, block = self.equal, self.equal.block(line.segment)
        if by is None or block is None:
            return line.segment
        return line.segment + (self._counted(block) + BEFORE - 1 + by - block) * run.period

    def _spread(self, row: Sequence[T], kind: _Kind[T]) -> tuple[T, ...]:
        """A row of things of blocks, with those of the blocks left out between."""
        names, rename = list(map(kind.name, row)), self.names.beside()
        places = {each: place for place, each in enumerate(names)}
        made: list[T] = []
        at = 0
        while at < len(row):
            block = self.names.index.get(names[at])
            place = _Place(at, self._length(names, places, at), block == MIDDLE[0])
            if place.length:
                made += self._unrolled(place.parts(row), place.ascending, kind)
            elif block == 0:
                raise UnlikeError
            else:
                made.append(kind.renamed(row[at], rename, None))
            at = max(at + 1, place.end)
        return tuple(made)

    def _length(self, names: Sequence[str], places: Mapping[str, int], at: int) -> int:
        """How many names of each of the middle blocks stand here one after the other, twin by twin; 0: they do not."""
        block = self.names.index.get(names[at])
        if block not in (MIDDLE[0], MIDDLE[-1]):
            return 0
        twins = self.names.after if block == MIDDLE[0] else self.names.before
        length = places.get(twins.get(names[at], ""), at) - at
        ends = at + len(MIDDLE) * length
        if length <= 0 or ends > len(names):
            return 0
        pairs = zip(names[at : ends - length], names[at + length : ends], strict=True)
        return length if all(self._are_twins(a, b, twins, block) for a, b in pairs) else 0

    def _are_twins(self, name: str, other: str, twins: Mapping[str, str], outermost: int) -> bool:
        """Of what the outermost of the middle blocks has from its neighbour nothing else is known than that it stands
        here, where the next one has what is of the outermost."""
        index = self.names.index
        if name in twins:
            return twins[name] == other
        return other not in index or (name not in index and index[other] == outermost)


def _place_of(starts: Mapping[int, int]) -> _Place:
    """Of blocks that begin there, in the order of these. Errors: UnlikeError."""
    order = list(range(1 - BEFORE, AFTER + 1))
    if list(starts) not in (order, order[::-1]):
        raise UnlikeError
    bounds = list(starts.values())[1:]
    lengths = {end - begin for begin, end in pairwise(bounds)}
    if len(lengths) > 1:
        raise UnlikeError
    return _Place(bounds[0], lengths.pop(), list(starts) == order)


def _name(bucket: Bucket) -> str:
    return bucket.name


def _maker(line: Instruction) -> str:
    """What an instruction is called by; empty where it makes nothing."""
    return line.outputs[0].name if line.outputs else ""


def _work(i: Instruction) -> _Facts:
    """What an instruction does, names aside."""
    results = tuple((v.meta, v.storage_bytes) for v in i.outputs)
    return i.op, i.cost, i.collective, i.workspace_bytes, results, len(i.inputs), len(i.frees), i.begins, i.completes


def _renamed(line: Instruction, rename: Rename, segment: int) -> Instruction:
    """An instruction under other names, of another segment."""
    inputs, frees = tuple(map(rename, line.inputs)), tuple(map(rename, line.frees))
    outputs = tuple(_renamed_value(v, rename) for v in line.outputs)
    if (inputs, frees, segment) == (line.inputs, line.frees, line.segment) and outputs == line.outputs:
        return line
    awaits = None if line.awaits is None else rename(line.awaits)
    return replace(line, inputs=inputs, outputs=outputs, frees=frees, segment=segment, awaits=awaits)


def _renamed_value(value: Value, rename: Rename) -> Value:
    return Value(rename(value.name), value.meta, rename(value.storage), value.storage_bytes)


_VALUES = _Kind[Value](
    lambda v: v.name, lambda v, rename, _: _renamed_value(v, rename), lambda v: (v.meta, v.storage_bytes)
)
_NAMES = _Kind[str](lambda name: name, lambda name, rename, _: rename(name), lambda _: ())


def _check_defined(block: Block) -> None:
    """Everything that is read has been made, once. Errors: UnlikeError."""
    defined = {v.name for v in block.inputs}
    if len(defined) < len(block.inputs):
        raise UnlikeError
    for line in block.instructions:
        if not defined.issuperset(line.inputs) or not defined.isdisjoint(v.name for v in line.outputs):
            raise UnlikeError
        defined.update(v.name for v in line.outputs)
    if not defined.issuperset(block.outputs):
        raise UnlikeError


def _check_handed(forward: Block, backwards: Sequence[Block], constants: set[str]) -> None:
    """What backward reads under new names, forward made or was given. Errors: UnlikeError."""
    known = {v.name for v in forward.inputs} | {v.name for i in forward.instructions for v in i.outputs} | constants
    for block in backwards:
        new = {v.name for v in block.inputs if "~" in v.name}
        if not new <= known:
            raise UnlikeError
        known |= {v.name for i in block.instructions for v in i.outputs}
