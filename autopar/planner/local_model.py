"""A model at one microbatch size, in segments, and what may cross between them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from autopar.planner.mesh_strategies import combined
from autopar.planner.strategies import SEQUENCE
from cost_model.placement import (
    PARTIAL,
    REPLICATE,
    Placement,
    Placements,
    Shard,
)
from cost_model.tensor import TensorMeta
from passes.dependence import active_nodes, differentiable_nodes
from passes.graph import ModelGraph
from passes.message import carried_bytes
from passes.segment import Segment, carried_values
from passes.specialise import Specialiser
from passes.trace import Traced

EXIT = "exit"


Sizes = tuple[int, ...]
"""Of the axes that tp consists of."""


class Structure:
    """What is the same at every microbatch size: the chain of segments and what its values are, by node."""

    def __init__(self, traced: Traced) -> None:
        model, self.segments = traced.global_graph, traced.segments
        self.carried = carried_values(self.segments)
        self.trainable = frozenset(i.node for i in model.inputs if i.trainable)
        self.differentiable = differentiable_nodes(model)
        counts = Counter(name for part in self.segments for name in set(part.parameters))
        self.shared = frozenset(name for name, count in counts.items() if count > 1)
        placed = {i.node for i in model.inputs if i.kind == "parameter"} | active_nodes(model)
        self.ambient = frozenset(n.name for n in model.graph.nodes if n.name not in placed)
        self.representatives: dict[str, Segment] = {}
        for part in self.segments:
            self.representatives.setdefault(part.kind, part)
        kinds = Counter(part.kind for part in self.segments)
        self.repeated = {kind: count for kind, count in kinds.items() if count > 1}

    @cached_property
    def first_holders(self) -> dict[str, Segment]:
        """Parameter -> the first segment that has it."""
        return {name: part for part in reversed(self.segments) for name in part.parameters}


@dataclass(frozen=True, eq=False)
class LocalModel:
    """The model at one microbatch size. model: the calls of one segment of each kind; the others are like these."""

    structure: Structure
    specialiser: Specialiser
    model: ModelGraph

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.structure.segments

    @cached_property
    def cut_before(self) -> list[tuple[TensorMeta, int]]:
        """Of each segment but the first, the activation that comes in and the bytes carried beside it; the first has
        its own exit there."""
        known: dict[tuple[str, tuple[str, ...]], tuple[TensorMeta, int]] = {}
        found = []
        for before, after in zip((self.segments[0], *self.segments), self.segments, strict=False):
            key = (before.kind, after.carried)
            if key not in known:
                exit = self.tensor(self.structure.representatives[before.kind].exit)
                known[key] = exit, sum(carried_bytes(self.tensor(name), exit.dtype) for name in after.carried)
            found.append(known[key])
        return found

    def has_sequence(self, sizes: tuple[int, ...]) -> bool:
        """Whether a value between segments can be split along a sequence."""
        return any(sequence_of(self.tensor(part.exit), sizes) for part in self.structure.representatives.values())

    def tensor(self, name: str) -> TensorMeta:
        """The meta of any value."""
        if name in self.model.metas:
            return self.model.tensor(name)
        return self.specialiser.tensor(name, self.model.batch)


def boundary_placements(meta: TensorMeta, sizes: Sizes) -> list[Placements]:
    """How an activation may lie between segments: on each axis whole, a sum, or split along one dim."""
    if sizes == (1,):
        return [(REPLICATE,)]
    known: list[Placement] = [REPLICATE, PARTIAL, *(Shard(d) for d, e in enumerate(meta.shape) if e > 1)]
    return combined([known] * len(sizes), meta.shape, sizes)


def sequence_of(meta: TensorMeta, sizes: Sizes) -> Placements | None:
    """``SEQUENCE`` on all axes, where a boundary [batch, sequence, features] may lie so."""
    if len(meta.shape) != 3 or meta.shape[1] == 1:
        return None
    found = combined([(SEQUENCE,)] * len(sizes), meta.shape, sizes)
    return found[0] if found else None
