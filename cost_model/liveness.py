"""Which storages are alive when: inside one block, and at the ends of a chunk's blocks.

A storage is alive from the instruction that first produces it to the instruction that frees it. What
a block's caller owns (parameters, the batch, the flat gradient buffer) is no part of these figures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cost_model.errors import VerificationError
from cost_model.program import Block, Chunk, StageProgram, Value
from cost_model.tensor import TensorMeta

Rounding = Callable[[int], int]


def exact(nbytes: int) -> int:
    """No rounding."""
    return nbytes


@dataclass(frozen=True)
class BlockPeak:
    """The moment of a block at which most is alive.

    instruction: its index, -1 for the entry; live: storage -> bytes as asked for, what the caller
    keeps excluded; workspace_bytes: of that instruction; peak_bytes: all of it, rounded.
    """

    instruction: int
    live: Mapping[str, int]
    workspace_bytes: int
    peak_bytes: int


def block_peak(
    block: Block,
    live_in: Mapping[str, int] | None = None,
    round_bytes: Rounding = exact,
    held: Collection[str] = (),
) -> BlockPeak:
    """Walk a block and return its peak; equal peaks give the first.

    live_in: storages the block owns on entry (storage -> bytes); its other inputs are the caller's and not counted.
    held: storages that stay although the block frees them (a send still reads them).
    Raises VerificationError with check "liveness" if a storage is freed that is not alive.
    """
    entry = dict(live_in or {})
    total = sum(map(round_bytes, entry.values()))
    peak, at = total, -1
    changes = []
    for index, change in enumerate(_lifetimes(block, entry, held)):
        born, dead = change
        total += sum(map(round_bytes, born.values()))
        workspace = block.instructions[index].workspace_bytes
        alive = total + round_bytes(workspace) if workspace else total
        if alive > peak:
            peak, at = alive, index
        total -= sum(map(round_bytes, dead.values()))
        changes.append(change)
    workspace = block.instructions[at].workspace_bytes if at >= 0 else 0
    return BlockPeak(at, _live_at(entry, changes, at), workspace, peak)


_Sizes = dict[str, int]
_NOTHING: _Sizes = {}


def _lifetimes(block: Block, entry: _Sizes, held: Collection[str]) -> Iterator[tuple[_Sizes, _Sizes]]:
    """Per instruction: storages it brings to life, and those that die after it."""
    live = dict(entry)
    callers = {value.storage for value in block.inputs} - live.keys()
    for instruction in block.instructions:
        born = _NOTHING
        for value in instruction.outputs:
            if value.storage not in live and value.storage not in callers:
                born = {**born, value.storage: value.storage_bytes}
        live.update(born)
        dead = _NOTHING
        for storage in instruction.frees:
            if storage in callers or storage in held:
                continue
            if storage not in live:
                raise VerificationError("liveness", f"{block.name}: {instruction.op} frees {storage!r}, not alive")
            dead = {**dead, storage: live.pop(storage)}
        yield born, dead


def _live_at(entry: _Sizes, changes: Sequence[tuple[_Sizes, _Sizes]], at: int) -> _Sizes:
    """Storages alive inside instruction ``at``, before it frees any."""
    live = dict(entry)
    for index, (born, dead) in enumerate(changes[: at + 1]):
        live.update(born)
        if index < at:
            for storage in dead:
                del live[storage]
    return live


@dataclass(frozen=True)
class ChunkStorages:
    """Storages (name -> bytes) that enter and leave a chunk's blocks; those kept all step are left out.

    carried: kept by one microbatch from its forward to its backward; kept: from its backward to its weight block;
    *_in: what each block owns besides on entry; *_out: what it sends; sent_is_saved: whether the activation sent is
    also carried, sent_is_kept: whether it is kept. A gradient that is both sent and kept counts twice.
    """

    carried: Mapping[str, int]
    kept: Mapping[str, int]
    activation_in: Mapping[str, int]
    activation_out: Mapping[str, int]
    gradient_in: Mapping[str, int]
    gradient_out: Mapping[str, int]
    sent_is_saved: bool
    sent_is_kept: bool

    @staticmethod
    def of(chunk: Chunk, stage: StageProgram) -> ChunkStorages:
        kept = (*stage.persistent, *chunk.constants)
        static = {value.storage for value in kept} | {shard.name for shard in stage.parameters}
        sent = _sent(chunk, static)
        sent_is_saved = sent is not None and sent.storage in chunk.saved
        carried = _carried(chunk, static, None if sent is None or sent_is_saved else sent.storage)
        own = (_freed(chunk.forward) | carried.keys()) - static
        activation_in = {v.storage: v.storage_bytes for v in chunk.forward.inputs if v.storage in own}
        own = {s for block in chunk.backwards for s in _freed(block)} - carried.keys() - static
        made = {value.storage: value.storage_bytes for value in _values(chunk.backward)}
        gradient_in = {v.storage: v.storage_bytes for v in chunk.backward.inputs if v.storage in own}
        return ChunkStorages(
            carried=carried,
            kept={storage: made[storage] for storage in chunk.kept if storage not in static},
            activation_in=activation_in or _received("received activation", chunk.received),
            activation_out={sent.storage: sent.storage_bytes} if sent is not None else {},
            gradient_in=gradient_in or _received("received gradient", chunk.sent),
            gradient_out={v.storage: v.storage_bytes for v in _gradients(chunk) if v.storage not in static},
            sent_is_saved=sent_is_saved,
            sent_is_kept=sent is not None and sent.storage in chunk.kept,
        )


def _freed(block: Block) -> set[str]:
    return {storage for instruction in block.instructions for storage in instruction.frees}


def _values(block: Block) -> Iterator[Value]:
    yield from block.inputs
    for instruction in block.instructions:
        yield from instruction.outputs


def _outputs(block: Block) -> list[Value]:
    """In the block's own order."""
    values = {value.name: value for value in _values(block)}
    return [values[name] for name in dict.fromkeys(block.outputs) if name in values]


