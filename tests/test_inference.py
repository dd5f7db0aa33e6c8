"""Outputs and other modes: what a model returns on ranks is what it returns on one device."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import SGD, cpu_cluster
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import autopar
from cost_model.errors import BatchError
from cost_model.placement import Shard

on_threads = pytest.mark.usefixtures("thread_ranks")


class Named(NamedTuple):
    """One of the nested outputs."""

    hidden: Tensor
    flag: bool


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.drop = nn.BatchNorm1d(width), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.relu(self.up(self.norm(x)))))


class Nested(nn.Module):
    """Outputs of every kind: floating and whole numbers, of samples and of none, in tuples, lists and dicts."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 5)
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Any]:
        first = self.blocks[0](x)
        logits = self.head(self.blocks[1](first))
        loss = None if y is None else F.cross_entropy(logits, y)
        return {
            "loss": loss,
            "pair": (logits, [logits.argmax(-1), x > 0]),
            "turned": logits.t(),
            "weights": [self.blocks[0].up.weight, logits @ self.head.weight @ self.blocks[0].up.weight.t()],
            "named": Named(first[:, :3], True),
            "fixed": self.table * 2,
            "name": "nested",
            "samples": len(x),
        }


def nested() -> tuple[Nested, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Nested(), {"x": torch.randn(8, 128), "y": torch.randint(5, (8,))}


def compiled(model: nn.Module, batch: Any, devices: int, **pins: Any) -> autopar.Executable:
    parallelism = autopar.Parallelism(**{"dp": 1, "tp": 1, "pp": 1, **pins})
    return autopar.compile(model, cpu_cluster(devices), batch, optimizer=SGD, parallelism=parallelism)


def assert_alike(found: Any, expected: Any) -> None:
    leaves, spec = torch.utils._pytree.tree_flatten(found)
    wanted, same = torch.utils._pytree.tree_flatten(expected)
    assert spec == same
    for a, b in zip(leaves, wanted, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)
        else:
            assert a == b


def on_one_device(exe: autopar.Executable, model: nn.Module, *, training: bool) -> nn.Module:
    """The model with what has been trained."""
    trained = copy.deepcopy(model)
    trained.load_state_dict(exe.full_state_dict())
    return trained.train(training)


PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp": (2, {"dp": 2}),
    "zero": (2, {"dp": 2, "zero": 3}),
    "tp": (2, {"tp": 2}),
    "pp": (2, {"pp": 2}),
}


@on_threads
@pytest.mark.parametrize(
    "plan", ["tp", "pp", *(pytest.param(p, marks=pytest.mark.slow) for p in ("one", "dp", "zero"))]
)
def test_outputs_in_eval_mode_are_those_of_one_device_before_and_after_training(plan: str) -> None:
    """Of the whole batch and of another one, without labels."""
    devices, pins = PLANS[plan]
    model, batch = nested()
    with compiled(model, batch, devices, **pins) as exe:
        exe.eval()
        for _ in range(2):
            plain = on_one_device(exe, model, training=False)
            assert_alike(exe.forward(batch), plain(**batch))
            assert exe.eval_step(batch) == pytest.approx(float(plain(**batch)["loss"].detach()), rel=1e-5)
            exe.step(batch)
        plain = on_one_device(exe, model, training=False)
        assert_alike(exe.forward({"x": batch["x"][:4]}), plain(batch["x"][:4]))
        if plan == "tp":
            places = [p for stage in exe.planned.linked.stages for p in stage.places.values()]
            assert any(isinstance(place, Shard) for (place,) in places)


class Positioned(nn.Module):
    """Blocks behind a table of positions, which tensor parallelism splits along the sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions = nn.Parameter(torch.randn(6, 12))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 12)) for _ in range(3)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.positions
        for block in self.blocks:
            x = x + block(x)
        return F.mse_loss(x, y)


@on_threads
def test_in_eval_mode_what_crosses_stages_of_several_shards_is_whole() -> None:
    model, batch = Positioned(), {"x": torch.randn(8, 6, 12), "y": torch.randn(8, 6, 12)}
    pins, shape = autopar.Parallelism(dp=1, tp=2, pp=2), (4, 4)
    free = {"latency_s": np.full(shape, 1e-12), "bandwidth_bytes_per_s": np.full(shape, 1e15)}
    cluster = autopar.Cluster.from_matrix(device="cpu", **free)
    with autopar.compile(model, cluster, batch, optimizer=SGD, parallelism=pins) as exe:
        exe.eval()
        assert exe.eval_step(batch) == pytest.approx(float(model.eval()(**batch).detach()), rel=1e-5)


@on_threads
def test_transformers_outputs_and_the_model_stays_in_its_mode() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=32, n_positions=8, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    model, ids = GPT2LMHeadModel(config).train(), torch.randint(32, (8, 8))
    batch = {"input_ids": ids, "labels": ids}
    model.transformer.drop.eval()
    with compiled(model, batch, 2, tp=2, microbatch_size=4) as exe:
        found = exe.eval().forward(batch)
        assert model.training and not model.transformer.drop.training
        expected = on_one_device(exe, model, training=False)(**batch)
        assert type(found) is type(expected)
        assert_alike(found, expected)


@on_threads
def test_in_train_mode_forward_drops_anew_and_leaves_running_statistics() -> None:
    model, batch = nested()
    with compiled(model, batch, 2, dp=2) as exe:
        before = exe.full_state_dict()
        first, second = (exe.forward(batch)["pair"][0] for _ in range(2))
        assert not torch.equal(first, second)
        after = exe.full_state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert exe.eval().forward(batch)["pair"][0].equal(exe.forward(batch)["pair"][0])
        assert not exe.train().forward(batch)["pair"][0].equal(first)


@on_threads
def test_a_model_compiled_for_evaluation_can_be_asked_with_dropout() -> None:
    model, batch = nested()
    with compiled(model.eval(), batch, 1) as exe:
        plain = exe.eval_step(batch)
        assert exe.train().eval_step(batch) != plain
        assert exe.eval().eval_step(batch) == plain


class Centred(nn.Module):
    """An output made of all samples: of what came in, or of what parameters made of it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.linear, self.number = nn.Linear(4, 4), number

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.linear(x)
        return made, (x, made)[self.number].sort(0).values


