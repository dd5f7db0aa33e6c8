"""Joint: trace a stage's local graph with its backward, so that every op and collective is explicit.

Runs the graph under fake tensors with autograd on and records all ATen calls; nothing is computed. The stage's
incoming gradient is an input, gradients of trainable parameters and of the activation received are outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx

from cost_model.errors import AutoparError, RuleError, VerificationError
from cost_model.tensor import TensorMeta
from passes.fakes import fake_tensor
from passes.graph import ModelGraph, is_getitem, torch_dtype
from passes.layer_vocabulary import DIFFERENTIABLE
from passes.layouts import LAYOUTS
from passes.unmutate import unmutate
from passes.vocabulary import forward_end


@dataclass(frozen=True)
class TracedPiece:
    """The recorded graph of a piece and what its placeholders and outputs are, all node names.

    Placeholders: ``inputs`` (in the piece's order), then gradients of its outputs unless its output is the loss.
    outputs: in the piece's order; grads_in: the placeholder of the gradient of each, None where it has none; mark: the
    node that ends forward; gradients: input name -> gradient node (None where no output depends on it).
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    grads_in: tuple[str | None, ...]
    mark: str
    gradients: dict[str, str | None]


@dataclass(frozen=True)
class JointGraph:
    """The recorded graph and what its placeholders and outputs are, all node names.

    Placeholders: ``inputs`` (in the stage graph's order), then the incoming gradient unless the stage is last.
    output: activation sent or loss; mark: the node that ends forward; gradients: input name -> gradient node
    (None where the loss does not depend on it).
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    grad_in: str | None
    output: str
    mark: str
    gradients: dict[str, str | None]


class Runner(fx.Interpreter):
    """Runs our opaque ops through their differentiable forms and checks local shapes on the way."""

    def __init__(self, model: ModelGraph) -> None:
        super().__init__(torch.nn.Module(), graph=model.graph)
        self.model = model
        self.differentiated: set[str] = set()

    def check_reached(self, name: str) -> None:
        """VerificationError where a value without a gradient leads to the output through values that have one."""
        found, by_name = {name}, {n.name: n for n in self.model.graph.nodes}
        for node in self.model.nodes():
            if node.name in self.differentiated and any(o.name in found for o in node.all_input_nodes):
                found.add(node.name)
        if not found.isdisjoint(self.model.outputs):
            users = ", ".join(str(u.target) for u in by_name[name].users)
            raise VerificationError("gradient", f"autograd loses the gradient of {name} on its way through {users}")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(DIFFERENTIABLE.get(target, target), args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        parts = result if isinstance(result, tuple | list) else (result,)
        if any(isinstance(t, torch.Tensor) and t.requires_grad for t in parts):
            self.differentiated.add(n.name)
        expected = self.model.metas.get(n.name)
        if isinstance(expected, TensorMeta) and not is_getitem(n):
            found = tuple(result.shape)
            if found != expected.shape:
                raise _unlike(str(n.target), found, expected.shape)
        return result


def _unlike(op: str, found: tuple[int, ...], expected: tuple[int, ...]) -> AutoparError:
    """Of an op of torch's or of autopar's own it is a bug."""
    said = f"{op} gives {found}, its rule says {expected}"
    if op.partition(".")[0] in ("aten", "autopar", "_operator"):
        return VerificationError("local shapes", said)
    return RuleError(op, f"shards of a call give {found}, and its rule says {expected}; correct it in register_rule")


NO_STRIDES: Mapping[str, tuple[int, ...]] = {}


def trace_values(model: ModelGraph) -> tuple[fx.Graph, tuple[str, ...]]:
    """A graph without gradients as plain ATen calls with fake values, and the names of its outputs in it."""
    runner = Runner(model)

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return tuple(runner.run(*inputs))

    with FakeTensorMode() as mode, _tracing():
        example = [_fake(model, i, False, mode) for i in range(len(model.inputs))]
        graph = make_fx(run, decomposition_table=LAYOUTS)(*example).graph
    unmutate(graph)
    nodes = list(graph.nodes)
    names = [i.node for i in model.inputs]
    _rename(nodes, dict(zip([n for n in nodes if n.op == "placeholder"], names, strict=True)))
    return graph, tuple(n.name for n in nodes[-1].args[0])


def trace_joint(model: ModelGraph, *, last: bool, strides: Mapping[str, tuple[int, ...]] = NO_STRIDES) -> TracedPiece:
    """Joint forward and backward of a graph; ``last``: its only output is the loss, whose gradient is one.

    strides: of inputs that do not lie contiguously; what an op does to a value depends on how it lies.
    """
    wanted = _differentiated(model)
    runner = Runner(model)
    sent: list[int] = []

    def joint(*tensors: torch.Tensor) -> tuple[Any, ...]:
        inputs = tensors[: len(model.inputs)]
        outputs = runner.run(*inputs)
        mark = forward_end(outputs[0])
        sent[:] = [i for i, output in enumerate(outputs) if output.requires_grad]
        seeds = [torch.ones_like(outputs[0])] if last else tensors[len(model.inputs) :]
        leaves, ends = [inputs[i] for i in wanted], [outputs[i] for i in sent]
        grads = (
            torch.autograd.grad(ends, leaves, [seeds[i] for i in sent], allow_unused=True) if leaves and ends else ()
        )
        return (*outputs, mark, *(grads or [None] * len(leaves)))

    with FakeTensorMode() as mode, _tracing():
        example = [_fake(model, i, i in wanted, mode, strides) for i in range(len(model.inputs))]
        for output in () if last else map(model.tensor, model.outputs):
            example.append(fake_tensor(output.shape, torch_dtype(output.dtype), mode=mode))
        with mode:
            module = make_fx(joint, decomposition_table=LAYOUTS)(*example)
    described = _describe(module, model, wanted, () if last else sent)
    for name, gradient in described.gradients.items():
        if gradient is None:
            runner.check_reached(name)
    return described


@contextmanager
def _tracing() -> Iterator[None]:
    """Keeps sources; what is traced is read as a graph and never printed as code."""
    with fx_traceback.preserve_node_meta(), _use_lazy_graph_module(True):
        yield


def _differentiated(model: ModelGraph) -> list[int]:
    return [i for i, item in enumerate(model.inputs) if item.has_gradient]


def _fake(
    model: ModelGraph,
    index: int,
    requires_grad: bool,
    mode: FakeTensorMode,
    strides: Mapping[str, tuple[int, ...]] = NO_STRIDES,
) -> torch.Tensor:
    name = model.inputs[index].node
    meta = model.tensor(name)
    return fake_tensor(meta.shape, torch_dtype(meta.dtype), strides.get(name), mode=mode).requires_grad_(requires_grad)


def _describe(module: fx.GraphModule, model: ModelGraph, wanted: Sequence[int], sent: Sequence[int]) -> TracedPiece:
    """wanted: numbers of the inputs that get a gradient; sent: of the outputs whose gradient is given."""
    unmutate(module.graph)
    nodes = list(module.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    names, count = tuple(i.node for i in model.inputs), len(model.outputs)
    _rename(nodes, dict(zip(placeholders, names, strict=False)))
    seeds = placeholders[len(names) :]
    outputs, (mark, *grads) = nodes[-1].args[0][:count], nodes[-1].args[0][count:]
    return TracedPiece(
        graph=module.graph,
        inputs=names,
        outputs=tuple(node.name for node in outputs),
        grads_in=tuple(seeds[i].name if i in sent else None for i in range(count)),
        mark=mark.name,
        gradients={names[i]: (g.name if g is not None else None) for i, g in zip(wanted, grads, strict=True)},
    )


def _rename(nodes: list[fx.Node], names: dict[fx.Node, str]) -> None:
    """Give placeholders the stage graph's names; calls that hold one of these make way."""
    taken = {n.name for n in nodes} | set(names.values())
    for node in nodes:
        if node not in names and node.name in names.values():
            fresh = next(f"{node.name}_{k}" for k in range(1, len(taken) + 1) if f"{node.name}_{k}" not in taken)
            taken.add(fresh)
            node.name = fresh
    for node, name in names.items():
        node.name = node.target = name
