"""What an optimizer costs on one rank: the real step run on fake shards, its ops priced and its bytes counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from autopar.optimizer_run import Observation, Work, observe
from autopar.runtime.optim import OptimizerSpec, chosen
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta

Key: TypeAlias = tuple[int, TensorMeta]
"""Group and local shard: parameters alike in both are updated alike."""


@dataclass(frozen=True)
class OptimizerPrice:
    """One step of a rank's optimizer in its steady state.

    costs: of each op, in order, repeated where ops repeat; state_bytes: alive from step to step;
    workspace_bytes: the most that is alive within a step beyond state, parameters and gradients; grows: whether of
    lists of all parameters, so that more of them need more.
    """

    costs: tuple[OpCost, ...]
    state_bytes: int
    workspace_bytes: int
    grows: bool = False


Seen: TypeAlias = dict[tuple[frozenset[tuple[int, str]], tuple[Key, ...]], Observation]
"""Steps that were run, by what was there to be updated and what was."""


def price_optimizer(
    spec: OptimizerSpec, parameters: Mapping[str, TensorMeta], *, device: str = "cpu", seen: Seen | None = None
) -> OptimizerPrice:
    """Price of updating the local shards ``parameters``; those the spec does not name are not updated.

    device: "cpu" or "cuda", which choose different implementations where the options leave it open.
    An optimizer that updates its parameters one after the other is run on every pair of neighbours that occurs,
    once each; one that works on lists of them on the first and the last of each kind; any other on all of them.
    seen: the same optimizer's steps on the same device, which parameters of other names need not repeat.
    Errors: ConfigError, UnsupportedError.
    """
    names = [name for group in spec.groups for name in group.names if name in parameters]
    if not names:
        return OptimizerPrice((), 0, 0)
    spec = chosen(spec, device, {name: parameters[name].dtype for name in names})
    group_of = {name: index for index, group in enumerate(spec.groups) for name in group.names}
    keys = [(group_of[name], parameters[name]) for name in names]
    known, dtypes = {} if seen is None else seen, frozenset((group, meta.dtype) for group, meta in keys)

    def run(positions: Sequence[int]) -> Observation:
        key = (dtypes, tuple(keys[p] for p in positions))
        if key not in known:
            known[key] = observe(spec, parameters, [names[p] for p in positions], device)
        return known[key]

    price = _sampled(keys, run, by_lists=any(g.options.get("foreach") or g.options.get("fused") for g in spec.groups))
    if price is None:
        whole = run(range(len(names)))
        price = OptimizerPrice(whole.costs, whole.state_bytes, whole.workspace_bytes, _is_of_lists(whole))
    return price


Run: TypeAlias = Callable[[Sequence[int]], Observation]
"""Runs the optimizer on the parameters at some positions."""


def _sampled(keys: Sequence[Key], run: Run, *, by_lists: bool) -> OptimizerPrice | None:
    """The price from runs on few parameters, or None where they do not show how it is made of the parameters'.

    by_lists: what to try first; an optimizer asked for a loop may work on lists all the same.
    """
    few = len(keys) // 2
    if not by_lists:
        spans, runs = _spans(keys), []
        if sum(stop - start for start, stop in spans) > few:
            return None
        for start, stop in spans:
            runs.append(run(range(start, stop)))
            if any(work.is_list for work in runs[-1].works):
                break
        else:
            return _from_samples(keys, spans, runs)
    kinds = _first_and_last(keys)
    return _from_lists(keys, kinds, run(kinds)) if len(kinds) <= few else None


# --- From runs of neighbours to all parameters ----------------------------------------------------------------------


def _spans(keys: Sequence[Key]) -> list[tuple[int, int]]:
    """Runs [start, stop) in which every two neighbours that occur anywhere stand side by side."""
    seen: set[tuple[Key, Key]] = set()
    chosen = {0}
    for position, pair in enumerate(zip(keys, keys[1:], strict=False), start=1):
        if pair not in seen:
            seen.add(pair)
            chosen |= {position - 1, position}
    starts = [p for p in sorted(chosen) if p - 1 not in chosen]
    stops = [p + 1 for p in sorted(chosen) if p + 1 not in chosen]
    return list(zip(starts, stops, strict=True))


def _from_samples(
    keys: Sequence[Key], spans: Sequence[tuple[int, int]], runs: Sequence[Observation]
) -> OptimizerPrice | None:
    """The price of all parameters, or None where the runs do not show a loop that treats like parameters alike."""
    shares: dict[Key, _Share] = {}
    for (start, stop), run in zip(spans, runs, strict=True):
        found = _shares(run)
        if found is None or any(shares.setdefault(k, s) != s for k, s in zip(keys[start:stop], found, strict=True)):
            return None
    costs = tuple(cost for key in keys for cost in shares[key].costs)
    state_bytes = sum(shares[key].state_bytes for key in keys)
    return OptimizerPrice(costs, state_bytes, max(run.workspace_bytes for run in runs))


def _shares(run: Observation) -> list[_Share] | None:
    """Each parameter's part of a run, or None where the run is no loop over parameters.

    In a loop ops take no lists and work for one parameter after the other; all state is some parameter's; and when a
    parameter is done, no transient of an earlier one is alive, so that the workspace depends on neighbours only.
    """
    if any(work.is_list for work in run.works) or sum(run.states) != run.state_bytes:
        return None
    places = _places(run.works)
    if sorted(places) != places or set(places) != set(range(len(run.states))):
        return None
    last = dict(zip(places, run.works, strict=True))
    if any(places[t.birth] < place for place, work in last.items() for t in work.alive):
        return None
    costs: list[list[OpCost]] = [[] for _ in run.states]
    for place, work in zip(places, run.works, strict=True):
        costs[place] += [work.cost] if work.cost is not None else []
    return [_Share(tuple(own), state) for own, state in zip(costs, run.states, strict=True)]


def _places(works: Sequence[Work]) -> list[int]:
    """The parameter each op works for; one that touches none works for the next that is touched, or the last."""
    places: list[int] = []
    place = max((work.owner for work in works if work.owner is not None), default=0)
    for work in reversed(works):
        place = place if work.owner is None else work.owner
        places.append(place)
    return places[::-1]


@dataclass(frozen=True)
class _Share:
    """What one parameter adds."""

    costs: tuple[OpCost, ...]
    state_bytes: int


# --- From lists of a few parameters to lists of all ------------------------------------------------------------------


def _first_and_last(keys: Sequence[Key]) -> list[int]:
    """The positions of the first and the last of each kind."""
    ends = [{key: p for p, key in order} for order in (enumerate(keys), reversed(list(enumerate(keys))))]
    return sorted({p for end in ends for p in end.values()})


def _from_lists(keys: Sequence[Key], positions: Sequence[int], run: Observation) -> OptimizerPrice | None:
    """The price of all parameters from a run on those at ``positions``, or None where it is no work on lists that
    treats like parameters alike: all state is some parameter's, a parameter has one place in a list, the price of
    a list is the sum of its elements', and what is computed for one parameter alone leaves nothing behind."""
    kinds = [keys[p] for p in positions]
    times = _times(keys, kinds)
    alone = [[w.cost for w in run.works if not w.is_list and w.owner == place] for place in range(len(kinds))]
    alike = {kind: (run.states[place], alone[place]) for place, kind in enumerate(kinds)}
    if sum(run.states) != run.state_bytes or any(
        alike[kind] != (run.states[place], alone[place]) for place, kind in enumerate(kinds)
    ):
        return None
    costs: list[OpCost] = []
    for work in run.works:
        widened = _widened(work, kinds, times)
        if widened is None or any(_is_alone(run.works[t.birth]) for t in work.alive):
            return None
        costs += widened
    workspace = max((_alive_bytes(work, times) + work.number_bytes for work in run.works), default=0)
    state_bytes = sum(s * n for s, n in zip(run.states, times, strict=True))
    return OptimizerPrice(tuple(costs), state_bytes, workspace, _is_of_lists(run))


