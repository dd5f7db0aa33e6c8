"""Tied: what parameters cost that several stages have copies of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopar.planner.local_model import LocalModel
from autopar.planner.solution import Solution
from cost_model.placement import Placements, parse_placements
from passes.shard import input_key

if TYPE_CHECKING:
    from autopar.planning import Job


def tied_s(job: Job, solution: Solution) -> float:
    """What a step takes longer than its price since stages have copies of a parameter, which is priced in the first of
    them: the others update theirs, and all of them sum its gradients."""
    c, priced_s = solution.configuration, [stage.step_s for stage in solution.stages]
    local = job.space.local_model(c.microbatch_size)
    if c.pp == 1 or c.virtual_stages > 1 or local is None:
        return 0.0
    prices, pinned = job.space.mesh_prices(c.dp, job.pinned_space(c).sizes(c.tp)), job.options.parallelism.zero
    own_s = list(priced_s)
    for name, places in _copies(solution, local).items():
        meta, ranks = local.tensor(name), tuple(c.dp * c.tp * k for k in places)
        for k, place in places.items():
            zero = prices.fastest_zero(meta, place) if pinned is None else pinned
            nbytes = prices.local_meta(meta, place).nbytes / (c.dp if zero else 1)
            own_s[k] += job.cluster.collective_time_s("all_reduce", nbytes, ranks)
            own_s[k] += prices.parameter_costs(meta, place, True, zero, True)[1] if k != min(places) else 0.0
    return max(own_s) - max(priced_s)


def _copies(solution: Solution, local: LocalModel) -> dict[str, dict[int, Placements]]:
    """Trained parameters of several stages: where each of these has them."""
    wanted, found = local.structure.shared & local.structure.trainable, dict[str, dict[int, Placements]]()
    for k, stage in enumerate(solution.stages):
        parts = local.segments[stage.first : stage.last] if wanted else ()
        for part, assignment in zip(parts, stage.assignments, strict=bool(wanted)):
            like = local.structure.representatives[part.kind]
            for name, known in zip(part.parameters, like.parameters, strict=True):
                if name in wanted:
                    found.setdefault(name, {})[k] = parse_placements(assignment[input_key(known)])
    return {name: places for name, places in found.items() if len(places) > 1}
