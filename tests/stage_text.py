"""Stages as text: what passes made, for golden tests."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from cost_model.axes import Axes
from passes.batch import analyse_batch
from passes.cut import cut_stage
from passes.graph import ModelGraph
from passes.segment import segment
from passes.stage import StageCode, build_stage
from passes.stitch import Templates
from passes.trace import trace


def graph_text(model: ModelGraph) -> str:
    """One line per input ("name shape") and per call ("name shape = op(args)")."""
    lines = []
    for node in model.graph.nodes:
        if node.op != "output":
            meta = model.metas[node.name]
            shapes = " ".join(str(list(m.shape)) for m in (meta if isinstance(meta, tuple) else (meta,)) if m)
            call = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
            made = f" = {call}({', '.join(map(str, node.args))})" if node.op == "call_function" else ""
            lines.append(f"{node.name} {shapes}{made}")
    return "\n".join(lines)


def whole_stage(model: nn.Module, batch: dict[str, object]) -> ModelGraph:
    """The model's one stage before it is sharded."""
    traced = trace(model, batch)
    graph = traced.global_graph
    segments = segment(graph)
    return cut_stage(graph, segments, 0, len(segments), analyse_batch(graph, traced.other), graph.batch)


def built(stage: ModelGraph, choices: Mapping[str, str], size: int) -> StageCode:
    """The stage sharded over ``size`` ranks, as code."""
    return build_stage(stage, choices, Axes.flat(size), Templates(), last=True)
