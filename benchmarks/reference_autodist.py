"""AutoDist's table: GPT on one server of V100, plans not recorded, split by tensor or also by pipeline."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from reference_build import Builder, Layout, balanced
from reference_hardware import BANDWIDTH, MATMUL, OVERHEAD, START, STREAM, Constant, Work
from reference_models import Shape
from reference_programs import recomputed_stage, repeated, synchronised, unfused_losses
from reference_tables import Candidate, Row, Table

from cost_model.cluster import Cluster
from cost_model.memory import allocator_rounding, stage_peak
from cost_model.program import Program, StageProgram

GIB = 2**30
ADAM = functools.partial(torch.optim.Adam, lr=1e-4, foreach=False, fused=True)
_TENSOR = "tensor_parallel_only"
_SHORTER_LAST = (0, 1, 2)


class AutoDist(Table):
    """The planner of that system chose among data, tensor (and pipeline) splits, and what to recompute, under the cap.

    Gradients were summed over replicas every microbatch. Recompute is by whole blocks, as few as the cap allows.
    """

    file = "autodist_v100.json"
    mode = _TENSOR

    def _rows(self) -> Iterator[Row]:
        for raw in self.data["autodist_details"]:
            if raw["mode"] == self.mode and raw["ran"] and raw["run_time_s"] is not None:
                label = f"{raw['config']} x{raw['micro_batch_size']}"
                yield Row(label, raw["config"], raw["run_time_s"], self._memory(raw), self.mode == _TENSOR, raw)

    def _memory(self, raw: Any) -> float | None:
        return raw["run_mem_gb"] * GIB if self.mode == _TENSOR and raw["run_mem_gb"] else None

    def _config(self, row: Row) -> Any:
        return next(c for c in self.data["model_config"] if c["params"] == row.group)

    def cluster(self, row: Row) -> Cluster:
        return Cluster.load("dgx2-v100-32gb", self._config(row)["gpus"])

    def candidates(self, row: Row) -> Sequence[Candidate]:
        config, found = self._config(row), []
        for layout in self._layouts(config["layers"], config["gpus"], row.source["micro_batch_size"]):
            program = _fitted(
                unfused_losses(self._builder(row.group).program(layout)), row.source["memory_constraint_gb"] * GIB
            )
            if program is not None:
                found.append(Candidate(Work(program).seconds, peak_bytes(program), str(layout)))
        assert found, f"{row.label}: nothing fits"
        return found

    @functools.cache  # noqa: B019 - tables live as long as the benchmark
    def _builder(self, name: str) -> Builder:
        config = next(c for c in self.data["model_config"] if c["params"] == name)
        constants = self.data["constants"]
        shape = Shape(config["layers"], config["hidden"], config["heads"], constants["seq"], constants["vocab"])
        return Builder(shape, constants["global_batch"], torch.float16, ADAM)

    def _layouts(self, layers: int, gpus: int, microbatch: int) -> Iterable[Layout]:
        """Every mesh; the label of a row is the microbatch before it is split over replicas."""
        for pp in _divisors(gpus) if self.mode != _TENSOR else (1,):
            for dp in _divisors(gpus // pp):
                if microbatch % dp == 0:
                    for cuts in _cuts(layers, pp):
                        yield Layout(dp, gpus // pp // dp, cuts, "1f1b", microbatch // dp)


class AutoDistTensor(AutoDist):
    name = "autodist-tensor"
    constants = (
        Constant(MATMUL, 0.5, 0.95, "V100: 98 of 125 TFLOP/s seen in large products"),
        Constant(STREAM, 0.7, 0.93, "BabelStream on V100: 0.88 to 0.93"),
        Constant(OVERHEAD, 1e-6, 12e-6, "CUDA kernel start and drain"),
        Constant(BANDWIDTH, 20e9, 120e9, "150 GB/s of NVLink, 0.8 of it in nccl-tests"),
        Constant(START, 1e-5, 4e-4, "NCCL launch, and waiting for the slowest rank"),
    )


class AutoDistPipeline(AutoDist):
    """Predicted from what the tensor-parallel rows fixed; nothing is fitted here."""

    name = "autodist-pipeline"
    mode = "include_pipeline"


def peak_bytes(program: Program) -> int:
    return max(_stage_bytes(stage, program) for stage in program.stages)


def _stage_bytes(stage: StageProgram, program: Program) -> int:
    rounding = allocator_rounding("cuda")
    return stage_peak(stage, program.pp, program.microbatches, program.schedule, rounding).memory.total_bytes


def _fitted(program: Program, cap_bytes: float) -> Program | None:
    """With as few recomputed blocks in each stage as the cap allows; None where all are not enough."""
    stages = []
    for stage in program.stages:
        blocks, low = repeated(stage), 0
        high = len(blocks) + 1
        while low < high:
            middle = (low + high) // 2
            if middle > len(blocks) or _stage_bytes(recomputed_stage(stage, blocks[:middle]), program) <= cap_bytes:
                high = middle
            else:
                low = middle + 1
        if low > len(blocks):
            return None
        stages.append(recomputed_stage(stage, blocks[:low]))
    return synchronised(replace(program, stages=tuple(stages)))


def _divisors(count: int) -> list[int]:
    return [d for d in range(1, count + 1) if count % d == 0]


def _cuts(layers: int, pp: int) -> list[tuple[int, ...]]:
    """Equal stages, and such whose last one, which has the head, is shorter."""
    if pp == 1:
        return [(layers,)]
    cuts = {(*balanced(layers - last, pp - 1), last) for d in _SHORTER_LAST if (last := layers // pp - d) > 0}
    return sorted(cuts)
