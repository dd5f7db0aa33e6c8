"""Strategies as text (plan files hold them), all strategies of one op call on one axis, and one on each of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from cost_model.factors import FactorMap, Strategy, factor_of, split_factor, unsplit_strategies
from cost_model.placement import BETWEEN_AXES, REPLICATE, Placement, Placements, Shard, as_held, fit, parse_placement
from cost_model.tensor import TensorMeta


def strategy_text(strategy: Strategy) -> str:
    """ "S(2) V V -> S(2)", with " inside" where the op's own collectives finish the split."""
    left, right = " ".join(map(str, strategy.inputs)), " ".join(map(str, strategy.outputs))
    return f"{left} -> {right}{' inside' if strategy.inside else ''}"


def parse_strategy(text: str) -> Strategy:
    """Inverse of ``strategy_text`` (the factor's name is not kept)."""
    inside = text.endswith(" inside")
    left, right = text.removesuffix(" inside").split(" -> ")
    return Strategy(tuple(map(parse_placement, left.split())), tuple(map(parse_placement, right.split())), "", inside)


def follow(rule: FactorMap, side: str, index: int, shard: Shard, size: int) -> Strategy | None:
    """The strategy in which input or output ``index`` has placement ``shard``; None if the op has none."""
    dims = (rule.inputs if side == "in" else rule.outputs)[index]
    if shard.dim >= len(dims):
        return None
    found = factor_of(rule, side, index, shard)
    return None if found is None else split_factor(rule, found[0], found[1], size)


def seeds(rule: FactorMap, size: int) -> list[Strategy]:
    """One strategy per factor, split plainly."""
    made = (split_factor(rule, factor, 1, size) for factor in rule.sizes)
    return [s for s in made if s is not None]


def unsplit(rule: FactorMap | None, num_inputs: int, num_outputs: int) -> tuple[Strategy, ...]:
    return unsplit_strategies(rule, num_inputs, num_outputs)


def replicated(num_inputs: int, num_outputs: int) -> Strategy:
    fixed: tuple[Placement, ...] = (REPLICATE,)
    return Strategy(fixed * num_inputs, fixed * num_outputs)


@dataclass(frozen=True)
class MeshStrategy:
    """One op's choice on each axis of a mesh, the outermost first, its placements in terms of whole dims."""

    axes: tuple[Strategy, ...]

    @cached_property
    def inputs(self) -> tuple[Placements, ...]:
        """Of each operand."""
        return tuple(zip(*(strategy.inputs for strategy in self.axes), strict=True))

    @cached_property
    def outputs(self) -> tuple[Placements, ...]:
        return tuple(zip(*(strategy.outputs for strategy in self.axes), strict=True))

    def __str__(self) -> str:
        return BETWEEN_AXES.join(map(strategy_text, self.axes))


def parse_mesh_strategy(text: str) -> MeshStrategy:
    """Inverse of ``str``."""
    return MeshStrategy(tuple(map(parse_strategy, text.split(BETWEEN_AXES))))


def goes_together(
    strategy: MeshStrategy,
    inputs: Sequence[TensorMeta | None],
    outputs: Sequence[TensorMeta | None],
    sizes: Sequence[int],
) -> bool:
    """Whether no two axes split the same indices of a tensor, and no two splits need collectives inside the op."""
    tensors = zip((*inputs, *outputs), (*strategy.inputs, *strategy.outputs), strict=True)
    if not all(meta is None or fit(meta.shape, places, sizes) for meta, places in tensors):
        return False
    return sum(own.inside for own in strategy.axes) < 2 or sum(own.inside for _, own in splits(strategy, sizes)) < 2


def splits(strategy: MeshStrategy, sizes: Sequence[int]) -> list[tuple[tuple[int, ...], Strategy]]:
    """The strategy on as few axes as it takes: those that split one factor, one inside the other, are one.

    Of each its axes, the outermost first, and the strategy in terms of what the others leave of the tensors.
    """
    waiting = sorted(range(len(sizes)), key=lambda axis: _outer(strategy.axes[axis]))
    found = []
    while waiting:
        axes = [waiting.pop(0)]
        for axis in tuple(waiting):
            if _continues(strategy.axes[axes[-1]], strategy.axes[axis], sizes[axes[-1]]):
                waiting.remove(axis)
                axes.append(axis)
        found.append((tuple(axes), _held(strategy, axes[0], sizes)))
    return found


def _places(strategy: Strategy) -> tuple[Placement, ...]:
    return (*strategy.inputs, *strategy.outputs)


def _outer(strategy: Strategy) -> int:
    return min((place.outer for place in _places(strategy) if isinstance(place, Shard)), default=0)


def _continues(before: Strategy, after: Strategy, size: int) -> bool:
    """Whether ``after`` splits, of each tensor, what ``before`` splits among ``size`` ranks, once more."""
    pairs = list(zip(_places(before), _places(after), strict=True))
    inside = all(
        b == (replace(a, outer=a.outer * size) if isinstance(a, Shard) else a) and before.inside == after.inside
        for a, b in pairs
    )
    return inside and any(isinstance(a, Shard) for a, _ in pairs)


def _held(strategy: MeshStrategy, axis: int, sizes: Sequence[int]) -> Strategy:
    def held(tensors: tuple[Placements, ...]) -> Iterator[Placement]:
        return (as_held(places, axis, sizes) for places in tensors)

    return replace(strategy.axes[axis], inputs=tuple(held(strategy.inputs)), outputs=tuple(held(strategy.outputs)))
