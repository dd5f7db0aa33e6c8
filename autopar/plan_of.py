"""A plan made of what a search found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autopar.planner.local_model import LocalModel
from autopar.planner.saving import NONE, RECOMPUTE
from autopar.planner.solution import Infeasible, Solution
from autopar.planner.space import PinnedSpace, renaming
from autopar.planner.virtual import Assigned, recut
from cost_model.mesh import Mesh
from cost_model.plan import Plan, StagePlan
from passes.segment import Segment
from passes.shard import form_key, input_key, own_form_key
from passes.zero import zero_key

_PREFIXES = ("op:", "input:", "form:")


def parts_of(solution: Solution | Infeasible) -> Sequence[Assigned]:
    """The parts of the chain, in order."""
    c = solution.configuration
    return solution.stages if c.virtual_stages == 1 else recut(solution.stages, c.pp * c.virtual_stages)


def stage_plans(
    local: LocalModel, meshes: Sequence[Mesh], parts: Sequence[Assigned], space: PinnedSpace
) -> tuple[StagePlan, ...]:
    """Choices of every stage by the names of the very nodes they are for; what is the only choice is not said."""
    alike: dict[str, Segment] = {}
    for part in local.segments:
        alike.setdefault(part.kind, part)
    segments = [
        (part, alike[part.kind], assignment)
        for stage in parts
        for part, assignment in zip(local.segments[stage.first : stage.last], stage.assignments, strict=True)
    ]
    of_part = [meshes[index % len(meshes)] for index in range(len(parts))]
    lying = [mesh for stage, mesh in zip(parts, of_part, strict=True) for _ in stage.assignments]
    zero = space.zero_levels(segments, lying, local)
    plans = []
    for stage, mesh in zip(parts, of_part, strict=True):
        own = segments[stage.first : stage.last]
        choices = _placements(own) if mesh.tp > 1 else {}
        held = dict.fromkeys(name for part, _, _ in own for name in part.parameters if name in zero)
        choices.update({zero_key(name): str(zero[name]) for name in held})
        levels = tuple(assignment.get(RECOMPUTE, NONE) for _, _, assignment in own)
        plans.append(StagePlan(stage.first, stage.last, choices, levels if any(r != NONE for r in levels) else ()))
    return tuple(plans)


def _placements(segments: Sequence[tuple[Segment, Segment, Mapping[str, str]]]) -> dict[str, str]:
    """What each segment of a stage chose on the tp axis; the activation between two is said by the first."""
    choices: dict[str, str] = {}
    for offset, (part, like, assignment) in enumerate(segments):
        rename = renaming(like, part)
        for variable, label in assignment.items():
            is_inner_entry = offset > 0 and part.entry is not None and rename(variable) == f"input:{part.entry}"
            if variable.startswith(_PREFIXES) and not is_inner_entry:
                choices[rename(variable)] = label
    choices.update(_own_forms(segments, choices))
    return choices


def _own_forms(
    segments: Sequence[tuple[Segment, Segment, Mapping[str, str]]], choices: Mapping[str, str]
) -> dict[str, str]:
    """Second forms that segments chose for what others hold too, where these differ from what the stage says of it."""
    found: dict[str, str] = {}
    for part, like, assignment in segments:
        for name, solved in zip(part.parameters, like.parameters, strict=True):
            said = choices.get(form_key(name))
            own = assignment.get(form_key(solved), choices.get(input_key(name)))
            if said is not None and own is not None and own != said:
                found[own_form_key(name, part.nodes[0])] = own
    return found


def unplaced(plan: Plan) -> Plan:
    """Equal for plans of one program."""
    return replace(plan, memory_cap_bytes=0, cluster="", placement=tuple(range(len(plan.placement))))
