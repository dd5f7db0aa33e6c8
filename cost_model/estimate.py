"""The estimate: time and memory of the program that will run, in parts that sum to the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cost_model.plan import Plan


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes on each device of a stage at its peak; the parts sum to ``total_bytes``.

    parameters: weights and buffers; gradients: accumulation buffers; optimizer_state; master: copies of parameters in
    another dtype, which the optimizer updates;
    inputs: the batch and step constants; saved: activations of the microbatches in flight at the peak;
    transient: what is alive besides at the peak (temporaries, communication buffers, workspaces);
    rounding: what the allocator adds.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    inputs: int
    saved: int
    transient: int
    rounding: int
    master: int = 0

    @property
    def total_bytes(self) -> int:
        return self.static_bytes + self.saved + self.transient + self.rounding

    @property
    def static_bytes(self) -> int:
        """What is held during the whole step, unrounded."""
        return self.parameters + self.master + self.gradients + self.optimizer_state + self.inputs


@dataclass(frozen=True)
class StageEstimate:
    """forward_s, backward_s: one microbatch, in all virtual stages, exposed tensor-parallel communication included.
    op_kinds_s: seconds per step by op kind (collectives under their own names). Where ranks share cores, while all
    compute."""

    stage: int
    forward_s: float
    backward_s: float
    reduce_s: float
    optimizer_s: float
    memory: MemoryBreakdown
    op_kinds_s: Mapping[str, float] = field(hash=False)

    @property
    def peak_bytes(self) -> int:
        return self.memory.total_bytes


@dataclass(frozen=True)
class TimeBreakdown:
    """Seconds of one step on the rank that finishes last; the parts sum to the step time.

    compute: forward and backward ops; communication: exposed collectives and transfers inside the schedule;
    bubble: waiting for other stages; reduction: exposed gradient reduction; optimizer; other: driving overhead.
    """

    compute_s: float
    communication_s: float
    bubble_s: float
    reduction_s: float
    optimizer_s: float
    other_s: float

    @property
    def total_s(self) -> float:
        return (
            self.compute_s + self.communication_s + self.bubble_s + self.reduction_s + self.optimizer_s + self.other_s
        )


@dataclass(frozen=True)
class Estimate:
    """gap: of the search's best plan, by price, above a bound on the prices of all plans under the pinned schedule, or
    under 1f1b; 0 where no such plan has a lower one, infinite where nothing was searched. The plan is that one, or one
    that the simulator found faster (a note says so)."""

    step_time_s: float
    peak_bytes: int
    stages: tuple[StageEstimate, ...]
    breakdown: TimeBreakdown
    notes: tuple[str, ...]
    plan: Plan
    search_s: float
    gap: float
