"""What CPU kernels copy while they run, as estimated, against what their allocations show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

from autopar.runtime.draws import drop as runtime_drop
from passes.operand_copies import copied_bytes
from passes.random_vocabulary import drop

aten = torch.ops.aten
SIZE = 256
SMALL = 64 * SIZE
"""Bytes that kernels may take beside copies: sums of rows and the like."""


def _matrix() -> Tensor:
    return torch.rand(SIZE, SIZE)


def _images() -> Tensor:
    return torch.rand(4, 16, 32, 32)


ROWS = torch.arange(SIZE)
FLAGS, NUMBERS = _matrix() > 0.5, torch.arange(1, SIZE * SIZE + 1).view(SIZE, SIZE)
HALF, WIDE = _matrix().bfloat16(), torch.rand(SIZE, 2 * SIZE)
PART, TURNED, SPREAD = WIDE[:, :SIZE], _matrix().t(), torch.rand(1, SIZE).expand(SIZE, SIZE)
PICTURE, CROPPED = _images(), torch.rand(4, 32, 32, 32)[:, :16]
ONES, ZEROS = torch.ones(SIZE), torch.zeros(SIZE)
FEW, NONE = torch.ones(16), torch.zeros(16)


def _layer_norm(x: Tensor) -> Any:
    return aten.native_layer_norm.default(x, [SIZE], ONES, ZEROS, 1e-5)


def _layer_norm_backward(gradient: Tensor, x: Tensor) -> Any:
    known = torch.zeros(SIZE, 1), torch.ones(SIZE, 1), ONES, ZEROS
    return aten.native_layer_norm_backward.default(gradient, x, [SIZE], *known, [True, True, True])


def _batch_norm_backward(gradient: Tensor, x: Tensor) -> Any:
    known = FEW, NONE, FEW, NONE, FEW
    return aten.native_batch_norm_backward.default(gradient, x, *known, True, 1e-5, [True, True, True])


CALLS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "numbers times flags": (aten.mul.Tensor, (_matrix(), FLAGS)),
    "flags spread": (lambda x, y: aten.mul.Tensor(x, y[:1].expand(SIZE, SIZE)), (_matrix(), FLAGS)),
    "a row of flags": (aten.mul.Tensor, (_matrix(), FLAGS[0])),
    "sums of dtypes": (aten.add.Tensor, (_matrix(), HALF)),
    "integers divided": (aten.div.Tensor, (NUMBERS, NUMBERS)),
    "integers by a number": (lambda x: aten.div.Tensor(x, 2), (NUMBERS,)),
    "roots of integers": (aten.sqrt.default, (NUMBERS,)),
    "compared": (aten.gt.Tensor, (_matrix(), NUMBERS)),
    "compared with a fraction": (lambda x: aten.eq.Scalar(x, 1.5), (NUMBERS,)),
    "compared with an integer": (lambda x: aten.eq.Scalar(x, 1), (_matrix(),)),
    "both": (aten.logical_and.default, (_matrix(), FLAGS)),
    "chosen": (aten.where.self, (FLAGS, _matrix(), HALF)),
    "chosen alike": (aten.where.self, (FLAGS, _matrix(), _matrix())),
    "filled": (lambda x, mask: aten.masked_fill.Scalar(x, mask, 0.0), (_matrix(), FLAGS)),
    "dropped": (lambda x, mask: drop(x, mask, 2.0), (_matrix(), FLAGS)),
    "counted": (lambda x: aten.sum.dim_IntList(x, [1]), (FLAGS,)),
    "half summed wide": (lambda x: aten.sum.dim_IntList(x, [1], dtype=torch.float32), (HALF,)),
    "half summed": (lambda x: aten.sum.dim_IntList(x, [1]), (HALF,)),
    "counted along": (lambda x: aten.cumsum.default(x, 1), (FLAGS,)),
    "any": (lambda x: aten.any.dim(x, 1), (_matrix(),)),
    "layer norm of a part": (_layer_norm, (PART,)),
    "layer norm": (_layer_norm, (_matrix(),)),
    "backward of a layer norm": (_layer_norm_backward, (PART, TURNED)),
    "softmax": (lambda x: aten._softmax.default(x, 1, False), (TURNED,)),
    "backward of a softmax": (lambda g, y: aten._softmax_backward_data.default(g, y, 1, torch.float32), (PART, SPREAD)),
    "gradients of rows": (lambda g: aten.embedding_dense_backward.default(g, ROWS, SIZE, -1, False), (SPREAD,)),
    "losses": (lambda x: aten.nll_loss_forward.default(x, ROWS, None, 1, -100), (PART,)),
    "columns taken": (lambda x: aten.index_select.default(x, 1, ROWS), (PART,)),
    "rows taken": (lambda x: aten.index_select.default(x, 0, ROWS), (PART,)),
    "a scalar taken": (lambda x: aten.index_select.default(x, 0, torch.zeros(1, dtype=torch.long)), (torch.ones(()),)),
    "product of a part": (aten.mm.default, (PART, TURNED)),
    "product of what is spread": (aten.mm.default, (SPREAD, _matrix())),
    "product of every other": (lambda x, y: aten.addmm.default(ONES, y, x), (WIDE[:, ::2], _matrix())),
    "logarithm of a sum": (lambda x: aten.logsumexp.default(x, [1]), (_matrix(),)),
    "maxima of a part": (lambda x: aten.max_pool2d_with_indices.default(x, [2, 2]), (CROPPED,)),
    "means of a part": (lambda x: aten.avg_pool2d.default(x, [2, 2]), (CROPPED,)),
    "enlarged": (lambda x: aten.upsample_nearest2d.default(x, [64, 64]), (PICTURE,)),
    "enlarged smoothly": (lambda x: aten.upsample_bilinear2d.default(x, [64, 64], False), (PICTURE,)),
    "backward of a batch norm": (_batch_norm_backward, (_images(), PICTURE)),
    "backward of a batch norm of a part": (_batch_norm_backward, (_images(), CROPPED)),
}


@pytest.mark.parametrize("name", CALLS)
def test_copies_are_those_that_the_kernel_makes(name: str) -> None:
    call, operands = CALLS[name]
    opaque = name == "dropped"
    traced = make_fx(call, tracing_mode="fake" if opaque else "real")(*operands)
    (node,) = [n for n in traced.graph.nodes if _is_priced(n)]
    run = (lambda x, mask: runtime_drop(x, mask, 2.0)) if opaque else call
    run(*operands)  # what is made once is not counted
    assert abs(copied_bytes(node) - _taken(run, operands)) <= SMALL


def _is_priced(node: fx.Node) -> bool:
    makes = isinstance(node.target, torch._ops.OpOverload) and not node.target.is_view
    return makes and not str(node.target).startswith(("aten.zeros", "aten.ones"))


def _taken(call: Callable[..., Any], operands: tuple[Tensor, ...]) -> int:
    """Bytes beyond the results, at the most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        results = call(*operands)
    changes = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    made = results if isinstance(results, tuple) else (results,)
    return most - sum(each.untyped_storage().nbytes() for each in made)
