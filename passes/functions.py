"""Functions: autograd Functions of the user's own, whose backward a trace does not see, as calls that it does.

Where a Function's backward is the derivative of its forward (a hand-written GELU), its forward is traced as any other
code. Where it is the incoming gradient times something (a straight-through estimator, a reversed or bounded gradient),
the value is joined by a zero of that gradient: f(x) + (x - x) times it, the second x and what it is times detached.
Where it is another linear map of the gradient, by a zero that the transposed map makes (``passes.transposed``).
Which of these holds is found by running the Function on small random tensors, outside of the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from cost_model.errors import AutoparError, UnsupportedError
from passes.transposed import is_described, recorded, with_transposed

_EXTENT = 12
"""No dim of the tensors that a Function is tried on is longer."""
_SCALES = (1.0, 0.1, 1e-6, 100.0)
"""Of the random tensors, of which every third number is zero: a backward may bound what it returns, and a forward be
defined for small numbers alone."""
_RELATIVE = 1e-4
_ABSOLUTE = {torch.float64: 1e-12}
"""How far values may differ: relative to the tensor's largest, and at least (1e-6 in other dtypes)."""
_REGISTERED = "torch._library.autograd"
"""Where backwards of registered ops live: calls of such an op are traced whole, and their backward with them."""
OWN, SCALED, LINEAR, OTHER = "own", "scaled", "linear", "other"


class FunctionMet(AutoparError):
    """A trace met a Function that nobody has tried yet, or not on tensors of these shapes."""

    def __init__(self, cls: Any, args: Sequence[Any]) -> None:
        super().__init__(f"{cls.__qualname__} has not been tried")
        self.cls, self.args_met = cls, tuple(args)


class Context:
    """What a Function's forward leaves for its backward."""

    def __init__(self, args: Sequence[Any]) -> None:
        self.saved_tensors: tuple[Any, ...] = ()
        self.needs_input_grad = tuple(isinstance(a, Tensor) and a.is_floating_point() for a in args)

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """Integers have no gradient anyway."""

    def set_materialize_grads(self, value: bool) -> None:
        """Gradients that are asked for here are never missing."""


class Functions:
    """What is known of the Functions met: is the backward the forward's own derivative, a scaled gradient, another
    linear map of it, or none of these; forms: of linear ones, by the shapes of arguments, their graphs."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], str] = {}
        self.forms: dict[tuple[Any, ...], fx.GraphModule] = {}

    def apply(self, plain: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
        """A call in a trace; ``plain``: torch's own. Errors: FunctionMet, UnsupportedError."""
        if cls.__module__ == _REGISTERED:
            return plain(cls, *args, **kwargs)
        key, described = _key(cls, args), [_described(a) for a in args]
        if key not in self.known or (self.known[key] == LINEAR and _form(key, described) not in self.forms):
            raise FunctionMet(cls, described)
        if self.known[key] == OWN:
            return _forward(cls, args)[0]
        if self.known[key] == SCALED:
            return _with_gradient(cls, args)
        if self.known[key] == LINEAR:
            tensors = [a.detach() for a in args if isinstance(a, Tensor)]
            changes = [a - a.detach() if a.is_floating_point() else a for a in args if isinstance(a, Tensor)]
            output, none = fx.Interpreter(self.forms[_form(key, described)]).run(*tensors, *changes)
            return output.detach() + none
        raise UnsupportedError(
            f"{cls.__qualname__} is an autograd.Function whose backward is neither the derivative of its forward "
            "nor a linear map of the gradient, and is lost when a model is traced; state it with differentiable calls"
        )

    def judge(self, met: FunctionMet) -> None:
        """Try a Function, and record one that is tried. Outside of any trace."""
        key, small = _key(met.cls, met.args_met), [_small(a) for a in met.args_met]
        if key not in self.known:
            self.known[key] = _judged(met.cls, small)
        if self.known[key] == LINEAR:
            try:
                self.forms[_form(key, met.args_met)] = recorded(met.cls, _forward, met.args_met)
            except Exception:  # noqa: BLE001  (whatever the user's code does that no trace can hold)
                self.known[key] = OTHER

    def notes(self) -> tuple[str, ...]:
        """What was found, one line for each Function."""
        found = {
            OWN: "has the derivative of its forward as its backward, tried on random tensors: it is traced as that",
            SCALED: "has the gradient times something as its backward, tried on random tensors: it is traced as that",
            LINEAR: "has a backward that is linear in the gradient, tried on random tensors: it is traced as that",
        }
        kinds = {(key[0].__qualname__, kind): None for key, kind in self.known.items()}
        return tuple(f"the autograd.Function {name} {found[kind]}" for name, kind in kinds if kind in found)


def _key(cls: Any, args: Sequence[Any]) -> Any:
    """A Function with its numbers and flags, which may decide what its backward does."""
    return cls, tuple(a for a in args if isinstance(a, bool | int | float | str))


def _form(key: Any, described: Sequence[Any]) -> Any:
    """A Function with what its graph is made for."""
    return *key, *(a for a in described if is_described(a))


