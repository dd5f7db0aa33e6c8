"""Calls without a rule become the calls they are made of, and the programs of what they are made of are right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import check_parity
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, fx, nn
from torch.nn import functional as F
from unseen_models import BATCH, classes, normal

from cost_model.ops import entry_of
from passes.covariances import covariances_as_sums
from passes.graph import is_getitem
from passes.plain_forms import PLAIN_FORMS
from passes.trace import trace
from passes.unmutate import unmutate

aten = torch.ops.aten
SGD = functools.partial(torch.optim.SGD, lr=0.1)


class Model(nn.Module):
    """A layer in front, a head behind, and what is looked at between them: [b, 6, 8] to any shape."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor], part: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front, self.head, self.between = nn.Linear(8, 8), nn.LazyLinear(4), between
        self.part = nn.Identity() if part is None else part
        with torch.no_grad():
            self(normal(BATCH, 6, 8), classes(4, BATCH))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.between(self.part, self.front(x)).flatten(1)), labels)


def _bags(table: nn.Module, x: Tensor) -> Tensor:
    ids = x.detach().flatten(1).abs().mul(9).long() % 12
    return table(ids)


def _filtered(_: nn.Module, x: Tensor) -> Tensor:
    """A product of spectra, in which complex numbers are written: first, last, at a place, every other."""
    spectrum = torch.fft.rfft(x, dim=1)
    kept = torch.zeros_like(spectrum)
    kept[:, :1] = spectrum[:, :1]
    kept[:, -1:] = spectrum[:, -1:]
    kept[:, 1] = spectrum[:, 1]
    kept[:, :, ::2] = kept[:, :, ::2] * 0.5
    return torch.fft.irfft(kept, n=6, dim=1)


def _attended_columns(_: nn.Module, x: Tensor) -> Tensor:
    """Queries, keys and values that are views whose rows lie apart in memory, as attention over pixels makes them."""
    query, key, value = (x.unflatten(2, (2, 4)) * scale for scale in (1.0, 2.0, 3.0))
    heads = (part.permute(0, 2, 3, 1) for part in (query, key, value))
    return F.scaled_dot_product_attention(*heads, is_causal=True).permute(0, 3, 1, 2).flatten(2)


def _short_time(_: nn.Module, x: Tensor) -> Tensor:
    window = torch.hann_window(4) + torch.hamming_window(4, False, 0.5) + torch.kaiser_window(4)
    return torch.stft(x.flatten(1), 4, 2, window=window, return_complex=True).abs().add(0.01).log()


def _repeated(_: nn.Module, x: Tensor) -> Tensor:
    """By counts of numbers alone."""
    counts = torch.tensor([1, 2, 0, 1, 1, 2])
    twice = torch.repeat_interleave(x.repeat_interleave(counts, 1), torch.tensor([2]), 2)
    return torch.cat([twice, x[:, torch.repeat_interleave(counts)[1:]].repeat(1, 1, 2)], 1)


def _turned(_: nn.Module, x: Tensor) -> Tensor:
    """Rotary embeddings by complex numbers."""
    turn = torch.polar(torch.ones(6, 4), torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.5, 0.2, 0.1])))
    pairs = torch.view_as_complex(x.reshape(-1, 6, 4, 2)) * turn
    return torch.view_as_real(pairs).flatten(2)


def _added_products(part: nn.Module, x: Tensor) -> Tensor:
    weights = torch.addbmm(torch.eye(8), part.weight, part.weight, beta=0.5, alpha=0.1)
    bias = torch.addmv(weights[0], weights, weights[1], alpha=0.1)
    low, high = (x @ weights + bias).aminmax(dim=-1, keepdim=True)
    return x * torch.dist(weights[0], weights[1]) / (1 + high - low) + torch.pdist(weights).mean()


def _covaried(_: nn.Module, x: Tensor) -> Tensor:
    return x @ torch.vmap(lambda rows: rows.mT.cov() + rows.mT.corrcoef())(x)


def _slopes(_: nn.Module, x: Tensor) -> Tensor:
    """Second derivatives along a direction that is written."""
    along = torch.zeros_like(x)
    along[..., 0] = 1.0
    slope = functools.partial(_along, torch.tanh, along)
    return x + _along(slope, along, x)


def _along(function: Callable[[Tensor], Tensor], direction: Tensor, x: Tensor) -> Tensor:
    made: Tensor = torch.func.jvp(function, (x,), (direction,))[1]
    return made


BETWEEN: dict[str, Callable[[], Model]] = {
    "lstm": lambda: Model(lambda r, x: r(x)[0], nn.LSTM(8, 8, batch_first=True, bidirectional=True)),
    "gru": lambda: Model(lambda r, x: r(x.transpose(0, 1))[1][-1], nn.GRU(8, 8, 2)),
    "state": lambda: Model(lambda r, x: r(x[:, 0], x.new_zeros(x.shape[0], 8)), nn.GRUCell(8, 8)),
    "bag_mean": lambda: Model(_bags, nn.EmbeddingBag(12, 8, padding_idx=3)),
    "bag_max": lambda: Model(_bags, nn.EmbeddingBag(12, 8, mode="max", padding_idx=3)),
    "spectrum": lambda: Model(_filtered),
    "complex": lambda: Model(_turned),
    "columns": lambda: Model(_attended_columns),
    "windows": lambda: Model(_short_time),
    "bilinear": lambda: Model(lambda b, x: b(x[:, 0], x[:, 1]), nn.Bilinear(8, 8, 8)),
    "matrices": lambda: Model(lambda _, x: torch.linalg.solve(x @ x.mT + torch.eye(6), x)),
    "distances": lambda: Model(lambda _, x: torch.cdist(x, x[:, :2])),
    "repeated": lambda: Model(_repeated),
    "covariances": lambda: Model(_covaried),
    "slopes": lambda: Model(_slopes),
    "products": lambda: Model(_added_products, nn.Bilinear(8, 8, 8, bias=False)),
    "norms": lambda: Model(lambda _, x: x / torch.linalg.vector_norm(x, 3, -1, keepdim=True)),
    "mapped": lambda: Model(lambda _, x: torch.vmap(lambda row: row.tanh() + 0.1 * row.norm())(x)),
    "empty_cat": lambda: Model(lambda _, x: torch.cat([torch.tensor([]), x], -1)),
    "rounded": lambda: Model(lambda _, x: torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127)),
    "expand_as": lambda: Model(lambda _, x: x * x[:, :1].expand_as(x)),
}


