"""Messages between a parent and its ranks: trees of plain values and tensors in length-prefixed frames."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from cost_model.errors import ConfigError

Tree: TypeAlias = Any
"""None, bool, int, float, str, strided tensor, or a dict, list or tuple of trees; nothing else travels."""
Frame: TypeAlias = list[bytes | memoryview]
"""The body of one message in parts, to be sent one after the other."""

ENVIRONMENT_KEY = "AUTOPAR_WORKER"
INIT, CLOSE = "__init__", "__close__"
OK, ERROR = "ok", "error"

_LENGTH = struct.Struct("!Q")
_SCALARS = (type(None), bool, int, float, str)
_DICT, _LIST, _TUPLE, _TENSOR = "dict", "list", "tuple", "tensor"
_JOINED_BYTES = 1 << 20  # below it one copy is cheaper than another system call


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
    """What a parent tells a rank before it can talk to it.

    dies_with_parent: the kernel may kill the rank when the thread that started it ends (prctl(2): the signal
    follows that thread, not its process), so it is asked for only by main threads. paths: the parent's sys.path.
    """

    rank: int
    world_size: int
    channel_fd: int
    store_port: int
    target: str
    backend: str
    parent_pid: int
    dies_with_parent: bool
    paths: Sequence[str]

    def to_environment(self) -> dict[str, str]:
        """The environment variable that carries this to the rank."""
        return {ENVIRONMENT_KEY: json.dumps(dataclasses.asdict(self))}

    @classmethod
    def from_environment(cls) -> WorkerConfig:
        """Read it back, and out of the environment, so that no child of the rank takes it for its own."""
        return cls(**json.loads(os.environ.pop(ENVIRONMENT_KEY)))


class _Packer:
    """Turns a tree into one JSON header and the storages its tensors need, each storage once."""

    def __init__(self) -> None:
        self.storages: list[memoryview] = []
        self._index: dict[tuple[int, int], int] = {}

    def pack(self, tree: Tree, where: str) -> Tree:
        """A scalar as it is; anything else as a list that starts with its tag."""
        if type(tree) in _SCALARS:
            return tree
        if isinstance(tree, torch.Tensor):
            return self._tensor(_plain(tree, where))
        if isinstance(tree, Mapping):
            keys = [_plain_key(key, where) for key in tree]
            return [_DICT, keys, [self.pack(tree[key], f"{where}[{key!r}]") for key in keys]]
        if isinstance(tree, list | tuple):
            items = [self.pack(value, f"{where}[{index}]") for index, value in enumerate(tree)]
            return [_LIST if isinstance(tree, list) else _TUPLE, items]
        raise _cannot_travel(where, tree)

    def _tensor(self, tensor: torch.Tensor) -> list[Tree]:
        """Its record; parts of larger storages travel alone, and in contiguous parts nothing is copied."""
        if not tensor.is_contiguous() and tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()
        data, offset = _bytes_and_offset(tensor)
        index = self._index.setdefault(_region(tensor, data, offset), len(self.storages))
        if index == len(self.storages):
            self.storages.append(data)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return [_TENSOR, dtype, index, offset, list(tensor.shape), list(tensor.stride())]


def encode(tree: Tree, where: str = "payload") -> Frame:
    """The frame of a tree in parts: sizes, a JSON header, then the tensors' storages, not copied where possible.

    Tensors over the same bytes (tied parameters) still share them on the other side.
    Errors: ConfigError naming the first value that cannot travel.
    """
    packer = _Packer()
    packed = packer.pack(tree, where)
    header = json.dumps([packed, [len(storage) for storage in packer.storages]]).encode()
    return [_LENGTH.pack(len(header)) + header, *packer.storages]


def decode(frame: bytearray) -> Tree:
    """The tree of a frame: plain values and new CPU tensors, and nothing that could run code."""
    (size,) = _LENGTH.unpack_from(frame)
    offset = _LENGTH.size + size
    packed, sizes = json.loads(frame[_LENGTH.size : offset])
    storages = []
    for nbytes in sizes:
        storages.append(_owned_bytes(frame, offset, nbytes).untyped_storage())
        offset += nbytes
    return _unpack(packed, storages)


def _unpack(packed: Tree, storages: list[torch.UntypedStorage]) -> Tree:
    if not isinstance(packed, list):
        return packed
    tag, *rest = packed
    if tag == _DICT:
        keys, values = rest
        return {key: _unpack(value, storages) for key, value in zip(keys, values, strict=True)}
    if tag == _TENSOR:
        dtype, index, offset, shape, stride = rest
        return torch.empty(0, dtype=getattr(torch, dtype)).set_(storages[index], offset, shape, stride)
    items = [_unpack(value, storages) for value in rest[0]]
    return items if tag == _LIST else tuple(items)


class Channel:
    """One end of a stream socket that carries whole frames: 8 bytes of big-endian length, then the body."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream

    def fileno(self) -> int:
        """The descriptor to wait on for reading."""
        return self._stream.fileno()

    def send(self, parts: Frame, timeout_s: float | None = None) -> None:
        """Send one frame. Errors: ConnectionError if the other end is gone, TimeoutError."""
        self._stream.settimeout(timeout_s)
        size = sum(len(part) for part in parts)
        framed = [_LENGTH.pack(size), *parts]
        for part in [b"".join(framed)] if size <= _JOINED_BYTES else framed:
            self._stream.sendall(part)

    def receive(self, timeout_s: float | None = None) -> bytearray:
        """Receive one frame. Errors: EOFError if the other end is gone, TimeoutError."""
        self._stream.settimeout(timeout_s)
        try:
            (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
            return self._exactly(size)
        except ConnectionError as error:
            raise EOFError(str(error)) from error

    def close(self) -> None:
        """Close this end; the other end reads EOF."""
        self._stream.close()

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            count = self._stream.recv_into(rest)
            if count == 0:
                raise EOFError("the connection was closed")
            rest = rest[count:]
        return data


def _plain_key(key: object, where: str) -> Tree:
    if type(key) not in _SCALARS:
        raise _cannot_travel(f"a key of {where}", key)
    return key


def _plain(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor on CPU, detached, without lazy conjugates and negatives."""
    plain = tensor.detach()
    if type(plain) is not torch.Tensor or plain.layout is not torch.strided or plain.is_meta or plain.is_quantized:
        raise _cannot_travel(where, tensor)
    plain = plain.cpu().resolve_conj().resolve_neg()
    return plain


def _bytes_and_offset(tensor: torch.Tensor) -> tuple[memoryview, int]:
    """The bytes it needs, which keep its memory alive, and its offset in them (elements)."""
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().data
    if not tensor.is_contiguous():
        return whole, int(tensor.storage_offset())
    start = tensor.storage_offset() * tensor.element_size()
    return whole[start : start + tensor.nbytes], 0


def _region(tensor: torch.Tensor, data: memoryview, offset: int) -> tuple[int, int]:
    """What two tensors have in common if they share these bytes: address and length."""
    return tensor.data_ptr() - offset * tensor.element_size(), len(data)


def _owned_bytes(frame: bytearray, offset: int, nbytes: int) -> torch.Tensor:
    """A copy in memory of torch's own allocator: aligned, counted by its profiler, free of the frame.

    Not torch's copy, which wakes the caller's whole thread pool for 32 KiB and waits for it behind busy ranks.
    """
    owned = torch.empty(nbytes, dtype=torch.uint8)
    owned.numpy().data[:] = memoryview(frame)[offset : offset + nbytes]
    return owned


def _cannot_travel(where: str, value: object) -> ConfigError:
    return ConfigError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be sent to a rank; "
        "send None, bool, int, float, str, plain strided tensors, or dicts, lists and tuples of them"
    )
