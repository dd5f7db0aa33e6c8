"""PyTorch's own hand-written ways to train the example GPT on two ranks, each as its tutorial says, as a step function.

Each takes (model, batch of all ranks) and gives a function that does one step and returns the global mean loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

Step = Callable[[dict[str, Tensor]], float]


def make_optimizer(parameters: object) -> torch.optim.Optimizer:
    """The same on both sides."""
    return torch.optim.AdamW(parameters, lr=1e-3)  # type: ignore[arg-type]


def one_device(model: nn.Module) -> Step:
    """Plain PyTorch on the whole batch."""
    return _trained(model, lambda batch: batch)


def ddp(model: nn.Module) -> Step:
    """DistributedDataParallel with its default buckets."""
    return _averaged(_trained(nn.parallel.DistributedDataParallel(model), _half))


def fsdp2(model: nn.Module) -> Step:
    """ZeRO-3: ``fully_shard`` on each block and on the root."""
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    return _averaged(_trained(model, _half))


def dtensor(model: nn.Module) -> Step:
    """Megatron's split of each block: columns, then rows; embeddings and head are whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:  # type: ignore[union-attr]
        columns = {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
        rows = {name: RowwiseParallel() for name in ("attention.out", "mlp.down")}
        parallelize_module(block, mesh, {**columns, **rows, "mlp.up": ColwiseParallel()})
        config = block.attention.config
        block.attention.config = dataclasses.replace(config, n_head=config.n_head // mesh.size())
    columnwise = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, {"head": columnwise})
    return _trained(model, lambda batch: batch)


def pipelining(model: nn.Module, microbatches: int) -> Step:
    """1F1B over two stages of equally many blocks."""
    rank, stages = dist.get_rank(), dist.get_world_size()
    part = _Stage(model, rank, stages)
    stage = PipelineStage(part, rank, stages, torch.device("cpu"))
    schedule = Schedule1F1B(stage, microbatches, loss_fn=_cross_entropy)
    optimizer = make_optimizer(part.parameters())

    def step(batch: dict[str, Tensor]) -> float:
        optimizer.zero_grad()
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(batch["idx"])
        else:
            schedule.step(target=batch["targets"], losses=losses)
        optimizer.step()
        total = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        dist.all_reduce(total)
        return float(total)

    return step


class _Stage(nn.Module):
    """A contiguous part of the model's blocks, with what stands before the first or after the last."""

    def __init__(self, model: nn.Module, index: int, count: int) -> None:
        super().__init__()
        blocks = list(model.blocks)  # type: ignore[arg-type]
        share = len(blocks) // count
        self.first, self.last = index == 0, index == count - 1
        self.blocks = nn.ModuleList(blocks[index * share : None if self.last else (index + 1) * share])
        if self.first:
            self.token, self.position = model.token, model.position
        if self.last:
            self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.token(x) + self.position(torch.arange(x.size(1)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) if self.last else x


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _half(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's samples."""
    return {name: value.chunk(dist.get_world_size())[dist.get_rank()] for name, value in batch.items()}


def _trained(model: nn.Module, mine: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Step:
    optimizer = make_optimizer(model.parameters())

    def step(batch: dict[str, Tensor]) -> float:
        optimizer.zero_grad()
        loss = model(**mine(batch))
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def _averaged(step: Step) -> Step:
    """The mean over ranks of what each says, as a training loop logs it."""

    def averaged(batch: dict[str, Tensor]) -> float:
        loss = torch.tensor(step(batch), dtype=torch.float64)
        dist.all_reduce(loss)
        return float(loss) / dist.get_world_size()

    return averaged
