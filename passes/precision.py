"""Cast: mixed precision as explicit casts in the traced graph, so that prices, memory and code follow from it.

Which op is computed in what is torch.autocast's choice for CUDA (aten/src/ATen/autocast_mode.h of torch 2.13:
AT_FORALL_LOWER_PRECISION_FP and AT_FORALL_FP32; the page of torch.amp, "Autocast Op Reference"): products, convolutions
and attention in the compute dtype; norms, softmax, losses, sums and functions of a wide range in at least float32; all
others in the widest dtype of their operands. Ops that are restated before (``passes.restate``) are listed under the
names they have here. What depends on no parameter (masks, positions) is left as it is and cast where it is used.
Where gradients pass through fp16 the loss is multiplied by one more input, its scale.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from cost_model.precision import Precision
from cost_model.tensor import TensorMeta
from passes import layer_vocabulary  # noqa: F401  (registers torch.ops.autopar)
from passes.calls import schema_arguments, tensor_args
from passes.dependence import active_nodes
from passes.graph import GraphInput, ModelGraph, is_getitem, meta_of, torch_dtype
from passes.rewriter import GraphBuilder
from passes.trace import Traced

aten = torch.ops.aten
COMPUTE = frozenset(
    """linear addmm mm bmm matmul baddbmm addbmm mv addmv dot outer addr einsum prelu conv1d conv2d conv3d convolution
    conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention attention experts""".split()
)
WIDE = frozenset(
    """layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm native_group_norm batch_norm instance_norm
    native_batch_norm softmax _softmax _safe_softmax log_softmax _log_softmax logsumexp cross_entropy_loss
    cross_entropy_sum ctc nll_loss_forward nll_loss nll_loss_nd mse_loss l1_loss smooth_l1_loss huber_loss
    binary_cross_entropy binary_cross_entropy_with_logits kl_div soft_margin_loss hinge_embedding_loss
    cosine_embedding_loss poisson_nll_loss triplet_margin_loss margin_ranking_loss cosine_similarity cdist dist sum
    prod cumsum cumprod logcumsumexp mean var var_mean std std_mean norm linalg_vector_norm exp expm1 log log10
    log1p log2 pow rsqrt reciprocal softplus tan acos asin cosh sinh erfinv""".split()
)
"""Beside torch's list: means, variances and products over a dim, which here may be cut into parts that are summed."""
_NEVER = frozenset("to _to_copy detach lift_fresh_copy embedding copy_".split())
"""Casts themselves, and a lookup, which takes rows as they are stored."""
LOSS_SCALE = "loss_scale"
_MASKS = ("mask", "attn_mask")


def cast(traced: Traced, precision: Precision) -> Traced:
    """Parameters stored and ops computed as ``precision`` says; the trace itself where it says nothing of them."""
    if precision.compute_dtype is None and not precision.scales_loss:
        return traced
    graphs = [None if g is None else _Cast(g, precision).run() for g in (traced.global_graph, traced.other)]
    assert graphs[0] is not None
    return replace(traced, global_graph=graphs[0], other=graphs[1])


def op_name(node: fx.Node) -> str:
    """Without namespace and overload."""
    return str(node.target).split(".")[-2] if isinstance(node.target, torch._ops.OpOverload) else ""


