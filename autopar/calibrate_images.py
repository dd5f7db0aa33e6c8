"""The probes of ops over images that rows of their kinds do not tell: pooling, resizing, depthwise convolutions,
forward and backward.

Pools take up to sixteen times as long as other ops that move as much, depthwise convolutions a tenth or less of what
products of so few columns say.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch

from autopar.calibrate_operands import Made, Tensor, drawn
from autopar.calibrate_streams import STREAM_BYTES, TINY_BYTES
from autopar.calibrate_worker import ALONE, Probe

aten = torch.ops.aten

_CHANNELS, _SIDE = 32, 32
"""At most; of thousands of channels a pixel of resized images takes five times as long."""
_HALVES = ([2, 2], [2, 2])
"""Windows of a pool, and how far apart they are."""
_PIXEL_BYTES = 5  # of an image's pixel of float32 and the quarter of one of half its side


def image_probes() -> Iterator[Probe]:
    """Each op at each size; the smallest tells its overhead."""
    for made in (_max_pool, _average_pool, _nearest, _bilinear, _depthwise):
        for backward in (False, True):
            name = f"{made.__name__.strip('_').replace('_', ' ')}{' backward' if backward else ''}"
            for nbytes in (TINY_BYTES, *STREAM_BYTES[1:5:2]):
                yield Probe(ALONE, f"{name}, {nbytes / 2**10:,.0f} KiB", functools.partial(made, nbytes, backward))


def _images(nbytes: int) -> tuple[Tensor, Tensor]:
    """Images and such of half their sides, together of about so many bytes."""
    numel = nbytes // _PIXEL_BYTES
    side = 2 * max(1, min(_SIDE, math.isqrt(numel)) // 2)
    channels = max(1, min(_CHANNELS, numel // side**2))
    batch = max(1, numel // (channels * side**2))
    return drawn(batch, channels, side, side), drawn(batch, channels, side // 2, side // 2)


def _max_pool(nbytes: int, backward: bool) -> Made:
    full, half = _images(nbytes)
    if not backward:
        return aten.max_pool2d_with_indices.default, (full, *_HALVES), {}
    _, indices = aten.max_pool2d_with_indices.default(full, *_HALVES)
    args = (half, full, *_HALVES, [0, 0], [1, 1], False, indices)
    return aten.max_pool2d_with_indices_backward.default, args, {}


def _average_pool(nbytes: int, backward: bool) -> Made:
    full, half = _images(nbytes)
    if not backward:
        return aten.avg_pool2d.default, (full, *_HALVES), {}
    return aten.avg_pool2d_backward.default, (half, full, *_HALVES, [0, 0], False, True, None), {}


def _nearest(nbytes: int, backward: bool) -> Made:
    full, half = _images(nbytes)
    if not backward:
        return aten.upsample_nearest2d.default, (half, full.shape[2:]), {}
    return aten.upsample_nearest2d_backward.default, (full, full.shape[2:], half.shape), {}


def _bilinear(nbytes: int, backward: bool) -> Made:
    full, half = _images(nbytes)
    if not backward:
        return aten.upsample_bilinear2d.default, (half, full.shape[2:], False), {}
    return aten.upsample_bilinear2d_backward.default, (full, full.shape[2:], half.shape, False), {}


def _depthwise(nbytes: int, backward: bool) -> Made:
    images, _ = _images(nbytes)
    batch, channels, rows, columns = images.shape
    full = images.view(batch, 2 * channels, rows // 2, columns)  # with one channel it would be a plain convolution
    weight, bias = drawn(2 * channels, 1, 3, 3), drawn(2 * channels)
    window = ([1, 1], [1, 1], [1, 1], False, [0, 0], 2 * channels)
    if not backward:
        return aten.convolution.default, (full, weight, bias, *window), {}
    gradient = drawn(batch, 2 * channels, rows // 2, columns)
    args = (gradient, full, weight, [2 * channels], *window, [True, True, True])
    return aten.convolution_backward.default, args, {}
