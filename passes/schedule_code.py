"""The two functions of a rank's program beside forward and backward: the step's schedule, and its prologue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_model.program import Collective
from cost_model.schedule import Backward, Forward, RecvBackward, RecvForward, SendBackward, SendForward, Step
from cost_model.tensor import DTYPE_BYTES
from passes.codegen import Sources, new_names, render_function, returns_named
from passes.graph import ModelGraph
from passes.joint import trace_values
from passes.lower import Storages, lower

PROLOGUE_SIGNATURE = "batch, buffers, kernels, device"
_CALLS = {
    Forward: "forward",
    Backward: "backward",
    SendForward: "send_forward",
    RecvForward: "receive_forward",
    SendBackward: "send_backward",
    RecvBackward: "receive_backward",
}


@dataclass(frozen=True)
class Reduction:
    """Elements [start, stop) of the flat gradient buffer of a dtype, summed over an axis once per step."""

    axis: str
    dtype: str
    start: int
    stop: int

    @property
    def collective(self) -> Collective:
        return Collective("all_reduce", self.axis, (self.stop - self.start) * DTYPE_BYTES[self.dtype])

    def __str__(self) -> str:
        return f'run.reduce_gradients("{self.axis}", "{self.dtype}", {self.start}, {self.stop})'


@dataclass(frozen=True)
class PartStep:
    """What is done once per step with a rank's part of a bucket.

    kind: "reduce_scatter" (gradients become the part's sum), "all_reduce" (the part's gradients are summed over
    another axis), "all_gather" (parameters, from the parts of all ranks). nbytes: as in ``Collective``.
    """

    kind: str
    axis: str
    bucket: str
    nbytes: int

    @property
    def collective(self) -> Collective:
        return Collective(self.kind, self.axis, self.nbytes)

    def __str__(self) -> str:
        return f'run.{PART_CALLS[self.kind]}("{self.axis}", "{self.bucket}")'


PART_CALLS = {
    "reduce_scatter": "scatter_gradients",
    "all_reduce": "reduce_part",
    "all_gather": "gather_parameters",
}


def render_step(
    steps: Sequence[Step],
    reductions: Sequence[Reduction | PartStep],
    gathers: Sequence[PartStep],
    *,
    sends: bool,
    doc: str,
) -> str:
    """``def step(run)``: the stage's schedule, gradient reduction, optimizer, gathering of parameters."""
    body = [f'"""{doc}"""']
    body += [f"run.{_CALLS[type(s)]}({s.microbatch})" for s in steps]
    if sends:
        body.append("run.wait_sends()")
    body += [str(r) for r in reductions]
    body.append("run.update_parameters()")
    body += [str(g) for g in gathers]
    return "def step(run):\n" + "\n".join(f"    {line}" for line in body)


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
