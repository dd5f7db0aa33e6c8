"""Reports: a plan and its estimate as plain text of at most ``WIDTH`` columns, and as trees for JSON."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from cost_model.cluster import Cluster
from cost_model.estimate import Estimate, StageEstimate, TimeBreakdown
from cost_model.labels import folded, split_number
from cost_model.network import Network
from cost_model.parallelism import RECOMPUTES
from cost_model.placement import Placement, Placements, Replicate, Shard, Varying, parse_placements, split_axes
from cost_model.plan import Plan
from cost_model.program import Collective, Program, StageProgram
from cost_model.shards import ParameterShard
from cost_model.strategies import parse_strategy
from passes.shard import input_key
from passes.zero import zero_key

if TYPE_CHECKING:
    from autopar.planning import Planned

WIDTH = 100
_MIB = 2**20
_TIME_PARTS = (
    ("compute", "compute_s"),
    ("communication in the schedule", "communication_s"),
    ("bubble", "bubble_s"),
    ("gradient reduction", "reduction_s"),
    ("optimizer", "optimizer_s"),
    ("other", "other_s"),
)
_MEMORY_PARTS = ("parameters", "gradients", "optimizer_state", "master", "inputs", "saved", "transient", "rounding")


# --- Words and tables


def seconds_text(seconds: float) -> str:
    """Three digits: "1.23 s", "45.6 ms", "789 us"."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return "0" if seconds == 0 else f"{_three_digits(seconds / 1e-9)} ns"


def bytes_text(nbytes: float) -> str:
    """Three digits: "1.23 GiB", "45.6 MiB", "789 B"."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 2**power:
            return f"{_three_digits(nbytes / 2**power)} {unit}"
    return f"{nbytes:.0f} B"


def percent_text(fraction: float) -> str:
    return f"{fraction:.1%}"


def _three_digits(number: float) -> str:
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}"


def make_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> Group:
    """A title and a table; the first ``words`` columns hold words and stand left, the rest figures and stand right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return Group(title, table, "")


