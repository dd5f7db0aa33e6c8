"""Collectives as they stand in traced graphs, and marks of what a program does with gradients.

Opaque library ops (namespace ``autopar``) have shapes but no kernels: tracing sees them as single calls, and
code generation prints each as a call of the runtime. On top of them, autograd functions pair every forward
collective with its dual, following the placements of ``cost_model.placement``:

copy <-> all_reduce, all_gather <-> reduce_scatter, take_shard <-> all_gather, all_to_all <-> all_to_all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_LIBRARY = torch.library.Library("autopar", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, *tags: torch.Tag) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an opaque op and return a decorator for its shape function."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=tags)  # type: ignore[no-untyped-call]

    def register(shape_function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"autopar::{name}", shape_function, lib=_LIBRARY)
        opaque: Callable[..., Any] = getattr(torch.ops.autopar, name).default
        return opaque

    return register


def like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _resized(x: Tensor, dim: int, extent: int) -> Tensor:
    return x.new_empty([extent if d == dim else s for d, s in enumerate(x.shape)])


@define("all_reduce(Tensor x, str axis, str op) -> Tensor")
def all_reduce(x: Tensor, axis: str, op: str) -> Tensor:
    return like(x)


@define("all_gather(Tensor x, str axis, int size, int dim, int outer) -> Tensor")
def all_gather(x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
    return _resized(x, dim, x.shape[dim] * size)


@define("reduce_scatter(Tensor x, str axis, int size, int dim, int outer) -> Tensor")
def reduce_scatter(x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
    return _resized(x, dim, x.shape[dim] // size)


@define("take_shard(Tensor x, str axis, int size, int dim, int outer) -> Tensor")
def take_shard(x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
    return _resized(x, dim, x.shape[dim] // size)


@define("all_to_all(Tensor x, str axis, int size, int split_dim, int concat_dim) -> Tensor")
def all_to_all(x: Tensor, axis: str, size: int, split_dim: int, concat_dim: int) -> Tensor:
    split = _resized(x, split_dim, x.shape[split_dim] // size)
    return _resized(split, concat_dim, x.shape[concat_dim] * size)


@define("shard_ids(Tensor ids, str axis, int size, int extent) -> Tensor")
def shard_ids(ids: Tensor, axis: str, size: int, extent: int) -> Tensor:
    """ids less the first index of this rank's shard of ``extent`` rows; -1 where another rank holds the row."""
    return like(ids)


@define("forward_end(Tensor x) -> Tensor")
def forward_end(x: Tensor) -> Tensor:
    """Marks where forward ends in a joint graph; removed by ``split``."""
    return x.new_empty([0])


@define("collect(Tensor x, int number) -> Tensor")
def collect(x: Tensor, number: int) -> Tensor:
    """x; a copy of it is handed to whoever runs the program, as output ``number`` of the model."""
    return like(x)


@define("bits(Tensor x, ScalarType dtype) -> Tensor")
def bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a flat tensor read as numbers of another dtype."""
    return x.new_empty([x.numel() * x.element_size() // dtype.itemsize], dtype=dtype)


@define("accumulate(Tensor grad, str parameter) -> ()")
def accumulate(grad: Tensor, parameter: str) -> None:
    """Adds a finished gradient to the parameter's buffer."""


@define("accumulate_product(Tensor left, Tensor right, str parameter) -> ()")
def accumulate_product(left: Tensor, right: Tensor, parameter: str) -> None:
    """Adds the product of two matrices, a finished gradient, to the parameter's buffer."""


@define("product(Tensor left, Tensor right, Tensor? bias) -> Tensor")
def product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """The product of two matrices, and a bias for each column, by the library that the device is faster with."""
    return left.new_empty([left.shape[0], right.shape[1]])


@define("by_rows(Tensor matrix) -> Tensor")
def by_rows(matrix: Tensor) -> Tensor:
    """A copy of a matrix that lies transposed, row after row."""
    return matrix.new_empty(matrix.shape)


@define("put(Tensor(a!) bucket, Tensor grad, int offset) -> ()")
def put(bucket: Tensor, grad: Tensor, offset: int) -> None:
    """Writes a finished gradient to its place in a bucket."""


