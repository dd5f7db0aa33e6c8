"""Why an op is placed as it is: what the best plan costs with each of its other placements, searched and simulated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group
from torch import fx

from autopar.meshes import DifferentMeshes
from autopar.planner.chain import Chain, Floor
from autopar.planner.search import search
from autopar.planner.solution import Infeasible, Pins, Solution, Space
from autopar.planning import Job
from autopar.progress import say
from autopar.report import make_table, percent_text, seconds_text, strategy_words
from cost_model.errors import ConfigError, ParallelismError, UnknownNameError
from cost_model.plan import Plan
from cost_model.simulate import simulate
from passes.graph import is_getitem, source_of
from passes.shard import op_key


@dataclass(frozen=True)
class Alternative:
    """One placement of the op (on the tp axis, as plans write it). step_time_s: of the best plan with it, all else free
    within the same mesh, microbatches and cap; None where none is possible or fits."""

    placement: str
    step_time_s: float | None


@dataclass(frozen=True)
class Why:
    """op: its node; source: the user's line, if known; others: every other placement, the fastest first."""

    op: str
    call: str
    source: str
    segment: str
    chosen: Alternative
    others: tuple[Alternative, ...]

    def sentence(self) -> str:
        """What was chosen, and what the next best would cost."""
        head = f"{self.op} ({self.call}, in {self.segment}) is placed {strategy_words(self.chosen.placement)}"
        best = next((other for other in self.others if other.step_time_s is not None), None)
        if best is None:
            return f"{head}: no plan is possible with another placement."
        return f"{head}; the next best, {strategy_words(best.placement)}, would make the step {self._longer(best)}."

    def _longer(self, other: Alternative) -> str:
        assert other.step_time_s is not None and self.chosen.step_time_s is not None
        part = other.step_time_s / self.chosen.step_time_s - 1.0
        return f"{percent_text(part)} longer" if part > 0 else f"{percent_text(-part)} shorter, by the simulator"

    def table(self) -> Group:
        rows = [(strategy_words(each.placement), self._step(each)) for each in (self.chosen, *self.others)]
        return make_table(
            f"Placements of {self.op} on the tp axis (inputs -> outputs; dim: split along it, sum: one term of it)",
            ("placement", "step"),
            rows,
        )

    @staticmethod
    def _step(each: Alternative) -> str:
        return "no plan" if each.step_time_s is None else seconds_text(each.step_time_s)

    def as_dict(self) -> dict[str, Any]:
        figures = [{"placement": o.placement, "step_time_s": o.step_time_s} for o in (self.chosen, *self.others)]
        names = {"op": self.op, "call": self.call, "source": self.source, "segment": self.segment}
        return {**names, "chosen": figures[0], "others": figures[1:]}


@dataclass(frozen=True)
class _HeldSpace:
    """A space where one variable of one kind of segment keeps one label on so many shards."""

    space: Space
    tp: int
    kind: int
    variable: str
    label: str

    @property
    def crowding(self) -> float:
        return self.space.crowding

    def floor(self, dp: int, tp: int, microbatch_size: int, above_s: float = -1.0) -> Floor | None:
        return self.space.floor(dp, tp, microbatch_size, above_s)

    def least_saved_bytes(self, dp: int, tp: int, microbatch_size: int) -> float:
        return self.space.least_saved_bytes(dp, tp, microbatch_size)

    def chain(self, dp: int, tp: int, microbatch_size: int) -> Chain | None:
        found = self.space.chain(dp, tp, microbatch_size)
        return None if found is None else self._held(found, tp)

    def saving_chains(self, dp: int, tp: int, microbatch_size: int) -> Sequence[Chain]:
        return [self._held(chain, tp) for chain in self.space.saving_chains(dp, tp, microbatch_size)]

    def _held(self, chain: Chain, tp: int) -> Chain:
        if tp != self.tp:
            return chain
        held = chain.kinds[self.kind].holding({self.variable: self.label})
        return replace(chain, kinds=(*chain.kinds[: self.kind], held, *chain.kinds[self.kind + 1 :]))


