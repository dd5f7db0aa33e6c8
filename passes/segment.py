"""Segment: the forward graph as a chain, cut where one activation is live, equal blocks found by structure.

Values that live long (an encoder's output that every decoder layer reads, a skip connection over half a network) do
not stand in the way of cuts: they are carried along, whole on every rank, beside the one activation.
"""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from cost_model.tensor import TensorMeta
from passes.dependence import active_nodes, batch_nodes, differentiable_nodes, receiving_nodes
from passes.graph import Meta, ModelGraph, op_name
from passes.written import parameter_left

LONG = 12
"""Calls with parameters over which a value must live to be carried: more than any sublayer's residual spans."""


@dataclass(frozen=True)
class Segment:
    """Consecutive parameter-dependent calls.

    kind: segments of equal structure share it; nodes: names in execution order; entry: the one activation that
    comes in (None for the first); exit: the one that goes out (the loss for the last); label: for people.
    carried: the other values that come in, for this segment (``reads``, in the order of their first use) or for later
    ones; gives: values made here that later segments than the next read.
    """

    kind: str
    nodes: tuple[str, ...]
    entry: str | None
    exit: str
    label: str
    parameters: tuple[str, ...] = field(default=())
    carried: tuple[str, ...] = field(default=())
    reads: tuple[str, ...] = field(default=())
    gives: tuple[str, ...] = field(default=())


def carried_values(segments: tuple[Segment, ...]) -> frozenset[str]:
    """Everything that crosses some cut beside the one activation; it is whole on every rank wherever it is."""
    return frozenset(name for part in segments for name in part.carried)


def segment(model: ModelGraph, other: ModelGraph | None = None, least: int = 1) -> tuple[Segment, ...]:
    """The chain: atoms between cut points, those without parameters merged, repeated runs folded into blocks.

    other: the same graph at a second batch size. What is alike at both is alike at every size, sizes being affine in
    the batch, so that one chain serves them all.
    least: segments that are asked for. Where the chain has fewer, blocks are taken apart, then values that live
    together are carried over cuts; the longest chain where none has as many.
    """
    active = active_nodes(model)
    nodes = [n for n in model.nodes() if n.name in active]
    if not nodes:
        return ()
    params = {i.node for i in model.inputs if i.kind == "parameter"}
    trainable = {i.node for i in model.inputs if i.trainable}
    twin = other if other is not None and _names(model) == _names(other) else None
    atoms: list[list[fx.Node]] = []
    for cuts in _Places.of(model, nodes, params).choices():
        found = _merge_free(_runs(nodes, cuts), params)
        atoms = max(atoms, found, key=len)
        if len(atoms) >= least:
            break
    facts = _Facts(model, twin, params, trainable, active, _shared_parameters(atoms, params), _carried(atoms))
    groups = _fold([_fingerprint(facts, atom) for atom in atoms])
    blocks = [[n for atom in atoms[start:end] for n in atom] for start, end in groups]
    runs = blocks if len(blocks) >= least else atoms
    return _segments(replace(facts, carried=_carried(runs)), runs)


@dataclass(frozen=True)
class _Facts:
    """model: and what is known of its nodes by name: parameters, active calls, tied parameters, carried values.

    other: the same graph at a second batch size, None where there is none.
    """

    model: ModelGraph
    other: ModelGraph | None
    params: set[str]
    trainable: set[str]
    active: frozenset[str]
    shared: frozenset[str]
    carried: frozenset[str]

    @functools.cached_property
    def differentiable(self) -> frozenset[str]:
        return differentiable_nodes(self.model)

    @functools.cached_property
    def twins(self) -> dict[str, fx.Node]:
        """Nodes of the other graph by name."""
        assert self.other is not None
        return {n.name: n for n in self.other.graph.nodes}


def _names(model: ModelGraph) -> list[str]:
    return [n.name for n in model.graph.nodes]


def _cuttable(model: ModelGraph) -> frozenset[str]:
    """Values that may cross from stage to stage: floating, of the batch, and the loss sends them a gradient back."""
    floating = {n for n, m in model.metas.items() if isinstance(m, TensorMeta) and m.is_floating}
    detached = {n.name for n in model.nodes() if "detach" in op_name(n)}
    return (receiving_nodes(model) & batch_nodes(model) & floating) - detached