class _Cast:
    """The graph again, its values followed as fake tensors, which know what dtype each op gives."""

    def __init__(self, model: ModelGraph, precision: Precision) -> None:
        self.model, self.precision, self.compute = model, precision, precision.compute_dtype
        self.active = active_nodes(model)
        self.inputs: dict[fx.Node, GraphInput] = {}
        self.built = GraphBuilder()
        self.mapped: dict[fx.Node, fx.Node] = {}
        self.values: dict[fx.Node, Any] = {}
        self.casts: dict[tuple[fx.Node, str], fx.Node] = {}

    def run(self) -> ModelGraph:
        described = {i.node: i for i in self.model.inputs}
        scale = self.built.placeholder(LOSS_SCALE, TensorMeta((), "float32")) if self.precision.scales_loss else None
        with FakeTensorMode(), torch.no_grad():
            for node in self.model.graph.nodes:
                if node.op == "placeholder":
                    self._input(node, described[node.name])
                elif node.op == "call_function":
                    self._call(node)
        by_name = {n.name: n for n in self.model.graph.nodes}
        outputs = tuple(self.mapped[by_name[name]] for name in self.model.outputs)
        inputs = tuple(replace(i, node=self.mapped[by_name[i.node]].name) for i in self.model.inputs)
        if scale is not None:
            outputs = (self._scaled(outputs[0], scale), *outputs[1:])
            inputs = (GraphInput(scale.name, "scale", LOSS_SCALE, False, False), *inputs)
        self.built.graph.output(outputs)
        names = tuple(node.name for node in outputs)
        return ModelGraph(self.built.graph, self.built.metas, inputs, names, self.model.batch)

    def _scaled(self, loss: fx.Node, scale: fx.Node) -> fx.Node:
        """The loss in at least float32, times the scale."""
        dtype = widest([self.built.tensor(loss).dtype, "float32"])
        with FakeTensorMode():
            wide = self._as(loss, dtype, loss)
        made: fx.Node = self.built.call(aten.mul.Tensor, (wide, scale), TensorMeta((), dtype), like=loss)
        return made

    def _input(self, node: fx.Node, item: GraphInput) -> None:
        meta = self.model.tensor(node.name)
        if item.kind == "parameter":
            meta = replace(meta, dtype=self.precision.stored(meta.dtype))
        made = self.mapped[node] = self.built.placeholder(node.name, meta)
        self.inputs[made] = item
        self.values[made] = torch.empty(meta.shape, dtype=torch_dtype(meta.dtype))

    def _call(self, node: fx.Node) -> None:
        operands = self._operands(node)
        swapped = {o: operands.get(self.mapped[o], self.mapped[o]) for o in node.all_input_nodes}
        made = self.built.copy(node, swapped, self.model.metas[node.name])
        self.mapped[node] = made
        self._evaluate(made)

    def _evaluate(self, node: fx.Node) -> None:
        """Its value, and its meta with the dtype that the call gives."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        assert callable(node.target)
        value = self.values[node] = node.target(*args, **kwargs)
        meta = meta_of(value)
        assert meta is not None
        self.built.metas[node.name] = meta

    def _operands(self, node: fx.Node) -> dict[fx.Node, fx.Node]:
        """Operand -> what the call takes in its place."""
        if self.compute is None or node.name not in self.active or is_getitem(node) or op_name(node) in _NEVER:
            return {}
        floating = [o for o in dict.fromkeys(self.mapped[o] for o in tensor_args(node)) if self._is_floating(o)]
        dtype = self._dtype_of(op_name(node), floating)
        if dtype is None:
            return {}
        masks = {self.mapped[v] for k, v in schema_arguments(node).items() if k in _MASKS and isinstance(v, fx.Node)}
        floating.sort(key=lambda operand: not self._is_parameter(operand))  # a segment begins with its parameters
        return {o: self._as(self._bounded(o, dtype, node) if o in masks else o, dtype, node) for o in floating}

    def _is_parameter(self, operand: fx.Node) -> bool:
        return operand in self.inputs and self.inputs[operand].kind == "parameter"

    def _bounded(self, mask: fx.Node, dtype: str, user: fx.Node) -> fx.Node:
        """No value of an additive mask may become infinite: a row of which all is masked would be NaN."""
        meta = self.built.tensor(mask)
        if torch.finfo(torch_dtype(meta.dtype)).min >= torch.finfo(torch_dtype(dtype)).min:
            return mask
        args = (mask, torch.finfo(torch_dtype(dtype)).min)
        if (mask, "bounded") not in self.casts:
            made = self.casts[mask, "bounded"] = self.built.call(aten.clamp.default, args, meta, like=user)
            self.values[made] = self.values[mask].clone()
        return self.casts[mask, "bounded"]

    def _is_floating(self, operand: fx.Node) -> bool:
        """Whether its dtype counts: not that of a running statistic, which the op writes anew as it is."""
        item = self.inputs.get(operand)
        meta = self.built.metas[operand.name]
        return isinstance(meta, TensorMeta) and meta.is_floating and not (item is not None and item.changes)

    def _dtype_of(self, op: str, operands: Sequence[fx.Node]) -> str | None:
        """What all operands are brought to; None where they stay."""
        if op in COMPUTE:
            return self.compute
        dtypes = [self.built.tensor(o).dtype for o in self._counting(operands)]
        if op in WIDE:
            return widest([*dtypes, "float32"])
        return widest(dtypes) if len(set(dtypes)) > 1 else None

    def _counting(self, operands: Sequence[fx.Node]) -> list[fx.Node]:
        """Single numbers do not decide beside tensors with dims, as in torch's type promotion."""
        sized = [o for o in operands if self.built.tensor(o).shape]
        return sized or list(operands)

    def _as(self, operand: fx.Node, dtype: str, user: fx.Node) -> fx.Node:
        """One cast for all users of a value; one for each user of a parameter, so that none crosses a segment."""
        meta = self.built.tensor(operand)
        if meta.dtype == dtype:
            return operand
        if (operand, dtype) in self.casts:
            return self.casts[operand, dtype]
        made: fx.Node = self.built.call(
            aten.to.dtype, (operand, torch_dtype(dtype)), replace(meta, dtype=dtype), like=user
        )
        self.values[made] = self.values[operand].to(torch_dtype(dtype))
        if not self._is_parameter(operand):
            self.casts[operand, dtype] = made
        return made


def widest(dtypes: Sequence[str]) -> str:
    """The dtype to which torch promotes them all."""
    found = functools.reduce(torch.promote_types, map(torch_dtype, dtypes))
    return str(found).removeprefix("torch.")
