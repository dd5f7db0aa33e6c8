"""Convolutions: batch, channels in, channels out and groups may be split, and spatial dims; kernels are whole.

With one group the channels in are contracted, as in a matrix product. With more, dims of channels are (group, rest):
groups are parallel, channels in within a group contracted, channels out within a group parallel.

Of a spatial dim each output position reads a window. Windows side by side (the stride is the kernel's extent) split as
a product does. Where they overlap, and as many output positions as strides fit in, a rank needs rows of its neighbours
(a halo). Any other dim is whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cost_model.factors import FactorMap, parse_map
from cost_model.ops.table import INSIDE, PRODUCTS, Op, OpCall, register, register_priced, saving
from cost_model.placement import Shard
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta


def _groups(call: OpCall) -> int:
    groups = call.args.get("groups", 1)
    assert isinstance(groups, int)
    return groups


def _is_transposed(call: OpCall) -> bool:
    return "conv_transpose" in call.op or bool(call.args.get("transposed"))


def _spatial(call: OpCall) -> int:
    return len(call.inputs[1].shape) - 2


@dataclass(frozen=True)
class Window:
    """One spatial dim: stride, and the rows that a part needs of those before it and after it."""

    stride: int
    before: int
    after: int


def window(call: OpCall, dim: int) -> Window | None:
    """Of spatial dim ``dim``; None where parts of the output do not read equal parts of the input and a halo."""
    count = _spatial(call)
    given = [call.args.get(name) for name in ("stride", "padding", "dilation")]
    if _is_transposed(call) or not all(isinstance(value, list | tuple) and value for value in given):
        return None
    stride, padding, dilation = (_setting(call, name, dim) for name in ("stride", "padding", "dilation"))
    kernel = call.inputs[1].shape[2 + dim]
    rows, made = (meta.shape[len(meta.shape) - count + dim] for meta in (call.inputs[0], call.outputs[0]))
    after = dilation * (kernel - 1) + 1 - stride - padding
    return Window(stride, padding, after) if rows == made * stride and after >= 0 else None


@dataclass(frozen=True)
class _Dim:
    """Terms of one spatial dim in input, weight and output; what is whole, and extents that the terms name."""

    terms: tuple[str, str, str]
    whole: str
    sizes: Mapping[str, int]
    halo: Mapping[str, int]


def _dim(call: OpCall, i: int) -> _Dim:
    found = window(call, i)
    if found is None:
        return _Dim((f"x{i}", f"k{i}", f"y{i}"), f"x{i} k{i} y{i}", {}, {})
    if not found.before and not found.after and call.inputs[1].shape[2 + i] == found.stride:
        return _Dim((f"(y{i} k{i})", f"k{i}", f"y{i}"), f"k{i}", {f"k{i}": found.stride}, {})
    least = math.ceil(max(found.before, found.after) / found.stride)
    return _Dim((f"(y{i} s{i})", f"k{i}", f"y{i}"), f"k{i} s{i}", {f"s{i}": found.stride}, {f"y{i}": max(least, 1)})


def _factors(call: OpCall) -> FactorMap:
    """weight: [out, in / groups, *kernel]; transposed: [in, out / groups, *kernel]."""
    count, groups = _spatial(call), _groups(call)
    dims = [_dim(call, i) for i in range(count)]
    batch = "n" if len(call.inputs[0].shape) == count + 2 else ""
    before, kernel, after = (" ".join(dim.terms[side] for dim in dims) for side in range(3))
    weight = f"(g c) o {kernel}" if _is_transposed(call) else f"(g o) c {kernel}"
    bias = ", (g o)" if len(call.inputs) == 3 else ""
    return parse_map(
        f"{batch} (g c) {before}, {weight}{bias} -> {batch} (g o) {after}",
        call.inputs,
        call.outputs,
        whole=" ".join(dim.whole for dim in dims),
        halo={name: least for dim in dims for name, least in dim.halo.items()},
        addends=(2,) if bias else (),
        sizes={"g": groups, **{name: size for dim in dims for name, size in dim.sizes.items()}},
    )


def _edges(local: OpCall, place: Shard, ranks: int) -> tuple[tuple[str, int], ...]:
    """Every rank's first and last rows are gathered, and their gradients summed back."""
    source, count = local.inputs[0], _spatial(local)
    dim = place.dim - (len(source.shape) - count)
    stride, padding, dilation = (_setting(local, name, dim) for name in ("stride", "padding", "dilation"))
    rows = dilation * (local.inputs[1].shape[2 + dim] - 1) + 1 - stride
    assert rows >= padding
    nbytes = source.nbytes // source.shape[place.dim] * rows * ranks
    return ("all_gather", nbytes), ("reduce_scatter", nbytes)


