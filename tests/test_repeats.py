"""Layers that are traced once: the program is that of a full trace, node for node, whatever the layers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from models import hf_gpt2
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import passes.trace
from passes.repeats import Repeats
from passes.trace import Traced, trace
from passes.unroll import unroll

WIDTH, LAYERS = 8, 4
BATCH = {"x": torch.ones(4, 6, WIDTH)}


def nodes(traced: Traced) -> list[str]:
    """All that is known of every node at both batch sizes."""
    found = []
    for graph in (traced.global_graph, traced.other):
        assert graph is not None
        for n in graph.graph.nodes:
            stack = n.meta.get("nn_module_stack")
            found.append(f"{n.name} {n.target} {n.args} {dict(n.kwargs)} {graph.metas.get(n.name)} {stack}")
        found.append(f"{graph.inputs} {graph.outputs}")
    return found


def repetitions(model: nn.Module, batch: Any) -> int:
    """Calls that repeat another module's in the accepted traces; the program is that of a full trace in any case."""
    made: list[Repeats] = []

    def unrolled(exported: torch.export.ExportedProgram, repeats: Repeats) -> None:
        unroll(exported, repeats)
        made.append(repeats)

    with mock.patch.object(passes.trace, "unroll", unrolled):
        folded = trace(model, batch)
    with mock.patch.object(passes.trace, "_folded", lambda *_: None):
        full = trace(model, batch)
    assert nodes(folded) == nodes(full)
    assert folded.notes == full.notes and folded.counters == full.counters
    return sum(len(repeats.shifts) for repeats in made)


class Layer(nn.Module):
    """does(layer, x): what its forward returns; held: attributes of its own."""

    def __init__(self, does: Callable[[Any, Tensor], Any], **held: Any) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.does = does
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.does(self, x)


class Stack(nn.Module):
    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def mlp(layer: Any, x: Tensor) -> Tensor:
    parts = layer.up(layer.norm(x)).split([WIDTH // 2, x.shape[2] - WIDTH // 2], dim=2)
    made: Tensor = layer.down(F.gelu(torch.cat(parts[::-1], dim=2)))
    return x + made


def stack(does: Callable[[Any, Tensor], Any], **held: Callable[[int], Any]) -> Stack:
    return Stack([Layer(does, **{name: value(i) for name, value in held.items()}) for i in range(LAYERS)])


def llama() -> tuple[nn.Module, Any]:
    model = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=64,
            use_cache=False,
        )
    )  # fmt: skip
    ids = torch.ones(4, 6, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids}


