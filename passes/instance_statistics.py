"""Instance statistics: running statistics of an instance norm in training become writes that a graph shows.

``aten.instance_norm`` writes to them without saying so in its schema. A new statistic is what the momentum leaves of
the old one and the mean over the samples of what each has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.calls import schema_arguments
from passes.in_place import value_of

aten = torch.ops.aten


def show_statistics(graph: fx.Graph) -> None:
    """Change a graph in place: behind each such call its statistics are made and copied, and it names none."""
    for node in graph.find_nodes(op="call_function", target=aten.instance_norm.default):
        given = schema_arguments(node)
        if not given["use_input_stats"] or given["running_mean"] is None:
            continue
        source = _call(node, aten.detach.default, given["input"])
        within = list(range(2, given["input"].meta["val"].ndim))
        mean = _call(node, aten.mean.dim, source, within)
        variance = _call(node, aten.var.correction, source, within, correction=1)
        for old, new in ((given["running_mean"], mean), (given["running_var"], variance)):
            _move(node, old, _call(node, aten.mean.dim, new, [0]), given["momentum"])
        node.args = tuple({**given, "running_mean": None, "running_var": None}.values())


def _move(place: fx.Node, old: fx.Node, new: fx.Node, momentum: float) -> None:
    kept = _call(place, aten.mul.Tensor, old, 1 - momentum)
    _call(place, aten.copy_.default, old, _call(place, aten.add.Tensor, kept, new, alpha=momentum))


def _call(place: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call in front of a node, of the same line and module."""
    with place.graph.inserting_before(place):
        made: fx.Node = place.graph.call_function(target, args, kwargs)
    made.meta = {**place.meta, "val": value_of(made)}
    return made
