"""Followed: one run of a model, op by op: what depends on certain tensors, and from what its result is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary


class Followed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds what is made of some tensors, themselves too, as far as it lives, and what shares memory that such values
    were written to.

    Each tensor has a key: of the calls it is made of, of the same starting tensors. Calls that write or draw are part
    of the key of all that is made after them, since a key does not tell what else they change.
    """

    def __init__(self, sources: Iterable[Tensor], others: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._filled: set[StorageWeakRef] = set()
        self._keys: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._effects = 0
        for place, tensor in enumerate((*(sources := tuple(sources)), *others)):
            self._keys[tensor] = hash(("given", place))
        for tensor in sources:
            self._found[tensor] = None

    def finds(self, tensor: Tensor) -> bool:
        return tensor in self._found or _memory(tensor) in self._filled

    def key(self, tensor: Tensor) -> tuple[int, int]:
        """Equal for two runs that make a tensor alike and write and draw alike, whatever else they compute."""
        return self._of(tensor), self._effects

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        leaves = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
        is_found = any(self.finds(tensor) for tensor in leaves)
        call = repr(pytree.tree_map_only(Tensor, self._of, given))
        key = hash((str(func), call, torch.is_grad_enabled(), self._effects))
        made = func(*args, **given[1])
        written = _written(func, args, given[1])
        if written or torch.Tag.nondeterministic_seeded in func.tags:
            self._effects = key
        if is_found:
            self._filled.update(map(_memory, written))
        for place, leaf in enumerate((*pytree.tree_leaves(made), *written)):
            if isinstance(leaf, Tensor):
                self._keys[leaf] = hash((key, place))
                if is_found:
                    self._found[leaf] = None
        return made

    def _of(self, tensor: Tensor) -> int:
        if tensor not in self._keys:  # made of Python values, or held by a module as neither parameter nor buffer
            self._keys[tensor] = hash((str(tensor.dtype), repr(tensor.tolist())))
        key: int = self._keys[tensor]
        return key


def _memory(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call writes to."""
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    changed = [named.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in pytree.tree_leaves(changed) if isinstance(leaf, Tensor)]
