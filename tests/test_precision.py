"""Mixed precision: casts stand in the graph, and what they say is trained, priced and held."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_reference import OneDevice
from models import example_gpt, hf_gpt2
from parity import ADAMW, SGD, cpu_cluster, largest_error
from regression import BATCH, Regression, estimate
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)

import autopar
from autopar import Parallelism, Precision
from cost_model.errors import ConfigError, PlanMismatchError, UnsupportedError
from cost_model.ops.table import OPS, OpCall, price_of
from cost_model.precision import DTYPES
from cost_model.tensor import TensorMeta
from passes.precision import COMPUTE, WIDE, cast
from passes.segment import segment
from passes.trace import trace


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def lines(precision: Precision) -> list[str]:
    """The cast graph of the regression, one call a line: what it takes and the dtype it gives."""
    model = cast(trace(Regression(), BATCH), precision).global_graph
    names = {n: str(n.target).split(".")[1] for n in model.nodes()}
    return [f"{names[n]}({', '.join(map(str, n.all_input_nodes))}) {model.tensor(n.name).dtype}" for n in model.nodes()]


# --- The pass


def test_products_in_half_sums_in_float() -> None:
    assert lines(Precision()) == [
        "linear(x, p_model_up_weight, p_model_up_bias) float32",
        "relu(linear) float32",
        "linear(relu, p_model_down_weight, p_model_down_bias) float32",
        "sub(linear_1, y) float32",
        "mul(sub) float32",
        "sum(mul) float32",
        "mul(sum_default) float32",
    ]
    assert lines(Precision(compute="bf16")) == [
        "to(p_model_up_weight) bfloat16",
        "to(p_model_up_bias) bfloat16",
        "to(x) bfloat16",
        "linear(to_dtype_2, to_dtype, to_dtype_1) bfloat16",
        "relu(linear) bfloat16",
        "to(p_model_down_weight) bfloat16",
        "to(p_model_down_bias) bfloat16",
        "linear(relu, to_dtype_3, to_dtype_4) bfloat16",
        "to(linear_1) float32",
        "sub(to_dtype_5, y) float32",
        "mul(sub) float32",
        "sum(mul) float32",
        "mul(sum_default) float32",
    ]


def test_every_priced_op_has_a_class() -> None:
    """What the op table prices as a product or as attention is computed in half, norms, softmax and losses are not."""
    half, x = TensorMeta((4, 4), "bfloat16"), TensorMeta((4, 4, 4), "bfloat16")
    for name, entry in OPS.items():
        kinds = set()
        for inputs in ((half, half), (x, x, x), (x,)):
            try:
                cost = price_of(OpCall(name, inputs, (inputs[0],), {}))
            except (AssertionError, IndexError, KeyError, TypeError, ValueError, AttributeError, StopIteration):
                continue
            kinds |= set() if cost is None else {cost.kind}
        planned = entry.factors.__name__ != "backward_only"
        base = name.split(".")[1]
        if planned and kinds & {"softmax", "norm", "loss"}:
            assert base in WIDE or base == "one_hot", (name, kinds)
        if planned and kinds & {"matmul", "attention"}:
            assert base in COMPUTE, (name, kinds)


@pytest.mark.parametrize("precision", [Precision(params="bf16"), slow(Precision(compute="bf16"))], ids=str)
def test_equal_blocks_stay_equal(precision: Precision) -> None:
    model, batch = hf_gpt2("sdpa", layers=4)
    plain, found = (segment(cast(trace(model, batch), p).global_graph) for p in (Precision(), precision))
    assert [part.label for part in found] == [part.label for part in plain]
    assert len({part.kind for part in found}) == len({part.kind for part in plain})
    assert all(not part.carried for part in found)


def test_a_mask_never_becomes_infinite() -> None:
    """fp32's lowest number is minus infinity in fp16, and a row of nothing else NaN."""
    q = torch.randn(8, 1, 4, 8)
    mask = torch.full((8, 1, 4, 4), torch.finfo(torch.float32).min)

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(8))

        def forward(self, q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = q * self.scale
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, mask).square().mean()

    precision, batch = Precision(compute="fp16"), {"q": q, "mask": mask}
    assert math.isfinite(OneDevice(Attention(), batch, precision, SGD).step(batch))


