"""Fakes: tensors without elements, of a model and a batch while it is exported, and of graphs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from passes.batch_spec import BatchSpec, is_batched

_CPU = torch.device("cpu")


class _OfThread(threading.local):
    """A mode notes which kernel it is in, so that threads need one each."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()


_OF_THREAD = _OfThread()


def fake_tensor(
    shape: Sequence[int],
    dtype: torch.dtype,
    stride: Sequence[int] | None = None,
    *,
    device: torch.device = _CPU,
    mode: FakeTensorMode | None = None,
) -> FakeTensor:
    """A tensor without elements that says it is on the device; without ``stride`` contiguous.

    Whatever modes are on see nothing of it. ``torch.empty`` within a mode takes ten times as long.
    """
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        if stride is None:
            elements = torch.empty(shape, dtype=dtype, device="meta")
        else:
            elements = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return FakeTensor(mode or _OF_THREAD.mode, elements, device)


def fake_like(tensor: torch.Tensor, *, mode: FakeTensorMode | None = None) -> FakeTensor:
    """Of a tensor's size, strides, dtype and device, and no view of it; without gradient."""
    with torch._C.DisableTorchFunction():
        return fake_tensor(tensor.shape, tensor.dtype, tensor.stride(), device=tensor.device, mode=mode)


def as_parameter(tensor: FakeTensor, requires_grad: bool) -> nn.Parameter:
    """The tensor as what ``nn.Parameter`` makes of it, which copies it first."""
    tensor.requires_grad_(requires_grad)
    tensor._is_param = True
    return cast(nn.Parameter, tensor)


@contextmanager
def as_on_cpu(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """The tensors of a model on the meta device as fake ones of a CPU: its graph is that of a model with weights."""
    owners: list[dict[str, Any]] = [own for m in model.modules() for own in (m._parameters, m._buffers)]
    held = [(own, name, tensor) for own in owners for name, tensor in own.items()]
    on_meta = [(own, name, tensor) for own, name, tensor in held if tensor is not None and tensor.is_meta]
    fake = {id(tensor): _fake(tensor, mode) for _, _, tensor in on_meta}
    for own, name, tensor in on_meta:
        own[name] = fake[id(tensor)]
    try:
        yield
    finally:
        for own, name, tensor in on_meta:
            own[name] = tensor


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    made = fake_tensor(tensor.shape, tensor.dtype, tensor.stride(), mode=mode)
    return as_parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def fake_inputs(spec: BatchSpec, size: int, device: torch.device, mode: FakeTensorMode) -> Any:
    """The batch as fake tensors of ``size`` samples; each leaf its own tensor, so that none is merged with another."""
    leaves = [_resize(leaf, spec.size, size, device, mode) for leaf in spec.leaves]
    return pytree.tree_unflatten(leaves, spec.treespec)


def _resize(leaf: Any, batch: int, size: int, device: torch.device, mode: FakeTensorMode) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    shape = tuple(leaf.shape)
    if is_batched(shape, batch):
        shape = (size, *shape[1:])
    return fake_tensor(shape, leaf.dtype, device=device, mode=mode)
