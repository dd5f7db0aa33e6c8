"""The command line, thin over the library: autopar estimate | plan | compare | explain MODEL, profile, coverage."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, cast

import tyro
from tyro.conf import arg, subcommand

import autopar
from cost_model.errors import AutoparError, ConfigError, UnknownNameError
from cost_model.mesh import Degree
from cost_model.plan import Parallelism, Plan
from cost_model.precision import Precision

USAGE, INTERRUPTED = 2, 130
LOCAL = "local"
_MODEL_FORMS = "MODEL is path.py:factory or package.module:factory, and factory() returns (model, inputs)"


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
    pp: Annotated[int | None, arg(metavar="N", help="pin the number of pipeline stages")] = None
    microbatch_size: Annotated[int | None, arg(metavar="N", help="pin the samples of a microbatch")] = None
    zero: Annotated[int | None, arg(metavar="LEVEL", help="pin the ZeRO level, 0 to 3")] = None
    recompute: Annotated[str | None, arg(metavar="LEVEL", help="pin recompute: none, selective or full")] = None
    schedule: Annotated[str | None, arg(metavar="S", help="pin the schedule: 1f1b or gpipe")] = None
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
    """What a plan is bound by, and the best plans of other kinds; nothing is run."""


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
    | Annotated[ProfileCommand, subcommand("profile")]
    | Annotated[Coverage, subcommand("coverage")]
)

AnyCommand = Command | ProfileCommand | Coverage


def _parse(argv: Sequence[str]) -> AnyCommand:
    """The command; SystemExit (0 for help, 2 for a wrong line) as tyro raises it."""
    parsed = tyro.cli(
        cast(Any, _COMMANDS), args=argv, prog="autopar", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    return cast(AnyCommand, parsed)


# --- The user's model


@dataclass(frozen=True)
class Loaded:
    """What a factory returned."""

    model: Any
    inputs: Any
    loss_fn: Callable[[Any, Any], Any] | None


@contextlib.contextmanager
def loaded(spec: str) -> Iterator[Loaded]:
    """The model that MODEL names; meanwhile its folder is importable, as for a script.

    Errors: ConfigError; what the user's own code raises is passed on as it is.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(f"cannot read {spec!r}; {_MODEL_FORMS}")
    is_file = place.endswith(".py") or os.sep in place
    path = Path(place)
    if is_file and not path.is_file():
        raise ConfigError(f"there is no file {place!r}; {_MODEL_FORMS}")
    with _importable(path.resolve().parent if is_file else Path.cwd()):
        module = _run_file(path) if is_file else _import(place)
        yield _made(spec, _factory(module, name))


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The folder first in ``sys.path``, and out of it again."""
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _run_file(path: Path) -> ModuleType:
    name = path.stem if path.stem not in sys.modules else f"autopar_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{str(path)!r} is no Python file; {_MODEL_FORMS}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> ModuleType:
    """Errors: ConfigError where the module itself is missing, not one that it imports."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"there is no module {error.name!r} (from {Path.cwd()}); {_MODEL_FORMS}") from error


def _factory(module: ModuleType, name: str) -> Callable[[], Any]:
    if not hasattr(module, name):
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and callable(v)]
        raise UnknownNameError(f"factory of {module.__name__}", name, own)
    factory = getattr(module, name)
    if not callable(factory):
        raise ConfigError(f"{name!r} of {module.__name__} is {type(factory).__name__}, not a function; {_MODEL_FORMS}")
    return cast(Callable[[], Any], factory)


def _made(spec: str, factory: Callable[[], Any]) -> Loaded:
    """Call the factory and check what it returns. Errors: ConfigError."""
    from torch import nn

    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ConfigError(f"{spec} must take no arguments ({error}); {_MODEL_FORMS}") from error
    found = factory()
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        size = f" of {len(found)}" if isinstance(found, tuple) else ""
        raise ConfigError(f"{spec} returned {type(found).__name__}{size}; return (model, inputs) or (..., loss_fn)")
    model, inputs, loss_fn = (*found, None)[:3]
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{spec} returned {type(model).__name__} as its model; return a torch.nn.Module first")
    if not isinstance(inputs, dict | tuple):
        raise ConfigError(f"{spec} returned {type(inputs).__name__} as its inputs; return a dict or a tuple of tensors")
    return Loaded(model, inputs, loss_fn)


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
    pins = ("pp", "microbatch_size", "schedule", "window", "zero", "recompute")
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

    assert isinstance(command, Compare)
    if cluster.backend == "nccl" and torch.cuda.device_count() == 0:
        raise ConfigError(f"{cluster.name} has CUDA devices and this machine has none; use --cluster local here")
    with autopar.compile(user.model, cluster, user.inputs, **keywords) as exe:
        found = autopar.compare(exe, user.inputs, command.steps)
        return Answer(found.summary(), {**found.as_dict(), "notes": list(exe.notes)}, exe.plan)


def _explain(command: Command, cluster: autopar.Cluster, user: Loaded, keywords: dict[str, Any]) -> Answer:
    found = autopar.explain(user.model, cluster, user.inputs, **keywords)
    return Answer(found.summary(), found.as_dict(), found.chosen.plan)


def _profile(command: ProfileCommand) -> Answer:
    from autopar.profile import profile

    found = profile(command.num_devices, command.save)
    return Answer(found.summary(), found.as_dict(), None)


_Run = Callable[[Command, autopar.Cluster, Loaded, dict[str, Any]], Answer]
_RUNS: dict[type[Command], _Run] = {Estimate: _estimate, PlanCommand: _plan, Compare: _compare, Explain: _explain}


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
