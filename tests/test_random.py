"""What forward draws: right in distribution, and the same under every plan as on one device."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from transformers import GPT2Config, GPT2LMHeadModel

import autopar
from autopar.runtime import draws, kernels
from cost_model.errors import ConfigError, UnsupportedError
from passes.random_vocabulary import DROPOUT, RANDOM_STATE, SAMPLES
from passes.trace import trace

sys.path.append(str(Path(__file__).parent))
from masks import dropout_given, key_of, mask, word_at
from parity import SGD, check_parity, cpu_cluster
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("shared_ranks")
SEED = 7


def key(step: int = 0, call: int = 0, seed: int = SEED) -> Tensor:
    return draws.random_keys(torch.tensor([seed, step]), call + 1)[call]


def grid(*shape: int) -> list[Tensor]:
    return [torch.arange(extent) for extent in shape]


# --- Numbers --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@drawn(st.lists(st.integers(1, 6), max_size=4), st.integers(-5, 5), st.integers(0, 3), st.floats(0.01, 0.99))
def test_masks_are_as_defined(shape: list[int], seed: int, step: int, p: float) -> None:
    found = draws.keep(key(step, 2, seed), grid(*shape), p)
    assert torch.equal(found, mask(key_of(seed, step, 2), tuple(shape), p))


def test_a_fraction_is_the_upper_bits_of_a_word() -> None:
    found = draws.uniform(key(), grid(3, 5))
    words = [word_at(key_of(SEED, 0, 0), (i, j)) for i in range(3) for j in range(5)]
    expected = [((w >> 9) + 2**22 + 0.5) / 2**23 for w in words]
    assert found.flatten().tolist() == expected


@settings(max_examples=40, deadline=None, derandomize=True)
@drawn(st.data())
def test_a_part_draws_its_part_of_the_whole(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from([1, 4, 6]), min_size=1, max_size=3))
    places = [data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True)) for n in shape]
    rows = [torch.tensor(place) for place in places]
    for draw in (draws.uniform, draws.normal, draws.random_integers, functools.partial(draws.keep, p=0.3)):
        whole = draw(key(), grid(*shape))
        for dim, row in enumerate(rows):
            whole = whole.index_select(dim, row)
        assert torch.equal(draw(key(), rows), whole)


def z_score(a: Tensor, b: Tensor) -> float:
    """Correlation of two samples in standard deviations of what independent ones have."""
    a, b = (x.flatten().double() - x.double().mean() for x in (a, b))
    return float(a @ b / (a.norm() * b.norm()) * math.sqrt(len(a)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_of_rows_columns_and_all(p: float) -> None:
    rows, columns = 1000, 1500
    kept = draws.keep(key(), grid(rows, columns), p).double()
    variance = p * (1 - p)
    assert abs(float(kept.mean()) - (1 - p)) < 4 * math.sqrt(variance / kept.numel())
    for dim, count in ((0, rows), (1, columns)):  # means along a dim spread as those of independent numbers do
        means = kept.mean(dim)
        spread = float(means.var()) * count / variance
        assert abs(spread - 1) < 5 * math.sqrt(2 / len(means))


def test_uniform_numbers_fill_their_range_evenly() -> None:
    numbers = draws.uniform(key(), grid(1000, 1000))
    expected = numbers.numel() / 256
    chi_squared = float(((torch.histc(numbers, 256, 0, 1) - expected) ** 2 / expected).sum())
    assert 255 - 4 * math.sqrt(510) < chi_squared < 255 + 4 * math.sqrt(510)
    assert 0 < float(numbers.min()) and float(numbers.max()) < 1


def test_normal_numbers_have_the_moments_of_their_distribution() -> None:
    numbers = draws.normal(key(), grid(1000, 1000)).double()
    for power, moment, deviation in ((1, 0, 1), (2, 1, math.sqrt(2)), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))):
        assert abs(float((numbers**power).mean()) - moment) < 4 * deviation / 1000


@pytest.mark.parametrize(
    "other",
    [
        draws.uniform(key(call=1), grid(700, 700)),
        draws.uniform(key(step=1), grid(700, 700)),
        draws.uniform(key(seed=SEED + 1), grid(700, 700)),
        draws.uniform(key(), [torch.arange(700, 1400), torch.arange(700)]),
        draws.uniform(key(), [torch.arange(700), torch.arange(700, 1400)]),
        draws.uniform(key(), grid(700, 700)).T,
        draws.uniform(key(), [torch.arange(1, 701), torch.arange(700)]),
        draws.uniform(key(), [torch.arange(700), torch.arange(1, 701)]),
    ],
    ids=["call", "step", "seed", "rows", "columns", "transposed", "next row", "next column"],
)
def test_calls_steps_seeds_and_places_are_independent(other: Tensor) -> None:
    numbers = draws.uniform(key(), grid(700, 700))
    assert abs(z_score(numbers, other)) < 4
    assert abs(z_score((numbers - 0.5).abs(), (other - 0.5).abs())) < 4


def test_four_corners_of_rectangles_are_independent() -> None:
    """Words mix one of a row with one of a column, so that four of them could cancel out."""
    signs = draws.keep(key(), grid(1000, 1000), 0.5).double() * 2 - 1
    corners = signs[::2, ::2] * signs[1::2, ::2] * signs[::2, 1::2] * signs[1::2, 1::2]
    assert abs(float(corners.mean())) < 4 / math.sqrt(corners.numel())


# --- Calls of torch, restated ---------------------------------------------------------------------------------------


Function = Callable[[Tensor], Tensor]


class Drawing(nn.Module):
    """What a function makes of features with a parameter in them."""

    def __init__(self, function: Function, width: int = 8) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.scale)


def evaluated(function: Function, x: Tensor, steps: int = 1) -> list[float]:
    """In each step the mean of what a function makes of x, by the traced graph with random numbers of ours."""
    traced = trace(Drawing(function, x.shape[-1]), (x,), lambda made, _: made.double().mean())
    given = {"scale": torch.ones(x.shape[-1]), SAMPLES: torch.arange(len(x)), **traced.constants}
    found = []
    for step in range(steps):
        given[RANDOM_STATE] = torch.tensor([SEED, step])
        inputs = [given.get(i.target, x) for i in traced.global_graph.inputs]
        found.append(float(_Real(traced.global_graph.graph).run(*inputs)[0]))
    return found


class _Real(fx.Interpreter):
    """Runs a forward graph on real tensors."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(nn.Module(), graph=graph)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is DROPOUT:
            x, key, coordinates, p = args
            kept = kernels.keep(key, coordinates, p)
            return kernels.drop(x, kept, 1 / (1 - p)), kept
        namespace, name, _ = str(target).split(".") if isinstance(target, torch._ops.OpOverload) else ("", "", "")
        return super().call_function(getattr(kernels, name) if namespace == "autopar" else target, args, kwargs)


