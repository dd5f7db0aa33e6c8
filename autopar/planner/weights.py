"""Weights within a segment: parameters and views of them, and which of these its backward reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from autopar.planner.mesh_strategies import MeshOp, MeshSpace
from cost_model.ops import entry_of, price_of


def saves_of(op: MeshOp) -> tuple[str, ...]:
    """What an op saves, by the op table; one without an entry saves all it reads."""
    entry = entry_of(op.call.op)
    return tuple(f"in{i}" for i in range(len(op.operands))) if entry is None else entry.saves(op.call)


def with_views(space: MeshSpace, parameters: Collection[str]) -> frozenset[str]:
    """Parameters, and the values of a segment that are views of them."""
    found, made = set(parameters), _outputs(space)
    for op in space.ops:
        if _shows(op, found):
            found.update(made[op.node])
    return frozenset(found)


def read_back(space: MeshSpace, weights: Collection[str]) -> frozenset[str]:
    """Those of ``with_views`` that a backward reads, as they are or through views."""
    found, made = set[str](), _outputs(space)
    for op in reversed(space.ops):
        saves = saves_of(op)
        found.update(o for index, o in enumerate(op.operands) if o in weights and f"in{index}" in saves)
        if _shows(op, weights) and found.intersection(made[op.node]):
            found.add(op.operands[0])
    return frozenset(found)


def _shows(op: MeshOp, values: Collection[str]) -> bool:
    """Whether an op only shows the first of its operands, one of these."""
    return price_of(op.call) is None and bool(op.operands) and op.operands[0] in values


def _outputs(space: MeshSpace) -> Mapping[str, list[str]]:
    """Op -> the tensors that are its outputs."""
    found: dict[str, list[str]] = {op.node: [] for op in space.ops}
    for tensor, (node, _) in space.values.items():
        found[node].append(tensor)
    return found
