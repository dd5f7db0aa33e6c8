"""The price of an optimizer is what its real step allocates and computes, found without running all of it."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, RMSprop
from torch.profiler import ProfilerActivity, profile

from autopar import optimizer_price, optimizer_run
from autopar.optimizer_price import OptimizerPrice, price_optimizer
from autopar.runtime import optim
from autopar.runtime.optim import OptimizerSpec, build, capture, chosen
from cost_model.errors import UnsupportedError
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta

sys.path.append(str(Path(__file__).resolve().parent))
import user_optimizers as own
from user_optimizers import by_ndim

partial = functools.partial


def gpt(layers: int, dtype: str = "float32") -> dict[str, TensorMeta]:
    """Parameters of a small transformer in model order."""
    block = {"ln1": (32,), "qkv": (96, 32), "qkv.b": (96,), "proj": (32, 32), "proj.b": (32,), "ln2": (32,)}
    block |= {"fc": (128, 32), "fc.b": (128,), "out": (32, 128), "out.b": (32,)}
    blocks = {f"{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()}
    shapes = {"emb": (97, 32), **blocks, "ln": (32,), "head": (61, 32)}
    return {name: TensorMeta(shape, dtype) for name, shape in shapes.items()}


def spec_of(factory: Callable[[Any], torch.optim.Optimizer], metas: dict[str, TensorMeta]) -> OptimizerSpec:
    spec = capture(factory, {name: (meta.shape, getattr(torch, meta.dtype)) for name, meta in metas.items()})
    assert spec is not None
    return spec


def allocations(step: Callable[[], Any]) -> list[int]:
    """Bytes allocated (positive) and freed (negative) in order, as torch's allocator reports them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    found: list[tuple[int, int]] = []
    queue = list(profiler.profiler.kineto_results.experimental_event_tree())
    while queue:
        event = queue.pop()
        queue += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [size for _, size in sorted(found, key=lambda pair: pair[0])]


def measured(spec: OptimizerSpec, metas: dict[str, TensorMeta]) -> tuple[int, int]:
    """State and workspace bytes of real steps on real tensors, as ranks take them."""
    spec = chosen(spec, "cpu", {name: meta.dtype for name, meta in metas.items()})
    held = {name: nn.Parameter(torch.randn(m.shape).to(getattr(torch, m.dtype))) for name, m in metas.items()}
    optimizer = build(spec, held)
    assert optimizer is not None
    for parameter in held.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    alive = peak = 0
    for size in allocations(optimizer.step):
        alive += size
        peak = max(peak, alive)
    return sum(storages.values()), peak


