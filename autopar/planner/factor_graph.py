"""What one segment may do and what it costs: variables with labels, factors over their products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
COMPONENTS = ("time_s", "step_s", "state_bytes", "saved_bytes")


@dataclass(frozen=True, eq=False)
class Factor:
    """A cost over the product of the domains of ``variables``, one array axis per variable; None is zero.

    time_s: seconds per microbatch, forward and backward with collectives; infinite forbids a combination.
    step_s: seconds once per step (gradient reduction, optimizer).
    state_bytes: parameters, gradients and optimizer state; saved_bytes: kept per microbatch in flight.
    Invariants: only ``time_s`` may be infinite; nothing is NaN or negative.
    """

    variables: tuple[str, ...]
    time_s: FloatArray | None = None
    step_s: FloatArray | None = None
    state_bytes: FloatArray | None = None
    saved_bytes: FloatArray | None = None

    def __post_init__(self) -> None:
        assert len(set(self.variables)) == len(self.variables), self.variables
        for name in COMPONENTS:
            given = getattr(self, name)
            if given is None:
                continue
            array = np.asarray(given, dtype=np.float64)
            assert array.ndim == len(self.variables), (self.variables, name, array.shape)
            assert array.min(initial=0.0) >= 0, (self.variables, name)
            assert name == "time_s" or array.max(initial=0.0) < np.inf, (self.variables, name)
            object.__setattr__(self, name, array)

    def components(self) -> tuple[FloatArray | None, ...]:
        return (self.time_s, self.step_s, self.state_bytes, self.saved_bytes)


@dataclass(frozen=True, eq=False)
class FactorGraph:
    """One kind of segment.

    domains: variable -> its labels, in the order that breaks ties.
    entry, exit: the variables that meet the neighbouring segments; they may be the same one.
    shared: variables whose label is the same in every segment that has them (tied parameters).
    Invariant: every factor's array has the shape of its variables' domains.
    """

    domains: Mapping[str, tuple[str, ...]]
    factors: tuple[Factor, ...]
    entry: str | None = None
    exit: str | None = None
    shared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for variable, labels in self.domains.items():
            assert labels and len(set(labels)) == len(labels), (variable, labels)
        ends = tuple(v for v in (self.entry, self.exit) if v is not None)
        assert all(v in self.domains for v in (*ends, *self.shared)), (ends, self.shared)
        assert not set(ends) & set(self.shared), (ends, self.shared)
        for factor in self.factors:
            shape = tuple(len(self.domains[v]) for v in factor.variables)
            for array in factor.components():
                assert array is None or array.shape == shape, (factor.variables, shape, array.shape)

    @property
    def entry_labels(self) -> tuple[str, ...]:
        return ("",) if self.entry is None else self.domains[self.entry]

    @property
    def exit_labels(self) -> tuple[str, ...]:
        return ("",) if self.exit is None else self.domains[self.exit]

    def time_s(self, assignment: Mapping[str, str]) -> float:
        """Seconds per microbatch of an assignment of all variables."""
        at = {v: self.domains[v].index(label) for v, label in assignment.items() if v in self.domains}
        priced = (f for f in self.factors if f.time_s is not None)
        return float(sum(f.time_s[tuple(at[v] for v in f.variables)] for f in priced if f.time_s is not None))

    def totals(self, assignment: Mapping[str, str]) -> FloatArray:
        """[4] the components of an assignment of all variables, in the order of ``COMPONENTS``."""
        total = np.zeros(4)
        for factor in self.factors:
            at = tuple(self.domains[v].index(assignment[v]) for v in factor.variables)
            total += [0.0 if array is None else array[at] for array in factor.components()]
        return total

    def fixed(self, labels: Mapping[str, str]) -> FactorGraph:
        """The same graph where each shared variable named in ``labels`` keeps that one label; self if none is."""
        return self.holding({v: labels[v] for v in self.shared if v in labels})

    def holding(self, labels: Mapping[str, str]) -> FactorGraph:
        """The same graph where variables keep the labels given for them; self if none is given."""
        held = {v: [self.domains[v].index(label)] for v, label in labels.items()}
        return self.narrowed({v: np.array(index) for v, index in held.items()})

    def narrowed(self, kept: Mapping[str, IntArray]) -> FactorGraph:
        """The same graph where variables keep the labels of these indices; self if none is given."""
        if not kept:
            return self
        domains = {v: tuple(known[i] for i in kept[v]) if v in kept else known for v, known in self.domains.items()}
        factors = tuple(_narrowed(factor, kept) for factor in self.factors)
        return FactorGraph(domains, factors, self.entry, self.exit, self.shared)


def _narrowed(factor: Factor, kept: Mapping[str, IntArray]) -> Factor:
    if kept.keys().isdisjoint(factor.variables):
        return factor
    arrays = factor.components()
    for axis, v in enumerate(factor.variables):
        if v in kept:
            arrays = tuple(None if array is None else array.take(kept[v], axis=axis) for array in arrays)
    return Factor(factor.variables, *arrays)
