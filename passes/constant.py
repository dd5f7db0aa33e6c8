"""Check by evaluation that ambient values which carry a batch dim are the same for every sample.

A mask built for the whole batch is built again for a part of it; that is right only if it does not tell samples
apart (``arange(batch) * x`` does) and does not change with the batch's size. The ambient part of the graph is
small, so it is simply run, at the global batch and at a smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from cost_model.tensor import TensorMeta
from passes.batch import BatchAnalysis, analyse_batch
from passes.dependence import ancestors
from passes.graph import ModelGraph
from passes.specialise import BatchMismatchError, specialise
from passes.trace import Traced

_LARGEST_ELEMENTS = 2**21  # computed in about a twentieth of a second


def check_constant(
    traced: Traced, analysis: BatchAnalysis, buffers: Mapping[str, Tensor]
) -> tuple[BatchAnalysis, tuple[str, ...]]:
    """The analysis, in which values that differ along the batch are made of all of it, and parts take their rows; or a
    reason against splitting; and notes.

    buffers: values by name (missing, or meta tensors: unknown). Values too large are checked at a smaller batch.
    """
    numbered: frozenset[str] = frozenset()
    while True:
        found, notes = _first_numbered(traced, analysis, buffers)
        if found is None:
            return analysis, notes
        numbered |= {found}
        analysis = analyse_batch(traced.global_graph, traced.other, numbered=numbered)


def _first_numbered(
    traced: Traced, analysis: BatchAnalysis, buffers: Mapping[str, Tensor]
) -> tuple[str | None, tuple[str, ...]]:
    """A value that is taken to be equal along the batch and is not; and notes."""
    if analysis.reason is not None or not analysis.constant or traced.other is None:
        return None, ()
    names = [name for name, _, _ in analysis.constant]
    unknown = _unknown(traced.global_graph, names, buffers)
    if unknown is not None:
        return None, (f"not checked: {names[0]} is taken to be equal for all samples ({unknown} has no values here)",)
    batches = _batches(traced, names)
    notes = (
        () if batches[0] == traced.global_graph.batch else (f"{names[0]} was compared for {batches[0]} samples only",)
    )
    at_sizes = [_values(specialise(traced, batch), names, buffers) for batch in batches]
    for name, dim, outer in analysis.constant:
        seen = [_by_sample(values[name], dim, outer, b) for values, b in zip(at_sizes, batches, strict=True)]
        first = seen[0].narrow(dim + 1, 0, 1)
        if not all(first.shape[dim + 2] == v.shape[dim + 2] and torch.equal(v, first.expand_as(v)) for v in seen):
            return name, ()
    return None, notes


def _by_sample(value: Tensor, dim: int, outer: int, batch: int) -> Tensor:
    """``dim`` seen as outer x batch x inner; as outer x groups x inner where several rows of a batch are one sample."""
    along = value.shape[dim] // outer
    groups = math.gcd(along, batch)
    return value.reshape(*value.shape[:dim], outer, groups, along // groups, *value.shape[dim + 1 :])


def _batches(traced: Traced, names: list[str]) -> list[int]:
    """The global batch, or the largest part of it that can be computed, and a smaller one that the model knows."""
    assert traced.other is not None
    whole, small = traced.global_graph.batch, min(traced.other.batch, traced.global_graph.batch)
    parts = (b for b in range(whole, small, -1) if whole % b == 0 and _can_compute(traced, b, names))
    return list(dict.fromkeys((next(parts, small), small, traced.other.batch)))


def _can_compute(traced: Traced, batch: int, names: list[str]) -> bool:
    """Whether the model knows the batch, and no value on the way is too large."""
    try:
        model = specialise(traced, batch)
    except BatchMismatchError:
        return False
    metas = [model.metas[n.name] for n in _needed(model, names)]
    return all(m.numel <= _LARGEST_ELEMENTS for m in metas if isinstance(m, TensorMeta))


def _needed(model: ModelGraph, names: list[str]) -> list[fx.Node]:
    by_name = {n.name: n for n in model.graph.nodes}
    return ancestors([by_name[name] for name in names])


def _unknown(model: ModelGraph, names: list[str], known: Mapping[str, Tensor]) -> str | None:
    """A placeholder on the way whose values are not at hand."""
    targets = {i.node: i.target for i in model.inputs}
    needed = [n for n in _needed(model, names) if n.op == "placeholder"]
    return next((n.name for n in needed if targets[n.name] not in known or known[targets[n.name]].is_meta), None)


def _values(model: ModelGraph, names: list[str], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    targets = {i.node: i.target for i in model.inputs}
    values: dict[fx.Node, Tensor] = {}
    for node in _needed(model, names):
        if node.op == "placeholder":
            values[node] = known[targets[node.name]]
            continue
        args = fx.map_arg(node.args, lambda n: values[n])
        kwargs = fx.map_arg(dict(node.kwargs), lambda n: values[n])
        assert callable(node.target)
        values[node] = node.target(*args, **kwargs)
    return {node.name: value for node, value in values.items() if node.name in names}
