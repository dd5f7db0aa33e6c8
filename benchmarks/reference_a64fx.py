"""GPT 1.3B on A64FX nodes: float32, one process a node, attention not fused."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from reference_build import Builder, Layout
from reference_hardware import MATMUL, Constant, Work
from reference_models import Shape
from reference_programs import recomputed
from reference_tables import Candidate, Row, Table

from cost_model.cluster import Cluster

ADAM = functools.partial(torch.optim.Adam, lr=1e-4, foreach=False, fused=True)
_VOCABULARY = 50304


class A64fx(Table):
    name = "a64fx"
    file = "gpt_1.3b_a64fx.json"
    dtype = "float32"
    constants = (Constant(MATMUL, 0.1, 0.9, "PyTorch on A64FX reaches 0.14 to 0.16 of the peak over a whole step"),)

    def _rows(self) -> Iterator[Row]:
        for raw in self.data["records"]:
            if raw["usable"] and raw["sec_per_iter"]:
                label = f"{raw['model']} table {raw['table']} row {raw['row']}"
                kept = "recomputed" if raw["activation_checkpointing"] else "kept"
                yield Row(label, f"tp={raw['tp']} {kept}", raw["sec_per_iter"], None, True, raw)

    def cluster(self, row: Row) -> Cluster:
        return Cluster.load("a64fx", row.source["nodes"])

    def candidates(self, row: Row) -> Sequence[Candidate]:
        raw = row.source
        layout = Layout(raw["dp"], raw["tp"], (raw["layers"],), "1f1b", raw["micro_batch"])
        shape = Shape(raw["layers"], raw["hidden"], raw["heads"], raw["seq"], _VOCABULARY)
        program = _builder(shape, raw["global_batch"]).program(layout)
        program = recomputed(program) if raw["activation_checkpointing"] else program
        return [Candidate(Work(program).seconds, 0, str(layout))]


@functools.cache
def _builder(shape: Shape, batch: int) -> Builder:
    return Builder(shape, batch, torch.float32, ADAM)
