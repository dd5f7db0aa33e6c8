"""The planner's cases: GPT with attention that is not fused, in fp16, on the meta device; no weights are allocated.

Sizes: 1.3B and 6.7B as in GPT-3's table 2.1 (Brown et al., 2020), 39B, 175B and 1T as in table 1 of "Efficient
large-scale language model training on GPU clusters using Megatron-LM" (Narayanan et al., 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from reference_models import Shape, meta_model
from torch import nn

from cost_model.cluster import Cluster
from cost_model.parallelism import Parallelism

VOCABULARY = 51200


@dataclass(frozen=True)
class Case:
    """A model on a cluster. limit_s: seconds that planning may take, tracing included; gap: what it may leave open."""

    name: str
    layers: int
    hidden: int
    heads: int
    seq: int
    batch: int
    cluster: str
    devices: int
    memory_cap: str | None
    limit_s: float
    gap: float

    def model(self) -> tuple[nn.Module, dict[str, Any]]:
        shape = Shape(self.layers, self.hidden, self.heads, self.seq, VOCABULARY, dropout=False)
        return meta_model(shape, self.batch, torch.float16)

    def load_cluster(self) -> Cluster:
        return Cluster.load(self.cluster, self.devices)


CASES = (
    Case("1.3B", 24, 2048, 32, 1024, 1024, "dgx2-v100-32gb", 4, "30GiB", 5.0, 0.01),
    Case("6.7B", 32, 4096, 32, 1024, 1024, "dgx2-v100-32gb", 16, "30GiB", 10.0, 0.01),
    Case("39B", 48, 8192, 64, 1024, 1024, "p3.16xlarge", 64, None, 15.0, 0.01),
    Case("175B", 96, 12288, 96, 2048, 1536, "dgx-a100-80gb", 1024, None, 20.0, 0.02),
    Case("1T", 128, 25600, 160, 2048, 3072, "dgx-a100-80gb", 3072, None, 30.0, 0.02),
)
DEPTHS = tuple(
    Case(f"{layers} layers", layers, 2048, 32, 1024, 1024, "dgx2-v100-32gb", 16, "30GiB", 10.0, 0.01)
    for layers in (12, 24, 48, 96)
)
PUBLISHED = {
    "1T": (
        ("published", Parallelism(6, 8, 64, 0, "full", "1f1b", 1)),
        ("published, interleaved", Parallelism(6, 8, 64, 0, "full", "interleaved", 1, 2)),
    )
}
"""The plan of table 1 of Narayanan et al. (2021), whose section 5.1 recomputes activations."""
