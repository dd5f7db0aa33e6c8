"""Ambient: ``torch.autocast`` around calls, which changes what a model computes; a program has it as it was traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from cost_model.errors import ConfigError

_KINDS = ("cpu", "cuda")


def autocast_here() -> dict[str, str]:
    """Kind of device -> the dtype that calls on it are cast to at this place of the script."""
    on = (kind for kind in _KINDS if torch.is_autocast_enabled(kind))
    return {kind: str(torch.get_autocast_dtype(kind)).removeprefix("torch.") for kind in on}


def check_autocast(planned: dict[str, str]) -> None:
    """ConfigError where it is not what the plan was made under."""
    here = autocast_here()
    if here != planned:
        raise ConfigError(
            f"torch.autocast {_named(here)} here and {_named(planned)} where the plan was made, and programs "
            "have it as it was there: call autopar.compile with its inputs under the same torch.autocast, or pass "
            "precision=autopar.Precision(compute=...)"
        )


def _named(autocast: dict[str, str]) -> str:
    return " and ".join(f"casts to {dtype} on {kind}" for kind, dtype in autocast.items()) or "is off"


@contextmanager
def as_written() -> Iterator[None]:
    """Programs run without it: their casts are written out."""
    with ExitStack() as off:
        for kind in autocast_here():
            off.enter_context(torch.autocast(kind, enabled=False))
        yield
