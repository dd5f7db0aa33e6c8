"""Splitting the batch: which models split, which do not and why; and those that do add up to the global loss."""
# ruff: noqa: E501 - one model a row

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from odd_models import Net, inputs, labels, mask, net
from parity import check_parity, cpu_cluster
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

import autopar
from autopar.options import Options
from autopar.planning import Job
from cost_model.errors import ParallelismError
from passes.batch import BatchAnalysis, analyse_batch
from passes.constant import check_constant
from passes.cut import cut_stage
from passes.trace import trace

Case = Callable[[], tuple[nn.Module, dict[str, Tensor]]]


def analysed(model: nn.Module, batch: dict[str, Tensor]) -> BatchAnalysis:
    traced = trace(model, batch)
    analysis = analyse_batch(traced.global_graph, traced.other)
    return check_constant(traced, analysis, {**dict(model.named_buffers()), **traced.constants})[0]


def _forward(forward: Any, build: Any = None, **more: Tensor) -> Case:
    return lambda: (net(forward, build), inputs(**more))


def _weighted(self: Any, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    return ((self.body(x) - y).pow(2) * m).sum() / m.sum()


def _weighted_before(self: Any, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    return ((self.body(x) - y).pow(2) * (m / m.sum())).sum()


def _softmax_of_weights(self: Any, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    return ((self.body(x) - y).pow(2) * m.softmax(0)).sum()


def _made_mask(self: Any, x: Tensor, y: Tensor) -> Tensor:
    ones = torch.ones(x.size(0), 12, dtype=x.dtype)
    return ((self.body(x) - y).pow(2) * ones).sum() / ones.sum()


def _two_losses(self: Any, x: Tensor, y: Tensor) -> Tensor:
    hidden = self.a(x)
    return F.mse_loss(self.b(hidden), y) + 0.3 * self.c(hidden).abs().mean()


def _weight_decay(self: Any, x: Tensor, y: Tensor) -> Tensor:
    penalty = sum(p.pow(2).sum() for p in self.parameters())
    return F.mse_loss(self.body(x), y) + 0.01 * penalty


def _pairs(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return self.body(x).view(x.size(0) // 2, 2, 12).sum(1).pow(2).mean()


def _with_class_token(self: Any, x: Tensor, y: Tensor) -> Tensor:
    rows = torch.cat([self.token.expand(x.size(0), -1, -1), x.unsqueeze(1)], 1)
    return F.mse_loss(self.body(rows).sum(1), y)


def _class_token(self: Any) -> None:
    self.token = nn.Parameter(torch.ones(1, 1, 12, dtype=torch.float64))


def _types(self: Any, x: Tensor, y: Tensor) -> Tensor:
    kind = torch.zeros(x.size(0), dtype=torch.long)
    return F.mse_loss(self.body(x + self.kinds(kind)), y)


def _kinds(self: Any) -> None:
    self.kinds = nn.Embedding(2, 12).double()


def _picked(self: Any, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """One of the parts of each sample, by its own number."""
    parts = self.body(x).view(x.size(0), 3, 4)
    return F.mse_loss(parts[torch.arange(x.size(0)), t.clamp(0, 11) // 4], y[:, :4])


def _mask_of_groups(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """Windows of all samples in one dim, the batch outermost: their masks repeat from sample to sample."""
    windows = self.body(x).view(x.size(0) * 3, 4)
    masked = torch.arange(12.0, dtype=x.dtype).view(3, 4).repeat(x.size(0), 1)
    return F.mse_loss(windows * masked, y.view(-1, 4))


def _rows_of_samples(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """Two rows of the batch are one sample, for which a mask is made."""
    samples = self.body(x).view(-1, 2, 3, 4).sum(1)
    return F.mse_loss(samples * torch.ones(samples.shape[0], 3, 4, dtype=x.dtype).tril(), y[::2].view(-1, 3, 4))


SPLIT: dict[str, Case] = {
    "mse": lambda: (Net(), inputs()),
    "sum of squares": _forward(lambda self, x, y: (self.body(x) - y).pow(2).sum() / 100),
    "other ops for fewer samples": _forward(lambda self, x, y: F.mse_loss(self.a(x if x.size(0) > 4 else -x), y)),
    "sum over the batch size": _forward(lambda self, x, y: (self.body(x) - y).pow(2).sum() / x.size(0)),
    "mean of means": _forward(lambda self, x, y: (self.body(x) - y).pow(2).mean(1).mean()),
    "cross entropy": _forward(lambda self, x, y, t: F.cross_entropy(self.body(x) + y, t), t=labels()),
    "smoothed": _forward(lambda self, x, y, t: F.cross_entropy(self.body(x), t, label_smoothing=0.1), t=labels()),
    "masked mean": _forward(_weighted, m=mask()),
    "masked mean, normalised first": _forward(_weighted_before, m=mask()),
    "softmax of weights over the batch": _forward(_softmax_of_weights, m=mask()),
    "mask made inside": _forward(_made_mask),
    "two losses": _forward(_two_losses),
    "batch norm that evaluates": _forward(
        lambda self, x, y: F.mse_loss(self.n(self.a(x)), y),
        lambda s: s.add_module("n", nn.BatchNorm1d(12).double().eval()),
    ),
    "rows picked by number": _forward(_picked, t=labels()),
    "a mask for a sample of two rows": _forward(_rows_of_samples),
    "a mask for groups of rows": _forward(_mask_of_groups),
    "the same repeated": _forward(lambda self, x, y: F.mse_loss(self.a(x) + self.b.bias.repeat(x.size(0), 1), y)),
    "weight decay in the loss": _forward(_weight_decay),
    "normalised weight": _forward(lambda self, x, y: F.mse_loss(x @ F.normalize(self.a.weight, dim=1).t(), y)),
    "pairs of samples": _forward(_pairs),
    "a class token": _forward(_with_class_token, _class_token),
    "an embedding of made ids": _forward(_types, _kinds),
    "numbered samples": _forward(lambda self, x, y: F.mse_loss(self.a(x) * torch.arange(x.size(0))[:, None], y)),
    "numbered pairs": _forward(lambda self, x, y: F.mse_loss(self.a(x) * (torch.arange(x.size(0)) // 2)[:, None], y)),
    "numbered rows of samples": _forward(
        lambda self, x, y: F.mse_loss(self.a(x).view(-1, 4) * torch.arange(x.size(0) * 3)[:, None], y.view(-1, 4))
    ),
    "softmax of weights of all elements": _forward(
        lambda self, x, y, m: (self.a(x).view(-1) * (m.view(-1) + y.view(-1)).softmax(0)).sum(), m=mask()
    ),
    "numbers as they are made": _forward(
        lambda self, x, y: F.mse_loss(self.a(x)[:, 0] * torch.arange(x.size(0)), y[:, 0])
    ),
    "times spread over the batch": _forward(
        lambda self, x, y: F.mse_loss(self.a(x + torch.linspace(0, 1, x.size(0), dtype=x.dtype)[:, None]), y)
    ),
    "a mask with the batch's size in it": _forward(
        lambda self, x, y: F.mse_loss(self.a(x) * torch.arange(x.size(0)).sum().expand(x.size(0), 12), y)
    ),
    "scaled by a sum over sizes": _forward(
        lambda self, x, y: F.mse_loss(self.body(x) * torch.arange(x.size(0)).sum() / 9, y)
    ),
}


def _balanced(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """A router's loss: how often each expert is chosen times how likely it is."""
    likely = self.b(torch.tanh(self.a(x))).softmax(-1)
    chosen = F.one_hot(likely.argmax(-1), 12).to(x.dtype)
    counted = torch.histc(likely.argmax(-1).to(x.dtype), bins=12, min=0, max=11) / x.size(0)
    return F.mse_loss(self.c(x) * likely, y) + ((chosen.mean(0) + counted) * likely.mean(0)).sum()


def _two_views(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """The correlation of features over the samples of both views, laid one behind the other."""
    both = torch.cat([self.body(x), self.body(y)])
    scaled = (both - both.mean(0)) / both.std(0)
    correlation = scaled.t() @ scaled / both.size(0)
    return (correlation - torch.eye(12, dtype=x.dtype)).pow(2).sum()


EXCHANGED: dict[str, Case] = {
    "centred over the batch": _forward(lambda self, x, y: F.mse_loss(x - self.a(x).mean(0), y)),
    "a root of the mean": _forward(lambda self, x, y: F.mse_loss(self.a(x), y).sqrt()),
    "the logarithm of a loss": _forward(lambda self, x, y: F.mse_loss(self.a(x), y).log()),
    "a balanced router": _forward(_balanced),
    "correlated features": _forward(_two_views),
    "a product of means and a sum": _forward(
        lambda self, x, y: F.mse_loss(self.body(x), y) + self.a(x).mean() * self.b(y).square().mean()
    ),
}
"""Losses that are no sum over samples, but made of such sums."""


def _two_towers(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """CLIP's: each sample's two sides against those of all others, beside a loss of each sample."""
    one, two = F.normalize(self.a(x), dim=-1), F.normalize(self.b(y), dim=-1)
    logits = one @ two.t() * self.c.bias.exp().sum()
    mine = torch.arange(x.size(0))
    return F.cross_entropy(logits, mine) + F.cross_entropy(logits.t(), mine) + F.mse_loss(self.c(x), y)


def _two_views_apart(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """SimCLR's: both views of all samples against each other, themselves left out."""
    both, size = F.normalize(torch.cat([self.body(x), self.body(y)]), dim=-1), x.size(0)
    near = (both @ both.t()).masked_fill(torch.eye(2 * size, dtype=torch.bool), -1e9)
    return F.cross_entropy(near / 0.5, (torch.arange(2 * size) + size) % (2 * size))


def _hardest(self: Any, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Of each sample the farthest of its own class and the nearest of another."""
    made = self.body(x)
    squares = made.square().sum(1)
    apart = (squares[:, None] + squares[None, :] - 2 * made @ made.t()).clamp(min=1e-6).sqrt()
    same = t[:, None] % 3 == t[None, :] % 3
    far = apart.masked_fill(~same, 0).amax(1)
    near = apart.masked_fill(same, 1e3).amin(1)
    return F.relu(far - near + 1).mean()


def _signs(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """SigLIP's: each pair by itself."""
    logits, size = self.a(x) @ self.b(y).t() + self.c.bias.sum(), x.size(0)
    return -F.logsigmoid((2 * torch.eye(size, dtype=x.dtype) - 1) * logits).sum() / size


def _attention_between_samples(self: Any, x: Tensor, y: Tensor) -> Tensor:
    hidden = self.a(x)
    return F.mse_loss(self.c(hidden + (hidden @ self.b(hidden).t()).softmax(-1) @ hidden), y)


def _alike_in_name(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """Of all samples the inputs' exp is made again, and takes the name of the third, which takes that of the last."""
    near = x.exp()
    kernel = (near @ near.t()).softmax(-1)
    far = self.a(x).exp()
    kernel = kernel + (far @ far.t()).softmax(-1)
    return F.mse_loss(kernel @ self.c(x).exp(), y) + self.b(x).view(-1, 3, 4).exp().mean()


JOINED: dict[str, Case] = {
    "values alike in name": _forward(_alike_in_name),
    "two towers": _forward(_two_towers),
    "two views": _forward(_two_views_apart),
    "the hardest triplets": _forward(_hardest, t=labels()),
    "signs of pairs": _forward(_signs),
    "attention between samples": _forward(_attention_between_samples),
    "moments and the first sample": _forward(
        lambda self, x, y: F.mse_loss(self.a(x)[0], y[0]) / self.b(x).square().mean().sqrt()
    ),
}
"""Losses that compare samples with each other."""
WHOLE: dict[str, tuple[Case, str]] = {
    "an op without a rule": (_forward(lambda self, x, y: F.mse_loss(torch.cholesky(torch.diag_embed(self.a(x) ** 2 + 1)).sum(-1), y)), "no rule"),
    "cumsum over the batch": (_forward(lambda self, x, y: F.mse_loss(self.a(x).cumsum(0), y)), "mixes samples"),
    "softmax over the batch": (_forward(lambda self, x, y: F.mse_loss(self.a(x).softmax(0), y)), "mixes samples"),
    "the first sample": (_forward(lambda self, x, y: F.mse_loss(self.a(x)[0], y[0])), "mixes samples"),
    "numbered columns": (_forward(lambda self, x, y: F.mse_loss(self.a(x).t() * torch.arange(x.size(0))[None], y.t())), "made for the batch's size"),
    "halves of the batch": (_forward(lambda self, x, y: self.a(x).view(2, x.size(0) // 2, 12).sum(1).pow(2).sum()), "groups the samples"),
    "a row picked by the batch's size": (_forward(lambda self, x, y: F.mse_loss(self.a(x) * self.b.weight[x.size(0) - 1], y)), "size"),
    "columns picked by the batch's size": (_forward(lambda self, x, y: self.a(x)[:, x.size(0) - 2 :].sum()), "size"),
    "other ops for other sizes": (_forward(lambda self, x, y: F.mse_loss(self.a(x if x.size(0) == 8 else -x), y)), "different ops"),
    "all samples against all": (_forward(lambda self, x, y: F.mse_loss(self.a(x) @ y.t(), x @ y.t())), "groups the samples"),
    "a loss without the batch": (_forward(lambda self, x, y: self.a.weight.pow(2).sum()), "does not depend on the batch"),
    "a loss on one size only": (_forward(lambda self, x, y: self.a(x).view(8, 12).sum()), "one batch size only"),
}  # fmt: skip

REFUSED = {
    "numbered columns": "made for the batch's size",
    "other ops for other sizes": "different ops",
    "a loss without the batch": "does not depend on the batch",
    "a loss on one size only": "one batch size only",
}
"""Those that no exchange helps."""


@pytest.mark.parametrize("name", SPLIT)
def test_splits(name: str) -> None:
    assert analysed(*SPLIT[name]()).reason is None


@pytest.mark.parametrize("name", WHOLE)
def test_stays_whole(name: str) -> None:
    case, said = WHOLE[name]
    analysis = analysed(*case())
    assert analysis.reason is not None and said in analysis.reason
    assert analysis == BatchAnalysis(analysis.reason) or "apart" in analysis.reason


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("name", SPLIT)
def test_parts_add_up(name: str) -> None:
    """Two replicas with two microbatches each."""
    check_parity(*SPLIT[name](), 2, 1e-9, dp=2, tp=1, pp=1, microbatch_size=2)


SHARDED = ("a root of the mean", "a balanced router", "values alike in name", "two towers", "attention between samples")
"""Models of each way to exchange that are tried with shards, too, where slow tests are left out."""


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    ("name", "pins"),
    [
        *((name, {"dp": 2, "zero": 3}) for name in {**EXCHANGED, **JOINED}),
        *((name, {"dp": 2, "tp": 2}) for name in SHARDED),
        *(
            pytest.param(name, {"dp": 2, "tp": 2}, marks=pytest.mark.slow)
            for name in {**EXCHANGED, **JOINED}
            if name not in SHARDED
        ),
        ("correlated features", {"dp": 2, "pp": 2}),
        ("two towers", {"dp": 2, "pp": 2}),
        ("two views", {"dp": 4, "zero": 1}),
    ],
    ids=str,
)
def test_what_all_samples_enter_is_exchanged(name: str, pins: dict[str, int]) -> None:
    """By replicas of one microbatch each; without the exchange, none of these splits."""
    case = {**EXCHANGED, **JOINED}[name]
    assert analysed(*case()).reason is not None
    pins = {"tp": 1, "pp": 1, **pins}
    plan = check_parity(*case(), pins["dp"] * pins["tp"] * pins["pp"], 1e-9, **pins)
    assert plan.microbatches == 1


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("name", WHOLE)
def test_what_mixes_samples_is_made_of_all_of_them(name: str) -> None:
    """By each replica, or dp is refused by name."""
    (case, _), refused = WHOLE[name], REFUSED.get(name)
    if refused is None:
        check_parity(*case(), 2, 1e-9, dp=2, tp=1, pp=1)
        return
    with pytest.raises(ParallelismError, match=refused):
        check_parity(*case(), 2, 1e-9, dp=2, tp=1, pp=1)


def test_samples_gathered_are_said_and_priced() -> None:
    """A value that is taken as rows and as columns travels once each way."""
    model, batch = JOINED["two views"]()
    pins = autopar.Parallelism(dp=2, tp=1, pp=1, zero=0)
    with autopar.compile(model, cpu_cluster(2), batch, parallelism=pins) as exe:
        assert any("first in aten.matmul.default: replicas gather 1 value(s)" in note for note in exe.notes)
        calls = [
            line for line in exe.code(0).splitlines() if "= comm.all_gather" in line or "= comm.reduce_scatter" in line
        ]
        assert len(calls) == 2, calls
    nearer, farther = (_search_s(model, batch, bandwidth) for bandwidth in (1e9, 1e5))
    assert farther > nearer + 0.001


def _search_s(model: nn.Module, batch: dict[str, Tensor], bandwidth: float) -> float:
    """What the search takes for two replicas, which leave it nothing to choose."""
    job = Job.of(model, cpu_cluster(2, bandwidth), batch, Options.of(None, None, None, None, None, None))
    chain = job.space.chain(2, (1,), 4)
    assert chain is not None
    return sum(float(f.time_s.min()) for graph in chain.kinds for f in graph.factors if f.time_s is not None)


@pytest.mark.usefixtures("thread_ranks")
def test_losses_and_outputs_of_all_samples_are_those_of_one_device() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.a(x) @ self.b(y).t()
        return {"loss": F.cross_entropy(logits, torch.arange(x.size(0))), "logits": logits, "hidden": self.a(x)}

    model, batch = net(forward), inputs()
    expected = model(**batch)
    pins = autopar.Parallelism(dp=2, tp=1, pp=1)
    with autopar.compile(model, cpu_cluster(2), batch, parallelism=pins) as exe:
        found = exe.forward(batch)
        assert abs(exe.eval_step(batch) - float(expected["loss"])) < 1e-12
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-12), name


def test_what_replicas_exchange_is_said_and_priced() -> None:
    model, batch = EXCHANGED["a balanced router"]()
    pins = autopar.Parallelism(dp=2, tp=1, pp=1)
    with autopar.compile(model, cpu_cluster(2), batch, parallelism=pins) as exe:
        assert any("replicas exchange 1 sum(s)" in note for note in exe.notes)
        lines = [line for line in exe.code(0).splitlines() if "all_reduce" in line]
        assert len(lines) >= 2, exe.code(0)
    with pytest.raises(ParallelismError, match="one microbatch, of 4 samples"):
        autopar.estimate(model, cpu_cluster(2), batch, parallelism=autopar.Parallelism(dp=2, microbatch_size=2))


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("name", WHOLE)
def test_what_stays_whole_still_trains(name: str) -> None:
    plan = check_parity(*WHOLE[name][0](), 2, 1e-9, tp=2)
    assert plan.dp == 1 and plan.microbatches == 1


def test_counts_are_made_once_per_step() -> None:
    analysis = analysed(*SPLIT["cross entropy"]())
    assert len(analysis.hoisted) == 1 and not analysis.sliced and not analysis.constant


def test_weights_of_all_samples_are_sliced() -> None:
    analysis = analysed(*SPLIT["softmax of weights over the batch"]())
    assert analysis.sliced == frozenset(analysis.hoisted) == {"softmax"}


def test_a_share_takes_no_name_that_a_later_call_has() -> None:
    """Choices of a plan are by name: the calls behind it had those of others."""

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        made = self.body(x)
        decay = 1e-3 * sum(p.square().sum() for p in self.parameters())
        return F.mse_loss(made, y) + decay + made.square().mean()

    traced = trace(*_forward(forward)())
    graph, analysis = traced.global_graph, analyse_batch(traced.global_graph, traced.other)
    half = cut_stage(graph, traced.segments, 0, len(traced.segments), analysis, 2 * graph.batch)
    numbers = {n.name: [a for a in n.args if isinstance(a, float)] for n in graph.nodes()}
    found = {n.name: [a for a in n.args if isinstance(a, float)] for n in half.nodes()}
    assert [found[name] for name in found.keys() - numbers.keys()] == [[0.5]]
    assert all(found[name] == numbers[name] for name in found.keys() & numbers.keys())


def test_terms_without_a_batch_are_shared_out() -> None:
    """Scaled by the part's share, so that all parts together count them once."""
    assert not analysed(*SPLIT["two losses"]()).shared
    assert len(analysed(*SPLIT["weight decay in the loss"]()).shared) == 1


def test_a_mask_alike_for_all_samples_is_made_per_part() -> None:
    analysis = analysed(*SPLIT["mask made inside"]())
    assert [dim for _, dim, _ in analysis.constant] == [0]
    assert len(analysis.hoisted) == 1, "its sum counts all samples"


def test_a_single_sample_stays_whole() -> None:
    batch = {name: value[:1] for name, value in inputs().items()}
    assert analysed(Net(), batch).reason == "it is a single sample"


def test_masks_of_unknown_buffers_are_named() -> None:
    """On the meta device buffers have no values: what is assumed is said."""

    def build(self: Any) -> None:
        self.register_buffer("row", torch.ones(12, dtype=torch.float64))

    model = net(lambda self, x, y: F.mse_loss(self.body(x) * self.row.expand(x.size(0), 12), y), build)
    traced = trace(model, inputs())
    analysis = analyse_batch(traced.global_graph, traced.other)
    checked, notes = check_constant(traced, analysis, {"row": torch.ones(12, device="meta")})
    assert checked.reason is None and "not checked" in notes[0]
    assert check_constant(traced, analysis, dict(model.named_buffers()))[1] == ()
