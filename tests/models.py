"""Models shared by tests: small, without dropout, and their batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gpt import GPT, GPTConfig


def example_gpt(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The example GPT, two layers of width 32, and a batch of 8 x 16."""
    torch.manual_seed(0)
    given = {"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32, **changes}
    model = GPT(GPTConfig(**given)).to(dtype)
    tokens = torch.randint(0, 64, (8, 17), generator=torch.Generator().manual_seed(1))
    return model, {"idx": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def hf_gpt2(attention: str, layers: int = 2) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Hugging Face GPT-2 with some labels ignored, unevenly over the samples."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_head=4,
        n_embd=32,
        vocab_size=64,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation=attention,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 3:] = -100
    labels[5, :9] = -100
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": labels}


class Residual(nn.Module):
    """Layers of large products, gradients and activations, and few ops."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x.float().pow(2).mean()
