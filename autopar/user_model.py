"""The model that a command line names: a factory in a file or a module, called and checked."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from cost_model.errors import ConfigError, UnknownNameError

_MODEL_FORMS = "MODEL is path.py:factory or package.module:factory, and factory() returns (model, inputs)"


@dataclass(frozen=True)
class Loaded:
    """What a factory returned."""

    model: Any
    inputs: Any
    loss_fn: Callable[[Any, Any], Any] | None


@contextlib.contextmanager
def loaded(spec: str) -> Iterator[Loaded]:
    """The model that MODEL names; meanwhile its folder is importable, as for a script.

    Errors: ConfigError; what the user's own code raises is passed on as it is.
    """
    with located(spec) as factory:
        yield made(spec, factory)


@contextlib.contextmanager
def located(spec: str) -> Iterator[Callable[..., Any]]:
    """The factory that MODEL names; see ``loaded``."""
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(f"cannot read {spec!r}; {_MODEL_FORMS}")
    is_file = place.endswith(".py") or os.sep in place
    path = Path(place)
    if is_file and not path.is_file():
        raise ConfigError(f"there is no file {place!r}; {_MODEL_FORMS}")
    with _importable(path.resolve().parent if is_file else Path.cwd()):
        module = _run_file(path) if is_file else _import(place)
        yield _factory(module, name)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The folder first in ``sys.path``, and out of it again."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _run_file(path: Path) -> ModuleType:
    name = path.stem if path.stem not in sys.modules else f"autopar_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{str(path)!r} is no Python file; {_MODEL_FORMS}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> ModuleType:
    """Errors: ConfigError where the module itself is missing, not one that it imports."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"there is no module {error.name!r} (from {Path.cwd()}); {_MODEL_FORMS}") from error


def _factory(module: ModuleType, name: str) -> Callable[..., Any]:
    if not hasattr(module, name):
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and callable(v)]
        raise UnknownNameError(f"factory of {module.__name__}", name, own)
    factory = getattr(module, name)
    if not callable(factory):
        raise ConfigError(f"{name!r} of {module.__name__} is {type(factory).__name__}, not a function; {_MODEL_FORMS}")
    return cast(Callable[..., Any], factory)


def made(spec: str, factory: Callable[..., Any], **keywords: int) -> Loaded:
    """Call the factory and check what it returns. Errors: ConfigError."""
    from torch import nn

    try:
        inspect.signature(factory).bind(**keywords)
    except TypeError as error:
        wanted = f"the keyword {', '.join(keywords)}" if keywords else "no arguments"
        raise ConfigError(f"{spec} must take {wanted} ({error}); {_MODEL_FORMS}") from error
    found = factory(**keywords)
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        size = f" of {len(found)}" if isinstance(found, tuple) else ""
        raise ConfigError(f"{spec} returned {type(found).__name__}{size}; return (model, inputs) or (..., loss_fn)")
    model, inputs, loss_fn = (*found, None)[:3]
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{spec} returned {type(model).__name__} as its model; return a torch.nn.Module first")
    if not isinstance(inputs, dict | tuple):
        raise ConfigError(f"{spec} returned {type(inputs).__name__} as its inputs; return a dict or a tuple of tensors")
    return Loaded(model, inputs, loss_fn)
