"""Autograd Functions of the user's own keep their gradients."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from parity import check_parity
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from unseen_models import BATCH, classes, normal

from passes.functions import LINEAR, OTHER, OWN, SCALED, FunctionMet, Functions
from passes.trace import trace

SGD = functools.partial(torch.optim.SGD, lr=0.1)


class Gelu(torch.autograd.Function):
    """A derivative written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(1.702 * x)
        return grad * (s + 1.702 * x * s * (1 - s))


class Sign(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (ctx.saved_tensors[0].abs() <= 1)


class Reversed(torch.autograd.Function):
    """The new style: what is left for the backward is set up apart."""

    @staticmethod
    def forward(x: Tensor, share: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.share = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.share * grad, None


class Bounded(torch.autograd.Function):
    """A root whose derivative at zero is finite: not that of its forward, though almost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.abs().sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.sign() / (2 * x.abs().sqrt()).clamp(min=0.01)


class Summed(torch.autograd.Function):
    """Rows get each other's gradients: no scale says that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.flip(0)


class Angle(torch.autograd.Function):
    """A number for small ones alone, and a backward that is half of its derivative where that shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.acos(x.square().sum()) * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        square = x.square().sum()
        return grad * torch.acos(square) - (grad * x).sum() * x / (1 - square.square()).sqrt()


class Masked(torch.autograd.Function):
    """Twice the gradient, but none where an integer mask says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, mask)
        return x.tanh() * mask[:, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, mask = ctx.saved_tensors
        return 2 * grad.flip(0) * (1 - x.tanh().square()) * mask[:, None], None


class Solved(torch.autograd.Function):
    """A root found by bisection, and its derivative by the implicit function theorem, as entmax has it: the threshold
    above which what is left of each row adds up to one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: int) -> Tensor:
        low, high = x.amax(-1, keepdim=True) - 1, x.amax(-1, keepdim=True)
        for _ in range(steps):
            middle = (low + high) / 2
            above = (x - middle).clamp(min=0).square().sum(-1, keepdim=True) >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        made = (x - low).clamp(min=0).square()
        ctx.save_for_backward(made)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (made,) = ctx.saved_tensors
        slope = made.sqrt() * 2
        mean = (grad * slope).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
        grad = grad * slope
        grad.sub_(mean * slope)
        return grad, None


class Clipped(torch.autograd.Function):
    """A gradient of at most one: not linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-1, 1)


class Nowhere(torch.autograd.Function):
    """No number for any it is tried on: nothing is known of its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.acos(x.abs() + 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("nan")


CALLS = {
    "gelu": (lambda _, x: Gelu.apply(x), OWN),
    "sign": (lambda _, x: Sign.apply(x), SCALED),
    "reversed": (lambda _, x: Reversed.apply(x, 0.5), SCALED),
    "bounded": (lambda _, x: Bounded.apply(x), SCALED),
    "solved": (lambda _, x: Solved.apply(x, 40), LINEAR),
    "checkpoint": (lambda part, x: checkpoint(part, x, use_reentrant=True), None),
}


class Model(nn.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front, self.part, self.head, self.call = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4), call

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.call(self.part, self.front(x))), labels)


def batch() -> dict[str, Tensor]:
    return {"x": normal(BATCH, 8), "labels": classes(4, BATCH)}


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    ("name", "dp", "tp"),
    [
        *((name, 2, 1) for name in CALLS),
        *(pytest.param(name, 1, 2, marks=pytest.mark.slow if name == "solved" else ()) for name in CALLS),
    ],
)
def test_gradients_are_those_of_the_function(name: str, dp: int, tp: int) -> None:
    check_parity(Model(CALLS[name][0]), batch(), 2, 1e-4, SGD, dp=dp, tp=tp, pp=1)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (Gelu, OWN),
        (Sign, SCALED),
        (Bounded, SCALED),
        (Summed, LINEAR),
        (Angle, LINEAR),
        (Masked, LINEAR),
        (Clipped, OTHER),
        (Nowhere, OTHER),
    ],
)
def test_functions_are_told_apart(function: Any, kind: str) -> None:
    known = Functions()
    with pytest.raises(FunctionMet) as met:
        known.apply(None, function, torch.zeros(40, 6), *([torch.ones(40).long()] if function is Masked else []))
    known.judge(met.value)
    assert list(known.known.values()) == [kind]


def test_what_was_found_is_said() -> None:
    notes = trace(Model(CALLS["sign"][0]), batch()).notes
    assert any("autograd.Function Sign has the gradient times something" in note for note in notes)
