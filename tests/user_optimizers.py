"""Optimizers as users write them, for tests/test_optim.py and tests/test_optimizer_price.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer


def by_ndim(parameters: list[nn.Parameter], **options: Any) -> Optimizer:
    """The usual two groups: matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=1e-3, betas=(0.9, 0.95), **options)


class Signed(Optimizer):
    """Lion's update; keeps an option outside its groups."""

    def __init__(self, params: Any, lr: float, *, sharpness: Any = 1.0) -> None:
        self.sharpness = sharpness
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.sub_(torch.tanh(self.sharpness * (0.9 * mean + 0.1 * p.grad)) * group["lr"])
                mean.lerp_(p.grad, 0.01)


class Renamed(AdamW):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Trusting(Optimizer):
    """LAMB's ratio of norms."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * (group["lr"] * p.norm() / p.grad.norm()))


class Collecting(Optimizer):
    """All updates before the first parameter changes."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            updates = [p.grad * group["lr"] for p in group["params"]]
            for p, update in zip(group["params"], updates, strict=True):
                p.sub_(update)


class Keeping(Optimizer):
    """Every update stays until the step is over, though nothing reads it again."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        updates = []
        for group in self.param_groups:
            for p in group["params"]:
                updates.append(p.grad * group["lr"])
                p.sub_(updates[-1])


class Adding(Optimizer):
    """One tensor that all parameters add to, and that is no parameter's state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.total = torch.zeros(())

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.total += p.grad.sum()
                p.sub_(p.grad * group["lr"])


class Replacing(Optimizer):
    """Makes its state anew in every step."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["mean"] = 0.9 * self.state[p].get("mean", 0) + p.grad
                p.sub_(self.state[p]["mean"] * group["lr"])


class Stacking(Optimizer):
    """Vectors one by one, all matrices in one go when the first one's turn comes."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        matrices = [p for group in self.param_groups for p in group["params"] if p.ndim == 2]
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim == 1:
                    p.sub_(p.grad * group["lr"])
                elif p is matrices[0]:
                    torch.stack([m.grad for m in matrices]).mul_(group["lr"])


class Clipping(Optimizer):
    """Divides all gradients by the norm of all of them."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        total = sum((p.grad * p.grad).sum() for p in parameters)
        for p in parameters:
            p.addcdiv_(p.grad, total)


class Limiting(SGD):
    """Clips by the norm of all gradients, which is rarely reached."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1e4)
        return super().step(closure)


class TwoPasses(Optimizer):
    """All means, then all parameters; nothing is kept in between."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p in parameters:
            self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.1)
        for p in parameters:
            p.sub_(self.state[p]["mean"])


class Favouring(Optimizer):
    """The first parameter decays."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for index, p in enumerate(p for group in self.param_groups for p in group["params"]):
            p.sub_(p.grad)
            if index == 0:
                p.mul_(0.9)


class Scaling(SGD):
    """Its groups do not hold the learning rate it was given."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["lr"] *= 10


class Peeking(Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p[p.grad.nonzero()] -= self.param_groups[0]["lr"]


class Splitting(Optimizer):
    """A group for every parameter, whatever groups it is given."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        groups = [{"params": [p]} for p in params[0]["params"]] if isinstance(params[0], dict) else params
        super().__init__(groups, {"lr": lr})


class MatricesDecay(SGD):
    """Weight decay by the number of dims: shards of a matrix decay as it does, its flattened pieces do not."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_((p.grad + 0.1 * p * (p.ndim > 1)) * group["lr"])


class Counting(SGD):
    """Slows down by a count that it keeps in its groups."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.setdefault("count", 0)

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
            given, group["lr"] = group["lr"], group["lr"] / group["count"]
            super().step()
            group["lr"] = given
