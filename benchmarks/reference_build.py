"""Programs of the reference rows: traced, cut and rewritten by autopar under the plan that was run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from reference_models import Shape, meta_model

from autopar.options import Options
from autopar.planner.space import renaming
from autopar.planning import Job
from cost_model.cluster import Cluster
from cost_model.plan import Plan, StagePlan
from cost_model.program import Program
from passes.fingerprint import fingerprint
from passes.segment import Segment

# Megatron-LM's tensor parallelism (arXiv:1909.08053): columns of the first, rows of the second product of a pair.
_BLOCK = {
    "op:layer_norm": "R R R -> R",
    "op:linear": "V S(0,3) S(0,3) -> S(2,3)",
    "op:split": "S(2,3) -> S(2) S(2) S(2)",
    "op:reshape_default": "S(2) -> S(2)",
    "op:transpose": "S(2) -> S(1)",
    "op:reshape_default_1": "S(2) -> S(2)",
    "op:transpose_1": "S(2) -> S(1)",
    "op:reshape_default_2": "S(2) -> S(2)",
    "op:transpose_2": "S(2) -> S(1)",
    "op:mul": "S(1) -> S(1)",
    "op:transpose_3": "S(1) -> S(1)",
    "op:matmul": "S(1) S(1) -> S(1)",
    "op:masked_fill": "S(1) V -> S(1)",
    "op:softmax": "S(1) -> S(1)",
    "op:detach": "S(1) -> S(1)",
    "op:gt": "S(1) -> S(1)",
    "op:mul_1": "S(1) S(1) -> S(1)",
    "op:matmul_1": "S(1) S(1) -> S(1)",
    "op:transpose_4": "S(1) -> S(2)",
    "op:reshape_default_3": "S(2) -> S(2)",
    "op:linear_1": "S(2) S(1) P -> P",
    "op:detach_1": "R -> R",
    "op:gt_1": "R -> R",
    "op:mul_2": "R R -> R",
    "op:add_1": "R R -> R",
    "op:layer_norm_1": "R R R -> R",
    "op:linear_2": "V S(0) S(0) -> S(2)",
    "op:gelu": "S(2) -> S(2)",
    "op:linear_3": "S(2) S(1) P -> P",
    "op:detach_2": "R -> R",
    "op:gt_2": "R -> R",
    "op:mul_3": "R R -> R",
    "op:add_2": "R R -> R",
    "input:p_model_blocks_0_norm1_weight": "R",
    "input:p_model_blocks_0_norm1_bias": "R",
    "input:p_model_blocks_0_attention_qkv_weight": "S(0,3)",
    "input:p_model_blocks_0_attention_qkv_bias": "S(0,3)",
    "input:p_model_blocks_0_attention_out_weight": "S(1)",
    "input:p_model_blocks_0_attention_out_bias": "R",
    "input:p_model_blocks_0_norm2_weight": "R",
    "input:p_model_blocks_0_norm2_bias": "R",
    "input:p_model_blocks_0_up_weight": "S(0)",
    "input:p_model_blocks_0_up_bias": "S(0)",
    "input:p_model_blocks_0_down_weight": "S(1)",
    "input:p_model_blocks_0_down_bias": "R",
    "form:add": "R",
    "form:softmax": "S(1)",
    "form:linear_1": "R",
    "form:add_1": "R",
    "form:linear_3": "R",
}
_FUSED = {**{key: label for key, label in _BLOCK.items() if key[3:7] not in ("dete", "gt", "gt_1", "gt_2", "mask")}}
_FUSED |= {"op:mul": "S(1) -> S(1)", "op:mul_1": "R -> R", "op:mul_2": "R -> R"}
for _gone in ("op:mul_3", "form:softmax", "form:linear_1", "form:linear_3"):
    del _FUSED[_gone]
_ENDS = {
    "op:embedding": "S(0) V -> P",
    "op:add": "P P -> P",
    "op:layer_norm": "R R R -> R",
    "op:linear": "V S(0) -> S(2)",
    "op:reshape_default": "S(2) -> S(1)",
    "op:cross_entropy_sum_default": "S(1) R -> R inside",
    "op:div_tensor": "R R -> R",
    "op:to_dtype": "R -> R",
    "input:p_model_token_weight": "S(0)",
    "input:p_model_position_weight": "S(0)",
    "input:p_model_norm_weight": "R",
    "input:p_model_norm_bias": "R",
}
_FUSED_ENDS = {**_ENDS, "op:to_dtype": "S(1) -> S(1)"}  # of the logits, not of the loss


@dataclass(frozen=True)
class Layout:
    """How a row splits a model. cuts: layers of each stage; microbatch: samples on each replica."""

    dp: int
    tp: int
    cuts: tuple[int, ...]
    schedule: str
    microbatch: int

    @property
    def pp(self) -> int:
        return len(self.cuts)

    @property
    def devices(self) -> int:
        return self.dp * self.tp * self.pp

    def __str__(self) -> str:
        return f"dp={self.dp} tp={self.tp} pp={self.pp} x{self.microbatch} {self.schedule}"


def balanced(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, as equal as they go, the first ones larger."""
    return tuple(layers // stages + (stage < layers % stages) for stage in range(stages))


class Builder:
    """One model, traced once; a program for each layout."""

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype, optimizer: Any) -> None:
        model, inputs = meta_model(shape, batch, dtype)
        options = Options.of(None, optimizer, None, None, None, None)
        self.shape, self.batch = shape, batch
        self._job = Job.of(model, Cluster.load("dgx2-v100-32gb", 1), inputs, options)

    @functools.cache  # noqa: B019 - builders live as long as the benchmark
    def program(self, layout: Layout) -> Program:
        return self._job.linked(self._plan(layout)).program

    def _plan(self, layout: Layout) -> Plan:
        parts = self._job.traced.segments
        ends = _stage_ends(parts, layout.cuts)
        microbatches, rest = divmod(self.batch, layout.dp * layout.microbatch)
        assert not rest, layout
        ends_labels = _FUSED_ENDS if self.shape.fused and self.shape.head else _ENDS
        labels = (_FUSED if self.shape.fused else _BLOCK, ends_labels)
        choices = _choices(parts, *labels) if layout.tp > 1 else [{} for _ in parts]
        stages = tuple(
            StagePlan(first, last, {k: v for own in choices[first:last] for k, v in own.items()})
            for first, last in zip((0, *ends), ends, strict=False)
        )
        return Plan(
            model=fingerprint(self._job.traced.global_graph),
            cluster="reference",
            batch=self.batch,
            dp=layout.dp,
            tp=layout.tp,
            pp=layout.pp,
            schedule=layout.schedule,
            microbatch_size=layout.microbatch,
            microbatches=microbatches,
            memory_cap_bytes=0,
            placement=megatron_placement(layout),
            stages=stages,
            segment_labels=tuple(part.label for part in parts),
        )


