"""Reduce early: groups of gradients whose sum over replicas begins once the last microbatch has completed them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from passes.fuse import ACCUMULATIONS, parameter_of
from passes.overlap_vocabulary import complete

GROUP_BYTES = 25 * 2**20  # as torch's DistributedDataParallel
FEWEST_GROUPS = 4  # so that of a small model something is left to hide the first ones behind
Groups = tuple[tuple[str, tuple[str, ...]], ...]
"""(name, parameters in the order in which their gradients are complete)."""


def mark_groups(graph: fx.Graph, nbytes: Mapping[str, int], suffix: str) -> Groups:
    """Groups of the parameters ``nbytes`` (of their gradients), each said to be complete after the last of them."""
    calls = [n for n in graph.nodes if n.target in ACCUMULATIONS and parameter_of(n) in nbytes]
    last = {parameter_of(node): node for node in calls}
    finished = list(dict.fromkeys(parameter_of(node) for node in calls if node is last[parameter_of(node)]))
    enough = min(GROUP_BYTES, sum(nbytes[name] for name in finished) // FEWEST_GROUPS)
    found = tuple((f"{k}{suffix}", run) for k, run in enumerate(_runs(finished, nbytes, enough)))
    for name, members in found:
        node = last[members[-1]]
        with graph.inserting_after(node):
            made = graph.call_function(complete, (name,))
        made.meta = dict(node.meta)
    return found


def _runs(names: list[str], nbytes: Mapping[str, int], enough: int) -> list[tuple[str, ...]]:
    """Neighbours, together at least so many bytes but for the last ones."""
    runs: list[tuple[str, ...]] = []
    run: list[str] = []
    for name in names:
        run.append(name)
        if sum(nbytes[each] for each in run) >= enough:
            runs.append(tuple(run))
            run = []
    return [*runs, tuple(run)] if run else runs
