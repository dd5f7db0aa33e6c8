"""A model that plans in a moment, its batch, and an estimate of it with pins among the keywords."""

from __future__ import annotations

from typing import Any

import torch
from parity import SGD, cpu_cluster
from torch import Tensor, nn

import autopar

TWO = cpu_cluster(2)
BATCH = {"x": torch.ones(8, 8), "y": torch.zeros(8, 8)}


class Regression(nn.Module):
    """Two linears and a mean square error."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)

    def outputs(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        difference = self.outputs(x) - y
        return (difference * difference).mean()


def estimate(model: nn.Module, inputs: Any = None, cluster: Any = TWO, **keywords: Any) -> autopar.Estimate:
    keywords.setdefault("optimizer", SGD)
    pins = {name: keywords.pop(name) for name in list(keywords) if name in autopar.Parallelism.__dataclass_fields__}
    if pins:
        keywords["parallelism"] = autopar.Parallelism(**pins)
    return autopar.estimate(model, cluster, BATCH if inputs is None else inputs, **keywords)
