"""Trace: an ordinary model and one global batch become a forward graph ending in the scalar loss.

The model is exported twice, at the global batch and at a second size, under fake tensors; what differs
between the two graphs is what depends on the batch (see ``specialise``). Two static exports cost as much as
one symbolic export (0.8 s each against 1.7 s for 12 GPT-2 layers) and need no guards on the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import config as fx_config
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree

from cost_model.errors import AutoparError, ConfigError, TraceError, UnsupportedError
from passes.as_traced import as_traced
from passes.batch_spec import BatchSpec, batch_spec, is_batched, other_sizes, turned_samples
from passes.batch_statistics import show_moves
from passes.branches import Branches
from passes.clean import clean
from passes.draws import give_draws
from passes.elsewhere import Elsewhere
from passes.experts import traceable_experts
from passes.fakes import as_on_cpu, fake_inputs
from passes.functionalise import functional, merge_buffers
from passes.functions import FunctionMet, Functions
from passes.graph import GraphInput, ModelGraph
from passes.holding import Holding
from passes.merge import merge_equal
from passes.mutations import Changed, changed_buffers, check_statistics
from passes.parameter_writes import divert_writes
from passes.pick import pick
from passes.picked import check_picked, picked_notes
from passes.questions import Questions
from passes.repeats import HiddenError, Repeats
from passes.restate_sparse import is_sparse, spell_out
from passes.running_statistics import statistics_as_traced
from passes.segment import Segment, segment
from passes.shared_memory import check_memory
from passes.specialise import are_twins, named_like, twins
from passes.templates import UnlikeError
from passes.trace_errors import DEPENDS_ON_VALUES, as_trace_error, check_arguments, trace_error
from passes.unaware import Awareness
from passes.unroll import unroll
from passes.watch import ValueWatch, check_hooks, check_loss
from passes.whole_numbers import hold_as_floats
from passes.written import left

LossFn = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class Traced:
    """global_graph: at the global batch; other: the same graph at another batch size, None if it cannot be had; alone:
    why there is none, where the model does not trace at one.

    aliases: every name of a shared parameter or buffer -> the one name the graph uses.
    constants: tensors made from Python values inside the model, by target.
    counters: buffers to which every step adds a number.
    least: segments that are asked for.
    """

    global_graph: ModelGraph
    other: ModelGraph | None
    aliases: Mapping[str, str] = field(hash=False)
    constants: Mapping[str, torch.Tensor] = field(hash=False)
    spec: BatchSpec
    notes: tuple[str, ...]
    counters: Mapping[str, int | float] = field(hash=False, default_factory=dict)
    alone: str | None = None
    least: int = 1

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The chain of segments, the same at every batch size."""
        return segment(self.global_graph, self.other, self.least)

    @cached_property
    def twins(self) -> dict[fx.Node, fx.Node]:
        """Every node and the same node at the other batch size. Errors: BatchMismatchError."""
        assert self.other is not None
        return twins(self.global_graph, self.other)


