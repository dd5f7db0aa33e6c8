"""Activations that cross a cut in half the bytes: cast in the program, sent so, priced so, and only where asked."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from parity import largest_error
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import ThreadExecutor, thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

import autopar
from autopar import Parallelism, Precision
from cost_model.errors import ConfigError, PlanMismatchError
from cost_model.tensor import TensorMeta

SGD = functools.partial(torch.optim.SGD, lr=0.1)
WIDTH, LAYERS, SAMPLES, MICROBATCH = 32, 6, 8, 4
BATCH = {"x": torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))}
HALF = Precision(wire="bf16")
BOTH = Precision(reduce="auto", wire="auto")


class Chain(nn.Module):
    """Layers of one width. rounded: before which of them the value, and its gradient, is rounded to a dtype."""

    def __init__(self, rounded: tuple[int, ...] = (), dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.rounded, self.dtype = rounded, dtype

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = x.to(self.dtype).to(x.dtype) if index in self.rounded else x
            x = x + torch.tanh(layer(x))
        return x.square().mean()


class Kinds(nn.Module):
    """Values of many dtypes that are made in the first layer and read after the last."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(LAYERS)]
        self.layers = nn.ModuleList(sizes)
        self.register_buffer("large", torch.arange(WIDTH) * (2**40 + 12345) + 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x.to(self.layers[0].weight.dtype))
        order, positive, wide = x.argsort(-1), x > 0, x.double().cumsum(-1)
        large = self.large[order]
        small, short, plain = (order * 7).to(torch.uint8), (order * 900).to(torch.int16), (large % 999_983).int()
        both = torch.complex(x.float(), x.float().flip(-1))
        for layer in self.layers[1:]:
            x = x + torch.tanh(layer(x))
        whole = (large // 2**40 + large % 2**40 % 1009).to(x.dtype) / WIDTH + small.to(x.dtype) / 255
        x = torch.where(positive, x, x / 2).gather(-1, order) * whole
        x = x.double() + wide + (short + plain % 11).double() / 30_000 + (both * both.conj()).real.double()
        return x.square().mean().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_of_every_dtype_cross_exactly(thread_ranks: None, dtype: torch.dtype) -> None:  # noqa: F811
    losses = {}
    for pp in (1, 3):
        pins = Parallelism(dp=1, tp=1, pp=pp, microbatch_size=MICROBATCH)
        with autopar.compile(Kinds(dtype), cluster(pp), BATCH, optimizer=SGD, parallelism=pins) as exe:
            losses[pp] = [exe.step(BATCH) for _ in range(3)]
    assert losses[3] == losses[1] and len(set(losses[1])) == 3


def cluster(devices: int, bytes_per_s: float = 1e9) -> autopar.Cluster:
    shape = (devices, devices)
    return autopar.Cluster.from_matrix(
        device="cpu", latency_s=np.full(shape, 2e-6), bandwidth_bytes_per_s=np.full(shape, bytes_per_s)
    )


def compiled(precision: Precision, **pins: Any) -> autopar.Executable:
    whole = {"dp": 1, "tp": 1, "pp": 1, "microbatch_size": MICROBATCH, **pins}
    devices = sum(whole["tp"]) if isinstance(whole["tp"], tuple) else whole["tp"] * whole["pp"]
    return autopar.compile(
        Chain(),
        cluster(devices * whole["dp"]),
        BATCH,
        optimizer=SGD,
        precision=precision,
        parallelism=Parallelism(**whole),
    )


def one_device(cuts: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> tuple[list[float], nn.Module]:
    """Three steps with what crosses the cuts rounded, gradients times ``scale`` when they are."""
    model = Chain(cuts, dtype)
    update, losses = SGD(model.parameters()), []
    for _ in range(3):
        update.zero_grad()
        parts = [model(x) * MICROBATCH / SAMPLES for x in BATCH["x"].split(MICROBATCH)]
        for part in parts:
            (part * scale).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= scale
        update.step()
        losses.append(sum(float(part.detach()) for part in parts))
    return losses, model


def check(precision: Precision, dtype: torch.dtype, **pins: Any) -> None:
    with compiled(precision, **pins) as exe:
        exe.planned.linked.verify()
        found, plan = [exe.step(BATCH) for _ in range(3)], exe.plan
        scale, state = exe.loss_scale if precision.scales_loss else 1.0, exe.full_state_dict()
    assert plan.precision == precision
    losses, model = one_device(tuple(stage.first_segment for stage in plan.stages[1:]), dtype, scale)
    assert found == pytest.approx(losses, rel=1e-5)
    assert largest_error(state, dict(model.state_dict())) < 1e-5
    exact, other = one_device((), dtype)
    assert found != pytest.approx(exact, rel=1e-9) and found == pytest.approx(exact, rel=1e-2)
    assert largest_error(state, dict(other.state_dict())) < 2e-2


PLANS: list[dict[str, Any]] = [
    {"pp": 2, "schedule": "gpipe"},
    {"pp": 3, "schedule": "zero_bubble", "recompute": "full"},
    {"pp": 2, "dp": 2, "schedule": "1f1b", "microbatch_size": 2, "zero": 3},
    {"pp": 2, "virtual_stages": 2},
    {"pp": 2, "tp": (1, 2)},
]


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("pins", PLANS, ids=str)
def test_numbers_are_those_of_one_device_that_rounds_where_stages_meet(pins: dict[str, Any]) -> None:
    check(HALF, torch.bfloat16, **pins)


@pytest.mark.usefixtures("thread_ranks")
def test_in_fp16_the_loss_is_scaled() -> None:
    check(Precision(wire="fp16"), torch.float16, pp=2, schedule="gpipe")


@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize("pins", [PLANS[0], pytest.param(PLANS[4], marks=pytest.mark.slow)], ids=str)
def test_real_ranks(pins: dict[str, Any]) -> None:
    check(HALF, torch.bfloat16, **pins)


@pytest.mark.usefixtures("thread_ranks")
def test_half_the_bytes_are_sent_and_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[Precision, int] = {}
    priced: dict[Precision, int] = {}
    send = ThreadExecutor._send

    for precision in (Precision(), HALF):

        def counted(self: Any, link: str, tensor: Tensor, part: Any, key: Precision = precision) -> None:
            sent[key] = sent.get(key, 0) + tensor.nbytes
            send(self, link, tensor, part)

        monkeypatch.setattr(ThreadExecutor, "_send", counted)
        with compiled(precision, pp=2, schedule="1f1b") as exe:
            exe.step(BATCH)
            chunk = exe.planned.linked.program.stages[0].chunks[0]
            assert chunk.sent is not None
            priced[precision] = 2 * (SAMPLES // MICROBATCH) * chunk.sent.nbytes
            casts = [i.cost for block in chunk.blocks for i in block.instructions if "_to_copy" in i.op]
            assert [cost is not None and cost.nbytes for cost in casts] == (
                [6 * MICROBATCH * WIDTH] * 2 if precision == HALF else []
            )
    assert sent == priced
    assert sent[HALF] * 2 == sent[Precision()] == 4 * MICROBATCH * WIDTH * 4


def estimate(precision: Precision, bytes_per_s: float, **pins: Any) -> autopar.Estimate:
    large = {"x": torch.empty(4096, WIDTH, device="meta")}
    pins = {"schedule": "gpipe", "microbatch_size": 1024, **pins}
    return autopar.estimate(
        Chain(), cluster(2, bytes_per_s), large, optimizer=SGD, precision=precision, parallelism=Parallelism(**pins)
    )


def test_a_slow_link_takes_half_as_long() -> None:
    exact, half = (estimate(p, 1e6, pp=2, dp=1, tp=1).step_time_s for p in (Precision(), HALF))
    assert 0.5 <= half / exact < 0.52


@pytest.mark.parametrize("pins", [{"pp": 2, "dp": 1, "tp": 1}, {"pp": 1, "dp": 2, "tp": 1}], ids=str)
def test_the_planner_sends_less_where_it_may_and_that_pays(pins: dict[str, Any]) -> None:
    """On a slow link both are worth their casts, on a fast one none is; without leave nothing is rounded."""
    slow_one, fast_one = (estimate(BOTH, rate, **pins) for rate in (1e6, 1e13))
    way = Precision(wire="bf16") if pins["pp"] == 2 else Precision(reduce="bf16")
    assert slow_one.plan.precision == way and fast_one.plan.precision == Precision()
    assert any("in bf16, chosen by price" in note for note in slow_one.notes)
    assert slow_one.step_time_s == estimate(way, 1e6, **pins).step_time_s
    assert estimate(Precision(), 1e6, **pins).plan.precision == Precision()


def test_a_plan_says_what_was_chosen() -> None:
    found = estimate(BOTH, 1e6, pp=2, dp=1, tp=1).plan
    assert json.loads(found.to_json())["precision"]["wire"] == "bf16"
    assert autopar.Plan.from_json(found.to_json()) == found
    older = json.loads(dataclasses.replace(found, precision=Precision()).to_json())
    del older["precision"]["wire"]
    assert autopar.Plan.from_json(json.dumps({**older, "version": 5})).precision == Precision()
    with pytest.raises(ConfigError, match="what was chosen, not precision reduce=auto"):
        dataclasses.replace(found, precision=Precision(reduce="auto"))
    again = functools.partial(autopar.estimate, Chain(), cluster(2, 1e6), {"x": torch.empty(4096, WIDTH)}, plan=found)
    assert again(optimizer=SGD).plan == again(optimizer=SGD, precision=BOTH).plan == found
    with pytest.raises(PlanMismatchError, match="precision"):
        again(optimizer=SGD, precision=Precision())


@pytest.mark.parametrize(
    ("dtype", "wire", "sent"),
    [
        ("float32", "bf16", "bfloat16"),
        ("float64", "fp32", "float32"),
        ("float32", "fp32", "float32"),
        ("float16", "bf16", "float16"),
        ("float32", None, "float32"),
        ("int64", "bf16", "int64"),
    ],
)
def test_what_is_narrow_already_is_sent_as_it_is(dtype: str, wire: str | None, sent: str) -> None:
    assert Precision(wire=wire).sent(TensorMeta((2, 3), dtype)) == TensorMeta((2, 3), sent)


@pytest.mark.parametrize(("field", "value"), [("wire", "fp8"), ("grads", "auto")])
def test_an_unknown_dtype_is_refused(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"precision {field} must be 'fp32', 'bf16', 'fp16'"):
        Precision(**{field: value})
