"""The command line, thin over the library: estimate | plan | compare | explain | size MODEL, profile, coverage."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro
from tyro.conf import arg, subcommand

import autopar
from autopar.user_model import Loaded, loaded, located, made
from cost_model.errors import AutoparError, ConfigError
from cost_model.mesh import Degree
from cost_model.parallelism import Parallelism
from cost_model.plan import Plan
from cost_model.precision import Precision

if TYPE_CHECKING:
    from autopar.sizing import Answer as SizeAnswer

USAGE, INTERRUPTED = 2, 130
LOCAL = "local"


# --- Arguments


@dataclass(frozen=True)
class Command:
    """What every command takes; None leaves a choice to the planner."""

    model: Annotated[
        tyro.conf.Positional[str],
        arg(metavar="MODEL", help="path.py:factory or package.module:factory; factory() returns (model, inputs)"),
    ]
    cluster: Annotated[str, arg(metavar="C", help="a shipped cluster, a TOML file, or local: this machine")]
    num_devices: Annotated[int | None, arg(metavar="N", help="devices of the cluster; ranks where it is local")] = None
    dp: Annotated[str | None, arg(metavar="N", help="pin the data-parallel degree; of each stage: 4,2")] = None
    tp: Annotated[str | None, arg(metavar="N", help="pin the tensor-parallel degree; of each stage: 2,4")] = None
    tp_axes: Annotated[tuple[int, ...] | None, arg(metavar="N N", help="pin the axes that tp consists of")] = None
    pp: Annotated[int | None, arg(metavar="N", help="pin the number of pipeline stages")] = None
    microbatch_size: Annotated[int | None, arg(metavar="N", help="pin the samples of a microbatch")] = None
    zero: Annotated[int | None, arg(metavar="LEVEL", help="pin the ZeRO level, 0 to 3")] = None
    recompute: Annotated[str | None, arg(metavar="LEVEL", help="pin recompute: none, selective or full")] = None
    schedule: Annotated[
        str | None, arg(metavar="S", help="pin the schedule: gpipe, 1f1b, interleaved or zero_bubble")
    ] = None
    window: Annotated[int | None, arg(metavar="N", help="pin how far 1f1b runs ahead of transfers")] = None
    memory_cap: Annotated[str | None, arg(metavar="SIZE", help='memory of each device to use, such as "30GiB"')] = None
    precision: Annotated[
        str | None, arg(metavar="P", help="bf16 or fp16 with fp32 masters, or fields: params=bf16,reduce=bf16")
    ] = None
    solver: Annotated[str, arg(metavar="S", help="columns, or flat: one integer program, exact, for small graphs")] = (
        "columns"
    )
    backend: Annotated[
        str, arg(metavar="B", help="eager, or inductor: neighbouring ops that move memory compiled into kernels")
    ] = "eager"
    plan: Annotated[Path | None, arg(metavar="FILE", help="use the plan of this file instead of a search")] = None
    save: Annotated[Path | None, arg(metavar="FILE", help="write the plan to this file")] = None
    json: Annotated[bool, arg(help="print JSON and nothing else on standard output")] = False


@dataclass(frozen=True)
class Estimate(Command):
    """Step time and memory of the best plan; nothing is run."""


@dataclass(frozen=True)
class PlanCommand(Command):
    """The best plan: stages, what each rank holds and sends, and its estimate; nothing is run."""

    write_lp: Annotated[
        Path | None, arg(metavar="FILE", help="write the integer program that chose the plan, in LP format")
    ] = None


@dataclass(frozen=True)
class Compare(Command):
    """Train a few steps on the cluster and lay what is measured beside the estimate."""

    steps: Annotated[int, arg(metavar="N", help="timed steps")] = 10


@dataclass(frozen=True)
class Explain(Command):
    """What a plan is bound by, the best plans of other kinds, step time against memory; nothing is run."""

    points: Annotated[int, arg(metavar="N", help="memory caps of the curve of step time; 0: no curve")] = 6
    plot: Annotated[Path | None, arg(metavar="FILE", help="draw the curve (needs matplotlib)")] = None
    why: Annotated[
        tuple[str, ...], arg(metavar="OP", help="ops, or parameters or modules whose op's placement is to be explained")
    ] = ()


@dataclass(frozen=True)
class SizeNodes(Command):
    """The smallest number of nodes on which the model trains; --num-devices does not count."""

    most_nodes: Annotated[int, arg(metavar="N", help="where to give up")] = 1024


@dataclass(frozen=True)
class SizeModel(Command):
    """The largest model of a family that trains: MODEL's factory takes the number as a keyword."""

    scale: Annotated[str, arg(metavar="KEYWORD", help="of the factory: layers, width, ...")] = "layers"
    start: Annotated[int, arg(metavar="N", help="the smallest number")] = 1
    step: Annotated[int, arg(metavar="N", help="numbers are start + k x step")] = 1
    most: Annotated[int, arg(metavar="N", help="the largest number")] = 2**20


