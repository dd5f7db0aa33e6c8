"""Coverage: every op the planner has a rule for, with its factor map on an example call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from cost_model.factors import Dims, FactorMap
from cost_model.ops import OPS, OpCall, Ref
from cost_model.ops.table import backward_only
from cost_model.tensor import TensorMeta


@dataclass(frozen=True)
class Covered:
    """map: the factor map of the example as text; split, whole: factors that may and may not be split; summed: split
    factors that leave a sum over ranks."""

    op: str
    map: str
    split: tuple[str, ...]
    whole: tuple[str, ...]
    summed: tuple[str, ...]


def coverage() -> tuple[Covered, ...]:
    """Every op that is planned, by name; ops of backward graphs and optimizers are priced and not listed."""
    names = sorted(name for name, op in OPS.items() if op.factors is not backward_only)
    return tuple(_covered(name) for name in names)


def priced_only() -> tuple[str, ...]:
    """Ops met in backward graphs and optimizers alone."""
    return tuple(sorted(name for name, op in OPS.items() if op.factors is backward_only))


@cache
def _examples() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((files("cost_model.ops") / "examples.json").read_text())
    return found


def example_call(name: str) -> OpCall:
    """A call of the op on small tensors."""
    tree = _examples()[name]
    inputs, outputs = (tuple(TensorMeta(tuple(s), d) for d, s in tree[side]) for side in ("inputs", "outputs"))
    return OpCall(name, inputs, outputs, {key: _value(value) for key, value in tree["args"].items()})


def _value(value: Any) -> object:
    if isinstance(value, dict):
        return Ref(value["input"])
    return [_value(item) for item in value] if isinstance(value, list) else value


def _covered(name: str) -> Covered:
    rule = OPS[name].factors(example_call(name))
    if rule is None:
        return Covered(name, "", (), (), ())
    made = {factor for dims in rule.outputs for names in dims for factor in names}
    split = tuple(factor for factor in rule.sizes if factor not in rule.whole)
    summed = tuple(factor for factor in split if factor not in made)
    return Covered(name, map_text(rule), split, tuple(f for f in rule.sizes if f in rule.whole), summed)


def map_text(rule: FactorMap) -> str:
    """ "b k, n k -> b n"; a dim of several factors in brackets, one of size 1 as "1", a whole factor with "!"."""
    left, right = (", ".join(_dims(dims, rule.whole) for dims in side) for side in (rule.inputs, rule.outputs))
    return f"{left} -> {right}"


def _dims(dims: Dims, whole: frozenset[str]) -> str:
    texts = [[f"{name}!" if name in whole else name for name in names] for names in dims]
    return " ".join("1" if not t else t[0] if len(t) == 1 else f"({' '.join(t)})" for t in texts) or "()"


def coverage_text() -> str:
    """The table for people."""
    rows = coverage()
    width = max(len(row.op) for row in rows)
    lines = [f"{row.op:<{width}}  {row.map or 'replicated'}" for row in rows]
    head = (
        f"{len(rows)} ops may be split; {len(priced_only())} more are priced in backward graphs and optimizers.\n"
        "Each map is that of one example call: a factor that all sides name is split without communication, one that\n"
        "the right side lacks leaves a sum over ranks, one with ! is whole, 1 is a dim of size 1.\n"
    )
    return "\n".join([head, *lines])


def coverage_tree() -> dict[str, Any]:
    ops = {
        row.op: {"map": row.map, "split": list(row.split), "whole": list(row.whole), "summed": list(row.summed)}
        for row in coverage()
    }
    return {"ops": ops, "priced_only": list(priced_only())}
