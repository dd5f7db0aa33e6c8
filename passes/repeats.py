"""Repeats: layers that do what one before them did are traced as one call each.

Torch's tracer takes a millisecond a call, and most of a deep model is one block many times over. While a model is
exported, the first of several modules of a kind is traced as ever, and what it asked of torch is remembered: every
function with its arguments and results. The others run too, in Python, but their calls are only held against what is
remembered and answered from it. A module that asked for just the same becomes a call of ``autopar.repeated``, which
``passes.unroll`` replaces by the calls of the first. Nothing is taken on trust: layers that depend on their number, on
a closure or on chance ask for something else, and the model is then traced in full.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode
from torch.fx.node import _side_effectful_functions
from torch.overrides import TorchFunctionMode

from passes.flat import flat, whole
from passes.hidden import Hidden
from passes.vocabulary import define

FEWEST = 3
"""Modules of a kind that are worth it: one is traced in full, and each of the others takes a call."""
FIRST = -1
"""The number of the run that is traced in full."""
_CONSTANTS = (
    bool, int, float, complex, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size,
)  # fmt: skip
_CHANGES = ("requires_grad_", "retain_grad", "__set__")
"""Functions that change a tensor without a call that the graph would hold."""
_OF_AUTOGRAD = (Tensor.is_leaf.__get__, Tensor.grad_fn.__get__)  # type: ignore[attr-defined, union-attr]
"""What the result of a repeated module would answer otherwise than that of one traced in full."""


class UnlikeError(BaseException):
    """A module does not do what the first of its kind did; no ``except Exception`` of the model's may catch it."""


class HiddenError(UnlikeError):
    """Parameters that the tracer does not know are read otherwise than by a module that repeats another."""


@dataclass(frozen=True)
class _Ref:
    """A tensor, by its number among those that a module has seen."""

    number: int


@dataclass(frozen=True)
class _Call:
    """A function of torch, its arguments and results flat, tensors as ``_Ref``."""

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

    calls: list[_Call] = field(default_factory=list)
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
        found = (leaf.number for leaf in self.results if isinstance(leaf, _Ref))
        return tuple(number for number in dict.fromkeys(found) if number not in self.outside)