def _described(value: Any) -> Any:
    """A tensor of a trace by shape and dtype."""
    return (torch.Size(map(int, value.shape)), value.dtype) if isinstance(value, Tensor) else value


def _small(value: Any) -> Any:
    return (torch.Size(min(e, _EXTENT) for e in value[0]), value[1]) if is_described(value) else value


def _drawn(value: Any, seed: int, wide: bool, highest: int) -> Any:
    """wide: floating numbers are doubles. highest: of integers, which may be places, from 0 on."""
    if not is_described(value):
        return value
    shape, dtype = value
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(0, 2 if dtype == torch.bool else highest + 1, shape, generator=generator).to(dtype)
    drawn = torch.randn(shape, generator=generator) * _SCALES[seed]
    drawn.flatten()[::3] = 0
    return drawn.to(torch.float64 if wide else dtype).requires_grad_()


def _forward(cls: Any, args: Sequence[Any]) -> tuple[Any, Context]:
    """The forward as ordinary code, and what it leaves."""
    context = Context(args)
    if cls.setup_context is torch.autograd.Function.setup_context:
        return cls.forward(context, *args), context
    output = cls.forward(*args)
    cls.setup_context(context, args, output)
    return output, context


def _with_gradient(cls: Any, args: Sequence[Any]) -> Tensor:
    """The forward's value, with the gradient that the backward makes of one of ones."""
    output, context = _forward(cls, [a.detach() if isinstance(a, Tensor) else a for a in args])
    scales = cls.backward(context, torch.ones_like(output))
    made: Tensor = output.detach()
    for arg, scale in zip(args, scales if isinstance(scales, tuple) else (scales,), strict=False):
        if isinstance(arg, Tensor) and isinstance(scale, Tensor) and arg.is_floating_point():
            made = made + (arg - arg.detach()) * scale.detach()
    return made


def _with_slopes(cls: Any, args: Sequence[Any]) -> Tensor:
    """The forward's value, with the gradient that the backward makes, if that is linear."""
    changes = [a - a.detach() if isinstance(a, Tensor) and a.is_floating_point() else None for a in args]
    detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
    output, none = with_transposed(cls, _forward, detached, changes)
    made: Tensor = output.detach() + none
    return made


def _judged(cls: Any, described: Sequence[Any]) -> str:
    """Tried in double precision, where rounding hides nothing, and on integers that mask nothing; else as it can be."""
    ways: tuple[tuple[str, Callable[[Sequence[Any]], Any]], ...] = (
        (OWN, lambda args: _forward(cls, args)[0]),
        (SCALED, lambda args: _with_gradient(cls, args)),
        (LINEAR, lambda args: _with_slopes(cls, args)),
    )
    for kind, run in ways:
        for wide, highest in ((True, 1), (True, 0), (False, 1), (False, 0)):
            try:
                if _agree(cls, run, described, wide, highest):
                    return kind
            except Exception:  # noqa: BLE001  (whatever the user's code raises: it is not of this kind)
                continue
            break
    return OTHER


def _agree(cls: Any, run: Any, described: Sequence[Any], wide: bool, highest: int) -> bool:
    """Whether a way to run a Function has its values and its gradients, for a random gradient of the output.

    Every gradient must be a number somewhere: where all are none (an arc cosine of what is too large) nothing is known.
    """
    numbers: list[bool] = []
    for seed in range(len(_SCALES)):
        args = [_drawn(a, seed, wide, highest) for a in described]
        (values, gradients), (others, own) = (
            _gradients(call, args, seed) for call in (lambda given: cls.apply(*given), run)
        )
        if not all(_close(a, b) for a, b in zip((*values, *gradients), (*others, *own), strict=True)):
            return False
        found = [bool(gradient.isfinite().any()) for gradient in gradients]
        numbers = [a or b for a, b in zip(numbers, found, strict=True)] if numbers else found
    return all(numbers)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are the same, up to rounding, and where they are no numbers too."""
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return False
    odd = torch.equal(found[~finite].nan_to_num(), expected[~finite].nan_to_num())
    least = _ABSOLUTE.get(expected.dtype, 1e-6)
    bound = _RELATIVE * expected[finite].abs().max() + least if finite.any() else 0.0
    return odd and bool(((found - expected)[finite].abs() <= bound).all())


def _gradients(call: Any, args: list[Any], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    outputs = [t for t in pytree.tree_leaves(call(args)) if isinstance(t, Tensor) and t.is_floating_point()]
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    generator = torch.Generator().manual_seed(seed + len(_SCALES))
    pairs = [(o, torch.randn(o.shape, generator=generator).to(o.dtype)) for o in outputs]
    known = [(o, g) for o, g in pairs if o.requires_grad]
    if not known:
        return [o.detach() for o in outputs], [torch.zeros_like(a) for a in wanted]
    found = torch.autograd.grad([o for o, _ in known], wanted, [g for _, g in known], allow_unused=True)
    gradients = [torch.zeros_like(a) if g is None else g for a, g in zip(wanted, found, strict=True)]
    return [o.detach() for o in outputs], gradients
