"""Running statistics of batch norms as a trace can hold them: cumulative ones, and those of layers under a checkpoint.

``momentum=None`` weighs a batch by one over their number, a number that torch reads from the counter; here it is the
counter itself. ``torch.utils.checkpoint`` runs its layers again in backward, and statistics move twice, by the same
batch; a program runs them as often as the planner finds best, so that one call moves them as far as two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from passes.checkpoints import Checkpoints


@contextmanager
def statistics_as_traced(model: nn.Module) -> Iterator[None]:
    """During a run of forward batch norms that train state what becomes of their statistics.

    Errors: UnsupportedError where checkpoints run layers again that change buffers in another way or order.
    """
    plain, checkpoints = _BatchNorm.forward, Checkpoints(model)

    def forward(norm: _BatchNorm, x: Tensor) -> Tensor:
        if not (norm.training and norm.track_running_stats and isinstance(norm.running_mean, Tensor)):
            return plain(norm, x)
        runs = checkpoints.runs(norm, x)
        if norm.momentum is None:
            return _cumulative(norm, x, runs)
        with mock.patch.object(norm, "momentum", 1 - (1 - norm.momentum) ** runs):
            made = plain(norm, x)
        if runs > 1 and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(runs - 1)
        return made

    with checkpoints.over(), mock.patch.object(_BatchNorm, "forward", forward):
        yield


def _cumulative(norm: _BatchNorm, x: Tensor, runs: int) -> Tensor:
    """A batch norm with ``momentum=None``: running statistics are means over all batches so far."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    norm._check_input_dim(x)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        dims = [dim for dim in range(x.dim()) if dim != 1]
        variance, mean = torch.var_mean(x, dims)
        for _ in range(runs):
            norm.num_batches_tracked.add_(1)
            share = 1.0 / norm.num_batches_tracked
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
            norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)
    return functional.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
