"""The probes of ops that handle numbers one by one: lookups of single elements, comparisons, places of maxima, slow
functions, batch norm's statistics; and of rows so narrow that beginning each takes its time.

By the bytes they move they would be priced at a third to a thirtieth of their time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from autopar.calibrate_operands import WIDTH, Kernel, Made, Tensor, drawn
from autopar.calibrate_streams import STREAM_BYTES, TINY_BYTES
from autopar.calibrate_worker import ALONE, NARROW, Probe
from autopar.runtime import draws
from passes import random_vocabulary

aten = torch.ops.aten

_TALL, _NARROW = 8192, 8
"""Rows of half a cache line and half a vector."""
_CHANNELS, _PIXELS = 32, 32
_SQUARE = 256


def element_probes() -> Iterator[Probe]:
    """Each op at each size; the smallest tells its overhead."""
    for made in _ALONE:
        for nbytes in (TINY_BYTES, *STREAM_BYTES[1:5:2]):
            label = f"{made.__name__.strip('_').replace('_', ' ')}, {nbytes / 2**10:,.0f} KiB"
            yield Probe(ALONE, label, functools.partial(made, nbytes))
    for name, make in _NARROWS:
        yield Probe(NARROW, f"narrow {name}", make)


def _matrix(nbytes: int) -> Tensor:
    """Of so many bytes."""
    numel = max(1, nbytes // 4)
    return drawn(max(1, numel // WIDTH), min(WIDTH, numel))


def _index(nbytes: int) -> Made:
    table = _matrix(nbytes // 2)
    return aten.index.Tensor, (table, [torch.randint(len(table), (len(table),))]), {}


def _index_put(nbytes: int) -> Made:
    values = _matrix(nbytes // 3)
    ids = torch.randint(len(values), (len(values),))
    return aten.index_put.default, (torch.zeros_like(values), [ids], values, True), {}


def _gather(nbytes: int) -> Made:
    source = _matrix(nbytes // 4)
    return aten.gather.default, (source, -1, torch.randint(source.shape[1], source.shape)), {}


def _scatter_add(nbytes: int) -> Made:
    values = _matrix(nbytes // 5)
    index = torch.randint(values.shape[1], values.shape)
    return aten.scatter_add.default, (torch.zeros_like(values), -1, index, values), {}


def _places_of_maxima(nbytes: int) -> Made:
    return aten.max.dim, (_matrix(nbytes), -1), {}


def _comparison(nbytes: int) -> Made:
    return aten.eq.Tensor, (_matrix(nbytes // 2), _matrix(nbytes // 2)), {}


def _batch_norm(nbytes: int) -> Made:
    numel = nbytes // 12
    channels = min(_CHANNELS, numel)
    pixels = min(_PIXELS**2, numel // channels)
    images = drawn(numel // (channels * pixels), channels, pixels, 1)
    return aten.native_batch_norm.default, (images, drawn(channels), drawn(channels), None, None, True, 0.1, 1e-5), {}


def _drop(nbytes: int) -> Made:
    values = _matrix(nbytes * 4 // 17)
    kept = (torch.arange(values.numel()) % 8 > 0).view(values.shape)
    return Kernel(random_vocabulary.drop, draws.drop), (values, kept, 1.125), {}


def _error_function(nbytes: int) -> Made:
    return aten.erf.default, (_matrix(nbytes // 2),), {}


def _cosine(nbytes: int) -> Made:
    return aten.cos.default, (_matrix(nbytes // 2),), {}


def _logarithm(nbytes: int) -> Made:
    return aten.log.default, (_matrix(nbytes // 2).abs().add_(0.5),), {}


def _power(nbytes: int) -> Made:
    return aten.pow.Tensor_Scalar, (_matrix(nbytes // 2).abs().add_(0.5), 1.5), {}


def _sigmoid(nbytes: int) -> Made:
    return aten.sigmoid.default, (_matrix(nbytes // 2),), {}


def _softplus(nbytes: int) -> Made:
    return aten.softplus.default, (_matrix(nbytes // 2),), {}


def _elu(nbytes: int) -> Made:
    return aten.elu.default, (_matrix(nbytes // 2),), {}


def _mish(nbytes: int) -> Made:
    return aten.mish.default, (_matrix(nbytes // 2),), {}


_ALONE: tuple[Callable[[int], Made], ...] = (
    _index,
    _index_put,
    _gather,
    _scatter_add,
    _places_of_maxima,
    _comparison,
    _batch_norm,
    _drop,
    _error_function,
    _cosine,
    _logarithm,
    _power,
    _sigmoid,
    _softplus,
    _elu,
    _mish,
)


def _tall() -> Tensor:
    return drawn(_TALL, _NARROW)


def _single_elements() -> list[Tensor]:
    """Their places in what is tall, in any order."""
    return [torch.randint(extent, (_TALL * _NARROW,)) for extent in (_TALL, _NARROW)]


def _rows() -> Tensor:
    """Of two samples, as those of tokens or nodes."""
    return drawn(2, _SQUARE // 2, _SQUARE)


def _places() -> Tensor:
    """Which row each row goes to, or comes from."""
    return torch.randint(_SQUARE // 2, (2, _SQUARE // 2, 1)).expand(-1, -1, _SQUARE)


def _layer_norm_backward() -> Made:
    source, weight, bias = _tall(), drawn(_NARROW), drawn(_NARROW)
    _, mean, deviation = aten.native_layer_norm.default(source, [_NARROW], weight, bias, 1e-5)
    args = (_tall(), source, [_NARROW], mean, deviation, weight, bias, [True, True, True])
    return aten.native_layer_norm_backward.default, args, {}


_NARROWS: tuple[tuple[str, Callable[[], Made]], ...] = (
    ("index", lambda: (aten.index.Tensor, (_tall(), _single_elements()), {})),
    (
        "index put",
        lambda: (aten.index_put.default, (_tall(), _single_elements(), drawn(_TALL * _NARROW), True), {}),
    ),
    ("gather", lambda: (aten.gather.default, (_rows(), 1, _places()), {})),
    (
        "scatter add",
        lambda: (aten.scatter_add.default, (_rows(), 1, _places(), _rows()), {}),
    ),
    ("softmax", lambda: (aten._softmax.default, (_tall(), -1, False), {})),
    ("log softmax", lambda: (aten._log_softmax.default, (_tall(), -1, False), {})),
    ("safe softmax", lambda: (aten._safe_softmax.default, (_tall(), -1), {})),
    (
        "softmax backward",
        lambda: (aten._softmax_backward_data.default, (_tall(), _tall(), -1, torch.float32), {}),
    ),
    (
        "log softmax backward",
        lambda: (aten._log_softmax_backward_data.default, (_tall(), _tall(), -1, torch.float32), {}),
    ),
    (
        "layer norm",
        lambda: (aten.native_layer_norm.default, (_tall(), [_NARROW], drawn(_NARROW), drawn(_NARROW), 1e-5), {}),
    ),
    ("layer norm backward", _layer_norm_backward),
    ("sum", lambda: (aten.sum.dim_IntList, (_tall(), [-1]), {})),
    ("variance", lambda: (aten.var_mean.correction, (_tall(), [-1]), {"correction": 0, "keepdim": True})),
    (
        "mask",
        lambda: (
            Kernel(random_vocabulary.keep, draws.keep),
            (torch.tensor(1), [torch.arange(_TALL), torch.arange(_NARROW)], 0.1),
            {},
        ),
    ),
)
