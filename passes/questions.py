"""Questions: the truth of tensors that forward asks for (``if labels.max() >= n: raise``), which a trace cannot know.

The model is run as it is, on the batch at hand, for its answers. They are those of the trace where no batch and no step
would give another (a mask that is made in forward), where another raises (a check), and where another makes the loss
and the buffers of the same calls (a warning): programs then leave it out, and notes say so. Branches that differ from
batch to batch, or from step to step (a buffer that is set in the first), are refused, and so are models without
weights.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from passes.followed import Followed
from passes.settled import settled


@dataclass(frozen=True)
class _Answered:
    """changing: places of questions about what another batch or step may change; made: keys of what the loss and the
    buffers are made of; changed: paths of the buffers that forward wrote to or replaced."""

    changing: Sequence[int]
    made: Sequence[tuple[int, int]]
    changed: Sequence[str]


class _Held:
    """tensors: path -> buffer, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._owners = {
            f"{prefix}.{name}": (module._buffers, name)
            for prefix, module in model.named_modules()
            for name, tensor in module._buffers.items()
            if tensor is not None
        }
        self.tensors = {path: cast(Tensor, owner[name]) for path, (owner, name) in self._owners.items()}
        self._values = {path: tensor.detach().clone() for path, tensor in self.tensors.items()}

    def changed(self) -> list[str]:
        """Paths of those that were replaced since, or have other values (kernels write to some without a trace)."""
        return [
            path
            for path, (owner, name) in self._owners.items()
            if owner[name] is not self.tensors[path] or not torch.equal(self.tensors[path], self._values[path])
        ]

    def put_back(self) -> None:
        with torch.no_grad():
            for path, (owner, name) in self._owners.items():
                owner[name] = self.tensors[path].copy_(self._values[path])


class Questions:
    """answers: in the order in which one run of the model asks, None while there was none; lines: where they are asked.

    refused: places of questions that another batch may answer otherwise, and the model goes on either way.
    """

    def __init__(self) -> None:
        self.answers: list[bool] | None = None
        self.lines: list[str] = []
        self.refused: set[int] = set()
        self._taken: dict[tuple[str, bool], None] = {}
        self._recording = False
        self._note: Callable[[Tensor, bool], bool] = lambda tensor, answer: answer

    @contextmanager
    def over(self) -> Iterator[None]:
        """Around one run of forward, in a trace or to be recorded."""
        following, truth, item = 0, Tensor.__bool__, Tensor.item

        def asked(plain: Callable[[Tensor], Any], tensor: Tensor) -> Any:
            nonlocal following
            if self.answers is None or (not self._recording and settled(tensor) is not None):
                return plain(tensor)
            if self._recording:
                self.answers.append(self._note(tensor, bool(plain(tensor))))
                self.lines.append(_line())
                return self.answers[-1]
            line = _line()
            place = next((p for p in range(following, len(self.lines)) if self.lines[p] == line), None)
            if place is None or place in self.refused:  # a model may ask what it does not ask while it is traced
                return plain(tensor)
            following = place + 1
            self._taken[line, self.answers[place]] = None
            return self.answers[place]

        def asked_item(tensor: Tensor) -> Any:
            return asked(item, tensor) if tensor.dtype == torch.bool else item(tensor)

        with mock.patch.object(Tensor, "__bool__", lambda tensor: asked(truth, tensor)):
            with mock.patch.object(Tensor, "item", asked_item):
                yield

    def record(self, module: nn.Module, args: Sequence[object], kwargs: dict[str, object]) -> bool:
        """Run the model, whose buffers stay as they are; whether it asks."""
        tensors = [*module.parameters(), *module.buffers(), *args, *kwargs.values()]
        if self.answers is not None or any(isinstance(t, Tensor) and _is_empty(t) for t in tensors):
            return False
        first = self._run(module, args, kwargs, None, ())
        if first.changed:  # whose values another step may change
            first = self._run(module, args, kwargs, None, first.changed)
        for place in first.changing:
            try:
                otherwise = self._run(module, args, kwargs, place, first.changed).made
            except Exception:  # noqa: BLE001  (of whatever type the user's check raises)
                continue
            if otherwise != first.made:
                self.refused.add(place)
        return bool(self.answers)

    def _run(
        self,
        module: nn.Module,
        args: Sequence[object],
        kwargs: dict[str, object],
        turned: int | None,
        varying: Sequence[str],
    ) -> _Answered:
        """turned: an answer to turn round; varying: buffers that are not the same in every step."""
        held = _Held(module)
        sources = [t for t in (*module.parameters(), *args, *kwargs.values()) if isinstance(t, Tensor)]
        followed = Followed([*sources, *(held.tensors[path] for path in varying)], module.buffers())
        kept = (self.answers, self.lines)
        self.answers, self.lines, self._recording, changing = [], [], True, []

        def note(tensor: Tensor, answer: bool) -> bool:
            place = len(self.lines)
            if followed.finds(tensor):
                changing.append(place)
            return answer != (place == turned)

        self._note = note
        try:
            with torch.random.fork_rng(), followed, torch.autograd.graph.saved_tensors_hooks(_drop, _drop):
                loss = module(*args, **kwargs)
            return _Answered(changing, [followed.key(t) for t in (loss, *module.buffers())], held.changed())
        finally:
            self._recording = False
            if turned is not None:
                self.answers, self.lines = kept
            held.put_back()

    def notes(self) -> tuple[str, ...]:
        """The lines whose answers are taken for granted."""
        return tuple(
            f"forward checks whether a tensor is true ({line}): steps take it to be {answer}, as it is now"
            for line, answer in self._taken
        )


def _drop(saved: Tensor) -> Any:
    """What autograd saves, for a backward that is never run."""


def _is_empty(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _line() -> str:
    """The innermost line outside of torch and of this file."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