def image(x: Tensor) -> Tensor:
    """[n, c] -> [n, c, 2, 2]."""
    return x[:, :, None, None].expand(-1, -1, 2, 2)


def attention(x: Tensor, **options: Any) -> Tensor:
    heads = x.reshape(len(x), 2, -1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.4, **options)


RESTATED: dict[str, Function] = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout of all": lambda x: F.dropout(x, 1.0),
    "dropout2d": lambda x: F.dropout2d(image(x), 0.3),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.3, True),
    "feature alpha dropout": lambda x: F.feature_alpha_dropout(image(x), 0.3, True),
    "rrelu": lambda x: F.rrelu(x - 1, training=True),
    "rrelu as trained": lambda x: F.rrelu(x - 1, training=False),
    "gumbel softmax": lambda x: F.gumbel_softmax(x)[:, :2],
    "hard gumbel softmax": lambda x: F.gumbel_softmax(x, hard=True)[:, :2],
    "rand": lambda x: x * torch.rand(x.shape),
    "rand_like": lambda x: x * torch.rand_like(x),
    "uniform_": lambda x: x * torch.empty_like(x).uniform_(-1, 3),
    "randn": lambda x: x * (1 + torch.randn(x.shape)),
    "randn_like": lambda x: x + torch.randn_like(x),
    "normal_": lambda x: x * torch.empty_like(x).normal_(2, 0.5),
    "normal of numbers": lambda x: x * torch.normal(2.0, 0.5, x.shape),
    "normal of tensors": lambda x: torch.normal(x, x.abs()),
    "exponential_": lambda x: x * torch.empty_like(x).exponential_(2.0),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.3)),
    "bernoulli of values": lambda x: torch.bernoulli(x.sigmoid()) * x,
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(0.3),
    "randint": lambda x: x * torch.randint(1, 5, x.shape),
    "randint_like": lambda x: x * torch.randint_like(x, 4),
    "multinomial": lambda x: x + torch.multinomial(x.softmax(-1), 1),
    "attention": attention,
    "causal attention": functools.partial(attention, is_causal=True),
    "masked attention": functools.partial(attention, attn_mask=torch.tensor([[True, False], [True, True]])),
}


