"""Instance statistics: running statistics of an instance norm in training become writes that a graph shows.

``aten.instance_norm`` writes to them without saying so in its schema. A new statistic is what the momentum leaves of
the old one and the mean over the samples of what each has.
"""

from __future__ import annotations

import torch
from torch import fx

from passes.calls import schema_arguments
from passes.in_place import called_before

aten = torch.ops.aten


def show_statistics(graph: fx.Graph) -> None:
    """Change a graph in place: behind each such call its statistics are made and copied, and it names none."""
    for node in graph.find_nodes(op="call_function", target=aten.instance_norm.default):
        given = schema_arguments(node)
        if not given["use_input_stats"] or given["running_mean"] is None:
            continue
        source = called_before(node, aten.detach.default, given["input"])
        within = list(range(2, given["input"].meta["val"].ndim))
        mean = called_before(node, aten.mean.dim, source, within)
        variance = called_before(node, aten.var.correction, source, within, correction=1)
        for old, new in ((given["running_mean"], mean), (given["running_var"], variance)):
            _move(node, old, called_before(node, aten.mean.dim, new, [0]), given["momentum"])
        node.args = tuple({**given, "running_mean": None, "running_var": None}.values())


def _move(place: fx.Node, old: fx.Node, new: fx.Node, momentum: float) -> None:
    kept = called_before(place, aten.mul.Tensor, old, 1 - momentum)
    called_before(place, aten.copy_.default, old, called_before(place, aten.add.Tensor, kept, new, alpha=momentum))