# --- It trains as one device does

MEGATRON = Precision(params="bf16", grads="fp32", master="fp32")
PRECISIONS = [
    MEGATRON,
    Precision(compute="bf16"),
    Precision(params="bf16"),
    Precision(params="bf16", master="fp32"),
    Precision(params="bf16", grads="fp32", reduce="bf16", master="fp32"),
    Precision(compute="bf16", reduce="bf16"),
]
PLANS: list[dict[str, Any]] = [
    {"tp": 2},
    {"dp": 2, "zero": 1},
    {"dp": 2, "pp": 2, "zero": 3},
    {"dp": 2, "zero": 0, "microbatch_size": 2},
    {"pp": 2, "microbatch_size": 2},
    {"dp": 2, "zero": 2, "microbatch_size": 2},
    {"dp": 2, "zero": 3, "recompute": "selective"},
    {"dp": 2, "tp": 2, "zero": 1},
]
QUICK = 3
TOLERANCE = 0.012
"""Three roundings of bf16's significand (2**-8), the sums in another order."""


def compiled(precision: Precision, optimizer: Any = SGD, **pins: Any) -> autopar.Executable:
    model, batch = example_gpt(tied=True)
    devices = math.prod(pins.get(name, 1) for name in ("dp", "tp", "pp"))
    parallelism = Parallelism(**{"dp": 1, "tp": 1, "pp": 1, **pins})
    cluster = cpu_cluster(devices)
    return autopar.compile(model, cluster, batch, optimizer=optimizer, precision=precision, parallelism=parallelism)


def check(precision: Precision, **pins: Any) -> None:
    model, batch = example_gpt(tied=True)
    one = OneDevice(model, batch, precision, SGD)
    losses = [one.step(batch) for _ in range(3)]
    with compiled(precision, **pins) as exe:
        found = [exe.step(batch) for _ in range(3)]
        state = exe.full_state_dict()
    assert found == pytest.approx(losses, rel=2e-4)
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert largest_error({n: state[n] for n in one.state()}, one.state()) < TOLERANCE


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("pins", [*PLANS[:QUICK], *(slow(pins) for pins in PLANS[QUICK:])], ids=str)
def test_half_with_master_copies_equals_one_device(pins: dict[str, Any]) -> None:
    check(MEGATRON, **pins)


@pytest.mark.slow
@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("pins", PLANS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS[1:], ids=str)
def test_every_precision_equals_one_device(precision: Precision, pins: dict[str, Any]) -> None:
    check(precision, **pins)


@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize("pins", [{"dp": 2, "zero": 1}, slow({"tp": 2})], ids=str)
def test_real_ranks_equal_one_device(pins: dict[str, Any]) -> None:
    check(Precision(params="bf16", grads="fp32", reduce="bf16", master="fp32"), **pins)


def test_close_to_autocast() -> None:
    """torch.autocast on a CPU keeps fewer ops in float32 than on CUDA, whose lists are ours."""
    model, batch = example_gpt(tied=True)
    one = OneDevice(model, batch, Precision(compute="bf16"), SGD)
    update = SGD(model.parameters())
    for _ in range(3):
        update.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch)
        loss.backward()
        update.step()
        assert one.step(batch) == pytest.approx(float(loss.detach()), rel=2e-3)
    assert largest_error(one.state(), dict(model.named_parameters())) < TOLERANCE


