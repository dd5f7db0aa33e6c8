"""Elsewhere: parameters and buffers that forward reaches by another way than the module that registers them.

An exporter puts its own tensors in the place of registered ones and takes any other for a constant, which has no
gradient and never changes: so what lies in a list, in a closure or in a view that was kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cost_model.errors import UnsupportedError

_PLAIN = (Tensor, nn.Parameter)


class _Place(NamedTuple):
    """Where a tensor is registered: held[name]."""

    held: dict[str, Any]
    name: str
    tensor: Tensor


class Elsewhere:
    """The registered tensors of a model by their memory. followed: whether calls get the registered ones."""

    def __init__(self, model: nn.Module) -> None:
        self.followed = False
        self._places: dict[int, list[_Place]] = {}
        owners: list[dict[str, Any]] = [own for m in model.modules() for own in (m._parameters, m._buffers)]
        for own in owners:
            for name, tensor in own.items():
                if tensor is not None and _has_memory(tensor):
                    self._places.setdefault(_memory(tensor), []).append(_Place(own, name, tensor))

    def may_help(self) -> bool:
        """Whether a trace that failed is to be made with the registered tensors: none on meta is a constant."""
        on_meta = any(place.tensor.is_meta for places in self._places.values() for place in places)
        before, self.followed = self.followed, self.followed or on_meta
        return on_meta and not before

    def met(self, exported: torch.export.ExportedProgram) -> bool:
        """Whether constants of a trace are registered tensors, or lie in their memory.

        Errors: UnsupportedError for constants with gradients of their own history.
        """
        registered = set(exported.graph_signature.inputs_to_buffers.values())
        found = False
        for name, value in exported.constants.items():
            if name in registered or type(value) not in _PLAIN or not _has_memory(value):
                continue
            _check_no_history(value)
            found |= _memory(value) in self._places
        return found

    @contextmanager
    def over(self) -> Iterator[None]:
        """Around one run of forward, while the exporter's tensors are registered."""
        if not self.followed:
            yield
            return
        with _Registered(self):
            yield

    def registered(self, leaf: Any) -> Any:
        """What is registered now in the place of a tensor, or the same part of it; anything else as it is."""
        if type(leaf) not in _PLAIN or not _has_memory(leaf):
            return leaf
        places = self._places.get(_memory(leaf), [])
        for held, name, tensor in places:
            if tensor is leaf:
                return held[name]
        if not places:
            return leaf
        _check_no_history(leaf)
        held, name, _ = places[0]
        return held[name].detach().as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())


class _Registered(TorchFunctionMode):
    """Calls on the tensors that are registered now."""

    def __init__(self, elsewhere: Elsewhere) -> None:
        super().__init__()
        self._elsewhere = elsewhere

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(self._elsewhere.registered, (args, kwargs or {}))
        return func(*args, **kwargs)


def _has_memory(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.layout is torch.strided


def _memory(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return int(tensor.untyped_storage()._cdata)


def _check_no_history(tensor: Tensor) -> None:
    """UnsupportedError for what was computed from parameters before forward: a trace has neither with gradients."""
    if tensor.grad_fn is not None:
        raise UnsupportedError(
            f"forward reads a tensor {list(tensor.shape)} that was computed from parameters outside of it, whose "
            "gradient is lost when a model is traced: compute it in forward"
        )
