"""Kernels compiled from neighbouring ops: what is grouped, what it costs, and that programs still do the same."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import example_gpt
from parity import ADAMW, SGD, cpu_cluster, largest_error, reference
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn, ops

import autopar
from autopar import Parallelism, Precision
from autopar.kernel_calls import with_kernel_calls
from autopar.options import Options
from autopar.runtime import compiled
from cost_model.device import Device
from cost_model.errors import MissingCompilerError, UnknownNameError
from cost_model.program import Instruction, OpCost
from passes.codegen import new_names, render_kernel
from passes.group import Kernels, group
from passes.storage import mark_storages

aten = ops.aten


# --- What is grouped


def traced(function: Any, *inputs: Tensor) -> torch.fx.Graph:
    """The calls of a function of ATen ops."""
    graph = torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(*inputs).graph
    mark_storages(graph)
    return graph


def lines(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_what_lies_between_products_becomes_a_kernel() -> None:
    def before(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        active = torch.tanh(total * 2.0)
        product = active @ w
        return product, torch.sigmoid(product).sum(0)

    graph = traced(before, torch.ones(4, 8), torch.ones(4, 8), torch.ones(8, 8))
    kernels = Kernels()
    group(graph, frozenset(), kernels, lambda cost: True)
    graph.lint()
    calls = [line for line in lines(graph) if "getitem" not in line]
    assert calls == ["fused_add_mul_tanh", "aten.mm.default", "fused_sigmoid_sum"]
    first, second = kernels.known.values()
    names = new_names()
    assert render_kernel(first, names) == (
        "def fused_add_mul_tanh(x0, x1):\n"
        '    """Compiled into one kernel."""\n'
        "    add_tensor = op_add_Tensor(x0, x1)\n"
        "    mul_tensor = op_mul_Tensor(add_tensor, 2.0)\n"
        "    tanh_default = op_tanh(mul_tensor)\n"
        "    return (tanh_default,)"
    )
    assert (first.cost.nbytes, first.workspace_bytes, len(first.cost.parts)) == (3 * 128, 0, 3)
    assert second.workspace_bytes == 128  # the sum reads down the columns what sigmoid makes in rows


def test_a_sum_joins_what_made_its_operand_and_single_ops_stay() -> None:
    def before(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        active = torch.tanh(x)
        product = active @ w
        return product, active.view(2, 16).sum(0), torch.exp(product)

    graph = traced(before, torch.ones(4, 8), torch.ones(8, 8))
    inputs = (torch.randn(4, 8), torch.randn(8, 8))
    kernels = Kernels()
    group(graph, frozenset(), kernels, lambda cost: True)
    graph.lint()
    assert [line for line in lines(graph) if line.startswith(("fused", "aten"))] == [
        "fused_tanh_sum",
        "aten.mm.default",
        "aten.exp.default",
    ]
    assert all(map(torch.equal, run(graph, kernels, *inputs), before(*inputs)))


def run(graph: torch.fx.Graph, kernels: Kernels, *inputs: Tensor) -> tuple[Tensor, ...]:
    """A graph with its kernels run as they are printed."""
    namespace: dict[str, Any] = {}
    names = new_names()
    for kernel in kernels.known.values():
        exec(render_kernel(kernel, names), namespace)
    namespace.update({short: eval(full, {"torch": torch}) for short, full in names.used.items()})
    for node in graph.nodes:
        if str(node.target) in namespace:
            node.target = namespace[str(node.target)]
    return tuple(torch.fx.Interpreter(nn.Module(), graph=graph).run(*inputs))


def test_nothing_is_grouped_that_is_not_worth_it() -> None:
    graph = traced(lambda x: torch.tanh(x + 1) * 2, torch.ones(4, 8))
    before = lines(graph)
    asked: list[OpCost] = []
    group(graph, frozenset(), Kernels(), lambda cost: bool(asked.append(cost)))
    assert lines(graph) == before
    assert [part.kind for part in asked[0].parts] == ["elementwise", "transcendental", "elementwise"]


# --- What it costs


def test_a_kernel_moves_its_own_bytes_once_and_is_called_once() -> None:
    device = dataclasses.replace(Device.load("cpu"), kernel_overhead_s=7e-6)
    add = OpCost("elementwise", 1.0, 3 * 2**20, "float32")
    kernel = OpCost("fused", 2.0, 4 * 2**20, "float32", parts=(add, add))
    moving_s = device.op_time_s(dataclasses.replace(add, nbytes=4 * 2**20)) - device.op_overhead_s
    assert device.op_time_s(kernel) == pytest.approx(7e-6 + moving_s)
    exp = OpCost("transcendental", 8.0, 2 * 2**20, "float32")
    beyond_s = device.op_time_s(exp) - device.op_time_s(dataclasses.replace(add, nbytes=exp.nbytes))
    both = dataclasses.replace(kernel, parts=(add, exp))
    assert device.op_time_s(both) == pytest.approx(7e-6 + moving_s + max(0.0, beyond_s))


def kernels_of(found: autopar.Executable) -> list[Instruction]:
    stages = found.planned.linked.program.stages
    blocks = [block for stage in stages for chunk in stage.chunks for block in chunk.blocks]
    return [i for block in blocks for i in block.instructions if i.cost is not None and i.cost.parts]


def test_the_estimate_knows_of_kernels() -> None:
    model, batch = example_gpt()
    pins = Parallelism(dp=1, tp=1, pp=1)
    plain, fused = (
        autopar.estimate(model, cpu_cluster(1), batch, parallelism=pins, backend=b) for b in ("eager", "inductor")
    )
    assert fused.step_time_s < plain.step_time_s and fused.peak_bytes <= plain.peak_bytes
    assert any(re.fullmatch(r"\d+ ops run as \d+ compiled kernels; .*", note) for note in fused.notes)
    with pytest.raises(UnknownNameError, match="'inductor'"):
        autopar.estimate(model, cpu_cluster(1), batch, backend="inducter")


def test_a_missing_compiler_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    model, batch = example_gpt()
    with autopar.compile(model, cpu_cluster(2), batch, optimizer=SGD, backend="inductor") as exe:
        with pytest.raises(MissingCompilerError, match="no-such-compiler, which is not there: install it"):
            exe.step(batch)


# --- What it computes

PLANS = [
    Parallelism(dp=2, tp=1, pp=1, zero=3, recompute="full"),
    Parallelism(dp=1, tp=2, pp=1, recompute="selective"),
    Parallelism(dp=1, tp=1, pp=2, schedule="zero_bubble", microbatch_size=2),
    Parallelism(dp=2, tp=1, pp=2, virtual_stages=2, microbatch_size=1, zero=2),
]
OVERLAPPED = [
    Parallelism(dp=2, tp=1, pp=1, zero=3, recompute="selective", overlap=True),
    Parallelism(dp=1, tp=2, pp=1, overlap=True),
    Parallelism(dp=2, tp=1, pp=2, schedule="1f1b", microbatch_size=1, zero=1, overlap=True),
]


def _name(plan: Parallelism) -> str:
    return " ".join(f"{name}={value}" for name, value in vars(plan).items() if value not in (None, 1))


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    "plan", [*PLANS[:2], *OVERLAPPED, *(pytest.param(p, marks=pytest.mark.slow) for p in PLANS[2:])], ids=_name
)
def test_programs_with_kernels_train_what_one_device_trains(plan: Parallelism, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run as printed, not compiled."""
    monkeypatch.setattr(compiled, "compiled", lambda function: function)
    model, batch = example_gpt(torch.float64, n_layer=4 if plan.virtual_stages else 2)
    size = (plan.dp or 1) * (plan.tp or 1) * (plan.pp or 1)
    with autopar.compile(model, cpu_cluster(size), batch, optimizer=ADAMW, parallelism=plan, backend="inductor") as exe:
        losses = [exe.step(batch) for _ in range(3)]
        assert len(kernels_of(exe)) > 10 and exe.plan.overlap is bool(plan.overlap)
        expected, trained = reference(model, batch, ADAMW)
        assert losses == pytest.approx(expected, rel=1e-9)
        assert largest_error(exe.full_state_dict(), trained.state_dict()) < 1e-8
        assert exe.eval_step(batch) < losses[-1]