def _squares(outputs: Any, _: Any) -> Tensor:
    loss: Tensor = outputs[0].square().mean()
    return loss


@on_threads
def test_outputs_of_the_whole_batch_are_those_of_one_device() -> None:
    torch.manual_seed(0)
    batch = (torch.randn(8, 4),)
    for number in (0, 1):
        model = Centred(number)
        pins = autopar.Parallelism(dp=2, tp=1, pp=1)
        with autopar.compile(model, cpu_cluster(2), batch, loss_fn=_squares, parallelism=pins) as exe:
            assert_alike(exe.forward(batch), model(*batch))


@on_threads
def test_a_batch_that_does_not_divide_is_refused() -> None:
    model, batch = nested()
    with compiled(model, batch, 2, dp=2) as exe, pytest.raises(BatchError, match="2 replicas"):
        exe.forward({"x": batch["x"][:3]})


@pytest.mark.slow
def test_outputs_of_real_ranks() -> None:
    model, batch = nested()
    for pins in ({"dp": 2, "zero": 3}, {"tp": 2}, {"pp": 2}):
        with compiled(model, batch, 2, **pins) as exe:
            exe.eval()
            exe.step(batch)
            plain = on_one_device(exe, model, training=False)
            assert_alike(exe.forward(batch), plain(**batch))
            assert exe.eval_step(batch) == pytest.approx(float(plain(**batch)["loss"].detach()), rel=1e-5)


@on_threads
def test_outputs_of_a_model_computed_in_half_precision() -> None:
    """With dropout beside it: parameters are stored, and ops computed, as in training."""
    model, batch = nested()
    pins = autopar.Parallelism(dp=2, tp=1, pp=1, zero=3)
    precision = autopar.Precision(params="bf16", compute="bf16", master="fp32")
    with autopar.compile(model, cpu_cluster(2), batch, optimizer=SGD, parallelism=pins, precision=precision) as exe:
        assert exe.step(batch) == pytest.approx(1.5, abs=1)
        found = exe.eval().forward(batch)["pair"][0]
        plain = on_one_device(exe, model, training=False)(**batch)["pair"][0]
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), plain.detach(), rtol=0.1, atol=0.05)


class Counting(nn.Module):
    """More tokens than float32 has numbers for, and how many of the batch the model finds to be of a kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.body, self.head = (nn.Linear(6, 6) for _ in range(3))
        self.register_buffer("before", torch.tensor(2**24 + 1))
        self.register_buffer("found", torch.tensor(0))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(self.first(x).tanh()).tanh())
        of_kind = (logits.argmax(-1) < 3).sum()
        if self.training:
            self.found += of_kind
        return {"loss": F.cross_entropy(logits, y), "all": self.before + of_kind, "found": self.found.clone()}


@on_threads
@pytest.mark.parametrize("pins", [{"dp": 2, "pp": 1}, {"dp": 1, "pp": 2}], ids=str)
def test_counts_of_samples_are_whole_numbers(pins: dict[str, int]) -> None:
    model, batch = Counting(), {"x": torch.randn(8, 6), "y": torch.randint(6, (8,))}
    parallelism = autopar.Parallelism(tp=1, **pins)
    with autopar.compile(model, cpu_cluster(2), batch, optimizer=SGD, parallelism=parallelism) as exe:
        exe.step(batch)
        model.load_state_dict(exe.full_state_dict())
        found, expected = exe.forward(batch), model(**batch)
    for name in ("all", "found"):
        assert found[name].dtype == torch.int64 and torch.equal(found[name], expected[name])
    assert expected["all"] > 2**24 and expected["found"] > 0