@pytest.mark.usefixtures("thread_ranks")
def test_a_master_copy_keeps_what_half_rounds_away() -> None:
    """Twenty updates, each far below the spacing of bf16 around the weights of a norm."""
    _, batch = example_gpt(tied=True)
    small = functools.partial(torch.optim.SGD, lr=1e-3)
    name = "norm.weight"
    moved = {}
    for precision in (MEGATRON, Precision(params="bf16"), Precision(compute="bf16")):
        with compiled(precision, small, dp=2, zero=1) as exe:
            before = exe.full_state_dict()[name]
            for _ in range(20):
                exe.step(batch)
            moved[precision] = exe.full_state_dict()[name] - before
    assert not moved[Precision(params="bf16")].any()
    exact = moved[Precision(compute="bf16")]
    assert exact.any() and largest_error({name: moved[MEGATRON]}, {name: exact}) < 0.1


class Predictor(Regression):
    """Gives its outputs where there is nothing to compare them with."""

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        outputs = self.outputs(x)
        return outputs if y is None else (outputs - y).square().mean()


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_inference_has_the_precision_of_training(dtype: str) -> None:
    """A scaled loss is told as it is, and outputs are not scaled at all."""
    model, precision = Predictor(), Precision.mixed(dtype)
    pins = Parallelism(dp=2, tp=1, pp=1, zero=1)
    with autopar.compile(model, cpu_cluster(2), BATCH, optimizer=SGD, precision=precision, parallelism=pins) as exe:
        exe.step(BATCH)
        found, loss = exe.forward({"x": BATCH["x"]}), exe.eval_step(BATCH)
        model.load_state_dict(exe.full_state_dict())
    assert loss == pytest.approx(float(model(**BATCH).detach()), rel=1e-2)
    assert found.dtype == getattr(torch, DTYPES[dtype])
    assert torch.allclose(found.float(), model(BATCH["x"]), atol=4e-3)


# --- What is priced and held


def test_collectives_and_state_have_the_dtypes_asked_for() -> None:
    precision = Precision(params="bf16", grads="fp32", reduce="bf16", master="fp32")
    with compiled(precision, ADAMW, dp=2, zero=1) as exe:
        (stage,) = exe.planned.linked.program.stages
        (bucket,) = stage.buckets
        memory = exe.estimate.stages[0].memory
    scatter, gather = stage.step.collectives[0], stage.step.gathers[0]
    assert (scatter.kind, scatter.nbytes) == ("reduce_scatter", 2 * bucket.numel)
    assert (gather.kind, gather.nbytes) == ("all_gather", 2 * bucket.numel)
    assert (memory.parameters, memory.gradients, memory.master) == tuple(bucket.numel * n for n in (2, 4, 2))
    assert memory.optimizer_state == pytest.approx(2 * memory.master, rel=0.01)
    assert memory.total_bytes == exe.estimate.stages[0].peak_bytes
    with compiled(precision, None, dp=2, zero=2) as exe:
        assert exe.estimate.stages[0].memory.master == 0


@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize(
    ("precision", "pins"),
    [
        (MEGATRON, {"dp": 2, "zero": 1}),
        slow(MEGATRON, {"dp": 2, "zero": 0}),
        slow(MEGATRON, {"dp": 2, "zero": 2}),
        slow(MEGATRON, {"dp": 2, "zero": 3}),
        slow(MEGATRON, {"tp": 2}),
        slow(MEGATRON, {"pp": 2, "microbatch_size": 2}),
        slow(Precision(compute="bf16", reduce="bf16"), {"dp": 2, "zero": 0}),
        slow(Precision(params="bf16", master="fp32"), {"dp": 2, "zero": 1}),
    ],
    ids=str,
)
def test_memory_is_what_is_estimated(precision: Precision, pins: dict[str, Any]) -> None:
    _, batch = example_gpt(tied=True)
    with compiled(precision, ADAMW, **pins) as exe:
        found = autopar.compare(exe, batch, 1, warmup=1)
    assert 0 <= found.peak_memory_error <= 0.10, found.peak_memory_error


# --- Checkpoints


