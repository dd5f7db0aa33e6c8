"""Mutations: which buffers a forward changes, and whether a program of many ranks can change them as one device does.

Running statistics of batch norms are kept: replicas exchange what they are made of. Counters that grow by a number
every step are kept. Anything else that forward writes to is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from cost_model.errors import UnsupportedError
from passes.graph import is_getitem

aten = torch.ops.aten
_RUNNING = {3: "running_mean", 4: "running_var"}


@dataclass(frozen=True)
class Changed:
    """statistics: names of the running statistics; counters: name -> what a step adds."""

    statistics: frozenset[str]
    counters: Mapping[str, int | float] = field(hash=False)


def changed_buffers(exported: torch.export.ExportedProgram) -> Changed:
    """What a functional graph changes. Errors: UnsupportedError."""
    signature = exported.graph_signature
    if signature.user_inputs_to_mutate:
        name = next(iter(signature.user_inputs_to_mutate.values()))
        raise UnsupportedError(f"forward changes its input {name!r} in place; work on a copy of it")
    if signature.parameters_to_mutate:
        raise _refused(next(iter(signature.parameters_to_mutate.values())))
    by_name = {n.name: n for n in exported.graph_module.graph.nodes}
    holders = {target: by_name[name] for name, target in signature.inputs_to_buffers.items()}
    statistics: set[str] = set()
    counters: dict[str, int | float] = {}
    for output, target in signature.buffers_to_mutate.items():
        made, held, name = by_name[output], holders[target], target.removeprefix("model.")
        if _is_statistic(made, held):
            statistics.add(name)
        elif (step := _increment(made, held)) is not None:
            counters[name] = step
        else:
            raise _refused(target)
    return Changed(frozenset(statistics), counters)


def _is_statistic(made: fx.Node, held: fx.Node) -> bool:
    """Whether a value is the new running statistic of a batch norm that reads the old one, and nobody else does."""
    if not is_getitem(made) or made.args[1] not in _RUNNING:
        return False
    source, place = made.args
    assert isinstance(source, fx.Node) and isinstance(place, int)
    if source.target is not aten._native_batch_norm_legit_functional.default:
        return False
    return source.args[place] is held and set(held.users) == {source} and len(made.users) == 1


def _increment(made: fx.Node, held: fx.Node) -> int | float | None:
    """The number that is added to a buffer nobody else reads; None where that is not so."""
    if made.target is not aten.add.Tensor or made.args[0] is not held or set(held.users) != {made}:
        return None
    step = made.args[1]
    return step if isinstance(step, int | float) and len(made.users) == 1 else None


def _refused(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"forward changes {name.removeprefix('model.')!r}, which a program of many ranks and microbatches cannot keep "
        "as one device does: change it outside of forward (running statistics of batch norms and counters are kept)"
    )
