"""Transposed: a Function whose backward is any linear map of the gradient (implicit differentiation, a router's
midpoint rule), as calls that a trace sees.

With B(g) what backward makes of a gradient g, and Bt its transpose, the value is f(x) + Bt(x - x), the second x
detached: Bt is linear, so what is added is zero, and its gradient is B(g). Bt(v) is the slope of B(g) v along g, which
autograd finds: two backwards make a forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from passes.unmutate import unmutate

Forward = Callable[[Any, Sequence[Any]], tuple[Any, Any]]
"""Of a Function and its arguments: the output, and what is left for the backward."""


def with_transposed(cls: Any, forward: Forward, args: Sequence[Any], changes: Sequence[Tensor | None]) -> Any:
    """(output, Bt of changes); ``args``: detached; ``changes``: of each argument, None where it has no gradient."""
    output, context = forward(cls, args)
    with torch.enable_grad():
        gradient = torch.zeros_like(output, requires_grad=True)
        made = inspect.unwrap(cls.backward)(context, gradient)
        given = zip(made if isinstance(made, tuple) else (made,), changes, strict=False)
        pairs = [(own, change) for own, change in given if isinstance(own, Tensor) and isinstance(change, Tensor)]
        own, along = ([pair[place] for pair in pairs] for place in (0, 1))
        (slope,) = torch.autograd.grad(own, [gradient], along, create_graph=torch.is_grad_enabled())
    return output, slope


def recorded(cls: Any, forward: Forward, described: Sequence[Any]) -> fx.GraphModule:
    """``with_transposed`` as a graph of the tensors among the arguments and of their changes, in this order.

    described: (shape, dtype) for a tensor, any other argument itself.
    """

    def run(*tensors: Tensor) -> Any:
        given, changes = iter(tensors[: len(tensors) // 2]), iter(tensors[len(tensors) // 2 :])
        own = [next(given).detach() if is_described(d) else d for d in described]
        moved = [next(changes) if is_described(d) else None for d in described]
        return with_transposed(
            cls, forward, own, [m if m is not None and m.is_floating_point() else None for m in moved]
        )

    with FakeTensorMode():
        shapes = [d for d in described if is_described(d)]
        made = make_fx(run)(*(torch.empty(shape, dtype=dtype) for shape, dtype in (*shapes, *shapes)))
    unmutate(made.graph)
    made.graph.eliminate_dead_code()
    return made


def is_described(value: Any) -> bool:
    """Whether it stands for a tensor."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.dtype)
