"""The probes of a calibration: which ops are timed, at which shapes.

Shapes span what training programs of small and middle size run on one CPU core: products of a few hundred to a
few thousand rows, operands from 16 KiB (in cache) to 32 MiB (in memory).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

from autopar.calibrate_worker import COLD_BYTES, Probe
from autopar.runtime import draws, kernels
from cost_model.device import ONEDNN
from passes import random_vocabulary, vocabulary
from passes.multiply import LEAST_FLOPS

Tensor: TypeAlias = torch.Tensor
Made: TypeAlias = tuple[Any, tuple[Any, ...], dict[str, Any]]
aten = torch.ops.aten

STREAM_BYTES = (16 * 2**10, 128 * 2**10, 2**20, 4 * 2**20, 12 * 2**20, 32 * 2**20)
_UPDATE_BYTES = (128 * 2**20,)
"""Updates move a rank's parameters, gradients and state in one call, more than any other op does."""
TINY_BYTES = 2**10
"""At this size an op takes no longer than its overhead."""
WIDTH = 512
_VOCABULARY = 4096
_HEADS = 4
_REFERENCE = 256
"""Extent of the cube whose product tells dtypes apart."""
_TINY = 8
"""Extent of products that take no longer than their overhead."""
_PAGE_NUMEL = 1024


@functools.cache
def all_probes(library: str) -> tuple[Probe, ...]:
    """All probes, in a fixed order, alike in number and names for all of ``PRODUCT_LIBRARIES``."""
    products = (*_products(library), *_batched_products())
    return (*products, *_convolutions(), *_attentions(), *_dtypes(library), *_streams())


def reference_product(library: str) -> Probe:
    """A product that tells libraries apart."""
    return _product(library, "forward", 1024, 1024, WIDTH)