@dataclass(frozen=True)
class _Places:
    """Where a chain may be cut: behind calls, by their number.

    live: bytes of what is live behind each call where all of that can cross; before: calls with parameters up to each.
    alone: behind which exactly one activation is live beside what lives long; and, in a run of calls that has most of
    the model's parameters because several values are live all along it (two streams, a sum of losses that grows from
    block to block), where no fewer bytes are live nearby.
    """

    live: Mapping[int, int]
    before: tuple[int, ...]
    alone: tuple[int, ...]

    @staticmethod
    def of(model: ModelGraph, nodes: list[fx.Node], params: set[str]) -> _Places:
        cuttable = _cuttable(model)
        position = {n: i for i, n in enumerate(nodes)}
        last_use = {n: max((position[u] for u in n.users if u in position), default=position[n]) for n in nodes}
        before = [0]
        for node in nodes:
            before.append(before[-1] + any(o.name in params for o in node.all_input_nodes))
        long, whole = _long_lived(model, last_use, before), _changed_together(model, position)
        known: dict[int, int] = {}
        alone: list[int] = []
        live: set[fx.Node] = set()
        for i, node in enumerate(nodes[:-1]):
            live.add(node)
            live = {n for n in live if last_use[n] > i}
            if node.name in cuttable and i not in whole and node in live and _cross(model, live):
                known[i] = sum(model.tensor(n.name).nbytes for n in live)
                if live - long <= {node}:
                    alone.append(i)
        alone += _fewest(known, before, _long_runs(nodes, alone, params))
        return _Places(known, tuple(before), tuple(sorted(alone)))

    def choices(self) -> Iterator[list[int]]:
        """Places to cut at, ever more of them."""
        yield list(self.alone)
        for span in range(LONG, 0, -1):
            yield self._narrow(span)

    def _narrow(self, span: int) -> list[int]:
        """Besides where one activation is live, where the fewest bytes are: no nearer than so many calls with
        parameters to each other and to the ends."""
        taken = {0, self.before[-1], *(self.before[i + 1] for i in self.alone)}
        chosen = list(self.alone)
        for place in sorted(self.live.keys() - set(self.alone), key=lambda i: (self.live[i], i)):
            number = self.before[place + 1]
            if all(abs(number - other) >= span for other in taken):
                taken.add(number)
                chosen.append(place)
        return sorted(chosen)


