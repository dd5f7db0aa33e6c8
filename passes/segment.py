"""Segment: the forward graph as a chain, cut where one activation is live, equal blocks found by structure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from torch import fx

from cost_model.tensor import TensorMeta
from passes.dependence import active_nodes, batch_nodes, receiving_nodes
from passes.graph import ModelGraph


@dataclass(frozen=True)
class Segment:
    """Consecutive parameter-dependent calls.

    kind: segments of equal structure share it; nodes: names in execution order; entry: the one activation that
    comes in (None for the first); exit: the one that goes out (the loss for the last); label: for people.
    """

    kind: str
    nodes: tuple[str, ...]
    entry: str | None
    exit: str
    label: str
    parameters: tuple[str, ...] = field(default=())


def segment(model: ModelGraph) -> tuple[Segment, ...]:
    """The chain: atoms between cut points, those without parameters merged, repeated runs folded into blocks."""
    active = active_nodes(model)
    nodes = [n for n in model.nodes() if n.name in active]
    if not nodes:
        return ()
    params = {i.node for i in model.inputs if i.kind == "parameter"}
    atoms = _merge_free(_atoms(nodes, _cuttable(model)), params)
    shared = _shared_parameters(atoms, params)
    kinds = [_fingerprint(model, atom, params, active, shared) for atom in atoms]
    groups = _fold(kinds)
    return _segments(model, atoms, groups, params, active, shared)


def _cuttable(model: ModelGraph) -> frozenset[str]:
    """Values that may cross from stage to stage: floating, of the batch, and the loss sends them a gradient back."""
    floating = {n for n, m in model.metas.items() if isinstance(m, TensorMeta) and m.is_floating}
    detached = {n.name for n in model.nodes() if "detach" in str(n.target)}
    return (receiving_nodes(model) & batch_nodes(model) & floating) - detached


def _atoms(nodes: list[fx.Node], cuttable: frozenset[str]) -> list[list[fx.Node]]:
    """Runs of calls between the places where exactly one activation is live."""
    position = {n: i for i, n in enumerate(nodes)}
    last_use = {n: max((position[u] for u in n.users if u in position), default=position[n]) for n in nodes}
    atoms: list[list[fx.Node]] = [[]]
    live: set[fx.Node] = set()
    for i, node in enumerate(nodes):
        atoms[-1].append(node)
        live.add(node)
        live = {n for n in live if last_use[n] > i}
        if live == {node} and node.name in cuttable and i + 1 < len(nodes):
            atoms.append([])
    return atoms


def _merge_free(atoms: list[list[fx.Node]], params: set[str]) -> list[list[fx.Node]]:
    """An atom without parameters belongs to the one before it."""
    merged: list[list[fx.Node]] = []
    for atom in atoms:
        has_parameters = any(o.name in params for n in atom for o in n.all_input_nodes)
        if merged and not has_parameters:
            merged[-1].extend(atom)
        else:
            merged.append(list(atom))
    return merged


def _shared_parameters(atoms: list[list[fx.Node]], params: set[str]) -> frozenset[str]:
    """Parameters used by more than one atom (tied weights)."""
    seen: dict[str, int] = {}
    for index, atom in enumerate(atoms):
        for name in {o.name for n in atom for o in n.all_input_nodes if o.name in params}:
            seen[name] = index if name not in seen or seen[name] == index else -1
    return frozenset(name for name, index in seen.items() if index < 0)


def _fingerprint(
    model: ModelGraph, atom: list[fx.Node], params: set[str], active: frozenset[str], shared: frozenset[str]
) -> str:
    """Equal for atoms that run the same calls on the same shapes; a tied parameter counts by name."""
    local = {n: f"%{i}" for i, n in enumerate(atom)}
    outside: dict[fx.Node, str] = {}

    def name(node: fx.Node) -> str:
        if node in local:
            return local[node]
        if node not in outside:
            kind = "parameter" if node.name in params else "activation" if node.name in active else "ambient"
            identity = node.name if node.name in shared else ""
            outside[node] = f"{kind}{len(outside)}{identity}{model.metas[node.name]}{_trainable(model, node)}"
        return outside[node]

    lines = []
    for node in atom:
        args = fx.map_arg(node.args, lambda n: _Named(name(n)))
        kwargs = fx.map_arg(dict(node.kwargs), lambda n: _Named(name(n)))
        used_later = any(u not in local for u in node.users)
        lines.append(f"{node.target}{args}{kwargs}{model.metas[node.name]}{used_later}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


class _Named(str):
    """A string that prints without quotes inside containers."""

    def __repr__(self) -> str:
        return str(self)


def _trainable(model: ModelGraph, node: fx.Node) -> bool:
    return any(i.node == node.name and i.trainable for i in model.inputs)


def _fold(kinds: list[str]) -> list[tuple[int, int]]:
    """Group [start, end) atoms: the repeated pattern that covers most atoms becomes one block per repetition."""
    best = (0, 0, 0)
    for period in range(1, len(kinds) // 2 + 1):
        for start in range(len(kinds) - 2 * period + 1):
            count = 1
            while kinds[start + count * period : start + (count + 1) * period] == kinds[start : start + period]:
                count += 1
            if count > 1 and (count * period, -period) > (best[2] * best[1], -best[1] if best[1] else 0):
                best = (start, period, count)
    start, period, count = best
    if not count:
        return [(i, i + 1) for i in range(len(kinds))]
    before = [(i, i + 1) for i in range(start)]
    blocks = [(start + i * period, start + (i + 1) * period) for i in range(count)]
    after = [(i, i + 1) for i in range(start + count * period, len(kinds))]
    return before + blocks + after


def _segments(
    model: ModelGraph,
    atoms: list[list[fx.Node]],
    groups: list[tuple[int, int]],
    params: set[str],
    active: frozenset[str],
    shared: frozenset[str],
) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    for start, end in groups:
        nodes = [n for atom in atoms[start:end] for n in atom]
        entry = segments[-1].exit if segments else None
        used = dict.fromkeys(o.name for n in nodes for o in n.all_input_nodes if o.name in params)
        kind = _fingerprint(model, nodes, params, active, shared)
        segments.append(
            Segment(kind, tuple(n.name for n in nodes), entry, nodes[-1].name, _label(nodes, model), tuple(used))
        )
    return tuple(segments)


def _label(nodes: list[fx.Node], model: ModelGraph) -> str:
    """The longest module path shared by the segment's parameters, else its first op."""
    targets = {i.node: i.target for i in model.inputs if i.kind == "parameter"}
    paths = [targets[o.name].split(".")[:-1] for n in nodes for o in n.all_input_nodes if o.name in targets]
    if not paths:
        return str(nodes[0].target)
    common = paths[0]
    for path in paths[1:]:
        common = common[: next((i for i, (a, b) in enumerate(zip(common, path, strict=False)) if a != b), len(path))]
    return ".".join(common) or "+".join(dict.fromkeys(p[0] for p in paths if p))
