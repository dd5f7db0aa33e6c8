"""What a user may pin (``Parallelism``) and what the planner decided (``Plan``)."""

from __future__ import annotations

import itertools
import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from cost_model.axes import Axes
from cost_model.collectives import Link
from cost_model.errors import ConfigError, PlanMismatchError, UnknownNameError
from cost_model.labels import folded
from cost_model.mesh import Degree, Mesh, meshes_of, of_stages
from cost_model.parallelism import RECOMPUTES, SCHEDULES, is_count
from cost_model.precision import Precision

SCHEMA_VERSION = 7
OLDER_VERSIONS = (2, 3, 4, 5, 6)
"""That can be read too: a field that such a version lacks has a default, which means what that version did."""


@dataclass(frozen=True)
class StagePlan:
    """One part of the chain, the half-open range of segments that a stage (or one of its virtual stages) runs.

    choices: on the tp axes, axis by axis with " | " between, the strategy of each op ("op:<node>"), the placement of
    each parameter and of the activation that comes in ("input:<node>") and the second form of a tensor with several
    users ("form:<node>"; of a shared parameter that of one segment, where it is another, "form.<node>:<a call of it>");
    on the dp axis the ZeRO level of each parameter ("zero:<node>", "1" to "3"; 0 is not written).
    recompute: the level of each segment, in order; empty where none recomputes.
    """

    first_segment: int
    last_segment: int
    choices: Mapping[str, str] = field(hash=False)
    recompute: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = self.last_segment - self.first_segment
        if self.recompute and (len(self.recompute) != count or not any(r != "none" for r in self.recompute)):
            raise ConfigError(
                f"a stage of {count} segment(s) must have as many recompute levels, not {list(self.recompute)}, "
                "and none at all where nothing is recomputed"
            )
        for level in self.recompute:
            if level not in RECOMPUTES:
                raise UnknownNameError("recompute", level, RECOMPUTES)

    @property
    def recompute_levels(self) -> dict[int, str]:
        """Segment -> level, of those that recompute."""
        levels = enumerate(self.recompute, self.first_segment)
        return {segment: level for segment, level in levels if level != "none"}


