"""Every error autopar raises on purpose: a type with data and a next move."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class AutoparError(Exception):
    """Base of all errors raised on purpose; the message ends with what to do next. Pickles with its attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (type(self), self.args, dict(self.__dict__))


def _remade(kind: type[AutoparError], args: tuple[Any, ...], attributes: dict[str, Any]) -> AutoparError:
    """The same error in another process; its constructor, which takes other arguments, is not called again."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class ConfigError(AutoparError, ValueError):
    """A value the user wrote is wrong: a key, a unit, a name, a pin."""


class ClusterFileError(ConfigError):
    """A cluster or device file is wrong.

    Attributes: path (file), key (dotted name), line (1-based, None if unknown), nearest (suggestion or None).
    """

    def __init__(
        self, message: str, *, path: str, key: str, line: int | None = None, nearest: str | None = None
    ) -> None:
        self.path, self.key, self.line, self.nearest = path, key, line, nearest
        where = path if line is None else f"{path}:{line}"
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        super().__init__(f"{where}: {key}: {message}{hint}")


class UnknownNameError(ConfigError):
    """No entry of this name (device, cluster, op, pass ...). Attributes: kind, name, nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        self.kind, self.name, self.nearest = kind, name, (close[0] if close else None)
        hint = f"did you mean {self.nearest!r}?" if self.nearest else f"known: {', '.join(names)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class WorldSizeError(ConfigError):
    """The number of running ranks is not the cluster's. Attributes: world_size, num_devices."""

    def __init__(self, world_size: int, num_devices: int) -> None:
        self.world_size, self.num_devices = world_size, num_devices
        super().__init__(
            f"{world_size} rank(s) are running but the cluster has {num_devices} device(s); "
            f"launch with --nproc-per-node so that the total is {num_devices}, or describe a cluster of {world_size}"
        )


class ParallelismError(ConfigError):
    """Pinned degrees contradict each other, the cluster or the model."""


class UnsupportedError(AutoparError):
    """Asked for something this version cannot do; the message names what can be done instead."""


class MissingCompilerError(AutoparError):
    """What compiles kernels is not installed. Attributes: compiler (its name)."""

    def __init__(self, compiler: str, advice: str) -> None:
        self.compiler = compiler
        super().__init__(f"backend='inductor' compiles kernels with {compiler}, which is not there: {advice}")


class TraceError(AutoparError):
    """torch.export could not trace the model. Attributes: source ("file:line: code" of the user's line, or None)."""

    def __init__(self, message: str, source: str | None, advice: str | None = None) -> None:
        self.source = source
        where = f"\n  at {source}" if source else ""
        default = (
            "make that line independent of tensor values (torch.where, torch.cond), "
            "or check with torch.export.export(model, args, strict=False)"
        )
        super().__init__(f"the model cannot be traced by torch.export: {message}{where}\n  next: {advice or default}")


class RuleError(AutoparError):
    """An op cannot be sharded in the way a plan asks. Attributes: op."""

    def __init__(self, op: str, message: str) -> None:
        self.op = op
        super().__init__(f"{op}: {message}")


class BatchError(AutoparError, ValueError):
    """A batch does not fit the plan: shape, dtype, keys or divisibility."""


@dataclass(frozen=True)
class Relaxation:
    """Something given up, and what that does under the same cap.

    step_time_s: of the best plan, None where none fits; needed_bytes: a cap that would do then, None where no plan is
    possible at all.
    """

    what: str
    step_time_s: float | None
    needed_bytes: int | None

    @property
    def fits(self) -> bool:
        return self.step_time_s is not None

    def __str__(self) -> str:
        if self.step_time_s is not None:
            return f"{self.what} ({self.step_time_s:.3g} s a step)"
        return f"{self.what} (no plan)" if self.needed_bytes is None else f"{self.what} ({_size(self.needed_bytes)})"


class InfeasiblePlanError(AutoparError):
    """No plan fits under the cap, or the given plan does not (``subject`` says which).

    Attributes: cap_bytes, needed_bytes (the smallest cap that would do: one that was tried, while 4 % less was not
    enough), stage (that binds), tensors (largest first, (name, bytes)), relaxations (that were searched for).
    """

    def __init__(
        self,
        *,
        cap_bytes: int,
        needed_bytes: int,
        stage: int,
        tensors: tuple[tuple[str, int], ...],
        advice: str,
        subject: str = "no plan fits",
        relaxations: tuple[Relaxation, ...] = (),
    ) -> None:
        self.cap_bytes, self.needed_bytes, self.stage, self.tensors = cap_bytes, needed_bytes, stage, tensors
        self.advice, self.subject, self.relaxations = advice, subject, relaxations
        listed = ", ".join(f"{name} {_size(size)}" for name, size in tensors)
        super().__init__(
            f"{subject} under {_size(cap_bytes)} per device; the smallest cap that would do is "
            f"{_size(needed_bytes)} (stage {stage} binds: {listed}). Next: {advice}{_relaxed_text(relaxations)}"
        )

    def relaxed(self, relaxations: tuple[Relaxation, ...]) -> InfeasiblePlanError:
        """The same error with what would help."""
        return InfeasiblePlanError(
            cap_bytes=self.cap_bytes,
            needed_bytes=self.needed_bytes,
            stage=self.stage,
            tensors=self.tensors,
            advice=self.advice,
            subject=self.subject,
            relaxations=relaxations,
        )


