"""The reference tables: what their rows ran, as programs, and which constants they may fix."""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference_fit import fit
from reference_hardware import Constant, patched, shipped

from cost_model.cluster import Cluster


@dataclass(frozen=True)
class Row:
    """One measured run. group: model, network or case, what is left out as a whole; fits: whether constants see it."""

    label: str
    group: str
    measured_s: float
    measured_bytes: float | None
    fits: bool
    source: Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A way the row may have been run: seconds on a cluster, peak bytes, and what it is."""

    seconds: Callable[[Cluster], float]
    peak_bytes: int
    text: str


@dataclass(frozen=True)
class Prediction:
    """errors: signed, relative to what was measured."""

    row: Row
    seconds: float
    peak_bytes: int
    text: str

    @property
    def time_error(self) -> float:
        return self.seconds / self.row.measured_s - 1.0

    @property
    def memory_error(self) -> float | None:
        return None if self.row.measured_bytes is None else self.peak_bytes / self.row.measured_bytes - 1.0


class Table(ABC):
    """One file of measurements. level, dtype: of the network and of the products whose constants may be fitted."""

    name: str
    file: str
    constants: tuple[Constant, ...] = ()
    level: int = 0
    dtype: str = "float16"

    def __init__(self, folder: Path) -> None:
        self.data: Mapping[str, Any] = json.loads((folder / self.file).read_text(encoding="utf-8"))
        self.rows = tuple(self._rows())

    @abstractmethod
    def _rows(self) -> Iterable[Row]: ...

    @abstractmethod
    def cluster(self, row: Row) -> Cluster:
        """The hardware of a row, from the shipped files."""

    @abstractmethod
    def candidates(self, row: Row) -> Sequence[Candidate]:
        """All ways the row may have been run; the fastest is taken."""

    def carried(self) -> Mapping[str, float]:
        """Constants that other tables than this fix, for a prediction with nothing fitted here; empty: none are."""
        return {}

    def judged(self, found: Sequence[Prediction]) -> Mapping[str, float]:
        """Other figures than errors that a table is judged by."""
        return {}

    @functools.cache  # noqa: B019 - tables live as long as the benchmark
    def _candidates(self, row_index: int) -> Sequence[Candidate]:
        return self.candidates(self.rows[row_index])

    def predict(
        self, constants: Mapping[str, float] | None = None, only: Callable[[Row], bool] = lambda row: True
    ) -> list[Prediction]:
        """With the shipped files, or with constants put in."""
        found = []
        for index, row in enumerate(self.rows):
            if only(row):
                cluster = self.cluster(row)
                cluster = cluster if constants is None else patched(cluster, constants, self.level, self.dtype)
                timed = [(option.seconds(cluster), k) for k, option in enumerate(self._candidates(index))]
                seconds, best = min(timed)
                option = self._candidates(index)[best]
                found.append(Prediction(row, seconds, option.peak_bytes, option.text))
        return found

    def shipped(self) -> dict[str, float]:
        names = tuple(constant.name for constant in self.constants)
        largest = max((self.cluster(row) for row in self.rows), key=lambda cluster: cluster.num_devices)
        return shipped(largest, names, self.level, self.dtype)

    def fitted(self, only: Callable[[Row], bool]) -> dict[str, float]:
        """Constants that fit these rows best, from the shipped ones."""
        names = [constant.name for constant in self.constants]
        start = self.shipped()

        def errors(values: Sequence[float]) -> list[float]:
            return [p.time_error for p in self.predict(dict(zip(names, values, strict=True)), only)]

        found = fit(errors, [start[name] for name in names], [(c.low, c.high) for c in self.constants])
        return dict(zip(names, found, strict=True))

    def left_out(self) -> list[tuple[str, dict[str, float], list[Prediction]]]:
        """For each group of fitted rows: constants from the others, and its rows predicted with them."""
        groups = dict.fromkeys(row.group for row in self.rows if row.fits)
        found = []
        for group in groups if len(groups) > 1 else ():
            constants = self.fitted(lambda row, group=group: row.fits and row.group != group)  # type: ignore[misc]
            own = self.predict(constants, lambda row, group=group: row.fits and row.group == group)  # type: ignore[misc]
            found.append((group, constants, own))
        return found
