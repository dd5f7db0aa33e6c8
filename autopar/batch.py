"""Batch: whether a batch is what the plan was made for, asked before any rank sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from cost_model.errors import BatchError
from passes.batch_spec import BatchSpec, batch_spec, is_batched
from passes.random_vocabulary import RANDOM_STATE, SAMPLES

_STREAMS = 2
"""Numbers of steps: even for training, odd for evaluation, which so leaves what training draws as it is."""
_DROP_LAST = "have the DataLoader leave out what is left at an epoch's end (drop_last=True), or "
_NEXT = "compile again with this batch as inputs"


def check_batch(found: BatchSpec, planned: BatchSpec) -> None:
    """BatchError naming the first input that differs: its name, its shape and dtype, or its plain value.

    Numbers, strings, flags and None are part of the traced program.
    """
    if found.is_kwargs != planned.is_kwargs:
        given, wanted = _kind(found), _kind(planned)
        raise BatchError(f"the batch is a {given} but the plan was made for a {wanted}; pass a {wanted}, or {_NEXT}")
    _check_names(found, planned)
    leaves = dict(zip(planned.paths, planned.leaves, strict=True))
    for path, leaf in zip(found.paths, found.leaves, strict=True):
        if isinstance(leaf, Tensor):
            _check_has_values(path, leaf)
        if _described(leaf) != _described(leaves[path]):
            differs = f"batch input {path!r} is {_described(leaf)} but the plan is for {_described(leaves[path])}"
            is_smaller = isinstance(leaf, Tensor) and found.size < planned.size
            raise BatchError(f"{differs}; {_DROP_LAST if is_smaller else ''}{_NEXT}")


def rows_of_replica(planned: BatchSpec, dp: int) -> BatchSpec:
    """The spec of one replica's part of a global batch: its share of every leaf that holds samples."""
    leaves = tuple(
        torch.empty((leaf.shape[0] // dp, *leaf.shape[1:]), dtype=leaf.dtype, device="meta")
        if isinstance(leaf, Tensor) and is_batched(tuple(leaf.shape), planned.size)
        else leaf
        for leaf in planned.leaves
    )
    return replace(planned, leaves=leaves, size=planned.size // dp)


def random_leaves(seed: int, step: int, samples: range, *, evaluates: bool) -> dict[str, Tensor]:
    """What random calls start from: the seed and the step; and the numbers of the samples in the global batch."""
    return {
        RANDOM_STATE: torch.tensor([seed, _STREAMS * step + evaluates]),
        SAMPLES: torch.arange(samples.start, samples.stop),
    }


def _kind(spec: BatchSpec) -> str:
    return "dict" if spec.is_kwargs else "tuple"


def _check_names(found: BatchSpec, planned: BatchSpec) -> None:
    missing = [path for path in planned.paths if path not in found.paths]
    extra = [path for path in found.paths if path not in planned.paths]
    if missing or extra:
        parts = [("lacks", missing), ("has unplanned", extra)]
        text = " and ".join(f"{verb} {', '.join(map(repr, names))}" for verb, names in parts if names)
        raise BatchError(f"the batch {text}; pass what the plan was made for, or {_NEXT}")


def _check_has_values(path: str, tensor: Tensor) -> None:
    if tensor.is_meta or isinstance(tensor, FakeTensor) or tensor.layout is not torch.strided:
        what = "sparse" if tensor.layout is not torch.strided else "on the meta device and has no values"
        raise BatchError(f"batch input {path!r} is {what}; pass a dense tensor with values")


def _described(leaf: Any) -> str:
    """What of a leaf is part of the program: "float32[8, 16]" of a tensor, the whole of anything else."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return f"{type(leaf).__name__} {leaf!r}" if leaf is not None else "None"


def joined_batches(batch: Any, replica: int, from_all: Callable[[Any], list[Any]]) -> tuple[Any, range]:
    """The batches of all replicas as one, and which of its samples are those of this replica.

    from_all: what each process has, in order. Errors: BatchError where replicas pass other things.
    """
    own = batch_spec(batch)
    mine = replica, own.size, own.paths, [v.cpu() if isinstance(v, Tensor) else v for v in own.leaves]
    parts = dict(sorted({found[0]: found[1:] for found in reversed(from_all(mine))}.items()))
    if any((paths, _kinds(leaves)) != (own.paths, _kinds(own.leaves)) for _, paths, leaves in parts.values()):
        raise BatchError(
            "replicas have passed batches that differ in more than samples; pass the same leaves everywhere"
        )
    sizes = [size for size, _, _ in parts.values()]
    columns = zip(*(leaves for _, _, leaves in parts.values()), strict=True)
    joined = [_joined(values, sizes[0]) for values in columns]
    start = sum(sizes[:replica])
    return pytree.tree_unflatten(joined, own.treespec), range(start, start + own.size)


def _joined(values: Sequence[Any], size: int) -> Any:
    """A leaf of all replicas: their samples one after the other, or what is no sample's."""
    first = values[0]
    return torch.cat(list(values)) if isinstance(first, Tensor) and is_batched(first.shape, size) else first


def _kinds(leaves: Sequence[Any]) -> list[Any]:
    """What leaves of all replicas must have in common."""
    return [(v.dtype, v.shape[1:]) if isinstance(v, Tensor) else v for v in leaves]
