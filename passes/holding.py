"""Holding: tensors that a model holds, before and after its forward. An exporter puts back what forward replaces.

Buffers that forward assigns get their values at its end as if it had written to them. What else forward replaces and
reads is refused: every step would read what was there when the model was traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

from cost_model.errors import UnsupportedError

_OWN = frozenset({"_parameters", "_buffers", "_modules"})


class Holding:
    """What one run of forward replaced: name -> the tensor it read there before (buffers of another shape, plain
    attributes and what lists and dicts hold); notes: what it began to hold."""

    def __init__(self) -> None:
        self.replaced: list[tuple[str, torch.Tensor]] = []
        self.notes: tuple[str, ...] = ()

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Around one run of forward. Errors: UnsupportedError for a parameter that another takes the place of."""
        registered, plain, empty = _registered(model), _plain(model), _empty(model)
        yield
        for (module, name, kind), before in registered.items():
            after = _now(module, kind, name)
            if after is not before and kind == "_parameters":
                raise UnsupportedError(
                    f"forward puts another tensor in the place of the parameter {_path(model, module, name)!r}, which "
                    "no optimizer would know of: change it outside of forward"
                )
        self.replaced = _write_assigned(model, registered)
        now = _plain(model)
        for place, tensors in plain.items():
            held = now.get(place, ())
            if len(held) != len(tensors) or any(a is not b for a, b in zip(held, tensors, strict=True)):
                self.replaced.extend((place, tensor) for tensor in tensors)
        self.notes = tuple(
            f"forward keeps a tensor in {name!r}, where there was none: no step sees what another one kept"
            for name in sorted(empty & now.keys())
        )

    def check(self, exported: torch.export.ExportedProgram) -> None:
        """UnsupportedError where a graph reads what was replaced, or holds what only the tracer had."""
        buffers = exported.graph_signature.inputs_to_buffers.values()  # of models on the meta device
        held = (value for name, value in exported.constants.items() if name not in buffers)
        made = next((value for value in held if isinstance(value, FakeTensor)), None)
        if made is not None:
            raise UnsupportedError(
                f"forward makes a tensor {list(made.shape)} in a way that is not seen when a model is traced: state "
                "what it is made of with ordinary calls, gradients with torch.func.jvp or by hand"
            )
        names = exported.graph_signature.inputs_to_buffers
        nodes = exported.graph_module.graph.find_nodes(op="placeholder")
        read = {names[n.name].removeprefix("model."): bool(n.users) for n in nodes if n.name in names}
        for name, before in self.replaced:
            if read.get(name, any(value is before for value in exported.constants.values())):
                raise UnsupportedError(
                    f"forward reads {name!r} and puts another tensor there, which the next step would not see: "
                    "register it as a buffer (register_buffer) that keeps its shape"
                )


def _write_assigned(model: nn.Module, registered: Mapping[Any, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Buffers that forward assigned get their values in place; those of another shape or dtype are returned."""
    others: list[tuple[str, torch.Tensor]] = []
    written = []
    for (module, name, kind), before in registered.items():
        after = _now(module, kind, name)
        if kind != "_buffers" or after is before or after is None:
            continue
        if (after.shape, after.dtype) != (before.shape, before.dtype):
            others.append((_path(model, module, name), before))
            continue
        after = after.detach() if after.requires_grad else after
        written.append((before, after.clone() if any(after is b for b in registered.values()) else after))
        module._buffers[name] = before
    for before, after in written:
        before.copy_(after)
    return others


def _registered(model: nn.Module) -> dict[tuple[nn.Module, str, str], torch.Tensor]:
    return {
        (module, name, kind): tensor
        for module in model.modules()
        for kind in ("_parameters", "_buffers")
        for name, tensor in getattr(module, kind).items()
        if tensor is not None
    }


def _now(module: nn.Module, kind: str, name: str) -> torch.Tensor | None:
    """What is registered; scripted modules answer no ``get``."""
    held = getattr(module, kind)
    return held[name] if name in held else None


def _plain(model: nn.Module) -> dict[str, tuple[torch.Tensor, ...]]:
    """The tensors of each attribute that is no parameter, buffer or module: one, or those of a list or a dict."""
    found = {}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            tensors = () if name in _OWN else tuple(_tensors(value))
            if tensors:
                found[f"{prefix}.{name}".lstrip(".")] = tensors
    return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def _empty(model: nn.Module) -> set[str]:
    """Attributes that hold nothing yet: None, or an empty container."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in _OWN and (value is None or (isinstance(value, list | dict) and not value))
    }


def _path(model: nn.Module, module: nn.Module, name: str) -> str:
    prefix = next(path for path, found in model.named_modules() if found is module)
    return f"{prefix}.{name}".lstrip(".")
