"""Python state: numbers, texts and iterators that a forward can reach and change, which a trace reads once."""

from __future__ import annotations

import inspect
import itertools
import logging
import operator
from collections.abc import Iterator
from types import FunctionType, GeneratorType, ModuleType
from typing import Any

import torch
from torch import nn

_OWN = frozenset(vars(nn.Module())) - {"training"}
_VALUES = (bool, int, float, str)
_OPAQUE = (torch.Tensor, nn.Module, type, ModuleType, torch.device, logging.Logger)
_DEEPEST, _WIDEST = 4, 1000


def python_state(model: nn.Module, loss_fn: Any = None) -> dict[str, Any]:
    """Place -> value: attributes of modules and what these hold, and what their forwards close over or have as globals.

    Containers and objects are looked into once each, to a depth of ``_DEEPEST``, those of up to ``_WIDEST`` members.
    """
    look = _Look()
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OWN:
                look.at(f"{prefix}.{name}".lstrip("."), value, 0)
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        if not kind.__module__.startswith("torch."):
            look.at(f"{kind.__name__}.forward", inspect.unwrap(kind.forward), 0)
    look.at("loss_fn", vars(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn, 0)
    return look.found


class _Look:
    """found: the value at every place."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._met: dict[int, Any] = {}

    def at(self, place: str, value: Any, depth: int) -> None:
        if isinstance(value, _VALUES):
            self.found[place] = value
        elif isinstance(value, Iterator):
            self.found[place] = _position(value)
        elif value is not None and not isinstance(value, _OPAQUE) and id(value) not in self._met and depth < _DEEPEST:
            self._met[id(value)] = value
            for name, member in _members(value):
                self.at(f"{place}.{name}", member, depth + 1)


def _position(iterator: Iterator[Any]) -> Any:
    """Something that is another once the iterator was asked."""
    if isinstance(iterator, GeneratorType):
        frame = iterator.gi_frame
        return frame and (frame.f_lasti, {n: v for n, v in frame.f_locals.items() if isinstance(v, _VALUES)})
    return repr(iterator) if isinstance(iterator, itertools.count) else operator.length_hint(iterator)


def _members(value: Any) -> list[tuple[Any, Any]]:
    """Names and values: a container's items, what a function reads, any other object's attributes."""
    if isinstance(value, FunctionType):
        return [*_closed_over(value), *_globals(value)]
    if isinstance(value, list | tuple):
        return list(enumerate(value)) if len(value) <= _WIDEST else []
    held = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return list(held.items()) if len(held) <= _WIDEST else []


def _closed_over(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _globals(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Globals that are values and plain containers: objects and functions are those of libraries mostly."""
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, (*_VALUES, dict, list)):
            yield name, value
