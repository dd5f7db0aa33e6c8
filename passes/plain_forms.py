"""Plain forms: ops as calls of other ops, where torch has no such form of them that a trace can hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _weighed(added: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    """What is added counts for nothing where ``beta`` is 0, even if it is no number."""
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else added * beta + product


def _addmv(self: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _weighed(self, torch.mv(mat, vec), beta, alpha)


def _addbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """One product of matrices whose common dim is that of all matrices one behind the other."""
    product = batch1.transpose(0, 1).flatten(1) @ batch2.flatten(0, 1)
    return _weighed(self, product, beta, alpha)


def _dist(self: Tensor, other: Tensor, p: float = 2) -> Tensor:
    made: Tensor = torch.linalg.vector_norm(self - other, p)
    return made


def _sinc(x: Tensor) -> Tensor:
    """With a slope of zero at zero, where torch's form of it has none."""
    turned = x * math.pi
    is_flat = turned * x == 0
    apart = torch.where(is_flat, 1.0, turned)
    return torch.where(is_flat, 1.0, apart.sin() / apart)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Norms of each place along ``dim``: torch's form takes one of a whole vector."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    norm = torch.linalg.vector_norm(v, 2, others, keepdim=True) if others else v.abs()
    return v * (g / norm), norm


def _rounded(
    x: Tensor, scale: float | Tensor, zero_point: int | Tensor, least: int, most: int
) -> tuple[Tensor, Tensor]:
    """x in steps of a scale, and where it is in range, which its gradient passes as it is."""
    placed = (x.detach() * (1.0 / scale)).round() + zero_point
    inside = (placed >= least) & (placed <= most)
    made = (placed.clamp(least, most) - zero_point) * scale
    return made + torch.where(inside, x - x.detach(), 0.0), inside


def _rounded_by_channel(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, least: int, most: int
) -> tuple[Tensor, Tensor]:
    along = [-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())]
    return _rounded(x, scale.view(along), zero_point.view(along), least, most)


def _margins_of_labels(x: Tensor, labels: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """multilabel_margin_loss: labels of a row count up to its first -1; each against each class that is no label."""
    counts = (labels >= 0).long().cumprod(-1).bool()
    classes = torch.arange(x.shape[-1], device=x.device)
    chosen = ((labels.unsqueeze(-1) == classes) & counts.unsqueeze(-1)).any(-2)
    at_labels = x.gather(-1, labels.clamp(min=0)).unsqueeze(-1)
    against = counts.unsqueeze(-1) & ~chosen.unsqueeze(-2)
    each = torch.where(against, (1 - at_labels + x.unsqueeze(-2)).clamp(min=0), 0.0).sum((-2, -1)) / x.shape[-1]
    return (each, each.mean(), each.sum())[reduction], chosen.to(x.dtype)


def _distances_of_pairs(x: Tensor, p: float = 2) -> Tensor:
    """pdist: of each row to each behind it."""
    count = x.shape[0]
    each = torch.cdist(x, x, p, compute_mode="donot_use_mm_for_euclid_dist").flatten()
    rows, columns = torch.triu_indices(count, count, 1, device=x.device).unbind(0)
    return each.index_select(0, rows * count + columns)


def _places_repeated(repeats: Tensor, *, output_size: int) -> Tensor:
    """Each place as often as it is repeated."""
    places = torch.arange(output_size, dtype=repeats.dtype, device=repeats.device)
    return torch.searchsorted(repeats.cumsum(0), places, right=True)


def _renormed(self: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """embedding_renorm: rows that occur are scaled to ``max_norm`` where theirs is larger."""
    places = indices.flatten()
    occurs = self.new_zeros(self.shape[0]).index_add(0, places, self.new_ones(places.shape)) > 0
    norms = torch.linalg.vector_norm(self, norm_type, 1)
    scale = torch.where(occurs & (norms > max_norm), max_norm / (norms + 1e-7), 1.0)  # as torch's kernels do
    return self * scale.unsqueeze(1)


PLAIN_FORMS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.sinc.default: _sinc,
    torch.ops.aten._weight_norm_interface.default: _weight_norm,
    torch.ops.aten.fake_quantize_per_tensor_affine_cachemask.default: _rounded,
    torch.ops.aten.fake_quantize_per_channel_affine_cachemask.default: _rounded_by_channel,
    torch.ops.aten.multilabel_margin_loss_forward.default: _margins_of_labels,
    torch.ops.aten.addmv.default: _addmv,
    torch.ops.aten.addbmm.default: _addbmm,
    torch.ops.aten.dist.default: _dist,
    torch.ops.aten._pdist_forward.default: _distances_of_pairs,
    torch.ops.aten.repeat_interleave.Tensor: _places_repeated,
    torch.ops.aten.embedding_renorm.default: _renormed,
}
"""What torch has no such form of."""
