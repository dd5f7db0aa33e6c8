"""What is laid over the places of masks runs as on one device, what they pick is refused with what to write; counts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from parity import check_parity, cpu_cluster
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torch.nn import functional as F
from unseen_models import BATCH, classes, normal

import autopar
from cost_model.errors import UnsupportedError
from passes.trace import trace

SGD = functools.partial(torch.optim.SGD, lr=0.1)
GRIDS = {"dp2": {"dp": 2, "tp": 1, "pp": 1}, "tp2": {"dp": 1, "tp": 2, "pp": 1}}


class Masked(nn.Module):
    """A learned token where the mask is true, nothing where it is not (``assign``); or a loss of what it picks."""

    def __init__(self, pick: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front, self.head = nn.Linear(16, 16), nn.Linear(16, 8)
        self.token = nn.Parameter(normal(16) * 0.1)
        self.pick = pick

    def forward(self, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        h = self.front(x)
        if self.pick is not None:
            return self.pick(h, mask).square().mean()
        h = h.clone()
        h[mask] = self.token
        h[mask.logical_not().logical_and(x[..., 0] > 0)] = 0
        return F.cross_entropy(self.head(h.relu().mean(1)), labels)


def batch() -> dict[str, Tensor]:
    return {"x": normal(BATCH, 10, 16), "mask": classes(2, BATCH, 10).bool(), "labels": classes(8, BATCH)}


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_laid_over_a_mask_runs_as_on_one_device(grid: str) -> None:
    check_parity(Masked(), batch(), 2, 1e-5, SGD, **GRIDS[grid])


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("grid", GRIDS)
def test_values_are_laid_over_a_mask_in_their_order(grid: str) -> None:
    class Features(Masked):
        """As many as there are places, one for all places, and single numbers."""

        def forward(self, x: Tensor, places: Tensor, labels: Tensor) -> Tensor:
            h = self.front(x)
            h[places] = self.front(x[:, 3:5]).flatten(0, 1)
            h[places.roll(1, 1)] = self.token[None]
            z = self.head(h.mean(1))
            z[places[:, :8]] = x[:, 0, :2].flatten()
            return F.cross_entropy(z, labels)

    given = batch()
    places = (torch.arange(10) + torch.arange(BATCH)[:, None]) % 4 == 1
    places = places & (places.cumsum(1) <= 2) & (torch.arange(10) < 8)
    check_parity(
        Features(), {"x": given["x"], "places": places, "labels": given["labels"]}, 2, 1e-5, SGD, **GRIDS[grid]
    )


@pytest.mark.parametrize("rows", [True, False])
def test_what_goes_to_the_places_of_a_mask_is_looked_up(rows: bool) -> None:
    class Placed(Masked):
        def forward(self, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
            places = mask.unsqueeze(-1).expand_as(x) if rows else x > 0
            return self.front(x).masked_scatter(places, self.head(x)[..., :1].expand_as(x).contiguous()).square().mean()

    graph = trace(Placed(), batch()).global_graph
    (lookup,) = [n for n in graph.nodes() if n.target is torch.ops.aten.index_select.default]
    assert graph.tensor(lookup.name).shape == ((BATCH * 10, 16) if rows else (BATCH * 160, 1))


@pytest.mark.usefixtures("thread_ranks")
def test_counts_of_a_given_length_run_as_on_one_device() -> None:
    class Balanced(nn.Module):
        """Classes are weighed by how often they are met, and by how much."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head = nn.Linear(16, 8)

        def forward(self, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
            met = torch.bincount(labels, minlength=8) + labels.bincount(weights=x[:, 0, 0].abs(), minlength=8)
            return F.cross_entropy(self.head(x.mean(1)), labels, weight=1 / (1 + met))

    check_parity(Balanced(), batch(), 2, 1e-5, SGD, **GRIDS["dp2"])


def _tokens(self: nn.Module, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """A head and three losses of the tokens that are masked, as masked language models have them."""
    h, targets = self.front(x), (x[..., :1] > 0).long().expand(-1, -1, 4).sum(-1)
    made = self.head(F.layer_norm(h[mask], (16,)))
    weights = torch.arange(1.0, 9.0)
    smooth = F.cross_entropy(made.view(-1, 8), targets[mask], weight=weights, label_smoothing=0.1)
    return (
        F.cross_entropy(made, targets[mask]) + smooth + F.mse_loss(made, x[mask][:, :8].float(), reduction="sum") / 99
    )


def _samples(self: nn.Module, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Losses of samples of two kinds, of which those of one are picked by their places."""
    each = F.cross_entropy(self.head(self.front(x).mean(1)), labels, reduction="none")
    places = torch.nonzero(labels > 3).squeeze(1)
    few = each[labels <= 3]
    scale = self.token[:1].abs().add(0.1)
    logs = (scale * (each * (labels > 3))[places]).log().mean()  # which others are at no finite slope
    return few.sum() / few.shape[0] + each[places].square().mean() + torch.masked_select(each, labels > 5).sum() + logs


def _experts(self: nn.Module, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Rows go through one of two layers, by what is found in them."""
    h, made = x.mean(1), torch.zeros(len(x), 16)
    chosen = self.head(h).argmax(1) % 2
    made[chosen == 0] = self.front(h[chosen == 0])
    places = torch.where(chosen == 1)[0]
    made = made.index_add(0, places, self.front[0](h[places]) * self.token, alpha=2)
    return F.cross_entropy(self.head(made), labels)


def _normed(self: nn.Module, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Tokens of two kinds, each scaled by layers of its own, laid back to where they were."""
    h, wide = self.front(x), mask.unsqueeze(-1)
    h = h.masked_scatter(wide, F.layer_norm(h[mask], (16,)) * self.token)
    h = h.masked_scatter((~wide).expand_as(h), F.rms_norm(h[~mask], (16,)))
    return F.cross_entropy(self.head(h.mean(1)), labels)


def _routed(self: nn.Module, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Tokens go through the two layers that are likeliest for them, by coordinates: those of both orders."""
    rows = x.flatten(0, 1)
    weights, chosen = self.head(rows).softmax(1).topk(2)
    made, hits = torch.zeros_like(rows), F.one_hot(chosen % 2, 2).permute(2, 1, 0)
    for number, layer in enumerate((self.front, self.front[0])):
        place, token = torch.where(hits[number])
        found = layer(rows[None, token].reshape(-1, 16)) * weights[token, place, None]
        made.index_add_(0, token, found)
    for number in range(3):
        token, place = torch.where(chosen == number)
        made[token] += weights[token, place, None] * self.front(rows[token])
    places = (chosen.unflatten(0, x.shape[:2]) > 5).nonzero()
    some = torch.zeros(len(x), 2).index_put((places[:, 0], places[:, 2]), x[places[:, 0], places[:, 1], 0], True)
    return F.cross_entropy(self.head(made.view_as(x).mean(1)), labels) + (some * self.token[:2]).square().mean()


def _distances(self: nn.Module, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Rows between whose parameters and sums slopes are not finite everywhere, and places that only some have."""
    h, few = self.front(x).mean(1), labels > 0
    logits = self.head(h[few])
    apart = (logits - self.head(x.mean(1)[few])).pow(2).sum(1).sqrt().mean()
    right = logits.log_softmax(1).gather(1, (labels[few] - 1).unsqueeze(1))
    return apart + (logits.sum(1) / labels[few]).square().mean() - right.mean()


def _parts(self: nn.Module, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Rows sorted by expert, each part as long as values say; all parts joined have a length that is known."""
    rows = x.flatten(0, 1)
    weights, chosen = self.head(rows).softmax(1)[:, :3].topk(2)
    order, counts = chosen.flatten().argsort(stable=True), F.one_hot(chosen, 3).sum((0, 1)).tolist()
    parts = zip(rows[order // 2].split(counts), (self.front, self.front[0], nn.Identity()), strict=True)
    made = torch.cat([layer(part) for part, layer in parts])
    made = made.view(made.shape[0], 4, 4).tanh().flatten(1) * weights.flatten()[order, None]
    first, _, _ = torch.split(made, counts)
    made = torch.zeros_like(rows).index_add(0, order // 2, made).view_as(x)
    return F.cross_entropy(self.head(made.mean(1)), labels) + first.square().mean()


def _of_one_laid_by_another(self: nn.Module, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """What one mask picks goes, in its order, to where another is true: to as many tokens of another sample."""
    there = mask.sum(1, keepdim=True).flip(0) > torch.arange(10)
    h, found = self.front(x), F.layer_norm(x[mask.flip(0)], (16,)) * self.token
    h = h.masked_scatter(there.unsqueeze(-1), found)
    kinds = torch.full_like(mask, 3, dtype=torch.long)
    kinds[there] = x.argmax(-1)[mask.flip(0)] % 8
    return F.cross_entropy(self.head(h).flatten(0, 1), kinds.flatten())


PICKING = (_tokens, _samples, _experts, _normed, _routed, _distances, _parts, _of_one_laid_by_another)


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    ("forward", "grid"),
    [
        *((forward, "dp2") for forward in PICKING),
        *((forward, "tp2") for forward in (_tokens, _experts, _parts)),
        *(pytest.param(forward, "tp2", marks=pytest.mark.slow) for forward in PICKING[1:6] if forward != _experts),
        pytest.param(_of_one_laid_by_another, "tp2", marks=pytest.mark.slow),
    ],
)
def test_what_masks_pick_and_losses_add_up_runs_as_on_one_device(forward: Callable[..., Tensor], grid: str) -> None:
    kind = type("Picked", (Masked,), {"forward": forward})
    model = kind()
    model.front = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    assert any("computed for all rows" in note for note in trace(model, batch()).notes)
    check_parity(model, batch(), 2, 1e-5, SGD, **GRIDS[grid])


@pytest.mark.usefixtures("thread_ranks")
def test_masks_that_follow_from_the_model_are_no_terms_of_a_sum() -> None:
    """Parts that replicas agree on, on links that cost nothing, where sums of masks cost no more than masks."""
    kind, shape = type("Picked", (Masked,), {"forward": _parts}), (4, 4)
    model, given = kind(), batch()
    model.front = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    free = {"latency_s": np.full(shape, 1e-12), "bandwidth_bytes_per_s": np.full(shape, 1e15)}
    cluster, pins = autopar.Cluster.from_matrix(device="cpu", **free), autopar.Parallelism(dp=2, tp=2, pp=1)
    with autopar.compile(model, cluster, given, optimizer=SGD, parallelism=pins) as exe:
        assert exe.step(given) == pytest.approx(float(model(**given).detach()), rel=1e-5)


def _columns(values: Tensor, picked: Tensor) -> Tensor:
    out = torch.zeros(3, len(values))
    out[:, picked] = values[picked]
    return out


def _laid_twice(h: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros(len(h), 16)
    token, place = torch.where(mask)
    out[token] = h[token, place]
    return out


@pytest.mark.parametrize(
    "pick",
    [
        _laid_twice,
        lambda h, mask: h[:, :5][torch.where(mask)],
        lambda h, mask: h[:, 0][mask.nonzero()[0]],
        lambda h, mask: h[mask].softmax(0),
        lambda h, mask: h[mask].t() @ h[mask],
        lambda h, mask: h[mask][1:],
        lambda h, mask: h[mask][0],
        lambda h, mask: torch.cat([h[mask], h[0]]),
        lambda h, mask: h[mask].amax(0),
        lambda h, mask: h[mask].var(0),
        lambda h, mask: h[mask].norm(),
        lambda h, mask: h[mask].cumsum(0),
        lambda h, mask: h[mask].sort(0).values,
        lambda h, mask: h[:, torch.arange(10) % 2 == 0] - h[:, :5],
        lambda h, mask: h.masked_select(mask.unsqueeze(-1)).cumsum(0),
        lambda h, mask: h[:, mask.any(0).nonzero().squeeze(1)],
        lambda h, mask: h[:, torch.unique(mask.long())],
        lambda h, mask: torch.masked_select(h[mask], h[mask] > 0).sum(),
        lambda h, mask: _columns(h.sum((1, 2)), mask.any(1)),
        lambda h, mask: torch.linalg.inv(h[mask][:, :4].view(-1, 2, 2)),
    ],
    ids=[
        *(
            "laid twice",
            "of others",
            "first place",
            "softmax",
            "product",
            "slice",
            "select",
            "cat",
            "amax",
            "var",
            "norm",
            "cumsum",
            "sort",
        ),
        *("always the same columns", "masked_select", "nonzero", "unique", "twice", "columns laid", "inverses"),
    ],
)
def test_as_many_elements_as_are_true_are_refused_with_what_to_write(pick: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)aten\.\w+.*File .*where\(mask, x, 0\.0\)\.sum\(\) / mask\.sum"):
        trace(Masked(pick), batch())


@pytest.mark.usefixtures("thread_ranks")
def test_means_of_many_half_numbers_are_counted_in_single_precision() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 40000).half()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.layer(x.half())[mask].square().mean()

    given = {"x": normal(4, 16), "mask": torch.tensor([True, False, True, True])}
    model = Half()
    with autopar.compile(model, cpu_cluster(1), given, optimizer=SGD) as exe:
        assert exe.step(given) == pytest.approx(float(model(**given).detach()), rel=1e-2)


def test_masks_of_deep_values_are_told_apart_in_linear_time() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(400):
                x = x + x * 0.001
            chosen = x.argmax(1) % 2 == 0
            return self.layer(x[chosen]).square().mean()

    assert trace(Deep(), {"x": normal(BATCH, 16)}).notes


def test_packed_sequences_are_refused_with_what_to_write() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return F.cross_entropy(self.head(self.layer(packed)[1][0][-1]), labels)

    given = {"x": normal(BATCH, 6, 16), "lengths": torch.arange(6, 6 - BATCH, -1).clamp(min=1), "labels": labels()}
    with pytest.raises(UnsupportedError, match=r"packs sequences.*padded batch.*out\.gather"):
        trace(Packed(), given)


def labels() -> Tensor:
    return classes(8, BATCH)
