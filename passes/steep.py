"""Steep: calls that are not defined, or not smooth, for all that a row may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

aten = torch.ops.aten
STEEP: dict[Any, Mapping[str, float]] = {
    aten.div.Tensor: {"other": 1},
    aten.div.Tensor_mode: {"other": 1},
    aten.reciprocal.default: {"self": 1},
    aten.sqrt.default: {"self": 1},
    aten.rsqrt.default: {"self": 1},
    aten.log.default: {"self": 1},
    aten.log2.default: {"self": 1},
    aten.log10.default: {"self": 1},
    aten.log1p.default: {"self": 1},
    aten.logit.default: {"self": 0.5},
    aten.xlogy.Tensor: {"self": 1, "other": 1},
    aten.pow.Tensor_Scalar: {"self": 1},
    aten.pow.Tensor_Tensor: {"self": 1, "exponent": 1},
    aten.acos.default: {"self": 0},
    aten.asin.default: {"self": 0},
    aten.atanh.default: {"self": 0},
    aten.acosh.default: {"self": 2},
    aten.erfinv.default: {"self": 0},
    aten.atan2.default: {"self": 1, "other": 1},
    aten.hypot.default: {"self": 1, "other": 1},
    aten.linalg_vector_norm.default: {"self": 1},
    aten.norm.ScalarOpt_dim: {"self": 1},
    aten.cosine_similarity.default: {"x1": 1, "x2": 1},
    aten.pairwise_distance.default: {"x1": 1, "x2": 2},
    aten.dist.default: {"self": 1, "other": 2},
    aten.gather.default: {"index": 0},
    aten.take_along_dim.default: {"indices": 0},
    aten.embedding.default: {"indices": 0},
    aten.embedding_bag.default: {"indices": 0},
    aten.one_hot.default: {"self": 0},
}
"""Operands whose values or slopes are not finite everywhere, or that are places: what rows that are not picked hold
there instead, by argument. No gradient goes back through what is filled."""
MAY_FAIL = ("linalg_", "cholesky", "inverse", "triangular_solve", "lu_", "det", "logdet", "slogdet", "pinverse")
"""Calls that raise for some matrices, as one of equal numbers."""
