"""Templates: what the first of several modules that are alike asked of torch, and holding others against it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import _side_effectful_functions
from torch.overrides import TorchFunctionMode

from passes.fakes import fake_like
from passes.flat import flat, whole

_CONSTANTS = (
    bool, int, float, complex, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size,
)  # fmt: skip
_CHANGES = ("requires_grad_", "retain_grad", "__set__")
"""Functions that change a tensor without a call that the graph would hold."""


class UnlikeError(BaseException):
    """A module does not do what the first of its kind did; no ``except Exception`` of the model's may catch it."""


@dataclass(frozen=True)
class Ref:
    """A tensor, by its number among those that a module has seen."""

    number: int


@dataclass(frozen=True)
class Call:
    """A function of torch, its arguments and results flat, tensors as ``Ref``."""

    function: Any
    arguments: tuple[Any, ...]
    argument_spec: Any
    results: tuple[Any, ...]
    result_spec: Any


@dataclass(eq=False)
class Template:
    """What the first module of a kind asked of torch, and returned.

    outside: tensors that it did not make -> what is known of them; ghosts: tensors that it made -> what stands for them
    when it is repeated; needs: whether a result needs a gradient.
    """

    calls: list[Call] = field(default_factory=list)
    outside: dict[int, Any] = field(default_factory=dict)
    ghosts: dict[int, Tensor] = field(default_factory=dict)
    results: tuple[Any, ...] = ()
    spec: Any = None
    needs: dict[int, bool] = field(default_factory=dict)
    names: Counter[str] = field(default_factory=Counter)
    names_before: Counter[str] = field(default_factory=Counter)

    @property
    def made(self) -> tuple[int, ...]:
        """Numbers of the results that it made."""
        found = (leaf.number for leaf in self.results if isinstance(leaf, Ref))
        return tuple(number for number in dict.fromkeys(found) if number not in self.outside)


def known_of(tensor: Tensor) -> Any:
    """What a module may know of a tensor beside its values; what is on the meta device is traced as on a CPU."""
    with torch._C.DisableTorchFunction():
        device = tensor.device if tensor.device.type != "meta" else torch.device("cpu")
        rest = (tensor.dtype, device, tensor.layout, tensor.requires_grad)
        return (tuple(tensor.shape), tensor.stride(), *rest)


class Recorded(TorchFunctionMode):
    """Remembers what a module asks of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.template = Template()
        self.tensors: dict[int, Tensor] = {}
        self.numbers: dict[int, int] = {}
        self.can_repeat = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = flat((args, kwargs))
        self.can_repeat &= _is_held(func)
        known = tuple(self._known(leaf, outside=True) for leaf in leaves)
        result = func(*args, **kwargs)
        results, result_spec = flat(result)
        made = tuple(self._known(leaf, outside=False) for leaf in results)
        self.template.calls.append(Call(func, known, spec, made, result_spec))
        return result

    def finish(self, result: Any) -> Template | None:
        """None where the module is not one that can be repeated."""
        leaves, self.template.spec = flat(result)
        self.template.results = tuple(self._known(leaf, outside=True) for leaf in leaves)
        made = self.template.made
        self.template.needs = {number: self.tensors[number].requires_grad for number in made}
        return self.template if self.can_repeat and made else None

    def _known(self, leaf: Any, outside: bool) -> Any:
        if not isinstance(leaf, Tensor):
            self.can_repeat &= _is_constant(leaf)
            return leaf
        number = self.numbers.setdefault(id(leaf), len(self.numbers))
        if number not in self.tensors:
            self.tensors[number] = leaf
            if outside:
                self.template.outside[number] = known_of(leaf)
            else:
                self.template.ghosts[number] = ghost_of(leaf)
        return Ref(number)


class Recognised(TorchFunctionMode):
    """Answers what a module asks as the first of its kind was answered. Errors: UnlikeError."""

    def __init__(self, template: Template) -> None:
        super().__init__()
        self.template = template
        self.ghosts = {id(ghost): number for number, ghost in template.ghosts.items()}
        self.given: dict[int, Tensor] = {}
        self.place = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        calls = self.template.calls
        call = calls[self.place] if self.place < len(calls) else None
        leaves, spec = flat((args, kwargs or {}))
        if call is None or call.function != func or call.argument_spec != spec:
            raise UnlikeError
        self._check(leaves, call.arguments)
        self.place += 1
        return whole(map(self._answer, call.results), call.result_spec)

    def finish(self, result: Any) -> dict[int, Tensor]:
        """The tensors from outside, by number."""
        leaves, spec = flat(result)
        if self.place != len(self.template.calls) or spec != self.template.spec:
            raise UnlikeError
        tensors = [(a, b) for a, b in zip(leaves, self.template.results, strict=True) if isinstance(a, Tensor)]
        self._check([a for a, _ in tensors], [b for _, b in tensors])
        if not all(isinstance(leaf, Tensor) or _is_constant(leaf) for leaf in leaves):
            raise UnlikeError
        return self.given

    def _answer(self, leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        return self.given[leaf.number] if leaf.number in self.given else self.template.ghosts[leaf.number]

    def _check(self, leaves: Sequence[Any], known: Sequence[Any]) -> None:
        for leaf, before in zip(leaves, known, strict=True):
            same = self._is_same(leaf, before) if isinstance(leaf, Tensor) else _is_equal(leaf, before)
            if not same:
                raise UnlikeError

    def _is_same(self, tensor: Tensor, before: Any) -> bool:
        if not isinstance(before, Ref):
            return False
        own = self.ghosts.get(id(tensor))
        if own is not None or before.number not in self.template.outside:
            return own == before.number
        given = self.given.setdefault(before.number, tensor)
        return given is tensor and known_of(tensor) == self.template.outside[before.number]


def _is_held(func: Any) -> bool:
    """Whether all that a function does is to make its results."""
    changes = func in _side_effectful_functions or getattr(func, "__name__", "") in _CHANGES
    return not changes and not isinstance(func, HigherOrderOperator)


def _is_constant(leaf: Any) -> bool:
    if type(leaf) is slice:
        return all(_is_constant(part) for part in (leaf.start, leaf.stop, leaf.step))
    return type(leaf) in _CONSTANTS


def _is_equal(leaf: Any, before: Any) -> bool:
    """Of constants: by what they print, which tells -0.0 from 0.0 and finds that NaN is NaN."""
    return type(leaf) is type(before) and _is_constant(leaf) and repr(leaf) == repr(before)


def ghost_of(tensor: Tensor) -> Tensor:
    """As large and of the same kind, unknown to the tracer."""
    assert isinstance(tensor, FakeTensor)
    return fake_like(tensor, mode=tensor.fake_mode)
