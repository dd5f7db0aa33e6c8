"""Batch norms that run more than once in a step, on inputs, or where no gradient flows: statistics of one device."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from parity import check_parity
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from unseen_models import BATCH, classes, normal

from cost_model.errors import UnsupportedError
from passes.trace import trace

SGD = functools.partial(torch.optim.SGD, lr=0.1)
GRIDS = {"dp2": {"dp": 2, "tp": 1, "pp": 1}, "tp2": {"dp": 1, "tp": 2, "pp": 1}, "pp2": {"dp": 1, "tp": 1, "pp": 2}}


class Twins(nn.Module):
    """One encoder sees two views of every sample and then another two: four calls of each norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(self.block() for _ in range(2)))
        self.project = nn.Linear(16, 8)
        self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    @staticmethod
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16, momentum=0.3), nn.ReLU())

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b, c, d = (self.project(self.blocks(x)) for x in (left, right, left.flip(1), 2 * right))
        return F.mse_loss(self.head(a), b) + F.mse_loss(self.head(c + a), d)


class NormedInput(nn.Module):
    """The first layer depends on no parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(16, affine=False)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.body(self.norm(x)), labels)


class Teacher(nn.Module):
    """Norms through which no gradient flows, or whose statistics other calls write to and read too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        self.norms = nn.ModuleList(nn.BatchNorm1d(16, momentum=0.1 * i + 0.1) for i in range(5))
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("variance", torch.ones(16))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        both, taught, unused, detached, moved = self.norms
        h = self.body[0](x)
        with torch.no_grad():
            target = both(h).relu() + taught(h) + taught(2 * h + 1)
        unused(h)
        with torch.no_grad():
            moved.running_mean.mul_(0.5).add_(h.mean())
        h = moved(h) + detached(h).detach() + both(h)
        h = h + F.batch_norm(h, self.mean, self.variance, training=True, momentum=0.2)
        return F.cross_entropy(self.body(h - self.mean), labels) + F.mse_loss(h, target)


class Functional(NormedInput):
    """Statistics without a counter, which alone tells that a norm writes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.num_batches_tracked = None


class Instances(nn.Module):
    """Statistics of each sample, of which running means are kept, and of a batch of which none are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True, momentum=0.3)
        self.plain = nn.BatchNorm1d(4, track_running_stats=False)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        parts = self.norm(self.body[0](x).unflatten(1, (4, 4))).square()
        return F.cross_entropy(self.body(self.plain(parts).flatten(1)), labels)


