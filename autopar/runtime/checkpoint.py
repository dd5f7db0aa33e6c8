"""A rank's part of a checkpoint: its shards in torch.distributed.checkpoint's files, where any plan finds its own.

Every tensor is written under the model's own name as blocks of the whole tensor, so that it does not matter which
ranks of which plan wrote it: "model/<parameter>", "optimizer/<parameter>/<state>".
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from autopar.runtime.layout import Layout, Piece, held_layouts, updated_layouts
from cost_model.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from autopar.runtime.held import Held

Tree = Any


def save(rank: Held, folder: str) -> None:
    """Write what this rank is the writer of; all ranks take part, and the metadata is written last."""
    pieces = [p for key, layout, tensor in _held(rank) if layout.writes for p in layout.pieces(key, tensor)]
    with _told(folder, "written"):
        save_state({}, storage_writer=FileSystemWriter(folder), planner=_Writer(pieces))


def load(rank: Held, folder: str, states: Tree) -> None:
    """Read this rank's shards; states: parameter -> optimizer state -> (whole shape, dtype), or a plain value."""
    _make_states(rank, states)
    pieces = [p for key, layout, tensor in _held(rank) for p in layout.pieces(key, tensor)]
    with _told(folder, "read"):
        load_state({}, storage_reader=FileSystemReader(folder), planner=_Reader(pieces))


@contextlib.contextmanager
def _told(folder: str, done: str) -> Iterator[None]:
    """CheckpointError, on every rank, of what the first of the ranks failed by: torch's own is no Exception."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        advice = "give it a folder with room" if done == "written" else "load another checkpoint"
        what = f"rank {rank}'s part cannot be {done} ({type(cause).__name__}: {cause}); {advice}"
        raise CheckpointError(folder, what) from error


def described_states(rank: Held) -> Tree:
    """parameter -> optimizer state -> (whole shape, dtype) of a tensor, or the plain value itself; no dtype where it is
    that of what is updated, whatever that is where it is loaded."""
    layouts, described = updated_layouts(rank), {}
    for name, state in _states(rank).items():
        found = described[name] = dict[str, Tree]()
        for kind, value in state.items():
            if isinstance(value, Tensor):
                layout = _state_layout(layouts[name], value, f"{kind!r} of {name!r}")
                follows = value.numel() > 1 and layout == layouts[name] and value.dtype == rank.updated[name].dtype
                found[kind] = (layout.shape, None if follows else str(value.dtype).removeprefix("torch."))
            else:
                found[kind] = _plain(value, f"{kind!r} of {name!r}")
    return described


def _states(rank: Held) -> dict[str, dict[str, Any]]:
    """Parameter -> its optimizer state."""
    if rank.optimizer is None:
        return {}
    names = {id(parameter): name for name, parameter in rank.updated.items()}
    return {names[id(parameter)]: state for parameter, state in rank.optimizer.state.items()}


def _held(rank: Held) -> Iterator[tuple[str, Layout, Tensor]]:
    """(key, layout, tensor) of all that is saved."""
    updated = updated_layouts(rank)
    wholes = rank.wholes()
    for name, layout in held_layouts(rank).items():
        if name in wholes:
            yield f"model/{name}", layout, wholes[name]
    for name, piece in rank.parts().items():
        yield f"model/{name}", updated[name], piece
    for name, state in _states(rank).items():
        for kind, value in state.items():
            if isinstance(value, Tensor):
                key = f"optimizer/{name}/{kind}"
                yield key, _state_layout(updated[name], value, key), value


def _state_layout(layout: Layout, tensor: Tensor, what: str) -> Layout:
    """Of a state that belongs to a parameter: split as the parameter is where it has its shape, else whole.

    Errors: UnsupportedError for a state of another shape beside a shard: nobody knows what part of the whole it is.
    """
    shape = tuple(tensor.shape)
    if shape == layout.local_shape:
        return layout
    if layout.is_whole or tensor.numel() == 1:
        return Layout(shape, (), layout.writes and layout.is_first)
    raise UnsupportedError(
        f"optimizer state {what} has the shape {shape} beside a shard of {layout.local_shape}, so that no other plan "
        "could load it; pin tp=1 and zero=0 to save checkpoints with this optimizer"
    )


def _plain(value: Any, what: str) -> Tree:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnsupportedError(
        f"optimizer state {what} is a {type(value).__name__}, which a checkpoint cannot split for another plan; "
        "keep tensors and numbers in the optimizer's state"
    )


def _make_states(rank: Held, states: Tree) -> None:
    """Empty optimizer state as the checkpoint has it, whether or not the optimizer has made its own yet."""
    if rank.optimizer is None:
        return
    layouts = updated_layouts(rank)
    names = {id(parameter): name for name, parameter in rank.updated.items()}
    rank.optimizer.state.clear()
    for group in rank.optimizer.param_groups:
        on_device = bool(group.get("capturable") or group.get("fused"))
        for parameter in group["params"]:
            name = names[id(parameter)]
            made = {k: _made(layouts[name], v, parameter, on_device) for k, v in states.get(name, {}).items()}
            if made:
                rank.optimizer.state[parameter] = made


def _made(layout: Layout, described: Tree, parameter: Tensor, on_device: bool) -> Any:
    """A tensor to read into, or the plain value. Step counts stay on the CPU as torch.optim keeps them."""
    if not isinstance(described, list | tuple):
        return described
    shape, dtype = tuple(described[0]), parameter.dtype if described[1] is None else getattr(torch, described[1])
    local = layout.local_shape if shape == layout.shape else shape
    return torch.zeros(local, dtype=dtype, device=parameter.device if shape or on_device else "cpu")


class _Writer(SavePlanner):
    """Writes a rank's pieces."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = {(p.key, p.offsets): p for p in pieces}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Everything is known."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(piece) for piece in self._pieces.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._pieces[_place(write_item.index)].local.detach()


class _Reader(LoadPlanner):
    """Reads into a rank's pieces, from whatever blocks were written."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = {(p.key, p.offsets): p for p in pieces}
        self._metadata: Metadata | None = None

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self._metadata is not None
        items: list[ReadItem] = []
        for piece in self._pieces.values():
            written = self._metadata.state_dict_metadata[piece.key]
            assert isinstance(written, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(piece.key, written, [piece.chunk])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError(f"only tensors are written, but {read_item.storage_index} is not one")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._pieces[_place(read_item.dest_index)].local.detach()
        for dim, (first, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, first, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The view that was filled is the rank's own memory."""


def _write_item(piece: Piece) -> WriteItem:
    data = TensorWriteData(piece.chunk, TensorProperties.create_from_tensor(piece.local), torch.Size(piece.shape))
    return WriteItem(MetadataIndex(piece.key, torch.Size(piece.offsets)), WriteItemType.SHARD, tensor_data=data)


def _place(index: MetadataIndex) -> tuple[str, tuple[int, ...]]:
    assert index.offset is not None
    return index.fqn, tuple(index.offset)
