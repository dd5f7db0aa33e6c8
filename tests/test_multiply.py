"""Multiply: large products of float32 are oneDNN's, and only those; programs with them train what one device trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import example_gpt
from parity import SGD, cpu_cluster, largest_error, reference
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import autopar
from autopar import Parallelism
from autopar.runtime import compiled, kernels
from cost_model.device import ONEDNN
from cost_model.device_rows import QUICK_FLOPS
from passes import vocabulary
from passes.multiply import multiply
from passes.storage import mark_storages

pytestmark = pytest.mark.skipif(not kernels.HAS_ONEDNN, reason="this build of torch has no oneDNN")
aten = torch.ops.aten
M, N, K = 128, 192, 160  # of a product that is large enough


def traced(call: Callable[..., Any], *operands: Tensor) -> fx.Graph:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        graph = make_fx(call)(*(mode.from_tensor(o) for o in operands)).graph
    mark_storages(graph)
    return graph


def after(graph: fx.Graph) -> list[str]:
    multiply(graph)
    graph.lint()
    return [
        str(node.target) for node in graph.nodes if node.op == "call_function" and node.target is not aten.t.default
    ]


def run(graph: fx.Graph, *inputs: Tensor) -> Any:
    """With the runtime's kernels."""
    own = {vocabulary.product: kernels.product, vocabulary.by_rows: kernels.by_rows}
    values: dict[fx.Node, Any] = dict(zip((n for n in graph.nodes if n.op == "placeholder"), inputs, strict=True))
    for node in graph.nodes:
        args = fx.map_arg(node.args, values.__getitem__)
        if node.op == "output":
            return args[0]
        if node.op == "call_function":
            values[node] = own.get(node.target, node.target)(*args, **node.kwargs)
    raise AssertionError("a graph without an output")


FORMS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "plain": (lambda x, w: aten.mm(x, w), ((M, K), (K, N))),
    "a weight": (lambda x, w: aten.mm(x, aten.t(w)), ((M, K), (N, K))),
    "a weight's gradient": (lambda dy, x: aten.mm(aten.t(dy), x), ((K, M), (K, N))),
    "both turned": (lambda dy, x: aten.mm(aten.t(dy), aten.t(x)), ((K, M), (N, K))),
    "with a bias": (lambda b, x, w: aten.addmm(b, x, aten.t(w)), ((N,), (M, K), (N, K))),
}


TURNED = ("a weight's gradient", "both turned")
"""Forms whose first operand lies transposed."""


@pytest.mark.parametrize("form", FORMS)
def test_large_products_are_called_by_their_own_name_and_stay_equal(form: str) -> None:
    call, shapes = FORMS[form]
    inputs = [torch.randn(*shape) for shape in shapes]
    graph = traced(call, *inputs)
    assert after(graph) == [*(["autopar.by_rows.default"] if form in TURNED else []), "autopar.product.default"]
    exact = call(*(x.double() for x in inputs))
    assert largest_error({"product": run(graph, *inputs).double()}, {"product": exact}) < 1e-6


SMALL = round((QUICK_FLOPS / 2) ** (1 / 3)) - 1
OTHERS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "too small to gain": (aten.mm, (torch.ones(SMALL, SMALL), torch.ones(SMALL, SMALL))),
    "of another dtype": (aten.mm, (torch.ones(M, K).double(), torch.ones(K, N).double())),
    "of part of a matrix": (lambda x, w: aten.mm(x, w[:, ::2]), (torch.ones(M, K), torch.ones(K, 2 * N))),
    "added to a matrix": (aten.addmm, (torch.ones(M, N), torch.ones(M, K), torch.ones(K, N))),
    "scaled": (lambda b, x, w: aten.addmm(b, x, w, alpha=2), (torch.ones(N), torch.ones(M, K), torch.ones(K, N))),
}


@pytest.mark.parametrize("other", OTHERS)
def test_products_that_gain_nothing_or_that_it_does_not_know_stay(other: str) -> None:
    call, operands = OTHERS[other]
    graph = traced(call, *operands)
    before = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert after(graph) == before


