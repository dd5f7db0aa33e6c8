"""Liveness against blocks and stages worked by hand, and against a walk of every instruction of a whole step."""

from dataclasses import replace
from typing import Any

import pytest
from stage_by_hand import ACTIVATION, KIB, hand_stage, line, same, value

from cost_model.errors import UnknownNameError, VerificationError
from cost_model.liveness import block_peak
from cost_model.memory import allocator_rounding, stage_memory, stage_peak
from cost_model.program import Block, Collective, StageProgram, StepWork
from cost_model.schedule import (
    Backward,
)
from cost_model.shards import Bucket
from cost_model.tensor import TensorMeta


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
