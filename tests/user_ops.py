"""Ops of a user's own, as a library defines them: with a backward, and one whose rule is easily got wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("user_ops::project", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    """x [b, s, d], weight [e, d] -> [b, s, e]."""
    return torch.einsum("bsd,ed->bse", x, weight)


@torch.library.custom_op("user_ops::project_backward", mutates_args=())
def project_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.einsum("bse,ed->bsd", grad, weight), torch.einsum("bse,bsd->ed", grad, x)


@torch.library.custom_op("user_ops::centre", mutates_args=())
def centre(x: Tensor) -> Tensor:
    """x less its mean over the last dim."""
    return x - x.mean(-1, keepdim=True)


@torch.library.custom_op("user_ops::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    """Without a backward."""
    return x.round()


@torch.library.custom_op("user_ops::paired", mutates_args=())
def paired(x: Tensor) -> Tensor:
    """x [b, s], b even: pairs of rows change places."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


@torch.library.custom_op("user_ops::ctc", mutates_args=())
def ctc(likely: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    """likely [t, b, c] logarithms, labels [b, s] of which the first of ``lengths`` [b] count -> [b]."""
    return torch.ops.aten._ctc_loss.Tensor(likely, labels, _steps(likely), lengths)[0]


@torch.library.custom_op("user_ops::ctc_backward", mutates_args=())
def ctc_backward(grad: Tensor, likely: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    given = (likely, labels, _steps(likely), lengths)
    loss, forward = torch.ops.aten._ctc_loss.Tensor(*given)
    return torch.ops.aten._ctc_loss_backward.Tensor(grad, *given, loss, forward, 0)


def _steps(likely: Tensor) -> Tensor:
    return torch.full((likely.shape[1],), likely.shape[0])


@ctc.register_fake
def _(likely: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    return likely.new_empty(likely.shape[1])


@ctc_backward.register_fake
def _(grad: Tensor, likely: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    return torch.empty_like(likely)


@project.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@project_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@centre.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] = project_backward(grad, *ctx.saved_tensors)
    return made


def _ctc_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return ctc_backward(grad, *ctx.saved_tensors), None, None


ctc.register_autograd(_ctc_gradient, setup_context=_keep)
project.register_autograd(_backward, setup_context=_keep)
centre.register_autograd(lambda ctx, grad: centre(grad))


@torch.library.custom_op("user_ops::added", mutates_args=())
def added(values: list[Tensor], bias: Tensor, *, scale: float) -> Tensor:
    return torch.stack(values).sum(0) * scale + bias


@added.register_fake
def _(values: list[Tensor], bias: Tensor, *, scale: float) -> Tensor:
    return torch.empty_like(values[0])
