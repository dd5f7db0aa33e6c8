"""Memory of a stage against every instruction of a whole step, one at a time."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stage_by_hand import ACTIVATION, hand_stage, line, same, value

from cost_model.memory import allocator_rounding, stage_memory, stage_peak
from cost_model.program import Block, Chunk, Instruction, StageProgram, StepWork, Value
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

SIZES = st.integers(0, 90) | st.just(ACTIVATION)
"""Bytes of values; some look like what is sent."""


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
    made = [value(f"b{i}", draw(SIZES)) for i in range(draw(st.integers(0, 4)))]
    kept = [v for v in (*made, *inputs) if draw(st.booleans())]
    sent = value("grad_in", ACTIVATION)
    backward = lines_of(draw, [*made, sent], [v.storage for v in (*made, *inputs) if v not in kept])
    late = [value(f"w{i}", draw(SIZES)) for i in range(draw(st.integers(1, 3)))]
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
    made = [value(f"f{i}", draw(SIZES)) for i in range(draw(st.integers(0, 4)))]
    kept = [v for v in made if draw(st.booleans())]
    shared = stage < pp - 1 and draw(st.booleans())
    out = [value("out", ACTIVATION)] if stage < pp - 1 else []
    saved = [*incoming, *kept, *(out if shared else [])]
    temporary = [v.storage for v in made if v not in kept]
    forward = lines_of(draw, [*made, *out], temporary)
    inputs = [*saved, *([value("grad_out", ACTIVATION)] if out else [])]
    back = [value(f"b{i}", draw(SIZES)) for i in range(draw(st.integers(1, 4)))]
    sent_back = [value("grad_in", ACTIVATION)] if stage else []
    backward = lines_of(draw, [*back, *sent_back], [v.storage for v in (*back, *inputs)])
    names = tuple(v.name for v in (*out, *kept))
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


@given(stages(), st.integers(1, 12), st.sampled_from(("gpipe", "1f1b")))
def test_stage_memory_is_that_of_every_instruction(made: tuple[StageProgram, int], count: int, schedule: str) -> None:
    stage, pp = made
    memory = stage_memory(stage, pp, count, schedule, same)
    static = memory.parameters + memory.gradients + memory.optimizer_state + memory.inputs
    dynamic = max(dynamic_bytes(stage, pp, count, schedule), stage.step.optimizer_workspace_bytes)
    assert memory.total_bytes == static + dynamic
    assert memory.rounding == 0


@given(stages(), st.integers(1, 26), st.integers(2, 4))
def test_memory_in_windows_is_that_of_every_instruction(
    made: tuple[StageProgram, int], count: int, window: int
) -> None:
    stage, pp = made
    memory = stage_memory(stage, pp, count, "1f1b", same, window)
    static = memory.parameters + memory.gradients + memory.optimizer_state + memory.inputs
    assert memory.total_bytes == static + max(
        dynamic_bytes(stage, pp, count, "1f1b", window), stage.step.optimizer_workspace_bytes
    )


@given(interleaved_stages(), st.integers(1, 7))
def test_memory_of_interleaved_stages_is_that_of_every_instruction(made: tuple[StageProgram, int], rounds: int) -> None:
    stage, pp = made
    memory = stage_memory(stage, pp, rounds * pp, "interleaved", same)
    static = memory.parameters + memory.gradients + memory.optimizer_state + memory.inputs
    assert memory.total_bytes == static + dynamic_bytes(stage, pp, rounds * pp, "interleaved")


@given(split_stages(), st.integers(1, 12))
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


@given(
    st.one_of(
        st.tuples(stages(), st.integers(1, 40), st.sampled_from(("gpipe", "1f1b")), st.integers(1, 3)),
        st.tuples(interleaved_stages(), st.integers(1, 8), st.just("interleaved"), st.just(1)),
        st.tuples(split_stages(), st.integers(1, 30), st.just("zero_bubble"), st.just(1)),
    )
)
def test_a_peak_is_found_where_it_is_in_the_whole_schedule(
    drawn: tuple[tuple[StageProgram, int], int, str, int],
) -> None:
    (stage, pp), count, schedule, window = drawn
    count = count * pp if schedule == "interleaved" else count
    window = window if schedule == "1f1b" else 1
    found = stage_peak(stage, pp, count, schedule, same, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cost_model.memory.telling_microbatches", lambda schedule, stage, pp, count, *shape: count)
        assert stage_peak(stage, pp, count, schedule, same, window) == found
