"""Megatron-LM's weak scaling on DGX A100: mixed precision, every block recomputed, interleaved stages."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from reference_build import Builder, Layout, balanced, stretched
from reference_hardware import LINK, MATMUL, STREAM, Constant, Work, shipped
from reference_models import Shape
from reference_programs import recomputed, unfused_losses
from reference_tables import Candidate, Row, Table

from cost_model.cluster import Cluster
from cost_model.program import Collective, Instruction, Program, StageProgram
from cost_model.tensor import TensorMeta

ADAM = functools.partial(torch.optim.Adam, lr=1e-4, foreach=False, fused=True)
# Bytes a parameter that mixed precision's update moves, against those of a float16 program's: float16 gradients are
# copied to float32 ones, unscaled and measured for clipping; moments and master weights are float32.
_OPTIMIZER_SHARE = ((2 + 4) + 2 * 4 + 4 + 4 + 2 * 3 * 4 + 2) / (7 * 2)


class Megatron(Table):
    """Plans are known. Gradients are float16 where they are summed, after the backward or behind it ("torch")."""

    name = "megatron"
    file = "megatron_a100_selene.json"
    level = 1
    constants = (
        Constant(MATMUL, 0.5, 0.95, "A100: 265 to 290 of 312 TFLOP/s seen in large products"),
        Constant(STREAM, 0.5, 0.93, "BabelStream on A100: 0.85 to 0.92"),
        Constant(LINK, 0.3, 1.0, "of 200 Gbit/s a device"),
    )

    def carried(self) -> Mapping[str, float]:
        """What kernels reach of their peaks on the GPU before, the V100, from AutoDist's rows."""
        return shipped(Cluster.load("dgx2-v100-32gb", 16), (MATMUL, STREAM))

    def _rows(self) -> Iterator[Row]:
        for raw in self.data["records"]:
            yield Row(raw["model_size"], raw["model_size"], raw["iter_time_s_implied"], None, True, raw)

    def cluster(self, row: Row) -> Cluster:
        return Cluster.load("dgx-a100-80gb", row.source["gpus"])

    def candidates(self, row: Row) -> Sequence[Candidate]:
        raw = row.source
        built = min(raw["pp"], 3)
        layers = built * raw["layers_per_stage"]
        shape = Shape(layers, raw["hidden"], raw["heads"], raw["seq"], raw["vocab"], fused=True)
        layout = Layout(raw["dp"], raw["tp"], balanced(layers, built), "1f1b", raw["micro_batch"])
        program = Builder(shape, raw["global_batch"], torch.float16, ADAM).program(layout)
        program = unfused_losses(recomputed(scattered(_mixed(with_masks(program)))))
        work = Work(stretched(program, raw["pp"]) if raw["pp"] > 3 else program)
        text = f"{layout} of {raw['pp']} stages, interleaved {raw['interleave_v']}"
        return [Candidate(functools.partial(_seconds, work, raw["interleave_v"], raw["ddp_impl"] == "torch"), 0, text)]


def _seconds(work: Work, chunks: int, overlapped: bool, cluster: Cluster) -> float:
    """Interleaving shortens the bubble, (p - 1) (forward + backward), to one of ``chunks`` parts and repeats the
    transfers so often (Narayanan et al., 2021, arXiv:2104.04473, 2.2). What is summed behind a backward shows only
    where it takes longer than that.
    """
    whole_s = work.seconds(cluster)
    prices, program = work.prices(cluster), work.program
    slowest = max(prices, key=lambda price: price.chunks[0].blocks_s)
    longest = slowest.chunks[0]
    bubble_s = (program.pp - 1) * longest.blocks_s
    transfers_s = program.microbatches * (longest.to_next_s + longest.from_next_s)
    whole_s += (chunks - 1) * transfers_s - (1 - 1 / chunks) * bubble_s
    if overlapped:
        whole_s -= min(sum(slowest.step_collectives_s), longest.backward.total_s)
    return whole_s


def _mixed(program: Program) -> Program:
    """With an optimizer that keeps float32 states and weights for a float16 model."""
    return replace(program, stages=tuple(_mixed_stage(stage) for stage in program.stages))


def _mixed_stage(stage: StageProgram) -> StageProgram:
    costs = tuple(replace(cost, nbytes=cost.nbytes * _OPTIMIZER_SHARE) for cost in stage.step.optimizer_costs)
    return replace(stage, step=replace(stage.step, optimizer_costs=costs))


def with_masks(program: Program) -> Program:
    """Dropout's masks are kept, one byte an element: written where x is scaled, read where its gradient is.

    Products with a number are dropouts of ``Shape.fused`` and nothing else.
    """
    return replace(program, stages=tuple(_with_masks(stage) for stage in program.stages))


def _with_masks(stage: StageProgram) -> StageProgram:
    (chunk,) = stage.chunks
    forward, backward = (
        replace(block, instructions=tuple(_with_mask(line) for line in block.instructions)) for block in chunk.blocks
    )
    return replace(stage, chunks=(replace(chunk, forward=forward, backward=backward),))


def _with_mask(line: Instruction) -> Instruction:
    if line.cost is None or not line.op.startswith("aten.mul.") or len(line.inputs) > 1:
        return line
    mask_bytes = line.outputs[0].meta.numel
    return replace(line, cost=replace(line.cost, nbytes=line.cost.nbytes + mask_bytes))


def scattered(program: Program) -> Program:
    """Each shard sends its part of what crosses a cut, and the receivers gather the parts (the same, 4.1)."""
    stages = []
    for stage in program.stages:
        (chunk,) = stage.chunks
        forward, backward = chunk.blocks
        if chunk.received is not None:
            forward = replace(forward, instructions=(_gather(chunk.received), *forward.instructions))
        if chunk.sent is not None:
            backward = replace(backward, instructions=(_gather(chunk.sent), *backward.instructions))
            part = TensorMeta((chunk.sent.numel // program.tp,), chunk.sent.dtype)
            chunk = replace(chunk, sent=part)
        stages.append(replace(stage, chunks=(replace(chunk, forward=forward, backward=backward),)))
    return replace(program, stages=tuple(stages))


def _gather(meta: TensorMeta) -> Instruction:
    collective = Collective("all_gather", "tp", meta.nbytes)
    return Instruction("autopar.all_gather.default", (), (), None, collective, 0, (), -1)