class _WithLoss(nn.Module):
    """The model with its loss: what is traced."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None, spec: BatchSpec) -> None:
        super().__init__()
        self.model = model
        self._loss_fn, self._spec = (loss_fn,), spec  # a loss that is a module is no part of the model
        check_loss(loss_fn, model)
        self.watch, self.holding = ValueWatch(), Holding()
        self.repeats: Repeats | None = None
        self.functions = Functions()
        self.questions = Questions()
        self.awareness = Awareness()
        self.elsewhere = Elsewhere(model)
        self.branches = Branches()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            with self.questions.over(), self.awareness.over(), statistics_as_traced(self.model), self.elsewhere.over():
                with self.branches.over():
                    return self._loss(*args, **kwargs)
        except DEPENDS_ON_VALUES as error:  # before torch prints the graph that it has so far
            raise trace_error(error, self.model) from error

    def _loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with nullcontext() if self.repeats is None else self.repeats.between():
            (loss_fn,) = self._loss_fn
            with self.watch.over(self.model, loss_fn):
                with self.holding.over(self.model):
                    outputs = self.model(*args, **kwargs)
                if loss_fn is None:
                    return find_loss(outputs)
                return _scalar(loss_fn(outputs, kwargs if self._spec.is_kwargs else args), "loss_fn")


def find_loss(outputs: Any) -> torch.Tensor:
    """The output itself when it is a scalar tensor, else its ``loss``; ConfigError otherwise."""
    loss = outputs if isinstance(outputs, torch.Tensor) else getattr(outputs, "loss", None)
    if loss is None and isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    if not isinstance(loss, torch.Tensor):
        raise ConfigError(
            f"the model returns no scalar loss but a {type(outputs).__name__}: return a loss, return an object with "
            "`.loss`, or pass loss_fn(outputs, inputs) -> scalar"
        )
    return _scalar(loss, "the model")


def _scalar(loss: Any, source: str) -> torch.Tensor:
    """The loss if it is one real number that can be differentiated; ConfigError otherwise."""
    if not isinstance(loss, torch.Tensor):
        raise ConfigError(f"{source} returns no scalar loss but a {type(loss).__name__}; return a scalar tensor")
    if loss.numel() != 1 or not loss.is_floating_point():
        found = f"{str(loss.dtype).removeprefix('torch.')}{list(loss.shape)}"
        raise ConfigError(
            f"{source} returns no scalar loss but a tensor {found}: reduce it to one floating-point number (.mean()), "
            "in the model or in loss_fn(outputs, inputs)"
        )
    return loss.reshape(())


def alias_map(model: nn.Module) -> dict[str, str]:
    """Every parameter and buffer name -> the first name of the same tensor (tied weights by identity)."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def trace(model: nn.Module, inputs: Any, loss_fn: LossFn | None = None, *, sources: bool = False) -> Traced:
    """Export the model with its loss; nothing is run and no weight is touched.

    sources: note the user's line of each call, which a third of the time goes into. Errors name it in any case.
    """
    spec = batch_spec(inputs)
    wrapped = _WithLoss(model, loss_fn, spec)
    batch = pytree.tree_unflatten(spec.leaves, spec.treespec)
    given = ((), batch) if spec.is_kwargs else (batch, {})
    wrapped.training = model.training  # not train(): the model's parts may each be in a mode of their own
    try:
        while True:
            try:
                with _stack_traces(sources), traceable_experts(model):
                    return _judged(wrapped, spec, sources)
            except (TraceError, UnsupportedError) as error:
                if not _may_succeed(wrapped, error, given):
                    raise
    except UnsupportedError:
        if sources:
            raise
        return trace(model, inputs, loss_fn, sources=True)


def _judged(wrapped: _WithLoss, spec: BatchSpec, sources: bool) -> Traced:
    """A trace in which every autograd Function is one that programs can hold."""
    while True:
        try:
            return _traced(wrapped, spec, sources)
        except FunctionMet as met:
            wrapped.functions.judge(met)


def _may_succeed(wrapped: _WithLoss, error: TraceError | UnsupportedError, given: tuple[Any, Any]) -> bool:
    """Whether there is something else that the model can be told, after a trace failed: then it is told so."""
    source = error.source if isinstance(error, TraceError) else None
    failed = source or str(error.args[0]).partition("\n")[0]
    if wrapped.awareness.tell_last(failed):
        return True
    if isinstance(error.__cause__, DEPENDS_ON_VALUES) and wrapped.questions.record(wrapped, *given):
        return True
    return wrapped.awareness.tell_all(failed)


def _traced(wrapped: _WithLoss, spec: BatchSpec, sources: bool) -> Traced:
    check_hooks(wrapped.model)
    check_memory(wrapped.model)
    aliases = alias_map(wrapped.model)
    graph, constants, counters = _export(wrapped, spec, spec.size, aliases, folded=not sources)
    notes = (
        *wrapped.watch.notes,
        *wrapped.holding.notes,
        *wrapped.functions.notes(),
        *wrapped.questions.notes(),
        *wrapped.awareness.notes(),
        *wrapped.branches.notes(),
    )
    other, alone = _other(wrapped, spec, aliases, graph)
    failures = () if alone is None else (f"the batch cannot be split: {alone}",)
    graph, other = give_draws(graph, other)
    for made in (graph, other):
        if made is not None:
            check_picked(made)
    merge_equal([graph] if other is None else [graph, other])
    return Traced(graph, other, aliases, constants, spec, (*notes, *picked_notes(graph), *failures), counters, alone)


