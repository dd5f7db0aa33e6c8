"""Unaware: a model is traced on the path that it runs, not on one that it has for traces and that may compute else.

Libraries ask whether they are traced (``torch.compiler.is_exporting()``), mostly so as not to read values, which a
trace has not. The answer is no, until the trace fails: then whoever asked last is told yes, if the trace comes further
so, and in the end all are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest import mock

import torch

_QUESTIONS = ("is_compiling", "is_exporting")
_PROBE = ("transformers.utils.import_utils", "is_fake_tensor")  # by which transformers' masks ask, beside torch
Place = tuple[tuple[str, int], ...]


class Awareness:
    """told: places in the code that are told they are traced, and where the trace failed before; all of them from then
    on where ``tells_all``."""

    def __init__(self) -> None:
        self.told: dict[Place, str] = {}
        self._tells_all: str | None = None
        self._asked: dict[Place, None] = {}
        self._tried: Place | None = None

    @contextmanager
    def over(self) -> Iterator[None]:
        """Around one run of forward."""
        self._asked = {}
        with ExitStack() as patched:
            for name in _QUESTIONS:
                answer = self._answering(getattr(torch.compiler, name))
                patched.enter_context(mock.patch.object(torch.compiler, name, answer))
            module = sys.modules.get(_PROBE[0])
            if hasattr(module, _PROBE[1]):
                answer = self._answering(getattr(module, _PROBE[1]))
                patched.enter_context(mock.patch.object(module, _PROBE[1], answer))
            yield

    def _answering(self, plain: Callable[..., bool]) -> Callable[..., bool]:
        def answer(*args: Any) -> bool:
            asker = _asker(sys._getframe(1))
            if _is_of_torch(asker) or not plain(*args):
                return plain(*args)
            place = _place(asker)
            self._asked.pop(place, None)
            self._asked[place] = None
            return self._tells_all is not None or place in self.told

        return answer

    def tell_last(self, failed: str) -> bool:
        """Tell whoever asked last before a trace failed; whether that may change anything.

        failed: where. If it failed there before, whoever was told since is told no more.
        """
        if self._tried is not None and self.told[self._tried] == failed:
            del self.told[self._tried]
            self._tried = None
            return False
        last = next(reversed(self._asked), None)
        if last is None or last in self.told or self._tells_all is not None:
            return False
        self._tried, self.told[last] = last, failed
        return True

    def tell_all(self, failed: str) -> bool:
        """Tell all that ask, after a trace failed; whether that may change anything."""
        changes = self._tells_all is None and any(place not in self.told for place in self._asked)
        if changes:
            self._tells_all = failed
        return changes

    def notes(self) -> tuple[str, ...]:
        """That another path is traced than the one that runs."""
        failures = dict.fromkeys([*self.told.values(), *([] if self._tells_all is None else [self._tells_all])])
        return tuple(
            f"forward asks whether it is traced, and cannot be where it is told that it is not ({failed}): what it "
            "computes where it is told so is taken to be the same"
            for failed in failures
        )


def _asker(frame: FrameType) -> FrameType:
    """Who asks, torch's own names for the question left out (``torch._dynamo.is_compiling``)."""
    while frame.f_code.co_name in _QUESTIONS and _is_of_torch(frame) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _is_of_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"


def _place(asker: FrameType) -> Place:
    """The lines from one that asks out to the module that called them: the same in equal layers."""
    lines: list[tuple[str, int]] = []
    frame: FrameType | None = asker
    while frame is not None and not _is_of_torch(frame):
        lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(lines)
