"""Localise: the few arguments that name sizes, and the few ops whose shards need an algorithm of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from cost_model.axes import Axes
from cost_model.errors import RuleError
from cost_model.factors import Strategy
from cost_model.placement import Shard
from cost_model.strategies import MeshStrategy, splits
from cost_model.tensor import TensorMeta
from passes import sharded_vocabulary
from passes.graph import Meta

aten = torch.ops.aten
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def localise(node: fx.Node, strategy: MeshStrategy, out: Meta, operands: Mapping[fx.Node, fx.Node], mesh: Axes) -> Call:
    """Target, args and kwargs of ``node`` on local operands, with ``out`` its local meta.

    Errors: RuleError where two splits of one op would each need an algorithm of its own.
    """
    args = fx.map_arg(node.args, lambda n: operands[n])
    kwargs = fx.map_arg(dict(node.kwargs), lambda n: operands[n])
    if node.target in _ALGORITHMS:
        call = _by_algorithm(node.target, strategy, args, kwargs, mesh)
        if call is not None:
            return call
    sizes = _SIZES.get(node.target)
    if sizes is not None:
        args = sizes(args, out)
    return node.target, args, kwargs


def _by_algorithm(
    target: Any, strategy: MeshStrategy, args: tuple[Any, ...], kwargs: dict[str, Any], mesh: Axes
) -> Call | None:
    """Split by split: those that leave the op as it is (fewer groups) come before the one that replaces it."""
    found: Call | None = None
    for axes, own in sorted(splits(strategy, mesh.sizes), key=lambda split: split[1].inside):
        call = _ALGORITHMS[target](own, args, mesh.name(axes), mesh.ranks(axes))
        if call is None:
            continue
        if found is not None and found[0] is not target:
            raise RuleError(str(target), f"is split in two ways that do not go together: {strategy}")
        found, args = call, call[1] if call[0] is target else args
    return found


def _shape(args: tuple[Any, ...], out: Meta) -> tuple[Any, ...]:
    assert isinstance(out, TensorMeta)
    return (args[0], list(out.shape), *args[2:])


def _chunk(args: tuple[Any, ...], out: Meta) -> tuple[Any, ...]:
    """split(x, size, dim): the local chunk."""
    assert not isinstance(out, TensorMeta) and out[0] is not None
    dim = args[2] if len(args) > 2 else 0
    return (args[0], out[0].shape[dim], dim)


def _chunks(args: tuple[Any, ...], out: Meta) -> tuple[Any, ...]:
    """split_with_sizes(x, sizes, dim): the local chunks."""
    assert not isinstance(out, TensorMeta)
    dim = args[2] if len(args) > 2 else 0
    return (args[0], [m.shape[dim] for m in out if m is not None], dim)


def _embedding(strategy: Strategy, args: tuple[Any, ...], axis: str, size: int) -> Call | None:
    if not (isinstance(strategy.inputs[0], Shard) and strategy.inputs[0].dim == 0):
        return None
    if strategy.inputs[0].outer != 1:
        raise RuleError("aten.embedding", "a table can only be split in consecutive rows")
    padding_idx = args[2] if len(args) > 2 else -1
    return sharded_vocabulary.vocabulary_embedding, (args[0], args[1], padding_idx, axis, size), {}


def _cross_entropy(strategy: Strategy, args: tuple[Any, ...], axis: str, size: int) -> Call | None:
    if not strategy.inside:
        return None
    if len(args) > 3 and args[3] != 0.0:
        raise RuleError("autopar.cross_entropy_sum", "label smoothing needs whole rows of logits")
    return sharded_vocabulary.vocabulary_cross_entropy, (args[0], args[1], args[2], axis, size), {}


def _grouped_convolution(target: Any, position: int) -> Callable[[Strategy, tuple[Any, ...], str, int], Call | None]:
    """``args[position]`` is the number of groups; where they are split, each rank has its share of them."""

    def localised(strategy: Strategy, args: tuple[Any, ...], axis: str, size: int) -> Call | None:
        if strategy.inside:
            return (
                sharded_vocabulary.convolution_of_rows,
                (*_convolution(target, args), _shard_dim(strategy), axis, size),
                {},
            )
        groups, place = args[position] if len(args) > position else 1, strategy.inputs[1]
        if groups == 1 or not (isinstance(place, Shard) and place.dim == 0 and place.outer < groups):
            return None
        return target, (*args[:position], groups // size, *args[position + 1 :]), {}

    return localised


def _convolution(target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """x, weight, bias, stride, padding, dilation, groups, all given."""
    declared = [argument.default_value for argument in target._schema.arguments]
    filled = (*args, *declared[len(args) :])
    return (*filled[:6], filled[8]) if target == aten.convolution.default else filled[:7]


def _shard_dim(strategy: Strategy) -> int:
    place = strategy.inputs[0]
    assert isinstance(place, Shard)
    return place.dim


def _group_norm(strategy: Strategy, args: tuple[Any, ...], axis: str, size: int) -> Call | None:
    place = strategy.inputs[0]
    if not (isinstance(place, Shard) and place.dim == 1):
        return None
    return aten.group_norm.default, (args[0], args[1] // size, *args[2:]), {}


def _attention(strategy: Strategy, args: tuple[Any, ...], axis: str, size: int) -> Call | None:
    is_causal, place = args[4], strategy.inputs[0]
    if not (is_causal and isinstance(place, Shard) and place.dim == 2):
        return None
    return sharded_vocabulary.attention_rows, (*args[:3], args[5], axis, size), {}


def _experts(strategy: Strategy, args: tuple[Any, ...], axis: str, size: int) -> Call | None:
    place = strategy.inputs[3]
    if not (isinstance(place, Shard) and place.dim == 0):
        return None
    return sharded_vocabulary.shard_of_experts, (*args, axis, size), {}


_SIZES: dict[Any, Callable[[tuple[Any, ...], Meta], tuple[Any, ...]]] = {
    aten.reshape.default: _shape,
    aten.expand.default: _shape,
    aten.split.Tensor: _chunk,
    aten.split_with_sizes.default: _chunks,
}
_ALGORITHMS: dict[Any, Callable[[Strategy, tuple[Any, ...], str, int], Call | None]] = {
    aten.embedding.default: _embedding,
    aten.group_norm.default: _group_norm,
    torch.ops.autopar.attention.default: _attention,
    torch.ops.autopar.experts.default: _experts,
    torch.ops.autopar.cross_entropy_sum.default: _cross_entropy,
    **{
        target: _grouped_convolution(target, position)
        for target, position in (
            (aten.conv1d.default, 6),
            (aten.conv2d.default, 6),
            (aten.conv3d.default, 6),
            (aten.conv1d.padding, 6),
            (aten.conv2d.padding, 6),
            (aten.conv3d.padding, 6),
            (aten.conv_transpose1d.default, 6),
            (aten.conv_transpose2d.input, 6),
            (aten.conv_transpose3d.input, 6),
            (aten.convolution.default, 8),
        )
    },
}
