"""What torch.export raises as errors of ours: the user's line, and what to write instead."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cost_model.errors import AutoparError, BatchError, TraceError
from passes.shared_memory import check_buffers

DEPENDS_ON_VALUES = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
_OURS = tuple(str(Path(__file__).with_name(f"{name}.py")) for name in ("trace", "questions", "unaware", "settled"))
_INSTEAD = {
    "_ctc_loss": "labels of all samples one behind the other: pass rows [samples, labels] with their lengths",
    "Could not extract specialized integer": "len(x) and int(x) are numbers of Python: of what a mask picks write "
    "x.shape[0] for len(x), and compute with tensors as long as values differ from batch to batch",
    r"Size-like symbols: (?!none)": "how many elements a mask picks (nonzero, torch.where(mask), x[mask]) differs from "
    "batch to batch, and programs are of fixed shapes: compute all of them and weigh them by the mask; in a mixture of "
    "experts, each expert over all tokens (out = out + expert(x) * (weights * (chosen == i)).sum(-1, keepdim=True))",
}
"""What to write for calls that no trace can hold, by a pattern of what torch says of them."""


_LOGGERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


@contextmanager
def quiet() -> Iterator[None]:
    """Meanwhile torch does not log what it raises as well, with a traceback of hundreds of lines."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def as_trace_error(model: nn.Module) -> Iterator[None]:
    """What torch raises meanwhile as a TraceError with the user's line."""
    try:
        yield
    except AutoparError:
        raise
    except Exception as error:  # torch raises many types, AssertionError among them
        check_buffers(model)
        raise trace_error(error, model) from error


def check_arguments(model: nn.Module, args: Any, kwargs: Any) -> None:
    """BatchError where the batch does not fit the signature of ``forward``."""
    if isinstance(model, torch.jit.ScriptModule):
        return
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as mismatch:
        takes = ", ".join(signature.parameters)
        given = ", ".join(kwargs) or f"{len(args)} by position"
        raise BatchError(
            f"the inputs do not fit {type(model).__name__}.forward({takes}): {mismatch} (given: {given}); "
            "pass what forward takes, as a dict of keyword arguments or a tuple"
        ) from mismatch


def trace_error(error: Exception, model: nn.Module) -> TraceError:
    """What torch raised, with the user's line and what to write instead."""
    first = re.sub(r"\s+", " ", str(error).strip().split("\n\n")[0])[:400]
    if isinstance(error, DEPENDS_ON_VALUES):
        instead = next((text for pattern, text in _INSTEAD.items() if re.search(pattern, first)), None)
        return TraceError(first, _user_line(error, model), instead)
    advice = "run the model once on this batch without autopar; if that works, report the model's code"
    return TraceError(f"{type(error).__name__}: {first}", _user_line(error, model), advice)


def _user_line(error: BaseException, model: nn.Module) -> str | None:
    """The innermost line of the traceback that lies outside torch, preferring the model's own file."""
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    own = {inspect.getsourcefile(type(m)) for m in model.modules() if _has_source(type(m))}
    outside = [f for f in frames if "/torch/" not in f.filename and f.filename not in ("<string>", *_OURS)]
    chosen = [f for f in outside if f.filename in own] or outside
    if not chosen:
        return None
    frame = chosen[-1]
    code = (frame.code_context or [""])[0].strip()
    return f"{frame.filename}:{frame.lineno}: {code}"


def _has_source(cls: type) -> bool:
    try:
        return inspect.getsourcefile(cls) is not None
    except TypeError:
        return False