def _other(
    wrapped: _WithLoss, spec: BatchSpec, aliases: Mapping[str, str], graph: ModelGraph
) -> tuple[ModelGraph | None, str | None]:
    """The graph at another batch size, of the same calls where a size has it; why there is none."""
    other, alone = None, None
    for size in other_sizes(spec.size):
        try:
            with _stack_traces(False):
                other, *_ = _export(wrapped, spec, size, aliases, folded=True)
        except (TraceError, UnsupportedError) as error:  # of this size: the other was taken
            failed = str(error.args[0]).partition("\n  next:")[0]
            alone = f"the model does not trace at batch {size} ({failed}{turned_samples(spec)})"
        else:
            other = named_like(other, graph)
            if are_twins(graph, other):
                return other, None
    return other, alone if other is None else None


@contextmanager
def _stack_traces(wanted: bool) -> Iterator[None]:
    """Whether torch's tracers look up the line of each call."""
    before = getattr(fx_config, "do_not_emit_stack_traces", False)
    fx_config.do_not_emit_stack_traces = not wanted
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before


def _export(
    module: _WithLoss, spec: BatchSpec, size: int, aliases: Mapping[str, str], *, folded: bool
) -> tuple[ModelGraph, dict[str, torch.Tensor], dict[str, int | float]]:
    """The graph, its constants and its counters. folded: layers that are alike may be traced once."""
    tensors, mode = [*module.parameters(), *module.buffers()], FakeTensorMode()
    device = next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
    batch = fake_inputs(spec, size, device, mode)
    args, kwargs = ((), batch) if spec.is_kwargs else (batch, {})
    try:
        with as_traced(module.functions):
            exported = _folded(module, args, kwargs, mode) if folded else None
            exported = exported or _exported(module, args, kwargs, mode)
    except AutoparError:
        raise
    except Exception as error:  # torch.export raises many types; each becomes one with the user's line
        if folded:
            return _export(module, spec, size, aliases, folded=False)
        if module.elsewhere.may_help():
            return _export(module, spec, size, aliases, folded=False)
        check_arguments(module.model, args, kwargs)
        raise trace_error(error, module.model) from error
    if module.elsewhere.met(exported) and not module.elsewhere.followed:
        module.elsewhere.followed = True
        return _export(module, spec, size, aliases, folded=False)
    with warnings.catch_warnings(), as_trace_error(module.model):
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # of torch's own copying
        merge_buffers(exported, aliases)
        divert_writes(exported)
        exported = functional(exported)
    show_moves(exported)
    changed = changed_buffers(exported)
    module.holding.check(exported)
    pick(exported.graph_module)
    graph, constants = _to_model_graph(exported, spec, size, aliases, changed)
    return graph, constants, {aliases.get(name, name): step for name, step in changed.counters.items()}


def _exported(module: _WithLoss, args: Any, kwargs: Any, mode: FakeTensorMode) -> torch.export.ExportedProgram:
    with as_on_cpu(module, mode), _use_lazy_graph_module(True):  # whose code, which nobody runs, is not printed
        return torch.export.export(module, args, kwargs, strict=False)


def _folded(module: _WithLoss, args: Any, kwargs: Any, mode: FakeTensorMode) -> torch.export.ExportedProgram | None:
    """The same, layers that are alike traced once; None where they are not."""
    for hides in (True, False):
        repeats = module.repeats = Repeats(module, hides=hides)
        try:
            if not repeats.modules:
                return None
            with repeats.over():
                exported = _exported(module, args, kwargs, mode)
            unroll(exported, repeats)
            return exported
        except HiddenError:
            continue
        except UnlikeError:
            return None
        finally:
            module.repeats = None
    return None