def why(job: Job, plan: Plan, name: str) -> Why:
    """Explain the placement of an op, named by its node or by a parameter or module that it is the first to use.

    Equal blocks change together, on stages of as many shards as the op's. Errors: UnknownNameError; ConfigError where
    the op's stage has no tp axis.
    """
    node, job = _node(job, name), _on_meshes_of(job, plan)
    number, part = next((i, s) for i, s in enumerate(job.space.structure.segments) if node.name in s.nodes)
    index = next(i for i, stage in enumerate(plan.stages) if number < stage.last_segment)
    mesh = plan.mesh(index % plan.pp)
    if mesh.tp == 1:
        whose = f"its stage {index % plan.pp}" if plan.meshes_differ else "the plan"
        raise ConfigError(f"{name!r} has no placement to explain: {whose} has tp=1; pin tp to see one")
    like = job.space.structure.representatives[part.kind]
    variable = op_key(like.nodes[part.nodes.index(node.name)])
    kind = list(job.space.structure.representatives).index(part.kind)
    chain = job.pinned_space().chain(mesh.dp, mesh.tp, plan.samples(index % plan.pp))
    assert chain is not None
    labels = chain.kinds[kind].domains[variable]
    chosen = plan.stages[index].choices.get(op_key(node.name), labels[0])
    found = []
    for position, label in enumerate(labels):
        say(f"why {node.name}: placement {position + 1} of {len(labels)}")
        if label != chosen:
            held = functools.partial(_HeldSpace, tp=mesh.tp, kind=kind, variable=variable, label=label)
            found.append(Alternative(label, _step_s(job, plan, held)))
    found.sort(key=lambda each: float("inf") if each.step_time_s is None else each.step_time_s)
    own = Alternative(chosen, simulate(job.program(plan), job.cluster).step_time_s)
    return Why(node.name, str(node.target), source_of(node), part.label, own, tuple(found))


def _searched(schedule: str) -> str:
    """The schedule under which plans of another one are searched for."""
    return "1f1b" if schedule in ("interleaved", "zero_bubble") else schedule


def _step_s(job: Job, plan: Plan, held: Callable[[Space], Space]) -> float | None:
    """Seconds of the best plan of a space made from the job's, on the meshes of the plan, under its schedule."""
    try:
        found = _held_plan(job, plan, held)
    except ParallelismError:
        return None
    if not isinstance(found, Solution):
        return None
    c = replace(found.configuration, schedule=plan.schedule, virtual_stages=plan.virtual_stages, window=plan.window)
    other = replace(job.plan(replace(found, configuration=c)), overlap=plan.overlap)
    return simulate(job.program(other), job.cluster).step_time_s


def _on_meshes_of(job: Job, plan: Plan) -> Job:
    """The job with the meshes, the axes and the microbatches of a plan, under the schedule it is searched by."""
    axes = None if plan.axes is None else plan.tp_axes
    free = replace(job.options.parallelism, virtual_stages=None, window=None, schedule=_searched(plan.schedule))
    pins = replace(free, dp=plan.dp, tp=plan.tp, pp=plan.pp, microbatch_size=plan.microbatch_size, tp_axes=axes)
    return job.under(pins, job.options.memory_cap_bytes)


def _held_plan(job: Job, plan: Plan, held: Callable[[Space], Space]) -> Solution | Infeasible | None:
    """What the search that finds plans with such meshes finds."""
    if not isinstance(plan.dp, int) or not isinstance(plan.tp, int):
        return DifferentMeshes(job, held).pinned()

    def confirm(solution: Solution) -> Sequence[int]:
        return job.peaks(job.plan(solution))

    pins = Pins(plan.dp, plan.tp, plan.pp, plan.microbatch_size, _searched(plan.schedule))
    space, count = held(job.pinned_space()), job.cluster.num_devices
    return search(space, count, job.batch, cap_bytes=job.cap_bytes, pins=pins, confirm=confirm)


def _node(job: Job, name: str) -> fx.Node:
    """The op of this name, or the first that uses a parameter of this name or of a module of this name."""
    model = job.traced.global_graph
    placed = {node for part in job.space.structure.segments for node in part.nodes}
    nodes = {node.name: node for node in model.nodes() if node.name in placed and not is_getitem(node)}
    if name in nodes:
        return nodes[name]
    parameters = {i.node: i.target for i in model.inputs if i.kind == "parameter"}
    named = {node for node, target in parameters.items() if target == name or target.startswith(f"{name}.")}
    for node in nodes.values():
        if any(operand.name in named for operand in node.all_input_nodes):
            return node
    raise UnknownNameError("op, module or parameter", name, [*nodes, *parameters.values()])
