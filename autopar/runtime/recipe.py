"""Recipes: how one tensor of a model was initialised, as plain data that any process can follow.

A recipe is a tree {"steps", "sizes", "result"}. A step is one ATen call on *storages*, numbered as they were met when
the model was built (``autopar.deferral``); where it draws random numbers it has the state that the generator was in.
So tensors can be made in any order and in any process, each as it was made on one device.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Tree = Any
REF, CONSTANT, LIST, TUPLE, NAME, GENERATOR = "ref", "constant", "list", "tuple", "name", "generator"
"""Tags of what is no plain value in a step's arguments: (REF, storage, offset, size, stride, dtype), ..."""
_NAMED = (torch.dtype, torch.layout, torch.memory_format)
_lock = threading.Lock()
"""The default generator is one for all threads."""


def packed(tree: Tree, leaf: Callable[[Tensor], Tree]) -> Tree:
    """An argument as a plain tree; leaf: what stands for a tensor. Devices are left out: replayed on the CPU."""
    if isinstance(tree, Tensor):
        return leaf(tree)
    if isinstance(tree, list | tuple):
        return (LIST if isinstance(tree, list) else TUPLE, [packed(item, leaf) for item in tree])
    if isinstance(tree, _NAMED):
        return (NAME, str(tree).removeprefix("torch."))
    if isinstance(tree, torch.Generator):
        return (GENERATOR, tree.get_state())
    if isinstance(tree, torch.device):
        return (NAME, "cpu")
    return tree


def unpacked(tree: Tree, leaf: Callable[[Tree], Tensor]) -> Tree:
    """Inverse of ``packed``."""
    if not isinstance(tree, tuple | list):
        return tree
    tag, *rest = tree
    if tag in (LIST, TUPLE):
        items = [unpacked(item, leaf) for item in rest[0]]
        return items if tag == LIST else tuple(items)
    if tag == NAME:
        return torch.device("cpu") if rest[0] == "cpu" else getattr(torch, rest[0])
    if tag == GENERATOR:
        generator = torch.Generator()
        generator.set_state(rest[0])
        return generator
    return rest[0] if tag == CONSTANT else leaf(tree)


def ref_of(tensor: Tensor, storage: int) -> Tree:
    """A place in a storage; ``size()`` is what parameters without a shape yet answer, too."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return (REF, storage, tensor.storage_offset(), list(tensor.size()), list(tensor.stride()), dtype)


def made(recipe: Tree) -> Tensor:
    """The tensor of a recipe, on the CPU; the state of torch's generator stays as it was."""
    storages: dict[int, torch.UntypedStorage] = {}

    def tensor(ref: Tree) -> Tensor:
        _, storage, offset, size, stride, dtype = ref
        if storage not in storages:
            storages[storage] = passing_memory(recipe["sizes"][storage])
        return torch.empty(0, dtype=getattr(torch, dtype)).set_(storages[storage], offset, size, stride)

    with torch.no_grad(), _own_generator():
        for step in recipe["steps"]:
            for ref, result in zip(step["outs"], run(step, tensor), strict=True):
                if ref is not None:
                    _keep(storages, ref, result, tensor)
        return tensor(recipe["result"])


def _keep(
    storages: dict[int, torch.UntypedStorage], ref: Tree, result: Tensor, tensor: Callable[[Tree], Tensor]
) -> None:
    """A new tensor as the storage that it was when the model was built, laid out as it was then."""
    _, storage, offset, _, stride, _ = ref
    if (list(result.stride()), result.storage_offset()) == (list(stride), offset):
        storages[storage] = result.untyped_storage()
    else:
        tensor(ref).copy_(result)


def run(step: Tree, tensor: Callable[[Tree], Tensor]) -> list[Tensor]:
    """The results of a step on real tensors."""
    torch.set_default_dtype(getattr(torch, step["default"]))
    if step["state"] is not None:
        torch.set_rng_state(step["state"])
    args = unpacked(step["args"], tensor)
    kwargs = {name: unpacked(value, tensor) for name, value in step["kwargs"].items()}
    results = operator(step["op"])(*args, **kwargs)
    if results is None:
        return []
    return list(results) if isinstance(results, list | tuple) else [results]


def passing_memory(nbytes: int) -> torch.UntypedStorage:
    """Memory that goes back to the system: between two large blocks malloc puts small ones, and then keeps both."""
    return torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8).untyped_storage()


def operator(name: str) -> Any:
    """The ATen op called "aten.normal_.default"."""
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


@contextmanager
def _own_generator() -> Iterator[None]:
    """torch's generator and default dtype as they were, afterwards."""
    with _lock, torch.random.fork_rng(devices=[]):
        default = torch.get_default_dtype()
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def blank(tensor: Tensor) -> Tensor:
    """The tensor; of one on the meta device its shape and dtype alone, which can be sent and takes no memory."""
    if not tensor.is_meta:
        return tensor
    one = torch.zeros((), dtype=tensor.dtype)
    return one.expand(tensor.shape) if tensor.numel() > 1 else one.new_zeros(tensor.shape)
