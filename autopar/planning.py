"""Planning: model, cluster and batch in; plan, program and estimate out."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from autopar.checks import check_pins, check_plan, check_sequence, check_trains, missing_rules, plan_notes, unruled
from autopar.equal_meshes import EqualMeshes
from autopar.gathered import Gathered, beats, unless_beaten
from autopar.hiding import hidden_s
from autopar.kernel_calls import kernel_notes, worth_compiling
from autopar.link import Linker
from autopar.linked import Linked, device_map
from autopar.meshes import DifferentMeshes, may_differ
from autopar.model_notes import analysed, random_notes, scaling_notes
from autopar.narrower import narrower
from autopar.on_axes import on_axes
from autopar.optimizer_price import OptimizerPrice, price_optimizer
from autopar.options import FLAT, Options, check_target
from autopar.placing import fastest_placed
from autopar.plan_of import parts_of, stage_plans, unplaced
from autopar.planner.candidates import smallest_cuts
from autopar.planner.search import Configuration, Confirm, search
from autopar.planner.smallest_cap import smallest_cap
from autopar.planner.solution import Infeasible, Pins, Solution
from autopar.planner.space import ModelSpace, PinnedSpace
from autopar.progress import planning_progress
from autopar.relaxations import decided
from autopar.rules import unchecked_notes
from autopar.runtime.optim import OptimizerSpec, capture
from autopar.runtime.probe import is_elementwise, is_separable
from autopar.spaces import Spaces
from autopar.tied import tied_s
from autopar.timing import fastest, waited_s
from cost_model.axes import Axes
from cost_model.cluster import Cluster
from cost_model.collector import collector_paused
from cost_model.errors import ConfigError, InfeasiblePlanError, PlanMismatchError, UnsupportedError
from cost_model.estimate import Estimate, MemoryBreakdown
from cost_model.memory import StagePeak, StagePeaks, allocator_rounding
from cost_model.mesh import Mesh, of_stages
from cost_model.parallelism import Parallelism
from cost_model.plan import Plan
from cost_model.precision import Precision
from cost_model.program import Program
from cost_model.simulate import SimulationResult, estimate_of, simulate
from cost_model.tensor import TensorMeta
from passes.batch import BatchAnalysis
from passes.fingerprint import fingerprint
from passes.graph import torch_dtype
from passes.precision import cast
from passes.trace import Traced, trace
from passes.verify import verify_priced


@dataclass(frozen=True)
class Decision:
    """A plan and how it was found; what rank 0 tells the others."""

    plan: Plan
    search_s: float
    gap: float
    notes: tuple[str, ...]


Agree = Callable[[Callable[[], Decision]], Decision]
"""Runs the search where it has to run and gives its decision to every rank."""


@dataclass(frozen=True, eq=False)
class Planned:
    """Everything known before the first step. job: what the program is made by, once it is asked for."""

    plan: Plan
    estimate: Estimate
    job: Job
    optimizer: OptimizerSpec | None

    @cached_property
    def linked(self) -> Linked:
        """The program of every rank; what it does is what was priced, or VerificationError."""
        with collector_paused():
            linked = self.job.linked(self.plan)
        verify_priced(linked.program, self.job.program(self.plan))
        return linked


def plan_model(
    model: nn.Module, cluster: Cluster, inputs: Any, options: Options, agree: Agree = lambda decide: decide()
) -> Planned:
    """Trace, search (unless a plan is given), rewrite and price."""
    start = time.perf_counter()
    check_target(model, cluster)
    with collector_paused():
        job = Job.of(model, cluster, inputs, options)
        return job.planned(agree(lambda: decided(job, start)))


@dataclass(eq=False)
class Job:
    """One model to plan: traced, analysed, its optimizer captured. parameters: as the optimizer sees them.

    ways: the precisions that a plan may have, of which the options name the first.
    """

    cluster: Cluster
    options: Options
    traced: Traced
    analysis: BatchAnalysis
    optimizer: OptimizerSpec | None
    parameters: Mapping[str, TensorMeta]
    notes: tuple[str, ...]
    ways: tuple[Precision, ...]

    def __post_init__(self) -> None:
        self._model = fingerprint(self.traced.global_graph)
        self._linked: dict[Plan, Linked] = {}
        self._programs: dict[Plan, Program] = {}
        self._simulated: dict[Plan, SimulationResult] = {}
        self._walked: dict[tuple[int, str], StagePeaks] = {}
        self._peaks_of: dict[tuple[object, ...], list[StagePeak]] = {}
        self.spaces = Spaces()
        self.elsewhere: dict[tuple[Parallelism, int], Solution | None] = {}
        self.gathered: dict[tuple[Parallelism, int], tuple[float, Gathered | None]] = {}
        self.sketched: dict[tuple[Plan, Parallelism], list[tuple[float, Configuration]]] = {}
        kind, options = self.cluster.devices[0].kind, self.options
        self._linker = Linker(
            self.traced,
            self.analysis,
            self.optimizer,
            kind,
            options.max_grad_norm,
            options.local_batches,
            worth=worth_compiling(self.cluster) if options.compiles else None,
            products=self.cluster.products,
        )

    @staticmethod
    def of(model: nn.Module, cluster: Cluster, inputs: Any, options: Options) -> Job:
        ways = options.precision.choices
        options = replace(options, precision=ways[0])
        traced, analysis, notes = analysed(cast(trace(model, inputs, options.loss_fn), options.precision), model)
        if analysis.reason is not None or unruled(traced.global_graph):  # once more, to say where
            again = trace(model, inputs, options.loss_fn, sources=True)
            traced, analysis, notes = analysed(cast(again, options.precision), model)
        whole = traced.global_graph
        check_trains(whole, has_optimizer=options.optimizer is not None)
        parameters = {i.target: whole.tensor(i.node) for i in whole.inputs if i.trainable}
        updated = {n: replace(m, dtype=options.precision.kept(m.dtype).updated) for n, m in parameters.items()}
        shapes = {n: (m.shape, torch_dtype(m.dtype)) for n, m in updated.items()}
        optimizer = capture(options.optimizer, shapes)
        traced = replace(traced, least=options.fewest_segments(cluster.num_devices))
        notes = (*traced.notes, *notes, *random_notes(whole, options.seed), *scaling_notes(options.precision))
        return Job(cluster, options, traced, analysis, optimizer, updated, notes, ways)

    @property
    def batch(self) -> int:
        return self.traced.global_graph.batch

    @property
    def cap_bytes(self) -> int:
        cap = self.options.memory_cap_bytes
        return self.cluster.memory_cap_bytes if cap is None else cap

    def device_cap_bytes(self, device: int) -> int:
        """What a plan may use on one device, where others may have more."""
        cap = self.options.memory_cap_bytes
        return self.cluster.devices[device].usable_bytes if cap is None else cap

    def stage_caps(self, plan: Plan) -> tuple[int, ...]:
        """What each stage of a plan may use: as much as its devices have."""
        return tuple(min(map(self.device_cap_bytes, ranks)) for ranks in plan.stage_devices)

    def decide(self, start: float) -> Decision:
        """The given plan, checked, or the search's."""
        if self.options.plan is not None:
            self._check(self.options.plan)
            return Decision(
                self.options.plan, time.perf_counter() - start, math.inf, ("the plan was given, not searched",)
            )
        self._check_pins()
        solution = self.solve()
        self._write_lp(solution)
        return narrower(self, self._decision(solution, start), start)

    def found(self, start: float) -> Decision | None:
        """The search's answer; None where no plan fits."""
        solution = self._searched()
        return None if isinstance(solution, Infeasible) else self._decision(solution, start)

    def attempt(self) -> Planned | int:
        """What the search finds, or bytes of a device under which some plan fits where none fits under the cap."""
        start = time.perf_counter()
        self._check_pins()
        found = self._searched()
        if isinstance(found, Infeasible):
            return max(peak.memory.total_bytes for peak in self._stage_peaks(self.plan(found)))
        return self.planned(narrower(self, self._decision(found, start), start))

    def _check_pins(self) -> None:
        check_pins(self.options.parallelism, self.cluster.num_devices, self.batch, self.analysis)
        if self.options.parallelism.sequence_parallel:
            check_sequence(self.space, self.options.parallelism.tp)

    def _decision(self, solution: Solution, start: float) -> Decision:
        plan, notes = fastest(self, solution)
        return Decision(plan, time.perf_counter() - start, solution.gap, (*solution.notes, *notes))

    def _write_lp(self, solution: Solution) -> None:
        path = self.options.write_lp
        if path is None:
            return
        assert solution.ilp is not None
        try:
            solution.ilp.write_lp(path)
        except OSError as error:
            raise ConfigError(f"cannot write the integer program to {str(path)!r}: {error.strerror}") from error

    def fits(self, plan: Plan) -> bool:
        """Whether the rewritten program's stages stay under their caps."""
        return all(peak <= cap for peak, cap in zip(self.peaks(plan), self.stage_caps(plan), strict=True))

    def check_overlap(self, plan: Plan) -> None:
        """Errors: InfeasiblePlanError where a plan whose collectives move behind compute does not fit."""
        needed, cap = self._tightest(self.program(plan), self.stage_caps(plan))
        if needed > cap:
            advice = "leave overlap None, or raise memory_cap to that"
            raise self._over_cap(cap, needed, plan, advice, "the plan does not fit with overlap=True")

    def step_s(self, plan: Plan) -> float:
        """Seconds of a step of a plan's program."""
        return self.simulated(plan).step_time_s

    def simulated(self, plan: Plan) -> SimulationResult:
        """A step of a plan's program, without its timeline; simulated once."""
        if plan not in self._simulated:
            program = self.program(plan)
            self._simulated[plan] = simulate(program, self.cluster, memories=self._memories(program), told=False)
        return self._simulated[plan]

    def planned(self, decision: Decision) -> Planned:
        """The decided plan rewritten and priced."""
        plan = decision.plan
        graph = self.traced.global_graph
        missing = (*missing_rules(graph, plan, self.cluster), *unchecked_notes(graph))
        program = self.program(plan)
        notes = (*self.notes, *missing, *decision.notes, *plan_notes(plan, program, self.cap_bytes, self.cluster))
        notes = (*notes, *kernel_notes(program)) if self.options.compiles else notes
        estimate = estimate_of(self.simulated(plan), plan, notes, decision.search_s, decision.gap)
        return Planned(plan, estimate, self, self.optimizer)

    def under(self, parallelism: Parallelism, memory_cap_bytes: int | None) -> Job:
        """The same model under other pins and another cap, searched anew; trace, prices and programs are shared."""
        job = copy.copy(self)
        job.options = replace(self.options, parallelism=parallelism, memory_cap_bytes=memory_cap_bytes, plan=None)
        return job

    def linked(self, plan: Plan) -> Linked:
        """The program of a plan, rewritten once whatever the cap it was found under and the devices it is placed on."""
        key = unplaced(plan)
        if key not in self._linked:
            self._linked[key] = self._linker.link(plan)
        return self._linked[key].at(plan)

    def program(self, plan: Plan) -> Program:
        """What prices see of it: that of ``linked`` but for the names of stages that are alike."""
        key = unplaced(plan)
        if key not in self._programs:
            self._programs[key] = self._linker.price(plan)
        return replace(self._programs[key], devices=device_map(plan))

    @cached_property
    def space(self) -> ModelSpace:
        """What the search asks; the optimizer is priced once, on one parameter of each shape."""
        sharded = self.optimizer is None or (self.separable and is_elementwise(self.optimizer))
        if not sharded:
            self.notes = (*self.notes, "the optimizer is not elementwise: parameters are not split along tp")
        if not self.separable:
            self.notes = (
                *self.notes,
                "the optimizer couples parameters (a norm over all?): all are on every rank, pp=1",
            )
        make = functools.partial(self._made_space, sharded=sharded)
        return self.spaces.space(self.cluster, self.options.precision, make)

    def _made_space(self, *, sharded: bool) -> ModelSpace:
        price, sample = OptimizerPrice((), 0, 0), {m: n for n, m in reversed(tuple(self.parameters.items()))}
        if self.optimizer is not None and sample:
            one_of_each = {name: meta for meta, name in reversed(tuple(sample.items()))}
            price = price_optimizer(self.optimizer, one_of_each, device=self.cluster.devices[0].kind)
        priced_bytes = sum(m.nbytes for m in sample)
        return ModelSpace(
            self.traced,
            self.analysis,
            self.cluster,
            price,
            max(priced_bytes, 1),
            self.options.precision,
            sharded=sharded,
            divisible=self.optimizer is None or (sharded and is_elementwise(self.optimizer, flat=True)),
        )

    @property
    def least_devices(self) -> int | None:
        """So many hold the parameters and the optimizer state, each byte once; None where no number does."""
        if self.cap_bytes <= 0:
            return None
        return math.ceil(self.state_bytes / self.cap_bytes)

    @cached_property
    def state_bytes(self) -> float:
        """Of all parameters and the optimizer state, each byte once."""
        stored = self.parameter_bytes
        return stored + stored * self.space.optimizer.state_bytes / self.space.parameter_bytes

    @cached_property
    def parameter_bytes(self) -> int:
        """Of all parameters, as they are stored."""
        return sum(meta.nbytes for meta in self.parameters.values())

    @cached_property
    def separable(self) -> bool:
        """Whether stages may update their parameters apart."""
        return self.optimizer is None or is_separable(self.optimizer)

    def _stages(self, pinned: int | None) -> int | None:
        """The pin of pp, one for an optimizer that needs all parameters. Errors: UnsupportedError."""
        if self.separable:
            return pinned
        if pinned not in (None, 1):
            assert self.optimizer is not None
            raise UnsupportedError(
                f"pp={pinned} splits the parameters over stages, but {self.optimizer.path} updates one by what it sees "
                "of others (a norm over all gradients?); leave pp None"
            )
        return 1

    def solve(self) -> Solution:
        """The search's answer. Errors: InfeasiblePlanError."""
        found = self._searched()
        if isinstance(found, Infeasible):
            raise self._infeasible(found)
        return found

    def _searched(self, *, fits: bool = False) -> Solution | Infeasible:
        """fits: whether the plan itself has to, though another one is faster."""
        p = self.options.parallelism
        flat = self.options.solver == FLAT
        if p.meshes_differ:
            if flat:
                raise UnsupportedError(
                    "solver='flat' plans one mesh for all stages; pin one dp and tp, or leave it out"
                )
            self._stages(p.pp)
            return DifferentMeshes(self).pinned()
        pins = self.pins(p.schedule)
        if not self._may_differ:
            return self._searched_alike(pins, fits=fits)
        if not self._is_placed:
            return DifferentMeshes(self).faster(self._searched_alike(pins))
        return DifferentMeshes(self).unless_faster(EqualMeshes(self, pins))

    def _fitting(self) -> Solution | Infeasible:
        """Some plan where the search finds one."""
        p = self.options.parallelism
        if p.meshes_differ or not self._may_differ or not self._is_placed:
            return self._searched(fits=True)
        return DifferentMeshes(self).fitting(EqualMeshes(self, self.pins(p.schedule)))

    @property
    def _may_differ(self) -> bool:
        """Whether stages of different meshes are searched for, too."""
        p, flat = self.options.parallelism, self.options.solver == FLAT
        return self.separable and not flat and p.tp_axes is None and may_differ(p, self.cluster)

    @property
    def _is_placed(self) -> bool:
        """Whether meshes are placed on devices as they are searched."""
        cluster, pinned = self.cluster, self.options.parallelism.placement
        return cluster.network is not None and cluster.uneven and pinned is None

    def pins(self, schedule: str | None) -> Pins:
        """Those that the options have, with a schedule."""
        p = self.options.parallelism
        assert not isinstance(p.dp, tuple) and not isinstance(p.tp, tuple)
        return Pins(p.dp, p.tp, self._stages(p.pp), p.microbatch_size, schedule, p.virtual_stages, p.window)

    def _searched_alike(self, pins: Pins, *, fits: bool = False) -> Solution | Infeasible:
        """With one mesh for all stages. fits: as for ``_searched``."""
        if self._is_placed:
            return EqualMeshes(self, pins).fastest()
        alike = len(set(self.cluster.devices)) == 1
        timed = alike and self.options.solver != FLAT
        if timed and not fits:
            found = unless_beaten(self, functools.partial(self.searched_under, pins, timed=True))
            if isinstance(found, Solution) and beats(self, found) is not None:
                return found
        else:
            found = self.searched_under(pins, timed=timed)
        found = on_axes(self, pins, found, functools.partial(waited_s, self) if timed else None)
        if isinstance(found, Infeasible) or alike:
            return found
        return fastest_placed(self, pins, found, math.inf)[1]

    def searched_under(
        self, pins: Pins, confirm: Confirm | None = None, *, timed: bool = False
    ) -> Solution | Infeasible:
        """confirm: as for ``search``, or exact peaks. timed: whether plans are simulated before one is the answer."""
        with planning_progress() as report:
            return search(
                self.pinned_space(),
                self.cluster.num_devices,
                self.batch,
                cap_bytes=self.cap_bytes,
                pins=pins,
                confirm=confirm or self._peaks,
                timed=functools.partial(waited_s, self) if timed else None,
                hidden_s=functools.partial(hidden_s, self) if timed else None,
                lacks_s=functools.partial(tied_s, self) if timed else None,
                progress=report,
                flat=self.options.solver == FLAT,
            )

    def sent_bytes(self, microbatch_size: int, pp: int | None = None) -> float:
        """The largest activation between segments, as it is sent; pp: between stages that are cut where least is."""
        local, sent = self.space.local_model(microbatch_size), self.options.precision.sent_bytes
        assert local is not None
        cuts = [float(sent(exit.nbytes + carried, exit)) for exit, carried in local.cut_before[1:]]
        return max(cuts if pp is None else smallest_cuts(cuts, pp), default=0.0)

    @cached_property
    def reduced_bytes(self) -> float:
        """All gradients, as they are summed."""
        return self._summed_bytes({i.node for i in self.traced.global_graph.inputs})

    @cached_property
    def end_bytes(self) -> tuple[float, float, float]:
        """Those of the first segment, of the last, and of parameters that both have."""
        first, last = (set(self.traced.segments[end].parameters) for end in (0, -1))
        return self._summed_bytes(first), self._summed_bytes(last), self._summed_bytes(first & last)

    def _summed_bytes(self, parameters: Set[str]) -> float:
        """Gradients of some, as they are summed."""
        whole, kept = self.traced.global_graph, self.options.precision.kept
        metas = [whole.tensor(i.node) for i in whole.inputs if i.trainable and i.node in parameters]
        return float(sum(replace(meta, dtype=kept(meta.dtype).reduce).nbytes for meta in metas))

    @property
    def segments(self) -> int:
        """Of the model."""
        return len(self.traced.segments)

    @property
    def meetings(self) -> int:
        """How often replicas exchange something in every microbatch: forward, and gradients of it backward."""
        return 2 * len(self.analysis.synchronised)

    @property
    def product_dtype(self) -> str:
        """Of most parameters, or what products are computed in instead."""
        sizes = Counter[str]()
        for meta in self.parameters.values():
            sizes[meta.dtype] += meta.nbytes
        return self.options.precision.compute_dtype or max(sorted(sizes), key=lambda dtype: sizes[dtype])

    def has_room(self, program: Program, caps: Sequence[int]) -> bool:
        """Whether all stages stay under their caps."""
        needed, cap = self._tightest(program, caps)
        return needed <= cap

    def _tightest(self, program: Program, caps: Sequence[int]) -> tuple[int, int]:
        """Peak and cap of the stage that has least room."""
        peaks = [peak.memory.total_bytes for peak in self._program_peaks(program)]
        return max(zip(peaks, caps, strict=True), key=lambda each: each[0] - each[1])

    def on(self, cluster: Cluster) -> Job:
        """The same model for another cluster, searched anew; trace and programs are shared."""
        job = copy.copy(self)
        job.cluster, job._simulated, job.elsewhere, job.gathered, job.sketched = cluster, {}, {}, {}, {}
        for known in ("space", "reduced_bytes", "end_bytes", "state_bytes"):
            job.__dict__.pop(known, None)
        return job

    def having(self, precision: Precision) -> Job:
        """The same for another of ``ways``, searched anew."""
        job = self.on(self.cluster)
        job.options = replace(self.options, precision=precision)
        return job

    def pinned_space(self, c: Configuration | None = None) -> PinnedSpace:
        """c: what was found, whose axes hold."""
        pins = self.options.parallelism
        if pins.zero and not self.space.divisible:
            assert self.optimizer is not None
            raise UnsupportedError(
                f"zero={pins.zero} splits parameters into pieces, which {self.optimizer.path} does not update as it "
                "updates whole parameters; use zero=0, or an elementwise optimizer such as torch.optim.AdamW"
            )
        zero = c.zero if c and pins.zero is None else pins.zero
        if zero is None and (pins.dp_inner or (c and c.dp_inner) or 1) > 1:
            zero = 0  # what is split over all replicas is not summed in groups of them
        return PinnedSpace(self.space, pins.recompute, zero, pins.sequence_parallel, (c and c.tp_axes) or pins.tp_axes)

    def _peaks(self, solution: Solution) -> Sequence[int]:
        return self.peaks(self.plan(solution))

    def peaks(self, plan: Plan) -> list[int]:
        """Exact peak bytes of each stage of the rewritten program."""
        return [peak.memory.total_bytes for peak in self._stage_peaks(plan)]

    def static_bytes(self, plan: Plan) -> list[int]:
        """What each stage of the rewritten program holds during its whole step."""
        return [peak.memory.static_bytes for peak in self._stage_peaks(plan)]

    def held_bytes(self, plan: Plan) -> list[int]:
        """That, and what microbatches have saved where it holds most."""
        return [peak.memory.static_bytes + peak.memory.saved for peak in self._stage_peaks(plan)]

    def _stage_peaks(self, plan: Plan, exact: int | None = None) -> list[StagePeak]:
        """exact: a stage whose tensors have their own names, not those of a stage that is alike."""
        return self._program_peaks(self.program(plan) if exact is None else self._linker.price(plan, exact))

    def _program_peaks(self, program: Program) -> list[StagePeak]:
        """Walked once whatever the devices it is placed on, its blocks once whatever its schedule."""
        kind, p = self.cluster.devices[0].kind, program
        blocks = (id(p.stages), kind)
        if blocks not in self._walked:  # it holds the stages, which live as long as it is known by them
            self._walked[blocks] = StagePeaks(p.stages, allocator_rounding(kind))
        key = (*blocks, p.microbatches, p.schedule, p.window)
        if key not in self._peaks_of:
            self._peaks_of[key] = self._walked[blocks].under(p.pp, p.microbatches, p.schedule, p.window)
        return self._peaks_of[key]

    def _memories(self, program: Program) -> tuple[MemoryBreakdown, ...]:
        """Of each stage; none where devices are of several kinds, whose allocators differ."""
        kinds = {device.kind for device in self.cluster.devices}
        return tuple(peak.memory for peak in self._program_peaks(program)) if len(kinds) == 1 else ()

    def plan(self, solution: Solution | Infeasible) -> Plan:
        """The search's answer as a plan file holds it."""
        c = solution.configuration
        local = self.space.local_model(c.microbatch_size)
        assert local is not None
        meshes = solution.meshes or (Mesh(c.dp, c.tp),) * c.pp
        pinned = self.options.parallelism.placement
        placement = pinned or solution.placement or tuple(range(self.cluster.num_devices))
        plan = Plan(
            model=self._model,
            cluster=self.cluster.fingerprint(),
            batch=self.batch,
            dp=of_stages([mesh.dp for mesh in meshes]),
            tp=of_stages([mesh.tp for mesh in meshes]),
            pp=c.pp,
            schedule=c.schedule,
            microbatch_size=c.microbatch_size,
            microbatches=c.microbatches,
            memory_cap_bytes=self.cap_bytes,
            placement=placement,
            stages=stage_plans(local, meshes, parts_of(solution), self.pinned_space(c)),
            segment_labels=tuple(s.label for s in local.segments),
            precision=self.options.precision,
            virtual_stages=c.virtual_stages,
            window=c.window,
            axes=self._axes(c),
            dp_inner=self.options.parallelism.dp_inner or c.dp_inner,
        )
        return replace(plan, memory_cap_bytes=max(self.stage_caps(plan)))

    def _axes(self, c: Configuration) -> Axes | None:
        """Those that tp consists of, None where it is one."""
        sizes = self.pinned_space(c).sizes(c.tp)
        return self.space.mesh_prices(c.dp, sizes).axes if len(sizes) > 1 else None

    def _infeasible(self, found: Infeasible) -> InfeasiblePlanError:
        """The smallest cap that would do, with the plan that meets it."""

        def attempt(cap_bytes: int) -> Solution | Infeasible:
            return self.under(self.options.parallelism, cap_bytes)._fitting()

        def peak_bytes(each: Solution | Infeasible) -> int:
            return max(self.peaks(self.plan(each)))

        needed, best = smallest_cap(attempt, peak_bytes, self.cap_bytes, peak_bytes(found))
        c = best.configuration
        advice = (
            f"raise memory_cap to that (for dp={c.dp} tp={c.tp} pp={c.pp} microbatch_size={c.microbatch_size}), "
            "or use more devices, a smaller batch or a smaller model"
        )
        return self._over_cap(self.cap_bytes, needed, self.plan(best), advice, "no plan fits")

    def _over_cap(
        self, cap_bytes: int, needed_bytes: int, plan: Plan, advice: str, subject: str
    ) -> InfeasiblePlanError:
        """With the stage of the plan that binds, and what is largest there."""
        peaks = self._stage_peaks(plan)
        stage = max(range(plan.pp), key=lambda number: peaks[number].memory.total_bytes)
        tensors = self._stage_peaks(plan, stage)[stage].largest()
        return InfeasiblePlanError(
            cap_bytes=cap_bytes,
            needed_bytes=needed_bytes,
            stage=stage,
            tensors=tensors,
            advice=advice,
            subject=subject,
        )

    def _check(self, plan: Plan) -> None:
        """A given plan must be for this model, cluster and batch, and fit."""
        if plan.precision not in self.ways:
            raise PlanMismatchError("precision", str(self.options.precision), str(plan.precision))
        check_plan(plan, self.space, self.options.parallelism)
        self._stages(plan.pp)
        cap = self.options.memory_cap_bytes
        cap = plan.memory_cap_bytes if cap is None else cap
        given = self.options.memory_cap_bytes is not None
        caps = [cap] * plan.pp if given else [min(cap, own) for own in self.stage_caps(plan)]
        needed, cap = self._tightest(self.program(plan), caps)
        if needed > cap:
            advice = "raise memory_cap to that, or leave the plan out and let the planner search"
            raise self._over_cap(cap, needed, plan, advice, "the given plan does not fit")
