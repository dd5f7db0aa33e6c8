"""Peak memory of a stage over its whole step, and what an allocator makes of each request."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cost_model.errors import UnknownNameError
from cost_model.estimate import MemoryBreakdown
from cost_model.liveness import BlockPeak, ChunkStorages, Rounding, block_peak
from cost_model.program import Block, Chunk, Collective, StageProgram
from cost_model.schedule import (
    Backward,
    Forward,
    PostBackward,
    PostForward,
    SendBackward,
    SendForward,
    Step,
    Weight,
    stage_schedule,
    telling_microbatches,
)
from cost_model.tensor import TensorMeta

CPU_ALIGNMENT = 64  # c10/core/alignment.h: gAlignment
CUDA_BLOCK = 512  # c10/cuda/CUDACachingAllocator: kMinBlockSize
CUDA_SMALL = 2**20  # the same: kSmallSize, the largest block of the small pool
CUDA_LARGE = 2 * 2**20  # the same: kRoundLarge


def allocator_rounding(kind: str) -> Rounding:
    """Bytes an allocator of this device kind takes for a request; raises UnknownNameError.

    cpu: multiples of 64 bytes. cuda: multiples of 512 bytes up to 1 MiB, of 2 MiB above.
    """
    roundings = {"cpu": _round_cpu, "cuda": _round_cuda}
    if kind not in roundings:
        raise UnknownNameError("device kind", kind, roundings)
    return roundings[kind]


def _round_cpu(nbytes: int) -> int:
    return _round_up(nbytes, CPU_ALIGNMENT)


def _round_cuda(nbytes: int) -> int:
    return _round_up(nbytes, CUDA_BLOCK if nbytes <= CUDA_SMALL else CUDA_LARGE)


def _round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


@dataclass(frozen=True)
class StagePeak:
    """The moment of a stage's step at which most is alive.

    moment: the schedule step, "reduction" or "optimizer"; microbatches: how many hold saved activations
    then, counted in each virtual stage that they are in. live: storage -> bytes of what the running block has besides;
    empty where none runs.
    """

    memory: MemoryBreakdown
    moment: str
    microbatches: int
    live: Mapping[str, int]

    def largest(self, count: int = 5) -> tuple[tuple[str, int], ...]:
        """What holds the memory, largest first: the static parts, saved activations, single transient tensors."""
        memory = self.memory
        parts = [
            ("parameters", memory.parameters),
            ("gradients", memory.gradients),
            ("master copies of parameters", memory.master),
            ("optimizer state", memory.optimizer_state),
            ("batch inputs", memory.inputs),
            (f"saved activations of {self.microbatches} microbatch(es)", memory.saved),
            *self.live.items(),
        ]
        parts = [part for part in parts if part[1] > 0]
        return tuple(sorted(parts, key=lambda part: (-part[1], part[0]))[:count])


def stage_memory(
    stage: StageProgram, pp: int, microbatches: int, schedule: str, round_bytes: Rounding, window: int = 1
) -> MemoryBreakdown:
    """Memory of each device of a stage at the peak of its step; the parts sum to that peak."""
    return stage_peak(stage, pp, microbatches, schedule, round_bytes, window).memory


def stage_peak(
    stage: StageProgram, pp: int, microbatches: int, schedule: str, round_bytes: Rounding, window: int = 1
) -> StagePeak:
    """Walk a stage's schedule, then its reduction and its optimizer, and return the peak; equal peaks give the first.

    A send's buffer is alive until the window-th send after it in its direction is posted, or until the schedule ends.
    """
    return StagePeaks((stage,), round_bytes).under(pp, microbatches, schedule, window)[0]


class StagePeaks:
    """Peaks of the stages of one program under any schedule; the blocks of stages that are alike are walked once."""

    def __init__(self, stages: Sequence[StageProgram], round_bytes: Rounding) -> None:
        self.stages, self._round_bytes = tuple(stages), round_bytes
        known: dict[tuple[int, ...], tuple[list[_ChunkBlocks], MemoryBreakdown]] = {}
        for stage in self.stages:
            if _identity(stage) not in known:
                known[_identity(stage)] = self._walked(stage)
        self._parts = [known[_identity(stage)] for stage in self.stages]

    def under(self, pp: int, microbatches: int, schedule: str, window: int = 1) -> list[StagePeak]:
        """As ``stage_peak`` of each stage."""
        found = []
        for stage, (blocks, static) in zip(self.stages, self._parts, strict=True):
            walk, shape = _StageWalk(blocks, window), (len(stage.chunks), window)
            few = telling_microbatches(schedule, stage.stage, pp, microbatches, *shape)
            steps = stage_schedule(schedule, stage.stage, pp, few, *shape)
            for step in steps:
                walk.run(step)
            walk.finish(stage, self._round_bytes)
            if few < microbatches:
                walk.move(steps, stage_schedule(schedule, stage.stage, pp, microbatches, *shape))
            found.append(walk.peak(static))
        return found

    def _walked(self, stage: StageProgram) -> tuple[list[_ChunkBlocks], MemoryBreakdown]:
        blocks = [_ChunkBlocks.of(chunk, stage, self._round_bytes) for chunk in stage.chunks]
        return blocks, static_memory(stage, self._round_bytes)


def _identity(stage: StageProgram) -> tuple[int, ...]:
    """Equal for stages that are one program but for their number and their segments: all else is the same objects."""
    own = (stage.persistent, stage.parameters, stage.buckets, stage.step)
    parts = [(c.forward, c.backward, c.weight, c.saved, c.sent, c.received, c.constants) for c in stage.chunks]
    return tuple(map(id, (*own, *(each for part in parts for each in part))))


def static_memory(stage: StageProgram, round_bytes: Rounding) -> MemoryBreakdown:
    """What a stage holds during the whole step: parameters, flat gradient buffers, state, inputs.

    Parameters outside buckets lie apart, their gradients in one buffer per dtype; each bucket has one of each.
    """
    bucketed = {name for bucket in stage.buckets for name, _ in bucket.parameters}
    alone = [shard for shard in stage.parameters if shard.name not in bucketed]
    trainable = [shard.gradient for shard in alone if shard.trainable]
    parameters = [shard.meta.nbytes for shard in alone] + [bucket.weights.nbytes for bucket in stage.buckets]
    gradients = _bytes_by_dtype(trainable) + [b.gradients.nbytes for b in stage.buckets if b.gradients is not None]
    optimized = stage.step.optimized_bytes
    if optimized is None:
        optimized = tuple(meta.nbytes for meta in trainable)
    inputs = list({value.storage: value.storage_bytes for value in stage.persistent}.values())
    for chunk in stage.chunks:
        inputs += {value.storage: value.storage_bytes for value in chunk.constants}.values()
    state = stage.step.optimizer_state_bytes
    master = stage.step.master_bytes
    pads = sum(round_bytes(size) - size for size in (*parameters, *gradients, *inputs, *master))
    return MemoryBreakdown(
        parameters=sum(parameters),
        gradients=sum(gradients),
        optimizer_state=state,
        inputs=sum(inputs),
        saved=0,
        transient=0,
        rounding=pads + _state_rounding(state, optimized, round_bytes),
        master=sum(master),
    )


def _bytes_by_dtype(metas: list[TensorMeta]) -> list[int]:
    return [sum(meta.nbytes for meta in metas if meta.dtype == dtype) for dtype in {meta.dtype: None for meta in metas}]


def _state_rounding(state: int, trainable: Sequence[int], round_bytes: Rounding) -> int:
    """Rounding of optimizer state laid out as whole copies of each updated tensor and one small tensor each.

    AdamW: two moments and a step count. Only the total is known, so the small tensors share what is left equally.
    """
    if not trainable or not sum(trainable):
        return round_bytes(state) - state
    copies, rest = divmod(state, sum(trainable))
    pads = copies * sum(round_bytes(size) - size for size in trainable)
    if rest:
        pads += len(trainable) * round_bytes(-(-rest // len(trainable))) - rest
    return pads


@dataclass(frozen=True)
class _Amount:
    """Bytes alive beside the static ones: as asked for in two parts, and all of them rounded."""

    saved: int = 0
    transient: int = 0
    rounded: int = 0
    live: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def buffer(sizes: Mapping[str, int], round_bytes: Rounding) -> _Amount:
        return _Amount(0, sum(sizes.values()), sum(map(round_bytes, sizes.values())))

    @staticmethod
    def block(peak: BlockPeak, carried: Collection[str]) -> _Amount:
        saved = sum(size for storage, size in peak.live.items() if storage in carried)
        live = {storage: size for storage, size in peak.live.items() if storage not in carried}
        if peak.workspace_bytes:
            live[f"workspace of instruction {peak.instruction}"] = peak.workspace_bytes
        return _Amount(saved, sum(live.values()), peak.peak_bytes, live)


_NOTHING = _Amount()


@dataclass(frozen=True)
class _ChunkBlocks:
    """What each step of a chunk holds, computed once.

    carried: what one microbatch keeps from its forward to its backward; kept: from its backward to its weight block;
    forward, backward, weight: the blocks' own peaks; *_while_sending: with the activation sent still held by its send;
    shared_by: the block that ends the activation where it is also saved; *_in: buffers received; *_out: buffers sent
    that nothing else holds (activation_out is empty where the activation is also saved).
    """

    carried: _Amount
    kept: _Amount
    forward: _Amount
    backward: _Amount
    backward_while_sending: _Amount
    weight: _Amount
    weight_while_sending: _Amount
    shared_by: type[Step]
    activation_in: _Amount
    gradient_in: _Amount
    activation_out: _Amount
    shared_out: _Amount
    gradient_out: _Amount

    @staticmethod
    def of(chunk: Chunk, stage: StageProgram, round_bytes: Rounding) -> _ChunkBlocks:
        ends = ChunkStorages.of(chunk, stage)

        def buffer(sizes: Mapping[str, int]) -> _Amount:
            return _Amount.buffer(sizes, round_bytes)

        def peak(block: Block | None, live_in: Mapping[str, int], held: Collection[str] = ()) -> _Amount:
            if block is None:
                return _NOTHING
            return _Amount.block(block_peak(block, live_in, round_bytes, held), {*ends.carried, *ends.kept})

        backward_in = {**ends.carried, **ends.gradient_in}
        alone = {} if ends.sent_is_saved else ends.activation_out
        shared = ends.activation_out if ends.sent_is_saved else {}
        backward, weight = peak(chunk.backward, backward_in), peak(chunk.weight, ends.kept)
        return _ChunkBlocks(
            carried=buffer(ends.carried),
            kept=buffer(ends.kept),
            forward=peak(chunk.forward, ends.activation_in),
            backward=backward,
            backward_while_sending=peak(chunk.backward, backward_in, shared) if shared else backward,
            weight=weight,
            weight_while_sending=peak(chunk.weight, ends.kept, shared) if shared else weight,
            shared_by=Weight if ends.sent_is_kept else Backward,
            activation_in=buffer(ends.activation_in if chunk.received else {}),
            gradient_in=buffer(ends.gradient_in if chunk.sent else {}),
            activation_out=buffer(alone),
            shared_out=buffer(shared),
            gradient_out=buffer(ends.gradient_out),
        )


class _Held:
    """A sum of amounts that are alive for a while: how many hold anything, their bytes, and these rounded."""

    def __init__(self) -> None:
        self.count = self.nbytes = self.rounded = 0

    def add(self, amount: _Amount, count: int = 1) -> None:
        self.count += count if amount.transient else 0
        self.nbytes += count * amount.transient
        self.rounded += count * amount.rounded


class _StageWalk:
    """Walks the steps of a stage and remembers the moment at which most is alive."""

    def __init__(self, blocks: Sequence[_ChunkBlocks], window: int) -> None:
        self.blocks, self.window = blocks, window
        self.carried, self.kept, self.buffers = _Held(), _Held(), _Held()
        self.sending_forward: deque[SendForward] = deque()
        self.sending_backward: deque[SendBackward] = deque()
        self.outlived: set[SendForward] = set()
        self.best = -1
        self.best_moment: tuple[Step | str, int, int, int, _Amount] = ("", 0, 0, 0, _NOTHING)

    def run(self, step: Step) -> None:
        blocks = self.blocks[step.chunk]
        match step:
            case PostForward():
                self._receive(step, blocks.activation_in)
            case PostBackward():
                self._receive(step, blocks.gradient_in)
            case Forward():
                self.buffers.add(blocks.activation_in, -1)
                self._see(step, blocks.forward)
                self.carried.add(blocks.carried)
                self.buffers.add(blocks.activation_out)
            case SendForward():
                self._send_forward(step)
            case Backward():
                self.buffers.add(blocks.gradient_in, -1)
                self.carried.add(blocks.carried, -1)
                self._last_read(step, blocks, blocks.backward, blocks.backward_while_sending)
                self.kept.add(blocks.kept)
                self.buffers.add(blocks.gradient_out)
            case Weight():
                self.kept.add(blocks.kept, -1)
                self._last_read(step, blocks, blocks.weight, blocks.weight_while_sending)
            case SendBackward():
                self.sending_backward.append(step)
                if len(self.sending_backward) > self.window:
                    self.buffers.add(self.blocks[self.sending_backward.popleft().chunk].gradient_out, -1)

    def finish(self, stage: StageProgram, round_bytes: Rounding) -> None:
        """After the last step: sends are waited for, gradients reduced, parameters updated and gathered in place."""
        self.buffers = _Held()
        casts = stage.step.beside_bytes or (0,) * len(stage.step.collectives)
        pairs = zip(stage.step.collectives, casts, strict=True)
        ranks = max((bucket.dp for bucket in stage.buckets), default=1)
        buffer = max((_arriving_bytes(c, ranks) + cast for c, cast in pairs), default=0)
        self._see("reduction", _Amount.buffer({"collective": buffer}, round_bytes))
        workspace = {"workspace": stage.step.optimizer_workspace_bytes}
        self._see("optimizer", _Amount.buffer(workspace, round_bytes))

    def move(self, steps: Sequence[Step], whole: Sequence[Step]) -> None:
        """To the whole schedule, that begins and ends as the one that was walked."""
        moment, *_ = self.best_moment
        if not isinstance(moment, str):
            place = steps.index(moment)
            if whole[place] != moment:
                self.best_moment = (whole[place - len(steps)], *self.best_moment[1:])

    def peak(self, static: MemoryBreakdown) -> StagePeak:
        moment, count, carried, buffers, own = self.best_moment
        saved = carried + own.saved
        transient = buffers + own.transient
        rounding = static.rounding + self.best - saved - transient
        memory = replace(static, saved=saved, transient=transient, rounding=rounding)
        return StagePeak(memory, str(moment), count + bool(own.saved), own.live)

    def _see(self, moment: Step | str, own: _Amount) -> None:
        """Compare a moment with the best so far: what is carried, buffers, and what runs."""
        total = self.carried.rounded + self.kept.rounded + self.buffers.rounded + own.rounded
        if total > self.best:
            count, saved = self.carried.count + self.kept.count, self.carried.nbytes + self.kept.nbytes
            self.best, self.best_moment = total, (moment, count, saved, self.buffers.nbytes, own)

    def _receive(self, step: Step, buffer: _Amount) -> None:
        self.buffers.add(buffer)
        self._see(step, _NOTHING)

    def _send_forward(self, step: SendForward) -> None:
        self.sending_forward.append(step)
        if len(self.sending_forward) > self.window:
            sent = self.sending_forward.popleft()
            before = self.blocks[sent.chunk]
            self.buffers.add(before.activation_out, -1)
            if sent in self.outlived:
                self.buffers.add(before.shared_out, -1)

    def _last_read(self, step: Step, blocks: _ChunkBlocks, alone: _Amount, while_sending: _Amount) -> None:
        """A send of this very microbatch that is not waited for yet holds the activation beyond the block that ends
        it."""
        sent = SendForward(step.microbatch, step.chunk)
        outlived = sent in self.sending_forward and type(step) is blocks.shared_by
        self._see(step, while_sending if outlived else alone)
        if outlived:
            self.buffers.add(blocks.shared_out)
            self.outlived.add(sent)


def _arriving_bytes(collective: Collective, ranks: int) -> int:
    """Bytes that a step's collective holds beside the row it works on: gathers and reductions of a row lie in it, but
    the parts that other ranks scatter to this one arrive apart, to be added."""
    return collective.nbytes // ranks * (ranks - 1) if collective.kind == "reduce_scatter" else 0
