"""Running statistics of batch norms as a trace can hold them: cumulative ones, and those of layers under a checkpoint.

``momentum=None`` weighs a batch by one over their number, a number that torch reads from the counter; here it is the
counter itself. ``torch.utils.checkpoint`` runs its layers again in backward, and statistics move twice, by the same
batch; a program runs them as often as the planner finds best, so that one call moves them as far as two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import checkpoint

from cost_model.errors import UnsupportedError

_runs = ContextVar("runs", default=1)
_GENERATOR = "_checkpoint_without_reentrant_generator"


@contextmanager
def checkpointed() -> Iterator[None]:
    """Around layers that one device runs again in backward, however many checkpoints are inside of each other."""
    token = _runs.set(2)
    try:
        yield
    finally:
        _runs.reset(token)


@contextmanager
def statistics_as_traced(model: nn.Module) -> Iterator[None]:
    """Meanwhile batch norms that train state what becomes of their statistics. Errors: UnsupportedError where layers
    under a checkpoint change other buffers, to which a second run does something else."""
    plain, generator = _BatchNorm.forward, getattr(checkpoint, _GENERATOR)

    def forward(norm: _BatchNorm, x: Tensor) -> Tensor:
        if not (norm.training and norm.track_running_stats and isinstance(norm.running_mean, Tensor)):
            return plain(norm, x)
        if norm.momentum is None:
            return _cumulative(norm, x, _runs.get())
        with mock.patch.object(norm, "momentum", 1 - (1 - norm.momentum) ** _runs.get()):
            made = plain(norm, x)
        if _runs.get() > 1 and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(_runs.get() - 1)
        return made

    def around(*args: Any, **kwargs: Any) -> Iterator[None]:
        with checkpointed(), _others_kept(model):
            yield from generator(*args, **kwargs)

    with ExitStack() as patched:
        for owner, name, instead in ((_BatchNorm, "forward", forward), (checkpoint, _GENERATOR, around)):
            patched.enter_context(mock.patch.object(owner, name, instead))
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


@contextmanager
def _others_kept(model: nn.Module) -> Iterator[None]:
    of_norms = {id(b) for m in model.modules() if isinstance(m, _BatchNorm) for b in m.buffers(recurse=False)}
    others = {name: buffer for name, buffer in model.named_buffers() if id(buffer) not in of_norms}
    before = {name: buffer._version for name, buffer in others.items()}
    yield
    changed = next((name for name, buffer in others.items() if buffer._version != before[name]), None)
    if changed is not None:
        raise UnsupportedError(
            f"forward changes {changed!r} under torch.utils.checkpoint, which one device runs once more in backward: "
            "change it outside of the checkpoint, or leave the checkpoint away (the planner decides what is recomputed)"
        )
