"""Sizing: questions of capacity, each answered by planning: how many nodes, how large a model, how long, how much."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from autopar.kernel_calls import with_kernel_calls
from autopar.options import Options
from autopar.planner.solution import is_interrupted
from autopar.planning import Job
from autopar.progress import say
from autopar.relaxations import decided
from autopar.report import bytes_text, cluster_text, estimate_tree, render, seconds_text
from cost_model.cluster import Cluster
from cost_model.errors import BatchError, ConfigError, ParallelismError
from cost_model.estimate import Estimate

MOST_NODES, MOST_SCALE = 1024, 2**20
Family = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Answer:
    """What was asked, in a sentence; figures: for JSON; estimate: of the plan behind it, None where none was found."""

    text: str
    figures: Mapping[str, Any]
    estimate: Estimate | None
    cluster: Cluster

    def summary(self) -> str:
        """The sentence, and the plan behind it."""
        return render(self.text, *([] if self.estimate is None else [_plan_line(self.estimate, self.cluster)]))

    def as_dict(self) -> dict[str, Any]:
        """The figures, with the estimate of the plan behind them."""
        return {**self.figures, "estimate": None if self.estimate is None else estimate_tree(self.estimate)}


def size_nodes(
    model: nn.Module, cluster: Cluster, inputs: Any, *, most_nodes: int = MOST_NODES, **keywords: Any
) -> Answer:
    """The smallest number of the cluster's nodes on which the model trains with this global batch.

    Every number is tried from the one whose memory just holds parameters and optimizer state. keywords: of ``compile``.
    Ctrl-C ends with what is known so far. Errors: as for ``compile``; UnsupportedError for a cluster without nodes.
    """
    _positive(most_nodes=most_nodes)
    size = cluster.node_size
    options = Options.of_keywords(keywords)
    job = Job.of(model, with_kernel_calls(cluster.resized(size), options), inputs, options)
    devices = job.least_devices
    nodes = least = most_nodes + 1 if devices is None else max(1, -(-devices // size))
    try:
        for nodes in range(least, most_nodes + 1):
            found = _fits(job.on(with_kernel_calls(cluster.resized(nodes * size), options)), f"{nodes} node(s)")
            if isinstance(found, Estimate):
                return _nodes_answer(nodes, size, found, cluster.resized(nodes * size))
    except KeyboardInterrupt:
        return _no_nodes(nodes, "interrupted: fewer than {} node(s) of {} device(s) do not train it", cluster)
    return _no_nodes(most_nodes + 1, "it does not train on fewer than {} node(s) of {} device(s)", cluster)


def size_model(
    family: Family,
    cluster: Cluster,
    *,
    scale: str = "layers",
    start: int = 1,
    step: int = 1,
    most: int = MOST_SCALE,
    **keywords: Any,
) -> Answer:
    """The largest model of a family that trains on the cluster.

    family(**{scale: n}) returns (model, inputs) or (model, inputs, loss_fn); building it under torch.device("meta")
    keeps large ones from taking memory here. n is a multiple of ``step`` from ``start`` up; what does not fit is taken
    to be larger than what does. Ctrl-C ends with the largest so far. keywords: of ``compile``. Errors: as for it.
    """
    _positive(start=start, step=step, most=most)
    if most < start:
        raise ConfigError(f"most={most} is less than start={start}: there is nothing to try")
    tried = _Scales(family, cluster, scale, keywords)
    try:
        tried.search(start, step, most)
        note = ""
    except KeyboardInterrupt:
        note = "interrupted: "
    return tried.answer(note)


def size_days(
    model: nn.Module,
    cluster: Cluster,
    inputs: Any,
    *,
    tokens: float,
    tokens_per_step: int | None = None,
    **keywords: Any,
) -> Answer:
    """Days to train so many tokens. tokens_per_step: default: elements of the first batch input of whole numbers.

    keywords: of ``compile``. Errors: as for it.
    """
    _positive(tokens=tokens)
    job, per_step, found = _priced(model, cluster, inputs, tokens_per_step, keywords)
    steps = math.ceil(tokens / per_step)
    days = steps * found.step_time_s / 86400
    figures = {"days": days, "steps": steps, "tokens": tokens, "tokens_per_step": per_step}
    rate = per_step / found.step_time_s
    text = f"{tokens:,.0f} tokens take {days:.3g} days: {steps:,} steps of {per_step:,} tokens, {rate:,.0f} tokens/s."
    return Answer(text, {**figures, "tokens_per_s": rate}, found, job.cluster)


def size_cost(
    model: nn.Module,
    cluster: Cluster,
    inputs: Any,
    *,
    price_per_device_hour: float,
    tokens: float | None = None,
    tokens_per_step: int | None = None,
    **keywords: Any,
) -> Answer:
    """What a token costs to train at this price of a device for an hour, and so many tokens, if given.

    In the currency of the price; tokens_per_step and keywords as for ``size_days``.
    """
    _positive(price_per_device_hour=price_per_device_hour, **({} if tokens is None else {"tokens": tokens}))
    job, per_step, found = _priced(model, cluster, inputs, tokens_per_step, keywords)
    step_cost = price_per_device_hour * cluster.num_devices * found.step_time_s / 3600
    token_cost = step_cost / per_step
    figures: dict[str, Any] = {"cost_per_token": token_cost, "cost_per_step": step_cost, "tokens_per_step": per_step}
    text = f"A million tokens cost {token_cost * 1e6:.3g}, a step {step_cost:.3g}"
    if tokens is not None:
        figures |= {"tokens": tokens, "cost": token_cost * tokens}
        text = f"{text}, {tokens:,.0f} tokens {token_cost * tokens:,.2f}"
    text = f"{text} (at {price_per_device_hour:g} a device for an hour, {cluster.num_devices} device(s))."
    return Answer(text, figures, found, job.cluster)


# --- Nodes


def _fits(job: Job, what: str) -> Estimate | int | None:
    """The best plan, or bytes of a device that would do, or None where no configuration is possible."""
    say(f"size: planning for {what}")
    try:
        found = job.attempt()
    except (ParallelismError, BatchError):
        return None
    return found if isinstance(found, int) else found.estimate


def _nodes_answer(nodes: int, size: int, found: Estimate, cluster: Cluster) -> Answer:
    text = f"It trains on {nodes} node(s) of {size} device(s), and on no fewer."
    return Answer(text, {"nodes": nodes, "devices": nodes * size}, found, cluster)


def _no_nodes(least: int, text: str, cluster: Cluster) -> Answer:
    figures = {"nodes": None, "devices": None, "more_than": least - 1}
    return Answer(text.format(least, cluster.node_size) + ".", figures, None, cluster)


# --- Models


@dataclass(frozen=True)
class _Model:
    """A member of the family that fits."""

    number: int
    parameters: int
    estimate: Estimate


class _Scales:
    """The largest that fits, and the smallest that does not, so far."""

    def __init__(self, family: Family, cluster: Cluster, scale: str, keywords: Mapping[str, Any]) -> None:
        self.family, self.cluster, self.scale, self.keywords = family, cluster, scale, keywords
        self.largest: _Model | None = None
        self.too_large: int | None = None
        self.needed_bytes: int | None = None

    def search(self, start: int, step: int, most: int) -> None:
        """Twice as large while it fits, then halves of what is between; numbers are start + k x step."""
        low, high, last = -1, 0, (most - start) // step
        while high <= last and self._try(start + high * step):
            low, high = high, 2 * high + 1
        high = min(high, last + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._try(start + middle * step) else (low, middle)

    def _try(self, number: int) -> bool:
        model, inputs, loss_fn = (*self.family(**{self.scale: number}), None)[:3]
        own = {} if loss_fn is None else {"loss_fn": loss_fn}
        options = Options.of_keywords({**self.keywords, **own})
        job = Job.of(model, with_kernel_calls(self.cluster, options), inputs, options)
        found = _fits(job, f"{self.scale}={number}")
        if isinstance(found, Estimate):
            self.largest = _Model(number, sum(p.numel() for p in model.parameters()), found)
            if is_interrupted(found.notes):
                raise KeyboardInterrupt
            return True
        self.too_large, self.needed_bytes = number, found
        return False

    def answer(self, note: str) -> Answer:
        found = self.largest
        figures = {"scale": self.scale, "too_large": self.too_large, "needed_bytes": self.needed_bytes}
        tail = "" if self.too_large is None else f"; {self.scale}={self.too_large} does not"
        tail += "" if self.needed_bytes is None else f" (it would with {bytes_text(self.needed_bytes)} a device)"
        if found is None:
            text = f"{note}no model of the family trains on {cluster_text(self.cluster)}{tail}."
            return Answer(text, {**figures, "largest": None, "parameters": None}, None, self.cluster)
        text = f"{note}{self.scale}={found.number} trains, {found.parameters:,} parameters{tail}."
        figures |= {"largest": found.number, "parameters": found.parameters}
        return Answer(text, figures, found.estimate, self.cluster)


# --- Tokens


def _priced(
    model: nn.Module, cluster: Cluster, inputs: Any, tokens_per_step: int | None, keywords: Mapping[str, Any]
) -> tuple[Job, int, Estimate]:
    """The job, the tokens of a step, and the plan's estimate."""
    options = Options.of_keywords(keywords)
    job = Job.of(model, with_kernel_calls(cluster, options), inputs, options)
    per_step = _tokens(job) if tokens_per_step is None else tokens_per_step
    _positive(tokens_per_step=per_step)
    return job, per_step, job.planned(decided(job, time.perf_counter())).estimate


def _tokens(job: Job) -> int:
    """Elements of the first batch input of whole numbers, one for each token. Errors: ConfigError."""
    graph = job.traced.global_graph
    metas = [graph.tensor(item.node) for item in graph.inputs if item.kind == "batch"]
    found = next((meta for meta in metas if meta.dtype in ("int64", "int32") and len(meta.shape) > 1), None)
    if found is None:
        raise ConfigError("no input is a batch of token numbers; say tokens_per_step, such as samples x length")
    return math.prod(found.shape)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{name} must be a number above zero, not {value!r}")


def _plan_line(found: Estimate, cluster: Cluster) -> str:
    plan = found.plan
    head = f"plan: {plan.mesh_text()} on {cluster_text(cluster)}, {plan.microbatches} x {plan.microbatch_size}"
    figures = f"step {seconds_text(found.step_time_s)}, peak memory {bytes_text(found.peak_bytes)}"
    return f"{head}{plan.saving_text()}: {figures}"