def render(*parts: RenderableType) -> str:
    """Plain text without colour codes; lines have no blanks at their ends."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


# --- A plan and its estimate


def plan_text(planned: Planned, cluster: Cluster) -> str:
    """The plan, what each rank holds and sends, and the estimate in parts."""
    plan, estimate, program = planned.plan, planned.estimate, planned.linked.program
    parts: list[RenderableType] = [_head(estimate, cluster), _stage_table(estimate), _segment_table(planned)]
    if cluster.network is not None and len(cluster.network.regions) > 1:
        parts.append(_placement_table(plan, cluster.network))
    if any(mesh.tp > 1 for mesh in plan.meshes):
        parts.append(_parameter_table(program))
    if program.num_devices > 1:
        parts.append(_communication_table(program))
    return render(*parts, _time_table(estimate.breakdown), _memory_table(estimate), _foot(estimate))


def estimate_text(estimate: Estimate, cluster: Cluster) -> str:
    """Time and memory in parts."""
    tables = (_stage_table(estimate), _time_table(estimate.breakdown), _memory_table(estimate))
    return render(_head(estimate, cluster) + _recompute_text(estimate.plan), *tables, _foot(estimate))


def estimate_tree(estimate: Estimate) -> dict[str, Any]:
    """The estimate as JSON holds it: seconds, bytes, and the whole plan; a gap that is not finite is null."""
    stages = [{**asdict(stage), "peak_bytes": stage.peak_bytes} for stage in estimate.stages]
    return {
        "step_time_s": estimate.step_time_s,
        "peak_bytes": estimate.peak_bytes,
        "breakdown": asdict(estimate.breakdown),
        "stages": stages,
        "search_s": estimate.search_s,
        "gap": estimate.gap if math.isfinite(estimate.gap) else None,
        "notes": list(estimate.notes),
        "plan": asdict(estimate.plan),
    }


def cluster_text(cluster: Cluster) -> str:
    """ "16 x a100-sxm-80gb (dgx-a100-80gb)"."""
    kinds = Counter(device.name for device in cluster.devices)
    return f"{' + '.join(f'{count} x {name}' for name, count in kinds.items())} ({cluster.name})"


def _head(estimate: Estimate, cluster: Cluster) -> str:
    plan = estimate.plan
    share = percent_text(estimate.peak_bytes / plan.memory_cap_bytes)
    return (
        f"autopar plan for {cluster_text(cluster)}\n"
        f"{str(plan).splitlines()[0]}\n"
        f"estimated step {seconds_text(estimate.step_time_s)}, peak memory {bytes_text(estimate.peak_bytes)} "
        f"a device ({share} of the cap of {bytes_text(plan.memory_cap_bytes)})\n"
    )


def _foot(estimate: Estimate) -> str:
    """How the plan was found, then every note."""
    lines = [f"Planned in {seconds_text(estimate.search_s)}; {gap_text(estimate.gap)}"]
    return "\n".join([*lines, *(f"note: {note}" for note in estimate.notes)])


def gap_text(gap: float) -> str:
    """What the search proved of a plan."""
    if not math.isfinite(gap):
        return "how far its price is from the best is not known"
    if gap < 1e-6:
        return "no plan that was searched for has a lower price than the one found"
    return f"the price of the plan found is at most {max(gap, 1e-4):.2%} above a proven lower bound"


def _recompute_text(plan: Plan) -> str:
    """Which segments are recomputed how, a line for each level; nothing where all are alike."""
    if plan.recompute != "mixed":
        return ""
    levels = {index: level for stage in plan.stages for index, level in stage.recompute_levels.items()}
    kinds = [level for level in RECOMPUTES if level in levels.values()]
    labels = {kind: [plan.segment_labels[i] for i, level in sorted(levels.items()) if level == kind] for kind in kinds}
    return "".join(f"recompute {kind}: {folded(found)}\n" for kind, found in labels.items())


def _stage_table(estimate: Estimate) -> Group:
    columns = ("stage", "segments", "forward", "backward", "reduction", "optimizer", "peak")
    rows = [_stage_row(estimate.plan, stage) for stage in estimate.stages]
    return make_table("Stages (forward and backward: one microbatch)", columns, rows, words=2)


def _stage_row(plan: Plan, stage: StageEstimate) -> tuple[str, ...]:
    times = (stage.forward_s, stage.backward_s, stage.reduce_s, stage.optimizer_s)
    return (str(stage.stage), plan.labels_text(stage.stage), *map(seconds_text, times), bytes_text(stage.peak_bytes))


def _time_table(breakdown: TimeBreakdown) -> Group:
    rows = [(name, getattr(breakdown, field)) for name, field in _TIME_PARTS]
    rows = [(name, seconds) for name, seconds in rows if seconds > 0] + [("step", breakdown.total_s)]
    total = breakdown.total_s or 1.0
    cells = [(name, seconds_text(seconds), percent_text(seconds / total)) for name, seconds in rows]
    return make_table("Step time on the rank that finishes last", ("part", "time", "share"), cells)


def _memory_table(estimate: Estimate) -> Group:
    columns = ("stage", "params", "grads", "optimizer", "inputs", "saved", "transient", "rounding", "peak")
    rows = []
    for stage in estimate.stages:
        sizes = [getattr(stage.memory, part) for part in _MEMORY_PARTS]
        rows.append((str(stage.stage), *(f"{size / _MIB:,.1f}" for size in (*sizes, stage.peak_bytes))))
    return make_table("Memory of each device at its peak, in MiB", columns, rows)


# --- What each rank holds


def _segment_table(planned: Planned) -> Group:
    """What each segment does to save memory, and which of its parameters are split; neighbours alike in one row."""
    plan, segments = planned.plan, planned.job.traced.segments
    rows = []
    for number, part in enumerate(plan.stages):
        for index in range(part.first_segment, part.last_segment):
            own, level = segments[index].parameters, part.recompute_levels.get(index, "none")
            words = (_split_text(own, part.choices), _zero_text(own, part.choices), level)
            rows.append((f"{number % plan.pp}", plan.segment_labels[index], words))
    cells = []
    for (stage, words), same in groupby(rows, key=lambda row: (row[0], row[2])):
        cells.append((stage, folded([label for _, label, _ in same]), *words))
    columns = ("stage", "segments", "parameters over tp", "ZeRO", "recompute")
    return make_table("Choices of each segment", columns, cells, words=len(columns))


def _split_text(parameters: Sequence[str], choices: Mapping[str, str]) -> str:
    """ "whole", "4 of 12 split"."""
    split = sum(bool(split_axes(parse_placements(choices.get(input_key(name), "R")))) for name in parameters)
    return f"{split} of {len(parameters)} split" if split else "whole"


def _zero_text(parameters: Sequence[str], choices: Mapping[str, str]) -> str:
    """The level of all parameters, "0 (8), 3 (4)" where they differ."""
    levels = sorted(Counter(choices.get(zero_key(name), "0") for name in parameters).items())
    return levels[0][0] if len(levels) == 1 else ", ".join(f"{level} ({count})" for level, count in levels)


def _placement_table(plan: Plan, network: Network) -> Group:
    """Of each region: the replicas of every stage that are there."""
    ends = np.cumsum([mesh.size for mesh in plan.meshes])[:-1]
    found: dict[str, dict[tuple[int, ...], list[str]]] = {}
    for stage, (ranks, mesh) in enumerate(zip(np.split(np.array(plan.placement), ends), plan.meshes, strict=True)):
        replicas = ranks.reshape(mesh.dp, mesh.tp)
        for region in network.regions:
            here = tuple(
                d for d, shards in enumerate(replicas) if any(network.region(int(s)) == region for s in shards)
            )
            if here:
                found.setdefault(region, {}).setdefault(here, []).append(str(stage))
    rows = [
        (region, folded(stages), folded([str(replica) for replica in here]))
        for region, own in found.items()
        for here, stages in own.items()
    ]
    return make_table("Placement", ("region", "stages", "replicas"), rows, words=3)


def _parameter_table(program: Program) -> Group:
    """Split parameters by name, equal blocks folded; the whole ones in one row for each way of reducing them."""
    shards = {shard.name: shard for stage in program.stages for shard in stage.parameters}
    groups: dict[tuple[object, ...], list[ParameterShard]] = {}
    for shard in shards.values():
        groups.setdefault(_parameter_group(shard), []).append(shard)
    rows = [_parameter_row(group) for group in sorted(groups.values(), key=_is_whole)]
    return make_table("Parameters on the tp axis", ("parameter", "on each rank", "shape there"), rows, words=3)


def _parameter_group(shard: ParameterShard) -> tuple[object, ...]:
    places = parse_placements(shard.placement)
    if not split_axes(places):
        return places
    parts = split_number(shard.name)
    pattern = (shard.name, "") if parts is None else (parts[0], parts[2])
    return (pattern, places, shard.meta)


def _is_whole(group: Sequence[ParameterShard]) -> bool:
    return not split_axes(parse_placements(group[0].placement))


def _parameter_row(group: Sequence[ParameterShard]) -> tuple[str, str, str]:
    places = parse_placements(group[0].placement)
    if not split_axes(places):
        return f"{len(group)} others", places_text(places), ""
    names = sorted((split_number(shard.name) or (shard.name, 0, ""))[1:] + (shard.name,) for shard in group)
    return folded([name[-1] for name in names]), places_text(places), " x ".join(map(str, group[0].meta.shape))


def places_text(places: Placements) -> str:
    """Placements in words, axis by axis."""
    return "; ".join(map(placement_text, places))


def placement_text(place: Placement) -> str:
    """A placement in words."""
    match place:
        case Shard(dim, 1):
            return f"split along dim {dim}"
        case Shard(dim, outer):
            return f"split along dim {dim}, each of its {outer} parts"
        case Replicate():
            return "whole"
        case Varying():
            return "whole; its gradient is summed over tp"
    return "one term of a sum over tp"


def strategy_words(label: str) -> str:
    """What an op takes and gives, in words: "dim 0" is split along it."""
    strategy = parse_strategy(label)
    taken, given = (list(map(_place_word, side)) for side in (strategy.inputs, strategy.outputs))
    if set(taken) | set(given) <= {"whole"}:
        return "whole on every rank"
    return f"{', '.join(taken)} -> {', '.join(given)}"


def _place_word(place: Placement) -> str:
    match place:
        case Shard(dim, 1):
            return f"dim {dim}"
        case Shard(dim, outer):
            return f"dim {dim} in {outer} parts"
        case Replicate() | Varying():
            return "whole"
    return "sum"


# --- What each rank sends


def _communication_table(program: Program) -> Group:
    """Rows that several stages in a row share are written once."""
    rows = [(row, stage.stage) for stage in program.stages for row in _traffic(stage)]
    rows.sort(key=lambda item: (item[0][:4], item[1]))
    cells = []
    for row, same in groupby(rows, key=lambda item: item[0]):
        cells.append((*row[1:4], folded([f"{stage}" for _, stage in same]), f"{row[4]}", bytes_text(row[5])))
    columns = ("when", "what", "axis", "stage", "count", "bytes")
    return make_table("Communication of each rank (full tensors)", columns, cells, words=4)


_Traffic = tuple[int, str, str, str, int, int]


def _traffic(stage: StageProgram) -> list[_Traffic]:
    """(order, when, what, axis, count, bytes) of all that a rank of a stage sends."""
    blocks = {
        "each forward": [chunk.forward for chunk in stage.chunks],
        "each backward": [block for chunk in stage.chunks for block in chunk.backwards],
    }
    rows: list[_Traffic] = []
    for order, (when, own) in enumerate(blocks.items()):
        rows += _collectives(order, when, [c for block in own for c in block.collectives()])
    rows += _collectives(2, "each step", (*stage.step.collectives, *stage.step.gathers))
    sent = [chunk.sent.nbytes for chunk in stage.chunks if chunk.sent is not None]
    received = [chunk.received.nbytes for chunk in stage.chunks if chunk.received is not None]
    if sent:
        rows.append((0, "each forward", "send to the next stage", "pp", len(sent), sum(sent)))
    if received:
        rows.append((1, "each backward", "send to the stage before", "pp", len(received), sum(received)))
    return rows


def _collectives(order: int, when: str, collectives: Iterable[Collective]) -> list[_Traffic]:
    sizes: dict[tuple[str, str], list[int]] = {}
    for collective in collectives:
        sizes.setdefault((collective.kind, collective.axis), []).append(collective.nbytes)
    return [(order, when, kind, axis, len(each), sum(each)) for (kind, axis), each in sizes.items()]
