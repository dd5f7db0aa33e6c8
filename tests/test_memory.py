"""Liveness against blocks and stages worked by hand, and against a walk of every instruction of a whole step."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_model.errors import UnknownNameError, VerificationError
from cost_model.liveness import block_peak
from cost_model.memory import allocator_rounding, stage_memory, stage_peak
from cost_model.program import Block, Chunk, Collective, Instruction, StageProgram, StepWork, Value
from cost_model.schedule import (
    Backward,
    Forward,
    PostBackward,
    PostForward,
    SendBackward,
    SendForward,
    Weight,
    stage_schedule,
)
from cost_model.shards import Bucket, ParameterShard
from cost_model.tensor import TensorMeta

KIB = 1024


def value(name: str, nbytes: int, storage: str | None = None) -> Value:
    return Value(name, TensorMeta((nbytes,), "uint8"), storage or name, nbytes)


def line(outputs: Iterable[Value] = (), frees: Iterable[str] = (), workspace: int = 0) -> Instruction:
    return Instruction("aten.add", (), tuple(outputs), None, None, workspace, tuple(frees), 0)


def same(nbytes: int) -> int:
    return nbytes


# ---- blocks ----


def test_the_peak_of_a_block_by_hand() -> None:
    """100 on entry; 100 + 50; then x is gone: 50 + 30 and 200 of workspace; then 30."""
    lines = (line([value("a", 50)], ["x"]), line([value("b", 30)], ["a"], workspace=200), line([], []))
    peak = block_peak(Block("f", (value("x", 100),), lines, ("b",)), {"x": 100})
    assert (peak.instruction, peak.peak_bytes, peak.workspace_bytes) == (1, 280, 200)
    assert peak.live == {"a": 50, "b": 30}


def test_a_block_may_peak_on_entry() -> None:
    peak = block_peak(Block("f", (value("x", 100),), (line([], ["x"]), line([value("a", 50)])), ("a",)), {"x": 100})
    assert (peak.instruction, peak.peak_bytes, peak.live) == (-1, 100, {"x": 100})


def test_views_share_their_storage() -> None:
    lines = (line([value("a", 64)]), line([value("view", 64, "a"), value("half", 64, "a")]), line([value("b", 1)]))
    assert block_peak(Block("f", (), lines, ("b",))).peak_bytes == 65


def test_what_the_caller_owns_is_not_counted() -> None:
    """Neither the parameter, nor a write into it, nor a view of it; and the caller decides when it dies."""
    lines = (line([value("view", 100, "w")], ["w"]), line([value("a", 10)], ["w"]))
    assert block_peak(Block("f", (value("w", 100),), lines, ("a",))).peak_bytes == 10


def test_a_held_storage_outlives_its_free() -> None:
    lines = (line([], ["x"]), line([value("a", 50)]))
    block = Block("f", (value("x", 100),), lines, ("a",))
    assert block_peak(block, {"x": 100}, held={"x"}).peak_bytes == 150


def test_rounding_is_per_storage() -> None:
    lines = (line([value("a", 1), value("b", 65)], workspace=1),)
    assert block_peak(Block("f", (), lines, ("b",)), round_bytes=allocator_rounding("cpu")).peak_bytes == 64 + 128 + 64


@pytest.mark.parametrize("frees", [["nothing"], ["a", "a"]])
def test_freeing_what_is_not_alive(frees: list[str]) -> None:
    with pytest.raises(VerificationError) as caught:
        block_peak(Block("f", (), (line([value("a", 50)], frees),), ()))
    assert caught.value.check == "liveness"


@pytest.mark.parametrize(
    ("kind", "asked", "taken"),
    [
        ("cpu", 0, 0),
        ("cpu", 1, 64),
        ("cpu", 64, 64),
        ("cuda", 0, 0),
        ("cuda", 1, 512),
        ("cuda", 513, 1024),
        ("cuda", KIB * KIB, KIB * KIB),
        ("cuda", KIB * KIB + 1, 2 * KIB * KIB),
        ("cuda", 11 * KIB * KIB, 12 * KIB * KIB),
    ],
)
def test_what_allocators_take(kind: str, asked: int, taken: int) -> None:
    assert allocator_rounding(kind)(asked) == taken


def test_an_unknown_allocator() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cuda'"):
        allocator_rounding("cudo")


# ---- stages ----

NO_STEP = StepWork((), (), 0, 0)
ACTIVATION = 40


def hand_stage(stage: int, pp: int, step: StepWork = NO_STEP) -> StageProgram:
    """Saves 100 and the activation it received; forward needs 10 and backward 70 more for a while."""
    received = stage > 0
    incoming = (value("in", ACTIVATION),) if received else ()
    saved = ("h", "in") if received else ("h",)
    forward = Block(
        "forward",
        (value("w", 1000), *incoming),
        (line([value("t", 10)]), line([value("h", 100)], ["t"]), line([value("out", ACTIVATION)])),
        ("h", "out"),
    )
    backward = Block(
        "backward",
        (value("h", 100), value("grad_out", ACTIVATION), *incoming),
        (
            line([value("u", 30)], ["h", "grad_out"], workspace=40),
            line([value("grad_in", ACTIVATION)], ["u", *saved[1:]]),
        ),
        ("grad_in",) if received else (),
    )
    meta = TensorMeta((ACTIVATION,), "uint8")
    chunk = Chunk(
        segments=(stage,),
        forward=forward,
        backward=backward,
        saved=saved,
        sent=meta if stage < pp - 1 else None,
        received=meta if received else None,
    )
    return StageProgram(
        stage=stage,
        chunks=(chunk,),
        parameters=(
            ParameterShard("w", TensorMeta((250,), "float32"), "R", True, None, None),
            ParameterShard("mask", TensorMeta((3,), "bool"), "R", False, None, None),
        ),
        persistent=(value("idx", 64), Value("first", TensorMeta((32,), "uint8"), "idx", 64)),
        step=step,
    )


def test_static_parts() -> None:
    memory = stage_memory(hand_stage(0, 2, StepWork((), (), 2004, 0)), 2, 1, "1f1b", allocator_rounding("cpu"))
    assert (memory.parameters, memory.gradients, memory.optimizer_state, memory.inputs) == (1003, 1000, 2004, 64)


def test_first_stage_by_hand() -> None:
    """Backward of 0: h of 3 microbatches, the send of 2 pending, a gradient received, one posted, 30 + 40 inside."""
    memory = stage_memory(hand_stage(0, 2), 2, 3, "gpipe", same)
    assert (memory.saved, memory.transient, memory.rounding) == (3 * 100, 3 * ACTIVATION + 70, 0)
    memory = stage_memory(hand_stage(0, 2), 2, 3, "1f1b", same)
    assert (memory.saved, memory.transient) == (2 * 100, 3 * ACTIVATION + 70)


def test_middle_stage_by_hand() -> None:
    """1f1b, stage 1 of 3, backward of 1: as before, and the gradient of 0 still on its way."""
    peak = stage_peak(hand_stage(1, 3), 3, 3, "1f1b", same)
    assert peak.moment == str(Backward(1))
    assert peak.microbatches == 2
    assert peak.memory.saved == 2 * (100 + ACTIVATION)
    assert peak.memory.transient == 4 * ACTIVATION + 70


def test_what_binds_is_listed_largest_first() -> None:
    peak = stage_peak(hand_stage(1, 3), 3, 3, "1f1b", same)
    assert peak.largest(4) == (
        ("parameters", 1003),
        ("gradients", 1000),
        ("saved activations of 2 microbatch(es)", 280),
        ("batch inputs", 64),
    )
    assert ("u", 30) in peak.largest(10) and ("workspace of instruction 0", 40) in peak.largest(10)


def test_an_activation_both_saved_and_sent_is_counted_once_until_its_send_outlives_it() -> None:
    """out is saved and sent: backward 0 frees it, but its send, the last one, still reads it."""
    stage = hand_stage(0, 2)
    early = (line([], ["out", "h"]), line([value("u", 500)], ["u", "grad_out"]))
    backward = Block("backward", (value("h", 100), value("out", 40), value("grad_out", 40)), early, ())
    stage = changed(stage, saved=("h", "out"), backward=backward)
    memory = stage_memory(stage, 2, 1, "gpipe", same)
    assert (memory.saved, memory.transient) == (40, ACTIVATION + 500)
    memory = stage_memory(stage, 2, 2, "1f1b", same)
    assert (memory.saved, memory.transient) == (140, 2 * ACTIVATION + 500)


def test_the_optimizer_may_be_the_peak() -> None:
    peak = stage_peak(hand_stage(0, 2, StepWork((), (), 2000, 9000)), 2, 3, "1f1b", same)
    assert (peak.moment, peak.memory.saved, peak.memory.transient) == ("optimizer", 0, 9000)


@pytest.mark.parametrize(
    ("kind", "ranks", "transient"), [("reduce_scatter", 3, 6000), ("all_reduce", 3, 3 * ACTIVATION + 70)]
)
def test_a_scatter_needs_what_arrives_beside_the_row(kind: str, ranks: int, transient: int) -> None:
    """A part of 3000 from each of two others; an all_reduce works in the row: what the last backward needs is more."""
    step = StepWork((Collective(kind, "dp", 9000),), (), 0, 0)
    row = Bucket("row", 1, "float32", ranks, (("w", 2250),), trainable=True, varying="", tied=None)
    stage = replace(hand_stage(0, 2, step), buckets=(row,))
    assert stage_memory(stage, 2, 3, "1f1b", same).transient == transient
    assert (stage_peak(stage, 2, 3, "1f1b", same).moment == "reduction") == (kind == "reduce_scatter")


def test_optimizer_state_is_rounded_like_the_parameters_it_follows() -> None:
    """Two copies of 1000 -> 1024 bytes and a step count of 4 -> 64; the batch 64; parameters 1024 + 64 for 1003.

    The peak is the first line of the backward: h and the last output, the gradient, u and the workspace.
    """
    step = StepWork((), (), 2004, 0)
    memory = stage_memory(hand_stage(0, 1, step), 1, 1, "1f1b", allocator_rounding("cpu"))
    static = memory.parameters + memory.gradients + memory.optimizer_state + memory.inputs
    rounded = (1024 + 64) + 1024 + (2 * 1024 + 64) + 64
    inside = (128 + 64 + 64 + 64 + 64) - (100 + ACTIVATION + ACTIVATION + 30 + 40)
    assert memory.rounding == rounded - static + inside


def changed(stage: StageProgram, **fields: Any) -> StageProgram:
    """With another only chunk."""
    return replace(stage, chunks=(replace(stage.chunks[0], **fields),))


def test_a_stage_that_saves_what_it_never_made() -> None:
    with pytest.raises(VerificationError) as caught:
        stage_memory(changed(hand_stage(0, 2), saved=("ghost",)), 2, 1, "gpipe", same)
    assert caught.value.check == "saved"


def test_a_stage_without_the_activation_it_sends() -> None:
    with pytest.raises(VerificationError) as caught:
        stage_memory(changed(hand_stage(0, 2), sent=TensorMeta((7,), "uint8")), 2, 1, "gpipe", same)
    assert caught.value.check == "sent"


# ---- every instruction of a whole step, one at a time ----


@dataclass
class Heap:
    """Bytes of storages by name; a storage lives while anything holds it."""

    sizes: dict[str, int]
    holders: dict[str, set[str]]
    most: int = 0

    def take(self, storage: str, nbytes: int, holder: str = "program") -> None:
        self.sizes[storage] = nbytes
        self.holders.setdefault(storage, set()).add(holder)
        self.look()

    def drop(self, storage: str, holder: str = "program") -> None:
        self.holders.get(storage, set()).discard(holder)

    def look(self, workspace: int = 0) -> None:
        alive = sum(self.sizes[name] for name, holders in self.holders.items() if holders)
        self.most = max(self.most, alive + workspace)


def run_block(heap: Heap, block: Block, microbatch: str) -> None:
    for instruction in block.instructions:
        for out in instruction.outputs:
            heap.take(f"{out.storage}.{microbatch}", out.storage_bytes)
        heap.look(instruction.workspace_bytes)
        for storage in instruction.frees:
            heap.drop(f"{storage}.{microbatch}")


def send(heap: Heap, storage: str, microbatch: str, held: dict[str, deque[str]], window: int) -> None:
    """Hold what is sent for a window of sends of the same name; what is sent and not saved is held by nothing else."""
    own = held.setdefault(storage, deque())
    if len(own) == window:
        heap.drop(own.popleft(), "send")
    own.append(f"{storage}.{microbatch}")
    heap.holders[own[-1]].add("send")


def dynamic_bytes(stage: StageProgram, pp: int, microbatches: int, schedule: str, window: int = 1) -> int:
    """Peak of everything but the static parts, by running the step instruction by instruction."""
    heap, held = Heap({}, {}), dict[str, deque[str]]()
    for step in stage_schedule(schedule, stage.stage, pp, microbatches, len(stage.chunks), window):
        number, chunk = f"{step.microbatch}/{step.chunk}", stage.chunks[step.chunk]
        if isinstance(step, PostForward):
            heap.take(f"in.{number}", ACTIVATION)
        elif isinstance(step, PostBackward):
            heap.take(f"grad_out.{number}", ACTIVATION)
        elif isinstance(step, Forward):
            run_block(heap, chunk.forward, number)
        elif isinstance(step, Backward):
            run_block(heap, chunk.backward, number)
        elif isinstance(step, Weight):
            assert chunk.weight is not None
            run_block(heap, chunk.weight, number)
        elif isinstance(step, SendForward):
            send(heap, "out", number, held, window)
            if "out" not in chunk.saved:
                heap.drop(f"out.{number}")
        elif isinstance(step, SendBackward):
            send(heap, "grad_in", number, held, window)
            heap.drop(f"grad_in.{number}")
    return heap.most


@st.composite
def stages(draw: st.DrawFn) -> tuple[StageProgram, int]:
    """A random stage of a pipeline."""
    pp = draw(st.integers(1, 4))
    stage = draw(st.integers(0, pp - 1))
    step = draw(st.builds(StepWork, st.just(()), st.just(()), st.integers(0, 50), st.integers(0, 400)))
    return replace(hand_stage(stage, pp, step), chunks=(draw(chunks(stage, pp)),)), pp


@st.composite
def interleaved_stages(draw: st.DrawFn) -> tuple[StageProgram, int]:
    """A random stage of several random chunks."""
    pp, virtual_stages = draw(st.integers(2, 4)), draw(st.integers(2, 3))
    stage, length = draw(st.integers(0, pp - 1)), pp * virtual_stages
    own = tuple(draw(chunks(place, length)) for place in range(stage, length, pp))
    return replace(hand_stage(stage, pp), chunks=own), pp


@st.composite
def split_stages(draw: st.DrawFn) -> tuple[StageProgram, int]:
    """A random stage whose gradients of parameters run apart; anything may be kept for them."""
    pp = draw(st.integers(2, 4))
    stage = draw(st.integers(1, pp - 1))
    whole = draw(chunks(stage, pp))
    inputs = list(whole.backward.inputs)
    made = [value(f"b{i}", draw(st.integers(0, 90))) for i in range(draw(st.integers(0, 4)))]
    kept = [v for v in (*made, *inputs) if draw(st.booleans())]
    sent = value("grad_in", ACTIVATION)
    backward = lines_of(draw, [*made, sent], [v.storage for v in (*made, *inputs) if v not in kept])
    late = [value(f"w{i}", draw(st.integers(0, 90))) for i in range(draw(st.integers(1, 3)))]
    weight = lines_of(draw, late, [v.storage for v in (*late, *kept)])
    outputs = ("grad_in", *(v.name for v in kept))
    split = replace(
        whole,
        backward=Block("backward", tuple(inputs), backward, outputs),
        weight=Block("weight", tuple(kept), weight, ()),
        kept=tuple(v.storage for v in kept),
    )
    return replace(hand_stage(stage, pp), chunks=(split,)), pp


@st.composite
def chunks(draw: st.DrawFn, stage: int, pp: int) -> Chunk:
    """A random part of a chain; what it received is saved, freed at random points of the backward."""
    own = hand_stage(stage, pp).chunks[0]
    incoming = list(own.forward.inputs[1:])
    made = [value(f"f{i}", draw(st.integers(0, 90))) for i in range(draw(st.integers(0, 4)))]
    kept = [v for v in made if draw(st.booleans())]
    shared = stage < pp - 1 and draw(st.booleans())
    out = [value("out", ACTIVATION)] if stage < pp - 1 else []
    saved = [*incoming, *kept, *(out if shared else [])]
    temporary = [v.storage for v in made if v not in kept]
    forward = lines_of(draw, [*made, *out], temporary)
    inputs = [*saved, *([value("grad_out", ACTIVATION)] if out else [])]
    back = [value(f"b{i}", draw(st.integers(0, 90))) for i in range(draw(st.integers(1, 4)))]
    sent_back = [value("grad_in", ACTIVATION)] if stage else []
    backward = lines_of(draw, [*back, *sent_back], [v.storage for v in (*back, *inputs)])
    names = tuple(v.name for v in (*kept, *out))
    return replace(
        own,
        forward=Block("forward", own.forward.inputs, forward, names),
        backward=Block("backward", tuple(inputs), backward, tuple(v.name for v in sent_back)),
        saved=tuple(v.storage for v in saved),
    )


def lines_of(draw: st.DrawFn, made: Sequence[Value], dying: Sequence[str]) -> tuple[Instruction, ...]:
    """One instruction a value; each dying storage is freed at a random one not before its birth."""
    births = {v.storage: index for index, v in enumerate(made)}
    last = max(len(made) - 1, 0)
    deaths = [(draw(st.integers(births.get(name, 0), last)), name) for name in dying]
    return tuple(
        line([v], [name for at, name in deaths if at == index], draw(st.integers(0, 60)))
        for index, v in enumerate(made or [value("nothing", 0)])
    )


@given(stages(), st.integers(1, 6), st.sampled_from(("gpipe", "1f1b")))
def test_stage_memory_is_that_of_every_instruction(made: tuple[StageProgram, int], count: int, schedule: str) -> None:
    stage, pp = made
    memory = stage_memory(stage, pp, count, schedule, same)
    static = memory.parameters + memory.gradients + memory.optimizer_state + memory.inputs
    dynamic = max(dynamic_bytes(stage, pp, count, schedule), stage.step.optimizer_workspace_bytes)
    assert memory.total_bytes == static + dynamic
    assert memory.rounding == 0


@given(stages(), st.integers(1, 8), st.integers(2, 4))
def test_memory_in_windows_is_that_of_every_instruction(
    made: tuple[StageProgram, int], count: int, window: int
) -> None:
    stage, pp = made
    memory = stage_memory(stage, pp, count, "1f1b", same, window)
    static = memory.parameters + memory.gradients + memory.optimizer_state + memory.inputs
    assert memory.total_bytes == static + max(
        dynamic_bytes(stage, pp, count, "1f1b", window), stage.step.optimizer_workspace_bytes
    )


@given(interleaved_stages(), st.integers(1, 3))
def test_memory_of_interleaved_stages_is_that_of_every_instruction(made: tuple[StageProgram, int], rounds: int) -> None:
    stage, pp = made
    memory = stage_memory(stage, pp, rounds * pp, "interleaved", same)
    static = memory.parameters + memory.gradients + memory.optimizer_state + memory.inputs
    assert memory.total_bytes == static + dynamic_bytes(stage, pp, rounds * pp, "interleaved")


@given(split_stages(), st.integers(1, 6))
def test_memory_with_weight_blocks_is_that_of_every_instruction(made: tuple[StageProgram, int], count: int) -> None:
    stage, pp = made
    memory = stage_memory(stage, pp, count, "zero_bubble", same)
    static = memory.parameters + memory.gradients + memory.optimizer_state + memory.inputs
    assert memory.total_bytes == static + dynamic_bytes(stage, pp, count, "zero_bubble")


@given(stages(), st.integers(1, 6), st.sampled_from(("cpu", "cuda")))
def test_1f1b_never_needs_more_than_gpipe(made: tuple[StageProgram, int], count: int, kind: str) -> None:
    stage, pp = made
    need = {name: stage_memory(stage, pp, count, name, allocator_rounding(kind)) for name in ("gpipe", "1f1b")}
    assert need["1f1b"].total_bytes <= need["gpipe"].total_bytes


@given(stages(), st.integers(1, 6), st.sampled_from(("gpipe", "1f1b")), st.sampled_from(("cpu", "cuda")))
def test_rounding_only_adds(made: tuple[StageProgram, int], count: int, schedule: str, kind: str) -> None:
    stage, pp = made
    rounded = stage_memory(stage, pp, count, schedule, allocator_rounding(kind))
    assert rounded.rounding >= 0
    assert rounded.total_bytes >= stage_memory(stage, pp, count, schedule, same).total_bytes
