"""Random numbers that know where they stand: a function of a key and an element's global coordinates.

A rank that holds a part of a tensor draws that part of what one device would draw for the whole, in whatever order and
as often as it likes. Leading coordinates are folded into 64 bits a row by splitmix64's finaliser (Steele, Lea and
Flood, 2014); those are mixed with 32 bits of the last coordinate by two multiplications, with the constants of Chris
Wellons' 32-bit hash "lowbias32".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_LAST_SHIFT = 31
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
_CHUNK = 2**15
"""Elements worked on at a time on a CPU: what is between two passes stays in its cache."""
_SPAN = 2**32
_FRACTION_BITS = 23
"""Of a uniform number: (k + 1/2) / 2**23 is exact in float32 and never 0 or 1."""


def random_keys(state: Tensor, count: int) -> Tensor:
    """One key [count], int64, for each call of a program that draws; state: (seed, number of the step)."""
    base = _mixed(_mixed(state[0]) + state[1])
    return _mixed(base + torch.arange(1, count + 1, device=state.device) * _GOLDEN)


def keep(key: Tensor, coordinates: Sequence[Tensor], p: float) -> Tensor:
    """A mask: False with probability p (to 2**-32). coordinates: of each dim, int64, as long as the dim."""
    limit = min(round((1 - p) * _SPAN), _SPAN - 1) - _SPAN // 2
    return _filled(key, coordinates, torch.bool, lambda bits, out: torch.lt(bits, limit, out=out))


def uniform(key: Tensor, coordinates: Sequence[Tensor]) -> Tensor:
    """float32 numbers between 0 and 1, both excluded."""
    return _filled(key, coordinates, torch.float32, _as_fractions)


def normal(key: Tensor, coordinates: Sequence[Tensor]) -> Tensor:
    """float32 numbers of mean 0 and variance 1, within 5.3 of 0: what 23 bits resolve."""
    return uniform(key, coordinates).mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2))


def random_integers(key: Tensor, coordinates: Sequence[Tensor]) -> Tensor:
    """int64 numbers in [0, 2**63)."""
    rows = _folded(key, coordinates)
    return rows.bitwise_and_(2**63 - 1)


def drop(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """x times scale where the mask is set, else 0."""
    if x.is_cuda:
        return torch.ops.aten.native_dropout_backward.default(x, mask, scale)  # type: ignore[no-any-return]
    return torch.mul(x, mask).mul_(scale)


def _filled(
    key: Tensor, coordinates: Sequence[Tensor], dtype: torch.dtype, store: Callable[[Tensor, Tensor], object]
) -> Tensor:
    """A tensor of ``dtype`` from 32 random bits an element, which ``store`` turns into its numbers."""
    shape = [len(c) for c in coordinates]
    width = shape[-1] if shape else 1
    out = torch.empty(shape, dtype=dtype, device=key.device)
    if not out.numel():
        return out
    first, second = _folded(key, coordinates[:-1]).reshape(-1, 1).view(torch.int32).unbind(1)
    column = _column(coordinates[-1] if shape else key.new_zeros(1))
    lines = out.view(-1, width)
    step = max(_CHUNK // width, 1) if out.device.type == "cpu" else len(lines)
    bits, shifted = (torch.empty(min(step, len(lines)), width, dtype=torch.int32, device=out.device) for _ in "ab")
    for start in range(0, len(lines), step):
        part = lines[start : start + step]
        _scramble(
            first[start : start + step, None],
            second[start : start + step, None],
            column,
            bits[: len(part)],
            shifted[: len(part)],
        )
        store(bits[: len(part)], part)
    return out


def _column(coordinate: Tensor) -> Tensor:
    """32 bits of each last coordinate, whatever the key."""
    spread = coordinate * _GOLDEN
    return ((spread ^ (spread >> 32)) * _MIX[0][1] >> 32).to(torch.int32)


def _scramble(first: Tensor, second: Tensor, column: Tensor, bits: Tensor, shifted: Tensor) -> None:
    """Fills ``bits`` from rows [n, 1] and columns [m]; the upper bits of a product depend on all of both."""
    torch.bitwise_xor(first, column, out=bits)
    bits.mul_(_MULTIPLIERS[0])
    _shift_in(bits, 15, shifted)
    bits.add_(second).mul_(_MULTIPLIERS[1])


def _shift_in(bits: Tensor, count: int, shifted: Tensor) -> None:
    """bits ^= bits >> count, with zeros from the left."""
    torch.bitwise_right_shift(bits, count, out=shifted)
    bits.bitwise_xor_(shifted.bitwise_and_((1 << (32 - count)) - 1))


def _as_fractions(bits: Tensor, out: Tensor) -> None:
    bits.bitwise_right_shift_(32 - _FRACTION_BITS)  # [-2**22, 2**22): the sign is shifted in
    out.copy_(bits)
    out.add_(0.5).mul_(2.0**-_FRACTION_BITS).add_(0.5)


def _folded(key: Tensor, coordinates: Sequence[Tensor]) -> Tensor:
    """64 bits for each combination of the coordinates, one dim each: the mix of a sum of unrelated odd multiples."""
    total = key
    for dim, coordinate in enumerate(coordinates):
        total = total.unsqueeze(-1) + coordinate * _weight(dim)
    return _mixed(total)


@functools.cache
def _weight(dim: int) -> int:
    """An odd number of 64 bits, signed."""
    return int(_mixed(torch.tensor(dim * _GOLDEN % 2**63))) | 1


def _mixed(z: Tensor) -> Tensor:
    """splitmix64's finaliser, on int64 as if it were unsigned."""
    for shift, factor in _MIX:
        z = (z ^ _shifted(z, shift)) * factor
    return z ^ _shifted(z, _LAST_SHIFT)


def _shifted(z: Tensor, count: int) -> Tensor:
    return (z >> count) & ((1 << (64 - count)) - 1)
