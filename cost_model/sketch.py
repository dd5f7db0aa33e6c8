"""Sketches: a program under another schedule, to be priced before it is rewritten.

The same instructions in other blocks: what they take and what they send is said; of what they hold in memory the least
that all stages together do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cost_model.priced import PricedCluster
from cost_model.prices import price_stages
from cost_model.program import Block, Chunk, Instruction, Program
from cost_model.schedule import Backward, Forward, Step, Weight, splits_backward, stage_schedule
from cost_model.simulate import step_time_s


def sketched_step_s(sketch: Program, cluster: PricedCluster) -> float:
    """Seconds of a step, each stage as slow as its slowest rank."""
    return step_time_s(sketch, (price_stages(sketch, cluster),), crowding=cluster.crowding)


def with_weight_blocks(program: Program) -> Program:
    """Zero bubble: what the gradient that is sent back does not need runs apart."""
    stages = tuple(
        replace(stage, chunks=tuple(map(_split, stage.chunks)))
        if splits_backward("zero_bubble", stage.stage)
        else stage
        for stage in program.stages
    )
    return replace(program, schedule="zero_bubble", stages=stages)


def _split(chunk: Chunk) -> Chunk:
    wanted, first = set(chunk.backward.outputs), set[int]()
    for index in reversed(range(len(chunk.backward.instructions))):
        instruction = chunk.backward.instructions[index]
        if any(value.name in wanted for value in instruction.outputs):
            first.add(index)
            wanted.update(instruction.inputs)
    lines = list(enumerate(chunk.backward.instructions))
    backward = replace(chunk.backward, instructions=tuple(line for index, line in lines if index in first))
    late = tuple(line for index, line in lines if index not in first)
    return replace(chunk, backward=backward, weight=Block("weight", (), late, ()))


def with_virtual_stages(program: Program, ends: Sequence[int]) -> Program:
    """Interleaved: the chain cut before the segments ``ends``, as many parts for each stage."""
    parts = [_part(program, first, last) for first, last in zip((0, *ends), ends, strict=False)]
    crossing = next(chunk.sent for chunk in program.chain if chunk.sent is not None)
    last = len(parts) - 1
    chain = [
        replace(part, sent=crossing if k < last else None, received=crossing if k else None)
        for k, part in enumerate(parts)
    ]
    stages = tuple(replace(stage, chunks=tuple(chain[stage.stage :: program.pp])) for stage in program.stages)
    return replace(program, schedule="interleaved", virtual_stages=len(parts) // program.pp, stages=stages)


def least_saved_bytes(program: Program, ends: Sequence[int]) -> int:
    """What the stages of ``with_virtual_stages`` have saved when each has most, all together, but for what crosses a
    cut: no more than they will."""
    saved = [_saved_bytes(program, first, last) for first, last in zip((0, *ends), ends, strict=False)]
    parts, unkept = len(ends) // program.pp, [0] * (len(ends) // program.pp)
    return sum(
        _most_held(
            saved[stage :: program.pp],
            unkept,
            stage_schedule("interleaved", stage, program.pp, program.microbatches, parts),
        )
        for stage in range(program.pp)
    )


def most_saved_bytes(sketch: Program) -> tuple[int, ...]:
    """What each stage of a program or of ``with_weight_blocks`` has saved, and kept for gradients of parameters, when
    it has most: no more than it will hold."""
    return _most(sketch, lambda chunk: _saved_bytes(sketch, chunk.segments[0], chunk.segments[-1] + 1))


def most_kept_bytes(sketch: Program) -> tuple[int, ...]:
    """What each stage of ``with_weight_blocks`` keeps for gradients of parameters when it keeps most: as much where
    all is made again as where nothing is."""
    return _most(sketch, lambda chunk: 0)


def _most(sketch: Program, saved_bytes: Callable[[Chunk], int]) -> tuple[int, ...]:
    """Of each stage, with so many bytes of each microbatch saved for the backward of a chunk."""
    found = []
    for stage in sketch.stages:
        steps = stage_schedule(
            sketch.schedule, stage.stage, sketch.pp, sketch.microbatches, sketch.virtual_stages, sketch.window
        )
        found.append(_most_held([*map(saved_bytes, stage.chunks)], [*map(_kept_bytes, stage.chunks)], steps))
    return tuple(found)


def _most_held(saved: Sequence[int], kept: Sequence[int], steps: Sequence[Step]) -> int:
    """Bytes of one microbatch in each chunk of a stage. saved: until its backward; kept: from then on until its weight
    block has run."""
    held = most = 0
    for step in steps:
        if isinstance(step, Forward):
            held += saved[step.chunk]
        elif isinstance(step, Backward):
            held += kept[step.chunk] - saved[step.chunk]
        elif isinstance(step, Weight):
            held -= kept[step.chunk]
        most = max(most, held)
    return most


def _kept_bytes(chunk: Chunk) -> int:
    """What its weight block reads of what was saved, or made on the way to the gradient that is sent back."""
    if chunk.weight is None:
        return 0
    forward, backward = (
        [v for i in block.instructions for v in i.outputs] for block in (chunk.forward, chunk.backward)
    )
    given = {v.storage for v in chunk.backward.inputs}
    held = {*chunk.saved, *(v.storage for v in backward if v.storage not in given)}
    values = {v.name: v for v in (*forward, *backward) if v.storage in held}
    read = (values[name] for i in chunk.weight.instructions for name in i.inputs if name in values)
    return sum({v.storage: v.storage_bytes for v in read}.values())


def _saved_bytes(program: Program, first: int, last: int) -> int:
    """Of one microbatch, what instructions of segments [first, last) save."""
    total = 0
    for chunk in program.chain:
        saved = set(chunk.saved)
        values = [value for i in _lines(chunk, chunk.forward, first, last) for value in i.outputs]
        total += sum({v.storage: v.storage_bytes for v in values if v.storage in saved}.values())
    return total


def _part(program: Program, first: int, last: int) -> Chunk:
    forward = [i for chunk in program.chain for i in _lines(chunk, chunk.forward, first, last)]
    backward = [i for chunk in program.chain for i in _lines(chunk, chunk.backward, first, last)]
    blocks = (Block("forward", (), tuple(forward), ()), Block("backward", (), tuple(backward), ()))
    return Chunk(tuple(range(first, last)), *blocks, (), None, None)


def _lines(chunk: Chunk, block: Block, first: int, last: int) -> list[Instruction]:
    """Those of segments [first, last) in a block of the chunk; those of no segment are of the chunk's first one."""
    begin, end = chunk.segments[0], chunk.segments[-1]
    if begin >= last or first > end:
        return []
    return [i for i in block.instructions if first <= max(i.segment, begin) < last]
