"""Seconds of one run of a block, at given prices of its ops and collectives."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cost_model.background import Streams
from cost_model.program import Block, Collective, Instruction, OpCost

VIEW = "view"


@dataclass(frozen=True)
class BlockPrice:
    """Seconds of one run of a block: its ops, waiting for its collectives, and both by kind.

    completed_s: from the beginning of the block until each group of gradients is complete.
    """

    compute_s: float
    communication_s: float
    kinds_s: Mapping[str, float] = field(hash=False)
    completed_s: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def total_s(self) -> float:
        return self.compute_s + self.communication_s


def block_price(
    block: Block,
    view_s: float,
    op_s: Callable[[OpCost], float],
    whole_s: Mapping[Collective, float],
    behind_s: Mapping[Collective, float],
    longer_s: Sequence[float] | None = None,
) -> BlockPrice:
    """whole_s: of each collective of the block; behind_s: what remains behind compute of those that begin there;
    longer_s: what each instruction takes beyond its price."""
    kinds: defaultdict[str, float] = defaultdict(float)
    compute = communication = 0.0
    streams, moving, completed = Streams(), dict[str, str](), dict[str, float]()
    extra = longer_s or itertools.repeat(0.0, len(block.instructions))
    for instruction, extra_s in zip(block.instructions, extra, strict=True):
        collective = instruction.collective
        if collective is not None and instruction.begins:
            streams.begin(instruction, whole_s[collective], behind_s[collective])
            moving[instruction.outputs[0].name] = collective.kind
        elif collective is not None:
            seconds = whole_s[collective]
            streams.spend(seconds)
            communication += seconds
            kinds[collective.kind] += seconds
        elif instruction.awaits is not None:
            seconds = streams.wait(instruction.awaits)
            communication += seconds
            kinds[moving[instruction.awaits]] += seconds
        if instruction.cost is not None or instruction.collective is None:
            seconds = _own_s(instruction, view_s, op_s) + extra_s
            streams.spend(seconds)
            compute += seconds
            kinds[_kind(instruction)] += seconds
        if instruction.completes is not None:
            completed[instruction.completes] = streams.now_s
    return BlockPrice(compute, communication, dict(kinds), completed)


def spent_seconds(
    block: Block, view_s: float, op_s: Callable[[OpCost], float], whole_s: Mapping[Collective, float]
) -> list[float]:
    """On each instruction, waiting for its collective included."""
    return [_own_s(i, view_s, op_s) + _waited_s(i, whole_s) for i in block.instructions]


def _own_s(instruction: Instruction, view_s: float, op_s: Callable[[OpCost], float]) -> float:
    """Of its op, or of a view; nothing where it is a collective alone."""
    if instruction.cost is not None:
        return op_s(instruction.cost)
    return view_s if instruction.collective is None else 0.0


def _waited_s(instruction: Instruction, whole_s: Mapping[Collective, float]) -> float:
    """Of its collective, where that ends with it."""
    return 0.0 if instruction.collective is None or instruction.begins else whole_s[instruction.collective]


def _kind(instruction: Instruction) -> str:
    return VIEW if instruction.cost is None else instruction.cost.kind
