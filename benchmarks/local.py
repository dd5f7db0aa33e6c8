"""Estimates held against this machine: step time and peak memory of eight models, each under several plans.

    python benchmarks/local.py [--models NAME ...] [--plans NAME ...] [--backends eager inductor] [--steps 5] [--json]

Every plan runs on two worker processes (``autopar.compare``), with every backend in turn. Errors are signed, relative
to measured. Run it with nothing else on the machine. A shared processor is some per cent faster or slower from one
minute to the next: beside each row stands how fast it is now, relative to when it was measured, and the error at that
rate. Models of Hugging Face are built from configurations; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import autopar
from autopar.calibrate_probes import all_probes
from autopar.options import BACKENDS
from autopar.runtime.pool import WorkerPool
from cost_model.device import Device

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

Made = tuple[nn.Module, dict[str, Tensor]]
TIME_MEAN, MEMORY_LARGEST = 0.08, 0.03
_RATE_KIND, _RATE_BUDGET_S = "attention", 0.008
PLANS = {
    "dp2": autopar.Parallelism(dp=2, tp=1, pp=1),
    "dp2 zero3": autopar.Parallelism(dp=2, tp=1, pp=1, zero=3),
    "tp2": autopar.Parallelism(dp=1, tp=2, pp=1),
    "pp2": autopar.Parallelism(dp=1, tp=1, pp=2),
    "auto": autopar.Parallelism(),
}


def _tokens(batch: int, length: int, vocabulary: int = 1024) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def gpt() -> Made:
    """The example's GPT, fused attention, tied head."""
    from gpt import GPT, GPTConfig

    tokens = _tokens(16, 129, 256)
    batch = {"idx": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    return GPT(GPTConfig(n_layer=4, n_embd=256)), batch


def hf_gpt2() -> Made:
    """Explicit attention and a head of 1,024 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=1024, n_positions=128, n_embd=256, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    tokens = _tokens(8, 128)
    return GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}


def llama() -> Made:
    """Grouped queries, rotary embeddings, RMS norms, a gated MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    tokens = _tokens(8, 128)
    return LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def bert() -> Made:
    """An encoder with a head over its vocabulary."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=1024, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    tokens = _tokens(8, 128)
    return BertForMaskedLM(config), {"input_ids": tokens, "labels": tokens}


def vit() -> Made:
    """Patches of images."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=64, patch_size=8, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=1024, num_labels=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 64, 64, generator=generator)
    return ViTForImageClassification(config), {"pixel_values": images, "labels": torch.arange(16)}


def t5() -> Made:
    """An encoder whose output every layer of the decoder reads."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=1024, d_model=256, d_kv=64, d_ff=1024, num_layers=2, num_heads=4, dropout_rate=0.0, use_cache=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    tokens = _tokens(8, 96)
    return T5ForConditionalGeneration(config), {"input_ids": tokens, "labels": tokens}


class Wide(nn.Module):
    """A multi-layer perceptron: products and nothing else."""

    def __init__(self, width: int = 1024, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return nn.functional.mse_loss(x, y)


def mlp() -> Made:
    """Six wide layers."""
    generator = torch.Generator().manual_seed(0)
    return Wide(), {name: torch.randn(256, 1024, generator=generator) for name in ("x", "y")}


class Residual(nn.Module):
    """Convolutions with group norms and skips."""

    def __init__(self, channels: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, channels, 3, padding=1)
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth))
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(depth))
        self.head = nn.Linear(channels, 16)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.enter(images)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = x + torch.relu(norm(convolution(x)))
        return nn.functional.cross_entropy(self.head(x.mean((2, 3))), labels)


def resnet() -> Made:
    """Images of 32 x 32."""
    generator = torch.Generator().manual_seed(0)
    return Residual(), {"images": torch.randn(16, 3, 32, 32, generator=generator), "labels": torch.arange(16)}


MODELS: dict[str, Callable[[], Made]] = {
    "gpt": gpt, "hf gpt2": hf_gpt2, "llama": llama, "bert": bert, "vit": vit, "t5": t5, "mlp": mlp, "resnet": resnet,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Seconds and bytes as measured; errors relative to them.

    rate: of the processor now, relative to when it was measured.
    """

    model: str
    plan: str
    backend: str
    step_time_s: float
    step_time_error: float
    peak_bytes: int
    peak_memory_error: float
    rate: float

    @property
    def error_at_rate(self) -> float:
        """Of the step's time, had the processor run as fast as when it was measured."""
        return (1 + self.step_time_error) / self.rate - 1


def rate(pool: WorkerPool, device: Device) -> float:
    """What ops take by the device's file over what they take now, both ranks at once, in the mean of a kind whose row
    tells all its ops within 3 %."""
    found = []
    for index, probe in enumerate(all_probes(device.products)):
        if probe.row == _RATE_KIND:
            payload = {"index": index, "library": device.products, "budget_s": _RATE_BUDGET_S}
            replies = pool.call("measure_op", payload)
            found.append(device.op_time_s(probe.cost()) / max(reply["seconds"] for reply in replies))
    return statistics.geometric_mean(found)


def measured(name: str, plan: str, backend: str, steps: int, cluster: autopar.Cluster, pool: WorkerPool) -> Row:
    """One program, run and compared."""
    before = rate(pool, cluster.devices[0])
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    exe = autopar.compile(model, cluster, batch, parallelism=PLANS[plan], backend=backend)
    try:
        found = autopar.compare(exe, batch, steps=steps)
    finally:
        exe.close()
    seconds = statistics.median(found.steps_s)
    now = statistics.fmean((before, rate(pool, cluster.devices[0])))
    errors = found.step_time_error, found.peak_memory_error
    return Row(name, plan, backend, seconds, errors[0], found.measured_peak_bytes, errors[1], now)


def summary(rows: list[Row]) -> dict[str, float]:
    """Mean size of the time errors, as they are and at the rate of the measuring; the largest memory error in size, and
    the lowest."""
    memory = [row.peak_memory_error for row in rows]
    return {
        "time_mean": statistics.fmean(abs(row.step_time_error) for row in rows),
        "time_mean_at_rate": statistics.fmean(abs(row.error_at_rate) for row in rows),
        "memory_largest": max(memory, key=abs),
        "memory_lowest": min(memory),
    }


def show(rows: list[Row]) -> None:
    table = Table("model", "plan", "backend", "step s", "time error", "rate", "at rate", "peak MiB", "memory error")
    for row in rows:
        time = (f"{row.step_time_s:.3f}", f"{row.step_time_error:+.1%}", f"{row.rate:.3f}", f"{row.error_at_rate:+.1%}")
        memory = (f"{row.peak_bytes / 2**20:.1f}", f"{row.peak_memory_error:+.2%}")
        table.add_row(row.model, row.plan, row.backend, *time, *memory)
    console, found = Console(), summary(rows)
    console.print(table)
    console.print(
        f"time: mean {found['time_mean']:.1%} of {TIME_MEAN:.0%} ({found['time_mean_at_rate']:.1%} at the rate of the "
        f"measuring); memory: largest {found['memory_largest']:+.2%} of "
        f"{MEMORY_LARGEST:.0%}, lowest {found['memory_lowest']:+.2%} of 0 %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=["dp2", "tp2", "pp2"])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["eager"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cluster = autopar.Cluster.local(2)
    cases = list(itertools.product(options.models, options.plans, options.backends))
    rows = []
    with WorkerPool(2, target="autopar.calibrate_worker:Calibrator") as pool:
        pool.call("__init__", None)
        for case in track(cases, console=Console(stderr=True), disable=not sys.stderr.isatty()):
            row = measured(*case, options.steps, cluster, pool)
            figures = f"{row.step_time_error:+.1%} ({row.error_at_rate:+.1%} at rate) {row.peak_memory_error:+.2%}"
            print(f"{' '.join(case)}: {figures}", file=sys.stderr)
            rows.append(row)
    if options.json:
        print(json.dumps({"rows": [vars(row) for row in rows], **summary(rows)}, indent=2))
    else:
        show(rows)


if __name__ == "__main__":
    main()
