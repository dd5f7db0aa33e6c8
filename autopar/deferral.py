"""Deferred: a model built on the meta device that knows which values one device would have given it.

While the model is built, every ATen call that would make or change one of its tensors runs on meta tensors and is
written down. Calls that draw random numbers draw them as well, for one tensor at a time, so that torch's generator goes
on as it would and each call knows the state that it found. What made a tensor is then its recipe
(``autopar.runtime.recipe``), which ranks follow: no process ever holds more than its shards and one whole tensor.
"""

from __future__ import annotations

import bisect
import heapq
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from autopar.runtime.recipe import CONSTANT, Tree, made, packed, passing_memory, ref_of
from cost_model.errors import ConfigError

_META = torch.device("meta")
_OVERWRITING = ("zero_", "fill_", "copy_", "normal_", "uniform_", "random_", "exponential_", "log_normal_", "cauchy_")
_REGISTERED = ("_parameters", "_buffers", "_modules")
_READING = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
_SHOWN: dict[Any, Any] = {
    Tensor.device.__get__: torch.device("cpu"),
    Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
}


@dataclass(frozen=True)
class _Origin:
    """A tensor's recipe, and the version that it is of."""

    recipe: Tree
    version: int


_origins: Any = WeakTensorKeyDictionary()


def deferred(build: Callable[..., nn.Module], /, *args: Any, **kwargs: Any) -> nn.Module:
    """The model that ``build(*args, **kwargs)`` returns, on the meta device: without memory, and trained all the same.

    Ranks initialise their own shards, to the values that one device would have got with the same seed: the states of
    torch's generator before and after are those of an ordinary construction. What is done to its tensors afterwards is
    not known. Errors: ConfigError where ``build`` returns no module.
    """
    tape = _Tape()
    with _AsIfReal(tape), _Recorder(tape):
        model = build(*args, **kwargs)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"deferred takes what builds a torch.nn.Module, and this returned a {type(model).__name__}")
    _without_memory(model, tape)
    _with_values(model, tape)
    for tensor in (*model.parameters(), *model.buffers()):
        recipe = tape.recipe(tensor)
        if recipe is not None:
            _origins[tensor] = _Origin(recipe, tensor._version)
    return model


def recipes_of(model: nn.Module) -> dict[str, Tree]:
    """Parameter or buffer on the meta device -> its recipe, where there is one. Errors: ConfigError."""
    named = (*model.named_parameters(), *model.named_buffers())
    found = {name: (tensor, _origins[tensor]) for name, tensor in named if tensor.is_meta and tensor in _origins}
    for name, (tensor, origin) in found.items():
        if tensor._version != origin.version:
            raise ConfigError(
                f"{name!r} was changed after autopar.deferred had built the model, and values on the meta device are "
                "lost; change it in the function that autopar.deferred calls"
            )
    return {name: origin.recipe for name, (_, origin) in found.items()}


def _without_memory(model: nn.Module, tape: _Tape) -> None:
    """Tensors that came from elsewhere (a file, NumPy), as constants of the tape."""
    moved: dict[Tensor, Tensor] = {}
    owners: list[dict[str, Any]] = [own for m in model.modules() for own in (m._parameters, m._buffers)]
    for own in owners:
        for name, tensor in own.items():
            if tensor is not None and not tensor.is_meta:
                if tensor not in moved:
                    moved[tensor] = _moved(tensor, tape)
                own[name] = moved[tensor]


