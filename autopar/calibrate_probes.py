"""The probes of a calibration: which ops are timed, at which shapes.

Shapes span what training programs of small and middle size run on one CPU core: products of a few hundred to a
few thousand rows, operands from 16 KiB (in cache) to 32 MiB (in memory).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from autopar.calibrate_elements import element_probes
from autopar.calibrate_images import image_probes
from autopar.calibrate_operands import HEADS, WIDTH, Kernel, Made, Tensor, drawn
from autopar.calibrate_orders import order_probes
from autopar.calibrate_streams import narrow_probes, stream_probes
from autopar.calibrate_worker import Probe
from autopar.runtime import kernels
from cost_model.device import ONEDNN
from cost_model.device_rows import QUICK_FLOPS
from passes import vocabulary

aten = torch.ops.aten

_REFERENCE = 256
"""Extent of the cube whose product tells dtypes apart."""
_TINY = 8
"""Extent of products that take no longer than their overhead."""


@functools.cache
def all_probes(library: str) -> tuple[Probe, ...]:
    """All probes, in a fixed order, alike in number and names for all of ``PRODUCT_LIBRARIES``."""
    products = (*_products(library), *_batched_products())
    return (
        *products,
        *_convolutions(),
        *_attentions(),
        *_dtypes(library),
        *stream_probes(),
        *narrow_probes(),
        *image_probes(),
        *order_probes(),
        *element_probes(),
    )


def reference_product(library: str) -> Probe:
    """A product that tells libraries apart."""
    return _product(library, "forward", 1024, 1024, WIDTH)


def _products(library: str) -> Iterator[Probe]:
    """Linear layers forward (with and without bias), and the products of their backward; small ones, as recurrent
    layers and heads have."""
    yield _product(library, "forward", _TINY, _TINY, _TINY)
    for tokens, width, wide in _LINEARS:
        for rows, columns in dict.fromkeys(((wide, width), (width, wide))):
            yield _product(library, "forward", tokens, rows, columns)
            yield _product(library, "input gradient", tokens, rows, columns)
            yield _product(library, "weight gradient", rows, columns, tokens)
        yield _product(library, "biased", tokens, wide, width)
    for m, n, k in _SMALL:
        yield _product(library, "forward", m, n, k)
        yield _product(library, "weight gradient", k, n, m)


_SMALL = ((16, 512, 128), (256, 64, 16), (512, 16, 64))
_LINEARS = (
    (128, 128, 128),
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
    is_quick = library == ONEDNN and 2 * m * n * k >= QUICK_FLOPS

    def make() -> Made:
        left = drawn(k, m).t() if role == "weight gradient" and not is_quick else drawn(m, k)
        right = drawn(n, k).t() if role in ("forward", "biased") else drawn(k, n)
        bias = drawn(n) if role == "biased" else None
        if is_quick:
            return Kernel(vocabulary.product, kernels.product), (left, right, bias), {}
        if bias is not None:
            return aten.addmm.default, (bias, left, right), {}
        return aten.mm.default, (left, right), {}

    row = "matmul" if is_quick or library != ONEDNN else "batched_matmul"  # by the library that multiplies batches
    return Probe(row, f"product {m} x {n} x {k}, {role}", make)


def _batched_products() -> Iterator[Probe]:
    """What explicit attention is made of, large ones, many small ones, and such as their overhead hides."""
    for batch, t, d in _BATCHES:
        for transposed in (False, True):
            yield Probe(
                "batched_matmul", f"{batch} products of {t} x {d}", functools.partial(_bmm, batch, t, d, transposed)
            )


_BATCHES = (
    (32, 128, 64),
    (64, 128, 32),
    (32, 64, 64),
    (16, 256, 64),
    (1024, 16, 32),
    (2, 512, 512),
    (4, _TINY, _TINY),
)


def _bmm(batch: int, t: int, d: int, transposed: bool) -> Made:
    if transposed:
        return aten.bmm.default, (drawn(batch, t, d), drawn(batch, t, d).transpose(1, 2)), {}
    return aten.bmm.default, (drawn(batch, t, t), drawn(batch, t, d)), {}


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
    (8, 32, 3, 32, 3),
    (8, 128, 384, 8, 1),
)


def _convolution(batch: int, ins: int, outs: int, size: int, kernel: int) -> Made:
    operands = (drawn(batch, ins, size, size), drawn(outs, ins, kernel, kernel), drawn(outs))
    return aten.convolution.default, (*operands, *_window(kernel)), {}


def _convolution_backward(batch: int, ins: int, outs: int, size: int, kernel: int) -> Made:
    operands = (
        drawn(batch, outs, size, size),
        drawn(batch, ins, size, size),
        drawn(outs, ins, kernel, kernel),
    )
    return aten.convolution_backward.default, (*operands, [outs], *_window(kernel), [True, True, True]), {}


def _window(kernel: int) -> tuple[object, ...]:
    """Stride, padding, dilation, transposed, output padding and groups of a convolution that keeps the size."""
    return [1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], 1


def _attentions() -> Iterator[Probe]:
    for batch, t, d, causal in _ATTENTIONS:
        shape = (batch, t, d, causal)
        label = f"attention of {batch * HEADS} x {t} x {d}{', causal' if causal else ''}"
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
    fused = drawn(batch, t, 3 * HEADS * d)
    return [part.view(batch, t, HEADS, d).transpose(1, 2) for part in fused.chunk(3, -1)]


def _attention(batch: int, t: int, d: int, causal: bool) -> Made:
    return aten._scaled_dot_product_flash_attention_for_cpu.default, (*_heads(batch, t, d), 0.0, causal), {}


def _attention_backward(batch: int, t: int, d: int, causal: bool) -> Made:
    out, logsumexp = _attended(batch, t, d, causal)
    gradient = drawn(batch, t, HEADS, d).transpose(1, 2)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    args = (gradient, *_heads(batch, t, d), out.clone(), logsumexp.clone(), 0.0, causal)
    return backward, args, {}


@functools.cache
def _attended(batch: int, t: int, d: int, causal: bool) -> tuple[Tensor, Tensor]:
    """What attention of such operands leaves; made once, since other operands of this size take as long with it."""
    forward, args, _ = _attention(batch, t, d, causal)
    out, logsumexp = forward(*args)
    return out, logsumexp


def _dtypes(library: str) -> Iterator[Probe]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield Probe(f"dtype:{name}", f"product in {name}", functools.partial(_cube, library, dtype))


def _cube(library: str, dtype: torch.dtype) -> Made:
    if library == ONEDNN and dtype == torch.float32:
        return (
            Kernel(vocabulary.product, kernels.product),
            (*(drawn(_REFERENCE, _REFERENCE) for _ in range(2)), None),
            {},
        )
    return aten.mm.default, tuple(drawn(_REFERENCE, _REFERENCE).to(dtype) for _ in range(2)), {}
