"""Time of tracing and planning, estimate-only: a 12-layer GPT on 2 nodes of 4 devices.

    python benchmarks/planning.py [--repeats 3]

Prints the wall time of ``autopar.estimate`` (imports excluded) for the example GPT and for Hugging Face GPT-2.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autopar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

BATCH, LENGTH = 32, 1024


def example_gpt() -> tuple[nn.Module, dict[str, Any]]:
    """GPT-2 small's sizes, fused attention, on the meta device."""
    from gpt import GPT, GPTConfig

    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50304, block_size=LENGTH, n_layer=12, n_head=12, n_embd=768))
        tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    return model, {"idx": tokens, "targets": tokens}


def hugging_face_gpt2() -> tuple[nn.Module, dict[str, Any]]:
    """GPT-2 small as published, dropout 0."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
        tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    return model, {"input_ids": tokens, "labels": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    cluster = autopar.Cluster.load("p3.8xlarge", num_devices=8)
    for name, make in (("example GPT", example_gpt), ("Hugging Face GPT-2", hugging_face_gpt2)):
        model, inputs = make()
        for repeat in range(repeats):
            start = time.perf_counter()
            found = autopar.estimate(model, cluster, inputs)
            seconds = time.perf_counter() - start
            plan = found.plan
            print(
                f"{name}, run {repeat + 1}: {seconds:.2f} s; dp={plan.dp} tp={plan.tp} pp={plan.pp} "
                f"microbatch {plan.microbatch_size}, step {found.step_time_s * 1e3:.0f} ms, gap {found.gap:.2%}"
            )


if __name__ == "__main__":
    main()
