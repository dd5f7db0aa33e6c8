"""Gradients: what a rank does with them once per step, as the generated program calls it: sum, clip, update."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from autopar.runtime import initial
from autopar.runtime.comm import Begun
from autopar.runtime.measure import ONCE
from autopar.runtime.norm import sum_of_squares
from autopar.runtime.timed import Timed
from cost_model.axes import ACROSS, INSIDE

Tree = Any
WORLD_REDUCTION = "all_reduce world"
_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_


class Gradients(Timed):
    """begun: sums under way, by axis, buffer and first element; grad_norm: of the last step that clipped, or NaN."""

    def __init__(self, rank: int, world_size: int, payload: Tree) -> None:
        super().__init__(rank, world_size, payload)
        self.begun: dict[tuple[str, str, int], Begun] = {}
        self.grad_norm = math.nan

    def begin_gradients(self, axis: str, buffer: str, start: int, stop: int, dtype: str) -> None:
        """Begin to ``reduce_gradients``, of that dtype."""
        part = self._said(self.flat[buffer][start:stop], axis)
        assert part.dtype == getattr(torch, dtype)
        self.begun[axis, buffer, start] = self.comm.begin_all_reduce_(part, axis, "sum")

    def reduce_gradients(self, axis: str, buffer: str, start: int, stop: int, dtype: str) -> None:
        """Sum elements [start, stop) of a flat gradient buffer over an axis, in a dtype, or wait until that is done."""
        begun = self.begun.pop((axis, buffer, start), None)
        if begun is not None:
            self._timed("reduce", ONCE, lambda: self.comm.wait(begun), f"all_reduce {axis}")
            return
        self._all_reduce(self.flat[buffer][start:stop], axis, getattr(torch, dtype))

    def _said(self, part: Tensor, axis: str) -> Tensor:
        """What this rank gives to a sum: nothing where another of its stage gives their gradient."""
        return part.zero_() if axis in self.spec["silent"] else part

    def _all_reduce(self, part: Tensor, axis: str, dtype: torch.dtype) -> None:
        def run() -> None:
            sent = self._said(part, axis).to(dtype)
            summed = self.comm.all_reduce_(sent, axis, "sum")
            if summed is not part:
                part.copy_(summed)

        self._timed("reduce", ONCE, run, f"all_reduce {axis}")

    def scatter_span(self, buffer: str, start: int, stop: int, inner: int) -> None:
        """Elements [start, stop) of a flat gradient buffer: this rank's part becomes its sum over its group."""
        row = self.flat[buffer][start:stop]
        self._timed("reduce", ONCE, lambda: self.comm.reduce_scatter_(row, INSIDE), f"reduce_scatter {INSIDE}")

    def reduce_span(self, buffer: str, start: int, stop: int, inner: int) -> None:
        """Sum this rank's part over the other groups."""
        part = self.flat[buffer][start:stop].view(inner, -1)[self.comm.index(INSIDE)]
        self._all_reduce(part, ACROSS, part.dtype)

    def gather_span(self, buffer: str, start: int, stop: int, inner: int) -> None:
        """All parts, each from the rank of the group that has summed it."""
        row = self.flat[buffer][start:stop]
        self._timed("reduce", ONCE, lambda: self.comm.all_gather_(row, INSIDE), f"all_gather {INSIDE}")

    def unscale_gradients(self) -> None:
        """Gradients of the loss itself, and whether any rank has one that is not finite."""
        assert self.scaler is not None
        scaler, split = self.scaler, self.buckets
        parts = [split[name].part(row) if name in split else row for name, row in self.flat.items()]
        self._timed("optimizer", ONCE, lambda: scaler.unscale(parts))
        if "world" in self.groups:
            self._timed("reduce", ONCE, lambda: self.comm.all_reduce_(scaler.found, "world", "sum"), WORLD_REDUCTION)

    def adjust_scale(self) -> bool:
        """Set the scale of the next step's loss; whether this update is skipped."""
        assert self.scaler is not None
        return self.scaler.adjust()

    def clip_gradients(self, max_norm: float) -> None:
        """Scale all gradients so that their norm over all ranks is at most this, as torch.nn.utils does."""
        squares = self._timed("optimizer", ONCE, self._sum_of_squares)
        if "world" in self.groups:
            self._timed("reduce", ONCE, lambda: self.comm.all_reduce_(squares, "world", "sum"), WORLD_REDUCTION)
        norm = squares.sqrt()
        scale = torch.clamp(max_norm / (norm + _CLIP_EPSILON), max=1.0)
        self._timed("optimizer", ONCE, lambda: [buffer.mul_(scale) for buffer in self.flat.values()])
        self.grad_norm = float(norm)

    def _sum_of_squares(self) -> Tensor:
        """Of this rank's gradients, each divided by how many ranks hold it."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for buffer, start, stop, copies in self.spec["norm_spans"]:
            total += sum_of_squares(self.flat[buffer][start:stop]) / copies
        return total

    def scatter_gradients(self, axis: str, bucket: str) -> None:
        """This rank's part of a bucket's gradients becomes their sum over an axis."""
        row, held = self.flat[bucket], self.buckets[bucket]

        def run() -> None:
            sent = row.to(held.reduce_dtype)
            mine = self.comm.reduce_scatter_(sent, axis)
            if sent is not row:
                held.part(row).copy_(mine)

        self._timed("reduce", ONCE, run, f"reduce_scatter {axis}")

    def reduce_part(self, axis: str, bucket: str) -> None:
        """Sum this rank's part of a bucket's gradients over another axis than that which it is split over."""
        held = self.buckets[bucket]
        self._all_reduce(held.part(self.flat[bucket]), axis, held.reduce_dtype)

    def gather_parameters(self, axis: str, bucket: str) -> None:
        """All of a bucket's parameters, from the ranks that updated them."""
        row = self.buckets[bucket].weights
        self._timed("reduce", ONCE, lambda: self.comm.all_gather_(row, axis), f"all_gather {axis}")

    def update_parameters(self) -> None:
        """One optimizer step on this rank's shards, or their master copies; parameters are rounded from these."""
        if self.optimizer is not None:
            self._timed("optimizer", ONCE, self._update)

    def _update(self) -> None:
        assert self.optimizer is not None
        self.comm.settle()
        for name, tensor in self.updated.items():
            tensor.grad = self.gradients[name].to(tensor.dtype)
        self.optimizer.step()
        for tensor in self.updated.values():
            tensor.grad = None
        self.round()

    def update_buffer(self, name: str) -> None:
        """Give a buffer the value that backward found for it."""
        self.buffers[name].copy_(self.updates[name])
        self.updates[name].zero_()

    def leave_parameter(self, parameter: str, name: str) -> None:
        """Give a parameter, in every copy of it, the value that forward left it with."""
        initial.change(self, parameter, self.buffers[name])
        self.round()

    def count(self, name: str, step: float) -> None:
        """Add to a counter."""
        self.buffers[name] += step
