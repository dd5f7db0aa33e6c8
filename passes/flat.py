"""Flat: what a function is given, as leaves and structure.

Tuples, lists and dicts are most of it, and torch's pytree takes ten times as long for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.Size)


def flat(tree: Any) -> tuple[list[Any], Any]:
    """Leaves and structure, as ``whole`` takes it; a torch.Size is one leaf, which pytree would put together as a
    tuple."""
    leaves: list[Any] = []
    return leaves, _walk(tree, leaves)


def whole(leaves: Iterator[Any], structure: Any) -> Any:
    """What ``flat`` took apart."""
    if structure is None:
        return next(leaves)
    if isinstance(structure, pytree.TreeSpec):
        return pytree.tree_unflatten(itertools.islice(leaves, structure.num_leaves), structure)
    kind, keys, inner = structure
    parts = [whole(leaves, part) for part in inner]
    return dict(zip(keys, parts, strict=True)) if kind is dict else kind(parts)


def _walk(tree: Any, leaves: list[Any]) -> Any:
    """The structure: None for a leaf, (kind, keys, parts), or pytree's of other containers."""
    kind = type(tree)
    if kind is tuple or kind is list:
        return (kind, None, tuple(_walk(part, leaves) for part in tree))
    if kind is dict:
        return (dict, tuple(tree), tuple(_walk(part, leaves) for part in tree.values()))
    if kind in _PLAIN or isinstance(tree, Tensor) or pytree.tree_is_leaf(tree):
        leaves.append(tree)
        return None
    found, structure = pytree.tree_flatten(tree, is_leaf=lambda value: type(value) is torch.Size)
    leaves += found
    return structure
