"""A plain PyTorch GPT: nothing in this file knows that autopar exists."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model.

    tied: the head shares the token embedding's weight. fused_qkv: one Linear for query, key and value, or three.
    attention: one fused kernel, or its parts written out.
    """

    vocab_size: int = 256
    block_size: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    tied: bool = True
    attention: Literal["fused", "explicit"] = "fused"
    fused_qkv: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        if self.attention not in ("fused", "explicit"):
            raise ValueError(f"attention must be 'fused' or 'explicit', not {self.attention!r}")


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.n_embd
        if config.fused_qkv:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self._heads(part) for part in self._project(x))
        attend = self._fused if self.config.attention == "fused" else self._explicit
        mixed = attend(query, key, value).transpose(1, 2).flatten(2)
        return self.dropout(self.out(mixed))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.config.fused_qkv:
            query, key, value = self.qkv(x).split(self.config.n_embd, dim=2)
            return query, key, value
        return self.query(x), self.key(x), self.value(x)

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, time, width] -> [batch, head, time, width of a head]."""
        return x.unflatten(2, (self.config.n_head, -1)).transpose(1, 2)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dropout = self.config.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)

    def _explicit(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        time = query.size(2)
        future = torch.ones(time, time, dtype=torch.bool, device=query.device).triu(1)
        scores = query @ key.transpose(2, 3) / math.sqrt(query.size(3))
        weights = F.softmax(scores.masked_fill(future, float("-inf")), dim=3)
        return F.dropout(weights, self.config.dropout, self.training) @ value


class MLP(nn.Module):
    """Four times wider inside, GELU between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x))))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Token and position embeddings, n_layer blocks, a final norm and a head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.n_embd)
        self.position = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._initialise)
        if config.tied:
            self.head.weight = self.token.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Mean cross-entropy (a scalar) where targets [batch, time] are given, else logits [batch, time, vocab]."""
        time = torch.arange(idx.size(1), device=idx.device)
        x = self.dropout(self.token(idx) + self.position(time))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _initialise(self, module: nn.Module) -> None:
        """Normal weights of deviation 0.02, zero biases (GPT-2's)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
