"""Which ranks a collective over an axis is between: of which stages, and of which groups in each."""

from __future__ import annotations

import math

import numpy as np

from cost_model.axes import ACROSS, INSIDE, members
from cost_model.errors import UnknownNameError, VerificationError
from cost_model.program import Program

TIED = "tied:"


def collective_stages(program: Program, axis: str, stage: int) -> tuple[int, ...]:
    """Stages whose ranks take part in a collective that ``stage`` issues on an axis.

    "tied:<name>": the stages with a parameter whose ``tied`` is that name; "world": all.
    """
    if axis == "world":
        return tuple(range(program.pp))
    if not axis.startswith(TIED):
        return (stage,)
    tied = program.tied_stages(axis.removeprefix(TIED))
    if stage not in tied:
        raise VerificationError("tied", f"stage {stage} reduces over {axis!r} but holds no parameter tied so")
    return tied


def axis_groups(program: Program, axis: str, stage: int) -> tuple[tuple[int, ...], ...]:
    """Device groups that run a stage's collective on an axis at the same time; raises UnknownNameError."""
    device, mesh, sizes = program.devices, program.meshes[stage], program.sizes(stage)
    dps, found = range(mesh.dp), members(axis, len(sizes))
    if found is not None:
        with_dp, own = found
        shards = _shard_groups(sizes, own)
        if with_dp:
            return tuple(tuple(device[stage, dp, tp] for dp in dps for tp in group) for group in shards)
        return tuple(tuple(device[stage, dp, tp] for tp in group) for dp in dps for group in shards)
    if axis in (ACROSS, INSIDE):
        ranks = np.array([[device[stage, dp, tp] for dp in dps] for tp in range(mesh.tp)])
        grid = ranks.reshape(mesh.tp, -1, program.dp_inner)
        grid = grid.transpose(0, 2, 1) if axis == ACROSS else grid
        return tuple(tuple(map(int, group)) for group in grid.reshape(-1, grid.shape[-1]))
    if axis == "world":
        return (tuple(rank for other in range(program.pp) for rank in program.ranks(other)),)
    if axis.startswith(TIED):
        collective_stages(program, axis, stage)
        groups = program.tied_groups(axis.removeprefix(TIED))
        return tuple(tuple(device[cell] for cell in group) for group in groups)
    raise UnknownNameError("axis", axis, ("tp", "dp", "dp_tp", "world", f"{TIED}<name>"))


def _shard_groups(sizes: tuple[int, ...], axes: tuple[int, ...]) -> list[list[int]]:
    """Shards of a mesh that differ in their places on some axes alone, in the order of these axes."""
    grid = np.arange(math.prod(sizes)).reshape(sizes)
    rest = [axis for axis in range(len(sizes)) if axis not in axes]
    groups: list[list[int]] = grid.transpose(*rest, *axes).reshape(-1, math.prod(sizes[axis] for axis in axes)).tolist()
    return groups
