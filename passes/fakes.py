"""Fakes: what stands for the tensors of a model and a batch while it is exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from passes.batch_spec import BatchSpec, is_batched


@contextmanager
def as_on_cpu(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """The tensors of a model on the meta device as fake ones of a CPU: its graph is that of a model with weights."""
    owners: list[dict[str, Any]] = [own for m in model.modules() for own in (m._parameters, m._buffers)]
    held = [(own, name, tensor) for own in owners for name, tensor in own.items()]
    on_meta = [(own, name, tensor) for own, name, tensor in held if tensor is not None and tensor.is_meta]
    with mode:
        fake = {id(tensor): _fake(tensor) for _, _, tensor in on_meta}
    for own, name, tensor in on_meta:
        own[name] = fake[id(tensor)]
    try:
        yield
    finally:
        for own, name, tensor in on_meta:
            own[name] = tensor


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def fake_inputs(spec: BatchSpec, size: int, device: torch.device, mode: FakeTensorMode) -> Any:
    """The batch as fake tensors of ``size`` samples; each leaf its own tensor, so that none is merged with another."""
    with mode:
        leaves = [_resize(leaf, spec.size, size, device) for leaf in spec.leaves]
    return pytree.tree_unflatten(leaves, spec.treespec)


def _resize(leaf: Any, batch: int, size: int, device: torch.device) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    shape = tuple(leaf.shape)
    if is_batched(shape, batch):
        shape = (size, *shape[1:])
    return torch.empty(shape, dtype=leaf.dtype, device=device)
