"""What the search thinks that a stage takes is what its rewritten program takes."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from parity import ADAMW
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from autopar.options import Options
from autopar.planner.awaited import awaited_s
from autopar.planner.search import Solution
from autopar.planner.solution import Pins
from autopar.planning import Job
from autopar.tied import tied_s
from cost_model.cluster import Cluster
from cost_model.parallelism import Parallelism

CLOSE = 0.12
"""Copies that matrix multiplications make of views are not priced."""


def gpt2(tied: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    config = GPT2Config(
        n_layer=2, n_embd=1024, n_head=16, n_positions=512, vocab_size=50304, tie_word_embeddings=tied, **dropout
    )
    return GPT2LMHeadModel(config), {"input_ids": tokens(512), "labels": tokens(512)}


def t5() -> tuple[nn.Module, dict[str, Any]]:
    config = T5Config(num_layers=2, d_model=768, d_ff=2048, num_heads=12, dropout_rate=0, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), {"input_ids": tokens(512), "labels": tokens(256)}


def tokens(length: int) -> torch.Tensor:
    return torch.zeros(16, length, dtype=torch.long)


def found_for(make: Any, dtype: torch.dtype, cluster: Cluster, pins: Parallelism) -> tuple[Job, Solution]:
    with torch.device("meta"):
        model, inputs = make()
    inputs = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in inputs.items()}
    job = Job.of(model.to(dtype), cluster, inputs, Options.of(None, ADAMW, pins, None, None, None))
    found = job._searched()
    assert isinstance(found, Solution)
    return job, found


@pytest.mark.parametrize(
    ("make", "pins"),
    [
        *((gpt2, pins) for pins in ((4, 1, 1, 2), (4, 1, 1, 4), (1, 4, 1, 8), (1, 2, 2, 4))),
        (t5, (1, 2, 2, 4)),
        *(pytest.param(t5, pins, marks=pytest.mark.slow) for pins in ((4, 1, 1, 2), (4, 1, 1, 4), (1, 4, 1, 8))),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_stages_take_what_they_were_priced_at(make: Any, pins: tuple[int, int, int, int]) -> None:
    """Heads over split vocabularies, attention whose bias is learned, gradients that meet, and the first of a step."""
    dp, tp, pp, size = pins
    wanted = Parallelism(dp=dp, tp=tp, pp=pp, microbatch_size=size, zero=0, recompute="none", schedule="1f1b")
    job, found = found_for(make, torch.bfloat16, Cluster.load("dgx-a100-80gb", 4), wanted)
    for own, priced in zip(job.simulated(job.plan(found)).stages, found.stages, strict=True):
        assert own.forward_s + own.backward_s == pytest.approx(priced.time_s, rel=CLOSE)


@pytest.mark.parametrize("zero, dp, tp_axes", [(0, 1, None), (0, 2, None), (1, 2, None), (0, 1, (2, 2))])
def test_copies_of_a_parameter_are_summed_and_updated(zero: int, dp: int, tp_axes: tuple[int, int] | None) -> None:
    tp = math.prod(tp_axes or ())
    wanted = Parallelism(dp=dp, tp=tp, tp_axes=tp_axes, pp=2, zero=zero, recompute="none", schedule="1f1b")
    make = functools.partial(gpt2, tied=True)
    job, found = found_for(make, torch.float16, Cluster.load("p3.2xlarge", 2 * dp * tp), wanted)
    stages = job.simulated(job.plan(found)).stages
    lacks_s, priced_s = tied_s(job, found), max(stage.step_s for stage in found.stages)
    assert lacks_s > 0.2 * priced_s
    assert priced_s + lacks_s == pytest.approx(max(own.reduce_s + own.optimizer_s for own in stages), rel=CLOSE)


@pytest.mark.parametrize("dp, tp, pp, zero", [(1, 1, 2, 0), (4, 1, 1, 3), (2, 1, 2, 1), (1, 2, 1, 0)])
def test_the_update_needs_what_is_left_for_it(dp: int, tp: int, pp: int, zero: int) -> None:
    """PyTorch updates lists of parameters on GPUs, with a copy of all of them for a moment."""
    wanted = Parallelism(dp=dp, tp=tp, pp=pp, microbatch_size=2, zero=zero, recompute="none", schedule="1f1b")
    job, found = found_for(gpt2, torch.float16, Cluster.load("p3.8xlarge", dp * tp * pp), wanted)
    c = found.configuration
    chain = job.pinned_space().saving_chains(c.dp, c.tp, c.microbatch_size)[-1]
    for own, stage in zip(job.program(job.plan(found)).stages, found.stages, strict=True):
        needed, most = chain.update_bytes(stage.first, stage.last), 1.01 if tp == 1 else 1.25
        assert 0.99 * needed < own.step.optimizer_workspace_bytes < most * needed, "what tp leaves whole is more"


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_stages_wait_for_messages_about_as_long_as_is_thought(schedule: str) -> None:
    wanted = Parallelism(dp=1, tp=1, pp=2, microbatch_size=1, zero=0, recompute="none", schedule=schedule)
    job, found = found_for(gpt2, torch.float16, Cluster.load("p3.2xlarge", 2), wanted)
    waits_s = awaited_s(found.stages, found.configuration, Pins(schedule=schedule, window=1), [1, 1])
    step_s = job.step_s(job.plan(found))
    assert waits_s > 0.05 * found.objective_s
    assert found.objective_s + waits_s == pytest.approx(step_s, rel=CLOSE)
