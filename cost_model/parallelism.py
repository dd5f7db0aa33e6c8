"""What a user may pin of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cost_model.errors import ParallelismError
from cost_model.mesh import Degree, of_stages

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")


RECOMPUTES = ("none", "selective", "full")


@dataclass(frozen=True)
class Parallelism:
    """Pins on the plan; None leaves a field to the planner. Degrees multiply to the number of devices.

    dp, tp: of all stages, or of each, in order: ``tp=(2, 4)`` is a stage of 2 shards that feeds one of 4.
    microbatch_size: samples per microbatch per data-parallel replica (of the first stage, where replicas differ).
    window: microbatches that 1f1b has under way for each stage that comes after (see ``stage_schedule``).
    tp_axes: the axes that tp consists of, the outermost first; each op is split along one factor on each.
    placement: device index of each (stage, dp replica, tp shard), in that order.
    dp_inner: replicas of so many neighbours sum their gradients among themselves before they sum them with others.
    overlap: whether collectives move behind compute: parameters are gathered ahead, gradients reduced as they complete.
    """

    dp: Degree | None = None
    tp: Degree | None = None
    pp: int | None = None
    zero: int | None = None
    recompute: str | None = None
    schedule: str | None = None
    microbatch_size: int | None = None
    virtual_stages: int | None = None
    window: int | None = None
    sequence_parallel: bool | None = None
    placement: tuple[int, ...] | None = None
    overlap: bool | None = None
    tp_axes: tuple[int, ...] | None = None
    dp_inner: int | None = None

    def __post_init__(self) -> None:
        self._check_degrees()
        for name in ("pp", "microbatch_size", "virtual_stages", "window", "dp_inner"):
            value = getattr(self, name)
            if value is not None and not is_count(value):
                raise ParallelismError(f"{name} must be a positive integer or None, not {value!r}")
        if self.zero not in (None, 0, 1, 2, 3):
            raise ParallelismError(f"zero must be 0, 1, 2, 3 or None, not {self.zero!r}")
        for name, value, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("recompute", self.recompute, RECOMPUTES),
        ):
            if value is not None and value not in known:
                raise ParallelismError(f"{name} must be one of {', '.join(known)} or None, not {value!r}")
        if self.schedule not in (None, "interleaved") and self.virtual_stages not in (None, 1):
            raise ParallelismError(
                f"schedule={self.schedule!r} has one virtual stage on each stage, not {self.virtual_stages}; "
                "use schedule='interleaved', or virtual_stages=1"
            )
        if self.virtual_stages not in (None, 1):
            object.__setattr__(self, "schedule", "interleaved")
        if self.window not in (None, 1):
            if self.schedule not in (None, "1f1b"):
                raise ParallelismError(
                    f"schedule={self.schedule!r} has no window of {self.window}; use schedule='1f1b', or window=1"
                )
            object.__setattr__(self, "schedule", "1f1b")
        if self.placement is not None:
            object.__setattr__(self, "placement", whole_numbers("placement", "device numbers", self.placement))
        if self.tp_axes is not None:
            self._check_axes()

    def _check_axes(self) -> None:
        """Axes of two ranks and more that multiply to tp, which they say where it is not pinned itself."""
        axes = whole_numbers("tp_axes", "degrees", self.tp_axes)
        if self.meshes_differ:
            raise ParallelismError(
                "stages with meshes of their own have one tp axis each; use one dp and tp for all stages"
            )
        if not axes or min(axes) < 2:
            raise ParallelismError(f"tp_axes must be degrees of 2 and more or None, not {self.tp_axes!r}")
        if self.tp not in (None, math.prod(axes)):
            raise ParallelismError(
                f"tp_axes={axes} multiply to {math.prod(axes)}, not to tp={self.tp}; drop one of them"
            )
        object.__setattr__(self, "tp_axes", axes)
        object.__setattr__(self, "tp", math.prod(axes))

    def _check_degrees(self) -> None:
        """Degrees of single stages say how many stages there are; equal ones are one number."""
        for name in ("dp", "tp"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list):
                if value is not None and not is_count(value):
                    raise ParallelismError(f"{name} must be a positive integer or None, not {value!r}")
                continue
            if not value or not all(map(is_count, value)):
                raise ParallelismError(f"{name} must be a positive integer for each stage, not {value!r}")
            if self.pp not in (None, len(value)):
                raise ParallelismError(f"{name}={tuple(value)} is of {len(value)} stage(s), not pp={self.pp}")
            object.__setattr__(self, "pp", len(value))
            object.__setattr__(self, name, of_stages(value))
        if self.meshes_differ and (self.schedule == "interleaved" or self.virtual_stages not in (None, 1)):
            raise ParallelismError(
                "virtual stages need stages of equal meshes: their parts go around all of them; use one dp and one tp "
                "for all stages, or virtual_stages=1"
            )

    @property
    def meshes_differ(self) -> bool:
        """Whether stages are pinned to meshes of their own."""
        return isinstance(self.dp, tuple) or isinstance(self.tp, tuple)


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def whole_numbers(name: str, what: str, given: object) -> tuple[int, ...]:
    whole = isinstance(given, Sequence) and not isinstance(given, str)
    if not whole or any(not isinstance(d, int) or isinstance(d, bool) for d in given):  # type: ignore[attr-defined]
        raise ParallelismError(f"{name} must be a list of {what} or None, not {given!r}")
    return tuple(given)  # type: ignore[arg-type]