def _to_model_graph(
    exported: torch.export.ExportedProgram,
    spec: BatchSpec,
    size: int,
    aliases: Mapping[str, str],
    changed: Changed,
) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
    """Name inputs, merge tied parameters, drop what is not a tensor, and clean."""
    placeholders = [n for n in exported.graph_module.graph.nodes if n.op == "placeholder"]
    named = zip(placeholders, map(_name, exported.graph_signature.input_specs), strict=True)
    hold_as_floats(exported.graph, {node: changed.written[name] for node, name in named if name in changed.written})
    leaf_paths = iter(spec.paths)
    described: dict[str, GraphInput] = {}
    first_of: dict[str, fx.Node] = {}
    constants: dict[str, torch.Tensor] = {}
    written: dict[str, int] = {}
    for node, item in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        entry = _describe(node, item, leaf_paths, size, aliases)
        if is_sparse(node.meta.get("val")) and entry.kind != "batch":
            for name, (part, tensor) in spell_out(node, entry, _held(exported, item)).items():
                described[name], constants[part.target] = part, tensor
            continue
        if entry.kind == "constant":
            constants[entry.target] = exported.constants[entry.target]
        if entry.kind in ("parameter", "buffer"):
            first = first_of.setdefault(entry.target, node)
            if first is not node:
                node.replace_all_uses_with(first)
                continue
        name = _name(item)
        changes, counts = name in (*changed.statistics, *changed.written), name in changed.counters
        described[node.name] = replace(entry, changes=changes, counts=counts)
        if name in changed.written:
            written[node.name] = changed.written[name]
    for name, place in changed.parameters.items():
        entry, made = _left(first_of[aliases.get(name, name)], aliases.get(name, name))
        described[made.name], written[made.name], constants[entry.target] = entry, place, _empty_like(made)
    kinds = torch.export.graph_signature.OutputKind
    loss = [s.kind for s in exported.graph_signature.output_specs].index(kinds.USER_OUTPUT)
    graph = clean(exported.graph_module, described, size, loss, written)
    check_statistics(graph, {aliases.get(name, name): norms for name, norms in changed.statistics.items()})
    return graph, constants


def _left(parameter: fx.Node, name: str) -> tuple[GraphInput, fx.Node]:
    """One more placeholder, for what forward leaves a parameter with."""
    with parameter.graph.inserting_after(parameter):
        made = parameter.graph.placeholder(f"{parameter.name}_left")
    made.meta["val"] = parameter.meta["val"].detach()
    return GraphInput(made.name, "constant", left(name), False, False, changes=True), made


def _empty_like(node: fx.Node) -> torch.Tensor:
    """Without memory of its own for more than one element."""
    value = node.meta["val"]
    return torch.zeros((), dtype=value.dtype).expand(value.shape)


def _held(exported: torch.export.ExportedProgram, item: Any) -> torch.Tensor:
    known = exported.state_dict if item.target in exported.state_dict else exported.constants
    held: torch.Tensor = known[item.target]
    return held


def _name(item: Any) -> str:
    """Of an input, as the user's model has it."""
    return str(item.target).removeprefix("model.")


def _describe(node: fx.Node, item: Any, paths: Any, size: int, aliases: Mapping[str, str]) -> GraphInput:
    kinds = torch.export.graph_signature.InputKind
    value = node.meta.get("val")
    if item.kind == kinds.USER_INPUT:
        batched = isinstance(value, torch.Tensor) and is_batched(tuple(value.shape), size)
        return GraphInput(node.name, "batch", next(paths), False, batched)
    if item.kind in (kinds.PARAMETER, kinds.BUFFER):
        name = _name(item)
        kind = "parameter" if item.kind == kinds.PARAMETER else "buffer"
        trainable = kind == "parameter" and bool(getattr(value, "requires_grad", False))
        return GraphInput(node.name, kind, aliases.get(name, name), trainable, False)
    return GraphInput(node.name, "constant", str(item.target), False, False)
