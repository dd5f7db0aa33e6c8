"""Parts of a chain that are one program but for names: they price alike, and others do not count as such."""

from __future__ import annotations

from dataclasses import replace
from itertools import starmap
from typing import Any

import pytest
import torch
from parity import SGD, cpu_cluster
from torch import Tensor, nn

from autopar.alike import Outliner
from autopar.options import Options
from autopar.planning import Job, Planned
from cost_model.errors import VerificationError
from cost_model.parallelism import Parallelism
from cost_model.plan import StagePlan
from passes import stitch
from passes.joint import trace_values
from passes.pieces import piece_key
from passes.verify import verify_priced

LAYERS = 6


class Net(nn.Module):
    """Equal layers; where ``masks``, every other one scales by a triangle, the others by ones."""

    def __init__(self, masks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(LAYERS))
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            ones = torch.ones(8, 8)
            scale = ones.triu(1) if self.masks and number % 2 else ones
            x = x + torch.relu(layer(x)) @ scale
        return (x * x).mean()


def planned(masks: bool = False, **others: Any) -> tuple[Job, Planned]:
    """One layer a stage, unless others are asked for."""
    pins = Parallelism(**{"dp": 1, "tp": 1, "pp": LAYERS, "microbatch_size": 2, "schedule": "1f1b", **others})
    options = Options.of(None, SGD, pins, None, None, None)
    assert isinstance(pins.pp, int)
    own = Job.of(Net(masks), cpu_cluster(pins.pp), {"x": torch.ones(4, 8)}, options)
    return own, own.planned(own.decide(0.0))


@pytest.mark.parametrize("masks", [False, True])
def test_what_is_priced_is_what_is_linked(masks: bool) -> None:
    own, found = planned(masks)
    verify_priced(found.linked.program, own.program(found.plan))


def test_chunks_of_a_stage_are_told_apart_whatever_was_priced_before() -> None:
    """The fifth layer is its stage's second chunk of two, or its third of three: priced once, it is still but one."""
    own, found = planned(pp=2, schedule="interleaved", virtual_stages=3)
    plan = found.plan

    def joined(first: int, last: int) -> StagePlan:
        parts = plan.stages[first:last]
        choices = {key: label for part in parts for key, label in part.choices.items()}
        return StagePlan(parts[0].first_segment, parts[-1].last_segment, choices)

    assert [(part.first_segment, part.last_segment) for part in plan.stages] == [(k, k + 1) for k in range(LAYERS)]
    wider = replace(plan, virtual_stages=2, stages=tuple(starmap(joined, ((0, 2), (2, 4), (4, 5), (5, 6)))))
    for order in ((wider, plan), (plan, wider)):
        fresh = replace(own)
        for each in order:
            verify_priced(fresh.linked(each).program, fresh.program(each))


@pytest.mark.parametrize(("masks", "distinct"), [(False, 3), (True, 4)])
def test_parts_are_alike_where_they_read_the_same_ambient_values(masks: bool, distinct: int) -> None:
    """The first reads the batch, the last gives the loss; those between differ in their masks alone."""
    own, found = planned(masks)
    outliner = Outliner(own.traced, own.analysis)
    outlines = [outliner.outline(found.plan, index, frozenset()) for index in range(LAYERS)]
    assert len({segment.kind for segment in own.traced.segments}) == 3
    assert len(set(outlines)) == distinct and outlines[1] == outlines[3]


def test_choices_tell_parts_apart() -> None:
    own, found = planned()
    outliner, plan = Outliner(own.traced, own.analysis), found.plan
    other = replace(plan.stages[1], recompute=("full",))
    changed = replace(plan, stages=(plan.stages[0], other, *plan.stages[2:]))
    assert outliner.outline(changed, 1, frozenset()) != outliner.outline(plan, 1, frozenset())
    assert outliner.outline(changed, 2, frozenset()) == outliner.outline(plan, 2, frozenset())


def test_a_stage_that_runs_other_work_is_refused() -> None:
    own, found = planned()
    program = own.program(found.plan)
    first = program.stages[0]
    wrong = replace(first, step=replace(first.step, optimizer_state_bytes=first.step.optimizer_state_bytes + 1))
    with pytest.raises(VerificationError, match="stage 0 runs another program than the one that was priced"):
        verify_priced(found.linked.program, replace(program, stages=(wrong, *program.stages[1:])))


def test_what_is_ambient_is_traced_once_for_equal_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage makes ones or a triangle; all are rewritten to be priced, and again to be run."""
    asked: list[str] = []

    def counted(ambient: Any) -> Any:
        asked.append(piece_key(ambient, last=False))
        return trace_values(ambient)

    monkeypatch.setattr(stitch, "trace_values", counted)
    job, done = planned(masks=True)
    job._linker._templates = stitch.Templates()  # the suite shares them
    assert len(job._linker.link(done.plan).stages) == LAYERS
    assert 1 <= len(asked) == len(set(asked)) < LAYERS
