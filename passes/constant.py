"""Check by evaluation that ambient values which carry a batch dim are the same for every sample.

A mask built for the whole batch is split with it; that is right only if it does not tell samples apart
(``arange(batch) * x`` does). The ambient part of the graph is small, so it is simply run on a batch of two sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from passes.batch import BatchAnalysis
from passes.dependence import ancestors
from passes.graph import ModelGraph

_LARGEST_ELEMENTS = 2**26


def check_constant(
    model: ModelGraph, analysis: BatchAnalysis, buffers: Mapping[str, Tensor]
) -> tuple[BatchAnalysis, tuple[str, ...]]:
    """The analysis, with a reason against splitting where a value differs along the batch; and notes.

    model: specialised to a small batch of at least two; buffers: values by name (meta tensors: unknown).
    """
    if analysis.reason is not None or not analysis.constant:
        return analysis, ()
    by_name = {n.name: n for n in model.graph.nodes}
    needed = ancestors([by_name[name] for name, _ in analysis.constant])
    known = {i.node: buffers[i.target] for i in model.inputs if i.target in buffers and not buffers[i.target].is_meta}
    unknown = [n for n in needed if n.op == "placeholder" and n.name not in known]
    largest = max((model.tensor(n.name).numel for n in needed if n.op != "placeholder" and _is_tensor(model, n)), default=0)
    if unknown or largest > _LARGEST_ELEMENTS:
        why = f"{unknown[0]} has no values here" if unknown else "it is large"
        return analysis, (f"not checked: {analysis.constant[0][0]} is taken to be equal for all samples ({why})",)
    values = _evaluate(needed, known)
    for name, dim in analysis.constant:
        value = values[by_name[name]]
        if not torch.equal(value, value.narrow(dim, 0, 1).expand_as(value)):
            reason = f"{name} tells the samples of a batch apart, so the batch cannot be split"
            return replace(analysis, reason=reason), ()
    return analysis, ()


def _is_tensor(model: ModelGraph, node: fx.Node) -> bool:
    return not isinstance(model.metas[node.name], tuple)


def _evaluate(nodes: list[fx.Node], known: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
    values: dict[fx.Node, Tensor] = {}
    for node in nodes:
        if node.op == "placeholder":
            values[node] = known[node.name]
            continue
        args = fx.map_arg(node.args, lambda n: values[n])
        kwargs = fx.map_arg(dict(node.kwargs), lambda n: values[n])
        assert callable(node.target)
        values[node] = node.target(*args, **kwargs)
    return values
