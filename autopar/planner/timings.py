"""Timings: what plans take beside their price, as far as some were simulated."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from autopar.planner.configuration import Configuration
from autopar.planner.solution import Solution

EXACT = 1.05
"""So far above its price a step may be before plans of a higher price are looked at."""
HARDLY_ANY = 0.01
"""The part of a price that is left out where it may be hidden: meshes are told apart by more."""
MOST_TIMED = 8
"""Plans that are simulated."""
MOST_SOLVED = 50
"""Nodes of a search that are solved after the first of them: where none was faster, hardly any other will be."""

Timed = Callable[[Solution], float]
Hidden = Callable[[Configuration, float], float]


@dataclass(eq=False)
class Timings:
    """step_s, may_hide_s, lacks_s: as ``timed``, ``hidden_s`` and ``lacks_s`` of ``search``; None: a plan takes its
    price."""

    step_s: Timed | None = None
    may_hide_s: Hidden | None = None
    lacks_s: Timed | None = None
    _waits_s: dict[Configuration, float] = field(default_factory=dict)
    _hidden_s: dict[Configuration, float] = field(default_factory=dict)
    _awaited_s: dict[Configuration, float] = field(default_factory=dict)
    _timed: int = 0
    _most_solved: int = sys.maxsize

    def note_hidden(self, c: Configuration, along_s: float, floor_s: float) -> None:
        """What plans of a configuration, priced at no less than ``floor_s``, may take less: left out where that is
        hardly any of it."""
        hidden_s = 0.0 if self.may_hide_s is None else self.may_hide_s(c, along_s)
        if hidden_s > HARDLY_ANY * floor_s:
            self._hidden_s[c] = hidden_s

    def note_awaited(self, found: Solution, awaited_s: float) -> None:
        """What a plan, or what bounded its configuration, waits for messages beside its price, and what that lacks."""
        c, beside_s = found.configuration, awaited_s + (0.0 if self.lacks_s is None else self.lacks_s(found))
        self._awaited_s[c] = min(beside_s, self._awaited_s.get(c, beside_s))

    def awaited_s(self, c: Configuration) -> float:
        """The least of those that were noted."""
        return self._awaited_s.get(c, 0.0)

    def price_s(self, c: Configuration, known_s: float) -> float:
        """What plans of a price are looked at by; those of one configuration wait alike."""
        return known_s + self.beside_s(c)

    def beside_s(self, c: Configuration) -> float:
        """What plans of a configuration are looked at by, beside their price."""
        return self._waits_s[c] if c in self._waits_s else self.awaited_s(c) - self._hidden_s.get(c, 0.0)

    def time(self, found: Solution, solved: int) -> float:
        """Seconds of a step of a plan, after so many nodes of its search were solved."""
        if self.step_s is None:
            return found.objective_s
        step_s = self.step_s(found)
        self._timed += 1
        self._most_solved = min(self._most_solved, solved + MOST_SOLVED)
        least_s = max(step_s / EXACT, min(step_s, found.objective_s))  # others may be faster by all it did not hide
        self._waits_s[found.configuration] = least_s - found.objective_s
        return step_s

    def are_enough(self, solved: int) -> bool:
        return self._timed == MOST_TIMED or solved > self._most_solved
