"""Time of rule lookup and strategy enumeration for Llama, how many ops of the transformers families have a rule, and
how much of their matrix products tensor parallelism splits.

    python benchmarks/rules.py [--layers 32] [--mesh 2 4 8]

Enumeration is timed as planning does it: the strategies of each axis of the mesh, then those of the whole mesh, with
equal blocks enumerated once; and over every call of the model, as if no two blocks were alike.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import autopar
from autopar.planner.local_model import Sizes, Structure
from autopar.planner.mesh_strategies import mesh_space
from autopar.planner.strategies import op_space
from cost_model.collector import collector_paused
from cost_model.ops import entry_of
from cost_model.ops.table import backward_only
from passes.calls import call_of
from passes.graph import ModelGraph, is_getitem
from passes.segment import Segment
from passes.specialise import specialise
from passes.trace import trace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

BATCH, LENGTH = 8, 1024


def llama(layers: int) -> tuple[nn.Module, dict[str, Any]]:
    """The sizes of Llama 2 7B, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, use_cache=False))
        tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    return model, {"input_ids": tokens, "labels": tokens}


@dataclass(frozen=True)
class Enumerated:
    """axes_s, mesh_s: CPU seconds (of one thread) for each axis by itself, and for all of them together; calls: how
    many; axes, mesh: strategies on each axis, and on the mesh."""

    axes_s: float
    mesh_s: float
    calls: int
    axes: tuple[int, ...]
    mesh: int


def enumerate_all(model: ModelGraph, ambient: frozenset[str], parts: Iterable[Segment], sizes: Sizes) -> Enumerated:
    """The strategies of these segments."""
    start = time.process_time()
    spaces = [[op_space(model, part.nodes, ambient, size) for size in sizes] for part in parts]
    axes_s = time.process_time() - start
    meshes = [mesh_space(axes, sizes) for axes in spaces]
    mesh_s = time.process_time() - start - axes_s
    alone = tuple(sum(len(op.strategies) for own in spaces for op in own[axis].ops) for axis in range(len(sizes)))
    ops = [op for mesh in meshes for op in mesh.ops]
    return Enumerated(axes_s, mesh_s, len(ops), alone, sum(len(op.strategies) for op in ops))


def time_enumeration(layers: int, mesh: list[int]) -> dict[str, float]:
    """Seconds, printed, with equal blocks enumerated once and without."""
    traced = trace(*llama(layers))
    model, structure, sizes = specialise(traced, BATCH), Structure(traced), tuple(mesh)
    found = {}
    for name, parts in (
        ("equal blocks once", tuple(structure.representatives.values())),
        ("every layer", structure.segments),
    ):
        with collector_paused():  # as planning does
            done = enumerate_all(model, structure.ambient, parts, sizes)
        found[name] = done.axes_s + done.mesh_s
        print(
            f"Llama of {layers} layers, {name}: {found[name]:.3f} s on a mesh of {mesh} ranks, {done.axes_s:.3f} of "
            f"it for axes ({done.calls} calls, {', '.join(map(str, done.axes))} strategies, {done.mesh} on the mesh)"
        )
    return found


def ruled_ops(family: str) -> dict[str, bool]:
    """Op -> whether it has a factor map for every call of it that a family of ``tests/families.py`` makes."""
    from families import FAMILIES

    graph = trace(*FAMILIES[family]()).global_graph
    found: dict[str, bool] = {}
    for node in graph.nodes():
        name, entry = str(node.target), entry_of(str(node.target))
        if not is_getitem(node):
            is_planned = entry is not None and entry.factors is not backward_only
            has_map = is_planned and entry is not None and entry.factors(call_of(node, graph.metas)) is not None
            found[name] = found.get(name, True) and has_map
    return found


def count_rules(families: Iterable[str]) -> dict[str, bool]:
    """All ops of the families, with a printed row for each family."""
    known: dict[str, bool] = {}
    for family in families:
        found = ruled_ops(family)
        missing = sorted(name for name, has_map in found.items() if not has_map)
        print(f"{family:<12} {len(found) - len(missing):>3} of {len(found):>3} ops have a rule {' '.join(missing)}")
        known.update({name: known.get(name, True) and has_map for name, has_map in found.items()})
    return known


def split_share(family: str) -> float:
    """Of the matrix-multiply flops of one device, the share that is really split over two, where messages cost nothing.

    What a plan of tp=2 replicates, both ranks do.
    """
    from families import FAMILIES

    model, batch = FAMILIES[family]()
    flops = {}
    for tp in (1, 2):
        pins = autopar.Parallelism(dp=1, tp=tp, pp=1)
        with autopar.compile(model, free_cluster(tp), batch, parallelism=pins) as exe:
            flops[tp] = _matmul_flops(exe)
    return 2 * (1 - flops[2] / flops[1])


def free_cluster(num_devices: int) -> autopar.Cluster:
    """What is split is not a matter of how small a test's messages are."""
    shape = (num_devices, num_devices)
    return autopar.Cluster.from_matrix(
        device="cpu", latency_s=np.full(shape, 1e-12), bandwidth_bytes_per_s=np.full(shape, 1e15)
    )


def _matmul_flops(exe: autopar.Executable) -> float:
    """Of one rank: forward and backward of its microbatches."""
    program = exe.planned.linked.program
    (stage,) = program.stages
    costs = [i.cost for block in stage.chunks[0].blocks for i in block.instructions if i.cost is not None]
    kinds = ("matmul", "attention", "attention_backward")
    return program.microbatches * sum(cost.flops for cost in costs if cost.kind in kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--mesh", type=int, nargs="+", default=[2, 4, 8])
    given = parser.parse_args()
    time_enumeration(given.layers, given.mesh)
    from families import HUGGING_FACE, TRANSFORMERS

    known = count_rules(HUGGING_FACE)
    missing = [name for name, has_map in known.items() if not has_map]
    print(
        f"{len(HUGGING_FACE)} families: {len(known) - len(missing)} of {len(known)} ops have a rule {' '.join(missing)}"
    )
    for family in TRANSFORMERS:
        print(f"{family:<16} {split_share(family):7.1%} of the matrix-multiply flops are split by tp=2")


if __name__ == "__main__":
    main()