@pytest.mark.parametrize("name", RESTATED)
def test_calls_draw_what_torch_draws_in_distribution(name: str) -> None:
    """The sum of their first two moments, over many samples."""
    function, x, steps = RESTATED[name], torch.linspace(-1, 2, 8).expand(4000, -1).contiguous(), 4

    def moments(x: Tensor) -> Tensor:
        made = function(x)
        return made + made**2

    torch.manual_seed(0)
    theirs = torch.cat([moments(x).double().flatten(1).mean(1) for _ in range(steps)])
    ours = sum(evaluated(moments, x, steps)) / steps
    assert abs(ours - float(theirs.mean())) <= 5 * float(theirs.std()) * math.sqrt(2 / len(theirs)) + 1e-6


def test_an_order_has_every_place_once() -> None:
    x = torch.arange(8.0).expand(4, -1).contiguous()
    (mean,) = evaluated(lambda v: v[:, torch.randperm(8)].exp(), x)
    assert mean == pytest.approx(float(x.exp().double().mean()))
    assert set(evaluated(lambda v: v[:, torch.randperm(8)[:1]], x, 40)) == set(range(8))


def test_equal_calls_draw_different_numbers() -> None:
    x = torch.ones(2000, 8)
    (same,) = evaluated(lambda v: torch.rand_like(v) * torch.rand_like(v), x)
    assert same == pytest.approx(1 / 4, abs=0.01)


# --- Programs -------------------------------------------------------------------------------------------------------


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    """With dropout as configured by default: 0.1 on embeddings, attention and residuals."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=8, use_cache=False, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(32, (4, 8))
    return GPT2LMHeadModel(config).train(), {"input_ids": ids, "labels": ids}


given = functools.partial(dropout_given, 0)
PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "microbatches": (1, {"microbatch_size": 1}),
    "dp": (2, {"dp": 2, "microbatch_size": 1}),
    "tp": (2, {"tp": 2, "microbatch_size": 2}),
    "pp": (2, {"pp": 2, "microbatch_size": 2}),
    "zero and recompute": (2, {"dp": 2, "zero": 3, "recompute": "full"}),
}


@pytest.mark.parametrize(
    "plan",
    ["tp", *(pytest.param(p, marks=pytest.mark.slow) for p in ("zero and recompute", "microbatches", "dp", "pp"))],
)
def test_gpt2_trains_as_plain_pytorch_given_the_same_masks(plan: str) -> None:
    devices, pins = PLANS[plan]
    model, batch = gpt2()
    check_parity(model, batch, devices, 1e-5, given=given, **{"dp": 1, "tp": 1, "pp": 1, **pins})


class Noisy(nn.Module):
    """Random calls of many kinds, on images, sequences and samples merged with other dims."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.drop = nn.Sequential(nn.Dropout2d(0.2), nn.RReLU(), nn.AlphaDropout(0.1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + 0.1 * torch.randn_like(x)
        made = self.drop(self.first(x)[:, :, :, None])[..., 0]
        n, t, width = made.shape
        made = F.dropout(made.reshape(n * t, width), 0.3).reshape(n, t, width)
        made = made + F.gumbel_softmax(self.second(made), -1) * torch.rand(t, 1)
        heads = made.reshape(n, t, 2, 4).transpose(1, 2)
        made = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.2, is_causal=True)
        kept = torch.bernoulli(torch.full((n, 1, 1, 1), 0.8))  # stochastic depth: one number a sample
        return F.mse_loss((made * kept).sum((1, 3)), y)