def _times(keys: Sequence[Key], kinds: Sequence[Key]) -> list[int]:
    """How many parameters each one of the run stands for."""
    left = Counter(keys)
    left.subtract(kinds)
    return [1 + left.pop(kind, 0) for kind in kinds]


def _is_alone(work: Work) -> bool:
    return not work.is_list and work.owner is not None


def _alive_bytes(work: Work, times: Sequence[int]) -> int:
    return sum(t.nbytes * (1 if t.owner is None else times[t.owner]) for t in work.alive)


def _is_of_lists(run: Observation) -> bool:
    """Whether what is alive where most is, came of ops over lists."""
    alive = max((work.alive for work in run.works), key=lambda own: sum(t.nbytes for t in own), default=())
    return bool(alive) and all(run.works[t.birth].is_list for t in alive)


def _widened(work: Work, kinds: Sequence[Key], times: Sequence[int]) -> list[OpCost] | None:
    """The op's cost with each parameter there so many times, once or as often; None where that cannot be told."""
    cost = work.cost
    if not work.is_list:
        return [] if cost is None else [cost] * (1 if work.owner is None else times[work.owner])
    if cost is None or work.elements is None:
        return None
    shares: dict[Key, OpCost] = {}
    for owner, share in work.elements:
        if share is None or shares.setdefault(kinds[owner], share) != share:
            return None
    parts = [shares[kinds[owner]] for owner, _ in work.elements]
    once = _shared(cost, parts)
    if work.ends is not None and _sum(work.ends, [parts[0], parts[-1]], [1, 1], once) != work.ends:
        return None
    return [_sum(cost, parts, [times[owner] for owner, _ in work.elements], once)]


def _shared(cost: OpCost, parts: Sequence[OpCost]) -> tuple[float, float]:
    """Flops and bytes that each element alone has and a list has once (a number that is a tensor)."""
    others = max(len(parts) - 1, 1)
    return (sum(p.flops for p in parts) - cost.flops) / others, (sum(p.nbytes for p in parts) - cost.nbytes) / others


def _sum(like: OpCost, parts: Sequence[OpCost], times: Sequence[int], once: tuple[float, float]) -> OpCost:
    """The cost of a list with each part so many times."""
    others = sum(times) - 1
    flops = sum(p.flops * n for p, n in zip(parts, times, strict=True)) - others * once[0]
    nbytes = sum(p.nbytes * n for p, n in zip(parts, times, strict=True)) - others * once[1]
    return replace(like, flops=flops, nbytes=nbytes)