LONG = {("lstm", 2, 1), ("lstm", 1, 2), ("gru", 1, 2)}
"""Recurrent layers are many calls each; tests/test_unseen.py has one that is cut along tp."""
CASES = [
    pytest.param(*case, marks=pytest.mark.slow) if case in LONG else case
    for case in ((name, *degrees) for name in BETWEEN for degrees in ((2, 1), (1, 2)))
]


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(("name", "dp", "tp"), CASES)
def test_what_calls_are_made_of_runs_as_on_one_device(name: str, dp: int, tp: int) -> None:
    batch = {"x": normal(BATCH, 6, 8), "labels": classes(4, BATCH)}
    check_parity(BETWEEN[name](), batch, 2, 1e-4, SGD, dp=dp, tp=tp, pp=1, microbatch_size=4)


@pytest.mark.parametrize("weights", [{}, {"correction": 0}, {"aweights": torch.rand(7)}])
def test_covariances_are_those_of_torch(weights: dict[str, Any]) -> None:
    rows, often = torch.randn(3, 7, dtype=torch.cfloat), torch.randint(1, 4, (7,))
    with covariances_as_sums():
        found = [rows.cov(**weights), rows.real.cov(fweights=often, **weights), rows.real[0].cov(), rows.corrcoef()]
    expected = [rows.cov(**weights), rows.real.cov(fweights=often, **weights), rows.real[0].cov(), rows.corrcoef()]
    torch.testing.assert_close(found, expected)


STEPS = torch.linspace(-5, 4.75, 40).repeat(2, 1)
"""Values in the middle between two steps, and out of range."""
FORMS: dict[Any, tuple[Any, ...]] = {
    aten.fake_quantize_per_tensor_affine_cachemask.default: (STEPS, 0.5, 3, -8, 7),
    aten.fake_quantize_per_channel_affine_cachemask.default: (
        STEPS, torch.tensor([0.5, 0.25]), torch.tensor([1, -3], dtype=torch.int32), 0, -8, 7,
    ),
    aten.multilabel_margin_loss_forward.default: (STEPS[:, ::10], torch.tensor([[1, 3, -1, 2], [-1, 0, 0, 0]]), 0),
    aten.sinc.default: (STEPS,),
    aten._weight_norm_interface.default: (STEPS[0] + 6, STEPS[1]),
    aten.addmv.default: (STEPS[0, :2], STEPS, STEPS[0]),
    aten._pdist_forward.default: (STEPS.view(8, 10).sin(), 1.5),
}  # fmt: skip


@pytest.mark.parametrize("op", FORMS, ids=str)
def test_plain_forms_are_what_kernels_make(op: Any) -> None:
    x, *rest = FORMS[op]
    results, gradients = [], []
    for call in (op, PLAIN_FORMS[op]):
        given = x.clone().requires_grad_()
        made = call(given, *rest)
        results.append(made)
        value = made[0] if isinstance(made, tuple) else made
        gradients += torch.autograd.grad((value * torch.arange(1.0, value.numel() + 1).view_as(value)).sum(), given)
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", BETWEEN)
def test_nothing_without_a_rule_is_left(name: str) -> None:
    graph = trace(BETWEEN[name](), {"x": normal(BATCH, 6, 8), "labels": classes(4, BATCH)}).global_graph
    assert [str(n.target) for n in graph.nodes() if not is_getitem(n) and entry_of(str(n.target)) is None] == []


def test_what_torch_says_of_kernels_is_not_said_of_a_trace(recwarn: pytest.WarningsRecorder) -> None:
    trace(BETWEEN["expand_as"](), {"x": normal(BATCH, 6, 8), "labels": classes(4, BATCH)})
    assert [str(w.message) for w in recwarn if "TF32" in str(w.message)] == []


@pytest.mark.usefixtures("thread_ranks")
def test_a_number_added_to_the_loss_is_added_once() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.out = nn.Linear(8, 4)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            loss = 0
            for place in range(2):
                loss = loss + F.cross_entropy(self.out(x[:, place]), labels)
            return loss + 0.5

    batch = {"x": normal(BATCH, 6, 8), "labels": classes(4, BATCH)}
    check_parity(Summed(), batch, 2, 1e-4, SGD, dp=2, tp=1, pp=1, microbatch_size=2)


def test_writes_into_a_slice_are_laid_into_the_whole() -> None:
    def part(x: Tensor) -> Tensor:
        y = x * 2
        y[:, 1:3].mul_(3)
        return y + 1

    with torch._subclasses.FakeTensorMode():
        graph = torch.fx.experimental.proxy_tensor.make_fx(part)(torch.empty(4, 6)).graph
    unmutate(graph)
    x = torch.randn(4, 6)
    assert torch.equal(fx.GraphModule({}, graph)(x), part(x))