PRICED = {
    "adamw": AdamW,
    "adamw loop": partial(AdamW, foreach=False),
    "adamw foreach": partial(AdamW, foreach=True),
    "adamw fused": partial(AdamW, fused=True),
    "adamw lr tensor": partial(AdamW, lr=torch.tensor(3e-4)),
    "adam decay": partial(Adam, weight_decay=0.1),
    "by ndim": by_ndim,
    "by ndim foreach": partial(by_ndim, foreach=True),
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "momentum foreach": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "adagrad": Adagrad,
    "rmsprop": partial(RMSprop, momentum=0.9),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factory", PRICED.values(), ids=PRICED)
def test_bytes_are_what_the_allocator_sees(factory: Any, dtype: str) -> None:
    metas = gpt(6, dtype)
    spec = spec_of(factory, metas)
    price = price_optimizer(spec, metas)
    assert (price.state_bytes, price.workspace_bytes) == measured(spec, metas)


@pytest.mark.parametrize("factory", PRICED.values(), ids=PRICED)
def test_every_op_has_an_entry_in_the_table(factory: Any) -> None:
    metas = gpt(1)
    costs = price_optimizer(spec_of(factory, metas), metas).costs
    assert costs and "other" not in {cost.kind for cost in costs}


def whole_price(spec: OptimizerSpec, metas: dict[str, TensorMeta], monkeypatch: pytest.MonkeyPatch) -> OptimizerPrice:
    """The price from one run on all parameters."""
    with monkeypatch.context() as patch:
        patch.setattr(optimizer_price, "_sampled", lambda keys, run, by_lists: None)
        return price_optimizer(spec, metas)


@pytest.mark.parametrize("factory", [*PRICED.values(), Adafactor], ids=[*PRICED, "adafactor"])
def test_sampling_neighbours_changes_no_price(factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    metas = gpt(8)
    spec = spec_of(factory, metas)
    assert price_optimizer(spec, metas) == whole_price(spec, metas, monkeypatch)


OWN = "Signed Trusting Collecting Keeping Adding Replacing Clipping TwoPasses Favouring".split()


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("ends", [True, False], ids=["whole model", "middle stage"])
def test_sampling_is_not_fooled(name: str, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    metas = {key: meta for key, meta in gpt(8).items() if ends or "." in key}
    spec = spec_of(partial(getattr(own, name), lr=0.1), metas)
    assert price_optimizer(spec, metas) == whole_price(spec, metas, monkeypatch)


def test_lists_are_seen_even_where_a_sample_has_one_tensor_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = {"a": TensorMeta((4,), "float32"), "b": TensorMeta((8, 4), "float32"), "c": TensorMeta((8,), "float32")}
    metas = {f"{index}.{name}": meta for index in range(8) for name, meta in layer.items()}
    spec = spec_of(own.Stacking, metas)
    assert price_optimizer(spec, metas) == whole_price(spec, metas, monkeypatch)


def test_what_all_parameters_hold_at_once_is_workspace() -> None:
    metas = gpt(8)
    total_bytes = sum(meta.nbytes for meta in metas.values())
    for kind in (own.Collecting, own.Keeping):
        assert price_optimizer(spec_of(kind, metas), metas).workspace_bytes >= total_bytes


def count_parameters(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []

    def counting(spec: OptimizerSpec, parameters: Any) -> Any:
        sizes.append(len(parameters))
        return optim.build(spec, parameters)

    monkeypatch.setattr(optimizer_run, "build", counting)
    return sizes


def test_a_loop_runs_no_more_parameters_for_more_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, loop = count_parameters(monkeypatch), partial(AdamW, foreach=False)
    few, many = gpt(5), gpt(15)
    price_optimizer(spec_of(loop, few), few)
    run_for_few = sum(sizes)
    price = price_optimizer(spec_of(loop, many), many)
    assert 0 < sum(sizes) - run_for_few == run_for_few < len(few) / 2
    one = {"ln": many["ln"]}
    assert len(price.costs) == len(many) * len(price_optimizer(spec_of(loop, one), one).costs)


def test_lists_hold_no_more_parameters_for_more_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = count_parameters(monkeypatch)
    few, many = gpt(5), gpt(15)
    price_optimizer(spec_of(partial(AdamW, foreach=True), few), few)
    run_for_few = sum(sizes)
    price_optimizer(spec_of(partial(AdamW, foreach=True), many), many)
    assert 0 < sum(sizes) - run_for_few == run_for_few < len(few) * 0.7


def test_fused_adamw_by_hand() -> None:
    """Parameter, gradient and both moments read, all but the gradient written; one step count per parameter."""
    metas = {"a": TensorMeta((64, 32), "float32"), "b": TensorMeta((10,), "float32")}
    price = price_optimizer(spec_of(partial(AdamW, fused=True), metas), metas)
    numel = 64 * 32 + 10
    assert price.state_bytes == 8 * numel + 2 * 4
    update = max(price.costs, key=lambda cost: cost.nbytes)
    assert (update.kind, update.dtype) == ("optimizer", "float32")
    assert update.nbytes == 28 * numel + 2 * 4


def test_shards_are_priced_as_they_are() -> None:
    whole, half = {"w": TensorMeta((64, 32), "float32")}, {"w": TensorMeta((32, 32), "float32")}
    spec = spec_of(AdamW, whole)
    assert price_optimizer(spec, half).state_bytes == 8 * 32 * 32 + 4
    assert price_optimizer(spec, half) == price_optimizer(spec_of(AdamW, half), half)


def test_only_parameters_of_the_spec_are_priced() -> None:
    metas = gpt(1)
    spec = spec_of(lambda parameters: SGD(parameters[1:2], lr=0.1, momentum=0.9), metas)
    assert price_optimizer(spec, metas).state_bytes == metas["0.ln1"].nbytes
    assert price_optimizer(spec, {"emb": metas["emb"]}) == OptimizerPrice((), 0, 0)


def test_each_device_takes_what_is_fastest_there_where_nothing_else_is_asked_for() -> None:
    metas = gpt(2)

    def kinds(factory: Any, device: str) -> Counter[OpCost]:
        return Counter(price_optimizer(spec_of(factory, metas), metas, device=device).costs)

    assert kinds(AdamW, "cuda") == kinds(partial(AdamW, foreach=True), "cuda") != kinds(AdamW, "cpu")
    assert kinds(AdamW, "cpu") == kinds(partial(AdamW, fused=True), "cpu")
    assert kinds(partial(AdamW, foreach=False), "cuda") == kinds(partial(AdamW, foreach=False), "cpu")
    assert kinds(partial(AdamW, foreach=False), "cpu") != kinds(AdamW, "cpu")
    assert price_optimizer(spec_of(partial(AdamW, capturable=True), metas), metas, device="cuda").state_bytes > 0


def test_steps_that_need_values_or_another_device_are_refused() -> None:
    metas = gpt(1)
    for factory in (own.Peeking, partial(AdamW, capturable=True)):
        with pytest.raises(UnsupportedError, match="cannot be priced: its step on cpu tensors"):
            price_optimizer(spec_of(factory, metas), metas)
