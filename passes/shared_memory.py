"""Shared memory: registered tensors of a model that are several and lie in the same memory.

On one device a change of one is a change of the others; ranks hold each by itself. A parameter that is registered
under several names is one tensor, and none of these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor, nn

from cost_model.errors import UnsupportedError


def check_memory(model: nn.Module) -> None:
    """UnsupportedError where a parameter that trains shares elements with another parameter or a buffer."""
    for first, last in sharing(model):
        if any(name in dict(model.named_parameters()) and tensor.requires_grad for name, tensor in (first, last)):
            raise _refusal(first[0], last[0])


def check_buffers(model: nn.Module) -> None:
    """The same for any that share; asked where a trace failed, which it does where such are written to."""
    for (first, _), (last, _) in sharing(model):
        raise _refusal(first, last)


def sharing(model: nn.Module) -> Iterator[tuple[tuple[str, Tensor], tuple[str, Tensor]]]:
    """Pairs of names and tensors, different objects that have an element in common."""
    memories: defaultdict[tuple[bool, int], list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout is torch.strided and tensor.numel():
            storage = tensor.untyped_storage()
            memories[tensor.is_meta, storage._cdata if tensor.is_meta else storage.data_ptr()].append((name, tensor))
    for members in memories.values():
        for first, last in combinations(members, 2):
            if _overlap(first[1], last[1]):
                yield first, last


def _overlap(first: Tensor, last: Tensor) -> bool:
    (begin, end), (other, until) = _span(first), _span(last)
    if end <= other or until <= begin:
        return False
    touched = torch.zeros(max(end, until), dtype=torch.bool)
    _bytes_of(first, touched).fill_(True)
    return bool(_bytes_of(last, touched).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """Bytes of the storage, from the first to behind the last."""
    size, begin = tensor.element_size(), int(tensor.storage_offset())
    reach = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin * size, (begin + int(reach) + 1) * size


def _bytes_of(tensor: Tensor, memory: Tensor) -> Tensor:
    """A tensor's bytes in a memory of one element a byte."""
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    return memory.as_strided((*tensor.shape, size), (*strides, 1), tensor.storage_offset() * size)


def _refusal(first: str, last: str) -> UnsupportedError:
    return UnsupportedError(
        f"{first!r} and {last!r} are different tensors in the same memory, where a change of one changes the other: "
        "register one tensor under both names (b.weight = a.weight, not b.weight.data = a.weight.data), or copy it "
        "(.clone())"
    )
