"""In which order variables are minimised out of a sum of tables, and which tables meet at each.

Orders are greedy. Where the tables of one order are too large and those of another are too, tables that meet at a
variable are summed in several parts of bounded size, and each part is minimised apart: a lower bound (mini-buckets;
Dechter and Rish, JACM 50, 2003).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.planner.factor_graph import FloatArray

MAX_TABLE_ENTRIES = 20_000_000
"""Of the largest table of an exact search."""
PART_ENTRIES = 20_000
"""Of the largest part where a search is not exact."""

Scope = tuple[int, ...]
Near = dict[int, set[int]]
Score = Callable[[int, Near], tuple[float, ...]]


@dataclass(frozen=True)
class Sum:
    """A sum of tables over ``scope``; inputs: (table, its shape over the whole scope)."""

    scope: Scope
    inputs: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Step:
    """The first variable of every sum's scope goes; several sums are minimised apart.

    shared: the variables that all of them have, in elimination order.
    """

    sums: tuple[Sum, ...]

    @property
    def shared(self) -> Scope:
        return tuple(v for v in self.sums[0].scope if all(v in part.scope for part in self.sums))


@dataclass(frozen=True, eq=False)
class Elimination:
    """scopes: each table's variables in elimination order; strides: [table, variable] steps into the flat costs.

    Tables are numbered: first those given, then one for each sum of each step. final: what is left for kept variables.
    """

    scopes: tuple[Scope, ...]
    offsets: tuple[int, ...]
    strides: FloatArray
    steps: tuple[Step, ...]
    final: Sum

    @property
    def exact(self) -> bool:
        return all(len(step.sums) == 1 for step in self.steps)


@functools.lru_cache(maxsize=1024)
def elimination(sizes: tuple[int, ...], scopes: tuple[Scope, ...], kept: Scope) -> Elimination:
    """Of all variables of several labels but the kept ones; sizes: how many labels each has. Exact where tables are
    small enough."""
    order, limit = _orders(sizes, scopes, kept)
    rank = {v: i for i, v in enumerate((*order, *kept))}
    ordered = tuple(tuple(sorted(scope, key=rank.__getitem__)) for scope in scopes)
    lengths = [math.prod(sizes[v] for v in scope) for scope in scopes]
    offsets = tuple(sum(lengths[:i]) for i in range(len(lengths)))
    strides = np.zeros((len(scopes), len(sizes)))
    for row, scope in zip(strides, ordered, strict=True):
        for axis, v in enumerate(scope):
            row[v] = math.prod(sizes[u] for u in scope[axis + 1 :])
    steps, final = _steps(sizes, ordered, order, kept, limit)
    return Elimination(ordered, offsets, strides, steps, final)


def shape_over(scope: Iterable[int], union: Scope, sizes: Sequence[int]) -> tuple[int, ...]:
    """Of a table over ``scope`` that lines up with one over ``union``."""
    known = frozenset(scope)
    return tuple(sizes[v] if v in known else 1 for v in union)


def _orders(sizes: tuple[int, ...], scopes: tuple[Scope, ...], kept: Scope) -> tuple[Scope, int]:
    """The first order whose tables are small enough, and how large they may be; else the last, in parts."""
    order: Scope = ()
    scores: tuple[Score, ...] = (
        functools.partial(_growth, weights=sizes),
        functools.partial(_fill, weights=tuple(map(math.log, sizes))),
    )
    for score in scores:
        order, largest = _order(sizes, scopes, kept, score)
        if largest <= MAX_TABLE_ENTRIES:
            return order, MAX_TABLE_ENTRIES
    return order, PART_ENTRIES


def _steps(
    sizes: tuple[int, ...], scopes: tuple[Scope, ...], order: Scope, kept: Scope, limit: int
) -> tuple[tuple[Step, ...], Sum]:
    """The tables that meet at each variable, and those left for the kept ones."""
    rank = {v: i for i, v in enumerate((*order, *kept))}
    alive = dict(enumerate(scopes))
    steps, number = [], len(scopes)
    for v in order:
        meeting = {table: scope for table, scope in alive.items() if v in scope}
        sums = []
        for tables in _parts(meeting, sizes, limit):
            union = tuple(sorted({v}.union(*(meeting[t] for t in tables)), key=rank.__getitem__))
            sums.append(_sum(tables, alive, union, sizes))
            alive[number] = union[1:]
            number += 1
        steps.append(Step(tuple(sums)))
        for table in meeting:
            del alive[table]
    return tuple(steps), _sum(list(alive), alive, kept, sizes)


def _sum(tables: Sequence[int], alive: dict[int, Scope], union: Scope, sizes: tuple[int, ...]) -> Sum:
    return Sum(union, tuple((t, shape_over(alive[t], union, sizes)) for t in tables))


def _parts(meeting: dict[int, Scope], sizes: tuple[int, ...], limit: int) -> list[list[int]]:
    """Tables that are summed together: all, or the largest first, each in the first part that has room for it."""

    def entries(scope: Iterable[int]) -> int:
        return math.prod(sizes[v] for v in scope)

    if entries(frozenset().union(*meeting.values())) <= limit:
        return [list(meeting)]
    parts: list[tuple[set[int], list[int]]] = []
    for table in sorted(meeting, key=lambda t: (-entries(meeting[t]), t)):
        roomy = (part for part in parts if entries(part[0].union(meeting[table])) <= limit)
        union, tables = next(roomy, (set(), []))
        if not tables:
            parts.append((union, tables))
        union.update(meeting[table])
        tables.append(table)
    return [sorted(tables) for _, tables in parts]


def _order(
    sizes: tuple[int, ...],
    scopes: tuple[Scope, ...],
    kept: Scope,
    score: Score,
) -> tuple[Scope, int]:
    """The variable with the least score first, and the entries of the largest table. Variables of one label are in no
    scope, and stay.

    A score is of a variable's neighbours, and of which of them are neighbours: others stay as they are.
    """
    near: Near = {v: set() for v, size in enumerate(sizes) if size > 1 or v in kept}
    for scope in scopes:
        for v in scope:
            near[v].update(u for u in scope if u != v)
    scores = {v: score(v, near) for v in near if v not in kept}
    order, largest = [], 1
    while scores:
        v = min(scores, key=scores.__getitem__)
        order.append(v)
        largest = max(largest, sizes[v] * math.prod(sizes[u] for u in near[v]))
        del scores[v]
        touched = set(near[v])
        joined = {u: touched - near[u] - {u} for u in touched}
        for u in near.pop(v):
            near[u] |= touched
            near[u] -= {u, v}
        for u in scores.keys() & touched.union(*(near[t] for t, others in joined.items() if others)):
            if u in touched or any(not joined[t].isdisjoint(near[u]) for t in touched & near[u]):
                scores[u] = score(u, near)
    return tuple(order), largest


def _growth(v: int, near: Near, weights: Sequence[int]) -> tuple[float, ...]:
    """Smallest new table first, then least fill-in, then first named; weights: how many labels each has."""
    around = near[v]
    entries = math.prod(weights[u] for u in around) * weights[v]
    missing = sum(len(around - near[u]) - 1 for u in around)
    return (entries, missing, v)


def _fill(v: int, near: Near, weights: Sequence[float]) -> tuple[float, ...]:
    """Least fill-in first, an edge weighing what its ends do, then first named; weights: logarithms of labels."""
    around = near[v]
    missing = sum(weights[u] * weights[w] for u in around for w in around - near[u] if w != u)
    return (missing, v)
