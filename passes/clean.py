"""Clean: one vocabulary for the ops that matter, nothing that computes nothing.

No-op casts, copies of what is contiguous and disabled dropout go; attention, cross entropy and means are
stated in the forms whose rules are simple: a mean becomes a sum and a product with 1/count, where the count is the
global batch's, so that shards and microbatches simply add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from cost_model.errors import UnsupportedError
from cost_model.tensor import TensorMeta
from passes import (  # noqa: F401  (with others add to REWRITES)
    restate_attention,
    restate_bags,
    restate_forms,
    restate_losses,
    restate_parts,
    restate_placed,
    restate_strided,
)
from passes.calls import schema_arguments
from passes.graph import RESERVED, GraphInput, Meta, ModelGraph, drop_dead_calls, meta_of, source_of
from passes.restate import HALF, REWRITES
from passes.restate_masks import refuse_unknown_shape
from passes.restate_sparse import sparse_call, touches_sparse
from passes.rewriter import GraphBuilder
from passes.unfold import unfolded
from passes.written import write_buffers

aten = torch.ops.aten
_DROPPED = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._linalg_check_errors.default,
    aten.sym_constrain_range_for_size.default,
}
_ALIKE: dict[Any, Any] = {torch.ops.prims.scalar_tensor.default: aten.scalar_tensor.default}
"""What torch's own decompositions make, and the op that has a rule."""
_INACTIVE = {aten.scaled_dot_product_attention.default}
"""Ops tagged as random that draw nothing by the time they are kept (dropout_p is 0)."""


@dataclass(frozen=True)
class _Number:
    """What is no tensor: a number read from one, which checks alone may use."""

    node: fx.Node