class Repeats:
    """Of one export. shifts: of each repetition, by how much its names lie behind those of the first module.

    hidden: parameters of such modules, of which the tracer does not know, or none. reads: of each repetition, the
    hidden parameters among the tensors it reads, by name, None for what the graph knows.
    """

    def __init__(self, model: nn.Module, *, hides: bool) -> None:
        self.modules = repeated_modules(model)
        self.hidden = Hidden(model, self.modules if hides else (), _own)
        self.templates: list[Template] = []
        self.shifts: list[Counter[str]] = []
        self.reads: list[list[str | None]] = []
        self._of_kind: dict[Any, Template | None] = {}
        self._owns: dict[int, Any] = {}
        self._ghosts: set[int] = set()
        self._inside = False

    @contextmanager
    def over(self) -> Iterator[None]:
        """Around the export. Errors: UnlikeError."""
        global _current
        before, _current = _current, self
        classes = dict.fromkeys(type(module) for module in self.modules)
        patches = [mock.patch.object(cls, "forward", self._forward(cls)) for cls in classes]
        for patch in patches:
            patch.start()
        try:
            with self.hidden.away():
                yield
        finally:
            _current = before
            for patch in patches:
                patch.stop()

    @contextmanager
    def between(self) -> Iterator[None]:
        """Around the model's forward: UnlikeError where what a module made leaves it otherwise than as its result."""
        with self.hidden.back(), _Outside(self):
            yield

    def check(self, values: Any) -> None:
        """UnlikeError where a value stands for what the first module of a kind made, or is a hidden parameter."""
        ghosts, names = set[int]() if self._inside else self._ghosts, self.hidden.names
        if not (ghosts or names):
            return
        leaves = flat(values)[0]
        if any(id(leaf) in ghosts for leaf in leaves):
            raise UnlikeError
        if any(id(leaf) in names for leaf in leaves):
            raise HiddenError

    @property
    def is_outside(self) -> bool:
        return not self._inside

    def _forward(self, cls: type[nn.Module]) -> Callable[..., Any]:
        original = cls.forward
        own = {id(module.__dict__) for module in self.modules}  # which the tracer's proxies of modules share

        def forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            if self._inside or id(module.__dict__) not in own or get_proxy_mode() is None:
                return original(module, *args, **kwargs)
            self._inside = True
            try:
                kind = self._kind(cls, module, args, kwargs)
                if self._of_kind.get(kind) is None and self.hidden.is_of(module):
                    raise HiddenError  # it would be traced itself
                return self._run(kind, functools.partial(original, module, *args, **kwargs))
            finally:
                self._inside = False

        return forward

    def _kind(self, cls: type[nn.Module], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Equal for modules that may do the same: of one class, with the same tensors, called alike."""
        leaves, spec = flat((args, kwargs))
        given = tuple(_meta(leaf) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves)
        if id(module.__dict__) not in self._owns:
            self._owns[id(module.__dict__)] = _own(module)
        return (cls, self._owns[id(module.__dict__)], given, spec)

    def _run(self, kind: Any, forward: Callable[[], Any]) -> Any:
        if kind not in self._of_kind:
            return self._first(kind, forward)
        template = self._of_kind[kind]
        if template is None:
            return forward()
        start, run = _names_used(), _Recognised(template)
        with run:
            result = forward()
        given = run.finish(result)
        _use_up(template.names)
        self.shifts.append(Counter({k: n - template.names_before[k] for k, n in start.items()}))
        values = [given[n] for n in template.outside]
        self.reads.append([self.hidden.names.get(id(value)) for value in values])
        seen = [value for value, name in zip(values, self.reads[-1], strict=True) if name is None]
        if not seen:
            raise HiddenError  # nothing would tie its results to the graph
        return self._returned(template, result, seen, len(self.shifts) - 1)

    def _first(self, kind: Any, forward: Callable[[], Any]) -> Any:
        run, start, before = _Recorded(), _names_used(), len(_graph().nodes)
        with run:
            result = forward()
        new = itertools.islice(reversed(_graph().nodes), len(_graph().nodes) - before)
        template = self._of_kind[kind] = run.finish(result) if all(map(is_plain, new)) else None
        if template is None:
            return result
        used = _names_used()
        start.update({base: _first_number(base) for base in used if base not in start})
        template.names, template.names_before = used - start, start
        self.templates.append(template)
        self._ghosts |= {id(ghost) for ghost in template.ghosts.values()}
        values = [run.tensors[n] for n in (*template.outside, *template.made)]
        return self._returned(template, result, values, FIRST)

    def _returned(self, template: Template, result: Any, values: list[Tensor], run: int) -> Any:
        """The module's result, each tensor that it made replaced by one that a call of ``repeated`` makes."""
        number, made = self.templates.index(template), {}
        for place, tensor in enumerate(template.made):
            out = torch.ops.autopar.repeated(values, number, run, place)
            made[tensor] = out.requires_grad_(template.needs[tensor])
        leaves = flat(result)[0]
        pairs = zip(leaves, template.results, strict=True)
        leaves = [made.get(known.number, own) if isinstance(known, _Ref) else own for own, known in pairs]
        return whole(iter(leaves), template.spec)


_current: Repeats | None = None


@define("repeated(Tensor[] values, int template, int run, int place) -> Tensor")
def repeated(values: Sequence[Tensor], template: int, run: int, place: int) -> Tensor:
    """What a module of the template's kind returns; values: what it reads of the graph, and of the first run what it
    made."""
    assert _current is not None
    known = _current.templates[template]
    ghost = known.ghosts[known.made[place]]
    return torch.empty_strided(ghost.shape, ghost.stride(), dtype=ghost.dtype, device=ghost.device)


def repeated_modules(model: nn.Module) -> tuple[nn.Module, ...]:
    """Modules in lists of at least ``FEWEST`` of one class, with parts of their own; none within another."""
    found: dict[int, nn.Module] = {}
    queue = [model]
    while queue:
        parent = queue.pop()
        counts = Counter(type(child) for child in parent.children())
        for child in parent.children():
            listed = isinstance(parent, nn.ModuleList | nn.Sequential | nn.ModuleDict)
            if listed and counts[type(child)] >= FEWEST and _may_repeat(child):
                found[id(child)] = child
            else:
                queue.append(child)
    return tuple(found.values())


def _may_repeat(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and not isinstance(module, torch.jit.ScriptModule | fx.GraphModule)


def _own(module: nn.Module) -> Any:
    """The tensors and modes of a module and its parts."""
    tensors = [(name, _meta(t)) for name, t in (*module.named_parameters(), *module.named_buffers())]
    return tuple(tensors), tuple(part.training for part in module.modules())


def _meta(tensor: Tensor) -> Any:
    """What a module may know of a tensor beside its values; what is on the meta device is traced as on a CPU."""
    with torch._C.DisableTorchFunction():
        device = tensor.device if tensor.device.type != "meta" else torch.device("cpu")
        rest = (tensor.dtype, device, tensor.layout, tensor.requires_grad)
        return (tuple(tensor.shape), tensor.stride(), *rest)


class _Outside(TorchFunctionMode):
    """Between repeated modules: nothing may use what they made but did not return."""

    def __init__(self, repeats: Repeats) -> None:
        super().__init__()
        self.repeats = repeats

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.repeats.check((args, kwargs))
        if self.repeats.is_outside and self.repeats.shifts and func in _OF_AUTOGRAD:
            raise UnlikeError
        return func(*args, **kwargs)


class _Recorded(TorchFunctionMode):
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
        self.template.calls.append(_Call(func, known, spec, made, result_spec))
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
                self.template.outside[number] = _meta(leaf)
            else:
                self.template.ghosts[number] = _ghost(leaf)
        return _Ref(number)


class _Recognised(TorchFunctionMode):
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
        if not isinstance(leaf, _Ref):
            return leaf
        return self.given[leaf.number] if leaf.number in self.given else self.template.ghosts[leaf.number]

    def _check(self, leaves: Sequence[Any], known: Sequence[Any]) -> None:
        for leaf, before in zip(leaves, known, strict=True):
            same = self._is_same(leaf, before) if isinstance(leaf, Tensor) else _is_equal(leaf, before)
            if not same:
                raise UnlikeError

    def _is_same(self, tensor: Tensor, before: Any) -> bool:
        if not isinstance(before, _Ref):
            return False
        own = self.ghosts.get(id(tensor))
        if own is not None or before.number not in self.template.outside:
            return own == before.number
        given = self.given.setdefault(before.number, tensor)
        return given is tensor and _meta(tensor) == self.template.outside[before.number]


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


def _ghost(tensor: Tensor) -> Tensor:
    """As large and of the same kind, unknown to the tracer."""
    with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing():
        shape, stride = tensor.shape, tensor.stride()
        return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)


def is_plain(node: fx.Node) -> bool:
    """A call that does nothing but make its result, or check something."""
    if isinstance(node.target, OpOverload):
        return not node.target._schema.is_mutable and node.target is not repeated
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _graph() -> Any:
    """What the tracer has made so far."""
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer.graph


def _names_used() -> Counter[str]:
    """How many nodes of each name the tracer's graph has had."""
    return Counter({base: count + 1 for base, count in _graph()._graph_namespace._base_count.items()})


def _first_number(base: str) -> int:
    """Python's own names are never given: "slice" begins at 1."""
    return int(fx.Graph()._graph_namespace.create_name(base, None) != base)


def _use_up(names: Counter[str]) -> None:
    """Count as if so many nodes had been made, so that later ones are called as in a full trace."""
    counts = _graph()._graph_namespace._base_count
    for base, count in names.items():
        counts[base] += count
