"""Layouts: operands laid out plainly where torch's fake kernels would tell another layout than the real ones give.

A trace decides by how a value lies whether a reshape of it is a view or a copy. For most ops torch's fake kernels and
its real ones agree; for those listed here they do only where every operand is contiguous (or every one channels last).
tests/test_layouts.py compares the two for each op of the table, in both directions, over random layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

aten = torch.ops.aten
_ALIKE = (
    aten.softplus_backward.default,
    aten.hardswish_backward.default,
    aten.hardsigmoid_backward.default,
    aten.hardtanh_backward.default,
    aten.elu_backward.default,
    aten.leaky_relu_backward.default,
    aten.threshold_backward.default,
    aten.logit_backward.default,
    aten.copysign.Tensor,
    aten.xlogy.Tensor,
    aten.native_batch_norm.default,
    aten.native_batch_norm_backward.default,
)
"""Right where all operands are channels last, too."""
_PLAIN = (
    aten.native_layer_norm_backward.default,
    aten._log_softmax_backward_data.default,
    aten.native_dropout_backward.default,
    aten.log_sigmoid_forward.default,
    aten.mse_loss_backward.default,
    aten.smooth_l1_loss_backward.default,
    aten.huber_loss_backward.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_backward.default,
    aten.glu_backward.default,
    aten.roll.default,
    aten.index.Tensor,
    aten.div.Tensor_mode,
    aten.pow.Scalar,
    aten.angle.default,
    aten.reflection_pad2d_backward.default,
    aten.replication_pad2d_backward.default,
)
"""Right where all operands are contiguous."""


def _tensors(args: tuple[Any, ...]) -> list[torch.Tensor]:
    return [a for a in args if isinstance(a, torch.Tensor)]


def _channels_last(t: torch.Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def _laid_out(op: Any, *, alike: bool) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        """The op on contiguous operands; NotImplemented, which is the op itself, where they are well as they are."""
        wide = [t for t in _tensors(args) if t.dim() > 1]
        if all(t.is_contiguous() for t in wide) or (alike and all(_channels_last(t) for t in wide)):
            return NotImplemented
        plain = (a.contiguous() if isinstance(a, torch.Tensor) else a for a in args)
        return op(*plain, **kwargs)

    return call


LAYOUTS: Mapping[Any, Callable[..., Any]] = {
    **{op: _laid_out(op, alike=True) for op in _ALIKE},
    **{op: _laid_out(op, alike=False) for op in _PLAIN},
}
"""``make_fx(decomposition_table=...)``: op -> the same op on operands whose layout settles that of the result."""
