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
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, get_proxy_mode, track_tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from passes.flat import flat, whole
from passes.hidden import Hidden
from passes.templates import Recognised, Recorded, Ref, Template, UnlikeError, ghost_of, known_of
from passes.vocabulary import define

FEWEST = 3
"""Modules of a kind that are worth it: one is traced in full, and each of the others takes a call."""
FIRST = -1
"""The number of the run that is traced in full."""
_OF_AUTOGRAD = (Tensor.is_leaf.__get__, Tensor.grad_fn.__get__)  # type: ignore[attr-defined, union-attr]
"""What the result of a repeated module would answer otherwise than that of one traced in full."""


class HiddenError(UnlikeError):
    """Parameters that the tracer does not know are read otherwise than by a module that repeats another."""


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
        classes = dict.fromkeys(type(module) for module in self.modules)
        patches = [mock.patch.object(cls, "forward", self._forward(cls)) for cls in classes]
        for patch in patches:
            patch.start()
        try:
            with self.hidden.away():
                yield
        finally:
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
        given = tuple(known_of(leaf) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves)
        if id(module.__dict__) not in self._owns:
            self._owns[id(module.__dict__)] = _own(module)
        return (cls, self._owns[id(module.__dict__)], given, spec)

    def _run(self, kind: Any, forward: Callable[[], Any]) -> Any:
        if kind not in self._of_kind:
            return self._first(kind, forward)
        template = self._of_kind[kind]
        if template is None:
            return forward()
        start, run = _names_used(), Recognised(template)
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
        run, start, before = Recorded(), _names_used(), len(_graph().nodes)
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
            like = template.ghosts[tensor], template.needs[tensor]
            made[tensor] = _call_of_repeated(*like, values, number, run, place)
        leaves = flat(result)[0]
        pairs = zip(leaves, template.results, strict=True)
        leaves = [made.get(known.number, own) if isinstance(known, Ref) else own for own, known in pairs]
        return whole(iter(leaves), template.spec)


@define("repeated(Tensor[] values, int template, int run, int place) -> Tensor", torch.Tag.flexible_layout)
def repeated(values: Sequence[Tensor], template: int, run: int, place: int) -> Tensor:
    """What a module of the template's kind returns; values: what it reads of the graph, and of the first run what it
    made."""
    raise AssertionError("it is written into the graph, and never called")


def _call_of_repeated(ghost: Tensor, needs_gradient: bool, *args: Any) -> Tensor:
    """A tensor like ``ghost`` that a call of ``repeated`` in the tracer's graph makes.

    Dispatched as other calls are, it would take the tracer ten times as long.
    """
    mode = get_proxy_mode()
    assert mode is not None and isinstance(mode.tracer, PythonKeyTracer)
    tracer = mode.tracer
    with torch._C.DisableTorchFunction():
        made, known = ghost_of(ghost), pytree.tree_map(tracer.unwrap_proxy, args)
        call = tracer.create_proxy("call_function", repeated, known, {}, name="repeated")
        call.node.meta["val"] = made
        track_tensor(made, call, constant=None, tracer=tracer)
        return made.requires_grad_(needs_gradient)


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
    tensors = [(name, known_of(t)) for name, t in (*module.named_parameters(), *module.named_buffers())]
    return tuple(tensors), tuple(part.training for part in module.modules())


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