class Checkpointed(nn.Module):
    """Norms in layers that one device runs again in backward, one of them of means over all batches so far."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))
        self.second = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16, momentum=None), nn.Linear(16, 8))
        self.last = nn.BatchNorm1d(8, momentum=None)
        self.reentrant = reentrant

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        made = checkpoint(self.first, x, use_reentrant=False)
        return F.cross_entropy(self.last(checkpoint(self.second, made, use_reentrant=self.reentrant)), labels)


class Averaged(Checkpointed):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.first.register_forward_pre_hook(self.average)

    def average(self, _: nn.Module, given: tuple[Tensor]) -> None:
        self.mean.lerp_(given[0].detach().mean(0), 0.1)


class Trunk(nn.Module):
    """Layers under a checkpoint, as ``call`` says."""

    def __init__(self, call: Callable[[Trunk, Tensor], Tensor], frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front = nn.Linear(16, 16)
        self.trunk = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16, momentum=0.3), nn.ReLU())
        self.trunk.requires_grad_(not frozen)
        self.head, self.call = nn.Linear(16, 8), call
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.call(self, x)), labels)

    def average(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x.tanh()

    def inner(self, x: Tensor) -> Tensor:
        return checkpoint(self.trunk, x, use_reentrant=True).square()


RUN_ONCE: dict[str, tuple[Callable[[Trunk, Tensor], Tensor], bool]] = {
    "frozen": (lambda m, x: checkpoint(m.trunk, x, use_reentrant=False), True),
    "frozen, reentrant": (lambda m, x: m.front(checkpoint(m.trunk, x, use_reentrant=True)), True),
    "other buffers": (lambda m, x: m.front(x) + checkpoint(m.average, x, use_reentrant=True), False),
    "reentrant on data": (lambda m, x: m.front(x) + checkpoint(m.trunk[0], x, use_reentrant=True), False),
}
REFUSED: dict[str, tuple[Callable[[Trunk, Tensor], Tensor], bool, str]] = {
    "buffer": (
        lambda m, x: checkpoint(m.average, m.front(x), use_reentrant=True),
        False,
        r"changes 'mean' under torch",
    ),
    "nested": (lambda m, x: checkpoint(m.inner, m.front(x), use_reentrant=True), False, r"'trunk\.1' .*within another"),
    "plainly too": (
        lambda m, x: checkpoint(m.trunk, m.front(x), use_reentrant=False) + m.trunk(x),
        False,
        r"'trunk\.1' more than once",
    ),
    "partly frozen": (
        lambda m, x: checkpoint(lambda x: m.front(m.trunk(x)).tanh(), x, use_reentrant=False),
        True,
        r"'trunk\.1', to which nothing that trains leads",
    ),
}


def views() -> dict[str, Tensor]:
    return {"left": normal(BATCH, 16), "right": normal(BATCH, 16).roll(1, 0)}


def labelled() -> dict[str, Tensor]:
    return {"x": 3 + normal(BATCH, 16), "labels": classes(8, BATCH)}


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("grid", GRIDS)
def test_calls_of_one_norm_change_its_statistics_in_turn(grid: str) -> None:
    check_parity(Twins(), views(), 2, 1e-5, SGD, **GRIDS[grid])


@pytest.mark.usefixtures("shared_ranks")
def test_calls_of_one_norm_on_processes() -> None:
    check_parity(Twins(), views(), 2, 1e-5, SGD, dp=2, tp=1, pp=1)


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("grid", GRIDS)
def test_statistics_of_inputs_are_kept(grid: str) -> None:
    check_parity(NormedInput(), labelled(), 2, 1e-5, SGD, **GRIDS[grid])


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("grid", ["dp2", "pp2"])
def test_statistics_of_instances_are_kept(grid: str) -> None:
    check_parity(Instances(), labelled(), 2, 1e-5, SGD, **GRIDS[grid])


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("grid", ["dp2", "tp2"])
def test_statistics_of_layers_that_run_again_and_means_of_all_batches_are_kept(grid: str) -> None:
    check_parity(Checkpointed(reentrant=grid == "tp2"), labelled(), 2, 1e-5, SGD, **GRIDS[grid])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("name", RUN_ONCE)
def test_layers_that_do_not_run_again_change_buffers_once(name: str) -> None:
    check_parity(Trunk(*RUN_ONCE[name]), labelled(), 2, 1e-5, SGD, **GRIDS["dp2"])


@pytest.mark.parametrize("name", REFUSED)
def test_changes_of_layers_that_run_again_are_refused_where_they_are_others(name: str) -> None:
    call, frozen, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        trace(Trunk(call, frozen), labelled())


def test_other_buffers_of_layers_that_run_again_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"changes 'mean' under torch\.utils\.checkpoint"):
        trace(Averaged(), labelled())


def test_batches_without_running_statistics_are_normed_by_our_op() -> None:
    targets = [node.target for node in trace(Instances(), labelled()).global_graph.nodes()]
    assert torch.ops.autopar.batch_norm.default in targets


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("grid", GRIDS)
def test_statistics_that_no_gradient_brings_back_are_kept(grid: str) -> None:
    check_parity(Teacher(), labelled(), 2, 1e-4, SGD, **GRIDS[grid])


@pytest.mark.usefixtures("thread_ranks")
def test_statistics_without_a_counter_are_kept() -> None:
    check_parity(Functional(), labelled(), 2, 1e-5, SGD, **GRIDS["dp2"])
