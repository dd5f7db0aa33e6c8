"""Real kernels and fake ones lay results alike, once operands are laid out as passes/layouts.py has them."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from op_draws import CALLS
from op_examples import Seeded
from parity import check_parity
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.layer_vocabulary import DIFFERENTIABLE
from passes.layouts import LAYOUTS

aten = torch.ops.aten
Tensor = torch.Tensor
_CHECKED_BY_LAYOUT = ("aten.view", "aten._unsafe_view")
"""Ops that refuse operands that do not lie as they need."""


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _layout(t: Tensor) -> tuple[int, ...]:
    return tuple(s for s, extent in zip(t.stride(), t.shape, strict=True) if extent > 1) if t.numel() > 1 else ()


@functools.cache
def _fake_mode() -> FakeTensorMode:
    """One for all calls: to make it takes as long as a call."""
    return FakeTensorMode()


def _differ(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether fake tensors of the operands give results that lie otherwise than the real ones."""
    if not _tensors(result) or {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
        return False
    mode = _fake_mode()
    fake_args, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
    with mode:
        fake = func(*fake_args, **fake_kwargs)
    return any(_layout(r) != _layout(f) for r, f in zip(_tensors(result), _tensors(fake), strict=True))


class Compared(TorchDispatchMode):
    """Runs each call for real and under fake tensors, as it comes and as the table has it.

    as_given, as_laid_out: ops whose results lie otherwise than fake tensors tell.
    """

    def __init__(self) -> None:
        super().__init__()
        self.as_given: set[str] = set()
        self.as_laid_out: set[str] = set()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls += 1
        if not _differ(func, args, kwargs, result):
            return result
        self.as_given.add(str(func))
        with self:
            laid_out = LAYOUTS[func](*args, **kwargs) if func in LAYOUTS else NotImplemented
        if laid_out is NotImplemented:
            self.as_laid_out.add(str(func))
        return result


def _relaid(t: Tensor, rng: random.Random) -> Tensor:
    """The same values in memory in another order of dims."""
    order = rng.sample(range(t.dim()), t.dim())
    return t.permute(order).contiguous().permute([order.index(d) for d in range(t.dim())])


def _compared(seeds: int) -> Compared:
    """torch's ops, forward and backward, on operands that lie in random orders of their dims."""
    rng, compared = random.Random(0), Compared()
    for name in (n for n in CALLS if n.startswith("aten.") and not n.startswith(_CHECKED_BY_LAYOUT)):
        _, packet, overload = name.split(".")
        op = getattr(getattr(aten, packet), overload)
        for seed in range(seeds):
            made = CALLS[name](Seeded(seed))
            args, kwargs = (made[:-1], made[-1]) if made and isinstance(made[-1], dict) else (made, {})
            args, kwargs = tree_map_only(Tensor, lambda t: _relaid(t, rng), (tuple(args), kwargs))
            _step(compared, op, args, kwargs)
    return compared


def _step(compared: Compared, op: Any, args: Any, kwargs: Any) -> None:
    rng = random.Random(1)
    given = [a for arg, a in zip(op._schema.arguments, args, strict=False) if arg.name != "target"]
    leaves = [t.requires_grad_() for t in _tensors(given) if t.is_floating_point() and t.dim() > 1]
    with compared:
        outputs = [o for o in _tensors(DIFFERENTIABLE.get(op, op)(*args, **kwargs)) if o.requires_grad]
        if outputs and leaves:
            gradients = [_relaid(torch.randn_like(o), rng) for o in outputs]
            torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)


@pytest.mark.parametrize(
    ("seeds", "differing"),
    [
        (1, {"aten.elu_backward.default", "aten.native_batch_norm_backward.default"}),
        pytest.param(
            2,
            {"aten.softplus_backward.default", "aten._log_softmax_backward_data.default"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_layouts_agree_once_operands_are_laid_out(seeds: int, differing: set[str]) -> None:
    compared = _compared(seeds)
    assert not compared.as_laid_out and compared.calls > 2000 * seeds
    assert differing <= compared.as_given


class _Gated(nn.Module):
    """Gates of which the gradient arrives transposed, one half of a projection that goes on as the other half does."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        gate, value = self.project(x).view(batch, length, 2, 8).chunk(2, -1)
        gate = nn.functional.softplus(gate.reshape(batch, length, 8)).transpose(1, 2)
        return (gate.cumsum(-1) * value.reshape(batch, length, 8).transpose(1, 2)).mean()


def test_a_gradient_that_arrives_transposed(thread_ranks: None) -> None:  # noqa: F811
    torch.manual_seed(0)
    check_parity(_Gated(), {"x": torch.randn(4, 6, 8)}, 2, 1e-5, dp=2, tp=1, pp=1)
