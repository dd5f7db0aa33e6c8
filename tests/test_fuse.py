"""Fuse: gradients that are products are written where they are kept, and only those."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from passes import vocabulary
from passes.fuse import fuse
from passes.storage import mark_storages

aten = torch.ops.aten


class Buffers:
    """Adds gradients as an executor does."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def accumulate(self, gradient: Tensor, name: str) -> None:
        self.held[name] = self.held.get(name, torch.zeros_like(gradient)) + gradient

    def accumulate_product(self, left: Tensor, right: Tensor, name: str) -> None:
        self.accumulate(left @ right, name)


def traced(gradient: Callable[[Tensor, Tensor], Tensor], *, extra_use: bool = False) -> fx.Graph:
    """A backward that accumulates a gradient of x [4, 6] and dy [4, 5]."""

    def backward(x: Tensor, dy: Tensor) -> Tensor:
        made = gradient(x, dy)
        vocabulary.accumulate(made, "w")
        return made.sum() if extra_use else dy

    with FakeTensorMode(allow_non_fake_inputs=True):
        graph = make_fx(backward)(torch.empty(4, 6), torch.empty(4, 5)).graph
    mark_storages(graph)
    return graph


def executed(graph: fx.Graph, *inputs: Tensor) -> dict[str, Tensor]:
    buffers, values = Buffers(), dict(zip((n for n in graph.nodes if n.op == "placeholder"), inputs, strict=True))
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        args = fx.map_arg(node.args, values.__getitem__)
        if "autopar" in str(node.target):
            getattr(buffers, str(node.target).split(".")[1])(*args)
        else:
            values[node] = node.target(*args, **node.kwargs)
    return buffers.held


def targets(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


FUSED = {
    "a product": lambda x, dy: dy.t() @ x,
    "its transpose": lambda x, dy: (x.t() @ dy).t(),
    "its transpose twice": lambda x, dy: (dy.t() @ x).t().t(),
    "another way to transpose": lambda x, dy: (x.t() @ dy).permute(1, 0),
}
KEPT = {
    "a sum": lambda x, dy: (dy.t() @ x) + 1,
    "a view of another shape": lambda x, dy: (dy.t() @ x).view(30),
    "a part": lambda x, dy: (dy.t() @ x)[1:],
    "no product": lambda x, dy: dy.sum(0),
}


@pytest.mark.parametrize("name", FUSED)
def test_products_are_written_in_place(name: str) -> None:
    graph, inputs = traced(FUSED[name]), (torch.randn(4, 6), torch.randn(4, 5))
    fuse(graph, {"w": "float32"})
    graph.lint()
    assert "autopar.accumulate_product.default" in targets(graph)
    assert not {"aten.mm.default", "autopar.accumulate.default"} & set(targets(graph))
    torch.testing.assert_close(executed(graph, *inputs)["w"], FUSED[name](*inputs))


@pytest.mark.parametrize("name", KEPT)
def test_other_gradients_stay(name: str) -> None:
    graph = traced(KEPT[name])
    before = str(graph)
    fuse(graph, {"w": "float32"})
    assert str(graph) == before


def test_a_product_with_other_uses_stays() -> None:
    graph = traced(FUSED["a product"], extra_use=True)
    fuse(graph, {"w": "float32"})
    assert "aten.mm.default" in targets(graph)


def test_a_buffer_of_another_dtype_is_not_written_by_a_product() -> None:
    graph = traced(FUSED["a product"])
    fuse(graph, {"w": "float64"})
    assert "autopar.accumulate.default" in targets(graph)
