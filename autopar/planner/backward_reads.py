"""What backwards read of a segment: operands and outputs of its ops, and of weights those that are gathered."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from autopar.planner.mesh_strategies import MeshOp, MeshSpace
from cost_model.ops import PRODUCTS, entry_of, price_of


def saves_of(op: MeshOp, differentiable: Collection[str]) -> tuple[str, ...]:
    """What an op saves, by the op table; one without an entry saves all it reads.

    differentiable: values that have a gradient. Without one among its operands an op saves nothing, and a product saves
    what gradients of the others need: not what a frozen weight multiplies.
    """
    entry, wanted = entry_of(op.call.op), [operand in differentiable for operand in op.operands]
    names = tuple(f"in{i}" for i in range(len(op.operands))) if entry is None else entry.saves(op.call)
    if op.call.op not in PRODUCTS:
        return names if any(wanted) else ()
    return tuple(name for i, name in ((int(name[2:]), name) for name in names) if any(wanted[:i] + wanted[i + 1 :]))


def with_views(space: MeshSpace, parameters: Collection[str]) -> frozenset[str]:
    """Parameters, and the values of a segment that are views of them."""
    found, made = set(parameters), _outputs(space)
    for op in space.ops:
        if _shows(op, found):
            found.update(made[op.node])
    return frozenset(found)


def read_back(space: MeshSpace, weights: Collection[str], differentiable: Collection[str]) -> frozenset[str]:
    """Those of ``with_views`` that a backward reads, as they are or through views."""
    found, made = set[str](), _outputs(space)
    for op in reversed(space.ops):
        saves = saves_of(op, differentiable)
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
