"""Three nodes on shaped networks: GPipe and 1F1B of DTFM, which has a stream for sends and one for receives."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from reference_build import Builder, Layout, balanced
from reference_hardware import FIRST, MATMUL, Constant, Work, slower
from reference_models import Shape
from reference_programs import recomputed
from reference_tables import Candidate, Row, Table

from cost_model.cluster import Cluster
from cost_model.collectives import Link

SGD = functools.partial(torch.optim.SGD, lr=1e-3)
_BITS = 8
_FIRST_NODE = 0.87  # fitted, as the device file's share of the float32 peak
_NOMINAL_BYTES_PER_S = 10e9 / _BITS  # of the shipped file's network


class Networks(Table):
    """GPT-3 small without a head, float32, every block recomputed. Delay is one-way, on the sender's side."""

    name = "networks"
    file = "gpt3_small_pipeline_networks.json"
    dtype = "float32"
    constants = (
        Constant(MATMUL, 0.4, 0.98, "share of the float32 peak; cuBLAS reaches 0.9 and more in large products"),
        Constant(FIRST, 0.85, 1.0, "three nodes of one kind: clocks of V100 boards differ by a tenth"),
    )

    def _rows(self) -> Iterator[Row]:
        for raw in self.data["records"]:
            network = raw["network_setting"].split(" (")[0]
            label = f"{raw['schedule']} x{raw['micro_batch_size']}, {network}"
            yield Row(label, network, raw["iter_time_s"], None, True, raw)

    def cluster(self, row: Row) -> Cluster:
        """The shipped network at the row's delay and rate."""
        found = Cluster.load("p3.2xlarge", self.data["constants"]["gpus"])
        raw, level = row.source, found.levels[0]
        rate = raw["bandwidth_gbps"] * 1e9 / _BITS * level.link.bandwidth_bytes_per_s / _NOMINAL_BYTES_PER_S
        link = Link(raw["delay_ms"] * 1e-3, rate)
        devices = (slower(found.devices[0], _FIRST_NODE), *found.devices[1:])
        return replace(found, devices=devices, levels=(replace(level, link=link),))

    def candidates(self, row: Row) -> Sequence[Candidate]:
        stages = self.data["constants"]["pipeline_stages"]
        cuts = balanced(self.data["constants"]["layers_total"], stages)
        layout = Layout(1, 1, cuts, row.source["schedule"], row.source["micro_batch_size"])
        program = recomputed(self._builder.program(layout))
        return [Candidate(Work(program, streams=True).seconds, 0, str(layout))]

    @functools.cached_property
    def _builder(self) -> Builder:
        c = self.data["constants"]
        shape = Shape(c["layers_total"], c["hidden"], c["heads_doc"], c["seq"], 0, dropout=False)
        return Builder(shape, c["global_batch"], torch.float32, SGD)
