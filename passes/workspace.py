"""Workspace: memory that kernels take for themselves while they run, beyond their operands and results.

What CPU kernels of torch 2.13 (oneDNN 3) take was found from their allocations, with AVX-512 and with AVX2: programs
are taken to run on CPUs like the one they are planned on. A GPU's libraries have workspaces of their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from cost_model.program import OpCost
from passes import alignment_vocabulary, layer_vocabulary, vocabulary
from passes.convolution_workspace import convolution_backward_bytes, convolution_bytes

aten = torch.ops.aten
_BOOKKEEPING = 4096  # bytes beside the blocks that a product packs: between 1 and 2 KiB were seen
_HALF = ("bfloat16", "float16")
_ROWS, _COLUMNS, _DEPTH, _PADDING, _WIDEST, _DEEPEST = 256, 64, 512, 32, 1024, 1536  # of blocks of half types
_CAPACITY = 1.25
_COPIES = vocabulary.by_rows, aten.clone.default
_TURNED_ROWS, _TURNED_ROWS_OF_BYTES = 60, 120  # of square blocks; aten/src/ATen/native/Copy.cpp, copy_transpose_valid
_ALIGNED = alignment_vocabulary.CTC, alignment_vocabulary.CTC_BACKWARD
_EXPERTS = layer_vocabulary.EXPERTS, layer_vocabulary.EXPERTS_BACKWARD
_DEEPEST_SINGLE = 1024  # of blocks of float32
_QUERIES, _KEYS = ((768, 256), (192, 64), (0, 32)), 512  # of blocks of attention: (least queries, rows), columns
_IS_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
_TALL, _APART, _PACKED_ROWS = 1024, 2048, 4 * 1024 * 260  # of products of float32 with AVX2: rows, elements, bytes


def workspace_bytes(node: fx.Node, cost: OpCost | None) -> int:
    """Of one call."""
    if node.target in _EXPERTS:
        return _experts(node, is_backward=node.target is not _EXPERTS[0])
    if node.target in _ALIGNED:
        return _alignments(node, passes=1 + (node.target is not _ALIGNED[0]))
    if node.target in _COPIES:
        return _turning(_value(node.args[0]), _value(node))
    if cost is None or cost.gemm is None:
        return 0
    if cost.kind in ("attention", "attention_backward"):
        return _attention(cost, is_backward=cost.kind == "attention_backward")
    if node.target is vocabulary.product:
        return _single(cost)
    if cost.kind in ("matmul", "batched_matmul") and cost.dtype in _HALF:
        first = [operand for operand in node.args if isinstance(operand, fx.Node)][-2]
        return _packing(*cost.gemm[1:], turned=not _value(first).is_contiguous())
    if node.target is aten.convolution.default:
        return convolution_bytes(node)
    if node.target is aten.convolution_backward.default:
        return convolution_backward_bytes(node)
    return 0


def _experts(node: fx.Node, *, is_backward: bool) -> int:
    """What the fullest expert makes of its tokens (``autopar.runtime.kernels.experts``), one expert after the other.

    It is taken to have a quarter more than its share of them, the usual capacity factor (Fedus et al., Switch
    Transformers, JMLR 2022, section 2.2), and the standard deviation of what chance gives it; no token twice.
    """
    x, index, _, gate_up, down = map(_value, node.args[-7:-2])
    total = node.args[-1]
    assert isinstance(total, int)
    share = index.numel() / total
    rows = min(len(x), math.ceil(_CAPACITY * share + math.sqrt(share))) if len(gate_up) else 0
    width, inner = x.shape[1], down.shape[-1]
    most = max(3 * width + 5 * inner, 2 * width + 7 * inner) if is_backward else 2 * width + 3 * inner
    return rows * (most * x.element_size() + 2 * 8)


def _alignments(node: fx.Node, *, passes: int) -> int:
    """What is likely up to every place between labels (aten/src/ATen/native/LossCTC.cpp), one table for each way
    through the steps, and the losses that a backward makes again."""
    likely, labels = map(_value, node.args[-6:-4])
    steps, samples, _ = likely.shape
    states = samples * steps * (2 * labels.shape[-1] + 1)
    return (passes * states + (passes - 1) * samples) * likely.element_size()


def _attention(cost: OpCost, *, is_backward: bool) -> int:
    """What torch's flash attention for CPUs works in (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp): scores of a
    block of queries and keys, or scores and their gradients; of half types also rounded, and what its products pack."""
    assert cost.gemm is not None
    _, queries, keys, depth = cost.gemm
    block = next(rows for least, rows in _QUERIES if queries >= least)
    rows, columns = min(queries, block), min(keys, _KEYS)
    scores, rest = (2 * rows * columns, rows) if is_backward else (rows * columns, rows * (2 + depth))
    total = (8 if cost.dtype == "float64" else 4) * (scores + rest)
    if cost.dtype in _HALF:
        total += 2 * scores + (_packing(columns, depth, rows, turned=True) if is_backward else 0)
    return total


def _turning(matrix: Tensor, copy: Tensor) -> int:
    """The block through which a matrix that lies transposed, without gaps, is copied row after row."""
    is_bytes = matrix.dtype == torch.uint8
    is_turned = matrix.dim() == 2 and matrix.stride() == (1, matrix.shape[0]) and copy.is_contiguous()
    if not is_turned or matrix.numel() < _TURNED_ROWS**2:
        return 0
    return (_TURNED_ROWS_OF_BYTES if is_bytes else _TURNED_ROWS) ** 2 * matrix.element_size()


def _packing(m: int, n: int, k: int, *, turned: bool) -> int:
    """What a product of half types packs on a CPU: blocks of both operands and of the result, the latter in float32.

    oneDNN 3 as torch 2.13 calls it, found from its allocations with AVX-512: the second operand in columns of 64, at
    most 1536 deep; the first only where it lies transposed (turned), in blocks of 256 x 512, and if it is deeper than
    that, a row of blocks of the result waits for the rest of the sum. A GPU's libraries keep a workspace of their own.
    """
    rows, wide, packed = min(m, _ROWS), _COLUMNS, 0
    if turned:
        packed = 2 * rows * (min(k, _DEPTH) + _PADDING)
        wide = _WIDEST if k > _DEPTH else wide
    filled = -(-n // _COLUMNS) * _COLUMNS
    packed += 2 * min(k, _DEEPEST) * _COLUMNS + 4 * rows * min(filled, wide)
    return packed + _BOOKKEEPING


def _single(cost: OpCost) -> int:
    """What oneDNN takes for a product of float32: columns of the second operand. With AVX2 some rows of the first, too,
    where there are many and they begin at places that caches do not tell apart: a multiple of 8 KiB from each other."""
    assert cost.gemm is not None
    _, rows, _, depth = cost.gemm
    packed = _PACKED_ROWS if _IS_AVX2 and rows >= _TALL and depth % _APART == 0 else 0
    return packed + 4 * min(_rounded(depth, 16), _DEEPEST_SINGLE) * _COLUMNS + _BOOKKEEPING


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _value(node: Any) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value
