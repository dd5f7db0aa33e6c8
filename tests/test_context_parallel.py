"""Context parallelism: attention whose queries are split over ranks, under a causal mask and under any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from models import example_gpt
from parity import check_parity, cpu_cluster
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import nn

import autopar
from autopar.planner.prices import MeshPrices
from autopar.runtime import kernels
from cost_model.ops import OpCall
from cost_model.placement import Shard
from cost_model.strategies import MeshStrategy

QUERIES = Shard(2)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_of_causal_queries_make_the_whole(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(2, 3, 12, 4, dtype=dtype) for _ in range(4))
    out, logsumexp = kernels.attention(q, k, v, None, True, 0.3)
    expected = kernels.attention_backward(upstream, q, k, v, out, logsumexp, None, True, 0.3)
    grads = []
    for index in range(size):
        mine, above = (t.chunk(size, 2)[index].contiguous() for t in (q, upstream))
        made = kernels.attention_rows(mine, k, v, 0.3, index, size)
        torch.testing.assert_close(made[0], out.chunk(size, 2)[index])
        torch.testing.assert_close(made[1], logsumexp.chunk(size, 2)[index])
        grads.append(kernels.attention_rows_backward(above, mine, k, v, *made, 0.3, index, size))
    of_q, of_k, of_v = zip(*grads, strict=True)
    torch.testing.assert_close(torch.cat(of_q, 2), expected[0])
    torch.testing.assert_close(sum(of_k), expected[1])
    torch.testing.assert_close(sum(of_v), expected[2])


@pytest.fixture
def cheap_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that splits its queries costs nothing, any other a second."""
    priced = MeshPrices.op_time_s

    def op_time_s(prices: MeshPrices, call: OpCall, strategy: MeshStrategy) -> float:
        is_other = call.op.startswith("autopar.attention") and strategy.inputs[0] != (QUERIES,)
        return priced(prices, call, strategy) + is_other

    monkeypatch.setattr(MeshPrices, "op_time_s", op_time_s)


def _gpt() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return example_gpt(torch.float64, n_layer=1)


def _attentions(plan: autopar.Plan) -> set[str]:
    return {
        label.split()[0]
        for stage in plan.stages
        for name, label in stage.choices.items()
        if name.startswith("op:attention_default")
    }


@pytest.mark.usefixtures("cheap_queries", "shared_ranks")
def test_gpt_on_real_ranks() -> None:
    model, batch = _gpt()
    assert _attentions(check_parity(model, batch, 2, 1e-9, tp=2)) == {str(QUERIES)}


@pytest.mark.usefixtures("cheap_queries", "thread_ranks")
@pytest.mark.parametrize(
    ("make", "pins"),
    [
        pytest.param(_gpt, {"tp": 4, "recompute": "full"}, id="gpt"),
        pytest.param(FAMILIES["llama"], {"tp": 2, "dp": 2}, id="grouped queries", marks=pytest.mark.slow),
        pytest.param(FAMILIES["bert"], {"tp": 4}, id="a mask of unequal lengths"),
    ],
)
def test_models_run_as_on_one_device(make: Any, pins: dict[str, Any]) -> None:
    model, batch = make()
    plan = check_parity(model, batch, pins["tp"] * pins.get("dp", 1), 1e-5, **pins)
    assert _attentions(plan) == {str(QUERIES)}


@pytest.mark.usefixtures("cheap_queries")
def test_uneven_lengths_are_not_split() -> None:
    model, batch = example_gpt(n_layer=1, block_size=15)
    batch = {name: tokens[:, :15] for name, tokens in batch.items()}
    plan = autopar.estimate(model, cpu_cluster(2), batch, parallelism=autopar.Parallelism(tp=2)).plan
    assert str(QUERIES) not in _attentions(plan)
