"""The probes of ops that move bytes: each op at several sizes, of which the smallest tells its overhead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from autopar.calibrate_operands import HEADS, WIDTH, Kernel, Made, Tensor, drawn
from autopar.calibrate_worker import ALONE, NARROW, Probe
from autopar.runtime import draws, kernels
from autopar.runtime.accumulation import Add
from passes import random_vocabulary, vocabulary

aten = torch.ops.aten

STREAM_BYTES = (16 * 2**10, 128 * 2**10, 2**20, 4 * 2**20, 12 * 2**20, 32 * 2**20)
_UPDATE_BYTES = (128 * 2**20,)
"""Updates move a rank's parameters, gradients and state in one call, more than any other op does."""
TINY_BYTES = 2**10
"""At this size an op takes no longer than its overhead."""
_VOCABULARY = 4096
_NARROW_ROWS, _NARROW_WIDTH = 8192, 8
_DEPTH = 64  # of a head


def stream_probes() -> Iterator[Probe]:
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
    return aten.add.Tensor, (drawn(*shape), drawn(*shape)), {}


def _scale(nbytes: int) -> Made:
    return aten.mul.Tensor, (drawn(*_matrix(nbytes, 2)), 0.5), {}


def _gelu(nbytes: int) -> Made:
    return aten.gelu.default, (drawn(*_matrix(nbytes, 2)),), {}


def _gelu_backward(nbytes: int) -> Made:
    shape = _matrix(nbytes, 3)
    return aten.gelu_backward.default, (drawn(*shape), drawn(*shape)), {}


def _silu(nbytes: int) -> Made:
    return aten.silu.default, (drawn(*_matrix(nbytes, 2)),), {}


def _silu_backward(nbytes: int) -> Made:
    shape = _matrix(nbytes, 3)
    return aten.silu_backward.default, (drawn(*shape), drawn(*shape)), {}


def _tanh(nbytes: int) -> Made:
    return aten.tanh.default, (drawn(*_matrix(nbytes, 2)),), {}


def _exp(nbytes: int) -> Made:
    return aten.exp.default, (drawn(*_matrix(nbytes, 2)),), {}