def _gradients(chunk: Chunk) -> list[Value]:
    """What the backward sends: its first output, where the chunk has received an activation."""
    return [] if chunk.received is None else _outputs(chunk.backward)[:1]


def _received(name: str, meta: TensorMeta | None) -> dict[str, int]:
    """A buffer that the block does not free itself: alive while it runs."""
    return {} if meta is None else {name: meta.nbytes}


def _sent(chunk: Chunk, static: Collection[str]) -> Value | None:
    """What the forward sends: its first output, where there is a chunk that comes after; None where it is no storage
    of its own."""
    if chunk.sent is None:
        return None
    first = _outputs(chunk.forward)[:1]
    if not first or first[0].meta != chunk.sent:
        raise VerificationError(
            "sent", f"segments {chunk.segments}: the first output of {chunk.forward.name} is not {chunk.sent}"
        )
    return None if first[0].storage in static else first[0]


def _carried(chunk: Chunk, static: Collection[str], sent: str | None) -> dict[str, int]:
    """Storages one microbatch keeps between its blocks: the saved ones and outputs such as the loss.

    An input counts only if the backward frees it; other inputs are kept by the caller all step.
    """
    sizes = {value.storage: value.storage_bytes for value in _values(chunk.forward)}
    unknown = sorted(set(chunk.saved) - sizes.keys())
    if unknown:
        raise VerificationError("saved", f"segments {chunk.segments}: {chunk.forward.name} does not make {unknown}")
    callers = {v.storage for v in chunk.forward.inputs}.difference(*(_freed(block) for block in chunk.backwards))
    kept = {*chunk.saved, *(value.storage for value in _outputs(chunk.forward))} - callers - {*static, sent}
    return {storage: size for storage, size in sizes.items() if storage in kept}
