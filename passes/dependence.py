"""What depends on what: parameter-dependent values are placed by the planner, all others are ambient."""

from __future__ import annotations

from torch import fx

from cost_model.tensor import TensorMeta
from passes.graph import ModelGraph, op_name


def active_nodes(model: ModelGraph) -> frozenset[str]:
    """Calls that depend on a parameter, or on what a step changes; others (masks, shifted labels) are ambient."""
    active = {i.node for i in model.inputs if i.kind in ("parameter", "activation") or i.changes}
    calls: set[str] = set()
    for node in model.nodes():
        if any(operand.name in active for operand in node.all_input_nodes):
            active.add(node.name)
            calls.add(node.name)
    return frozenset(calls)


def differentiable_nodes(model: ModelGraph) -> frozenset[str]:
    """Values through which a gradient reaches a trainable parameter, or the activation received."""
    carrying = {i.node for i in model.inputs if i.trainable or i.kind == "activation"}
    for node in model.nodes():
        if "detach" in op_name(node):
            continue
        if any(operand.name in carrying for operand in node.all_input_nodes):
            carrying.add(node.name)
    return frozenset(carrying)


def receiving_nodes(model: ModelGraph) -> frozenset[str]:
    """Values to which the outputs send a gradient back: those with a way to them, of floating tensors, not detached."""
    by_name = {n.name: n for n in model.graph.nodes}
    stack = [by_name[name] for name in model.outputs]
    found: set[str] = set()
    while stack:
        node = stack.pop()
        if node.name not in found:
            found.add(node.name)
            stack.extend(() if "detach" in op_name(node) or not _has_floats(model, node) else node.all_input_nodes)
    return frozenset(found)


def _has_floats(model: ModelGraph, node: fx.Node) -> bool:
    meta = model.metas[node.name]
    return any(m is not None and m.has_gradient for m in ((meta,) if isinstance(meta, TensorMeta) else meta))


def batch_nodes(model: ModelGraph) -> frozenset[str]:
    """Values that depend on the user's batch."""
    found = {i.node for i in model.inputs if i.kind == "batch"}
    for node in model.nodes():
        if any(operand.name in found for operand in node.all_input_nodes):
            found.add(node.name)
    return frozenset(found)


def ancestors(targets: list[fx.Node]) -> list[fx.Node]:
    """Every node the targets need, themselves included, in execution order."""
    needed: set[fx.Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return [n for n in targets[0].graph.nodes if n in needed] if targets else []
