"""Loss scaling: gradients of fp16 kept within its range, as torch.amp.GradScaler does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INITIAL, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""The defaults of torch.amp.GradScaler."""


class LossScaler:
    """scale: what the loss is multiplied by; steps: updates in a row that found no infinite gradient; found: a number
    above 0 where some gradient was infinite or NaN."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL, device=device)
        self.steps = 0
        self.found = torch.zeros((), device=device)
        self.skipped = False

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the scale, and look for what is not finite among them."""
        self.found.zero_()
        inverse = self.scale.double().reciprocal().float()
        for gradient in gradients:
            torch._amp_foreach_non_finite_check_and_unscale_([gradient], self.found, inverse)

    def adjust(self) -> bool:
        """The scale of the next step; whether this one's update is skipped."""
        self.skipped = bool(self.found)
        self.steps = 0 if self.skipped else self.steps + 1
        if self.skipped:
            self.scale.mul_(BACKOFF)
        elif self.steps == INTERVAL:
            self.steps = 0
            self.scale.copy_(torch.nan_to_num(self.scale * GROWTH, posinf=float(self.scale)))
        return self.skipped

    def state(self) -> tuple[float, int]:
        return float(self.scale), self.steps

    def load(self, state: Sequence[float]) -> None:
        """Inverse of ``state``."""
        self.scale.fill_(state[0])
        self.steps = int(state[1])