def _where(nbytes: int) -> Made:
    """A causal mask that all heads share, as attention's scores meet it."""
    rows, width = _matrix(nbytes, 9 / 4)
    heads = min(HEADS, rows)
    mask = torch.ones(1, rows // heads, width, dtype=torch.bool).tril().expand(heads, -1, -1)
    return aten.where.self, (mask, drawn(heads, rows // heads, width), torch.zeros(())), {}


def _masked_fill(nbytes: int) -> Made:
    mask, scores, _ = _where(nbytes)[1]
    return aten.masked_fill.Scalar, (scores, mask, -1e9), {}


def _accumulate(nbytes: int) -> Made:
    gradient = drawn(*_matrix(nbytes, 3))
    buffer = torch.zeros_like(gradient)  # what is drawn is shared, and stays as it is
    return Kernel(vocabulary.accumulate, functools.partial(_added, Add(), buffer)), (gradient, ""), {}


def _added(add: Add, buffer: Tensor, gradient: Tensor, _: str) -> None:
    add(buffer, gradient)


def _safe_softmax(nbytes: int) -> Made:
    return aten._safe_softmax.default, (drawn(*_matrix(nbytes, 2)), -1), {}


def _softmax(nbytes: int) -> Made:
    return aten._softmax.default, (drawn(*_matrix(nbytes, 2)), -1, False), {}


def _log_softmax(nbytes: int) -> Made:
    return aten._log_softmax.default, (drawn(*_matrix(nbytes, 2)), 1, False), {}


def _softmax_backward(nbytes: int) -> Made:
    shape = _matrix(nbytes, 3)
    return aten._softmax_backward_data.default, (drawn(*shape), drawn(*shape), -1, torch.float32), {}


def _log_softmax_backward(nbytes: int) -> Made:
    shape = _matrix(nbytes, 3)
    return (
        aten._log_softmax_backward_data.default,
        (drawn(*shape), drawn(*shape), 1, torch.float32),
        {},
    )


def _layer_norm(nbytes: int) -> Made:
    rows, width = _matrix(nbytes, 2)
    return (
        aten.native_layer_norm.default,
        (drawn(rows, width), [width], drawn(width), drawn(width), 1e-5),
        {},
    )


def _layer_norm_backward(nbytes: int) -> Made:
    rows, width = _matrix(nbytes, 3)
    source, weight, bias = drawn(rows, width), drawn(width), drawn(width)
    _, mean, deviation = aten.native_layer_norm.default(source, [width], weight, bias, 1e-5)
    args = (drawn(rows, width), source, [width], mean, deviation, weight, bias, [True, True, True])
    return aten.native_layer_norm_backward.default, args, {}


def _sum_of_rows(nbytes: int) -> Made:
    return aten.sum.dim_IntList, (drawn(*_matrix(nbytes, 1)), [0], True), {}


def _embedding(nbytes: int) -> Made:
    rows, width = _matrix(nbytes, 2)
    table = drawn(min(rows, _VOCABULARY), width)
    return aten.embedding.default, (table, torch.randint(len(table), (rows,))), {}


def _embedding_backward(nbytes: int) -> Made:
    rows, width = _matrix(nbytes, 2)
    vocabulary = min(rows, _VOCABULARY)
    ids = torch.randint(vocabulary, (rows,))
    return aten.embedding_dense_backward.default, (drawn(rows, width), ids, vocabulary, -1, False), {}


def narrow_probes() -> Iterator[Probe]:
    """Lookups and gradients of rows of half a cache line."""
    table, ids = (_NARROW_ROWS, _NARROW_WIDTH), functools.partial(torch.randint, _NARROW_ROWS, (_NARROW_ROWS,))
    yield Probe(NARROW, "narrow embedding", lambda: (aten.embedding.default, (drawn(*table), ids()), {}))
    backward = aten.embedding_dense_backward.default
    yield Probe(
        NARROW, "narrow embedding backward", lambda: (backward, (drawn(*table), ids(), _NARROW_ROWS, -1, False), {})
    )


def _transposed_copy(nbytes: int) -> Made:
    """Heads out of a row of them, as before and behind explicit attention."""
    rows, width = _matrix(nbytes, 2)
    depth = min(_DEPTH, width)
    source = drawn(rows, width // depth, depth).transpose(0, 1)
    return aten.clone.default, (source,), {"memory_format": torch.contiguous_format}


def _concatenation(nbytes: int) -> Made:
    shape = _matrix(nbytes, 6)
    return aten.cat.default, ([drawn(*shape) for _ in range(3)], -1), {}


def _mask(nbytes: int) -> Made:
    keep = Kernel(random_vocabulary.keep, draws.keep)
    return keep, (torch.tensor(nbytes), [torch.arange(extent) for extent in _matrix(nbytes, 9 / 4)], 0.1), {}


def _nll_loss(nbytes: int) -> Made:
    rows = max(2, nbytes // 12)
    width = max(2, min(WIDTH, 2**22 // rows))
    return (
        aten.nll_loss_forward.default,
        (drawn(rows, width), torch.randint(width, (rows,)), None, 1, -100),
        {},
    )


def _mse_loss(nbytes: int) -> Made:
    shape = _matrix(nbytes, 2)
    return aten.mse_loss.default, (drawn(*shape), drawn(*shape)), {}


def _nll_loss_backward(nbytes: int) -> Made:
    rows, width = _matrix(nbytes, 1)
    labels = torch.randint(width, (rows,))
    args = (torch.ones(()), drawn(rows, width), labels, None, 1, -100, torch.tensor(float(rows)))
    return aten.nll_loss_backward.default, args, {}


def _adamw(nbytes: int) -> Made:
    shape = _matrix(nbytes, 7)
    weights, gradients, first, second = ([drawn(*shape).abs()] for _ in range(4))
    rates = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.01, "eps": 1e-8}
    no_maxima: list[Tensor] = []
    args = (weights, gradients, first, second, no_maxima, [torch.ones(())])
    return aten._fused_adamw_.default, args, {**rates, "amsgrad": False, "maximize": False}


def _roll(nbytes: int) -> Made:
    return aten.roll.default, (drawn(*_matrix(nbytes, 2)), [1], [1]), {}


def _matrix_by_rows(nbytes: int) -> Made:
    rows, width = _matrix(nbytes, 2)
    return Kernel(vocabulary.by_rows, kernels.by_rows), (drawn(width, rows).t(),), {}


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
    ("other", _matrix_by_rows),
    (ALONE, _accumulate),
    (ALONE, _where),
    (ALONE, _masked_fill),
    (ALONE, _safe_softmax),
    (ALONE, _mse_loss),
)