_TokensPerStep = Annotated[
    int | None, arg(metavar="N", help="of the global batch; default: elements of its first input of whole numbers")
]


@dataclass(frozen=True)
class SizeDays(Command):
    """Days to train on --tokens."""

    tokens: Annotated[float, arg(metavar="N", help="such as 300e9")] = field(kw_only=True)
    tokens_per_step: _TokensPerStep = None


@dataclass(frozen=True)
class SizeCost(Command):
    """What a token costs at --price, and --tokens if given."""

    price: Annotated[float, arg(metavar="P", help="of a device for an hour, in any currency")] = field(kw_only=True)
    tokens: Annotated[float | None, arg(metavar="N", help="such as 300e9")] = None
    tokens_per_step: _TokensPerStep = None


_Question = (
    Annotated[SizeNodes, subcommand("nodes", prefix_name=False)]
    | Annotated[SizeModel, subcommand("model", prefix_name=False)]
    | Annotated[SizeDays, subcommand("days", prefix_name=False)]
    | Annotated[SizeCost, subcommand("cost", prefix_name=False)]
)


@dataclass(frozen=True)
class Size:
    """Questions of capacity, answered by planning: nodes, model, days, cost; nothing is run."""

    question: Annotated[_Question, arg(name="")]


@dataclass(frozen=True)
class ProfileCommand:
    """Measure this machine's ranks and links, all at once; the result is kept and --cluster local uses it."""

    num_devices: Annotated[int, arg(metavar="N", help="ranks to measure at the same time")]
    save: Annotated[Path | None, arg(metavar="FILE", help="write the measured cluster to this TOML file too")] = None
    json: Annotated[bool, arg(help="print JSON and nothing else on standard output")] = False


@dataclass(frozen=True)
class Coverage:
    """Every op that may be split, with its factor map on an example call."""

    json: Annotated[bool, arg(help="print JSON and nothing else on standard output")] = False


_COMMANDS = (
    Annotated[Estimate, subcommand("estimate")]
    | Annotated[PlanCommand, subcommand("plan")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Explain, subcommand("explain")]
    | Annotated[Size, subcommand("size")]
    | Annotated[ProfileCommand, subcommand("profile")]
    | Annotated[Coverage, subcommand("coverage")]
)

AnyCommand = Command | ProfileCommand | Coverage


