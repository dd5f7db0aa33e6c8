"""What tests ask of torch again and again is answered once: traces of equal models, of equal pieces, and updates.

To plan a tiny model is to trace it for the most part, and many tests plan one model under many pins. An answer is found
by all that it depends on: the model with its weights, the batch, and torch's settings; pieces and updates by what
``autopar.link.Linker`` tells them apart by within one plan. What is patched is what planning calls: tests of tracing
and of optimizers' prices ask for themselves.
"""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import autopar.link
import autopar.optimizer_price
import autopar.planning
from passes.stitch import Templates

MOST_MODELS, MOST_PIECES, MOST_UPDATES = 64, 512, 512
UPDATES = (
    (autopar.optimizer_price, "observe"),
    (autopar.planning, "is_elementwise"),
    (autopar.planning, "is_separable"),
)
_BY_IDENTITY = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.MethodType)
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class Kept(dict[Any, Any]):
    """A dict of the newest entries."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > self.most:
            del self[next(iter(self))]


class _Digest(pickle.Pickler):
    """Functions and classes by identity, tensors by values and by which of them share memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.held: list[Any] = []
        self.tensors: dict[int, int] = {}
        self.storages: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _BY_IDENTITY):
            said = _said_by(obj) if isinstance(obj, type) and issubclass(obj, torch.nn.Module) else ()
            self.held.extend((obj, *said))
            if said:
                return (id(obj), *map(id, said))
            return id(obj.__self__) if isinstance(obj, types.MethodType) else 0, id(getattr(obj, "__func__", obj))
        return self._tensor(obj) if isinstance(obj, torch.Tensor) else None

    def _tensor(self, tensor: torch.Tensor) -> Any:
        if type(tensor) not in (*_PLAIN_TENSORS, FakeTensor) or tensor.layout != torch.strided:
            raise pickle.PicklingError(type(tensor).__name__)
        self.held.append(tensor)
        number = self.tensors.setdefault(id(tensor), len(self.tensors))
        storage = self.storages.setdefault(tensor.untyped_storage()._cdata, len(self.storages))
        place = (number, storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        kind = (type(tensor).__name__, str(tensor.dtype), str(tensor.device), tensor.requires_grad)
        return *place, *kind, tensor.grad_fn is None, _values(tensor), self._attributes(tensor)

    def _attributes(self, tensor: torch.Tensor) -> str:
        if vars(tensor) and type(tensor) is not FakeTensor:
            raise pickle.PicklingError("a tensor with attributes")
        return ""


def _said_by(kind: type) -> tuple[Any, ...]:
    """What a class of modules of the user's says: tests may replace its methods."""
    own = (base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins")))
    return tuple(value for base in own for value in vars(base).values() if isinstance(value, types.FunctionType))


def _values(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta or type(tensor) is FakeTensor:
        return b""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).digest()


def digest(asked: Any) -> tuple[bytes, list[Any]] | None:
    """Equal for equal questions, with what has to live as long as it is known; None for what is not plain enough."""
    file = io.BytesIO()
    pickler = _Digest(file)
    try:
        pickler.dump((asked, _settings()))
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError, NotImplementedError):
        return None
    return hashlib.sha256(file.getvalue()).digest(), pickler.held


def _settings() -> tuple[Any, ...]:
    """Of torch, that a trace depends on."""
    cuda = torch.backends.cuda
    fused = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled())
    kernels = (*fused, cuda.math_sdp_enabled(), str(torch.get_default_device()))
    casts = [(torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind))) for kind in ("cpu", "cuda")]
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *casts)
    return str(torch.get_default_dtype()), torch.are_deterministic_algorithms_enabled(), *kernels, *modes


def once(asked: Callable[..., Any], most: int) -> Callable[..., Any]:
    """The function, run once for equal arguments where it returns."""
    answers = Kept(most)

    @functools.wraps(asked)
    def answer(*args: Any, **kwargs: Any) -> Any:
        found = digest((args, kwargs))
        if found is None:
            return asked(*args, **kwargs)
        key, held = found
        if key not in answers:
            answers[key] = (asked(*args, **kwargs), held)
        return answers[key][0]

    return answer


@contextmanager
def _known_pieces() -> Iterator[None]:
    """Linkers know the pieces that others have traced, under the same settings."""
    known: dict[Any, Templates] = {}
    make = autopar.link.Linker.__init__

    @functools.wraps(make)
    def knowing(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self._templates = known.setdefault(_settings(), Templates(Kept(MOST_PIECES), Kept(MOST_PIECES)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autopar.link.Linker, "__init__", knowing)
        yield


@contextmanager
def asked_once() -> Iterator[None]:
    """What is planned within shares traces of models and of pieces, and runs of optimizers."""
    with pytest.MonkeyPatch.context() as patch, _known_pieces():
        patch.setattr(autopar.planning, "trace", once(autopar.planning.trace, MOST_MODELS))
        for module, name in UPDATES:
            patch.setattr(module, name, once(getattr(module, name), MOST_UPDATES))
        yield
