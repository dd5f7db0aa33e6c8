"""Weights in safetensors files, read block by block: of a tensor only what is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from safetensors import safe_open
from torch import Tensor

Place = tuple[str, str]
"""(file, name of the tensor in it)."""


class WeightFiles:
    """Open files. Usable as a context manager only."""

    def __init__(self, places: Mapping[str, Sequence[str]]) -> None:
        """places: name in the model -> its ``Place``."""
        self._places = places
        self._open: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def block(self, name: str, offsets: Sequence[int], extents: Sequence[int]) -> Tensor:
        """Elements [offset, offset + extent) along every dim of a tensor."""
        file, key = self._places[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        if not extents:
            return self._open[file].get_tensor(key)  # type: ignore[no-any-return]
        where = tuple(slice(first, first + count) for first, count in zip(offsets, extents, strict=True))
        return self._open[file].get_slice(key)[where]  # type: ignore[no-any-return]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.clear()
        self._stack.close()