def _with_values(model: nn.Module, tape: _Tape) -> None:
    """Tensors that are plain attributes, or lie in lists and dicts that are: constants of the program, not state."""
    state = {tape.number(tensor) for tensor in (*model.parameters(), *model.buffers())}
    known: dict[int, Tensor] = {}

    def constant(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_meta or leaf.requires_grad or tape.number(leaf) in state:
            return leaf
        if id(leaf) not in known and tape.recipe(leaf) is not None:
            known[id(leaf)] = tape.value(leaf)
        return known.get(id(leaf), leaf)

    for module in model.modules():
        for name, value in vars(module).items():
            leaves = pytree.tree_leaves(value) if name not in _REGISTERED else []
            if any(constant(leaf) is not leaf for leaf in leaves):
                vars(module)[name] = pytree.tree_map(constant, value)


def _moved(tensor: Tensor, tape: _Tape) -> Tensor:
    with _Recorder(tape):
        meta = tensor.detach().to(_META)
    if isinstance(tensor, nn.Parameter):
        meta = nn.Parameter(meta, tensor.requires_grad)
    meta.__dict__.update(tensor.__dict__)
    return meta


@dataclass(frozen=True)
class _Step:
    """One call. reads, writes: numbers of storages; covers: those of which nothing older is left."""

    tree: Tree
    reads: frozenset[int]
    writes: frozenset[int]
    covers: frozenset[int]


@dataclass
class _Tape:
    """All calls in order. Storages are kept alive, so that no two have one address."""

    steps: list[_Step] = field(default_factory=list)
    storages: list[torch.UntypedStorage] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    writers: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def number(self, tensor: Tensor) -> int:
        """Of a meta tensor's storage."""
        storage = tensor.untyped_storage()
        number = self.numbers.setdefault(storage._cdata, len(self.storages))
        if number == len(self.storages):
            self.storages.append(storage)
        return number

    def ref(self, tensor: Tensor) -> Tree:
        """A meta tensor as a place in its storage; any other as it is now."""
        if tensor.is_meta:
            return ref_of(tensor, self.number(tensor))
        return (CONSTANT, tensor.detach().clone())

    def add(self, step: _Step) -> None:
        for number in step.writes:
            self.writers[number].append(len(self.steps))
        self.steps.append(step)

    def recipe(self, tensor: Tensor) -> Tree | None:
        """How to make a tensor; None where some of its values were never given."""
        number = self.number(tensor)
        chosen, missing = self._needed(number)
        if missing:
            return None
        steps = [self.steps[index] for index in chosen]
        met = sorted({number for step in steps for number in step.reads | step.writes})
        sizes = {number: self.storages[number].nbytes() for number in met}
        return {"steps": [step.tree for step in steps], "sizes": sizes, "result": ref_of(tensor, number)}

    def value(self, tensor: Tensor) -> Tensor:
        """A tensor's values at this moment. Errors: ConfigError."""
        recipe = self.recipe(tensor)
        if recipe is None:
            raise ConfigError("a tensor is read that was built outside autopar.deferred, on the meta device")
        with _disable_current_modes():
            return made(recipe)

    def _needed(self, number: int) -> tuple[list[int], set[int]]:
        """Steps that a storage's values follow from, in order, and storages that none of them fills."""
        chosen: list[int] = []
        needed, ahead = {number}, [-self._before(number, len(self.steps))]
        while ahead:
            index = -heapq.heappop(ahead)
            step = self.steps[index] if index >= 0 else None
            if step is None or index in chosen[-1:] or not needed & step.writes:
                continue
            chosen.append(index)
            needed -= step.covers
            needed |= step.reads
            for each in needed & (step.reads | step.writes):
                heapq.heappush(ahead, -self._before(each, index))
        return chosen[::-1], needed

    def _before(self, number: int, index: int) -> int:
        """The last step before another that writes a storage; -1 where there is none."""
        writers = self.writers[number]
        place = bisect.bisect_left(writers, index)
        return writers[place - 1] if place else -1


class _AsIfReal(TorchFunctionMode):
    """Shows tensors as those of a CPU, as code that builds models expects, and gives values to what leaves torch."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SHOWN:
            return _SHOWN[func]
        if func in _READING and args[0].is_meta:
            args = (self._tape.value(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs what concerns tensors of the model on meta tensors and writes it on a tape; runs the rest."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._called(func, args, dict(kwargs or {}))

    def _called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not _is_deferred(func, tensors, kwargs):
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        if _gives_values(func, written) or any(not tensor.is_meta for tensor in written):
            return func(*self._real(args, ()), **self._real(kwargs, ()))
        return self._recorded(func, args, kwargs, tensors, written)

    def _recorded(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], written: list[Tensor]) -> Any:
        if func.overloadpacket.__name__ == "resize_":
            raise ConfigError("resize_ of a model's tensor cannot be deferred; build it in its final size")
        kwargs.pop("pin_memory", None)
        on_meta = _on_meta(kwargs)
        if any(a.name == "device" for a in func._schema.arguments):
            on_meta["device"] = _META
        draws = torch.Tag.nondeterministic_seeded in func.tags
        tree = {
            "op": str(func),
            "args": packed(args, self._tape.ref),
            "kwargs": {name: packed(value, self._tape.ref) for name, value in kwargs.items()},
            "default": str(torch.get_default_dtype()).removeprefix("torch."),
            "state": torch.get_rng_state() if draws else None,
        }
        try:
            results = func(*_on_meta(args), **on_meta)
        except NotImplementedError:  # no kernel knows shapes alone; torch itself takes this error for something else
            results = self._by_values(func, args, kwargs, written)
        else:
            if draws:
                func(*self._real(args, written), **self._real(kwargs, written))
        if not _only_views(func):
            self._tape.add(self._step(func, tree, tensors, written, results))
        return results

    def _by_values(self, func: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """Results on the meta device, shaped as those of the values; arguments that are written are results."""
        found = func(*self._real(args, ()), **self._real(kwargs, ()))
        if written:
            return written if isinstance(found, list | tuple) else written[0]
        return _on_meta(found)

    def _step(self, func: Any, tree: Tree, tensors: list[Tensor], written: list[Tensor], results: Any) -> _Step:
        number = self._tape.number
        met = {number(tensor) for tensor in tensors if tensor.is_meta}
        outs = [self._tape.ref(r) if number(r) not in met else None for r in _listed(results)]
        new = {out[1] for out in outs if out is not None}
        covers = {number(t) for t in written if _overwrites(func, t)}
        kept = [t for t in tensors if t.is_meta and not any(t is other for other in written)]
        reads = ({number(t) for t in written} - covers) | {number(t) for t in kept}
        writes = new | {number(t) for t in written}
        return _Step({**tree, "outs": outs}, frozenset(reads), frozenset(writes), frozenset((new | covers) - reads))

    def _real(self, tree: Any, written: Any) -> Any:
        """Arguments with values in place of meta tensors; those that are written alone need none."""

        def real(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            if not isinstance(leaf, Tensor) or not leaf.is_meta:
                return leaf
            if any(leaf is other for other in written):
                memory = passing_memory(leaf.untyped_storage().nbytes())
                return torch.empty(0, dtype=leaf.dtype).set_(memory, leaf.storage_offset(), leaf.shape, leaf.stride())
            return self._tape.value(leaf)

        return pytree.tree_map(real, tree)


def _is_deferred(func: Any, tensors: list[Tensor], kwargs: Any) -> bool:
    """Whether a call makes a tensor or takes one that has no memory."""
    if any(tensor.is_meta for tensor in tensors) or func is torch.ops.aten.lift_fresh.default:
        return True
    device = kwargs.get("device")
    makes = not tensors and any(a.name == "device" for a in func._schema.arguments)
    return makes or (device is not None and torch.device(device) == _META)


def _gives_values(func: Any, written: list[Tensor]) -> bool:
    """Whether the answer is no tensor, or its shape depends on values, or it is an error or none."""
    kinds = {str(each.type) for each in func._schema.returns}
    if not kinds:
        return not written
    depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    return bool(depends) or not kinds <= {"Tensor", "List[Tensor]"}


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Arguments whose values change."""
    if torch.Tag.inplace_view in func.tags:
        return []
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [t for name in names for t in pytree.tree_leaves(given.get(name)) if isinstance(t, Tensor)]


def _only_views(func: Any) -> bool:
    """Whether it changes no value: its results lie in the storages of its arguments."""
    if torch.Tag.inplace_view in func.tags:
        return True
    aliases = [each.alias_info for each in func._schema.returns]
    return (
        bool(aliases)
        and all(a is not None and not a.is_write for a in aliases)
        and func.namespace == "aten"
        and (func is not torch.ops.aten.lift_fresh.default)
    )


def _overwrites(func: Any, tensor: Tensor) -> bool:
    """Whether nothing of the whole storage stays as it was, nor counts."""
    fills = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return fills and func.overloadpacket.__name__ in _OVERWRITING


def _on_meta(tree: Any) -> Any:
    def meta(leaf: Any) -> Any:
        if isinstance(leaf, torch.Generator):
            return None
        if isinstance(leaf, torch.device):
            return _META
        if isinstance(leaf, Tensor) and not leaf.is_meta:
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=_META)
        return leaf

    return pytree.tree_map(meta, tree)


def _listed(results: Any) -> list[Tensor]:
    if results is None:
        return []
    return list(results) if isinstance(results, list | tuple) else [results]
