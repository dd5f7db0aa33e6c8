"""Plans whose stages have meshes of their own: which are tried, priced as programs run, and held against their caps."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from autopar.hops import Hops
from autopar.link import joins_replicas
from autopar.planner.arrangements import Arrangement, Pool, Seat
from autopar.planner.mixed import Arranged, MixedSolver, Shape
from autopar.planner.solution import Infeasible, Solution, Space
from autopar.rescheduled import scheduled
from autopar.sites import alike, only, together
from cost_model.cluster import Cluster
from cost_model.errors import ParallelismError
from cost_model.mesh import Mesh, meshes_of
from cost_model.parallelism import Parallelism
from cost_model.placement import Partial, Shard, parse_placement
from cost_model.schedule import refusal

if TYPE_CHECKING:
    from autopar.equal_meshes import EqualMeshes
    from autopar.planning import Job

MAX_TIGHTENINGS = 6
FEWEST_STAGES = 4
"""Of up to so many all arrangements are looked at, of more while they are no more than ``MOST_ARRANGEMENTS``."""
MOST_ARRANGEMENTS = 1024
MOST_DEVICES = 8
"""Up to so many devices meshes that differ are looked for unasked."""
LOSS_BYTES = 8
REWRITTEN, TRIED = 4, 16
"""So many of the best by price that fit are simulated, and so many are rewritten for it."""
SLACK = 0.1
"""None is whose price is so much above that of the fastest, which prices err by less."""
MOVED = 0.1
"""Of a step, what moving the cuts of a placed plan may save."""
WORTH = 0.01
"""The least part of a step that stages of different meshes must save: equal ones are simpler."""


def may_differ(pins: Parallelism, cluster: Cluster) -> bool:
    """Whether stages of different meshes are worth a look: devices or links differ, or their number has odd parts."""
    count = cluster.num_devices
    if pins.tp is not None or pins.pp == 1 or pins.placement is not None or pins.virtual_stages not in (None, 1):
        return False
    if pins.schedule == "interleaved" or pins.sequence_parallel is not None:
        return False
    return 2 < count <= MOST_DEVICES and (cluster.uneven or count & (count - 1) != 0)


@dataclass(frozen=True, eq=False)
class DifferentMeshes:
    """The search of one job. held: what becomes of what it searches."""

    job: Job
    held: Callable[[Space], Space] = lambda space: space

    @cached_property
    def pools(self) -> list[Pool]:
        """Of devices that are alike, and of neighbours together; those whose devices and links are equal share a
        space."""
        cluster, views = self.job.cluster, dict[tuple[object, ...], Space]()
        groups = alike(cluster)
        nbytes = self.job.sent_bytes(1) if self.job.batch else 0.0
        found = []
        for devices, whole in [*((g, False) for g in groups), *((u, True) for u in together(cluster, groups, nbytes))]:
            view = only(cluster, tuple(sorted(devices)))
            key = (view.devices, view.network)
            if key not in views:
                job = self.job if view.num_devices == cluster.num_devices else self.job.on(view)
                views[key] = self.held(job.pinned_space())
            cap_bytes = min(map(self.job.device_cap_bytes, devices))
            found.append(Pool(devices, views[key], cap_bytes, whole))
        return found

    @cached_property
    def solver(self) -> MixedSolver:
        options = self.job.options
        return self.job.spaces.solver(self.pools, self, (self.job.cluster, options.parallelism, options.precision))

    def pinned(self) -> Solution | Infeasible:
        """The fastest plan with the meshes that are pinned. Errors: ParallelismError."""
        found = self._best(list(self._pinned_shapes()))
        if found is None:
            pins = self.job.options.parallelism
            raise ParallelismError(
                f"no plan has dp={pins.dp} x tp={pins.tp} x pp={pins.pp} for a batch of {self.job.batch}: parameters "
                "that several stages use must be whole there, and the batch must divide; change the degrees"
            )
        return found

    def faster(self, known: Solution | Infeasible) -> Solution | Infeasible:
        """The given answer, or one with meshes that differ where that is faster by enough, fits alone, or needs less.

        Both under the schedules that suit them: a long chain of equal stages gains more by another than a short one.
        """
        if isinstance(known, Infeasible):
            found = self._best(list(self._free_shapes()))
            if isinstance(found, Solution):
                return _noted(found, "no others fit")
            return self._nearer(known, found)
        known_s = self._step_s(known)
        found = self._best(list(self._free_shapes()), (1 - WORTH) * known_s)
        if found is None or isinstance(found, Infeasible):
            return known
        return _noted(found, f"{known_s / self._step_s(found):.2f} times as fast")

    def fitting(self, equal: EqualMeshes) -> Solution | Infeasible:
        """One that fits, or with equal meshes, where the search finds any; not always the fastest."""
        found = self._best(list(self._free_shapes()), enough=1)
        if isinstance(found, Solution):
            return found
        known = equal.fastest()
        return known if isinstance(known, Solution) else self._nearer(known, found)

    @staticmethod
    def _nearer(known: Infeasible, found: Infeasible | None) -> Infeasible:
        return known if found is None else min(known, found, key=lambda each: each.needed_bytes)

    def unless_faster(self, equal: EqualMeshes) -> Solution | Infeasible:
        """The fastest, or the fastest with equal meshes, which are simpler.

        Each search ends where the other one is likely to be faster: arrangements by the price of equal meshes, these,
        which take longer, by the step that was found, and where arrangements were given up too early, they go on.
        """
        worth_s = equal.price_s * (1 + SLACK)
        found = self._best(list(self._free_shapes()), worth_s=worth_s)
        if not isinstance(found, Solution):
            known = equal.fastest()
            late = isinstance(known, Infeasible) or self._step_s(known) > worth_s
            return self.faster(known) if late else known
        found_s = self._step_s(found)
        other = equal.faster_than(found_s * (1 + MOVED))
        if not isinstance(other, Solution):
            return _noted(found, "no equal ones are as fast")
        other_s = self._step_s(other)
        return _noted(found, f"{other_s / found_s:.2f} times as fast") if found_s < (1 - WORTH) * other_s else other

    def _step_s(self, solution: Solution) -> float:
        """Under the schedule that suits it."""
        return self.job.step_s(scheduled(self.job, solution).plan)

    def _best(
        self, shapes: Sequence[Shape], limit_s: float = math.inf, worth_s: float = math.inf, enough: int = REWRITTEN
    ) -> Solution | Infeasible | None:
        """The fastest under a limit as simulated, of those whose price is under another, else what memory is short of;
        None where there is neither.

        They come by price, and are as few as can beat what has been found. enough: of those that fit.
        """
        best: Solution | None = None
        short: Infeasible | None = None
        crowding = self.job.cluster.crowding  # by which a step may take less than such a price
        worth_s, bound_s = min(worth_s, limit_s * (1 + SLACK)) * crowding, math.inf
        fitting, rewritten = 0, set[tuple[object, ...]]()
        for arranged in self.solver.fastest(shapes, worth_s):
            assert arranged.solution is not None
            bound_s, price_s = arranged.bound_s, arranged.solution.objective_s
            if price_s >= worth_s or fitting == enough or len(rewritten) == TRIED:
                break
            alike = price_s, arranged.solution.meshes, tuple(stage.last for stage in arranged.solution.stages)
            if alike in rewritten:
                continue
            rewritten.add(alike)
            found = self._fitting(arranged, arranged.solution)
            if isinstance(found, Infeasible):
                short = found if short is None or found.needed_bytes < short.needed_bytes else short
                continue
            fitting += 1
            if (step_s := self._step_s(found)) < limit_s:
                best, limit_s = found, step_s
                worth_s = min(worth_s, found.objective_s * (1 + SLACK))
        if best is None:
            limited = short is not None or math.isfinite(worth_s) or math.isfinite(bound_s)
            return short if limited else self.solver.shortage(shapes)
        bound_s = min(bound_s, best.objective_s)
        return replace(best, bound_s=bound_s, gap=best.objective_s / bound_s - 1)

    def _fitting(self, arranged: Arranged, found: Solution) -> Solution | Infeasible:
        """The solver's choice; where its program is over a cap, another that leaves as much more."""
        extra, chosen = [0.0] * arranged.shape.pp, found
        nearest: Infeasible | None = None
        for _ in range(MAX_TIGHTENINGS):
            plan = self.job.plan(chosen)
            peaks, caps = self.job.peaks(plan), self.job.stage_caps(plan)
            if all(peak <= cap for peak, cap in zip(peaks, caps, strict=True)):
                return chosen
            extra = [x + max(0.0, peak - cap) for x, peak, cap in zip(extra, peaks, caps, strict=True)]
            nearest = Infeasible(max(peaks), peaks.index(max(peaks)), chosen.configuration, chosen.stages,
                                 chosen.placement, chosen.meshes)  # fmt: skip
            tighter = self.solver.solve(arranged, extra)
            if tighter is None:
                break
            chosen = tighter
        assert nearest is not None
        return nearest

    def _pinned_shapes(self) -> Iterator[Shape]:
        pins, count = self.job.options.parallelism, self.job.cluster.num_devices
        assert pins.pp is not None
        units = sum(mesh.size for mesh in meshes_of(pins.dp or 1, pins.tp or 1, pins.pp))
        dp, tp = (pins.dp or count // units, pins.tp or count // units)
        yield from self._shapes(tuple((mesh,) for mesh in meshes_of(dp, tp, pins.pp)))

    def _free_shapes(self) -> Iterator[Shape]:
        """Every number of replicas and of stages, with every number of shards for each stage."""
        pins, count, left = self.job.options.parallelism, self.job.cluster.num_devices, MOST_ARRANGEMENTS
        assert not isinstance(pins.dp, tuple)
        dps = [pins.dp] if pins.dp else [dp for dp in range(1, count // 2 + 1) if self.job.batch % dp == 0]
        for pp in [pins.pp] if pins.pp else range(2, min(count, self.job.segments) + 1):
            for dp in dps:
                meshes = tuple(Mesh(dp, tp) for tp in range(1, count // dp - pp + 2))
                arrangements = self.solver.arranger.count((meshes,) * pp)
                if arrangements and (pp <= FEWEST_STAGES or arrangements <= left):
                    left -= arrangements
                    yield from self._shapes((meshes,) * pp)

    def _shapes(self, meshes: tuple[tuple[Mesh, ...], ...]) -> Iterator[Shape]:
        """Microbatches of every size that all meshes can split and the schedule can run."""
        pins, batch = self.job.options.parallelism, self.job.batch
        replicas = math.lcm(*(mesh.dp for own in meshes for mesh in own))
        schedule = pins.schedule or "1f1b"
        for samples in (n for n in range(replicas, batch + 1, replicas) if batch % n == 0):
            fits = pins.microbatch_size in (None, samples // meshes[0][0].dp)
            if fits and refusal(schedule, len(meshes), batch // samples, 1) is None:
                yield Shape(meshes, samples, batch // samples, schedule, pins.window or 1)

    def cut_bytes(self, mesh: Mesh, samples: int, position: int, label: str) -> float:
        local = self.job.space.local_model(samples // mesh.dp)
        assert local is not None
        exit, carried_bytes = local.cut_before[position]
        place, nbytes = parse_placement(label), exit.nbytes
        if isinstance(place, Partial) or not self._may_cut(position):
            return math.inf
        if isinstance(place, Shard):
            if carried_bytes or not place.is_consecutive(exit.shape):
                return math.inf
            nbytes //= mesh.tp
        return self.job.options.precision.sent_bytes(nbytes + carried_bytes, exit)

    def _may_cut(self, position: int) -> bool:
        """Where replicas differ, not everything can go from so many to others."""
        segment = self.job.traced.segments[position]
        return not isinstance(self.job.options.parallelism.dp, tuple) or joins_replicas(segment, self.job.analysis)

    def hop_s(self, source: Seat, target: Seat, nbytes: float, split: bool) -> tuple[float, float]:
        return self._hop_s(source, target, int(nbytes), split)

    def once_s(self, seats: Arrangement) -> float:
        return self._once_s(tuple(seat.devices for seat in seats))

    @cached_property
    def _once_s(self) -> Callable[[tuple[tuple[int, ...], ...]], float]:
        return functools.cache(self._exchanged_s)

    def _exchanged_s(self, stages: tuple[tuple[int, ...], ...]) -> float:
        """The sum of the loss, and of gradients of parameters that the first and the last stage have, or all."""
        all_reduce_s = functools.partial(self.job.cluster.collective_time_s, "all_reduce")
        ends = tuple(dict.fromkeys((*stages[0], *stages[-1])))
        every = tuple(device for devices in stages for device in devices)
        of_ends, of_all = self._tied_bytes
        tied_s = sum(all_reduce_s(n, own) for n, own in ((of_ends, ends), (of_all, every)) if n)
        return tied_s + all_reduce_s(LOSS_BYTES, every)

    @cached_property
    def _tied_bytes(self) -> tuple[float, float]:
        """Of gradients of parameters in the first and the last segment, and of those in most."""
        segments, whole, kept = self.job.traced.segments, self.job.traced.global_graph, self.job.options.precision.kept
        users = Counter(name for segment in segments for name in dict.fromkeys(segment.parameters))
        ends = set(segments[0].parameters) & set(segments[-1].parameters)
        found = [0.0, 0.0]
        for name, count in users.items():
            if count > 1 and (name in ends or 2 * count > len(segments)):
                meta = whole.tensor(name)
                found[count > 2] += replace(meta, dtype=kept(meta.dtype).reduce).nbytes
        return found[0], found[1]

    @cached_property
    def _hop_s(self) -> Callable[[Seat, Seat, int, bool], tuple[float, float]]:
        return functools.cache(Hops(self.job.cluster).seconds)


def _noted(found: Solution, against: str) -> Solution:
    return replace(found, notes=(*found.notes, f"stages have meshes of their own: {against}"))
