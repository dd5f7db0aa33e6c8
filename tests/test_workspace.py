"""What kernels take beyond their operands and results, against the allocations they make."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

from autopar.runtime import kernels
from cost_model.ops import price_of
from passes import vocabulary
from passes.calls import call_of
from passes.graph import meta_of
from passes.workspace import workspace_bytes

aten = torch.ops.aten
SLACK = 4096
SHAPES = {
    "images": (8, 3, 64, 32, 3, 1, 1),
    "layers": (8, 64, 64, 32, 3, 1, 1),
    "weights that outweigh images": (4, 256, 256, 8, 3, 1, 1),
    "one by one": (8, 64, 64, 32, 1, 1, 1),
    "channels that fill no block": (8, 48, 40, 20, 5, 1, 1),
    "each channel alone": (8, 64, 64, 32, 3, 1, 64),
    "one small sample": (1, 8, 8, 8, 3, 1, 1),
    "a stride": (8, 64, 64, 32, 3, 2, 1),
    "one by one over colours": (16, 3, 32, 16, 1, 1, 1),
    "one by one and a stride": (8, 32, 64, 16, 1, 2, 1),
    "groups": (8, 64, 64, 32, 3, 1, 4),
    "narrow groups": (8, 64, 64, 32, 3, 1, 32),
    "narrow groups and a stride": (8, 60, 36, 20, 3, 2, 6),
    "wide groups and a stride": (8, 96, 144, 14, 3, 2, 3),
    "each channel alone through large kernels": (4, 96, 96, 16, 7, 1, 96),
    "weights of narrow groups that outweigh images": (2, 320, 60, 7, 5, 1, 5),
}
JOINED = {"groups one by one": (8, 64, 64, 32, 1, 1, 4)}
APART = {
    "elements apart": (8, 64, 48, 32, 3, 2, 1),
    "elements beyond the image": (4, 96, 48, 8, 3, 4, 1),
    "elements of groups apart": (8, 64, 64, 32, 3, 2, 4),
    "elements of narrow groups apart": (8, 60, 60, 32, 3, 2, 6),
}
TRANSPOSED = {
    "twice as large": (8, 64, 48, 16, (2, 2, 0, 0), 1),
    "twice as large with overlap": (8, 40, 48, 16, (4, 2, 1, 0), 1),
    "twice as large, unevenly": (8, 40, 48, 16, (3, 2, 1, 0), 1),
    "twice as large, made even": (8, 40, 48, 16, (3, 2, 1, 1), 1),
    "many channels to few": (4, 256, 24, 16, (4, 2, 1, 0), 1),
    "as large": (8, 64, 48, 16, (3, 1, 1, 0), 1),
    "as large, channels that fill no block": (8, 72, 50, 16, (3, 1, 1, 0), 1),
    "one by one": (8, 64, 48, 16, (1, 1, 0, 0), 1),
    "one small sample": (1, 8, 24, 8, (2, 2, 0, 0), 1),
    "groups": (8, 64, 128, 16, (4, 2, 1, 0), 2),
    "each channel alone": (8, 64, 64, 16, (4, 2, 1, 0), 64),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As ranks run; kernels for several threads take other copies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peak_bytes(call: Callable[[], Any]) -> tuple[int, int]:
    """The most that was allocated during a call, and what was left."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        kept = call()
    events = [e for e in taken.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    del kept
    return peak, total


def said(call: Callable[..., Any], *operands: Tensor) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        graph = make_fx(call)(*(mode.from_tensor(o) for o in operands)).graph
    node = next(n for n in graph.nodes if n.op == "call_function")
    metas = {n.name: m for n in graph.nodes if (m := meta_of(n.meta.get("val"))) is not None}
    return workspace_bytes(node, price_of(call_of(node, metas)))


def holds(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: tuple[Any, ...],
    wanted: list[bool],
    within: float | None = 1.02,
) -> None:
    """A forward and a backward take what is said and hardly less."""

    def forward(source: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        made: Tensor = aten.convolution(source, weight, bias[0] if bias else None, *window)
        return made

    def backward(gradient: Tensor, source: Tensor, weight: Tensor) -> Any:
        sizes = None if bias is None else list(bias.shape)
        return aten.convolution_backward(gradient, source, weight, sizes, *window, wanted)

    operands = (source, weight) if bias is None else (source, weight, bias)
    gradient = forward(*operands)
    for call, given in ((forward, operands), (backward, (gradient, source, weight))):
        peak, left = peak_bytes(lambda call=call, given=given: call(*given))
        assert peak - left <= said(call, *given)
        assert within is None or said(call, *given) <= within * (peak - left) + SLACK


@pytest.mark.parametrize("name", SHAPES | JOINED)
def test_a_convolution_takes_what_is_said(name: str) -> None:
    batch, ins, outs, size, kernel, stride, groups = (SHAPES | JOINED)[name]
    source, weight = torch.randn(batch, ins, size, size), torch.randn(outs, ins // groups, kernel, kernel)
    window = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], groups)
    holds(source, weight, torch.randn(outs), window, [ins > 3, True, True])


@pytest.mark.parametrize("name", APART)
def test_elements_of_kernels_may_lie_apart(name: str) -> None:
    """Atrous, of the same size; with AVX2 either of two kernels may be taken, and what the larger takes is said."""
    batch, ins, outs, size, kernel, apart, groups = APART[name]
    source, weight = torch.randn(batch, ins, size, size), torch.randn(outs, ins // groups, kernel, kernel)
    window = ([1, 1], [apart * (kernel // 2)] * 2, [apart] * 2, False, [0, 0], groups)
    within = 3 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1.02
    holds(source, weight, torch.randn(outs), window, [True] * 3, within)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_convolution_takes_what_is_said(name: str, has_bias: bool) -> None:
    batch, ins, outs, size, (kernel, stride, padding, more), groups = TRANSPOSED[name]
    source, weight = torch.randn(batch, ins, size, size), torch.randn(ins, outs // groups, kernel, kernel)
    window = ([stride] * 2, [padding] * 2, [1, 1], True, [more] * 2, groups)
    holds(source, weight, torch.randn(outs) if has_bias else None, window, [True, True, has_bias])


WINDOWS = [
    (3, 1, 1, 1),
    (3, 2, 1, 1),
    (5, 1, 2, 1),
    (7, 2, 3, 1),
    (1, 2, 0, 1),
    (1, 1, 0, 1),
    (3, 1, 2, 2),
    (3, 1, 4, 4),
]
UP_WINDOWS = [(2, 2, 0, 0), (3, 2, 1, 1), (4, 2, 1, 0), (3, 1, 1, 0), (4, 4, 0, 0)]


@pytest.mark.parametrize("is_transposed", [False, True])
def test_convolutions_drawn_at_random_take_no_more_than_is_said(is_transposed: bool) -> None:
    """Windows that models use, over channels and images of any size; of 6,500 drawn so, none took more."""
    draw = random.Random(7).choice
    for _ in range(80):
        batch, size = draw((1, 2, 3, 8, 16)), draw((7, 8, 14, 16, 28))
        ins, outs = (draw((1, 3, 4, 8, 12, 16, 24, 40, 64, 96, 144)) for _ in range(2))
        groups = draw((1, 1, 1, *(g for g in (2, 8, ins) if ins % g == 0 and outs % g == 0)))
        kernel, stride, padding, last = draw(UP_WINDOWS if is_transposed else WINDOWS)
        channels = (ins, outs // groups) if is_transposed else (outs, ins // groups)
        apart, more = ([1, 1], [last] * 2) if is_transposed else ([last] * 2, [0, 0])
        window = ([stride] * 2, [padding] * 2, apart, is_transposed, more, groups)
        bias = torch.randn(outs) if draw((False, True)) else None
        operands = torch.randn(batch, ins, size, size), torch.randn(*channels, kernel, kernel)
        wanted = draw([(True, True), (True, False), (False, True)])
        holds(*operands, bias, window, [*wanted, bias is not None and wanted[1]], within=None)


@pytest.mark.parametrize("name", SHAPES)
def test_images_that_lie_otherwise_are_copied_first(name: str) -> None:
    """The gradient of a mean over an image is one number a channel; a transposed image is read as it is by nothing."""
    batch, ins, outs, size, kernel, stride, groups = SHAPES[name]
    source = torch.randn(batch, ins, size, size).transpose(2, 3)
    weight = torch.randn(outs, ins // groups, kernel, kernel)
    window = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], groups)

    def forward(source: Tensor, weight: Tensor) -> Tensor:
        made: Tensor = aten.convolution(source, weight, None, *window)
        return made

    def backward(gradient: Tensor, source: Tensor, weight: Tensor) -> Any:
        return aten.convolution_backward(gradient, source, weight, [outs], *window, [ins > 3, True, True])

    gradient = torch.randn(batch, outs, 1, 1).expand_as(forward(source, weight))
    for call, operands in ((forward, (source, weight)), (backward, (gradient, source, weight))):
        peak, left = peak_bytes(lambda call=call, operands=operands: call(*operands))
        assert peak - left <= said(call, *operands) <= peak - left + SLACK + (peak - left) // 50


def clone(matrix: Tensor) -> Tensor:
    return matrix.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize(
    ("run", "traced"), [(kernels.by_rows, vocabulary.by_rows), (clone, clone)], ids=["rows", "clone"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(60, 60), (59, 60), (256, 512)], ids=str)
def test_a_matrix_is_turned_through_a_block(
    shape: tuple[int, int], dtype: torch.dtype, run: Callable[..., Tensor], traced: Callable[..., Tensor]
) -> None:
    turned = torch.zeros(shape, dtype=dtype).t()
    with_gaps = torch.zeros(shape[0], 2 * shape[1], dtype=dtype)[:, : shape[1]].t()
    for matrix in (turned, with_gaps):
        peak, left = peak_bytes(lambda matrix=matrix: run(matrix))
        assert said(traced, matrix) == peak - left


FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
HAS_HALF_KERNELS = "avx512_bf16" in FLAGS and "amx_tile" not in FLAGS
HALF_SHAPES = [
    (1024, 1024, 1024),
    (1024, 256, 2048),
    (2048, 512, 512),
    (512, 2048, 128),
    (768, 768, 4096),
    (256, 326, 872),
]


@pytest.mark.skipif(
    not HAS_HALF_KERNELS, reason="oneDNN's kernels of half types are others without AVX-512 or with AMX"
)
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("turned", list(itertools.product((False, True), repeat=2)), ids=str)
@pytest.mark.parametrize("shape", HALF_SHAPES, ids=str)
def test_a_product_of_half_types_takes_at_most_what_is_said(
    shape: tuple[int, int, int], turned: tuple[bool, bool], batch: tuple[int, ...]
) -> None:
    """Operands that lie transposed, as a weight's gradient finds them, are packed."""
    m, n, k = shape

    def operand(rows: int, columns: int, is_turned: bool) -> Tensor:
        made = torch.randn(*batch, *((columns, rows) if is_turned else (rows, columns))).to(torch.bfloat16)
        return made.transpose(-1, -2) if is_turned else made

    def product(first: Tensor, second: Tensor) -> Tensor:
        made: Tensor = aten.bmm(first, second) if batch else aten.mm(first, second)
        return made

    operands = operand(m, k, turned[0]), operand(k, n, turned[1])
    product(*operands)
    peak, left = peak_bytes(lambda: product(*operands))
    assert peak - left <= said(product, *operands) <= 2 * (peak - left) + 2**20


@pytest.mark.skipif(not kernels.HAS_ONEDNN, reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("shape", [*HALF_SHAPES, (128, 128, 128), (333, 1000, 2048), (8, 1024, 1024)], ids=str)
def test_a_product_by_onednn_takes_at_most_what_is_said(shape: tuple[int, int, int], is_turned: bool) -> None:
    """Blocks of what is on the right are packed; the rows of what is on the left lie one behind the other."""
    m, n, k = shape
    left = torch.randn(m, k)
    right = torch.randn(n, k).t() if is_turned else torch.randn(k, n)
    bias = torch.randn(n)
    kernels.product(left, right, bias)
    peak, kept = peak_bytes(lambda: kernels.product(left, right, bias))
    assert peak - kept <= said(vocabulary.product, left, right, bias) <= peak - kept + 2**18 + SLACK


ATTENTIONS = [
    (8, 128, 128, 64),
    (4, 16, 16, 8),
    (4, 97, 97, 40),
    (4, 256, 256, 32),
    (2, 200, 700, 64),
    (2, 1024, 1024, 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ATTENTIONS, ids=str)
def test_attention_takes_what_is_said(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not HAS_HALF_KERNELS:
        pytest.skip("oneDNN's kernels of half types are others without AVX-512 or with AMX")
    heads, queries, keys, depth = shape
    q, k, v = (torch.randn(1, extent, heads, depth, dtype=dtype).transpose(1, 2) for extent in (queries, keys, keys))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)

    def backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor) -> Any:
        flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash(dy, q, k, v, out, logsumexp, 0.0, False)

    made = forward(q, k, v)
    slack = 2**16 if dtype == torch.bfloat16 else 0
    for call, operands in ((forward, (q, k, v)), (backward, (torch.randn_like(made[0]), q, k, v, *made))):
        call(*operands)
        peak, left = peak_bytes(lambda call=call, operands=operands: call(*operands))
        assert peak - left <= said(call, *operands) <= peak - left + slack


@pytest.mark.parametrize("width, inner", [(64, 256), (256, 32)])
def test_experts_take_what_the_fullest_may(width: int, inner: int) -> None:
    """Tokens that go round take less by what the fullest expert may have beyond its share."""
    tokens, picked, count = 512, 2, 8
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    index = (torch.arange(tokens * picked) % count).view(tokens, picked)
    weights = torch.rand(tokens, picked, generator=generator)
    gate_up = torch.randn(count, 2 * inner, width, generator=generator)
    down = torch.randn(count, width, inner, generator=generator)
    given = x, index, weights, gate_up, down
    for call, run, operands in (
        (torch.ops.autopar.experts.default, kernels.experts, given),
        (torch.ops.autopar.experts_backward.default, kernels.experts_backward, (grad, *given)),
    ):
        peak, kept = peak_bytes(lambda run=run, operands=operands: run(*operands, "silu", count))
        expected = said(lambda *tensors, call=call: call(*tensors, "silu", count), *operands)
        rows = tokens * picked // count
        assert 0.98 * expected <= (1.25 + rows**-0.5) * (peak - kept) <= 1.05 * expected


def test_alignments_take_what_is_said() -> None:
    """Of the longest labels there may be."""
    steps, samples, most = 200, 8, 30
    likely = torch.randn(steps, samples, 12).log_softmax(-1)
    lengths = torch.full((samples,), most)
    given = likely, torch.randint(1, 12, (samples, most)), torch.full((samples,), steps), lengths, 0, True
    for call, run, operands in (
        (torch.ops.autopar.ctc.default, kernels.ctc, given),
        (torch.ops.autopar.ctc_backward.default, kernels.ctc_backward, (torch.ones(samples), *given)),
    ):
        tensors = [o for o in operands if isinstance(o, Tensor)]
        run(*operands)
        peak, kept = peak_bytes(lambda run=run, operands=operands: run(*operands))
        expected = said(lambda *tensors, call=call: call(*tensors, 0, True), *tensors)
        assert 0.99 * expected <= peak - kept <= expected
