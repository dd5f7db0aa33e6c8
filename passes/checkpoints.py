"""Checkpoints: what layers under ``torch.utils.checkpoint`` do to buffers, which one device runs again in backward.

Recompute is the planner's matter, so that a trace has such layers once. A reentrant checkpoint runs again if one of its
arguments needs a gradient, and trains nothing otherwise; any other if backward needs what was saved inside of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction

from cost_model.errors import UnsupportedError

_GENERATOR = "_checkpoint_without_reentrant_generator"
_ADVICE = "leave the checkpoint away (the planner decides what is recomputed)"


@dataclass
class _Region:
    """Layers under one checkpoint. again: will they run again, as far as is known. once: norms held to run once."""

    reentrant: bool
    again: bool
    once: list[_BatchNorm] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run of a model's forward, and the batch norms that it calls."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._regions: list[_Region] = []
        self._called: dict[int, int] = {}

    @contextmanager
    def over(self) -> Iterator[None]:
        """Around the run. Errors: UnsupportedError where layers that run again change buffers other than of norms."""
        generator = getattr(checkpoint, _GENERATOR)

        def around(*args: Any, **kwargs: Any) -> Iterator[None]:
            with self._within(_Region(False, False)) as region, closing(generator(*args, **kwargs)) as own:
                next(own)
                with saved_tensors_hooks(_noting(region), lambda saved: saved):
                    yield
                next(own, None)

        with ExitStack() as patched:
            for owner, name, instead in (
                (CheckpointFunction, "apply", self._reentrant),
                (checkpoint, _GENERATOR, around),
            ):
                patched.enter_context(mock.patch.object(owner, name, instead))
            yield

    def runs(self, norm: _BatchNorm, x: Tensor) -> int:
        """How often one device runs this call of a norm that trains. Errors: UnsupportedError where order is lost."""
        tensors = [x, *norm.parameters()]
        runs = self._runs(norm, torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        before = self._called.get(id(norm.__dict__), 0)  # which the tracer's proxies of modules share
        self._called[id(norm.__dict__)] = max(before, runs)
        if before and max(before, runs) > 1:
            raise UnsupportedError(
                f"forward calls the batch norm {self._name(norm)!r} more than once, and under torch.utils.checkpoint, "
                f"where one device moves its statistics once more in backward, after all calls: {_ADVICE}"
            )
        return runs

    def _runs(self, norm: _BatchNorm, needs_gradient: bool) -> int:
        if not self._regions:
            return 1
        if len(self._regions) > 1:
            raise UnsupportedError(
                f"forward calls the batch norm {self._name(norm)!r} under a torch.utils.checkpoint within another, "
                "where one device moves its statistics three times: leave the inner or the outer one away"
            )
        (region,) = self._regions
        again = region.again if region.reentrant else needs_gradient
        if not again:
            region.once.append(norm)
        return 2 if again else 1

    def _reentrant(self, function: Callable[..., Any], _: bool, *args: Any) -> Any:
        again = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        with self._within(_Region(True, again)):
            made = function(*args)
        return made if again else pytree.tree_map_only(Tensor, lambda t: t.detach() if t.requires_grad else t, made)

    @contextmanager
    def _within(self, region: _Region) -> Iterator[_Region]:
        before = dict(self._model.named_buffers())
        versions = {name: buffer._version for name, buffer in before.items()}
        self._regions.append(region)
        try:
            yield region
        finally:
            self._regions.pop()
        if region.again:
            for outer in self._regions:
                outer.again = outer.again or not outer.reentrant
            self._check(region, before, versions)

    def _check(self, region: _Region, before: Mapping[str, Tensor], versions: Mapping[str, int]) -> None:
        """before, versions: of all buffers, when layers that run again began."""
        if region.once:
            raise UnsupportedError(
                f"forward calls the batch norm {self._name(region.once[0])!r}, to which nothing that trains leads, "
                f"under one torch.utils.checkpoint with layers that train: {_ADVICE}"
            )
        of_norms = {id(b) for m in self._model.modules() if id(m.__dict__) in self._called for b in m.buffers(False)}
        for name, buffer in self._model.named_buffers():
            same = buffer is before[name] and buffer._version == versions[name]
            if not same and id(buffer) not in of_norms:
                raise UnsupportedError(
                    f"forward changes {name!r} under torch.utils.checkpoint, which one device runs once more in "
                    f"backward: change it outside of the checkpoint, or {_ADVICE}"
                )

    def _name(self, norm: _BatchNorm) -> str:
        return next((name for name, m in self._model.named_modules() if m.__dict__ is norm.__dict__), "of no name")


def _noting(region: _Region) -> Callable[[Tensor], Tensor]:
    def save(saved: Tensor) -> Tensor:
        region.again = True
        return saved

    return save
