"""A rank's part of a checkpoint: its shards in torch.distributed.checkpoint's files, where any plan finds its own.

Every tensor is written under the model's own name as blocks of the whole tensor, so that it does not matter which
ranks of which plan wrote it: "model/<parameter>", "optimizer/<parameter>/<state>".
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
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

from cost_model.errors import UnsupportedError

if TYPE_CHECKING:
    from autopar.runtime.executor import RankExecutor

Tree = Any


@dataclass(frozen=True)
class Layout:
    """Where a rank's shard lies in the whole tensor.

    shape: of the whole; dim: None where the rank holds all of it, else dim = outer x size x inner and the rank holds
    place ``index`` of ``size``. writes: whether this rank is the one that writes it.
    """

    shape: tuple[int, ...]
    dim: int | None
    outer: int
    index: int
    size: int
    writes: bool

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(n // self.size if d == self.dim else n for d, n in enumerate(self.shape))

    def pieces(self, key: str, local: Tensor) -> Iterator[Piece]:
        """The shard as blocks of the whole: one, or one per ``outer``."""
        if self.dim is None:
            yield Piece(key, self.shape, (0,) * len(self.shape), local)
            return
        extent = self.shape[self.dim] // self.outer // self.size
        for block in range(self.outer):
            first = (block * self.size + self.index) * extent
            offsets = tuple(first if d == self.dim else 0 for d in range(len(self.shape)))
            yield Piece(key, self.shape, offsets, local.narrow(self.dim, block * extent, extent))


@dataclass(frozen=True)
class Piece:
    """A block of the whole tensor called ``key`` that begins at ``offsets``; local: a view of this rank's memory."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.local.shape)


def save(executor: RankExecutor, folder: str) -> None:
    """Write what this rank is the writer of; all ranks take part, and the metadata is written last."""
    layouts = _layouts(executor)
    tensors = [(key, name, tensor) for key, name, tensor in _held(executor) if layouts[name].writes]
    pieces = [p for key, name, tensor in tensors for p in _placed(layouts[name], key, tensor)]
    save_state({}, storage_writer=FileSystemWriter(folder), planner=_Writer(pieces))


def load(executor: RankExecutor, folder: str, states: Tree) -> None:
    """Read this rank's shards; states: parameter -> optimizer state -> (whole shape, dtype), or a plain value."""
    _make_states(executor, states)
    layouts = _layouts(executor)
    pieces = [p for key, name, tensor in _held(executor) for p in _placed(layouts[name], key, tensor)]
    load_state({}, storage_reader=FileSystemReader(folder), planner=_Reader(pieces))


def described_states(executor: RankExecutor) -> Tree:
    """parameter -> optimizer state -> (whole shape, dtype) of a tensor, or the plain value itself."""
    layouts, described = _layouts(executor), {}
    for name, state in _states(executor).items():
        found = described[name] = dict[str, Tree]()
        for kind, value in state.items():
            if isinstance(value, Tensor):
                layout = _state_layout(layouts[name], value, f"{kind!r} of {name!r}")
                found[kind] = (layout.shape, str(value.dtype).removeprefix("torch."))
            else:
                found[kind] = _plain(value, f"{kind!r} of {name!r}")
    return described


def _layouts(executor: RankExecutor) -> dict[str, Layout]:
    return {name: Layout(**described) for name, described in executor.spec["layouts"].items()}


def _states(executor: RankExecutor) -> dict[str, dict[str, Any]]:
    """Parameter -> its optimizer state."""
    if executor.optimizer is None:
        return {}
    names = {id(parameter): name for name, parameter in executor.params.items()}
    return {names[id(parameter)]: state for parameter, state in executor.optimizer.state.items()}


def _held(executor: RankExecutor) -> Iterator[tuple[str, str, Tensor]]:
    """(key, parameter or buffer it belongs to, tensor) of all that is saved, alike on every rank that holds it."""
    for name in executor.spec["layouts"]:
        held = executor.params if name in executor.params else executor.buffers
        yield f"model/{name}", name, held[name]
    for name, state in _states(executor).items():
        yield from ((f"optimizer/{name}/{kind}", name, v) for kind, v in state.items() if isinstance(v, Tensor))


def _placed(layout: Layout, key: str, tensor: Tensor) -> Iterator[Piece]:
    return _state_layout(layout, tensor, key).pieces(key, tensor)


def _state_layout(layout: Layout, tensor: Tensor, what: str) -> Layout:
    """Of a state that belongs to a parameter: split as the parameter is where it has its shape, else whole.

    Errors: UnsupportedError for a state of another shape beside a shard: nobody knows what part of the whole it is.
    """
    shape = tuple(tensor.shape)
    if shape == layout.local_shape:
        return layout
    if layout.dim is None or tensor.numel() == 1:
        return Layout(shape, None, 1, 0, 1, layout.writes)
    raise UnsupportedError(
        f"optimizer state {what} has the shape {shape} beside a shard of {layout.local_shape}, so that no other plan "
        "could load it; pin tp=1 to save checkpoints with this optimizer"
    )


def _plain(value: Any, what: str) -> Tree:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnsupportedError(
        f"optimizer state {what} is a {type(value).__name__}, which a checkpoint cannot split for another plan; "
        "keep tensors and numbers in the optimizer's state"
    )


def _make_states(executor: RankExecutor, states: Tree) -> None:
    """Empty optimizer state as the checkpoint has it, whether or not the optimizer has made its own yet."""
    if executor.optimizer is None:
        return
    layouts = _layouts(executor)
    names = {id(parameter): name for name, parameter in executor.params.items()}
    executor.optimizer.state.clear()
    for group in executor.optimizer.param_groups:
        on_device = bool(group.get("capturable") or group.get("fused"))
        for parameter in group["params"]:
            name = names[id(parameter)]
            made = {k: _made(layouts[name], v, parameter, on_device) for k, v in states.get(name, {}).items()}
            if made:
                executor.optimizer.state[parameter] = made


def _made(layout: Layout, described: Tree, parameter: Tensor, on_device: bool) -> Any:
    """A tensor to read into, or the plain value. Step counts stay on the CPU as torch.optim keeps them."""
    if not isinstance(described, list | tuple):
        return described
    shape, dtype = tuple(described[0]), getattr(torch, described[1])
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
