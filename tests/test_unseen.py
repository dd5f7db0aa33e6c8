"""Models of families that no rule was written for run as on one device."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from more_unseen_models import MORE
from parity import check_parity
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import fx
from unseen_models import UNSEEN

from cost_model.errors import VerificationError
from passes.unmutate import unmutate

SGD = functools.partial(torch.optim.SGD, lr=0.1)
GRIDS = {
    "dp2": {"dp": 2, "tp": 1, "pp": 1},
    "tp2": {"dp": 1, "tp": 2, "pp": 1, "microbatch_size": 8},
    "pp2": {"dp": 1, "tp": 1, "pp": 2},
}
MODELS = {**UNSEEN, **MORE}
QUICK = ("recurrent", "tp2")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    ("family", "grid"),
    [
        pytest.param(family, grid, marks=() if (family, grid) == QUICK else pytest.mark.slow)
        for family in MODELS
        for grid in (*GRIDS, "automatic")
    ],
)
def test_unseen_families_run_as_on_one_device(family: str, grid: str) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[family]()
    check_parity(model, batch, 2, 1e-4, SGD, **GRIDS.get(grid, {}))


def recorded(function: object) -> fx.Graph:
    with torch._subclasses.FakeTensorMode():
        return torch.fx.experimental.proxy_tensor.make_fx(function)(torch.empty(4, 6)).graph


def test_calls_that_write_become_calls_that_return() -> None:
    def cell(x: torch.Tensor) -> torch.Tensor:
        first, second = torch.unsafe_chunk(x * 2, 2, 1)
        return first.sigmoid_() + second.tanh_().add_(1)

    graph = recorded(cell)
    unmutate(graph)
    assert not any(getattr(node.target, "_schema", None) and node.target._schema.is_mutable for node in graph.nodes)
    x = torch.randn(4, 6)
    first, second = (2 * x).chunk(2, 1)
    assert torch.equal(fx.GraphModule({}, graph)(x), first.sigmoid() + (second.tanh() + 1))


@pytest.mark.parametrize("given", [(4, 6), (2, 4, 6)])
def test_parts_that_are_written_one_after_the_other_are_laid_into_the_whole(given: tuple[int, ...]) -> None:
    def padded(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x * 2, (1, 2) * (len(given) - 1), mode="circular") * 3

    with torch._subclasses.FakeTensorMode():
        graph = torch.fx.experimental.proxy_tensor.make_fx(padded)(torch.empty(given)).graph
    assert any("copy_" in str(node.target) for node in graph.nodes)
    unmutate(graph)
    x = torch.randn(given)
    assert torch.equal(fx.GraphModule({}, graph)(x), padded(x))


def test_an_alias_that_is_read_after_a_write_is_refused() -> None:
    def whole(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        turned = y.t()
        y[0].zero_()
        return turned + 1

    with pytest.raises(VerificationError, match=r"aten.add.Tensor reads an alias of what aten.zero_.default wrote"):
        unmutate(recorded(whole))
