"""What kernels handle one by one beside the bytes they move, and whose kernel an op runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cost_model.ops import OPS, price_of
from cost_model.program import OpCost

sys.path.append(str(Path(__file__).parent))
from op_calls import Case

WIDE, SHORT, TALL = torch.rand(6, 32), torch.rand(6, 8), torch.rand(5, 6, 7)
IDS = torch.tensor([0, 2, 1])


def cost_of(name: str, *args: Any, **kwargs: Any) -> OpCost:
    cost = price_of(Case(f"aten.{name}", args, kwargs).call)
    assert cost is not None
    return cost


@pytest.mark.parametrize("name", ["_softmax.default", "_log_softmax.default"])
def test_softmax_begins_every_row_and_every_number_of_a_row_shorter_than_a_vector(name: str) -> None:
    assert cost_of(name, WIDE, -1, False).rows == 6
    assert cost_of(name, SHORT, 1, False).rows == 6 * 8
    assert cost_of(name, WIDE.double()[:, :8], 1, False).rows == 6
    assert cost_of(name, WIDE, 0, False).rows == 0
    assert cost_of(name.replace(".", "_backward_data."), SHORT, SHORT, -1, torch.float32).rows == 6 * 8


def test_norms_and_sums_along_the_last_dim_begin_every_row() -> None:
    assert cost_of("native_layer_norm.default", TALL, [6, 7], None, None, 1e-5).rows == 5
    assert cost_of("sum.dim_IntList", TALL, [-1]).rows == 30
    assert cost_of("mean.dim", TALL, [1, 2], True).rows == 5
    assert cost_of("sum.dim_IntList", TALL, [0, 1]).rows == 0


@pytest.mark.parametrize(
    ("indices", "pieces"),
    [
        ([IDS], 3),
        ([IDS, IDS[:2, None]], 6),
        ([None, None, IDS], 5 * 6 * 3),
        ([IDS, None, IDS], 6 * 3),
        ([None, IDS], 5 * 3),
    ],
)
def test_a_lookup_finds_pieces_that_lie_together(indices: list[torch.Tensor | None], pieces: int) -> None:
    taken = TALL[tuple(slice(None) if index is None else index for index in indices)]
    assert cost_of("index.Tensor", TALL, indices).rows == pieces
    assert cost_of("index_put.default", TALL, indices, torch.rand(taken.shape), True).rows == pieces
    *_, planned = OPS["aten.index.Tensor"].backward_price(Case("aten.index.Tensor", (TALL, indices), {}).call)
    assert (planned.op, planned.rows) == ("aten.index_put.default", pieces)


def test_gathers_across_rows_find_every_element() -> None:
    index = torch.zeros(2, 6, 7, dtype=torch.int64)
    assert cost_of("gather.default", TALL, 0, index).rows == 2 * 6 * 7
    assert cost_of("gather.default", TALL, -1, index).rows == 0
    assert cost_of("scatter_add.default", TALL, 0, index, TALL).rows == 2 * 6 * 7


@pytest.mark.parametrize(
    ("name", "args", "like"),
    [
        ("std.correction", (TALL, [-1]), "aten.var_mean.correction"),
        ("mean.dim", (TALL, [-1]), "aten.sum.dim_IntList"),
        ("argmax.default", (TALL, -1), "aten.max.dim"),
        ("gt.Scalar", (TALL, 0.5), "aten.eq.Tensor"),
        ("sin.default", (TALL,), "aten.cos.default"),
        ("pow.Tensor_Scalar", (TALL, 2.0), "aten.mul.Tensor"),
        ("pow.Tensor_Scalar", (TALL, 1.7), "aten.pow.Tensor_Scalar"),
        ("smooth_l1_loss.default", (TALL, TALL), "aten.mse_loss.default"),
        ("scatter.src", (TALL, -1, torch.zeros(5, 6, 7, dtype=torch.int64), TALL), "aten.scatter_add.default"),
    ],
)
def test_ops_of_one_kernel_go_by_one_row(name: str, args: tuple[Any, ...], like: str) -> None:
    assert cost_of(name, *args).op == like


def test_a_batch_norm_of_given_statistics_is_a_product_and_another_sums() -> None:
    channels = [torch.rand(6) for _ in range(4)]
    given, own = (cost_of("native_batch_norm.default", TALL, *channels, t, 0.1, 1e-5) for t in (False, True))
    assert (given.kind, given.op) == ("elementwise", "aten.mul.Tensor")
    assert (own.kind, own.op) == ("norm", "aten.native_batch_norm.default") and own.nbytes > given.nbytes
