"""The user's batch: a dict or tuple of tensors, numbers and flags as leaves with paths; dim 0 of each is the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from cost_model.errors import BatchError

_LEAVES = (torch.Tensor, bool, int, float, str, type(None))


@dataclass(frozen=True)
class BatchSpec:
    """The structure of the user's batch: dict (kwargs) or tuple (args), its tensor leaves and batch size."""

    is_kwargs: bool
    treespec: Any
    leaves: tuple[Any, ...]
    paths: tuple[str, ...]
    size: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """Leaf path -> tensor."""
        return {p: v for p, v in zip(self.paths, self.leaves, strict=True) if isinstance(v, torch.Tensor)}


def batch_spec(inputs: Any) -> BatchSpec:
    """Structure and size of one global batch: dict (kwargs) or tuple (args), dim 0 of its tensors is the batch.

    Other mappings (Hugging Face's BatchEncoding) count as dicts, lists (of a DataLoader) as tuples. Errors: BatchError.
    """
    if not isinstance(inputs, Mapping | tuple | list):
        raise BatchError(
            f"inputs must be a dict (keyword arguments) or a tuple (positional arguments), not {type(inputs).__name__}"
        )
    inputs = dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs)
    with_paths, treespec = pytree.tree_flatten_with_path(inputs)
    paths = tuple(_path_text(path) for path, _ in with_paths)
    leaves = tuple(leaf for _, leaf in with_paths)
    _check_leaves(inputs, paths, leaves)
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
    if not sizes or sizes[0] == 0:
        what = "samples" if sizes else "tensor with a batch dim"
        raise BatchError(f"inputs hold no {what}; dim 0 of the first tensor is the batch")
    return BatchSpec(isinstance(inputs, dict), treespec, leaves, paths, int(sizes[0]))


def _check_leaves(inputs: Any, paths: tuple[str, ...], leaves: tuple[Any, ...]) -> None:
    """Refuse what neither torch.export nor a rank can take; BatchError naming the first such leaf."""
    for key in inputs if isinstance(inputs, dict) else ():
        if not isinstance(key, str):
            raise BatchError(f"inputs has the key {key!r}, but its keys are keyword arguments; use their names")
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, _LEAVES):
            raise BatchError(
                f"batch input {path!r} is a {type(leaf).__name__}; pass tensors (torch.as_tensor), numbers, strings, "
                "flags or None, in dicts, lists and tuples"
            )
    twice = next((path for place, path in enumerate(paths) if path in paths[:place]), None)
    if twice is not None:
        raise BatchError(f"two batch inputs are both called {twice!r}; use keys without dots")


def _path_text(path: tuple[Any, ...]) -> str:
    """A leaf's path as text: "input_ids", "images.0"."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def is_batched(shape: tuple[int, ...], batch: int) -> bool:
    return len(shape) > 0 and shape[0] == batch


def turned_samples(spec: BatchSpec) -> str:
    """What to do about inputs whose samples may lie along another dim than 0; nothing where there is none."""
    shapes = {path: tuple(tensor.shape) for path, tensor in spec.tensors().items()}
    turned = next((path for path, s in shapes.items() if not is_batched(s, spec.size) and spec.size in s[1:]), None)
    if turned is None:
        return ""
    return (
        f"\n  input {turned!r} is {list(shapes[turned])}, and samples are those of dim 0: if they lie along another "
        "dim, pass it transposed and transpose it in forward"
    )


def other_sizes(batch: int) -> tuple[int, ...]:
    """Batch sizes above 1 (size-1 dims look like broadcasts) to trace at, until one has the same calls.

    The least, which costs least, then the largest part, then twice the whole: what the model does for fewer samples
    than it was given (a kernel chosen by the number of rows, one group of samples) one device does not do with the
    whole batch.
    """
    if batch < 2:
        return ()
    parts = [d for d in range(2, batch) if batch % d == 0]
    return tuple(dict.fromkeys((*parts[:1], *parts[-1:], 2 * batch)))
