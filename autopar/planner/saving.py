"""Recompute as one more variable of a segment's factor graph: which level, for the whole segment.

Which values each level keeps is decided on the whole tensors of the forward graph, as ``passes.recompute`` decides it
on the traced one: there the exact answer is found once the program is rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.planner.backward_reads import saves_of, with_views
from autopar.planner.factor_graph import BoolArray, Factor, FloatArray
from autopar.planner.mesh_strategies import MeshOp, MeshSpace
from cost_model.ops import WITHIN_BACKWARD, entry_of, price_of
from passes.recompute import Flow, is_heavy, repeated

RECOMPUTE = "recompute:"
NONE = "none"


@dataclass(frozen=True)
class Saving:
    """Ways to save memory that a search may choose from, each in the order that breaks ties.

    recompute: levels of a segment; zero: levels of a parameter, none where the faster of 0 and 1 is taken.
    """

    recompute: tuple[str, ...] = (NONE,)
    zero: tuple[int, ...] = ()


SAVE_ALL = Saving()


@dataclass(frozen=True)
class Level:
    """kept: tensors that are saved; ops: calls that run again; read: tensors that those or the backward read."""

    kept: frozenset[str]
    ops: frozenset[str]
    read: frozenset[str]


@dataclass(frozen=True, eq=False)
class OpUse:
    """An op as every level changes it.

    plain: its factor where all is saved; again_s: [strategy] seconds of its second run; unread: bytes by strategy of
    those outputs that only the backward reads.
    """

    node: str
    plain: Factor
    again_s: FloatArray
    unread: Mapping[str, FloatArray]

    def factor(self, levels: Mapping[str, Level]) -> Factor:
        """[strategy, level]"""
        assert self.plain.time_s is not None and self.plain.saved_bytes is not None
        times, saved = [], []
        for name, level in levels.items():
            kept = [nbytes for tensor, nbytes in self.unread.items() if tensor in level.kept]
            times.append(self.plain.time_s + self.again_s * (self.node in level.ops))
            saved.append(self.plain.saved_bytes if name == NONE else sum(kept, np.zeros_like(self.again_s)))
        return Factor((*self.plain.variables, RECOMPUTE), np.stack(times, 1), saved_bytes=np.stack(saved, 1))


@dataclass(frozen=True, eq=False)
class TensorUse:
    """A tensor on its way to a form of it or to an op, as every level changes it.

    plain: its factor where all is saved. first: on its way from where it is made; user: the op, None for a form.
    source_bytes, target_bytes: [source label, target label]; travels: where a collective lies between the two.
    is_weight: a parameter or a view of one, which is there anyway: only what a collective makes of it is kept.
    """

    tensor: str
    plain: Factor
    first: bool
    user: str | None
    source_bytes: FloatArray
    target_bytes: FloatArray
    travels: BoolArray
    is_weight: bool = False

    def factors(self, levels: Mapping[str, Level]) -> list[Factor]:
        """What it takes to convert, [source, target], and the bytes it saves, [source, target, level].

        No level repeats a collective: its result is kept if anything reads it again (a backward, where the plain factor
        saves it), in place of its operand.
        """
        tables = [self._saved(name, level) for name, level in levels.items()]
        found = [Factor(self.plain.variables, self.plain.time_s)]
        if any(table.any() for table in tables):
            found.append(Factor((*self.plain.variables, RECOMPUTE), saved_bytes=np.stack(tables, 2)))
        return found

    def _saved(self, name: str, level: Level) -> FloatArray:
        if name == NONE:
            return np.zeros_like(self.source_bytes) if self.plain.saved_bytes is None else self.plain.saved_bytes
        if self.is_weight:
            read = self.user in level.ops or self.plain.saved_bytes is not None
            return np.where(self.travels, self.target_bytes * read, 0.0)
        kept = self.first and self.tensor in level.kept
        reads_again = self.user is None or self.user in level.ops or self.plain.saved_bytes is not None
        read = self.tensor in level.read and reads_again
        return np.where(self.travels, self.target_bytes * (kept or read), self.source_bytes * kept)


class SegmentLevels:
    """What each level keeps of one kind of segment.

    entry: the activation that comes in, and its bytes; differentiable: values and weights that have a gradient.
    """

    def __init__(
        self,
        space: MeshSpace,
        entry: tuple[str, int] | None,
        outside: frozenset[str],
        weights: set[str],
        differentiable: frozenset[str],
    ) -> None:
        self.space, self.outside, self.weights = space, outside, frozenset(weights)
        self.differentiable = differentiable
        self.by_output = {made: tensor for tensor, made in space.values.items()}
        self.views = {op.node for op in space.ops if price_of(op.call) is None}
        self.flow = self._flow(entry)
        self.needed = self._needed()
        self.heavy = self._heavy(weights)

    def output(self, op: MeshOp, index: int) -> str:
        """The tensor that is an op's output; a name of its own where nothing in the forward reads it."""
        if len(op.call.outputs) == 1:
            return op.node
        return self.by_output.get((op.node, index), f"{op.node}.{index}")

    def levels(self, names: Sequence[str]) -> dict[str, Level]:
        return {name: self._level(name) for name in names}

    def again_bytes(self, name: str) -> int:
        """What the backward reads and a level does not keep, whole."""
        kept, _ = repeated(self.flow, name, self.needed, self.heavy)
        return sum(self.flow.nbytes[tensor] or 0 for tensor in self.needed - kept)

    def gradient_bytes(self) -> int:
        """The most that gradients of values take, whole, beyond what the backward has let go of by then: while that of
        an op runs, those of its outputs and of its operands lie at once."""
        savers: dict[str, int] = {}
        for index, op in reversed(list(enumerate(self.space.ops))):
            savers.update(dict.fromkeys(self._saved_by(op), index))
        freed, most = 0, 0
        for index, op in reversed(list(enumerate(self.space.ops))):
            most = max(most, self._met_bytes(op) - freed)
            freed += sum(self.flow.nbytes[name] or 0 for name, first in savers.items() if first == index)
        return most

    def _met_bytes(self, op: MeshOp) -> int:
        """Gradients of an op's outputs and of the values it reads, and what its backward makes in between."""
        entry = entry_of(op.call.op)
        wanted = {o: m for o, m in zip(op.operands, op.call.inputs, strict=True) if o in self.differentiable}
        if entry is None or not wanted or not entry.backward_price(op.call):
            return 0
        values = {o: m for o, m in wanted.items() if o not in self.weights}
        made = WITHIN_BACKWARD[op.call.op](op.call) if op.call.op in WITHIN_BACKWARD else 0
        return made + sum(meta.nbytes for meta in (*op.call.outputs, *values.values()) if meta.is_floating)

    def _level(self, name: str) -> Level:
        kept, again = repeated(self.flow, name, self.needed, self.heavy)
        ops = frozenset(op.node for op in self.space.ops if any(t in again for t in self._outputs(op)))
        read = self.needed.union(*(op.operands for op in self.space.ops if op.node in ops))
        return Level(kept, ops, read)

    def _outputs(self, op: MeshOp) -> list[str]:
        return [self.output(op, index) for index in range(len(op.call.outputs))]

    def _flow(self, entry: tuple[str, int] | None) -> Flow:
        operands: dict[str, tuple[str, ...]] = {} if entry is None else {entry[0]: ()}
        nbytes: dict[str, int | None] = {} if entry is None else {entry[0]: entry[1]}
        for op in self.space.ops:
            for tensor, meta in zip(self._outputs(op), op.call.outputs, strict=True):
                operands[tensor] = tuple(o for o in op.operands if o not in self.outside)
                nbytes[tensor] = None if op.node in self.views else meta.nbytes
        return Flow(operands, nbytes, frozenset() if entry is None else frozenset([entry[0]]))

    def _needed(self) -> frozenset[str]:
        """What the backward reads, by the op table."""
        found: set[str] = set()
        for op in self.space.ops:
            found |= self._saved_by(op)
        return frozenset(found)

    def _saved_by(self, op: MeshOp) -> set[str]:
        found: set[str] = set()
        for name in saves_of(op, self.differentiable):
            index = int(name.removeprefix("in").removeprefix("out"))
            found.add(op.operands[index] if name.startswith("in") else self.output(op, index))
        return found & self.flow.operands.keys()

    def _heavy(self, weights: set[str]) -> frozenset[str]:
        shown, heavy = with_views(self.space, weights), set[str]()
        for op in self.space.ops:
            if is_heavy(op.call.op, weighted=any(o in shown for o in op.operands)):
                heavy.update(self._outputs(op))
        return frozenset(heavy)
