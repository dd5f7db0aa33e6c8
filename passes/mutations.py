"""Mutations: which buffers a forward changes, and whether a program of many ranks can change them as one device does.

Running statistics of batch norms are kept: replicas exchange what they are made of. Counters that grow by a number
every step are kept. Other buffers get the values that forward makes of parameters and of the whole batch
(``passes.written``), and so do parameters (``passes.parameter_writes``). Inputs that forward writes to are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from cost_model.errors import UnsupportedError
from passes.batch_statistics import norms_between, written_buffers
from passes.dependence import receiving_nodes
from passes.graph import ModelGraph

aten = torch.ops.aten


@dataclass(frozen=True)
class Changed:
    """statistics: running statistic -> how many batch norms change it; counters: name -> what a step adds; written:
    any other buffer -> the number of the output that is its new value; parameters: likewise."""

    statistics: Mapping[str, int] = field(hash=False)
    counters: Mapping[str, int | float] = field(hash=False)
    written: Mapping[str, int] = field(hash=False)
    parameters: Mapping[str, int] = field(hash=False)


def changed_buffers(exported: torch.export.ExportedProgram) -> Changed:
    """What a functional graph changes. Errors: UnsupportedError."""
    signature = exported.graph_signature
    if signature.user_inputs_to_mutate:
        name = next(iter(signature.user_inputs_to_mutate.values()))
        raise UnsupportedError(f"forward changes its input {name!r} in place; work on a copy of it")
    statistics: dict[str, int] = {}
    counters: dict[str, int | float] = {}
    written: dict[str, int] = {}
    for place, (target, made, held) in written_buffers(exported).items():
        name = target.removeprefix("model.")
        if norms := norms_between(made, held):
            statistics[name] = len(norms)
        elif (step := _increment(made, held)) is not None:
            counters[name] = step
        elif made.meta["val"].is_complex():
            raise UnsupportedError(
                f"forward gives {name!r}, a buffer of {made.meta['val'].dtype}, a new value: keep it as real numbers "
                "(torch.view_as_real), or change it outside of forward"
            )
        else:
            written[name] = place
    kind = torch.export.graph_signature.OutputKind.PARAMETER_MUTATION
    specs = ((place, spec) for place, spec in enumerate(signature.output_specs) if spec.kind == kind)
    parameters = {str(spec.target).removeprefix("model."): place for place, spec in specs}
    return Changed(statistics, counters, written, parameters)


def check_statistics(model: ModelGraph, statistics: Mapping[str, int]) -> None:
    """UnsupportedError where a batch norm sends no gradient back, in whose place its new running statistics travel."""
    if not statistics:
        return
    receiving = receiving_nodes(model)
    by_name = {node.name: node for node in model.graph.nodes}
    for item in model.inputs:
        users = by_name[item.node].users if item.changes else {}
        if item.target in statistics and sum(user.name in receiving for user in users) != statistics[item.target]:
            raise UnsupportedError(
                f"forward changes {item.target!r} in a batch norm from which no gradient flows (its output is detached "
                "or unused), and its statistics would stand still: call it in eval(), or let the gradient through"
            )


def _increment(made: fx.Node, held: fx.Node) -> int | float | None:
    """The number that is added to a buffer, in one call or several; None where that is not so.

    Forward may read the buffer, before and after: it holds one value for a whole step, whose calls add to it once.
    """
    total: int | float = 0
    while made is not held:
        before, *step = made.args
        if made.target is aten.detach.default and isinstance(before, fx.Node):
            made = before
            continue
        if made.target is not aten.add.Tensor or not isinstance(before, fx.Node):
            return None
        if not isinstance(step[0], int | float):
            return None
        total, made = total + step[0], before
    return total
