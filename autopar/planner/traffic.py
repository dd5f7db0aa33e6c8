"""Traffic: what the cells (stage, replica, shard) of a mesh do and send, wherever they lie."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """What cells do and send. stage_s: forward and backward of one microbatch on the fastest device, of one of equal
    stages, exchanges within it left out; sent_bytes: the activation of one microbatch, and its gradient, of one shard;
    reduced_bytes: gradients of one (stage, shard); exchanged_bytes: what a shard sends to the others of its stage for
    one microbatch; segments: of the model, one of which a stage has at least; meetings: how often replicas exchange
    something in a stage in one microbatch, for which stage_s has what the fastest links take; end_bytes: of the
    gradients those that the first and the last stage have whatever their shares; tied_bytes: of those of both,
    which they sum between them, a replica's part.
    """

    pp: int
    dp: int
    tp: int
    microbatches: int
    stage_s: float
    sent_bytes: float
    reduced_bytes: float
    exchanged_bytes: float = 0.0
    segments: float = math.inf
    meetings: float = 0.0
    end_bytes: tuple[float, float] = (0.0, 0.0)
    tied_bytes: float = 0.0

    @property
    def least_share(self) -> float:
        """Of an equal part of the model, what each stage has at least."""
        return 1.0 if self.pp == 1 else self.pp / max(self.pp, self.segments)

    @property
    def divided(self) -> float:
        """The part of all gradients that lie as stages' shares say."""
        return 1.0 - sum(self.end_bytes) / (self.pp * self.reduced_bytes) if any(self.end_bytes) else 1.0
