"""Initial values: a rank fills what it holds of a model by following recipes and reading blocks of files.

A request is a tree {"recipes": name -> recipe, "files": name -> (file, name in it)}; a name in both is read. Beside its
shards a rank holds one whole tensor at a time where a recipe makes it, and one block where a file has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autopar.runtime.layout import Layout, Piece, held_layouts, updated_layouts
from autopar.runtime.recipe import made
from autopar.runtime.weight_file import WeightFiles

if TYPE_CHECKING:
    from autopar.runtime.held import Held

Tree = Any


def fill(rank: Held, request: Tree) -> None:
    """Give every parameter and buffer that the request names its values, in every copy that this rank has."""
    pieces: defaultdict[str, list[Piece]] = defaultdict(list)
    for name, layout, tensor in _held(rank):
        pieces[name] += layout.pieces(name, tensor)
    with torch.no_grad(), WeightFiles(request["files"]) as files:
        for name, held in pieces.items():
            if name in files:
                for piece in held:
                    piece.local.copy_(files.block(name, piece.offsets, piece.local.shape))
            elif name in request["recipes"]:
                _copy(made(request["recipes"][name]), held)


def change(rank: Held, name: str, whole: Tensor) -> None:
    """Give a parameter another value in every copy that this rank has; a master copy where it rounds to another."""
    for piece in (
        piece for held, layout, tensor in _held(rank) if held == name for piece in layout.pieces(name, tensor)
    ):
        block, local = _block(whole, piece), piece.local
        local.copy_(torch.where(local.to(block.dtype) == block, local, block.to(local.dtype)))


def _copy(whole: Tensor, pieces: list[Piece]) -> None:
    for piece in pieces:
        piece.local.copy_(_block(whole, piece))


def _block(whole: Tensor, piece: Piece) -> Tensor:
    for dim, (first, count) in enumerate(zip(piece.offsets, piece.local.shape, strict=True)):
        whole = whole.narrow(dim, first, count)
    return whole


def _held(rank: Held) -> Iterator[tuple[str, Layout, Tensor]]:
    """(name, layout, tensor) of all that holds values of the model, master copies and pieces of buckets included."""
    layouts, updated = held_layouts(rank), updated_layouts(rank)
    for held in (rank.params, rank.masters):
        for name, tensor in held.items():
            if name in layouts:
                yield name, layouts[name], tensor
    for name, tensor in rank.buffers.items():
        yield name, layouts.get(name, Layout(tuple(tensor.shape), (), writes=False)), tensor
    for name, piece in rank.parts().items():
        yield name, updated[name], piece
