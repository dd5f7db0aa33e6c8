"""A transformer block as aten ops, run and priced op by op inside a rank; used by test_calibrate."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.calibrate_worker import op_call
from cost_model.ops import price_of

BATCH, LENGTH, WIDTH, HEADS, VOCABULARY = 8, 128, 256, 4, 256


class Block(nn.Module):
    """Embeddings, one block, and a head with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(LENGTH))
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.view(BATCH, LENGTH, HEADS, -1).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(BATCH, LENGTH, WIDTH))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        logits = self.head(self.norms[2](x))
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1))


def joint_graph() -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Forward and backward as one straight line of aten ops, and its inputs."""
    block = Block()
    names, values = zip(*block.named_parameters(), strict=True)

    def joint(parameters: list[Tensor], ids: Tensor, targets: Tensor) -> list[Tensor]:
        leaves = [p.detach().requires_grad_() for p in parameters]
        loss = torch.func.functional_call(block, dict(zip(names, leaves, strict=True)), (ids, targets))
        return [loss, *torch.autograd.grad(loss, leaves)]

    ids, targets = (torch.randint(VOCABULARY, (BATCH, LENGTH)) for _ in range(2))
    inputs = (list(values), ids, targets)
    graph = make_fx(joint)(*inputs)
    graph.graph.eliminate_dead_code()
    return graph, inputs


class _Pricer(fx.Interpreter):
    """Runs the graph once and asks the op table for the cost of every call."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.costs: list[dict[str, Any]] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if isinstance(target, torch._ops.OpOverload):
            cost = price_of(op_call(target, args, kwargs, result))
            if cost is not None:
                self.costs.append(dataclasses.asdict(dataclasses.replace(cost, op=str(target))))
        return result


class BlockRank:
    """One rank that runs the block as others do."""

    def __init__(self, *, rank: int, world_size: int, payload: Any) -> None:
        torch.manual_seed(rank)
        self._graph, self._inputs = joint_graph()

    def costs(self, payload: Any) -> list[dict[str, Any]]:
        pricer = _Pricer(self._graph)
        pricer.run(*self._inputs)
        return pricer.costs

    def seconds(self, payload: Mapping[str, int]) -> float:
        """Median CPU seconds of one run, all ranks at once."""
        samples = []
        for _ in range(payload["runs"]):
            dist.barrier()
            start = time.thread_time()
            self._graph(*self._inputs)
            samples.append(time.thread_time() - start)
        return statistics.median(samples[payload["runs"] // 4 :])
