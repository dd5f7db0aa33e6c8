"""Sequence parallelism: between tensor-parallel regions values lie along the sequence, found or pinned."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES
from models import example_gpt
from parity import ADAMW, check_parity, cpu_cluster
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import nn

import autopar
from autopar.options import Options
from autopar.planning import Job
from cost_model.errors import ConfigError, ParallelismError
from cost_model.program import Chunk, Collective

NORMS = ("norm", "aten.rsqrt")


def gpt(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return example_gpt(dtype, n_head=4, tied=False)


MODELS = {"gpt": gpt, "llama": FAMILIES["llama"]}
LENGTH, WIDTH = 1024, 1024
SMALL = LENGTH * 16
"""Bytes: more than statistics of a row, less than an activation."""


def large_gpt() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    with torch.device("meta"):
        model, _ = example_gpt(vocab_size=4096, block_size=LENGTH, n_embd=WIDTH, n_head=16, tied=False)
        tokens = torch.zeros(4, LENGTH, dtype=torch.long)
    return model, {"idx": tokens, "targets": tokens}


def large_llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 2816}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_hidden_layers=2, use_cache=False, **sizes))
        tokens = torch.zeros(4, LENGTH, dtype=torch.long)
    return model, {"input_ids": tokens, "labels": tokens}


LARGE = {"gpt": large_gpt, "llama": large_llama}


@functools.cache
def job_of(name: str, tp: int) -> Job:
    cluster = autopar.Cluster.load("dgx-a100-80gb", num_devices=tp)
    model, batch = LARGE[name]()
    return Job.of(model, cluster, batch, Options.of(None, None, None, None, None, None))


def planned(name: str, tp: int, sequence: bool | None) -> Chunk:
    """On GPUs, a microbatch of one sample: nothing but the sequence is left to split between products."""
    job = job_of(name, tp).under(
        autopar.Parallelism(dp=1, tp=tp, pp=1, microbatch_size=1, recompute="none", sequence_parallel=sequence), None
    )
    (stage,) = job.linked(job.plan(job.solve())).program.stages
    return stage.chunks[0]


def collectives(stage: Chunk, segments: Sequence[int] | None = None) -> list[Collective]:
    """Those of activations, in these segments."""
    calls = [i for block in (stage.forward, stage.backward) for i in block.instructions]
    chosen = [i.collective for i in calls if segments is None or i.segment in segments]
    return [c for c in chosen if c is not None and c.nbytes > SMALL]


def sent_bytes(stage: Chunk, segments: Sequence[int]) -> float:
    """Activations that a rank sends, in units of (tp - 1) / tp: an all_reduce reduces and scatters, then gathers."""
    units = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}
    return sum(units[c.kind] * c.nbytes for c in collectives(stage, segments))


def kinds(stage: Chunk) -> Counter[str]:
    return Counter(c.kind for c in collectives(stage))


def norm_lengths(stage: Chunk) -> set[int]:
    """Extents of the sequence in activations that norms make."""
    calls = [i for i in stage.forward.instructions if any(name in i.op for name in NORMS)]
    return {value.meta.shape[1] for call in calls for value in call.outputs if len(value.meta.shape) == 3}


def saved_residuals(stage: Chunk) -> set[int]:
    """Bytes of the sums of residual connections that are kept for the backward."""
    sums = [i.outputs[0] for i in stage.forward.instructions if i.op == "aten.add.Tensor"]
    return {v.storage_bytes for v in sums if v.storage in stage.saved and v.meta.shape[2:] == (WIDTH,)}


@pytest.mark.parametrize(("name", "tp"), [("gpt", 2), ("gpt", 4), ("llama", 4)])
def test_norms_and_residuals_are_split_for_the_same_messages(name: str, tp: int) -> None:
    """All_gather and reduce_scatter in place of all_reduce: as many bytes travel, norms save their part."""
    split, whole = (planned(name, tp, pin) for pin in (True, False))
    assert norm_lengths(split) == {LENGTH // tp} and norm_lengths(whole) == {LENGTH}
    assert kinds(split)["all_reduce"] == 0 and kinds(split)["reduce_scatter"] > 0
    local = job_of(name, tp).space.local_model(1)
    assert local is not None
    counts = Counter(part.kind for part in local.segments)
    blocks = [i for i, part in enumerate(local.segments) if counts[part.kind] > 1][1:]
    assert 0 < sent_bytes(split, blocks) <= sent_bytes(whole, blocks)  # the first also brings in the embedding
    assert saved_residuals(split) == {LENGTH * WIDTH * 4 // tp}


@pytest.mark.parametrize("name", LARGE)
def test_the_planner_finds_it(name: str) -> None:
    free = planned(name, 4, None)
    assert kinds(free)["all_reduce"] == 0 and kinds(free)["reduce_scatter"] > 0
    assert norm_lengths(free) == {LENGTH // 4}


@pytest.mark.usefixtures("shared_ranks")
def test_gpt_runs_as_on_one_device() -> None:
    model, batch = gpt(torch.float64)
    check_parity(model, batch, 2, 1e-9, optimizer=ADAMW, tp=2, sequence_parallel=True)


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    ("name", "pins"),
    [
        ("gpt", {"tp": 4}),
        pytest.param("gpt", {"tp": 2, "dp": 2, "zero": 3}, marks=pytest.mark.slow),
        ("gpt", {"tp": 2, "pp": 2, "microbatch_size": 2, "recompute": "full"}),
        ("llama", {"tp": 4}),
        pytest.param("t5", {"tp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_models_run_as_on_one_device(name: str, pins: dict[str, Any]) -> None:
    model, batch = MODELS.get(name, FAMILIES.get(name, gpt))()
    devices = pins["tp"] * pins.get("dp", 1) * pins.get("pp", 1)
    check_parity(model, batch, devices, 1e-5, sequence_parallel=True, **pins)


def test_it_is_refused_where_there_is_no_sequence() -> None:
    model, batch = FAMILIES["recommender"]()
    with pytest.raises(ParallelismError, match="sequence_parallel=True"):
        autopar.estimate(model, cpu_cluster(2), batch, parallelism=autopar.Parallelism(tp=2, sequence_parallel=True))


def test_a_sequence_that_does_not_divide_is_named() -> None:
    """It said that the model cannot be sharded, whose degrees were all right."""
    model, batch = example_gpt(torch.float64)
    odd = {name: value[:, :15] for name, value in batch.items()}
    pins = autopar.Parallelism(dp=1, tp=2, pp=1, sequence_parallel=True)
    with pytest.raises(ParallelismError, match="tp=2 divides no sequence.*pad the sequence"):
        autopar.estimate(model, cpu_cluster(2), odd, parallelism=pins)


def test_a_plan_that_says_otherwise_is_refused() -> None:
    model, batch = gpt()
    pins = {pin: autopar.Parallelism(tp=2, sequence_parallel=pin) for pin in (True, False)}
    plan = autopar.estimate(model, cpu_cluster(2), batch, parallelism=pins[True]).plan
    with pytest.raises(ConfigError, match="but it can be"):
        autopar.estimate(model, cpu_cluster(2), batch, parallelism=pins[False], plan=plan)
