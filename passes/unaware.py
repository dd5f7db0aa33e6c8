"""Unaware: a model that takes a path of its own while it is traced, and fails there, is traced on the path it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

_QUESTIONS = ("is_compiling", "is_exporting")
_PROBE = ("transformers.utils.import_utils", "is_fake_tensor")  # by which transformers' masks ask, beside torch


class Awareness:
    """Whether code outside torch is told that it is traced (``torch.compiler.is_exporting()``), and whether it asks."""

    def __init__(self) -> None:
        self._is_asked = False
        self._failed: str | None = None

    @contextmanager
    def over(self) -> Iterator[None]:
        """Around one run of forward."""
        with ExitStack() as patched:
            for name in _QUESTIONS:
                answer = self._answering(getattr(torch.compiler, name))
                patched.enter_context(mock.patch.object(torch.compiler, name, answer))
            module = sys.modules.get(_PROBE[0])
            if self._failed is not None and hasattr(module, _PROBE[1]):
                patched.enter_context(mock.patch.object(module, _PROBE[1], lambda tensor: False))
            yield

    def _answering(self, plain: Callable[[], bool]) -> Callable[[], bool]:
        def answer() -> bool:
            asker = str(sys._getframe(1).f_globals.get("__name__", ""))
            if asker.partition(".")[0] == "torch" or not plain():
                return plain()
            self._is_asked = True
            return self._failed is None

        return answer

    def give_up(self, failed: str) -> bool:
        """Tell no more, after a trace failed; whether that may change anything. failed: where, for the notes."""
        changes = self._is_asked and self._failed is None
        self._failed = failed
        return changes

    def notes(self) -> tuple[str, ...]:
        """That another path is traced than the model has for it."""
        if self._failed is None:
            return ()
        return (f"forward fails where it asks whether it is traced ({self._failed}): traced as it runs otherwise",)
