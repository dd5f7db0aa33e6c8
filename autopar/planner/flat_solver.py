"""The flat program in place of columns: one configuration solved by ``autopar.planner.flat``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autopar.planner.configuration_solver import ConfigurationSolver, Outcome, Shortage
from autopar.planner.flat import Problem, count_variables
from autopar.planner.flat_choice import flat_choice, least_columns
from cost_model.errors import ProblemSizeError

MOST_VARIABLES = 30_000
"""A GPT of 4 layers on a tp axis under a cap has 20,000 and takes half a minute; beyond, minutes become hours."""


@dataclass(eq=False)
class FlatSolver(ConfigurationSolver):
    """Solves one configuration as a whole; shared variables of the chain need not be fixed.

    Errors: ProblemSizeError where the program would have more than ``MOST_VARIABLES`` variables.
    """

    @property
    def problem(self) -> Problem:
        return Problem(self.chain, self.objective, tuple(self.held), self.cap_bytes, tuple(self.extra_bytes))

    def solve(self, cutoff_s: float) -> Outcome:
        """The best choice of all, or the plan that needs least where none fits; ``cutoff_s`` saves nothing here."""
        self._check_size()
        choice, ilp = flat_choice(self.problem)
        if choice is None:
            return Outcome(math.inf, shortage=self._least(), ilp=ilp)
        return Outcome(choice.bound_s, choice, None, ilp)

    def _check_size(self) -> None:
        count, c = count_variables(self.problem), self.configuration
        if count > MOST_VARIABLES:
            mesh = f"dp={c.dp} tp={c.tp} pp={c.pp} microbatch_size={c.microbatch_size}"
            raise ProblemSizeError(count, MOST_VARIABLES, mesh)

    def _least(self) -> Shortage | None:
        columns = least_columns(self.problem)
        if not columns:
            return None
        needed = self.needed_bytes(columns)
        return Shortage(math.ceil(max(needed)), int(np.argmax(needed)), columns)
