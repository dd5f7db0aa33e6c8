"""What waits in the queue of the outer search, each under a bound of all plans it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autopar.planner.chain import Chain
from autopar.planner.configuration import Configuration
from autopar.planner.configuration_solver import ConfigurationSolver, Outcome
from autopar.planner.solution import Infeasible, Solution


@dataclass(eq=False)
class Waiting:
    """A configuration whose units are not made yet. order: breaks ties; bound_s: proven for all of them.

    floor_s: of its chain; chain: once no floor kept the configuration from the front.
    """

    order: tuple[int, ...]
    bound_s: float
    configuration: Configuration
    floor_s: float
    chain: Chain | None = None


@dataclass(eq=False)
class Unit:
    """order: breaks ties; bound_s: proven; outcome: once solved; confirmations: how often it was too large.

    capped: makes the solvers under the cap while ``solver`` knows of none; left_out: it made none. loose, tight: extra
    bytes of its stages under which the plan found was too large, and under which there was none. nearest: the plan that
    needed least. step_s: what a step of the plan found takes, once that was asked for.
    """

    order: tuple[int, ...]
    solver: ConfigurationSolver
    bound_s: float
    capped: Callable[[], list[ConfigurationSolver]] | None = None
    left_out: bool = False
    outcome: Outcome | None = None
    solution: Solution | None = None
    confirmed: bool = False
    confirmations: int = 0
    loose: list[float] | None = None
    tight: list[float] | None = None
    nearest: Infeasible | None = None
    step_s: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class Relaxed:
    """All units of a configuration under the cap at once: every use of a shared variable has a label of its own, every
    segment all ways to save memory, and a stage reserves what the least of them reserves. What bounds it bounds them.

    units: makes them; glances: how often its bound was raised only so far that others may come before it; near: whether
    the last of them raised it less; proven: once it was raised as far as it goes.
    """

    order: tuple[int, ...]
    solver: ConfigurationSolver
    bound_s: float
    units: Callable[[], list[Unit]]
    glances: int = 0
    near: bool = False
    proven: bool = False
