"""Stages of many equal blocks: a few are rewritten, and the others' price is theirs, value for value."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity import SGD, cpu_cluster
from torch import Tensor, nn

from autopar.options import Options
from autopar.planning import Job
from autopar.uneven import cut_at
from cost_model.cluster import Cluster
from cost_model.parallelism import Parallelism
from gpt import GPT, GPTConfig
from passes.families import Families, UnlikeError
from passes.relabel import relabelled
from passes.verify import verify_priced

BLOCKS = 11


class Layer(nn.Module):
    """A residual block. mask: whether it reads a buffer of its own; drop: whether it drops some of what it adds."""

    def __init__(self, width: int = 16, mask: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, width), nn.Linear(width, 8)
        self.drop = nn.Dropout(drop)
        if mask:
            self.register_buffer("mask", torch.ones(8, 8).tril())

    def forward(self, x: Tensor) -> Tensor:
        made = self.down(torch.relu(self.up(self.norm(x))))
        if hasattr(self, "mask"):
            made = made @ self.mask[:, :8]
        return x + self.drop(made)


class Statistics(nn.Module):
    """A block whose buffers a step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.linear(x)))


class Deep(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.first, self.layers, self.last = nn.Linear(4, 8), nn.ModuleList(layers), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return (self.last(x) ** 2).mean()


class Gated(Deep):
    """Every layer's result times a value that is carried past all of them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self.gate = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.first(x), torch.tanh(self.gate(x))
        for layer in self.layers:
            x = x + gate * layer(x)
        return (self.last(x) ** 2).mean()


class Down(Deep):
    """As many layers down as up, each of which takes what one of the former made: as a U-Net."""

    def forward(self, x: Tensor) -> Tensor:
        x, skips, half = self.first(x), [], len(self.layers) // 2
        for layer in self.layers[:half]:
            x = layer(x)
            skips.append(x)
        for layer in self.layers[half:]:
            x = layer(x + skips.pop())
        return (self.last(x) ** 2).mean()


def priced(layers: list[nn.Module], make: type[Deep] = Deep, **pins: Any) -> Job:
    """A deep model under pins, what blocks gather in them, after its program has been held against what was priced."""
    found = Parallelism(
        **{"dp": 1, "tp": 1, "pp": 1, "microbatch_size": 2, "schedule": "1f1b", "overlap": False, **pins}
    )
    assert isinstance(found.dp, int) and isinstance(found.tp, int) and found.pp
    cluster = cpu_cluster(found.dp * found.tp * found.pp)
    job = Job.of(make(layers), cluster, {"x": torch.ones(8, 4)}, Options.of(None, SGD, found, None, None, None))
    plan = job.decide(0.0).plan
    linked, program = job.linked(plan).program, job.program(plan)
    verify_priced(linked, program)
    peaks = [[peak.memory for peak in job._program_peaks(each)] for each in (linked, program)]
    assert peaks[0] == peaks[1]
    return job


def repeats(job: Job) -> list[bool]:
    """Of each stage that was priced, whether it was made from a few of its blocks, whose names were moved on."""
    codes = job._linker._codes.values()
    return [any("~" in v.name for i in code.forward.instructions for v in i.outputs) for code in codes]


@pytest.mark.parametrize(
    "pins",
    [
        {},
        {"dp": 2, "zero": 1},
        {"dp": 2, "zero": 2},
        {"dp": 2, "zero": 3},
        {"tp": 2, "recompute": "selective"},
        {"dp": 2, "tp": 2, "zero": 3, "recompute": "full"},
        {"dp": 2, "zero": 3, "overlap": True},
        {"dp": 2, "tp": 2, "zero": 3, "recompute": "selective", "overlap": True},
    ],
)
def test_blocks_left_out_cost_what_they_cost_when_made(pins: dict[str, Any]) -> None:
    job = priced([Layer() for _ in range(BLOCKS)], **pins)
    assert set(repeats(job)) == {True}


@pytest.mark.parametrize("pins", [{"schedule": "zero_bubble"}, {"schedule": "interleaved", "virtual_stages": 2}])
def test_blocks_of_several_stages(pins: dict[str, Any]) -> None:
    parts = 2 * pins.get("virtual_stages", 1)
    job = priced([Layer() for _ in range(parts * BLOCKS)], pp=2, zero=0, **pins)
    assert all(repeats(job))


@pytest.mark.parametrize("pins", [{"pp": 2}, {"dp": 2, "tp": 2, "zero": 3, "recompute": "selective"}])
def test_blocks_past_which_a_value_is_carried(pins: dict[str, Any]) -> None:
    """It is made with parameters: its gradient is the sum of what all blocks give to it."""
    assert all(repeats(priced([Layer() for _ in range(2 * BLOCKS)], Gated, **pins)))


def test_blocks_that_give_values_to_others_than_the_next_are_made_as_they_are() -> None:
    assert not any(repeats(priced([Layer() for _ in range(2 * BLOCKS)], Down, pp=2)))


@pytest.mark.parametrize(
    "pins",
    [
        {},
        {"tp": 2},
        {"dp": 2, "zero": 3},
        {"dp": 2, "zero": 3, "overlap": True},
        {"dp": 2, "zero": 3, "overlap": True, "recompute": "selective"},
        {"dp": 2, "zero": 2, "overlap": True, "recompute": "full"},
    ],
)
def test_blocks_of_two_kinds_by_turns_or_one_after_the_other(pins: dict[str, Any]) -> None:
    assert set(repeats(priced([Layer(16 + 8 * (n % 2)) for n in range(2 * BLOCKS)], **pins))) == {True}
    assert set(repeats(priced([Layer(16 + 8 * (n >= BLOCKS)) for n in range(2 * BLOCKS)], **pins))) == {True}


@pytest.mark.parametrize("levels", [("none", "full"), ("full", "selective")])
def test_blocks_that_recompute_otherwise_from_the_middle_on(levels: tuple[str, str]) -> None:
    """What a block saves stands beside what the block after it does, whose own is that of the next run."""
    width, count = 512, 18
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=512, block_size=width, n_layer=count, n_head=8, n_embd=width)).half()
    batch = {name: torch.zeros(4, width, dtype=torch.long) for name in ("idx", "targets")}
    pins = Parallelism(dp=2, tp=4, pp=1, zero=3, overlap=True)
    options = Options.of(None, SGD, pins, "1000GiB", None, None)
    job = Job.of(model, Cluster.load("dgx-a100-80gb", 8), batch, options)
    plan = job.decide(0.0).plan
    (stage,) = plan.stages
    half = stage.last_segment // 2
    other = replace(stage, recompute=(levels[0],) * half + (levels[1],) * (stage.last_segment - half))
    plan = replace(plan, stages=(other,))
    verify_priced(job.linked(plan).program, job.program(plan))
    assert set(repeats(job)) == {True}


@pytest.mark.parametrize("layer", [lambda: Layer(mask=True), lambda: Layer(drop=0.5), Statistics])
def test_blocks_with_buffers_and_draws_of_their_own(layer: Any) -> None:
    assert repeats(priced([layer() for _ in range(BLOCKS)], dp=2, zero=1, microbatch_size=4)) == [True]


def test_one_that_is_different_is_made_as_it_is() -> None:
    """In the middle of what would be left out."""
    layers: list[nn.Module] = [Layer(24 if n == BLOCKS // 2 else 16) for n in range(BLOCKS)]
    assert repeats(priced(layers)) == [False]


def test_blocks_that_share_parameters_are_priced_right() -> None:
    """One layer used many times, and two layers by turns."""
    one, two = Layer(), Layer()
    priced([one] * BLOCKS)
    priced([one, two] * BLOCKS)


def test_few_blocks_are_made_as_they_are() -> None:
    assert repeats(priced([Layer() for _ in range(4)])) == [False]


def test_names_move_on_block_by_block() -> None:
    """Three blocks left out between b and c; what a block reads of the one before moves with it."""
    names = Families(3)
    names.link(("a", "b", "c"))
    assert [names.renamed(by)("b") for by in range(5)] == ["b", "b~1", "b~2", "b~3", "c"]
    assert [names.renamed(by)("a") for by in range(5)] == ["a", "b", "b~1", "b~2", "b~3"]
    assert names.renamed(2)("of no block") == "of no block"
    assert [names.beside()(name) for name in "abc"] == ["a", "b", "c"]


def test_names_that_do_not_move_on_together_are_refused() -> None:
    names = Families(3)
    names.link(("a", "b", "c"))
    for row in (("a", "b", "d"), ("a", "a", "b"), ("c", "b", "a"), ("b", "b", "b")):
        with pytest.raises(UnlikeError):
            names.copy().link(row)


@pytest.mark.parametrize("pins", [{"zero": 0}, {"zero": 3, "tp": 2}, {"schedule": "zero_bubble"}])
def test_stages_that_differ_in_names_and_length_are_made_once(pins: dict[str, Any]) -> None:
    """Four stages of ten blocks or more, of which the two in the middle are alike but for how many they are."""
    job = priced([Layer() for _ in range(4 * BLOCKS)], pp=4, dp=2, **pins)
    plan = next(iter(job._programs))
    ends = [part.last_segment for part in plan.stages]
    found = job.solve()
    other = job.plan(cut_at(found, (ends[0], ends[1] + 2, *ends[2:])))
    made = len(job._linker._made.known)
    verify_priced(job.linked(other).program, job.program(other))
    assert len(job._linker._made.known) == made == 3


def test_stages_that_differ_in_how_state_is_split_are_made_once() -> None:
    """Whole optimizer state, or a part of it on each replica: what runs per microbatch is the same."""
    job = priced([Layer() for _ in range(BLOCKS)], dp=2, zero=0)
    pins = job.options.parallelism
    for zero, made in ((1, 1), (2, 2)):
        plan = job.under(replace(pins, zero=zero), None).decide(0.0).plan
        verify_priced(job.linked(plan).program, job.program(plan))
        assert len(job._linker._made.known) == made


def test_stages_whose_gradients_add_up_are_made_apart_from_those_of_one_microbatch() -> None:
    job = priced([Layer() for _ in range(4 * BLOCKS)], dp=2, pp=2, zero=0, microbatch_size=4)
    pins = job.options.parallelism
    plan = job.under(replace(pins, dp=1, pp=4), None).decide(0.0).plan
    verify_priced(job.linked(plan).program, job.program(plan))


def test_names_that_a_code_has_for_something_else_are_not_given() -> None:
    job = priced([Layer() for _ in range(BLOCKS)])
    ((model, code),) = job._linker._made.known.values()
    assert relabelled(code, model, model) is code
    taken = code.forward.instructions[0].outputs[0].name
    first, *others = (i for i in model.inputs if i.kind == "parameter")
    inputs = (replace(first, node=taken), *others)
    renamed = SimpleNamespace(inputs=tuple(inputs + model.inputs[len(inputs) :]), nodes=model.nodes)
    assert relabelled(code, model, renamed) is None
