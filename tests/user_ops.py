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


@project.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@project_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@centre.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] = project_backward(grad, *ctx.saved_tensors)
    return made


project.register_autograd(_backward, setup_context=_keep)
centre.register_autograd(lambda ctx, grad: centre(grad))