def test_a_product_that_was_to_be_written_in_place_is_made_apart() -> None:
    def backward(row: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        vocabulary.accumulate_product(x, dy, "w")
        vocabulary.put_product(row, x, dy, 64)
        return x

    graph = traced(backward, torch.empty(64 + M * N), torch.empty(M, K), torch.empty(K, N))
    product = "autopar.product.default"
    assert after(graph) == [product, "autopar.accumulate.default", product, "autopar.put.default"]
    accumulated, put = (n for n in graph.nodes if n.target in (vocabulary.accumulate, vocabulary.put))
    assert accumulated.args[1:] == ("w",) and put.args[2:] == (64,)
    assert all(n.meta["val"].shape == (M, N) for n in graph.nodes if n.target is vocabulary.product)


def quick_cluster(num_devices: int) -> autopar.Cluster:
    cluster = cpu_cluster(num_devices)
    return replace(cluster, devices=tuple(replace(device, products=ONEDNN) for device in cluster.devices))


WIDE = {"n_embd": 128, "fused_qkv": False, "tied": False, "block_size": 64}
PLANS = {
    "stages": Parallelism(dp=1, tp=1, pp=2, microbatch_size=4, schedule="1f1b"),
    "replicas": Parallelism(dp=2, tp=1, pp=1),
    "parts of weights": Parallelism(dp=2, tp=1, pp=1, zero=3),
    "shards": Parallelism(dp=1, tp=2, pp=1),
    "overlap": Parallelism(dp=1, tp=2, pp=1, overlap=True),
    "made again": Parallelism(dp=1, tp=1, pp=2, microbatch_size=4, schedule="zero_bubble", recompute="full"),
}


def wide_gpt() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    model, _ = example_gpt(**WIDE)
    tokens = torch.randint(0, 64, (8, 65), generator=torch.Generator().manual_seed(1))
    return model, {"idx": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("plan", PLANS)
def test_programs_train_what_one_device_trains(plan: str) -> None:
    model, batch = wide_gpt()
    expected, trained = reference(model, batch, SGD)
    with autopar.compile(model, quick_cluster(2), batch, optimizer=SGD, parallelism=PLANS[plan]) as exe:
        assert "kernels.product(" in exe.code(0)
        assert [exe.step(batch) for _ in range(3)] == pytest.approx(expected, rel=1e-5)
        assert largest_error(exe.full_state_dict(), trained.state_dict()) < 1e-5


@pytest.mark.usefixtures("thread_ranks")
def test_kernels_and_products_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run as printed, not compiled."""
    monkeypatch.setattr(compiled, "compiled", lambda function: function)
    model, batch = wide_gpt()
    (expected, *_), _ = reference(model, batch, SGD)
    cluster, plan = quick_cluster(2), PLANS["replicas"]
    with autopar.compile(model, cluster, batch, optimizer=SGD, parallelism=plan, backend="inductor") as exe:
        assert all(text in exe.code(0) for text in ("kernels.product(", "Compiled into one kernel."))
        assert exe.step(batch) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("thread_ranks")
def test_inference_multiplies_as_training_does() -> None:
    model, batch = wide_gpt()
    with autopar.compile(model, quick_cluster(2), batch, parallelism=PLANS["replicas"]) as exe:
        with torch.no_grad():
            assert exe.eval_step(batch) == pytest.approx(float(model(**batch)), rel=1e-6)


@pytest.mark.usefixtures("shared_ranks")
def test_memory_is_what_is_estimated() -> None:
    model, batch = wide_gpt()
    with autopar.compile(model, quick_cluster(2), batch, optimizer=SGD, parallelism=PLANS["stages"]) as exe:
        assert 0 <= autopar.compare(exe, batch, steps=1).peak_memory_error < 0.01


class Factored(torch.nn.Module):
    """A layer whose matrix is a product of two; its first factor is turned before the layer's input is."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (torch.nn.Parameter(torch.randn(K, width) / K) for width in (M, N))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.left.t() @ self.right).square().mean()


@pytest.mark.usefixtures("shared_ranks")
def test_copies_of_two_functions_are_two_storages() -> None:
    """Nodes of the forward and of the backward bear the same names."""
    model, batch = Factored(), {"x": torch.randn(2 * 4 * N, N)}
    with autopar.compile(model, quick_cluster(2), batch, optimizer=SGD, parallelism=PLANS["replicas"]) as exe:
        assert 0 <= autopar.compare(exe, batch, steps=1).peak_memory_error < 0.01


def test_devices_that_differ_multiply_as_torch_does() -> None:
    cluster = quick_cluster(2)
    assert cluster.products == ONEDNN
    assert replace(cluster, devices=(cluster.devices[0], cpu_cluster(1).devices[0])).products != ONEDNN
