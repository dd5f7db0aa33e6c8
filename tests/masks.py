"""Random numbers as their definition says, element by element in whole numbers; and a model that is given them.

Independent of ``autopar.runtime.draws``: what a plain PyTorch model must be given to do what a program does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def mixed(z: int) -> int:
    """splitmix64's finaliser."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def signed(word: int, bits: int) -> int:
    return word - 2**bits if word >= 2 ** (bits - 1) else word


def key_of(seed: int, step: int, call: int) -> int:
    return mixed((mixed((mixed(seed % WORD) + step) % WORD) + GOLDEN * (call + 1)) % WORD)


def _weight(dim: int) -> int:
    return mixed(dim * GOLDEN % 2**63) | 1


def word_at(key: int, place: tuple[int, ...]) -> int:
    """The 32 bits, signed, of one element; a tensor without dims has one at 0."""
    *leading, last = place or (0,)
    row = mixed((key + sum(c * _weight(dim) for dim, c in enumerate(leading))) % WORD)
    spread = last * GOLDEN % WORD
    column = ((spread ^ (signed(spread, 64) >> 32) % WORD) * 0xBF58476D1CE4E5B9 % WORD) >> 32
    word = ((row % 2**32) ^ column) * 0x7FEB352D % 2**32
    word = ((word ^ (word >> 15)) + (row >> 32)) * 0x846CA68B % 2**32
    return signed(word, 32)


def mask(key: int, shape: tuple[int, ...], p: float) -> Tensor:
    """False with probability p."""
    limit = round((1 - p) * 2**32) - 2**31
    kept = [word_at(key, place) < limit for place in np.ndindex(*shape)]
    return torch.tensor(kept).reshape(shape)


@contextmanager
def dropout_given(seed: int, step: int) -> Iterator[None]:
    """Every call of dropout in this context takes the mask that a program's step takes for the call of that number."""
    calls = iter(range(10**6))

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        return x * mask(key_of(seed, 2 * step, next(calls)), tuple(x.shape), p) / (1 - p)

    with mock.patch("torch.nn.functional.dropout", dropout):
        yield
