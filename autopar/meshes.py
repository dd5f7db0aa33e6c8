"""Plans whose stages have meshes of their own: which are tried, priced as programs run, and held against their caps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from autopar.link import joins_replicas
from autopar.planner.mixed import MixedSolver, Pool, Shape
from autopar.planner.solution import Infeasible, Solution, Space
from autopar.rescheduled import scheduled
from cost_model.cluster import Cluster
from cost_model.errors import ParallelismError
from cost_model.mesh import Mesh, meshes_of
from cost_model.network import Network
from cost_model.parallelism import Parallelism
from cost_model.placement import Partial, Shard, parse_placement
from cost_model.schedule import refusal

if TYPE_CHECKING:
    from autopar.planning import Job

MAX_TIGHTENINGS = 6
MOST_STAGES = 4
MOST_DEVICES, MOST_ALIKE, MOST_KINDS = 8, 6, 3
"""Up to so many devices meshes that differ are looked for unasked: of several kinds, of one kind; and of up to so many
kinds, since six devices of five kinds take minutes."""
WORTH = 0.01
"""The least part of a step that stages of different meshes must save: equal ones are simpler."""


def may_differ(pins: Parallelism, cluster: Cluster) -> bool:
    """Whether stages of different meshes are worth a look: devices differ, or their number has odd parts."""
    count, kinds = cluster.num_devices, len(set(cluster.devices))
    if pins.tp is not None or pins.pp == 1 or pins.placement is not None or pins.virtual_stages not in (None, 1):
        return False
    if pins.schedule == "interleaved" or pins.sequence_parallel is not None or kinds > MOST_KINDS:
        return False
    return 2 < count <= (MOST_DEVICES if kinds > 1 else MOST_ALIKE) and (kinds > 1 or count & (count - 1) != 0)


@dataclass(frozen=True, eq=False)
class DifferentMeshes:
    """The search of one job. held: what becomes of what it searches."""

    job: Job
    held: Callable[[Space], Space] = lambda space: space

    @cached_property
    def kinds(self) -> tuple[tuple[int, ...], ...]:
        """Devices that are alike."""
        devices = self.job.cluster.devices
        return tuple(tuple(i for i, d in enumerate(devices) if d == kind) for kind in dict.fromkeys(devices))

    @cached_property
    def solver(self) -> MixedSolver:
        pools = []
        for devices in self.kinds:
            view = self.job if len(self.kinds) == 1 else self.job.on(_only(self.job.cluster, devices))
            pools.append(Pool(devices, self.held(view.pinned_space()), min(map(self.job.device_cap_bytes, devices))))
        return MixedSolver(pools, self._cut_s)

    def pinned(self) -> Solution | Infeasible:
        """The fastest plan with the meshes that are pinned. Errors: ParallelismError."""
        found = self._best(self._pinned_shapes(), math.inf)
        if found is None:
            pins = self.job.options.parallelism
            raise ParallelismError(
                f"no plan has dp={pins.dp} x tp={pins.tp} x pp={pins.pp} for a batch of {self.job.batch}: parameters "
                "that several stages use must be whole there, and the batch must divide; change the degrees"
            )
        return found

    def faster(self, known: Solution | Infeasible) -> Solution | Infeasible:
        """The given answer, or one with meshes that differ where that is faster by enough, or fits alone.

        Both under the schedules that suit them: a long chain of equal stages gains more by another than a short one.
        """
        if isinstance(known, Infeasible):
            found = self._best(self._free_shapes(), math.inf)
            return known if found is None or isinstance(found, Infeasible) else _noted(found, "no others fit")
        found = self._best(self._free_shapes(), self.job.step_s(self.job.plan(known)))
        if found is None or isinstance(found, Infeasible):
            return known
        known_s, found_s = (self.job.step_s(scheduled(self.job, each).plan) for each in (known, found))
        return _noted(found, f"{known_s / found_s:.2f} times as fast") if found_s < (1 - WORTH) * known_s else known

    def _best(self, shapes: Iterator[Shape], limit_s: float) -> Solution | Infeasible | None:
        """The fastest under a limit as simulated, else what memory is short of; None where there is neither.

        Shapes come by their bounds, and are as few as can beat what has been found.
        """
        bounded = [(self.solver.bound_s(shape), number, shape) for number, shape in enumerate(shapes)]
        best: Solution | None = None
        short: Infeasible | None = None
        floor_s = math.inf
        for bound_s, _, shape in sorted(bounded, key=lambda item: item[:2]):
            if bound_s >= limit_s or not math.isfinite(bound_s):
                floor_s = min(floor_s, bound_s)
                break
            found = self._fitting(shape)
            if isinstance(found, Infeasible):
                short = found if short is None or found.needed_bytes < short.needed_bytes else short
            elif found is not None:
                floor_s = min(floor_s, found.bound_s)
                step_s = self.job.step_s(self.job.plan(found))
                if step_s < limit_s:
                    best, limit_s = found, step_s
        if best is None:
            return short
        bound_s = min(floor_s, best.objective_s)
        return replace(best, bound_s=bound_s, gap=best.objective_s / bound_s - 1)

    def _fitting(self, shape: Shape) -> Solution | Infeasible | None:
        """The solver's choice; where its program is over a cap, another that leaves as much more."""
        extra = [0.0] * shape.pp
        found = self.solver.solve(shape)
        for _ in range(MAX_TIGHTENINGS):
            if not isinstance(found, Solution):
                return found
            plan = self.job.plan(found)
            peaks, caps = self.job.peaks(plan), self.job.stage_caps(plan)
            if all(peak <= cap for peak, cap in zip(peaks, caps, strict=True)):
                return found
            extra = [x + max(0.0, peak - cap) for x, peak, cap in zip(extra, peaks, caps, strict=True)]
            nearest = Infeasible(max(peaks), peaks.index(max(peaks)), found.configuration, found.stages,
                                 found.placement, found.meshes)  # fmt: skip
            found = self.solver.solve(shape, extra)
        return nearest

    def _pinned_shapes(self) -> Iterator[Shape]:
        pins, count = self.job.options.parallelism, self.job.cluster.num_devices
        assert pins.pp is not None
        units = sum(mesh.size for mesh in meshes_of(pins.dp or 1, pins.tp or 1, pins.pp))
        dp, tp = (pins.dp or count // units, pins.tp or count // units)
        yield from self._shapes(tuple((mesh,) for mesh in meshes_of(dp, tp, pins.pp)))

    def _free_shapes(self) -> Iterator[Shape]:
        """Every number of replicas and of stages, with every number of shards for each stage."""
        pins, count = self.job.options.parallelism, self.job.cluster.num_devices
        assert not isinstance(pins.dp, tuple)
        for dp in [pins.dp] if pins.dp else range(1, count // 2 + 1):
            for pp in [pins.pp] if pins.pp else range(2, min(MOST_STAGES, count // dp) + 1):
                if self.job.batch % dp == 0 and all(len(kind) % dp == 0 for kind in self.kinds):
                    meshes = tuple(Mesh(dp, tp) for tp in range(1, count // dp - pp + 2))
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

    def _cut_s(self, mesh: Mesh, samples: int, position: int, label: str) -> float:
        """Over the slowest link between kinds of devices, or among devices that are alike."""
        local = self.job.space.local_model(samples)
        assert local is not None
        exit, carried_bytes = local.cut_before[position]
        place, nbytes = parse_placement(label), exit.nbytes
        if isinstance(place, Partial) or not self._may_cut(position):
            return math.inf
        if isinstance(place, Shard):
            whole = (exit.shape[0] * mesh.dp, *exit.shape[1:])
            if carried_bytes or not place.is_consecutive(whole):
                return math.inf
            nbytes //= mesh.tp
        return self._hop_s(self.job.options.precision.sent_bytes(nbytes + carried_bytes, exit))

    def _may_cut(self, position: int) -> bool:
        """Where replicas differ, not everything can go from so many to others."""
        segment = self.job.traced.segments[position]
        return not isinstance(self.job.options.parallelism.dp, tuple) or joins_replicas(segment, self.job.analysis)

    @cached_property
    def _hop_s(self) -> Callable[[int], float]:
        ends = [devices[0] for devices in self.kinds]
        pairs = [(a, b) for a in ends for b in ends if a != b] or [(0, self.job.cluster.num_devices - 1)]
        known: dict[int, float] = {}

        def seconds(nbytes: int) -> float:
            if nbytes not in known:
                transfer_s = self.job.cluster.transfer_time_s
                known[nbytes] = max(transfer_s(nbytes, a, b) + transfer_s(nbytes, b, a) for a, b in pairs)
            return known[nbytes]

        return seconds


def _noted(found: Solution, against: str) -> Solution:
    return replace(found, notes=(*found.notes, f"stages have meshes of their own: {against}"))


def _only(cluster: Cluster, devices: Sequence[int]) -> Cluster:
    """Some devices of a cluster with several kinds, which has a network."""
    assert cluster.network is not None
    latency, bandwidth = cluster.network.latencies_s, cluster.network.bandwidths
    rows = [tuple(tuple(float(values[a, b]) for b in devices) for a in devices) for values in (latency, bandwidth)]
    network = replace(Network.of_matrix(*rows), start_s=cluster.network.start_s)
    return Cluster(cluster.name, tuple(cluster.devices[i] for i in devices), (), cluster.backend, network)