def _long_runs(nodes: list[fx.Node], cuts: list[int], params: set[str]) -> Iterator[range]:
    """Places in runs of calls, cut there, that use most of the parameters first, and more than sublayers have."""
    runs = _runs(nodes, cuts)
    first: dict[str, int] = {}
    for number, run in enumerate(runs):
        for name in (o.name for n in run for o in n.all_input_nodes if o.name in params):
            first.setdefault(name, number)
    used = Counter(first.values())
    start = 0
    for number, run in enumerate(runs):
        if used[number] > max(2 * LONG, len(first) // 2):
            yield range(start, start + len(run) - 1)
        start += len(run)


def _fewest(live: Mapping[int, int], before: list[int], runs: Iterable[range]) -> list[int]:
    """Places in these runs with as few live bytes as any within ``LONG`` calls with parameters, on one side or both."""
    found = []
    for run in runs:
        known = [i for i in run if i in live]
        counts = [before[i + 1] for i in known]
        for place, (i, count) in enumerate(zip(known, counts, strict=True)):
            sides = known[bisect_left(counts, count - LONG) : place], known[place : bisect_right(counts, count + LONG)]
            if any(all(live[i] <= live[j] for j in near) for near in sides):
                found.append(i)
    return found


def _cross(model: ModelGraph, live: set[fx.Node]) -> bool:
    """Whether all of that may cross a cut: tensors, of whatever dtype (``passes.message``)."""
    return all(isinstance(model.metas[n.name], TensorMeta) for n in live)


def _runs(nodes: list[fx.Node], cuts: list[int]) -> list[list[fx.Node]]:
    """The calls between cuts."""
    ends = [place + 1 for place in cuts]
    return [nodes[start:end] for start, end in zip([0, *ends], [*ends, len(nodes)], strict=True)]


def _changed_together(model: ModelGraph, position: dict[fx.Node, int]) -> frozenset[int]:
    """Places behind which no cut may lie: calls that change one running statistic add up where it is held."""
    held = {item.node: parameter_left(item.target) or item.target for item in model.inputs if item.changes}
    held |= {item.node: item.target for item in model.inputs if item.target in held.values()}
    users: defaultdict[str, list[int]] = defaultdict(list)
    for node in model.graph.find_nodes(op="placeholder"):
        if node.name in held:
            users[held[node.name]] += [position[u] for u in node.users if u in position]
    return frozenset(place for own in users.values() for place in range(min(own), max(own)))


def _long_lived(model: ModelGraph, last_use: Mapping[fx.Node, int], before: list[int]) -> frozenset[fx.Node]:
    """Tensors that live over more than ``LONG`` calls with parameters; before: how many there are up to each
    place."""
    long = (n for i, (n, last) in enumerate(last_use.items()) if before[last + 1] - before[i + 1] > LONG)
    return frozenset(n for n in long if isinstance(model.metas[n.name], TensorMeta))


def _carried(runs: list[list[fx.Node]]) -> frozenset[str]:
    """Values that a later run of calls reads, other than the last value of a run that only the next one reads."""
    number = {n: k for k, run in enumerate(runs) for n in run}
    found: set[str] = set()
    for node, own in number.items():
        last = max((number[u] for u in node.users if u in number), default=own)
        if last > own + (node is runs[own][-1]):
            found.add(node.name)
    return frozenset(found)


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


def _fingerprint(facts: _Facts, atom: list[fx.Node], before: str = "") -> str:
    """Equal for atoms that run the same calls on the same shapes; a tied parameter counts by name.

    before: what else tells atoms apart.
    """
    lines = [before, *_lines(facts, facts.model, atom)]
    if facts.other is not None:
        twins = facts.twins
        lines += _lines(facts, facts.other, [twins[n.name] for n in atom])
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _lines(facts: _Facts, model: ModelGraph, atom: list[fx.Node]) -> list[str]:
    """One line a call, operands numbered."""
    local = {n: f"%{i}" for i, n in enumerate(atom)}
    outside: dict[fx.Node, str] = {}

    def name(node: fx.Node) -> str:
        if node in local:
            return local[node]
        if node not in outside:
            kind = (
                "parameter" if node.name in facts.params else "activation" if node.name in facts.active else "ambient"
            )
            identity = node.name if node.name in facts.shared else "carried" if node.name in facts.carried else ""
            trainable = node.name in facts.trainable
            outside[node] = f"{kind}{len(outside)}{identity}{_text(model.metas[node.name])}{trainable}"
        return outside[node]

    lines = []
    for node in atom:
        args = fx.map_arg(node.args, lambda n: _Named(name(n)))
        kwargs = fx.map_arg(dict(node.kwargs), lambda n: _Named(name(n))) if node.kwargs else {}
        used_later = any(u not in local for u in node.users)
        carried = node.name in facts.carried
        lines.append(f"{op_name(node)}{args}{kwargs}{_text(model.metas[node.name])}{used_later}{carried}")
    return lines


@functools.lru_cache(maxsize=4096)
def _text(meta: Meta) -> str:
    return str(meta)


class _Named(str):
    """A string that prints without quotes inside containers."""

    def __repr__(self) -> str:
        return str(self)


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


def _segments(facts: _Facts, runs: list[list[fx.Node]]) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    targets = {i.node: i.target for i in facts.model.inputs if i.kind == "parameter"}
    last_run = {n.name: k for k, nodes in enumerate(runs) for o in nodes for n in o.all_input_nodes}
    alive: dict[str, None] = {}
    for number, nodes in enumerate(runs):
        entry = segments[-1].exit if segments else None
        operands = dict.fromkeys(o.name for n in nodes for o in n.all_input_nodes)
        carried = tuple(name for name in alive if last_run[name] >= number and name != entry)
        gives = [n.name for n in nodes if n.name in facts.carried]
        alive.update(dict.fromkeys(gives))
        segments.append(
            Segment(
                kind=_fingerprint(facts, nodes, _entry_text(facts, entry)),
                nodes=tuple(n.name for n in nodes),
                entry=entry,
                exit=nodes[-1].name,
                label=_label(nodes, targets),
                parameters=tuple(name for name in operands if name in facts.params),
                carried=carried,
                reads=tuple(name for name in operands if name in carried),
                gives=tuple(gives),
            )
        )
    return tuple(segments)


def _entry_text(facts: _Facts, entry: str | None) -> str:
    """Of what comes in, whether it is used or not. One without a gradient comes from frozen layers: what an op saves
    depends on that."""
    if entry is None:
        return "first"
    return f"{facts.model.metas[entry]}{entry in facts.carried}{entry in facts.differentiable}"


def _label(nodes: list[fx.Node], targets: Mapping[str, str]) -> str:
    """The longest module path shared by the segment's parameters, else its first op; targets: of parameters."""
    paths = [targets[o.name].split(".")[:-1] for n in nodes for o in n.all_input_nodes if o.name in targets]
    if not paths:
        return op_name(nodes[0])
    common = paths[0]
    for path in paths[1:]:
        common = common[: next((i for i, (a, b) in enumerate(zip(common, path, strict=False)) if a != b), len(path))]
    return ".".join(common) or "+".join(dict.fromkeys(p[0] for p in paths if p))
