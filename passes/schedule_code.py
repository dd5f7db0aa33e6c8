"""The two functions of a rank's program beside forward and backward: the step's schedule, and its prologue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_model.schedule import Backward, Forward, RecvBackward, RecvForward, SendBackward, SendForward, Step
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


def render_step(steps: Sequence[Step], reductions: Sequence[Reduction], *, sends: bool, doc: str) -> str:
    """``def step(run)``: the stage's schedule, gradient reduction, optimizer."""
    body = [f'"""{doc}"""']
    body += [f"run.{_CALLS[type(s)]}({s.microbatch})" for s in steps]
    if sends:
        body.append("run.wait_sends()")
    body += [f'run.reduce_gradients("{r.axis}", "{r.dtype}", {r.start}, {r.stop})' for r in reductions]
    body.append("run.update_parameters()")
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