class Cleaner:
    """State of one run: the graph being built and where each old node went."""

    def __init__(self) -> None:
        self.built = GraphBuilder()
        self.mapped: dict[fx.Node, Any] = {}
        self.trainable: set[fx.Node] = set()

    def operand(self, value: Any) -> Any:
        return fx.map_arg(value, self._mapped)

    def _mapped(self, node: fx.Node) -> Any:
        found = self.mapped[node]
        if isinstance(found, _Number):
            raise UnsupportedError(
                f"a call takes a number that {found.node.target} reads from a tensor ({source_of(found.node)}), which "
                "differs from batch to batch: pass it as an input, or compute with the tensor"
            )
        return found

    def run(self, graph: fx.Graph, owner: fx.GraphModule) -> Any:
        """Copy every call of ``graph``; returns what its output node returns."""
        for node in graph.nodes:
            if node.op == "output":
                return self.operand(node.args[0])
            if node.op == "get_attr":
                self.mapped[node] = getattr(owner, str(node.target))
            elif node.op == "call_function":
                self.mapped[node] = self._call(node)
        raise AssertionError("a graph without output")

    def _call(self, node: fx.Node) -> Any:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._region(node)
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._plain(node)
        if node.target in _DROPPED:
            return None
        refuse_unknown_shape(node)
        if touches_sparse(self, node):
            return sparse_call(self, node)
        rewrite = REWRITES.get(node.target)
        if rewrite is not None:
            result = rewrite(self, node, {k: self.operand(v) for k, v in schema_arguments(node).items()})
            if result is not NotImplemented:
                return result
        return self._plain(node)

    def _plain(self, node: fx.Node) -> Any:
        meta = meta_of(node.meta.get("val"))
        if meta is None:
            return _Number(node)
        if getattr(node.target, "__name__", "") == "getitem" and not isinstance(self.mapped[node.args[0]], fx.Node):  # type: ignore[index]
            return self.mapped[node.args[0]][node.args[1]]  # type: ignore[index]
        self.operand(node.all_input_nodes)
        made_of = unfolded(node)
        if made_of is not None:
            return self._inline(made_of.module, [self.operand(o) for o in made_of.operands])
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and node.target not in _INACTIVE:
            raise UnsupportedError(
                f"{node.target} draws random numbers in a way that does not divide among ranks ({source_of(node)}): "
                "draw them outside the model and pass them as inputs, or make them of torch.rand"
            )
        made = self.built.copy(node, self.mapped, meta)
        made.target = _ALIKE.get(made.target, made.target)
        if "device" in made.kwargs:
            made.kwargs = {**made.kwargs, "device": torch.device("cpu")}
        if "pin_memory" in made.kwargs:
            made.kwargs = {k: v for k, v in made.kwargs.items() if k != "pin_memory"}
        return made

    def _region(self, node: fx.Node) -> Any:
        """Inline a no_grad or a disabled autocast region; what leaves no_grad is detached already."""
        name = node.target.name()  # type: ignore[union-attr]
        operands = [self.operand(a) for a in node.args]
        if name == "wrap_with_set_grad_enabled":
            return self._inline(operands[1], operands[2:])
        if name == "wrap_with_autocast" and operands[2] is False:
            return self._inline(operands[4], operands[5:])
        raise UnsupportedError(f"the model uses {name}, which autopar cannot shard yet; remove it from forward")

    def _inline(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.mapped.update(zip(placeholders, inputs, strict=True))
        return self.run(module.graph, module)

    def call(
        self, target: Any, args: tuple[Any, ...], meta: Meta, *, like: fx.Node | None = None, **kwargs: Any
    ) -> Any:
        return self.built.call(target, args, meta, like=like, **kwargs)

    def tensor(self, node: fx.Node) -> TensorMeta:
        return self.built.tensor(node)

    def summed(self, node: fx.Node, source: fx.Node, dims: Any = None, keepdim: bool = False) -> fx.Node:
        """A sum, in float32 for half types, whose range and precision a long sum leaves."""
        meta = self.tensor(source)
        dtype = "float32" if meta.dtype in HALF else meta.dtype
        wide = {"dtype": torch.float32} if meta.dtype in HALF else {}
        if not dims and not keepdim:
            made = self.call(aten.sum.default, (source,), TensorMeta((), dtype), like=node, **wide)
        else:
            dims = dims or list(range(len(meta.shape)))
            gone = {d % len(meta.shape) for d in dims}
            extents = [1 if d in gone else e for d, e in enumerate(meta.shape) if keepdim or d not in gone]
            out = TensorMeta(tuple(extents), dtype)
            made = self.call(aten.sum.dim_IntList, (source, dims, keepdim), out, like=node, **wide)
        assert isinstance(made, fx.Node)
        return made

    def cast(self, node: fx.Node, source: fx.Node, dtype: str) -> fx.Node:
        """``source`` as ``dtype``; itself where it is that already."""
        meta = self.tensor(source)
        if meta.dtype == dtype:
            return source
        made = self.call(aten.to.dtype, (source, getattr(torch, dtype)), TensorMeta(meta.shape, dtype), like=node)
        assert isinstance(made, fx.Node)
        return made


def clean(
    module: fx.GraphModule,
    described: Mapping[str, GraphInput],
    batch: int,
    output: int = 0,
    written: Mapping[str, int] = MappingProxyType({}),
) -> ModelGraph:
    """The exported graph in autopar's vocabulary, dead code removed, its one output the loss (number ``output``).

    written: buffer, by node -> the output that is its new value.
    """
    run = Cleaner()
    inputs = []
    buffers: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        entry, meta = described.get(node.name), meta_of(value)
        if entry is None or not isinstance(value, torch.Tensor) or meta is None:
            run.mapped[node] = value if not isinstance(value, torch.Tensor) else None
            continue
        made = run.built.placeholder(f"{node.name}_" if node.name in RESERVED else node.name, meta)
        run.mapped[node] = made
        run.trainable |= {made} if entry.trainable else set()
        inputs.append(replace(entry, node=made.name))
        if node.name in written:
            buffers[made] = written[node.name]
    returned = run.run(module.graph, module)
    loss, graph = returned[output], run.built.graph
    values = {buffer: returned[number] for buffer, number in buffers.items()}
    graph.output((loss, *values.values()))
    drop_dead_calls(graph)
    cleaned = ModelGraph(graph, run.built.metas, tuple(inputs), (loss.name,), batch)
    return write_buffers(cleaned, values) if values else cleaned
