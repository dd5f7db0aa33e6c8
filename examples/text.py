"""Text that every Python has: the sources of its standard library, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def library_bytes(max_bytes: int = 2_000_000) -> Tensor:
    """The first max_bytes of the standard library's top-level modules in order of name, uint8 [n]."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= max_bytes:
            break
    return torch.frombuffer(text[:max_bytes], dtype=torch.uint8)


def batches(batch_size: int, block_size: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Endless batches of random windows, the same for the same seed.

    Yields {"idx", "targets"}, both int64 [batch_size, block_size]; targets are idx one byte later.
    """
    text = library_bytes()
    offsets = torch.arange(block_size + 1)
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - block_size, (batch_size, 1), generator=generator)
        windows = text[starts + offsets].long()
        yield {"idx": windows[:, :-1].contiguous(), "targets": windows[:, 1:].contiguous()}