@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize(
    ("written", "read"),
    [
        ((MEGATRON, {"dp": 2, "zero": 1}), (Precision(), {"pp": 2})),
        slow((MEGATRON, {"dp": 2, "zero": 3}), (MEGATRON, {"tp": 2})),
        slow((Precision(), {"dp": 2, "zero": 0}), (MEGATRON, {"dp": 2, "zero": 2})),
        slow((Precision(params="bf16"), {"dp": 2, "zero": 0}), (MEGATRON, {"tp": 2})),
        slow((MEGATRON, {"tp": 2}), (Precision(params="bf16"), {"dp": 2, "zero": 1})),
    ],
    ids=str,
)
def test_a_checkpoint_of_one_precision_loads_under_another(written: Any, read: Any, tmp_path: Path) -> None:
    _, batch = example_gpt(tied=True)
    with compiled(written[0], ADAMW, **written[1]) as exe:
        exe.step(batch)
        exe.save(tmp_path)
        saved = exe.full_state_dict()
        expected = exe.step(batch)
    with compiled(read[0], ADAMW, **read[1]) as exe:
        exe.load(tmp_path)
        found = exe.full_state_dict()
        losses = [exe.step(batch) for _ in range(2)]
    keeps = read[0] != Precision(params="bf16")
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor if keeps else tensor.bfloat16().float()), name
    assert losses[0] == pytest.approx(expected, rel=2e-3) and losses[1] < losses[0]


# --- What is asked wrongly


def test_a_device_without_the_dtype() -> None:
    cluster = autopar.Cluster.load("p3.2xlarge", num_devices=1)
    message = r"v100.* has no bfloat16 arithmetic: .*\.toml has no key peak.bfloat16, but .*float16.* Next: choose"
    with pytest.raises(UnsupportedError, match=message):
        estimate(Regression(), cluster=cluster, precision=Precision(compute="bf16"))


def test_a_precision_that_is_none() -> None:
    with pytest.raises(ConfigError, match="precision compute must be 'fp32', 'bf16', 'fp16' or None, not 'half'"):
        Precision(compute="half")
    with pytest.raises(ConfigError, match="precision must be an autopar.Precision, not str"):
        estimate(Regression(), precision="bf16")


def test_a_plan_keeps_its_precision() -> None:
    half = Precision(compute="bf16")
    plan = estimate(Regression(), tp=2, precision=half).plan
    again = autopar.Plan.from_json(plan.to_json())
    assert again == plan and again.precision == half and "precision compute=bf16" in str(plan)
    assert estimate(Regression(), plan=plan).plan == plan == estimate(Regression(), plan=plan, precision=half).plan
    with pytest.raises(PlanMismatchError, match="plan's precision is 'compute=bf16' but here it is 'compute=fp16'"):
        estimate(Regression(), plan=plan, precision=Precision(compute="fp16"))
    raw = json.loads(plan.to_json())
    with pytest.raises(ConfigError, match="the plan's precision has the unknown field 'half'"):
        autopar.Plan.from_json(json.dumps({**raw, "precision": {**raw["precision"], "half": "bf16"}}))


def test_a_plan_of_the_version_before_has_the_models_own_precision() -> None:
    plan = estimate(Regression(), tp=2).plan
    raw = json.loads(plan.to_json())
    del raw["precision"]
    assert autopar.Plan.from_json(json.dumps({**raw, "version": 2})) == plan


def test_the_command_line_asks_for_it() -> None:
    assert Precision.parse("bf16") == MEGATRON and Precision.parse("fp32") == Precision()
    assert Precision.parse("params=bf16,reduce=bf16") == Precision(params="bf16", reduce="bf16")
    for text in ("half", "params=bf16,colour=red", "params"):
        with pytest.raises(ConfigError, match=f"precision '{text}': .* is not understood; give bf16, fp16, fp32"):
            Precision.parse(text)
    with pytest.raises(ConfigError, match="precision params must be .* not 'half'"):
        Precision.parse("params=half")
