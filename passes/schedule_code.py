"""The two functions of a rank's program beside forward and backward: the step's schedule, and its prologue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cost_model.axes import ACROSS, DP, INSIDE
from cost_model.program import Collective
from cost_model.schedule import (
    Backward,
    Forward,
    PostBackward,
    PostForward,
    RecvBackward,
    RecvForward,
    SendBackward,
    SendForward,
    Step,
    Weight,
)
from cost_model.tensor import TensorMeta
from passes.codegen import Sources, new_names, render_function, returns_named
from passes.graph import ModelGraph
from passes.joint import trace_values
from passes.lower import Storages, lower
from passes.written import parameter_left

PROLOGUE_SIGNATURE = "batch, buffers, comm, kernels, device"
_CALLS = {
    Forward: "forward",
    Backward: "backward",
    SendForward: "send_forward",
    PostForward: "expect_forward",
    RecvForward: "receive_forward",
    SendBackward: "send_backward",
    PostBackward: "expect_backward",
    RecvBackward: "receive_backward",
    Weight: "weight",
}
_FORWARDS = (Forward, SendForward, PostForward, RecvForward)


@dataclass(frozen=True)
class Reduction:
    """Elements [start, stop) of the flat gradient buffer of a dtype, summed over an axis once per step, in the dtype
    ``reduced``; from when ``group`` is complete, where it is of one."""

    axis: str
    dtype: str
    start: int
    stop: int
    reduced: str
    group: str | None = None

    @property
    def meta(self) -> TensorMeta:
        return TensorMeta((self.stop - self.start,), self.dtype)

    @property
    def collective(self) -> Collective:
        return Collective("all_reduce", self.axis, replace(self.meta, dtype=self.reduced).nbytes)

    @property
    def casts(self) -> tuple[tuple[TensorMeta, TensorMeta], ...]:
        """(from, to): to the dtype of the sum, and back."""
        return casts_around(self.meta, self.meta, self.reduced)

    @property
    def beside_bytes(self) -> int:
        return _copied_bytes(self.casts)

    def in_groups(self, inner: int) -> tuple[SpanStep, ...] | None:
        """The same sum over replicas group by group; None where it is over others, begins early, or does not divide."""
        if inner == 1 or self.axis != DP or self.group is not None or self.casts or (self.stop - self.start) % inner:
            return None
        kinds = ("reduce_scatter", "all_reduce", "all_gather")
        return tuple(SpanStep(kind, self.dtype, self.start, self.stop, inner) for kind in kinds)

    def __str__(self) -> str:
        return f"run.reduce_gradients({self.place})"

    @property
    def place(self) -> str:
        return f'"{self.axis}", "{self.dtype}", {self.start}, {self.stop}, "{self.reduced}"'


@dataclass(frozen=True)
class SpanStep:
    """One of three steps that sum elements [start, stop) of the flat gradient buffer of a dtype over replicas: in each
    group of ``inner`` neighbours a rank sums a part ("reduce_scatter"), which is summed with those of the other groups
    ("all_reduce"), and all parts are gathered in the group ("all_gather")."""

    kind: str
    dtype: str
    start: int
    stop: int
    inner: int
    casts: tuple[tuple[TensorMeta, TensorMeta], ...] = ()
    group: None = None

    @property
    def axis(self) -> str:
        return ACROSS if self.kind == "all_reduce" else INSIDE

    @property
    def collective(self) -> Collective:
        nbytes = TensorMeta((self.stop - self.start,), self.dtype).nbytes
        return Collective(self.kind, self.axis, nbytes // self.inner if self.kind == "all_reduce" else nbytes)

    @property
    def beside_bytes(self) -> int:
        """What arrives from the others of the group."""
        nbytes = self.collective.nbytes
        return nbytes - nbytes // self.inner if self.kind == "reduce_scatter" else 0

    def __str__(self) -> str:
        return f'run.{SPAN_CALLS[self.kind]}("{self.dtype}", {self.start}, {self.stop}, {self.inner})'


@dataclass(frozen=True)
class PartStep:
    """What is done once per step with a rank's part of a bucket.

    kind: "reduce_scatter" (gradients become the part's sum), "all_reduce" (the part's gradients are summed over
    another axis), "all_gather" (parameters, from the parts of all ranks). nbytes: as in ``Collective``.
    casts: (from, to) of what is cast for it and back.
    """

    kind: str
    axis: str
    bucket: str
    nbytes: int
    casts: tuple[tuple[TensorMeta, TensorMeta], ...] = ()
    group: None = None

    @property
    def collective(self) -> Collective:
        return Collective(self.kind, self.axis, self.nbytes)

    @property
    def beside_bytes(self) -> int:
        return _copied_bytes(self.casts)

    def __str__(self) -> str:
        return f'run.{PART_CALLS[self.kind]}("{self.axis}", "{self.bucket}")'


def casts_around(before: TensorMeta, after: TensorMeta, dtype: str) -> tuple[tuple[TensorMeta, TensorMeta], ...]:
    """Of what is sent in a dtype of its own: ``before`` it is, and ``after`` it lies in the same dtype again."""
    if before.dtype == dtype:
        return ()
    return (before, replace(before, dtype=dtype)), (replace(after, dtype=dtype), after)


def _copied_bytes(casts: Sequence[tuple[TensorMeta, TensorMeta]]) -> int:
    """Of the copy that a collective works on."""
    return sum(target.nbytes for _, target in casts[:1])


SPAN_CALLS = {
    "reduce_scatter": "scatter_span",
    "all_reduce": "reduce_span",
    "all_gather": "gather_span",
}
PART_CALLS = {
    "reduce_scatter": "scatter_gradients",
    "all_reduce": "reduce_part",
    "all_gather": "gather_parameters",
}


NO_COUNTERS: Mapping[str, int | float] = {}


def render_step(
    steps: Sequence[Step],
    reductions: Sequence[Reduction | SpanStep | PartStep],
    gathers: Sequence[PartStep],
    *,
    sends: bool,
    doc: str,
    max_grad_norm: float | None = None,
    gathered: Sequence[str] = (),
    dp: int = 1,
    changed: Sequence[str] = (),
    counters: Mapping[str, int | float] = NO_COUNTERS,
    scales_loss: bool = False,
) -> str:
    """``def step(run)`` and its parts: the stage's schedule, gradient reduction, the update with the gathering of
    parameters; and the schedule's forward half alone, for evaluation.

    gathered: leaves of the batch that ``feed`` makes whole before, over dp replicas. changed: buffers that backward
    gave a new value, and what stands for new values of parameters; counters: buffers to which a number is added.
    scales_loss: an update is skipped where a gradient is not finite.
    """
    kept = [f'run.update_buffer("{name}")' for name in changed]
    left = [(name, parameter_left(name)) for name in changed]
    kept += [f'run.leave_parameter("{parameter}", "{name}")' for name, parameter in left if parameter is not None]
    kept += [f'run.count("{name}", {step})' for name, step in counters.items()]
    wait = ["run.wait_sends()"] if sends else []
    clip = [] if max_grad_norm is None else [f"run.clip_gradients({max_grad_norm!r})"]
    skip = ["if run.adjust_scale():", "    return"] if scales_loss else []
    forwards = [line for step in steps if type(step) in _FORWARDS for line in _forward_lines(step)]
    functions = {
        "complete": ("Begin to reduce a group of gradients.", _begun(reductions)),
        "feed": ("Batch inputs of all replicas.", [f'run.gather_rows("{name}", {dp})' for name in gathered]),
        "accumulate": (doc, [_line(step) for step in steps] + wait + kept),
        "reduce": ("Gradients of all ranks.", [*map(str, reductions), *(["run.unscale_gradients()"] * scales_loss)]),
        "update": ("Parameters.", [*skip, *clip, "run.update_parameters()", *map(str, gathers)]),
        "step": ("One training step.", ["accumulate(run)", "reduce(run)", "update(run)"]),
        "evaluate": ("The loss alone.", forwards + wait),
    }
    return "\n\n\n".join(_function(name, doc, lines) for name, (doc, lines) in functions.items())


def _begun(reductions: Sequence[Reduction | SpanStep | PartStep]) -> list[str]:
    early = [r for r in reductions if isinstance(r, Reduction) and r.group is not None]
    groups = dict.fromkeys(r.group for r in early)
    return [
        line
        for group in groups
        for line in (
            f'if group == "{group}":',
            *(f"    run.begin_gradients({r.place})" for r in early if r.group == group),
        )
    ]


def _function(name: str, doc: str, lines: Sequence[str]) -> str:
    parameters = "run, group" if name == "complete" else "run"
    return "\n".join([f"def {name}({parameters}):", f'    """{doc}"""', *(f"    {line}" for line in lines)])


def _line(step: Step, call: str = "") -> str:
    chunk = f", chunk={step.chunk}" if step.chunk else ""
    return f"run.{call or _CALLS[type(step)]}({step.microbatch}{chunk})"


def _forward_lines(step: Step) -> list[str]:
    """What a forward keeps for its backward is dropped at once where there is none."""
    return [_line(step), _line(step, "forget")] if type(step) is Forward else [_line(step)]


def render_prologue(model: ModelGraph | None) -> tuple[str, dict[str, str]]:
    """``def prologue``: step constants from the global batch; and the op names it uses."""
    if model is None:
        return f"def prologue({PROLOGUE_SIGNATURE}):\n    return {{}}", {}
    graph, results = trace_values(model)
    function = lower(graph, "prologue", frozenset(), results, Storages({}))
    names = new_names()
    kinds = {"batch": "batch", "buffer": "buffers", "constant": "buffers"}
    expressions = {i.node: f'{kinds[i.kind]}["{i.target}"]' for i in model.inputs if i.node in function.inputs}
    text = render_function(
        function, PROLOGUE_SIGNATURE, Sources(expressions, ()), names, "Once per step, from the global batch."
    )
    return f"{text}\n{returns_named(dict(zip(model.outputs, results, strict=True)))}", names.used
