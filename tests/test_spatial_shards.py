"""Images split along their height or width: convolutions exchange the rows that their windows share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import check_parity, cpu_cluster
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

import autopar
from autopar.planner.prices import MeshPrices
from cost_model.factors import split_factor
from cost_model.ops import OPS, OpCall
from cost_model.ops.convolution import Window, window
from cost_model.placement import Shard
from cost_model.strategies import MeshStrategy
from cost_model.tensor import TensorMeta


class Stack(nn.Module):
    """Windows that overlap, that leave rows out, with a stride, side by side, and of one element."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Conv2d(3, 4, 3, padding=1)
        self.wide = nn.Conv2d(4, 4, (5, 3), padding=(4, 1), dilation=(2, 1), groups=2, bias=False)
        self.strided = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.patches = nn.Conv2d(6, 6, 2, stride=2)
        self.point = nn.Conv2d(6, 3, 1)
        self.double()

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        x = torch.tanh(self.wide(torch.tanh(self.plain(image))))
        return F.mse_loss(self.point(torch.tanh(self.patches(torch.tanh(self.strided(x))))), target)


def images(height: int, width: int) -> tuple[nn.Module, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(4, 3, height, width, generator=generator, dtype=torch.float64)
    rows, columns = ((extent + 1) // 2 // 2 for extent in (height, width))
    target = torch.randn(4, 3, rows, columns, generator=generator, dtype=torch.float64)
    return Stack(), {"image": image, "target": target}


@pytest.fixture
def cheap_rows(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Convolutions that split spatial dim ``request.param`` cost nothing, any other a second."""
    priced = MeshPrices.op_time_s

    def op_time_s(prices: MeshPrices, call: OpCall, strategy: MeshStrategy) -> float:
        is_other = "conv" in call.op and strategy.inputs[0] != (Shard(request.param),)
        return priced(prices, call, strategy) + is_other

    monkeypatch.setattr(MeshPrices, "op_time_s", op_time_s)


def _splits(plan: autopar.Plan) -> list[str]:
    return [label for stage in plan.stages for name, label in stage.choices.items() if name.startswith("op:conv")]


@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize("cheap_rows", [2], indirect=True)
def test_on_real_ranks(cheap_rows: None) -> None:
    model, batch = images(16, 8)
    labels = _splits(check_parity(model, batch, 2, 1e-9, tp=2))
    assert len(labels) == 5 and all(label.startswith("S(2) V") for label in labels)
    assert [label.endswith("inside") for label in labels] == [True, True, True, False, False]


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    ("cheap_rows", "sizes", "pins"),
    [
        pytest.param(2, (24, 8), {"tp": 3}, id="height"),
        pytest.param(3, (8, 16), {"tp": 4}, id="width"),
        pytest.param(2, (16, 16), {"tp": 2, "dp": 2, "recompute": "full"}, id="replicas", marks=pytest.mark.slow),
    ],
    indirect=["cheap_rows"],
)
def test_images_run_as_on_one_device(cheap_rows: None, sizes: tuple[int, int], pins: dict[str, Any]) -> None:
    model, batch = images(*sizes)
    labels = _splits(check_parity(model, batch, pins["tp"] * pins.get("dp", 1), 1e-9, **pins))
    assert any(label.endswith("inside") for label in labels)


@pytest.mark.parametrize("cheap_rows", [2], indirect=True)
def test_uneven_heights_are_not_split(cheap_rows: None) -> None:
    """15 rows on 2 ranks; 8 rows on 4 are even, but fewer than the dilated windows share."""
    for sizes, ranks, split in (((15, 8), 2, 0), ((8, 8), 4, 2)):
        model, batch = images(*sizes)
        plan = autopar.estimate(model, cpu_cluster(ranks), batch, parallelism=autopar.Parallelism(tp=ranks)).plan
        assert len([label for label in _splits(plan) if label.endswith("inside")]) == split


def _call(rows: int, kernel: int, stride: int, padding: int) -> OpCall:
    made = (rows + 2 * padding - kernel) // stride + 1
    metas = [TensorMeta(shape, "float32") for shape in ((2, 3, rows), (4, 3, kernel))]
    args = {"stride": [stride], "padding": [padding], "dilation": [1], "groups": 1}
    return OpCall("aten.conv1d.default", tuple(metas), (TensorMeta((2, 4, made), "float32"),), args)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((12, 3, 1, 1), Window(1, 1, 1)),
        ((12, 1, 1, 0), Window(1, 0, 0)),
        ((12, 4, 4, 0), Window(4, 0, 0)),
        ((12, 3, 2, 1), Window(2, 1, 0)),
        ((12, 3, 1, 0), None),
        ((12, 1, 2, 0), None),
        ((13, 3, 2, 1), None),
    ],
    ids=str,
)
def test_windows(shape: tuple[int, int, int, int], found: Window | None) -> None:
    """(rows, kernel, stride, padding): what a part needs of its neighbours; None where parts are not alike."""
    call = _call(*shape)
    rule = OPS[call.op].factors(call)
    assert window(call, 0) == found and rule is not None
    splits = [split_factor(rule, factor, 1, 3) for factor in rule.sizes]
    assert any(s is not None and s.inputs[0] == Shard(2) for s in splits) == (found is not None)


def test_groups_are_split_among_no_more_ranks_than_there_are() -> None:
    """Four channels in two groups: four ranks could have a channel each, and would have half of a group."""
    metas = [TensorMeta(shape, "float32") for shape in ((2, 4, 8), (4, 2, 3))]
    args = {"stride": [1], "padding": [1], "dilation": [1], "groups": 2}
    call = OpCall("aten.conv1d.default", tuple(metas), (TensorMeta((2, 4, 8), "float32"),), args)
    rule = OPS[call.op].factors(call)
    assert rule is not None
    split = [split_factor(rule, factor, 1, 2) for factor in rule.sizes]
    (groups,) = [s for s in split if s is not None and s.inputs[:2] == (Shard(1), Shard(0))]
    assert groups.can_be_split(2) and not groups.can_be_split(4)