def megatron_placement(layout: Layout) -> tuple[int, ...]:
    """Device of each (stage, replica, shard): tensor parallel innermost, then data parallel, then stages."""
    return tuple(range(layout.devices))


def _stage_ends(parts: tuple[Segment, ...], cuts: tuple[int, ...]) -> tuple[int, ...]:
    """Where each stage ends: after its last block; what follows the last block is the last stage's."""
    blocks = [index for index, part in enumerate(parts) if _is_block(part)]
    ends, done = [], 0
    for layers in cuts:
        done += layers
        ends.append(blocks[done - 1] + 1)
    assert done == len(blocks), (cuts, len(blocks))
    return (*ends[:-1], len(parts))


def _choices(parts: tuple[Segment, ...], block: Mapping[str, str], ends: Mapping[str, str]) -> list[Mapping[str, str]]:
    first = next(part for part in parts if _is_block(part))
    return [_of_block(first, part, block) if _is_block(part) else _of_end(part, ends) for part in parts]


def _is_block(part: Segment) -> bool:
    return any(node.startswith("softmax") for node in part.nodes)


def _of_block(first: Segment, part: Segment, block: Mapping[str, str]) -> dict[str, str]:
    rename = renaming(first, part)
    return {rename(variable): label for variable, label in block.items()}


def _of_end(part: Segment, ends: Mapping[str, str]) -> dict[str, str]:
    found = {f"input:{name}": ends[f"input:{name}"] for name in part.parameters}
    for node in part.nodes:
        base = node.rsplit("_", 1)[0] if node.rsplit("_", 1)[-1].isdigit() else node
        if (label := ends.get(f"op:{base}")) is not None:
            found[f"op:{node}"] = label
    return found


def stretched(program: Program, pp: int) -> Program:
    """A pipeline of three stages with its middle one repeated: equal stages are built once."""
    assert program.pp == 3 and pp >= 3
    first, middle, last = program.stages
    inner = tuple(replace(middle, stage=stage) for stage in range(1, pp - 1))
    cells = [(s, d, t) for s in range(pp) for d in range(program.dp) for t in range(program.tp)]
    devices = {cell: index for index, cell in enumerate(cells)}
    return replace(program, pp=pp, stages=(first, *inner, replace(last, stage=pp - 1)), devices=devices)
