"""Tracing: what the forward graph says about a model, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import example_gpt, hf_gpt2
from odd_models import Net, inputs, net
from torch import Tensor, nn

from cost_model.errors import BatchError, ConfigError, UnsupportedError
from passes.graph import RESERVED, GraphInput, ModelGraph
from passes.trace import trace


def targets(model: ModelGraph) -> list[str]:
    return [str(n.target) for n in model.nodes()]


def of_kind(model: ModelGraph, kind: str) -> list[GraphInput]:
    return [i for i in model.inputs if i.kind == kind]


def operands(model: ModelGraph, op: str) -> list[list[str]]:
    return [[o.name for o in n.all_input_nodes] for n in model.nodes() if str(n.target) == op]


# --- the model


def test_tied_weights_are_one_parameter() -> None:
    traced = trace(*example_gpt(tied=True))
    names = [i.target for i in of_kind(traced.global_graph, "parameter")]
    assert traced.aliases["head.weight"] == traced.aliases["token.weight"] == "token.weight"
    assert names.count("token.weight") == 1 and "head.weight" not in names
    assert traced.global_graph.outputs and len(names) == len(set(names))


def test_hugging_face_output_is_reduced_to_its_loss() -> None:
    model, batch = hf_gpt2("sdpa")
    graph = trace(model, batch).global_graph
    assert graph.tensor(graph.outputs[0]).shape == ()
    assert "autopar.attention.default" in targets(graph) and "autopar.cross_entropy_sum.default" in targets(graph)


def test_frozen_parameters_are_not_trainable() -> None:
    model = Net()
    model.b.requires_grad_(False)
    trainable = {i.target: i.trainable for i in of_kind(trace(model, inputs()).global_graph, "parameter")}
    assert trainable == {f"{layer}.{part}": layer != "b" for layer in "abc" for part in ("weight", "bias")}


def test_buffers_of_every_kind() -> None:
    def build(self: Any) -> None:
        self.register_buffer("scale", torch.linspace(0, 1, 12).double())
        self.register_buffer("order", torch.arange(12).flip(0), persistent=False)

    model = net(lambda self, x, y: F.mse_loss((self.body(x) * self.scale)[:, self.order], y), build)
    graph = trace(model, inputs()).global_graph
    found = {i.target: graph.tensor(i.node).dtype for i in of_kind(graph, "buffer")}
    assert found == {"scale": "float64", "order": "int64"}


def test_constants_are_lifted_with_their_values() -> None:
    values = [1.0, 2.0, 3.0] * 4
    model = net(lambda self, x, y: F.mse_loss(self.body(x) * torch.tensor(values, dtype=torch.float64), y))
    traced = trace(model, inputs())
    (constant,) = of_kind(traced.global_graph, "constant")
    assert traced.constants[constant.target].tolist() == values


def test_parts_keep_the_modes_they_are_in() -> None:
    def build(self: Any) -> None:
        self.drop = nn.Dropout(0.5).eval()

    model = net(lambda self, x, y: F.mse_loss(self.drop(self.body(x)), y), build)
    trace(model, inputs())
    assert model.training and not model.drop.training  # type: ignore[union-attr]


# --- the batch


def test_keyword_inputs_go_where_their_names_say() -> None:
    batch = inputs()
    swapped = {"y": batch["y"], "x": batch["x"]}
    graph = trace(Net(), swapped).global_graph
    by_target = {i.target: i.node for i in of_kind(graph, "batch")}
    assert operands(graph, "aten.linear.default")[0][0] == by_target["x"]
    assert operands(graph, "aten.sub.Tensor")[0][1] == by_target["y"]


def test_tuple_inputs_are_positional() -> None:
    batch = inputs()
    traced = trace(Net(), (batch["x"], batch["y"]))
    assert [i.target for i in of_kind(traced.global_graph, "batch")] == ["0", "1"]
    assert not traced.spec.is_kwargs and traced.spec.size == 8


def test_nested_inputs_have_paths() -> None:
    def forward(self: Any, x: Any, y: Tensor) -> Tensor:
        return F.mse_loss(self.body(x["left"] + x["rest"][0] * x["rest"][1]), y)

    batch = inputs()
    nested = {"x": {"left": batch["x"], "rest": [batch["x"], batch["y"]]}, "y": batch["y"]}
    paths = [i.target for i in of_kind(trace(net(forward), nested).global_graph, "batch")]
    assert paths == ["x.left", "x.rest.0", "x.rest.1", "y"]


def test_paths_that_meet_are_refused() -> None:
    with pytest.raises(BatchError, match="both called 'x.y'"):
        trace(Net(), {"x": {"y": torch.ones(8, 12)}, "x.y": torch.ones(8, 12)})


def test_one_tensor_passed_twice_is_two_inputs() -> None:
    x = inputs()["x"]
    graph = trace(Net(), {"x": x, "y": x}).global_graph
    assert {i.target for i in of_kind(graph, "batch")} == {"x", "y"}
    assert operands(graph, "aten.sub.Tensor")[0][1] == next(i.node for i in graph.inputs if i.target == "y")


def test_numbers_and_flags_are_part_of_the_program() -> None:
    model = net(lambda self, x, y, scale, on: F.mse_loss(self.body(x) * scale, y) if on else x.sum())
    graph = trace(model, {**inputs(), "scale": 3.0, "on": True}).global_graph
    scaled = [n for n in graph.nodes() if str(n.target) == "aten.mul.Tensor" and 3.0 in n.args]
    assert len(scaled) == 1 and {i.target for i in of_kind(graph, "batch")} == {"x", "y"}


def test_tensors_of_another_length_are_not_split() -> None:
    model = net(lambda self, x, y, w: F.mse_loss(self.body(x) * w, y))
    graph = trace(model, inputs(w=torch.ones(12, dtype=torch.float64))).global_graph
    assert {i.target: i.batched for i in of_kind(graph, "batch")} == {"x": True, "y": True, "w": False}


@pytest.mark.parametrize("name", ["batch", "step", "device", "params", "comm", "grads", "kernels"])
def test_no_value_has_a_name_that_programs_use(name: str) -> None:
    model = net(lambda self, y, **rest: F.mse_loss(self.body(rest[name]), y))
    batch = inputs()
    graph = trace(model, {"y": batch["y"], name: batch["x"]}).global_graph
    assert not RESERVED & {n.name for n in graph.graph.nodes}
    assert name in {i.target for i in graph.inputs}


# --- the loss


def test_loss_fn_gets_outputs_and_inputs() -> None:
    model = net(lambda self, x, y: {"hidden": self.body(x)})
    traced = trace(model, inputs(), lambda outputs, given: F.mse_loss(outputs["hidden"], given["y"]))
    assert operands(traced.global_graph, "aten.sub.Tensor")[0][1] == "y"


def test_a_dict_with_a_loss_will_do() -> None:
    graph = trace(net(lambda self, x, y: {"loss": F.mse_loss(self.body(x), y)}), inputs()).global_graph
    assert graph.tensor(graph.outputs[0]).shape == ()


def test_a_loss_of_one_element_becomes_a_scalar() -> None:
    graph = trace(net(lambda self, x, y: (self.body(x) - y).pow(2).mean().reshape(1)), inputs()).global_graph
    assert graph.tensor(graph.outputs[0]).shape == ()


@pytest.mark.parametrize(
    "forward",
    [lambda self, x, y: self.body(x), lambda self, x, y: None, lambda self, x, y: self.body(x).argmax()],
    ids=["tensor", "nothing", "integer"],
)
def test_no_scalar_loss_is_refused(forward: Any) -> None:
    with pytest.raises(ConfigError, match="no scalar loss"):
        trace(net(forward), inputs())


# --- where gradients stop


def _detached(forward: Any) -> list[list[str]]:
    return operands(trace(net(forward), inputs()).global_graph, "aten.detach.default")


def test_values_that_leave_no_grad_are_detached() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = torch.tanh(self.a(x))
        return F.mse_loss(self.b(hidden), y)

    assert _detached(forward) == [["tanh"]]


def test_no_grad_survives_functionalisation() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = torch.tanh(self.a(x))
            hidden.add_(1.0)
        other = self.b(hidden)
        other.mul_(2.0)
        return F.mse_loss(other, y)

    assert _detached(forward) == [["add"]]


def test_detach_in_place_holds_for_all_later_uses() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.a(x)
        before = hidden * 2
        hidden.detach_()
        return F.mse_loss(self.b(hidden) * hidden + before, y)

    graph = trace(net(forward), inputs()).global_graph
    (detached,) = [n for n in graph.nodes() if str(n.target) == "aten.detach.default"]
    users = {str(u.target) for u in detached.args[0].users}  # type: ignore[union-attr]
    assert users == {"aten.detach.default", "aten.mul.Tensor"}
    assert {str(u.target) for u in detached.users} == {"aten.linear.default", "aten.mul.Tensor"}


def test_enable_grad_inside_no_grad_keeps_its_gradient() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            first = self.a(x)
            with torch.enable_grad():
                second = self.b(x)
            third = self.c(x)
        return F.mse_loss(first + second + third, y)

    assert _detached(forward) == [["linear"], ["linear_2"]]


@pytest.mark.parametrize("has_gradient_before", [True, False])
def test_changing_an_outer_tensor_in_no_grad_is_refused(has_gradient_before: bool) -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.a(x)
        if has_gradient_before:
            given, hidden = hidden, torch.zeros_like(hidden)
            hidden[:, 1] = given[:, 1]
        with torch.no_grad():
            hidden.mul_(2.0)
        return F.mse_loss(self.b(hidden), y)

    with pytest.raises(UnsupportedError, match="no_grad"):
        trace(net(forward), inputs())


@pytest.mark.parametrize("before", [True, False])
def test_writes_with_gradient_after_no_grad_beside_views_from_before_are_refused(before: bool) -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.a(x)
        made = torch.zeros_like(hidden)
        view = made[:, :3]
        with torch.no_grad():
            made[:, 0] = hidden[:, 0]
        view = view if before else made[:, :3]
        made[:, 1] = hidden[:, 1]
        return F.mse_loss(self.b(hidden) * made, y) + view.mean()

    with pytest.raises(UnsupportedError, match="take the view afterwards"):
        trace(net(forward), inputs())


# --- one vocabulary


def test_in_place_ops_are_functionalised() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.a(x)
        hidden[:, 0] = 0.0
        hidden.relu_()
        return F.mse_loss(self.b(hidden), y)

    graph = trace(net(forward), inputs()).global_graph
    assert not any(n.target._schema.is_mutable for n in graph.nodes() if isinstance(n.target, torch._ops.OpOverload))
    assert "aten.relu.default" in targets(graph)


def test_casts_of_autocast_regions_are_calls() -> None:
    def forward(self: Any, x: Tensor, y: Tensor, on: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            hidden = self.a(x)
        return F.mse_loss(self.b(hidden.float()), y)

    for on in (False, True):
        graph = trace(net(forward).float(), {**{k: v.float() for k, v in inputs().items()}, "on": on}).global_graph
        linears = [n for n in graph.nodes() if str(n.target) == "aten.linear.default"]
        assert [graph.tensor(n.name).dtype for n in linears] == ["bfloat16" if on else "float32", "float32"]


def test_attention_with_a_learned_mask_is_written_out() -> None:
    """No kernel gives a gradient of the mask: torch writes it out, so that is priced, too."""

    def build(self: Any) -> None:
        self.bias = nn.Parameter(torch.zeros(1, 2, 3, 3, dtype=torch.float64))

    def forward(self: Any, x: Tensor, y: Tensor, learned: bool) -> Tensor:
        heads = self.a(x).view(x.size(0), 3, 2, 2).transpose(1, 2)
        bias = self.bias if learned else torch.zeros(3, 3, dtype=x.dtype)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias)
        return F.mse_loss(mixed.transpose(1, 2).flatten(1), y)

    learned = trace(net(forward, build), {**inputs(), "learned": True}).global_graph
    fixed = trace(net(forward, build), {**inputs(), "learned": False}).global_graph
    assert "aten.scaled_dot_product_attention.default" not in targets(learned)
    assert {"aten.matmul.default", "aten._safe_softmax.default"} <= set(targets(learned))
    assert "autopar.attention.default" in targets(fixed)


@pytest.mark.parametrize("shape", [(3, 3), (2, 1, 3), (1, 3, 3), (1, 2, 3, 3)])
def test_masks_reach_the_kernels_of_attention_with_two_or_four_dims(shape: tuple[int, ...]) -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        heads = self.a(x).view(x.size(0), 3, 2, 2).transpose(1, 2)
        allowed = torch.ones(shape, dtype=torch.bool).tril()
        return F.mse_loss(F.scaled_dot_product_attention(heads, heads, heads, allowed).transpose(1, 2).flatten(1), y)

    graph = trace(net(forward), inputs()).global_graph
    (attention,) = [n for n in graph.nodes() if n.target is torch.ops.autopar.attention.default]
    assert len(graph.tensor(attention.args[3].name).shape) in (2, 4)


def test_means_of_half_types_are_summed_in_single_precision() -> None:
    model = Net().to(torch.bfloat16)
    batch = {k: v.to(torch.bfloat16) for k, v in inputs().items()}
    graph = trace(model, batch).global_graph
    (total,) = [n for n in graph.nodes() if str(n.target) == "aten.sum.default"]
    assert graph.tensor(total.name).dtype == "float32" and graph.tensor(graph.outputs[0]).dtype == "bfloat16"


BIG = """
import re, sys, time
from pathlib import Path
import torch
from gpt import GPT, GPTConfig
from passes.trace import trace

with torch.device("meta"):
    model = GPT(GPTConfig(vocab_size=50304, block_size=2048, n_layer=32, n_head=32, n_embd=4096))
    tokens = torch.empty(64, 2048, dtype=torch.long)
assert sum(p.numel() for p in model.parameters()) > 6.5e9
start = time.process_time()
traced = trace(model, {"idx": tokens, "targets": tokens})
seconds = time.process_time() - start
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())  # getrusage's counts the parent's too
print(len(traced.global_graph.nodes()), seconds, peak[1])
"""


def test_seven_billion_parameters_on_the_meta_device() -> None:
    """Seconds and megabytes: nothing is allocated."""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]
    code = f"import sys; sys.path[:0] = {paths!r}\n{BIG}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    calls, seconds, resident_kib = done.stdout.split()
    assert int(calls) > 500
    assert float(seconds) < 30
    assert int(resident_kib) < 2 * 2**20