_BACKWARD = "convolution_backward"
DEPTHWISE = {"convolution": "depthwise convolution", _BACKWARD: "depthwise convolution_backward"}
"""Names of those whose channels do not meet: devices may have rows of their own for them, by bytes."""
_NARROW = 3  # extent of windows up to which their backward is bound by bytes too; of wider ones by arithmetic


def _setting(call: OpCall, name: str, dim: int) -> int:
    value = call.args[name]
    assert isinstance(value, list | tuple)
    return int(value[dim % len(value)])


def _gemm(weight: TensorMeta, groups: int, transposed: bool, positions: int) -> tuple[int, int, int, int]:
    """As the product of a matrix of patches: per group, positions x channels out x (channels in x kernel)."""
    first, second, *kernel = weight.shape
    outs, ins = (second, first // groups) if transposed else (first // groups, second)
    return groups, positions, outs, ins * math.prod(kernel)


def _depthwise(weight: TensorMeta, groups: int, transposed: bool, kind: str) -> str | None:
    """The name where a group has one channel, in and out."""
    first, second, *kernel = weight.shape
    outs, ins = (second, first // groups) if transposed else (first // groups, second)
    is_narrow = kind != _BACKWARD or max(kernel) <= _NARROW
    return DEPTHWISE[kind] if groups > 1 and outs == ins == 1 and is_narrow else None


def _positions(call: OpCall) -> int:
    """Where the kernel is laid: output positions, or input positions of a transposed convolution."""
    of = call.inputs[0] if _is_transposed(call) else call.outputs[0]
    count = _spatial(call)
    batch = of.shape[0] if len(of.shape) == count + 2 else 1
    return batch * math.prod(of.shape[len(of.shape) - count :])


def _price(call: OpCall) -> OpCost:
    weight, groups, transposed = call.inputs[1], _groups(call), _is_transposed(call)
    gemm, kind = _gemm(weight, groups, transposed, _positions(call)), "convolution"
    nbytes = float(sum(m.nbytes for m in (*call.inputs, *call.outputs)))
    name = _depthwise(weight, groups, transposed, kind)
    return OpCost(kind, 2.0 * math.prod(gemm), nbytes, call.inputs[0].dtype, gemm, name)


def _planned_backward(call: OpCall) -> tuple[OpCost, ...]:
    """The one call that gives the gradients of the input and of the weight, and of the bias beside them."""
    source, weight, out = *call.inputs[:2], call.outputs[0]
    return (_backward(call, source, weight, out, _positions(call), products=2),)


def _traced_backward(call: OpCall) -> OpCost:
    """aten.convolution_backward(grad_output, input, weight, ...): a product for each gradient that is wanted."""
    gradient, source, weight = call.inputs
    wanted = call.args["output_mask"]
    assert isinstance(wanted, list | tuple)
    of = source if _is_transposed(call) else gradient
    positions = of.shape[0] * math.prod(of.shape[2:])
    products = sum(bool(w) for w in wanted[:2])
    return _backward(call, source, weight, gradient, positions, products)


def _backward(
    call: OpCall, source: TensorMeta, weight: TensorMeta, gradient: TensorMeta, positions: int, products: int
) -> OpCost:
    groups, transposed = _groups(call), _is_transposed(call)
    gemm = _gemm(weight, groups, transposed, positions)
    nbytes = float(products * sum(m.nbytes for m in (gradient, source, weight)))
    return OpCost(
        _BACKWARD,
        2.0 * math.prod(gemm) * max(products, 1),
        max(nbytes, float(gradient.nbytes)),
        source.dtype,
        gemm,
        _depthwise(weight, groups, transposed, _BACKWARD) or f"aten.{_BACKWARD}.default",
    )


for _name in (
    "conv1d.default conv2d.default conv3d.default conv1d.padding conv2d.padding conv3d.padding "
    "conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input convolution.default"
).split():
    register(Op(f"aten.{_name}", _factors, _price, _planned_backward, saving("in0", "in1")))
    INSIDE[f"aten.{_name}"] = _edges
    PRODUCTS.add(f"aten.{_name}")
register_priced("aten.convolution_backward.default", _traced_backward)
