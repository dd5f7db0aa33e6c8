"""Checks of what a user asked for against the model and the cluster, before anything is searched or rewritten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

from torch import fx

from autopar.planner.local_model import LocalModel
from autopar.planner.space import ModelSpace, renaming
from autopar.report import bytes_text
from cost_model.axes import ACROSS, INSIDE
from cost_model.cluster import Cluster
from cost_model.errors import BatchError, ConfigError, ParallelismError, PlanMismatchError
from cost_model.mesh import Mesh, meshes_of
from cost_model.ops import entry_of, price_of
from cost_model.parallelism import Parallelism
from cost_model.plan import Plan, StagePlan
from cost_model.program import Program
from cost_model.schedule import check_counts
from passes.batch import BatchAnalysis
from passes.calls import call_of
from passes.dependence import differentiable_nodes
from passes.fingerprint import fingerprint
from passes.graph import ModelGraph, is_getitem, op_name, source_of
from passes.segment import Segment
from passes.shard import form_of, input_key, is_own_form, op_key
from passes.zero import zero_key

# --- The model


def check_trains(model: ModelGraph, *, has_optimizer: bool) -> None:
    """ConfigError where one device could not train the model either: no gradient reaches a parameter."""
    if not any(item.kind == "parameter" for item in model.inputs):
        raise ConfigError("the loss uses no parameter of the model: there is nothing to train or to shard")
    trainable = [item for item in model.inputs if item.trainable]
    if not trainable and has_optimizer:
        raise ConfigError("the loss uses no parameter with requires_grad=True; unfreeze some, or pass optimizer=None")
    if trainable and model.outputs[0] not in differentiable_nodes(model):
        raise ConfigError(
            f"no gradient flows from the loss to a parameter (to {trainable[0].target!r}, say): "
            "compute the loss outside torch.no_grad() and without detach()"
        )


# --- Pins


def check_pins(pins: Parallelism, num_devices: int, batch: int, analysis: BatchAnalysis) -> None:
    """Pins that cannot go together are refused before any search. Errors: ParallelismError, BatchError."""
    _check_degrees(pins, num_devices)
    if pins.placement is not None and sorted(pins.placement) != list(range(num_devices)):
        raise ParallelismError(
            f"placement {pins.placement} must name each of the devices 0 to {num_devices - 1} once, "
            "for each (stage, dp replica, tp shard) in that order"
        )
    _check_microbatches(pins, num_devices, batch, analysis)
    _check_schedule(pins)


def _check_schedule(pins: Parallelism) -> None:
    """Virtual stages that the other pins leave no room for, as far as those say."""
    if pins.schedule == "interleaved":
        pp = pins.pp or 2
        check_counts(pins.schedule, pp, pp, pins.virtual_stages or 2)


def _check_degrees(pins: Parallelism, num_devices: int) -> None:
    degrees = {"dp": pins.dp, "tp": pins.tp, "pp": pins.pp}
    given = {name: degree for name, degree in degrees.items() if degree is not None}
    text = " x ".join(f"{name}={degree}" for name, degree in given.items())
    if pins.meshes_differ:
        _check_meshes(pins, num_devices, text)
        return
    product = math.prod(degree for degree in given.values() if isinstance(degree, int))
    text = f"{text} is {product}, which" if len(given) > 1 else text
    if len(given) == 3 and product != num_devices:
        raise ParallelismError(
            f"{text} is not the cluster's {num_devices} device(s); leave one degree None and the planner fills it in"
        )
    if num_devices % product:
        raise ParallelismError(f"{text} does not divide the cluster's {num_devices} device(s); choose a divisor")


def _check_meshes(pins: Parallelism, num_devices: int, text: str) -> None:
    """Degrees of single stages; the other degree, where it is None, is one number for all stages."""
    assert pins.pp is not None
    meshes = meshes_of(pins.dp or 1, pins.tp or 1, pins.pp)
    total = sum(mesh.size for mesh in meshes)
    if None in (pins.dp, pins.tp) and num_devices % total == 0:
        return
    if total != num_devices:
        raise ParallelismError(
            f"{text} needs {' + '.join(str(mesh.size) for mesh in meshes)} = {total} device(s), and the cluster has "
            f"{num_devices}: choose degrees of stages that add up to them"
        )


def _check_microbatches(pins: Parallelism, num_devices: int, batch: int, analysis: BatchAnalysis) -> None:
    dps = pins.dp if isinstance(pins.dp, tuple) else (pins.dp or 1,)
    dp, size = dps[0], pins.microbatch_size or 1
    if analysis.reason is not None and (max(dps) > 1 or pins.microbatch_size not in (None, batch)):
        raise ParallelismError(f"the batch cannot be split: {analysis.reason}; leave dp and microbatch_size None")
    if analysis.synchronised and pins.microbatch_size is not None:
        possible = (dp,) if pins.dp else [d for d in range(1, num_devices + 1) if num_devices % d == 0]
        _check_whole_shares(pins.microbatch_size, possible, batch)
    for each in dps:
        if batch % each:
            raise BatchError(f"a batch of {batch} does not divide among dp={each} replicas; change the batch or dp")
    if (batch // dp) % size:
        fits = [str(d) for d in range(1, batch // dp + 1) if batch // dp % d == 0]
        share = f"the {batch // dp} samples of each of dp={dp} replicas" if dp > 1 else f"a batch of {batch}"
        raise BatchError(
            f"{share} cannot be cut into microbatches of {size}; microbatch_size can be {', '.join(fits[-6:])}"
        )


def _check_whole_shares(size: int, degrees: Sequence[int], batch: int) -> None:
    """ParallelismError where no replica's one microbatch is of this size. degrees: what dp may be."""
    shares = {dp: batch // dp for dp in degrees if batch % dp == 0}
    if shares and size not in shares.values():
        under = " or ".join(f"{share} samples under dp={dp}" for dp, share in shares.items())
        possible = under if len(degrees) > 1 else f"{batch // degrees[0]} samples"
        raise ParallelismError(
            f"batch norm or the loss needs all samples of the batch at once, so each replica has one microbatch, of "
            f"{possible}; leave microbatch_size None"
        )


def check_sequence(space: ModelSpace, tp: int | tuple[int, ...] | None) -> None:
    """ParallelismError where no value between the model's blocks has a sequence, or one that a pinned tp divides."""
    local = space.local_model(space.traced.global_graph.batch)
    if local is None or not local.has_sequence((1,)):
        raise ParallelismError(
            "sequence_parallel=True, but no value between the model's blocks is [batch, sequence, features]; "
            "leave it None"
        )
    if isinstance(tp, int) and not local.has_sequence((tp,)):
        raise ParallelismError(
            f"sequence_parallel=True, but tp={tp} divides no sequence between the model's blocks; pad the sequence, or "
            "leave sequence_parallel or tp None"
        )


# --- What a plan should not leave unsaid


def plan_notes(plan: Plan, program: Program, cap_bytes: int, cluster: Cluster) -> tuple[str, ...]:
    """A cap that the devices do not have, devices that all do the same, and groups of replicas that sum nothing."""
    notes = []
    smallest = min(device.memory_bytes for device in cluster.devices)
    if cap_bytes > smallest:
        notes.append(f"the memory cap of {bytes_text(cap_bytes)} is more than a device's {bytes_text(smallest)}")
    shards = any("S(" in label for stage in plan.stages for label in stage.choices.values())
    if any(mesh.tp > 1 for mesh in plan.meshes) and not shards:
        notes.append(f"nothing is split along tp: the {plan.tp} devices of each tp group do the same work")
    summed = {collective.axis for stage in program.stages for collective in stage.step.collectives}
    if plan.dp_inner > 1 and not summed & {ACROSS, INSIDE}:
        notes.append(
            f"dp_inner={plan.dp_inner} has no effect: no gradient is whole on each replica (zero splits them over all)"
        )
    return tuple(notes)


# --- A plan from elsewhere


def check_plan(plan: Plan, space: ModelSpace, pins: Parallelism) -> None:
    """Refuse a plan of another model, cluster or batch, one that pins contradict, or one edited beyond use.

    Errors: PlanMismatchError, ParallelismError, ConfigError.
    """
    _check_origin(plan, space)
    for name, pinned in vars(pins).items():
        if pinned is not None and pinned != getattr(plan, name, pinned):
            raise ParallelismError(
                f"{name}={pinned} is pinned but the given plan has {name}={getattr(plan, name)}; drop one of them"
            )
    local = space.local_model(plan.microbatch_size)
    if local is None:
        raise PlanMismatchError("microbatch_size", "a size that the model allows", plan.microbatch_size)
    labels = tuple(part.label for part in local.segments)
    if labels != plan.segment_labels:
        raise PlanMismatchError("segment_labels", labels, plan.segment_labels)
    for number, stage in enumerate(plan.stages):
        domains = _domains(plan.mesh(number % plan.pp), plan, space, local, stage, pins.sequence_parallel)
        _check_choices(number, stage, domains, space.sharded, space.divisible)
    _check_agreement(plan)


def _check_origin(plan: Plan, space: ModelSpace) -> None:
    model, cluster = space.traced.global_graph, space.cluster
    for field, expected, found in (
        ("batch", model.batch, plan.batch),
        ("model", fingerprint(model), plan.model),
        ("number of devices", cluster.num_devices, len(plan.placement)),
        ("cluster", cluster.fingerprint(), plan.cluster),
    ):
        if expected != found:
            raise PlanMismatchError(field, expected, found, _difference(field, plan, space))


def _difference(field: str, plan: Plan, space: ModelSpace) -> str:
    """What a person can see of two fingerprints that differ."""
    if field == "cluster":
        return "the plan was made for other devices or links, or for figures of them measured anew"
    if field != "model":
        return ""
    local = space.local_model(plan.microbatch_size)
    here = () if local is None else tuple(part.label for part in local.segments)
    pairs = zip_longest(plan.segment_labels, here, fillvalue="nothing")
    first = next(((a, b) for a, b in pairs if a != b), None)
    if first is None:
        return (
            "the plan was made for a model of the same parts with other shapes, dtypes, dropout or mode (train, eval)"
        )
    return f"the plan was made for another model: it has {first[0]!r} where this one has {first[1]!r}"


def _domains(
    mesh: Mesh, plan: Plan, space: ModelSpace, local: LocalModel, stage: StagePlan, sequence: bool | None
) -> dict[str, tuple[str, ...]]:
    """Every choice that the planner has for a stage: variable -> labels."""
    size = plan.batch // (plan.microbatches * mesh.dp)
    chain = space.chain(mesh.dp, plan.axes.sizes if plan.axes else (mesh.tp,), size, sequence=sequence)
    if chain is None:
        raise ParallelismError(f"sequence_parallel={sequence} is pinned, which the model does not allow; leave it None")
    representatives: dict[str, Segment] = {}
    for part in local.segments:
        representatives.setdefault(part.kind, part)
    domains: dict[str, tuple[str, ...]] = {}
    for index in range(stage.first_segment, stage.last_segment):
        part = local.segments[index]
        rename = renaming(representatives[part.kind], part)
        known = chain.kinds[chain.sequence[index]].domains
        domains.update({rename(variable): labels for variable, labels in known.items()})
    return domains


def _check_choices(
    number: int,
    stage: StagePlan,
    domains: dict[str, tuple[str, ...]],
    sharded: bool,
    divisible: bool,
) -> None:
    for variable, label in stage.choices.items():
        if variable.startswith(zero_key("")):
            _check_zero(number, variable, label, domains, divisible)
            continue
        known = _labels(variable, domains)
        if not known:
            raise ConfigError(f"the plan has a choice for {variable!r}, which stage {number} does not have; plan again")
        if label not in known:
            why = "" if sharded else " (the optimizer is not elementwise, so parameters stay whole)"
            raise ConfigError(
                f"the plan's choice for {variable!r} is {label!r}, but it can be {', '.join(known)}{why}; plan again"
            )


def _labels(variable: str, domains: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """What a choice can be; a value's second form in one segment: that of others, or as it is held."""
    if not is_own_form(variable):
        return domains.get(variable, ())
    if op_key(variable.partition(":")[2]) not in domains:
        return ()
    held = input_key(form_of(variable).partition(":")[2])
    return tuple(dict.fromkeys((*domains.get(form_of(variable), ()), *domains.get(held, ()))))


def _check_agreement(plan: Plan) -> None:
    """A parameter of several stages has one level: its copies are reduced together."""
    levels: dict[str, str] = {}
    for variable, label in (item for stage in plan.stages for item in stage.choices.items()):
        if variable.startswith(zero_key("")) and levels.setdefault(variable, label) != label:
            raise ConfigError(
                f"the plan's choice for {variable!r} is {levels[variable]!r} in one stage and {label!r} in another; "
                "plan again"
            )


def _check_zero(number: int, variable: str, label: str, domains: dict[str, tuple[str, ...]], divisible: bool) -> None:
    """A level of a parameter that the stage holds."""
    if f"input:{variable.removeprefix(zero_key(''))}" not in domains:
        raise ConfigError(f"the plan has a choice for {variable!r}, which stage {number} does not have; plan again")
    if label not in ("1", "2", "3"):
        raise ConfigError(f"the plan's choice for {variable!r} is {label!r}, but it can be 1, 2, 3; plan again")
    if not divisible:
        raise ConfigError(f"the plan splits {variable!r} into pieces, which the optimizer does not allow; plan again")


def unruled(model: ModelGraph) -> dict[str, list[fx.Node]]:
    """Calls of each op that the op table does not know."""
    found: dict[str, list[fx.Node]] = {}
    for node in model.nodes():
        if not is_getitem(node) and entry_of(op_name(node)) is None:
            found.setdefault(op_name(node), []).append(node)
    return found


def missing_rules(model: ModelGraph, plan: Plan, cluster: Cluster) -> tuple[str, ...]:
    """Ops without a rule: every rank of a stage does all of their work; where they stand, and what that costs.

    The forward's seconds in a step; the backward's are not known, and count as twice as much.
    """
    device, notes = cluster.devices[0], []
    dp, tp = (min(degrees) for degrees in zip(*((mesh.dp, mesh.tp) for mesh in plan.meshes), strict=True))
    for name, nodes in unruled(model).items():
        costs = (price_of(call_of(node, model.metas)) for node in nodes)
        whole_s = sum(device.op_time_s(cost) for cost in costs if cost is not None)
        wasted = f", {3e3 * whole_s * (1 - 1 / (dp * tp)):.3g} ms of a step" if dp * tp > 1 else ""
        notes.append(
            f"{name} has no rule ({source_of(nodes[0])}): {len(nodes)} call(s) replicated{wasted}, priced by the bytes "
            "that they move; autopar.register_rule gives it one"
        )
    return tuple(notes)
