"""Questions: the truth of tensors that forward asks for (``if labels.max() >= n: raise``), which a trace cannot know.

The model is run as it is, on the batch at hand, for its answers. They are those of the trace where no batch would give
another (a mask that is made in forward), or where another raises: a check, which programs then leave out, and notes say
so. Branches that differ from batch to batch are refused, and so are models without weights.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary


class Questions:
    """answers: in the order in which they are asked, None while nobody has run the model; lines: where they are."""

    def __init__(self) -> None:
        self.answers: list[bool] | None = None
        self.lines: list[str] = []
        self._recording = False
        self._note: Callable[[Tensor, bool], bool] = lambda tensor, answer: answer

    @contextmanager
    def over(self) -> Iterator[None]:
        """Around one run of forward, in a trace or to be recorded."""
        known, truth, item = iter(zip(self.lines, self.answers or (), strict=True)), Tensor.__bool__, Tensor.item

        def asked(plain: Callable[[Tensor], Any], tensor: Tensor) -> Any:
            if self.answers is None:
                return plain(tensor)
            if self._recording:
                self.answers.append(self._note(tensor, bool(plain(tensor))))
                self.lines.append(_line())
                return self.answers[-1]
            line, answer = next(known, ("", False))
            return answer if line == _line() else plain(tensor)

        def asked_item(tensor: Tensor) -> Any:
            return asked(item, tensor) if tensor.dtype == torch.bool else item(tensor)

        with mock.patch.object(Tensor, "__bool__", lambda tensor: asked(truth, tensor)):
            with mock.patch.object(Tensor, "item", asked_item):
                yield

    def record(self, module: nn.Module, args: Sequence[object], kwargs: dict[str, object]) -> bool:
        """Run the model, whose buffers stay as they are; whether it asks, and all answers may be taken."""
        tensors = [*module.parameters(), *module.buffers(), *args, *kwargs.values()]
        if self.answers is not None or any(isinstance(t, Tensor) and _is_empty(t) for t in tensors):
            return False
        marks = _Marks(t for t in (*module.parameters(), *args, *kwargs.values()) if isinstance(t, Tensor))
        changing = self._run(module, args, kwargs, marks, None)
        for place in changing:
            try:
                self._run(module, args, kwargs, marks, place)
            except Exception:  # noqa: BLE001  (of whatever type the user's check raises)
                continue
            self.answers = None
            return False
        return bool(self.answers)

    def _run(
        self, module: nn.Module, args: Sequence[object], kwargs: dict[str, object], marks: _Marks, turned: int | None
    ) -> list[int]:
        """Places of questions about what another batch or step may change. turned: an answer to turn round."""
        held = {name: buffer.clone() for name, buffer in module.named_buffers()}
        kept = (self.answers, self.lines)
        self.answers, self.lines, self._recording, changing = [], [], True, []

        def note(tensor: Tensor, answer: bool) -> bool:
            place = len(self.lines)
            if tensor in marks.found:
                changing.append(place)
            return answer != (place == turned)

        self._note = note
        try:
            with torch.no_grad(), torch.random.fork_rng(), marks:
                module(*args, **kwargs)
        finally:
            self._recording = False
            if turned is not None:
                self.answers, self.lines = kept
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    buffer.copy_(held[name])
        return changing

    def notes(self) -> tuple[str, ...]:
        """The lines whose answers are taken for granted."""
        found = dict.fromkeys(zip(self.lines, self.answers or (), strict=True))
        return tuple(
            f"forward checks whether a tensor is true ({line}): steps take it to be {answer}, as it is now"
            for line, answer in found
        )


class _Marks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what is made of some tensors while it is entered; found: all of these that live."""

    def __init__(self, first: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for tensor in first:
            self.found[tensor] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor in self.found for tensor in given):
            for leaf in pytree.tree_leaves(made):
                if isinstance(leaf, Tensor):
                    self.found[leaf] = None
        return made


def _is_empty(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _line() -> str:
    """The innermost line outside of torch and of this file."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