@define("put_product(Tensor(a!) bucket, Tensor left, Tensor right, int offset) -> ()")
def put_product(bucket: Tensor, left: Tensor, right: Tensor, offset: int) -> None:
    """Writes the product of two matrices, a finished gradient, to its place in a bucket."""


class _Copy(Function):
    """Replicate -> Varying."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str) -> Any:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_reduce(grads[0], ctx.axis, "sum"), None


class _AllReduce(Function):
    """Partial -> Replicate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str) -> Any:
        return all_reduce(x, axis, "sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _Gather(Function):
    """Shard -> Replicate (backward takes the shard) or Shard -> Varying (backward reduces and scatters)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, size: int, dim: int, outer: int, varying: bool) -> Any:
        ctx.place = (axis, size, dim, outer)
        ctx.varying = varying
        return all_gather(x, axis, size, dim, outer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dual = reduce_scatter if ctx.varying else take_shard
        return dual(grads[0], *ctx.place), None, None, None, None, None


class _ReduceScatter(Function):
    """Partial -> Shard."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, size: int, dim: int, outer: int) -> Any:
        ctx.place = (axis, size, dim, outer)
        return reduce_scatter(x, axis, size, dim, outer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_gather(grads[0], *ctx.place), None, None, None, None


class _TakeShard(Function):
    """Replicate -> Shard."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, size: int, dim: int, outer: int) -> Any:
        ctx.place = (axis, size, dim, outer)
        return take_shard(x, axis, size, dim, outer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_gather(grads[0], *ctx.place), None, None, None, None


class _AllToAll(Function):
    """Shard(concat_dim) -> Shard(split_dim): the dim that was split is made whole, another is split."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, size: int, split_dim: int, concat_dim: int) -> Any:
        ctx.place = (axis, size, concat_dim, split_dim)
        return all_to_all(x, axis, size, split_dim, concat_dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_to_all(grads[0], *ctx.place), None, None, None, None


class Collect(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Any:
        return collect(x, number)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class Bits(Function):
    """``bits``, whose gradient goes the way back as it is. A copy, since parts of messages begin anywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Any:
        ctx.dtype = x.dtype
        return x.clone().view(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].clone().view(ctx.dtype), None


class _Portion(Function):
    """Replicate -> Partial: each rank holds 1/size of the value; the gradient is the whole one on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Any:
        return x / size

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def copy(x: Tensor, axis: str) -> Tensor:
    """Replicate -> Varying: nothing forward, all_reduce backward."""
    return _Copy.apply(x, axis)  # type: ignore[no-any-return,no-untyped-call]


def reduce(x: Tensor, axis: str) -> Tensor:
    """Partial -> Replicate: all_reduce forward, nothing backward."""
    return _AllReduce.apply(x, axis)  # type: ignore[no-any-return,no-untyped-call]


def gather(x: Tensor, axis: str, size: int, dim: int, outer: int, varying: bool) -> Tensor:
    """Shard -> Replicate or, with ``varying``, Shard -> Varying."""
    return _Gather.apply(x, axis, size, dim, outer, varying)  # type: ignore[no-any-return,no-untyped-call]


def scatter_sum(x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
    """Partial -> Shard."""
    return _ReduceScatter.apply(x, axis, size, dim, outer)  # type: ignore[no-any-return,no-untyped-call]


def shard(x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
    """Replicate -> Shard."""
    return _TakeShard.apply(x, axis, size, dim, outer)  # type: ignore[no-any-return,no-untyped-call]


def exchange(x: Tensor, axis: str, size: int, split_dim: int, concat_dim: int) -> Tensor:
    """Shard(concat_dim) -> Shard(split_dim), both plain."""
    return _AllToAll.apply(x, axis, size, split_dim, concat_dim)  # type: ignore[no-any-return,no-untyped-call]


def portion(x: Tensor, size: int) -> Tensor:
    """Replicate -> Partial."""
    return _Portion.apply(x, size)  # type: ignore[no-any-return,no-untyped-call]


def share(x: Tensor, size: int) -> Tensor:
    """Varying -> Partial: the plain product with 1/size, whose gradient is partial again."""
    return x * (1.0 / size)
