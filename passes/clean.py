"""Clean: one vocabulary for the ops that matter, nothing that computes nothing.

No-op casts, copies of what is contiguous and disabled dropout go; attention, cross entropy and means are
stated in the forms whose rules are simple: a mean becomes a sum and a product with 1/count, where the count is the
global batch's, so that shards and microbatches simply add up.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from cost_model.errors import UnsupportedError
from cost_model.tensor import TensorMeta
from passes import vocabulary  # noqa: F401  (registers torch.ops.autopar)
from passes.calls import schema_arguments
from passes.dependence import ancestors
from passes.graph import RESERVED, GraphInput, Meta, ModelGraph, meta_of, source_of
from passes.rewriter import GraphBuilder

aten = torch.ops.aten
_DROPPED = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
}
_INACTIVE = {aten.scaled_dot_product_attention.default}
"""Ops tagged as random that draw nothing by the time they are kept (dropout_p is 0)."""
_HALF = ("float16", "bfloat16")


class _Clean:
    """State of one run: the graph being built and where each old node went."""

    def __init__(self) -> None:
        self.built = GraphBuilder()
        self.mapped: dict[fx.Node, Any] = {}
        self.trainable: set[fx.Node] = set()

    def operand(self, value: Any) -> Any:
        return fx.map_arg(value, lambda n: self.mapped[n])

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
        rewrite = _REWRITES.get(node.target)
        if rewrite is not None:
            result = rewrite(self, node, {k: self.operand(v) for k, v in schema_arguments(node).items()})
            if result is not NotImplemented:
                return result
        return self._plain(node)

    def _plain(self, node: fx.Node) -> Any:
        if getattr(node.target, "__name__", "") == "getitem" and not isinstance(self.mapped[node.args[0]], fx.Node):  # type: ignore[index]
            return self.mapped[node.args[0]][node.args[1]]  # type: ignore[index]
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and node.target not in _INACTIVE:
            raise UnsupportedError(
                f"{node.target} draws random numbers ({source_of(node)}), which ranks cannot draw alike yet: "
                "draw them outside the model and pass them as inputs"
            )
        meta = meta_of(node.meta.get("val"))
        assert meta is not None, f"{node.target} returns no tensor"
        made = self.built.copy(node, self.mapped, meta)
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
        dtype = "float32" if meta.dtype in _HALF else meta.dtype
        wide = {"dtype": torch.float32} if meta.dtype in _HALF else {}
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


Rewrite = Callable[[_Clean, fx.Node, dict[str, Any]], Any]
_REWRITES: dict[Any, Rewrite] = {}


def _rewrites(*targets: Any) -> Callable[[Rewrite], Rewrite]:
    def register(function: Rewrite) -> Rewrite:
        _REWRITES.update(dict.fromkeys(targets, function))
        return function

    return register


@_rewrites(aten.detach_.default, aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.alias.default)
def _identity(run: _Clean, node: fx.Node, a: dict[str, Any]) -> Any:
    return next(iter(a.values()))


@_rewrites(aten.contiguous.default)
def _contiguous(run: _Clean, node: fx.Node, a: dict[str, Any]) -> Any:
    value = node.args[0].meta.get("val")  # type: ignore[union-attr]
    return a["self"] if value is not None and value.is_contiguous() else NotImplemented


@_rewrites(
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default
)
def _cast(run: _Clean, node: fx.Node, a: dict[str, Any]) -> Any:
    """Only the dtype counts: devices belong to the runtime."""
    meta = meta_of(node.meta["val"])
    assert isinstance(meta, TensorMeta)
    return run.cast(node, a["self"], meta.dtype)


@_rewrites(aten.dropout.default)
def _dropout(run: _Clean, node: fx.Node, a: dict[str, Any]) -> Any:
    if not a["train"] or a["p"] == 0:
        return a["input"]
    raise UnsupportedError(
        f"dropout with p={a['p']} is not supported yet: build the model with dropout 0 or call model.eval()"
    )


@_rewrites(aten.slice.Tensor)
def _slice(run: _Clean, node: fx.Node, a: dict[str, Any]) -> Any:
    extent = run.tensor(a["self"]).shape[a["dim"]]
    whole = (a["start"] or 0) == 0 and (a["end"] is None or a["end"] >= extent) and a["step"] == 1
    return a["self"] if whole else NotImplemented


@_rewrites(
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
def _view(run: _Clean, node: fx.Node, a: dict[str, Any]) -> Any:
    """view -> reshape with its shape spelled out: local strides may not allow the view, local sizes may be 1."""
    meta, source = meta_of(node.meta["val"]), a["self"]
    assert isinstance(meta, TensorMeta)
    if source.target is aten.reshape.default:
        source = source.args[0]
    if run.tensor(source).shape == meta.shape:
        return source
    return run.call(aten.reshape.default, (source, list(meta.shape)), meta, like=node)


@_rewrites(aten.reshape.default)
def _reshape(run: _Clean, node: fx.Node, a: dict[str, Any]) -> Any:
    return _view(run, node, a)


@_rewrites(aten.scaled_dot_product_attention.default)
def _attention(run: _Clean, node: fx.Node, a: dict[str, Any]) -> Any:
    """Fused attention as our op; key and value heads repeated for grouped queries.

    Its kernels give no gradient of the mask, so attention with a learned mask stays as it is.
    """
    query, key, value = a["query"], a["key"], a["value"]
    meta = run.tensor(query)
    if a["dropout_p"]:
        raise UnsupportedError(
            f"attention dropout {a['dropout_p']} is not supported yet: set it to 0 or call model.eval()"
        )
    is_learned = a["attn_mask"] is not None and run.trainable.intersection(ancestors([a["attn_mask"]]))
    if len(meta.shape) != 4 or run.tensor(value).shape[-1] != meta.shape[-1] or is_learned:
        return NotImplemented
    if a["enable_gqa"]:
        repeat = meta.shape[1] // run.tensor(key).shape[1]
        key, value = (_repeat_heads(run, node, x, repeat) for x in (key, value))
    batch, heads, length, _ = meta.shape
    outputs: Meta = (meta, TensorMeta((batch, heads, length), "float32" if meta.dtype != "float64" else "float64"))
    mask = _additive(run, node, a["attn_mask"], meta.dtype)
    args = (query, key, value, mask, a["is_causal"], a["scale"])
    made = run.call(torch.ops.autopar.attention.default, args, outputs, like=node)
    return run.call(operator.getitem, (made, 0), meta, like=node)


def _additive(run: _Clean, node: fx.Node, mask: fx.Node | None, dtype: str) -> fx.Node | None:
    """A boolean mask as what kernels take: 0 where attention is allowed, -inf elsewhere."""
    if mask is None or run.tensor(mask).dtype != "bool":
        return mask
    shape = run.tensor(mask).shape
    made = run.call(aten.where.Scalar, (mask, 0.0, float("-inf")), TensorMeta(shape, "float32"), like=node)
    return run.cast(node, made, dtype)


def _repeat_heads(run: _Clean, node: fx.Node, x: fx.Node, repeat: int) -> fx.Node:
    meta = run.tensor(x)
    batch, heads, length, width = meta.shape
    for target, arg, shape in (
        (aten.unsqueeze.default, 2, (batch, heads, 1, length, width)),
        (aten.expand.default, [batch, heads, repeat, length, width], (batch, heads, repeat, length, width)),
        (aten.reshape.default, [batch, heads * repeat, length, width], (batch, heads * repeat, length, width)),
    ):
        x = run.call(target, (x, arg), TensorMeta(shape, meta.dtype), like=node)
    return x


@_rewrites(aten.cross_entropy_loss.default)
def _cross_entropy(run: _Clean, node: fx.Node, a: dict[str, Any]) -> Any:
    """mean -> sum / count of labels that are not ignored; both add up over shards and microbatches."""
    logits, labels = a["self"], a["target"]
    plain = a["weight"] is None and a["reduction"] in (1, 2) and not run.tensor(labels).is_floating
    if not plain or len(run.tensor(logits).shape) != 2:
        return NotImplemented
    dtype = run.tensor(logits).dtype
    wide = TensorMeta((), "float32" if dtype in _HALF else dtype)
    args = (logits, labels, a["ignore_index"], a["label_smoothing"])
    total = run.call(torch.ops.autopar.cross_entropy_sum.default, args, wide, like=node)
    if a["reduction"] == 2:
        return run.cast(node, total, dtype)
    counted = TensorMeta((), "float32")
    count = run.call(torch.ops.autopar.count_labels.default, (labels, a["ignore_index"]), counted, like=node)
    mean = run.call(aten.div.Tensor, (total, run.cast(node, count, wide.dtype)), wide, like=node)
    return run.cast(node, mean, dtype)


@_rewrites(aten.mean.default, aten.mean.dim)
def _mean(run: _Clean, node: fx.Node, a: dict[str, Any]) -> Any:
    source, meta = a["self"], meta_of(node.meta["val"])
    assert isinstance(meta, TensorMeta)
    if a.get("dtype") is not None:
        source = run.cast(node, source, meta.dtype)
    return _divided(run, node, run.summed(node, source, a.get("dim"), a.get("keepdim", False)), source, meta)


def _divided(run: _Clean, node: fx.Node, total: fx.Node, source: fx.Node, meta: TensorMeta) -> fx.Node:
    """A sum of all of ``source`` made a mean by the count of the whole tensor."""
    count = run.tensor(source).numel // max(meta.numel, 1)
    scaled = run.call(aten.mul.Tensor, (total, 1.0 / max(count, 1)), run.tensor(total), like=node)
    return run.cast(node, scaled, meta.dtype)


@_rewrites(aten.mse_loss.default)
def _mse(run: _Clean, node: fx.Node, a: dict[str, Any]) -> Any:
    if run.tensor(a["self"]).shape != run.tensor(a["target"]).shape:
        return NotImplemented
    meta, result = run.tensor(a["self"]), meta_of(node.meta["val"])
    assert isinstance(result, TensorMeta)
    difference = run.call(aten.sub.Tensor, (a["self"], a["target"]), meta, like=node)
    square = run.call(aten.pow.Tensor_Scalar, (difference, 2), meta, like=node)
    if a["reduction"] == 0:
        return square
    total = run.summed(node, square)
    return run.cast(node, total, meta.dtype) if a["reduction"] == 2 else _divided(run, node, total, square, result)


@_rewrites(aten.broadcast_tensors.default)
def _broadcast(run: _Clean, node: fx.Node, a: dict[str, Any]) -> Any:
    metas = meta_of(node.meta["val"])
    assert isinstance(metas, tuple)
    made = []
    for source, meta in zip(a["tensors"], metas, strict=True):
        assert meta is not None
        is_whole = run.tensor(source).shape == meta.shape
        made.append(source if is_whole else run.call(aten.expand.default, (source, list(meta.shape)), meta, like=node))
    return made


def clean(module: fx.GraphModule, described: Mapping[str, GraphInput], batch: int) -> ModelGraph:
    """The exported graph in autopar's vocabulary, dead code removed, its one output the loss."""
    run = _Clean()
    inputs = []
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
        inputs.append(GraphInput(made.name, entry.kind, entry.target, entry.trainable, entry.batched))
    loss = run.run(module.graph, module)[0]
    graph = run.built.graph
    graph.output((loss,))
    graph.eliminate_dead_code()
    return ModelGraph(graph, run.built.metas, tuple(inputs), (loss.name,), batch)