def bert() -> tuple[nn.Module, Any]:
    ids = torch.ones(4, 6, dtype=torch.long)
    model = BertForMaskedLM(
        BertConfig(num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=64)
    )
    return model, {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("make", [lambda: hf_gpt2("sdpa", layers=4), llama, bert], ids=["gpt2", "llama", "bert"])
def test_hugging_face_layers_are_traced_once(make: Callable[[], tuple[nn.Module, Any]]) -> None:
    assert repetitions(*make()) == 2 * 3


def test_layers_that_are_alike_are_traced_once() -> None:
    unread = stack(mlp, number=lambda i: i)
    assert repetitions(unread, BATCH) == 2 * (LAYERS - 1)


def test_layers_on_the_meta_device_beside_calls_that_are_traced_twice() -> None:
    with torch.device("meta"):
        model = stack(mlp)
        model.first = nn.Sequential(nn.Flatten(1), nn.BatchNorm1d(6 * WIDTH), nn.Unflatten(1, (6, WIDTH)))
    assert repetitions(model, BATCH) == 2 * (LAYERS - 1)


def test_tied_layers_read_what_they_share() -> None:
    model = stack(mlp)
    model.layers[2].up.weight = model.layers[1].up.weight  # type: ignore[union-attr]
    model.layers[3] = model.layers[1]
    assert repetitions(model, BATCH) == 2 * (LAYERS - 1)


def test_frozen_layers_are_of_another_kind() -> None:
    model = stack(mlp)
    model.layers[1].requires_grad_(False)
    assert repetitions(model, BATCH) == 2 * (LAYERS - 2)


COUNTER = [0]


def counted(layer: Any, x: Tensor) -> Tensor:
    """Every third call does something else."""
    COUNTER[0] += 1
    return mlp(layer, x) if COUNTER[0] % 3 else mlp(layer, x).tanh()


class Counts(Stack):
    def forward(self, x: Tensor) -> Tensor:
        COUNTER[0] = 0
        try:
            return super().forward(x)
        finally:
            COUNTER[0] = 0  # as it was: what forward leaves changed is noted


def tied_twice(layer: Any, x: Tensor) -> Tensor:
    """The first layer's two products have one weight."""
    second = layer.up if layer.number == 0 else layer.down
    made: Tensor = second(layer.up(x))
    return made


@pytest.mark.parametrize(
    "model",
    [
        stack(lambda layer, x: F.dropout(mlp(layer, x), layer.p, training=True), p=lambda i: 0.1 + i / 100),
        stack(lambda layer, x: mlp(layer, x) / (layer.number + 1), number=lambda i: i),
        stack(lambda layer, x: mlp(layer, x) if layer.number % 2 else mlp(layer, x).relu(), number=lambda i: i),
        stack(lambda layer, x: layer.act(mlp(layer, x)), act=lambda i: torch.relu if i < 3 else torch.tanh),
        stack(lambda layer, x: mlp(layer, x) + layer.sign * 0.0, sign=lambda i: -1.0 if i == 2 else 1.0),
        Counts([Layer(counted) for _ in range(LAYERS)]),
        stack(tied_twice, number=lambda i: i),
    ],
    ids=["dropout", "number", "branch", "function", "zero", "counter", "tied"],
)
def test_layers_that_differ_are_traced_in_full(model: nn.Module) -> None:
    assert repetitions(model, BATCH) == 0


def aside(layer: Any, x: Tensor) -> Tensor:
    """Something is left for others to read."""
    layer.seen = mlp(layer, x).square().mean()
    return mlp(layer, x)


class Reads(Stack):
    def forward(self, x: Tensor) -> Tensor:
        loss = super().forward(x)
        seen: Any = [layer.seen for layer in self.layers]
        return loss + torch.stack(seen).sum()


def written(layer: Any, x: Tensor) -> Tensor:
    y = mlp(layer, x)
    y[:, 0] = 1.0
    return y


def constant(layer: Any, x: Tensor) -> Tensor:
    return mlp(layer, x) * torch.tensor([1.0, 2.0] * (WIDTH // 2))


def without_gradient(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().mean(dim=2, keepdim=True)
    return mlp(layer, x) * scale


@pytest.mark.parametrize(
    "model",
    [Reads([Layer(aside) for _ in range(LAYERS)]), stack(written), stack(constant), stack(without_gradient)],
    ids=["aside", "in place", "constant", "no_grad"],
)
def test_layers_that_do_more_than_return_are_traced_in_full(model: nn.Module) -> None:
    assert repetitions(model, BATCH) == 0


def several(layer: Any, x: Any) -> Any:
    """Takes and returns a dict with what it was given, what it made twice over, and a number."""
    y = mlp(layer, x["x"])
    return {"x": y, "again": y, "first": x["first"], "sum": y.sum() + x["sum"], "number": layer.number}


class Gathers(Stack):
    def forward(self, x: Tensor) -> Tensor:
        state: dict[str, Any] = {"x": self.first(x), "again": x, "first": x, "sum": x.sum(), "number": 0}
        for layer in self.layers:
            state = layer(state)
            state["x"] = state["x"] + state["again"] * state["number"] + state["first"]
        total: Tensor = state["sum"] + state["x"].mean()
        return total


def test_results_of_any_structure() -> None:
    model = Gathers([Layer(several, number=i) for i in range(LAYERS)])
    assert repetitions(model, BATCH) == 2 * (LAYERS - 2)  # the first one's input needs no gradient


class Penalised(Stack):
    """Reads the parameters of its layers beside them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.stack([p.square().sum() for p in self.parameters()]).sum()


class Backwards(Stack):
    """Calls its layers from the last."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in reversed(self.layers):
            x = layer(x)
        return x.square().mean()


def neighbours(layer: Any, x: Tensor) -> Tensor:
    """Reads a weight of the layer that comes after it."""
    after: Any = layer.after[0]
    return mlp(layer, x) + F.linear(x, after.up.weight)


def ring() -> Stack:
    model = stack(neighbours)
    for layer, after in zip(model.layers, (*model.layers[1:], model.layers[0]), strict=True):
        layer.after = (after,)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("model", "repeated"),
    [
        (Penalised([Layer(mlp) for _ in range(LAYERS)]), LAYERS - 1),
        (Backwards([Layer(mlp) for _ in range(LAYERS)]), LAYERS - 1),
        (ring(), LAYERS - 1),
    ],
    ids=["read by the model", "called from the last", "read by another layer"],
)
def test_parameters_of_repeated_layers_that_are_read_elsewhere(model: nn.Module, repeated: int) -> None:
    assert repetitions(model, BATCH) == 2 * repeated
    assert len(list(model.parameters())) == 2 + 6 * LAYERS


def test_a_loss_that_reads_parameters_of_layers() -> None:
    model = stack(mlp)

    def loss(output: Tensor, inputs: Any) -> Tensor:
        return output + model.layers[2].up.weight.sum()  # type: ignore[union-attr, operator]

    with mock.patch.object(passes.trace, "_folded", lambda *_: None):
        full = trace(model, BATCH, loss)
    assert nodes(trace(model, BATCH, loss)) == nodes(full)