def _relaxed_text(relaxations: tuple[Relaxation, ...]) -> str:
    """What fits, then what was tried in vain with the bytes that it needs."""
    fits = [str(each) for each in relaxations if each.fits]
    vain = [str(each) for each in relaxations if not each.fits]
    text = f". What fits under this cap: {', '.join(fits)}" if fits else ""
    return f"{text}. What does not: {', '.join(vain)}" if vain else text


def _size(nbytes: int) -> str:
    """Bytes as people and ``parse_bytes`` read them, rounded up to one decimal: a cap of that size suffices."""
    power = min(max(0, (nbytes.bit_length() - 1) // 10), 4)
    if power == 0:
        return f"{nbytes} B"
    return f"{-(-nbytes * 10 // 1024**power) / 10:.1f} {' KMGT'[power]}iB"


class PlanMismatchError(AutoparError):
    """A plan was made for another model, cluster, batch or version. Attributes: field, expected, found.

    difference: what is said in place of values that tell a person nothing.
    """

    def __init__(self, field: str, expected: object, found: object, difference: str = "") -> None:
        self.field, self.expected, self.found = field, expected, found
        said = difference or f"the plan's {field} is {found!r} but here it is {expected!r}"
        super().__init__(f"{said}; plan again for this {field}")


class SolverError(AutoparError):
    """No solver could be run. Attributes: tried ((solver, reason), ...)."""

    def __init__(self, tried: tuple[tuple[str, str], ...]) -> None:
        self.tried = tried
        super().__init__(
            "no ILP solver works: " + "; ".join(f"{n}: {why}" for n, why in tried) + ". Next: pip install highspy"
        )


class ProblemSizeError(UnsupportedError):
    """The flat integer program is too large to be solved. Attributes: variables, most_variables."""

    def __init__(self, variables: int, most_variables: int, mesh: str) -> None:
        self.variables, self.most_variables = variables, most_variables
        super().__init__(
            f"the flat program of {mesh} would have {variables:,} variables, more than the {most_variables:,} that "
            "solver='flat' takes; use the default solver, pin degrees and microbatch_size, or plan fewer layers"
        )


class VerificationError(AutoparError):
    """A pass broke an invariant: a bug of autopar, never of the user. Attributes: check."""

    def __init__(self, check: str, message: str) -> None:
        self.check = check
        super().__init__(f"internal check {check!r} failed: {message}. Next: please report this with the model's code")


class WorkerError(AutoparError):
    """A rank died or raised. Attributes: rank, worker_traceback, exit_code (None while it still ran)."""

    def __init__(self, rank: int, message: str, *, worker_traceback: str = "", exit_code: int | None = None) -> None:
        self.rank, self.worker_traceback, self.exit_code = rank, worker_traceback, exit_code
        tail = f"\n--- rank {rank} ---\n{worker_traceback.rstrip()}" if worker_traceback else ""
        super().__init__(f"rank {rank} {message}{tail}")


class NonFiniteLossError(AutoparError):
    """The loss is NaN or infinite. Attributes: step (updates before it), loss."""

    def __init__(self, step: int, loss: float) -> None:
        self.step, self.loss = step, loss
        super().__init__(
            f"the loss is {loss} after {step} update(s), and gradients from it are worth nothing: load the last "
            "checkpoint, and lower the learning rate, clip gradients (max_grad_norm), or look at the batch"
        )


class CollectiveTimeoutError(AutoparError):
    """A rank waited too long for another.

    Attributes: rank (that waited), timeout_s (None: torch's default), peer (that it waited for; None where it was one
    of several in a collective).
    """

    def __init__(self, rank: int, timeout_s: float | None, peer: int | None = None) -> None:
        self.rank, self.timeout_s, self.peer = rank, timeout_s, peer
        waited = "too long" if timeout_s is None else f"{timeout_s:g} s"
        other = "another rank" if peer is None else f"rank {peer}"
        super().__init__(
            f"rank {rank} waited {waited} for {other}, which is stuck, far behind, cut off, or not in this step; "
            "look at what the other ranks do and at the link between them, or compile with a longer timeout_s"
        )


class LostRankError(AutoparError):
    """A rank that this one exchanges tensors with has ended.

    Attributes: rank (that is left), peer (that has ended; None where it was one of several in a collective).
    """

    def __init__(self, rank: int, peer: int | None = None) -> None:
        self.rank, self.peer = rank, peer
        other = "another rank" if peer is None else f"rank {peer}"
        super().__init__(
            f"rank {rank} has lost {other}, which has ended or is cut off: what that rank said last is the cause; "
            "start the job again (torchrun --max-restarts does) and go on from the last checkpoint (exe.load)"
        )


class CheckpointError(AutoparError):
    """A checkpoint is missing, incomplete, or of another model or optimizer. Attributes: path."""

    def __init__(self, path: str, message: str) -> None:
        self.path = path
        super().__init__(f"checkpoint {path}: {message}")


class WeightsError(AutoparError):
    """A file of weights cannot be read or is of another model. Attributes: path, names (of tensors)."""

    def __init__(self, path: str, message: str, names: tuple[str, ...] = ()) -> None:
        self.path, self.names = path, names
        super().__init__(f"weights {path}: {message}")


class ClosedError(AutoparError):
    """The executable was closed, or its workers are gone after an earlier error; compile again."""
