"""One mesh for all stages on an uneven network: priced on its fastest links, placed, and simulated where it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from autopar.placing import fastest_placed, timed_s
from autopar.planner.candidates import fastest_view, with_shards
from autopar.planner.regional import Finalists, PlacedAnswer, finalists, search_placed
from autopar.planner.solution import Infeasible, Pins, Solution
from autopar.uneven import moved
from autopar.whole_state import whole_state_gain_s
from cost_model.collectives import Link

if TYPE_CHECKING:
    from autopar.planning import Job


@dataclass(frozen=True, eq=False)
class EqualMeshes:
    """The search of one job under its pins."""

    job: Job
    pins: Pins

    @property
    def price_s(self) -> float:
        """Of a step on the mesh that is likely to be the fastest; infinite without one."""
        return self._finalists.price_s

    def fastest(self) -> Solution | Infeasible:
        found = self.faster_than(math.inf)
        assert found is not None
        return found

    def faster_than(self, limit_s: float) -> Solution | Infeasible | None:
        """None where no plan is."""
        simulate = functools.partial(fastest_placed, self.job, self.pins)
        found = search_placed(self._finalists, self.pins, self._searched, self._whole, simulate, limit_s)
        return moved(self.job, found, functools.partial(timed_s, self.job)) if isinstance(found, Solution) else found

    @cached_property
    def _finalists(self) -> Finalists:
        job, space = self.job, self._view.pinned_space()  # made before it is shared
        return finalists(job.cluster, space, job.batch, self.pins, job)

    @cached_property
    def _view(self) -> Job:
        return self.job.on(fastest_view(self.job.cluster, self.job.product_dtype))

    def _views(self, known: Pins, link: Link | None) -> list[Job]:
        """With shards on links that are no faster; under the least memory of a device, and where there may be several
        stages under the mean: more on larger ones makes room on smaller."""
        view = self._view if link is None else self.job.on(with_shards(self._view.cluster, known.tp or 1, link))
        usable = [self.job.device_cap_bytes(device) for device in range(self.job.cluster.num_devices)]
        caps = dict.fromkeys((min(usable), sum(usable) // len(usable)) if known.pp != 1 else (min(usable),))
        return [view.under(self.job.options.parallelism, cap) for cap in caps]

    def _searched(self, known: Pins, dp_inner: int, link: Link | None = None) -> list[Solution | Infeasible]:
        """dp_inner: where replicas may sum gradients in groups, each has room for all parameters and state."""
        p = self.job.options.parallelism
        whole = dp_inner > 1 and p.dp_inner is None and p.zero is None
        views = self._views(known, link)
        return [(_undivided(way) if whole else way).searched_under(known) for way in views]

    def _whole(
        self, known: Pins, placed: Sequence[PlacedAnswer], least_s: float, link: Link | None = None
    ) -> list[Solution | Infeasible]:
        """With whole parameters and state, where that could gain so much of some placed plan: the same choices, or
        others where these have no room for it."""
        gaining = [own for own in placed if any(self._whole_state_gain_s(each) >= least_s for each in own.plans)]
        same = [_with_whole_state(own.answer, own.plans[0].placement) for own in gaining]
        fitting = [each for each in same if self.job.fits(self.job.plan(each))]
        if fitting or not gaining:
            return list(fitting)
        found = [_undivided(way).searched_under(known) for way in self._views(known, link)]
        return [_with_whole_state(each, None) if isinstance(each, Solution) else each for each in found]

    def _whole_state_gain_s(self, placed: Solution) -> float:
        """What a step of a placed plan could gain if it split no state over replicas, as the planner may have chosen by
        the price of the fastest links; nothing where that is pinned."""
        if self.job.options.parallelism.zero is not None:
            return 0.0
        plan = self.job.plan(placed)
        return whole_state_gain_s(plan, self.job.program(plan), self.job.cluster)


def _undivided(job: Job) -> Job:
    """With parameters and state that are whole on each replica."""
    return job.under(replace(job.options.parallelism, zero=0), job.options.memory_cap_bytes)


def _with_whole_state(solution: Solution, placement: tuple[int, ...] | None) -> Solution:
    return replace(solution, configuration=replace(solution.configuration, zero=0), placement=placement)