def losses(pins: dict[str, Any], devices: int = 1, seed: int = SEED) -> list[float]:
    torch.manual_seed(0)
    model, batch = Noisy(), {"x": torch.randn(8, 6, 6), "y": torch.randn(8, 6)}
    parallelism = autopar.Parallelism(**{"dp": 1, "tp": 1, "pp": 1, **pins})
    cluster = cpu_cluster(devices)
    with autopar.compile(model, cluster, batch, optimizer=SGD, parallelism=parallelism, seed=seed) as exe:
        return [exe.step(batch) for _ in range(3)]


ELSEWHERE: dict[str, tuple[int, dict[str, Any]]] = {
    "microbatches": (1, {"microbatch_size": 2}),
    "dp": (2, {"dp": 2, "microbatch_size": 1}),
    "tp": (2, {"tp": 2}),
    "pp": (2, {"pp": 2, "microbatch_size": 4}),
}


@functools.cache
def on_one_device() -> list[float]:
    return losses({})


@pytest.mark.parametrize(
    "plan", ["dp", *(pytest.param(p, marks=pytest.mark.slow) for p in ("tp", "microbatches", "pp"))]
)
def test_no_plan_changes_what_is_drawn(plan: str) -> None:
    devices, pins = ELSEWHERE[plan]
    assert losses(pins, devices) == pytest.approx(on_one_device(), rel=1e-5)


def test_seeds_and_steps_draw_anew_and_runs_alike() -> None:
    assert losses({}) == on_one_device()
    assert losses({}, seed=SEED + 1) != on_one_device()
    assert len(set(on_one_device())) == 3


def compiled(**options: Any) -> tuple[autopar.Executable, dict[str, Tensor]]:
    model, batch = gpt2()
    pins = autopar.Parallelism(dp=1, tp=1, pp=1)
    return autopar.compile(model, cpu_cluster(1), batch, optimizer=SGD, parallelism=pins, **options), batch


@pytest.mark.slow
def test_evaluation_leaves_what_training_draws(tmp_path: Path) -> None:
    """Nor does going on from a checkpoint change it."""
    exe, batch = compiled()
    with exe:
        plain = [exe.step(batch) for _ in range(3)]
    exe, batch = compiled()
    with exe:
        first = exe.eval_step(batch)
        assert exe.eval_step(batch) != first
        assert exe.step(batch) == plain[0] != first
        exe.eval_step(batch)
        exe.save(tmp_path / "run")
    exe, batch = compiled()
    with exe:
        exe.load(tmp_path / "run")
        assert [exe.step(batch) for _ in range(2)] == plain[1:]


def test_accumulated_batches_draw_each_their_own() -> None:
    exe, batch = compiled()
    with exe:
        same = {exe.step(batch, update=False) for _ in range(3)}
    assert len(same) == 3


def test_what_is_drawn_is_in_the_program_and_its_price() -> None:
    exe, _ = compiled()
    with exe:
        code = exe.code(0)
        (stage,) = exe.planned.linked.program.stages
    priced = [i.op for i in stage.chunks[0].forward.instructions]
    assert code.count("kernels.keep(") == priced.count("autopar.keep.default") == 7
    assert all(i.cost is not None for i in stage.chunks[0].forward.instructions if i.op == "autopar.keep.default")


def test_masks_are_drawn_again_where_all_is_recomputed() -> None:
    model, batch = gpt2()
    pins = autopar.Parallelism(dp=1, tp=1, pp=1, recompute="full")
    with autopar.compile(model, cpu_cluster(1), batch, parallelism=pins) as exe:
        backward = exe.code(0).split("def backward")[1]
    assert backward.count("kernels.keep(") == 7


@pytest.mark.parametrize("seed", [1.5, True, "one", 2**63])
def test_a_seed_is_a_whole_number_of_64_bits(seed: Any) -> None:
    with pytest.raises(ConfigError, match="64 bits"):
        compiled(seed=seed)


def test_what_has_no_form_of_ours_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="geometric.*torch.rand"):
        evaluated(lambda x: x * torch.empty_like(x).geometric_(0.5), torch.ones(4, 8))