def _parse(argv: Sequence[str]) -> AnyCommand:
    """The command; SystemExit (0 for help, 2 for a wrong line) as tyro raises it."""
    parsed = tyro.cli(
        cast(Any, _COMMANDS), args=argv, prog="autopar", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    return cast(AnyCommand, parsed.question if isinstance(parsed, Size) else parsed)


# --- Commands


@dataclass(frozen=True)
class Answer:
    """text for people, tree for JSON, and the plan that --save writes, if there is one."""

    text: str
    tree: dict[str, Any]
    plan: Plan | None


def run(command: AnyCommand) -> Answer:
    """Do what a command asks. Errors: every AutoparError."""
    if isinstance(command, Coverage):
        return _coverage()
    if command.save is not None and not command.save.absolute().parent.is_dir():
        raise ConfigError(f"cannot save to {str(command.save)!r}: its folder does not exist; make it first")
    if isinstance(command, ProfileCommand):
        return _profile(command)
    keywords = _keywords(command)
    cluster = _cluster(command)
    if isinstance(command, SizeModel):
        return _size_model(command, cluster, keywords)
    with loaded(command.model) as user:
        answer = _RUNS[type(command)](command, cluster, user, {**keywords, "loss_fn": user.loss_fn})
    if command.save is not None and answer.plan is not None:
        _save(answer.plan, command.save)
    return answer


def _coverage() -> Answer:
    from autopar.coverage import coverage_text, coverage_tree

    return Answer(coverage_text(), coverage_tree(), None)


def _keywords(command: Command) -> dict[str, Any]:
    """The keywords of autopar.compile that the line gives."""
    pins = ("pp", "tp_axes", "microbatch_size", "schedule", "window", "zero", "recompute")
    degrees = _degree("dp", command.dp), _degree("tp", command.tp)
    parallelism = Parallelism(*degrees, **{name: getattr(command, name) for name in pins})
    plan = None if command.plan is None else Plan.load(command.plan)
    precision = None if command.precision is None else Precision.parse(command.precision)
    keywords: dict[str, Any] = {
        "parallelism": parallelism,
        "memory_cap": command.memory_cap,
        "precision": precision,
        "plan": plan,
    }
    if isinstance(command, PlanCommand):
        keywords["write_lp"] = command.write_lp
    return {**keywords, "solver": command.solver, "backend": command.backend}


def _degree(name: str, text: str | None) -> Degree | None:
    """ "4", or of each stage "2,4". Errors: ConfigError."""
    try:
        numbers = () if text is None else tuple(map(int, text.split(",")))
    except ValueError as error:
        raise ConfigError(f"--{name} {text}: give a number, or one for each stage, such as 2,4") from error
    return (numbers[0] if len(numbers) == 1 else numbers) if numbers else None


def _save(plan: Plan, path: Path) -> None:
    try:
        plan.save(path)
    except OSError as error:
        raise ConfigError(f"cannot save to {str(path)!r}: {error.strerror}; choose another file") from error


def _cluster(command: Command) -> autopar.Cluster:
    if command.cluster != LOCAL:
        return autopar.Cluster.load(command.cluster, command.num_devices)
    if command.num_devices is None:
        raise ConfigError("--cluster local needs the number of ranks; add --num-devices 2")
    return autopar.Cluster.local(command.num_devices)


def _estimate(command: Command, cluster: autopar.Cluster, user: Loaded, keywords: dict[str, Any]) -> Answer:
    from autopar.report import estimate_text, estimate_tree

    found = autopar.estimate(user.model, cluster, user.inputs, **keywords)
    return Answer(estimate_text(found, cluster), estimate_tree(found), found.plan)


def _plan(command: Command, cluster: autopar.Cluster, user: Loaded, keywords: dict[str, Any]) -> Answer:
    from autopar.report import estimate_tree

    with autopar.compile(user.model, cluster, user.inputs, **keywords) as exe:
        return Answer(exe.summary(), estimate_tree(exe.estimate), exe.plan)


def _compare(command: Command, cluster: autopar.Cluster, user: Loaded, keywords: dict[str, Any]) -> Answer:
    import torch

    from autopar.comparison import check_steps

    assert isinstance(command, Compare)
    check_steps(command.steps)
    if cluster.backend == "nccl" and torch.cuda.device_count() == 0:
        raise ConfigError(f"{cluster.name} has CUDA devices and this machine has none; use --cluster local here")
    with autopar.compile(user.model, cluster, user.inputs, **keywords) as exe:
        found = autopar.compare(exe, user.inputs, command.steps)
        return Answer(found.summary(), {**found.as_dict(), "notes": list(exe.notes)}, exe.plan)


def _explain(command: Command, cluster: autopar.Cluster, user: Loaded, keywords: dict[str, Any]) -> Answer:
    assert isinstance(command, Explain)
    found = autopar.explain(user.model, cluster, user.inputs, points=command.points, why=command.why, **keywords)
    if command.plot is not None:
        found.plot(command.plot)
    return Answer(found.summary(), found.as_dict(), found.chosen.plan)


def _size_nodes(command: Command, cluster: autopar.Cluster, user: Loaded, keywords: dict[str, Any]) -> Answer:
    assert isinstance(command, SizeNodes)
    found = autopar.size_nodes(user.model, cluster, user.inputs, most_nodes=command.most_nodes, **keywords)
    return _sized(found)


def _size_days(command: Command, cluster: autopar.Cluster, user: Loaded, keywords: dict[str, Any]) -> Answer:
    assert isinstance(command, SizeDays)
    tokens, per_step = command.tokens, command.tokens_per_step
    found = autopar.size_days(user.model, cluster, user.inputs, tokens=tokens, tokens_per_step=per_step, **keywords)
    return _sized(found)


def _size_cost(command: Command, cluster: autopar.Cluster, user: Loaded, keywords: dict[str, Any]) -> Answer:
    assert isinstance(command, SizeCost)
    found = autopar.size_cost(
        user.model,
        cluster,
        user.inputs,
        price_per_device_hour=command.price,
        tokens=command.tokens,
        tokens_per_step=command.tokens_per_step,
        **keywords,
    )
    return _sized(found)


def _size_model(command: SizeModel, cluster: autopar.Cluster, keywords: dict[str, Any]) -> Answer:
    with located(command.model) as factory:

        def family(**scale: int) -> tuple[Any, Any, Any]:
            user = made(command.model, factory, **scale)
            return user.model, user.inputs, user.loss_fn

        scale, start, step, most = command.scale, command.start, command.step, command.most
        found = autopar.size_model(family, cluster, scale=scale, start=start, step=step, most=most, **keywords)
        return _sized(found)


def _sized(found: SizeAnswer) -> Answer:
    return Answer(found.summary(), found.as_dict(), None if found.estimate is None else found.estimate.plan)


def _profile(command: ProfileCommand) -> Answer:
    from autopar.profile import profile

    found = profile(command.num_devices, command.save)
    return Answer(found.summary(), found.as_dict(), None)


_Run = Callable[[Command, autopar.Cluster, Loaded, dict[str, Any]], Answer]
_RUNS: dict[type[Command], _Run] = {
    Estimate: _estimate,
    PlanCommand: _plan,
    Compare: _compare,
    Explain: _explain,
    SizeNodes: _size_nodes,
    SizeDays: _size_days,
    SizeCost: _size_cost,
}


# --- The process


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for an error of the user's making, 130 when interrupted."""
    line = list(sys.argv[1:] if argv is None else argv)
    try:
        command = _parsed_with_json(line) if "--json" in line else _parse(line)
    except SystemExit as end:
        return int(end.code or 0)
    try:
        with contextlib.redirect_stdout(sys.stderr) if command.json else contextlib.nullcontext():
            answer = run(command)
    except AutoparError as error:
        return _failed(type(error).__name__, str(error), as_json=command.json)
    except KeyboardInterrupt:
        return INTERRUPTED
    if os.environ.get("RANK", "0") == "0":
        _show(json.dumps(answer.tree, indent=1) if command.json else answer.text.rstrip("\n"))
    return 0


def _show(text: str) -> None:
    """Print; a reader that has gone away (a pager, ``head``) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter fails at exit


def _parsed_with_json(line: Sequence[str]) -> AnyCommand:
    """As ``_parse``, with a wrong line reported on standard output too."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _parse(line)
    except SystemExit as end:
        if end.code:
            _failed("UsageError", said.getvalue().strip(), as_json=True)
        raise


def _failed(kind: str, message: str, *, as_json: bool) -> int:
    print(f"autopar: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": kind, "message": message}))
    return USAGE


if __name__ == "__main__":
    sys.exit(main())
