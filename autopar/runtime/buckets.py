"""Rows on one rank: flat gradient buffers, and buckets of parameters whose state is split over the dp axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autopar.runtime.comm import Comm

Tree = Any


class HeldBucket:
    """What a rank holds of a bucket. ``described``: a tree made by ``autopar.payload``.

    weights: all parameters in a row, or at level 3 this rank's part of the row; gradients: likewise, from level 2 on
    the part alone, None where nothing is trained; params, grads: views of single parameters into whole rows.
    master: this rank's part in the dtype that is updated, None where that is the weights' own.
    """

    def __init__(self, described: Tree, index: int, device: torch.device) -> None:
        self.zero, self.dp, self.index = described["zero"], described["dp"], index
        self.parameters: list[tuple[str, list[int], int]] = described["parameters"]
        self.pieces: list[tuple[str, int, int, int]] = described["pieces"]
        self.weights: Tensor = described["weights"].to(device).contiguous()
        self.part_numel = self.weights.numel() if self.zero == 3 else self.weights.numel() // self.dp
        master = described["master"]
        self.master: Tensor | None = None if master is None else master.to(device).contiguous()
        self.reduce_dtype: torch.dtype = getattr(torch, described["reduce"])
        count, dtype = self.weights.numel() if self.zero == 1 else self.part_numel, getattr(torch, described["grads"])
        self.gradients = self.weights.new_zeros(count, dtype=dtype) if described["trainable"] else None
        self.params = {} if self.zero == 3 else self._views(self.weights)
        self.grads = self._views(self.gradients) if self.zero == 1 and self.gradients is not None else {}

    @property
    def source(self) -> Tensor:
        """What holds the values of this rank's part exactly: the master copy, else the weights."""
        return self.weights if self.master is None else self.master

    def round(self) -> None:
        """This rank's part of the weights from its master copy."""
        if self.master is not None:
            self.part(self.weights).copy_(self.master)

    def own(self, row: Tensor) -> dict[str, Tensor]:
        """This rank's piece of each parameter that it has one of, as a view of a row."""
        part = self.part(row)
        return {name: part[at : at + stop - start] for name, at, start, stop in self.pieces}

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Elements [start, stop) of each flattened parameter that are this rank's piece."""
        return {name: (start, stop) for name, _, start, stop in self.pieces}

    def part(self, row: Tensor) -> Tensor:
        """This rank's part of a row; a row that is one already is given back."""
        first = self.index * self.part_numel
        return row if row.numel() == self.part_numel else row[first : first + self.part_numel]

    @property
    def is_split(self) -> bool:
        """Whether no rank holds the exact values of all of it."""
        return self.zero == 3 or self.master is not None

    def whole(self, comm: Comm) -> Mapping[str, Tensor]:
        """Every parameter whole; all ranks of the dp axis must ask at once."""
        if not self.is_split:
            return self.params
        return self._views(comm.all_gather(self.source, "dp", self.dp, 0, 1))

    def _views(self, row: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, shape, offset in self.parameters:
            count = int(torch.Size(shape).numel())
            found[name] = row[offset : offset + count].view(shape)
        return found


def gradient_buffers(
    layout: tuple[tuple[str, tuple[str, ...]], ...], params: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One flat buffer per dtype, in the given order of parameters, and each parameter's view into it."""
    flat: dict[str, Tensor] = {}
    views: dict[str, Tensor] = {}
    for dtype, names in layout:
        total = sum(params[n].numel() for n in names)
        flat[dtype] = torch.zeros(total, dtype=getattr(torch, dtype), device=params[names[0]].device)
        offset = 0
        for name in names:
            count = params[name].numel()
            views[name] = flat[dtype][offset : offset + count].view(params[name].shape)
            offset += count
    return flat, views
