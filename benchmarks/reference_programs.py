"""What other systems did to their programs and autopar does not (yet): rewrites of a priced ``Program``.

Each gives a whole program again, so that ops, collectives, liveness and schedule are priced as ever.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from cost_model.program import Block, Chunk, Instruction, OpCost, Program, StageProgram


def synchronised(program: Program) -> Program:
    """Gradients are summed over replicas after the backward of every microbatch, not once per step."""
    return replace(program, stages=tuple(_synchronised(stage) for stage in program.stages))


def _synchronised(stage: StageProgram) -> StageProgram:
    moved = [c for c in stage.step.collectives if c.axis in ("dp", "dp_tp")]
    left = tuple(c for c in stage.step.collectives if c not in moved)
    calls = tuple(Instruction("autopar.all_reduce.default", (), (), None, c, 0, (), -1) for c in moved)
    (chunk,) = stage.chunks
    backward = replace(chunk.backward, instructions=(*chunk.backward.instructions, *calls))
    step = replace(stage.step, collectives=left, beside_bytes=(), groups=())
    return replace(stage, chunks=(replace(chunk, backward=backward),), step=step)


def unfused_losses(program: Program) -> Program:
    """Cross entropy of a vocabulary that ranks share takes a pass of its own for each step of its formula, as in
    Megatron-LM's ``vocab_parallel_cross_entropy``: logits in float32, their maxima, differences, exponentials and sums;
    then products, labels subtracted, and the cast back."""
    return replace(program, stages=tuple(_unfused_stage(stage) for stage in program.stages))


def _unfused_stage(stage: StageProgram) -> StageProgram:
    chunks = tuple(
        replace(chunk, forward=_unfused(chunk.forward), backward=_unfused(chunk.backward)) for chunk in stage.chunks
    )
    return replace(stage, chunks=chunks)


_FORMULA = {
    "autopar.class_shares.default": (1.5, 1.0, 2.0, 2.0, 1.0),
    "autopar.class_gradients.default": (2.0, 3.0, 1.5),
}
"""Bytes that each pass moves, in float32 logits, where these come and go in half as many."""


def _unfused(block: Block) -> Block:
    found: list[Instruction] = []
    for instruction in block.instructions:
        passes = _FORMULA.get(instruction.op)
        if passes is None or instruction.cost is None:
            found.append(instruction)
            continue
        elements = instruction.outputs[0].meta.numel
        costs = [OpCost("elementwise", float(elements), 4.0 * elements * share, "float32") for share in passes]
        more = (Instruction("aten.mul.Tensor", (), (), cost, None, 0, (), instruction.segment) for cost in costs[1:])
        found += [replace(instruction, cost=costs[0]), *more]
    return replace(block, instructions=tuple(found))


def recomputed(program: Program, blocks: Sequence[int] | None = None) -> Program:
    """The first so many transformer blocks of each stage (None: all) run forward again before their backward.

    Only what enters such a block is kept. Collectives inside run again too, as in Megatron-LM and nnScaler.
    """
    chosen = [repeated(stage) for stage in program.stages]
    counts = [len(own) for own in chosen] if blocks is None else blocks
    pairs = zip(program.stages, chosen, counts, strict=True)
    return replace(program, stages=tuple(recomputed_stage(stage, own[:count]) for stage, own, count in pairs))


def repeated(stage: StageProgram) -> list[int]:
    """Segments of a stage that attend: its transformer blocks."""
    forward = stage.chunks[0].forward
    heavy = {i.segment for i in forward.instructions if i.op in ("aten.bmm.default", "aten._softmax.default")}
    return [segment for segment in stage.segments if segment in heavy]


def recomputed_stage(stage: StageProgram, chosen: Collection[int]) -> StageProgram:
    (chunk,) = stage.chunks
    made = _made_by_segment(chunk.forward)
    outside = _read_elsewhere(chunk, chosen)
    dropped = {s for s in chunk.saved if made.get(s) in chosen and s not in outside}
    backward = replace(
        chunk.backward,
        inputs=tuple(v for v in chunk.backward.inputs if v.storage not in dropped),
        instructions=_with_forward(chunk, chosen, outside),
    )
    forward, saved = _freeing(chunk.forward, dropped), tuple(s for s in chunk.saved if s not in dropped)
    return replace(stage, chunks=(replace(chunk, forward=forward, backward=backward, saved=saved),))


def _made_by_segment(forward: Block) -> dict[str, int]:
    made: dict[str, int] = {}
    for instruction in forward.instructions:
        for value in instruction.outputs:
            made.setdefault(value.storage, instruction.segment)
    return made


def _read_elsewhere(chunk: Chunk, chosen: Collection[int]) -> set[str]:
    """Storages of chosen segments that another segment's forward reads, or that leave the stage: they are kept."""
    storages = {v.name: v.storage for i in chunk.forward.instructions for v in i.outputs}
    made = _made_by_segment(chunk.forward)
    kept = {storages[name] for name in chunk.forward.outputs if name in storages and storages[name] not in chunk.saved}
    for instruction in chunk.forward.instructions:
        for name in instruction.inputs:
            storage = storages.get(name)
            if storage is not None and made[storage] in chosen and made[storage] != instruction.segment:
                kept.add(storage)
    return kept


def _freeing(forward: Block, dropped: Collection[str]) -> Block:
    """Each dropped storage dies after the last instruction that touches it."""
    storages = {v.name: v.storage for i in forward.instructions for v in i.outputs}
    last: dict[str, int] = {}
    for index, instruction in enumerate(forward.instructions):
        for storage in [storages.get(n) for n in instruction.inputs] + [v.storage for v in instruction.outputs]:
            if storage in dropped:
                last[str(storage)] = index
    frees: dict[int, list[str]] = {}
    for storage, index in last.items():
        frees.setdefault(index, []).append(storage)
    instructions = tuple(
        replace(i, frees=(*i.frees, *frees[k])) if k in frees else i for k, i in enumerate(forward.instructions)
    )
    outputs = tuple(name for name in forward.outputs if storages.get(name) not in dropped)
    return replace(forward, instructions=instructions, outputs=outputs)


def _with_forward(chunk: Chunk, chosen: Collection[int], outside: Collection[str]) -> tuple[Instruction, ...]:
    """The backward, with each chosen segment's forward before its first instruction."""
    again: dict[int, list[Instruction]] = {segment: [] for segment in chosen}
    made = _made_by_segment(chunk.forward)
    for instruction in chunk.forward.instructions:
        if instruction.segment in chosen:
            frees = tuple(s for s in instruction.frees if s not in outside and made.get(s) == instruction.segment)
            again[instruction.segment].append(replace(instruction, frees=frees))
    instructions: list[Instruction] = []
    for instruction in chunk.backward.instructions:
        instructions += again.pop(instruction.segment, [])
        instructions.append(instruction)
    assert not again, again
    return tuple(instructions)