class Gated(nn.Module):
    """One gated layer: one kernel forward, one backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate, self.down = nn.Linear(64, 256), nn.Linear(64, 256), nn.Linear(256, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(self.up(x) * torch.tanh(self.gate(x)))
        return made.square().mean()


@pytest.mark.usefixtures("shared_ranks")
def test_compiled_kernels_on_a_real_rank() -> None:
    model, batch = Gated(), {"x": torch.randn(64, 64, generator=torch.Generator().manual_seed(1))}
    with autopar.compile(model, cpu_cluster(1), batch, optimizer=SGD, backend="inductor") as exe:
        losses = [exe.step(batch) for _ in range(3)]
        assert losses == pytest.approx(reference(model, batch, SGD)[0], rel=1e-5)
        found = autopar.compare(exe, batch, steps=1)
        assert 0 <= found.peak_memory_error < 0.05
        assert found.kinds_s["fused"].measured > 0


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize("precision", [None, Precision.parse("bf16")], ids=["fp32", "bf16"])
@pytest.mark.parametrize("plan", PLANS[:3], ids=_name)
def test_compiled_plans_on_real_ranks(plan: Parallelism, precision: Precision | None) -> None:
    model, batch = example_gpt(n_layer=2, n_embd=64)
    keywords: dict[str, Any] = {"optimizer": SGD, "parallelism": plan, "precision": precision}
    found = {}
    for backend in ("eager", "inductor"):
        with autopar.compile(model, cpu_cluster(2), batch, backend=backend, **keywords) as exe:
            losses = [exe.step(batch) for _ in range(3)]
            found[backend] = losses, autopar.compare(exe, batch, steps=1)
    tolerance = 1e-5 if precision is None else 2e-2
    assert found["inductor"][0] == pytest.approx(found["eager"][0], rel=tolerance)
    assert 0 <= found["inductor"][1].peak_memory_error < 0.05


@pytest.mark.slow
def test_calling_a_kernel_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_CACHE_DIR", str(tmp_path))
    device = dataclasses.replace(cpu_cluster(2).devices[0], sources={"device": "measured"})
    here = dataclasses.replace(cpu_cluster(2), devices=(device, device))
    compiles, eager = (Options.of_keywords({"backend": backend}) for backend in ("inductor", "eager"))
    (first, second), again = (with_kernel_calls(here, compiles).devices for _ in range(2))
    assert first == second == again[0] and 1e-6 < first.kernel_overhead_s < 1e-3
    assert with_kernel_calls(cpu_cluster(2), compiles) == cpu_cluster(2)
    assert with_kernel_calls(here, eager) == here
