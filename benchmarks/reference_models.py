"""The transformer of the reference tables, as Megatron-LM, nnScaler and DTFM wrote it: attention not fused.

Dropout is written out with plain ops. Its mask is the result of a comparison instead of a random draw, so that what it
reads, writes and keeps is what ``torch.nn.functional.dropout`` does (plus the reading of the comparison's operand).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Extents of a GPT. vocab 0: no embedding of tokens and no head; the loss is a mean over the last activation.

    fused: scale, mask and softmax in one kernel, dropout in one and a loss in float32, as Megatron-LM has them.
    head: False for one whose loss is such a mean, though it embeds tokens (a classifier's own head costs nothing).
    """

    layers: int
    hidden: int
    heads: int
    seq: int
    vocab: int
    dropout: bool = True
    fused: bool = False
    head: bool = True


class Dropout(nn.Module):
    """Reads x, writes a mask of one byte an element and the product."""

    def forward(self, x: Tensor) -> Tensor:
        keep = x.detach() > -1e4
        return x * keep


class FusedDropout(nn.Module):
    """Reads x and writes the product; ``reference_megatron`` adds the bytes of its mask, which is kept."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.9


def _dropout(shape: Shape) -> nn.Module:
    if not shape.dropout:
        return nn.Identity()
    return FusedDropout() if shape.fused else Dropout()


class Attention(nn.Module):
    """Causal self-attention whose scores, probabilities and mask are tensors in memory."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.width, self.fused = shape.heads, shape.hidden, shape.fused
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.out = nn.Linear(shape.hidden, shape.hidden)
        self.dropout = _dropout(shape)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self._heads(part) for part in self.qkv(x).split(self.width, dim=2))
        weights = self.dropout(F.softmax(self._scores(query, key), dim=3))
        return self.out((weights @ value).transpose(1, 2).flatten(2))

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        if self.fused:
            return query @ key.transpose(2, 3)
        time = query.size(2)
        future = torch.ones(time, time, dtype=torch.bool, device=query.device).triu(1)
        return ((query * 0.125) @ key.transpose(2, 3)).masked_fill(future, -1e4)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """A pre-norm block, four times wider inside."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(shape.hidden), nn.LayerNorm(shape.hidden)
        self.attention = Attention(shape)
        self.up, self.down = nn.Linear(shape.hidden, 4 * shape.hidden), nn.Linear(4 * shape.hidden, shape.hidden)
        self.dropout = _dropout(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Embeddings, blocks, a norm and a head tied to the embedding; the output is the mean loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocab, shape.hidden)
        self.position = nn.Embedding(shape.seq, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm, self.fused = nn.LayerNorm(shape.hidden), shape.fused
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False) if shape.head else None
        if self.head is not None:
            self.head.weight = self.token.weight

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.token(idx) + self.position(torch.arange(idx.size(1), device=idx.device))
        for block in self.blocks:
            x = block(x)
        if self.head is None:
            return self.norm(x).mean()
        logits = self.head(self.norm(x)).flatten(0, 1)
        return F.cross_entropy(logits.float() if self.fused else logits, targets.flatten())


class Body(nn.Module):
    """Positions and blocks, from activations to a mean: a model without a head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(shape.seq, shape.hidden))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return x.mean()


def meta_model(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """Model and one global batch on the meta device."""
    with torch.device("meta"):
        if not shape.vocab:
            return Body(shape).to(dtype), {"x": torch.zeros(batch, shape.seq, shape.hidden, dtype=dtype)}
        tokens = torch.zeros(batch, shape.seq, dtype=torch.long)
        return GPT(shape).to(dtype), {"idx": tokens, "targets": tokens}
