"""What a user may pin (``Parallelism``, ``Precision``) and what the planner decided (``Plan``)."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cost_model.errors import ConfigError, ParallelismError, PlanMismatchError

SCHEMA_VERSION = 1
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
RECOMPUTES = ("none", "selective", "full")
_NUMBERED = re.compile(r"((?:[^.]*\.)*?)(\d+)((?:\..*)?)")
_PRECISIONS = (None, "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Parallelism:
    """Pins on the plan; None leaves a field to the planner. Degrees multiply to the number of devices.

    microbatch_size: samples per microbatch per data-parallel replica.
    placement: device index of each (stage, dp replica, tp shard), in that order.
    """

    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    zero: int | None = None
    recompute: str | None = None
    schedule: str | None = None
    microbatch_size: int | None = None
    virtual_stages: int | None = None
    sequence_parallel: bool | None = None
    placement: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "microbatch_size", "virtual_stages"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ParallelismError(f"{name} must be a positive integer or None, not {value!r}")
        if self.zero not in (None, 0, 1, 2, 3):
            raise ParallelismError(f"zero must be 0, 1, 2, 3 or None, not {self.zero!r}")
        for name, value, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("recompute", self.recompute, RECOMPUTES),
        ):
            if value is not None and value not in known:
                raise ParallelismError(f"{name} must be one of {', '.join(known)} or None, not {value!r}")
        if self.placement is not None:
            object.__setattr__(self, "placement", tuple(int(d) for d in self.placement))


@dataclass(frozen=True)
class Precision:
    """dtype of each kind of tensor: "fp32", "bf16", "fp16", or None to keep the model's own."""

    params: str | None = None
    compute: str | None = None
    grads: str | None = None
    reduce: str | None = None
    master: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value not in _PRECISIONS:
                raise ConfigError(f"precision {name} must be 'fp32', 'bf16', 'fp16' or None, not {value!r}")


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage: the half-open range of segments it runs.

    placements: value name -> placement text on the tp axis, for every value whose placement is not
    derived: op outputs ("node:<name>") and, where a tensor is used in a second form, "form:<name>".
    """

    first_segment: int
    last_segment: int
    choices: Mapping[str, str] = field(hash=False)


@dataclass(frozen=True)
class Plan:
    """All choices. Equal input gives a byte-identical file.

    batch: global batch size in samples; microbatches: per data-parallel replica.
    fingerprints tie the plan to a model graph and a cluster.
    """

    model: str
    cluster: str
    batch: int
    dp: int
    tp: int
    pp: int
    schedule: str
    microbatch_size: int
    microbatches: int
    memory_cap_bytes: int
    placement: tuple[int, ...]
    stages: tuple[StagePlan, ...]
    segment_labels: tuple[str, ...]
    version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        assert self.microbatch_size * self.microbatches * self.dp == self.batch
        assert len(self.stages) == self.pp
        assert len(self.placement) == self.dp * self.tp * self.pp

    def __str__(self) -> str:
        """The mesh, the microbatches and each stage's segments; the choices inside stages are left out."""
        count = f"{self.microbatches} microbatch{'es' if self.microbatches > 1 else ''} of {self.microbatch_size}"
        mesh = f"dp={self.dp} x tp={self.tp} x pp={self.pp}"
        head = f"{mesh}, batch {self.batch}: {count} on each replica, {self.schedule}"
        return "\n".join([head, *(f"stage {stage}: {folded(self.labels(stage))}" for stage in range(self.pp))])

    def labels(self, stage: int) -> tuple[str, ...]:
        """Names of the segments that a stage runs, in order."""
        return self.segment_labels[self.stages[stage].first_segment : self.stages[stage].last_segment]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        raw = json.loads(text)
        if not isinstance(raw, dict) or "version" not in raw:
            raise ConfigError("not an autopar plan: no 'version' field; write one with plan.save(path)")
        if raw["version"] != SCHEMA_VERSION:
            raise PlanMismatchError("version", SCHEMA_VERSION, raw["version"])
        stages = tuple(StagePlan(**stage) for stage in raw.pop("stages"))
        labels, placement = tuple(raw.pop("segment_labels")), tuple(raw.pop("placement"))
        return Plan(**raw, stages=stages, segment_labels=labels, placement=placement)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Plan:
        return Plan.from_json(Path(path).read_text(encoding="utf-8"))


def folded(labels: Sequence[str]) -> str:
    """Labels in order, a run that counts up written once ("token, h.0..5, norm"), and so equal neighbours ("h x 3")."""
    runs = [list(run) for _, run in itertools.groupby(enumerate(labels), key=lambda item: _run_of(*item))]
    return ", ".join(_run_text([label for _, label in run]) for run in runs)


def split_number(label: str) -> tuple[str, int, str] | None:
    """What stands before the first part of a dotted name that is a number, the number, what stands after; else None."""
    found = _NUMBERED.fullmatch(label)
    return None if found is None else (found[1], int(found[2]), found[3])


def _run_of(position: int, label: str) -> tuple[str, int, str]:
    """Equal for neighbours in one run."""
    parts = split_number(label)
    return (label, 0, "") if parts is None else (parts[0], parts[1] - position, parts[2])


def _run_text(run: Sequence[str]) -> str:
    first, last = split_number(run[0]), split_number(run[-1])
    if len(run) == 1:
        return run[0]
    if first is None or last is None:
        return f"{run[0]} x {len(run)}"
    return f"{first[0]}{first[1]}..{last[1]}{first[2]}"