class _Bank:
    """Random numbers in [-0.5, 0.5) that operands are cut from in turn: drawing them anew would take longest."""

    def __init__(self, numel: int) -> None:
        self._numbers = torch.rand(numel) - 0.5
        self._next = 0

    def cut(self, numel: int) -> Tensor:
        """The next so many numbers, on a page of their own."""
        if self._next + numel > self._numbers.numel():
            self._next = 0
        start, self._next = self._next, self._next + _PAGE_NUMEL * -(-numel // _PAGE_NUMEL)
        return self._numbers[start : start + numel]


@functools.cache
def _bank() -> _Bank:
    return _Bank(2 * COLD_BYTES // 4)


def _random(*shape: int) -> Tensor:
    return _bank().cut(math.prod(shape)).view(shape)


def _products(library: str) -> Iterator[Probe]:
    """Linear layers forward (with and without bias), and the products of their backward."""
    yield _product(library, "forward", _TINY, _TINY, _TINY)
    for tokens, width, wide in _LINEARS:
        for rows, columns in dict.fromkeys(((wide, width), (width, wide))):
            yield _product(library, "forward", tokens, rows, columns)
            yield _product(library, "input gradient", tokens, rows, columns)
            yield _product(library, "weight gradient", rows, columns, tokens)
        yield _product(library, "biased", tokens, wide, width)


_LINEARS = (
    (256, 512, 2048),
    (512, 128, 512),
    (1024, 192, 576),
    (1024, 256, 1024),
    (1024, 384, 384),
    (1024, 512, 512),
    (1024, 1024, 1024),
    (2048, 64, 256),
    (2048, 128, 128),
    (2048, 192, 768),
    (2048, 256, 256),
)


def _product(library: str, role: str, m: int, n: int, k: int) -> Probe:
    is_quick = library == ONEDNN and 2 * m * n * k >= LEAST_FLOPS

    def make() -> Made:
        left = _random(k, m).t() if role == "weight gradient" else _random(m, k)
        right = _random(n, k).t() if role in ("forward", "biased") else _random(k, n)
        bias = _random(n) if role == "biased" else None
        if is_quick:
            return _Kernel(vocabulary.product, kernels.product), (left, right, bias), {}
        if bias is not None:
            return aten.addmm.default, (bias, left, right), {}
        return aten.mm.default, (left, right), {}

    return Probe("matmul", f"product {m} x {n} x {k}, {role}", make)


def _batched_products() -> Iterator[Probe]:
    """What explicit attention is made of."""
    for batch, t, d in ((32, 128, 64), (64, 128, 32), (32, 64, 64), (16, 256, 64)):
        for transposed in (False, True):
            yield Probe(
                "batched_matmul", f"{batch} products of {t} x {d}", functools.partial(_bmm, batch, t, d, transposed)
            )


def _bmm(batch: int, t: int, d: int, transposed: bool) -> Made:
    if transposed:
        return aten.bmm.default, (_random(batch, t, d), _random(batch, t, d).transpose(1, 2)), {}
    return aten.bmm.default, (_random(batch, t, t), _random(batch, t, d)), {}


def _convolutions() -> Iterator[Probe]:
    """Of the input of a model and of its layers, forward and backward."""
    for shape in _CONVOLUTIONS:
        batch, ins, outs, size, kernel = shape
        label = f"convolution {kernel} x {kernel} of {batch} x {ins} x {size} x {size} to {outs}"
        yield Probe("convolution", label, functools.partial(_convolution, *shape))
        yield Probe("convolution_backward", f"{label}, backward", functools.partial(_convolution_backward, *shape))


_CONVOLUTIONS = (
    (2, 4, 4, 4, 3),
    (8, 3, 64, 32, 3),
    (4, 32, 64, 32, 3),
    (8, 64, 64, 32, 3),
    (8, 64, 128, 32, 1),
    (8, 128, 128, 16, 3),
    (8, 256, 256, 8, 3),
    (2, 96, 96, 28, 3),
    (4, 48, 96, 28, 1),
)


def _convolution(batch: int, ins: int, outs: int, size: int, kernel: int) -> Made:
    operands = (_random(batch, ins, size, size), _random(outs, ins, kernel, kernel), _random(outs))
    return aten.convolution.default, (*operands, *_window(kernel)), {}


def _convolution_backward(batch: int, ins: int, outs: int, size: int, kernel: int) -> Made:
    operands = (_random(batch, outs, size, size), _random(batch, ins, size, size), _random(outs, ins, kernel, kernel))
    return aten.convolution_backward.default, (*operands, [outs], *_window(kernel), [True, True, True]), {}


def _window(kernel: int) -> tuple[object, ...]:
    """Stride, padding, dilation, transposed, output padding and groups of a convolution that keeps the size."""
    return [1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], 1


def _attentions() -> Iterator[Probe]:
    for batch, t, d, causal in _ATTENTIONS:
        shape = (batch, t, d, causal)
        label = f"attention of {batch * _HEADS} x {t} x {d}{', causal' if causal else ''}"
        yield Probe("attention", label, functools.partial(_attention, *shape))
        yield Probe("attention_backward", f"{label}, backward", functools.partial(_attention_backward, *shape))


_ATTENTIONS = (
    (1, _TINY, _TINY, True),
    (8, 128, 64, True),
    (8, 128, 64, False),
    (16, 128, 32, True),
    (16, 64, 64, True),
    (4, 256, 64, True),
    (2, 512, 64, True),
    (1, 1024, 64, True),
    (1, 1024, 64, False),
    (8, 128, 128, True),
)


def _heads(batch: int, t: int, d: int) -> list[Tensor]:
    """Queries, keys and values as a fused projection leaves them: strided views of one tensor."""
    fused = _random(batch, t, 3 * _HEADS * d)
    return [part.view(batch, t, _HEADS, d).transpose(1, 2) for part in fused.chunk(3, -1)]


def _attention(batch: int, t: int, d: int, causal: bool) -> Made:
    return aten._scaled_dot_product_flash_attention_for_cpu.default, (*_heads(batch, t, d), 0.0, causal), {}


def _attention_backward(batch: int, t: int, d: int, causal: bool) -> Made:
    forward, args, _ = _attention(batch, t, d, causal)
    out, logsumexp = forward(*args)
    gradient = _random(batch, t, _HEADS, d).transpose(1, 2)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    return backward, (gradient, *args[:3], out, logsumexp, 0.0, causal), {}


def _dtypes(library: str) -> Iterator[Probe]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield Probe(f"dtype:{name}", f"product in {name}", functools.partial(_cube, library, dtype))


def _cube(library: str, dtype: torch.dtype) -> Made:
    if library == ONEDNN and dtype == torch.float32:
        return (
            _Kernel(vocabulary.product, kernels.product),
            (*(_random(_REFERENCE, _REFERENCE) for _ in range(2)), None),
            {},
        )
    return aten.mm.default, tuple(_random(_REFERENCE, _REFERENCE).to(dtype) for _ in range(2)), {}


def _streams() -> Iterator[Probe]:
    """Each op at each size; the smallest tells its overhead."""
    for row, made in _STREAMS:
        for nbytes in (TINY_BYTES, *STREAM_BYTES, *(_UPDATE_BYTES if row == "optimizer" else ())):
            label = f"{made.__name__.strip('_').replace('_', ' ')}, {nbytes / 2**10:,.0f} KiB"
            yield Probe(row, label, functools.partial(made, nbytes))


def _matrix(nbytes: int, tensors: float) -> tuple[int, int]:
    """Rows and columns of tensors of float32 of which so many make up ``nbytes``; narrow where they are tiny."""
    width = min(WIDTH, max(1, round(nbytes / tensors / 4)))
    return max(1, round(nbytes / tensors / 4 / width)), width


def _add(nbytes: int) -> Made:
    shape = _matrix(nbytes, 3)
    return aten.add.Tensor, (_random(*shape), _random(*shape)), {}


def _scale(nbytes: int) -> Made:
    return aten.mul.Tensor, (_random(*_matrix(nbytes, 2)), 0.5), {}


def _gelu(nbytes: int) -> Made:
    return aten.gelu.default, (_random(*_matrix(nbytes, 2)),), {}


def _gelu_backward(nbytes: int) -> Made:
    shape = _matrix(nbytes, 3)
    return aten.gelu_backward.default, (_random(*shape), _random(*shape)), {}


def _silu(nbytes: int) -> Made:
    return aten.silu.default, (_random(*_matrix(nbytes, 2)),), {}


def _silu_backward(nbytes: int) -> Made:
    shape = _matrix(nbytes, 3)
    return aten.silu_backward.default, (_random(*shape), _random(*shape)), {}


def _tanh(nbytes: int) -> Made:
    return aten.tanh.default, (_random(*_matrix(nbytes, 2)),), {}


def _exp(nbytes: int) -> Made:
    return aten.exp.default, (_random(*_matrix(nbytes, 2)),), {}


def _softmax(nbytes: int) -> Made:
    return aten._softmax.default, (_random(*_matrix(nbytes, 2)), -1, False), {}


def _log_softmax(nbytes: int) -> Made:
    return aten._log_softmax.default, (_random(*_matrix(nbytes, 2)), 1, False), {}


def _softmax_backward(nbytes: int) -> Made:
    shape = _matrix(nbytes, 3)
    return aten._softmax_backward_data.default, (_random(*shape), _random(*shape), -1, torch.float32), {}


def _log_softmax_backward(nbytes: int) -> Made:
    shape = _matrix(nbytes, 3)
    return aten._log_softmax_backward_data.default, (_random(*shape), _random(*shape), 1, torch.float32), {}


def _layer_norm(nbytes: int) -> Made:
    rows, width = _matrix(nbytes, 2)
    return aten.native_layer_norm.default, (_random(rows, width), [width], _random(width), _random(width), 1e-5), {}


def _layer_norm_backward(nbytes: int) -> Made:
    rows, width = _matrix(nbytes, 3)
    source, weight, bias = _random(rows, width), _random(width), _random(width)
    _, mean, deviation = aten.native_layer_norm.default(source, [width], weight, bias, 1e-5)
    args = (_random(rows, width), source, [width], mean, deviation, weight, bias, [True, True, True])
    return aten.native_layer_norm_backward.default, args, {}


def _sum_of_rows(nbytes: int) -> Made:
    return aten.sum.dim_IntList, (_random(*_matrix(nbytes, 1)), [0], True), {}


def _embedding(nbytes: int) -> Made:
    rows, width = _matrix(nbytes, 2)
    table = _random(min(rows, _VOCABULARY), width)
    return aten.embedding.default, (table, torch.randint(len(table), (rows,))), {}


def _embedding_backward(nbytes: int) -> Made:
    rows, width = _matrix(nbytes, 2)
    vocabulary = min(rows, _VOCABULARY)
    ids = torch.randint(vocabulary, (rows,))
    return aten.embedding_dense_backward.default, (_random(rows, width), ids, vocabulary, -1, False), {}


def _transposed_copy(nbytes: int) -> Made:
    rows, width = _matrix(nbytes, 2)
    heads = min(_HEADS, width)
    source = _random(rows, heads, width // heads).transpose(0, 1)
    return aten.clone.default, (source,), {"memory_format": torch.contiguous_format}


def _concatenation(nbytes: int) -> Made:
    shape = _matrix(nbytes, 6)
    return aten.cat.default, ([_random(*shape) for _ in range(3)], -1), {}


class _Kernel:
    """An op of ours as programs run it, called as an op of torch is."""

    def __init__(self, op: Any, run: Callable[..., Tensor]) -> None:
        self._schema, self._name, self._run = op._schema, str(op), run

    def __call__(self, *args: Any) -> Tensor:
        return self._run(*args)

    def __str__(self) -> str:
        return self._name


def _mask(nbytes: int) -> Made:
    keep = _Kernel(random_vocabulary.keep, draws.keep)
    return keep, (torch.tensor(nbytes), [torch.arange(extent) for extent in _matrix(nbytes, 9 / 4)], 0.1), {}


def _nll_loss(nbytes: int) -> Made:
    rows = max(2, nbytes // 12)
    width = max(2, min(WIDTH, 2**22 // rows))
    return aten.nll_loss_forward.default, (_random(rows, width), torch.randint(width, (rows,)), None, 1, -100), {}


def _nll_loss_backward(nbytes: int) -> Made:
    rows, width = _matrix(nbytes, 1)
    labels = torch.randint(width, (rows,))
    args = (torch.ones(()), _random(rows, width), labels, None, 1, -100, torch.tensor(float(rows)))
    return aten.nll_loss_backward.default, args, {}


def _adamw(nbytes: int) -> Made:
    shape = _matrix(nbytes, 7)
    weights, gradients, first, second = ([_random(*shape).abs()] for _ in range(4))
    rates = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.01, "eps": 1e-8}
    no_maxima: list[Tensor] = []
    args = (weights, gradients, first, second, no_maxima, [torch.ones(())])
    return aten._fused_adamw_.default, args, {**rates, "amsgrad": False, "maximize": False}


def _roll(nbytes: int) -> Made:
    return aten.roll.default, (_random(*_matrix(nbytes, 2)), [1], [1]), {}


_STREAMS: tuple[tuple[str, Callable[[int], Made]], ...] = (
    ("elementwise", _add),
    ("elementwise", _scale),
    ("transcendental", _gelu),
    ("transcendental", _gelu_backward),
    ("transcendental", _silu),
    ("transcendental", _silu_backward),
    ("transcendental", _tanh),
    ("transcendental", _exp),
    ("softmax", _softmax),
    ("softmax", _log_softmax),
    ("softmax_backward", _softmax_backward),
    ("softmax_backward", _log_softmax_backward),
    ("norm", _layer_norm),
    ("norm_backward", _layer_norm_backward),
    ("reduction", _sum_of_rows),
    ("gather", _embedding),
    ("scatter", _embedding_backward),
    ("copy", _transposed_copy),
    ("copy", _concatenation),
    ("random", _mask),
    ("loss", _nll_loss),
    ("loss_backward", _nll_loss_backward),
    ("optimizer", _adamw),
    ("other", _roll),
)