@dataclass(frozen=True)
class Plan:
    """All choices. Equal input gives a byte-identical file.

    stages: the parts of the chain in order, ``virtual_stages`` for each pipeline stage: part k runs on stage k % pp.
    dp, tp: one number for all pipeline stages, or one for each. batch: global batch size in samples; microbatches: per
    data-parallel replica; microbatch_size: samples of one on each replica (of the first stage, see ``samples``).
    fingerprints tie the plan to a model graph and a cluster. precision: what the model's graph was cast to.
    window, overlap, dp_inner: as in ``Parallelism``; dp_inner is 1 where gradients of all replicas are summed as one.
    axes: those that tp consists of, None where it is one.
    """

    model: str
    cluster: str
    batch: int
    dp: Degree
    tp: Degree
    pp: int
    schedule: str
    microbatch_size: int
    microbatches: int
    memory_cap_bytes: int
    placement: tuple[int, ...]
    stages: tuple[StagePlan, ...]
    segment_labels: tuple[str, ...]
    precision: Precision = Precision()
    virtual_stages: int = 1
    window: int = 1
    overlap: bool = False
    axes: Axes | None = None
    dp_inner: int = 1
    version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        self._check_numbers()
        ends = [0, *(stage.last_segment for stage in self.stages)]
        joined = all(s.first_segment == e < s.last_segment for s, e in zip(self.stages, ends, strict=False))
        count = self.pp * self.virtual_stages
        if len(self.stages) != count or ends[-1] != len(self.segment_labels) or not joined:
            raise ConfigError(
                f"a plan's {count} stage(s) must cover its {len(self.segment_labels)} segment(s) in order, "
                f"not {[(s.first_segment, s.last_segment) for s in self.stages]}"
            )

    def _check_numbers(self) -> None:
        for name in ("batch", "pp", "microbatch_size", "microbatches", "virtual_stages", "window", "dp_inner"):
            if getattr(self, name) < 1:
                raise ConfigError(f"a plan's {name} must be at least 1, not {getattr(self, name)}")
        self._check_degrees()
        if self.schedule not in SCHEDULES:
            raise UnknownNameError("schedule", self.schedule, SCHEDULES)
        if self.window > 1 and self.schedule != "1f1b":
            raise ConfigError(f"a plan under {self.schedule} cannot have a window of {self.window}: only 1f1b has one")
        replicas = sorted({mesh.dp for mesh in self.meshes})
        if self.microbatch_size * self.microbatches * self.mesh(0).dp != self.batch or any(
            self.batch % (self.microbatches * dp) for dp in replicas
        ):
            raise ConfigError(
                f"a plan for a batch of {self.batch} cannot have dp={self.dp} replicas with {self.microbatches} "
                f"microbatch(es) of {self.microbatch_size}: they must multiply to the batch"
            )
        count = sum(mesh.size for mesh in self.meshes)
        if len(self.placement) != count or set(self.placement) != set(range(count)):
            raise ConfigError(f"a plan of {count} device(s) must place each of them once, not {self.placement}")
        if self.dp_inner > 1 and (self.meshes_differ or self.mesh(0).dp % self.dp_inner or self.dp_inner == self.dp):
            raise ConfigError(
                f"a plan of dp={self.dp} cannot have dp_inner={self.dp_inner}: it must divide it into several groups"
            )
        if self.precision.choices != (self.precision,):
            raise ConfigError(f"a plan says what was chosen, not precision {self.precision}")
        if self.axes is not None and (self.meshes_differ or self.axes.size != self.tp or len(self.axes.sizes) < 2):
            raise ConfigError(
                f"a plan of tp={self.tp} cannot have the axes {self.axes.sizes}: they must multiply to it"
            )

    def axes_of(self, stage: int) -> Axes:
        """The axes of one pipeline stage's shards: one where the plan names no others."""
        return self.axes or Axes.flat(self.mesh(stage).tp)

    @property
    def tp_axes(self) -> tuple[int, ...]:
        """As pinned by ``Parallelism``."""
        return self.axes_of(0).sizes

    def _check_degrees(self) -> None:
        for name in ("dp", "tp"):
            degree = getattr(self, name)
            each = degree if isinstance(degree, tuple) else (degree,) * self.pp
            if not all(map(is_count, each)):
                raise ConfigError(f"a plan's {name} must be at least 1, not {degree}")
            if len(each) != self.pp:
                raise ConfigError(f"a plan's {name} must be one number, or one for each of {self.pp} stages: {degree}")
            object.__setattr__(self, name, of_stages(each))
        if self.meshes_differ and self.virtual_stages > 1:
            raise ConfigError(f"a plan of {self.virtual_stages} virtual stages has one mesh for all stages; plan again")

    @cached_property
    def meshes(self) -> tuple[Mesh, ...]:
        """Of each pipeline stage."""
        return meshes_of(self.dp, self.tp, self.pp)

    def mesh(self, stage: int) -> Mesh:
        """Of one pipeline stage."""
        return self.meshes[stage]

    @property
    def stage_devices(self) -> tuple[tuple[int, ...], ...]:
        """The devices of each pipeline stage, in the order of its mesh."""
        ends = list(itertools.accumulate((mesh.size for mesh in self.meshes), initial=0))
        return tuple(self.placement[first:last] for first, last in itertools.pairwise(ends))

    @property
    def meshes_differ(self) -> bool:
        """Whether stages have meshes of their own."""
        return isinstance(self.dp, tuple) or isinstance(self.tp, tuple)

    def samples(self, stage: int) -> int:
        """Of one microbatch on each replica of a stage."""
        return self.batch // (self.microbatches * self.mesh(stage).dp)

    @property
    def accumulates(self) -> bool:
        """Whether gradients of several microbatches, or of virtual stages that share parameters, add up."""
        return self.microbatches > 1 or self.virtual_stages > 1

    def __str__(self) -> str:
        """The mesh, the microbatches and each stage's segments; the choices inside stages are left out."""
        count = f"{self.microbatches} microbatch{'es' if self.microbatches > 1 else ''} of {self.microbatch_size}"
        how = f"{self.schedule_text()}{self.saving_text()}"
        head = f"{self.mesh_text()}, batch {self.batch}: {count} on each replica, {how}"
        if self.precision != Precision():
            head += f", precision {self.precision}"
        return "\n".join([head, *(f"stage {stage}: {self.labels_text(stage)}" for stage in range(self.pp))])

    def mesh_text(self) -> str:
        """ "dp=1 x tp=(2, 4) x pp=2", "dp=1 x tp=8 (2 x 4) x pp=2"."""
        axes = "" if self.axes is None else f" ({self.axes})"
        return f"dp={self.dp} x tp={self.tp}{axes} x pp={self.pp}"

    def schedule_text(self) -> str:
        """The schedule, with its virtual stages and its window where they are more than one."""
        parts = "" if self.virtual_stages == 1 else f" x {self.virtual_stages}"
        return f"{self.schedule}{parts}" if self.window == 1 else f"{self.schedule}{parts} in windows of {self.window}"

    def saving_text(self) -> str:
        """What is split over replicas, what is recomputed and whether collectives overlap, after a comma; empty where
        nothing is."""
        zero = "" if self.zero == 0 else f", zero {self.zero}"
        recompute = "" if self.recompute == "none" else f", recompute {self.recompute}"
        inner = "" if self.dp_inner == 1 else f", gradients summed in groups of {self.dp_inner} first"
        return f"{zero}{recompute}{', overlap' if self.overlap else ''}{inner}"

    @property
    def recompute(self) -> str:
        """The level of all segments; "mixed" where they differ."""
        levels = {level for stage in self.stages for level in stage.recompute or ("none",)}
        return levels.pop() if len(levels) == 1 else "mixed"

    @property
    def zero(self) -> int | str:
        """The ZeRO level of all parameters that are split over dp, 0 where none is; "mixed" where they differ."""
        levels = {label for s in self.stages for key, label in s.choices.items() if key.startswith("zero:")}
        return "mixed" if len(levels) > 1 else int(next(iter(levels), "0"))

    def chunks(self, stage: int) -> tuple[StagePlan, ...]:
        """The parts of the chain that a pipeline stage runs."""
        return self.stages[stage :: self.pp]

    def labels(self, stage: int) -> tuple[tuple[str, ...], ...]:
        """Names of the segments that a pipeline stage runs, in order, for each of its virtual stages."""
        return tuple(self.segment_labels[part.first_segment : part.last_segment] for part in self.chunks(stage))

    def labels_text(self, stage: int) -> str:
        """Names of the segments that a pipeline stage runs, its virtual stages apart."""
        return " | ".join(map(folded, self.labels(stage)))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Inverse of ``to_json``. Errors: PlanMismatchError for another version, ConfigError for what is no plan."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not an autopar plan: {error}; {_WRITE_ONE}") from error
        if not isinstance(raw, dict) or "version" not in raw:
            raise ConfigError(f"not an autopar plan: no 'version' field; {_WRITE_ONE}")
        if raw["version"] in OLDER_VERSIONS:
            raw = {**_defaults(), **raw, "version": SCHEMA_VERSION}
            if isinstance(raw["precision"], dict):
                raw["precision"] = {**asdict(Precision()), **raw["precision"]}
        if raw["version"] != SCHEMA_VERSION:
            raise PlanMismatchError("version", SCHEMA_VERSION, raw["version"])
        _check_fields(raw, Plan, "the plan")
        _check_fields(raw["precision"], Precision, "the plan's precision")
        for number, stage in enumerate(raw["stages"]):
            _check_fields(stage, StagePlan, f"stage {number} of the plan")
        stages = tuple(StagePlan(**{**stage, "recompute": tuple(stage["recompute"])}) for stage in raw.pop("stages"))
        labels, placement = tuple(raw.pop("segment_labels")), tuple(raw.pop("placement"))
        raw |= {name: tuple(raw[name]) for name in ("dp", "tp") if isinstance(raw[name], list)}
        precision, axes = Precision(**raw.pop("precision")), _axes(raw.pop("axes"))
        return Plan(**raw, stages=stages, segment_labels=labels, placement=placement, precision=precision, axes=axes)

    def save(self, path: str | Path) -> None:
        """Errors: ConfigError where nothing can be written."""
        try:
            Path(path).write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"cannot write the plan {str(path)!r}: {error.strerror}; name a file in a folder"
            ) from error

    @staticmethod
    def load(path: str | Path) -> Plan:
        """The plan of a file. Errors: PlanMismatchError for another version, ConfigError for what is no plan."""
        try:
            return Plan.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the plan {str(path)!r}: {error.strerror}; {_WRITE_ONE}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{str(path)!r}: not an autopar plan: {error}; {_WRITE_ONE}") from error
        except ConfigError as error:
            raise ConfigError(f"{str(path)!r}: {error}") from error


