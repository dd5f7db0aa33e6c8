"""Strategies as text (plan files hold them) and all strategies of one op call on one axis."""

from __future__ import annotations

from cost_model.factors import FactorMap, Strategy, factor_of, split_factor, unsplit_strategies
from cost_model.placement import REPLICATE, Placement, Shard, parse_placement


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
