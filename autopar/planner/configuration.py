"""Configurations: what a search fixes before it asks for the best stages."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.planner.bounds import Objective


@dataclass(frozen=True)
class Configuration:
    """Mesh degrees, schedule and microbatching. microbatches: per data-parallel replica.

    virtual_stages: into so many parts the stages that are searched for are cut again. window: as in ``stage_schedule``.
    tp_axes: those that tp consists of, None where it is one. dp_inner: as in ``Plan``. zero: level of all parameters,
    None where each has what was chosen for it. crowding: ranks per core where they share cores.
    """

    dp: int
    tp: int
    pp: int
    schedule: str
    microbatch_size: int
    microbatches: int
    virtual_stages: int = 1
    window: int = 1
    tp_axes: tuple[int, ...] | None = None
    dp_inner: int = 1
    zero: int | None = None
    crowding: float = 1.0

    @property
    def objective(self) -> Objective:
        """What a step takes. Of what 1f1b waits zero_bubble waits a third where forward, backward and the gradients of
        parameters take equally long, else more (Qi et al., 2023, "Zero bubble pipeline parallelism", 2.3); interleaved
        waits one virtual stage's part of it."""
        part = 1 / 3 if self.schedule == "zero_bubble" else 1 / self.virtual_stages
        return Objective(self.pp, self.microbatches, part, self.crowding)