_WRITE_ONE = "write one with plan.save(path)"
_JSON_TYPES: dict[str, type | types.UnionType] = {
    "int": int,
    "Degree": int | list,
    "bool": bool,
    "str": str,
    "str | None": str | None,
    "Mapping[str, str]": dict,
    "Precision": dict,
    "Axes | None": dict | None,
}


def _axes(raw: dict[str, Any] | None) -> Axes | None:
    """Inverse of ``asdict``. Errors: ConfigError."""
    if raw is None:
        return None
    try:
        links = {name: Link(**link) for name, link in raw["links"].items()}
        mesh = Axes(tuple(raw["sizes"]), links, Link(**raw["copy"]))
        return Axes.of(mesh.sizes, lambda axes: mesh.links[mesh.name(axes)], mesh.copy)
    except (AssertionError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"the plan's axes are {raw!r}, which are none; {_WRITE_ONE}") from error


def _defaults() -> dict[str, object]:
    """Of the fields that not every version has, as JSON has them."""
    found = {f.name: f.default for f in fields(Plan) if f.default is not MISSING}
    return {name: asdict(value) if isinstance(value, Precision) else value for name, value in found.items()}


def _check_fields(raw: object, kind: type[Plan] | type[StagePlan] | type[Precision], what: str) -> None:
    """ConfigError unless ``raw`` has the fields of ``kind`` and no others, each of its JSON type."""
    known = {f.name: _JSON_TYPES.get(str(f.type), list) for f in fields(kind)}
    if not isinstance(raw, dict):
        raise ConfigError(f"{what} is {raw!r}, not an object with {', '.join(known)}; {_WRITE_ONE}")
    wrong = [f"lacks {name!r}" for name in known if name not in raw]
    wrong += [f"has the unknown field {name!r}" for name in raw if name not in known]
    for name, expected in known.items():
        if name in raw and (not isinstance(raw[name], expected) or isinstance(raw[name], bool) != (expected is bool)):
            wrong.append(f"has {name} = {raw[name]!r}, which is no {getattr(expected, '__name__', expected)}")
    if wrong:
        raise ConfigError(f"{what} {wrong[0]}; {_WRITE_ONE}")
