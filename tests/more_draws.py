"""Random calls of convolutions, pooling, scatters and ops over an order: what is no plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from op_draws import Draw

Tensor = torch.Tensor
Drawn = tuple[str, int, Callable[["Draw"], tuple[Any, ...]]]


def _distinct(d: Draw, *shape: int) -> Tensor:
    """No two elements are equal, so that extrema and order are stable under rounding."""
    count = int(torch.Size(shape).numel())
    return (torch.randperm(count).double() / max(count, 1) - 0.4).reshape(shape)


def _convolution(dims: int, transposed: bool) -> Callable[[Draw], tuple[Any, ...]]:
    def draw(d: Draw) -> tuple[Any, ...]:
        groups = d.pick(1, 2, 4)
        ins, outs = groups * d.pick(2, 1, 3), groups * d.pick(2, 1, 3)
        kernel = [d.pick(1, 2, 3) for _ in range(dims)]
        source = d.normal(d.pick(4, 3), ins, *[d.pick(4, 5, 8) for _ in range(dims)])
        shape = (ins, outs // groups, *kernel) if transposed else (outs, ins // groups, *kernel)
        bias = d.normal(outs) if d.pick(True, False) else None
        rest = ([0] * dims, groups) if transposed else ([1] * dims, groups)
        stride, padding = d.pick(1, 2, 3), d.pick(0, 1) if min(kernel) > 1 else 0
        return source, d.normal(*shape), bias, [stride] * dims, [padding] * dims, *rest

    return draw


def _padded_convolution(dims: int) -> Callable[[Draw], tuple[Any, ...]]:
    def draw(d: Draw) -> tuple[Any, ...]:
        source, weight, bias, *_, groups = _convolution(dims, False)(d)
        return source, weight, bias, [1] * dims, d.pick("same", "valid"), [1] * dims, groups

    return draw


def _plain_convolution(d: Draw) -> tuple[Any, ...]:
    source, weight, bias, stride, padding, dilation, groups = _convolution(2, False)(d)
    return source, weight, bias, stride, padding, dilation, False, [0, 0], groups


def _image(d: Draw, dims: int) -> Tensor:
    return _distinct(d, *d.shape(2, 2), *[4] * dims)


def _complex(d: Draw) -> Tensor:
    shape = (*d.shape(1, 2), 3)
    return torch.complex(d.normal(*shape), d.normal(*shape))


def _transformed(x: Tensor, last: Any) -> tuple[Any, ...]:
    return x, [x.ndim - 1], 0, last


def _definite(d: Draw) -> Tensor:
    """Symmetric matrices whose eigenvalues are well apart."""
    half = d.normal(*d.shape(1, 2), 3, 3) * 0.3
    return half @ half.mT + torch.diag(torch.arange(1.0, 4.0)).double()


def _solved(d: Draw) -> tuple[Any, ...]:
    matrices = _definite(d)
    return matrices, d.normal(*matrices.shape[:-1], 2)


def _solved_by_factors(d: Draw) -> tuple[Any, ...]:
    matrices, wanted = _solved(d)
    return *torch.linalg.lu_factor(matrices), wanted


def _searched(d: Draw) -> tuple[Any, ...]:
    lead = d.shape(0, 2)
    return d.normal(*d.pick((), lead), 5).sort().values, d.normal(*lead, d.size())


def _pooled(dims: int) -> Callable[[Draw], tuple[Any, ...]]:
    return lambda d: (_image(d, dims), [2] * dims, [d.pick(1, 2)] * dims)


def _group_norm(d: Draw) -> tuple[Any, ...]:
    groups = d.pick(4, 2, 3, 1)
    channels = groups * d.pick(2, 3)
    affine = (d.normal(channels), d.normal(channels)) if d.pick(True, False) else (None, None)
    return d.normal(d.size(), channels, 5), groups, *affine, 1e-5


def _batch_norm(d: Draw) -> tuple[Any, ...]:
    channels = d.size()
    given = (d.normal(channels), d.positive(channels), False) if d.pick(True, False) else (None, None, True)
    return d.normal(4, channels, 3), d.normal(channels), d.normal(channels), *given, 0.1, 1e-5, False


def _instance_norm(d: Draw) -> tuple[Any, ...]:
    channels = d.size()
    given = d.pick((None, None, True), (d.normal(channels), d.positive(channels), False))
    return d.normal(d.size(), channels, 5), d.normal(channels), d.normal(channels), *given, 0.1, 1e-5, False


def _experts(d: Draw) -> tuple[Any, ...]:
    tokens, width, inner, count, chosen = d.pick(4, 3), d.pick(4, 3), d.pick(2, 4, 3), d.pick(4, 2, 6), 2
    routing = d.positive(tokens, chosen)
    index = torch.argsort(torch.rand(tokens, count), 1)[:, :chosen]
    weights = d.normal(count, 2 * inner, width), d.normal(count, width, inner)
    return d.normal(tokens, width), index, routing, *weights, "silu", count


def _ctc(d: Draw) -> tuple[Any, ...]:
    """Labels have room in the steps, repeated ones too, so that all losses are finite."""
    steps, samples, most = 9, d.pick(4, 6, 3), d.pick(1, 2, 4)
    labels, lengths = torch.randint(1, 5, (samples, most)), torch.randint(0, most + 1, (samples,))
    return d.normal(steps, samples, 5).log_softmax(-1), labels, 9 - lengths % 2, lengths, 0, d.pick(True, False)


def _ordered(d: Draw) -> tuple[Tensor, int]:
    x = _distinct(d, *d.shape())
    return x, d.pick(*range(-x.ndim, x.ndim))


def _gather(d: Draw) -> tuple[Any, ...]:
    x = d.any()
    dim = d.pick(*range(-x.ndim, x.ndim))
    shape = list(x.shape)
    shape[dim] = d.pick(1, 2, 5)
    return x, dim, d.ids(x.shape[dim], *shape)


def _scatter(d: Draw, number: bool) -> tuple[Any, ...]:
    x = d.any()
    dim = d.pick(*range(-x.ndim, x.ndim))
    index = torch.argsort(torch.rand(x.shape), dim)  # each place once: the order of writes does not matter
    index = index.narrow(dim, 0, d.pick(1, x.shape[dim]))
    return x, dim, index, 2.5 if number else d.normal(*index.shape)


def _index_select(d: Draw) -> tuple[Any, ...]:
    x = d.any()
    dim = d.pick(*range(-x.ndim, x.ndim))
    return x, dim, d.ids(x.shape[dim], d.pick(1, 3, 4))


def _index_add(d: Draw) -> tuple[Any, ...]:
    x = d.any()
    dim = d.pick(*range(-x.ndim, x.ndim))
    index = torch.randperm(x.shape[dim])[: d.pick(1, x.shape[dim])]
    shape = list(x.shape)
    shape[dim] = len(index)
    return x, dim, index, d.normal(*shape)


def _scatter_reduce(d: Draw) -> tuple[Any, ...]:
    return *_scatter(d, False), d.pick("sum", "mean", "prod", "amax", "amin"), {"include_self": d.pick(True, False)}


def _index_reduce(d: Draw) -> tuple[Any, ...]:
    return *_index_add(d), d.pick("mean", "prod", "amax", "amin"), {"include_self": d.pick(True, False)}


def _diagonal_scatter(d: Draw) -> tuple[Any, ...]:
    x = d.any(2, 3)
    return x, d.normal(*x.diagonal(0, 0, -1).shape), 0, 0, -1


def _index_fill(d: Draw, value: Any) -> tuple[Any, ...]:
    x, dim, index, _ = _index_add(d)
    return x, dim, index, value


def _index_put(d: Draw) -> tuple[Any, ...]:
    x = d.any(2, 3)
    at = d.pick(0, 1)
    index = torch.randperm(x.shape[at])[: d.pick(1, x.shape[at])]
    shape = list(x.shape)
    shape[at] = len(index)
    return x, [None] * at + [index], d.normal(*shape)


def _slice_scatter(d: Draw) -> tuple[Any, ...]:
    x = d.any()
    dim = d.pick(*range(-x.ndim, x.ndim))
    part = list(x.shape)
    part[dim] = d.pick(1, x.shape[dim])
    return x, d.normal(*part), dim, 0, part[dim]


def _select_scatter(d: Draw) -> tuple[Any, ...]:
    x = d.any(2)
    dim = d.pick(*range(x.ndim))
    return x, d.normal(*(e for i, e in enumerate(x.shape) if i != dim)), dim, 0


def _repeat(d: Draw) -> tuple[Any, ...]:
    x = d.any()
    return x, [*d.pick((), (2,)), *(d.pick(1, 2, 3) for _ in x.shape)]


def _repeat_interleave(d: Draw) -> tuple[Any, ...]:
    x = d.any()
    return x, d.pick(2, 3), d.pick(None, *range(-x.ndim, x.ndim))


def _statistic(d: Draw) -> tuple[Any, ...]:
    x = d.positive(*d.shape(1, 2), 4)
    return x, d.pick([-1], [0, -1]), d.pick(True, False)


def _baddbmm(d: Draw) -> tuple[Any, ...]:
    b, m, k, n = d.pick(4, 3), d.pick(4, 2), d.pick(4, 3), d.pick(4, 6)
    return d.normal(*d.pick((b, m, n), (b, 1, n), (1, n), (n,))), d.normal(b, m, k), d.normal(b, k, n)


def _losses(d: Draw) -> tuple[Any, ...]:
    shape = d.shape()
    return d.normal(*shape), (d.positive(*shape) - 0.5)


def _bounded(d: Draw) -> tuple[Any, ...]:
    shape = d.shape()
    return (d.positive(*shape) - 0.5) * 0.8 + 0.1, d.positive(*shape) - 0.5, None, 0


def _three(d: Draw) -> tuple[Any, ...]:
    shape = d.shape()
    return d.normal(*shape), d.positive(*d.narrowed(shape)), d.positive(*d.narrowed(shape))


def _unit(d: Draw) -> tuple[Any, ...]:
    return ((d.positive(*d.shape()) - 0.5) * 0.8 + 0.1,)


def _pair(d: Draw) -> tuple[Any, ...]:
    shape = d.shape()
    return d.positive(*shape), d.positive(*d.narrowed(shape))


def _prelu(d: Draw) -> tuple[Any, ...]:
    channels = d.size()
    return d.normal(d.size(), channels, *d.shape(0, 1)), d.normal(d.pick(channels, channels, 1))


def _einsum(d: Draw) -> tuple[Any, ...]:
    sizes = {name: d.pick(4, 3, 2) for name in "bqkhd"}
    equation = d.pick("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "bq,qd->bd", "bqd->bq", "bqd,bd->")
    terms = equation.partition("->")[0].split(",")
    return equation, [d.normal(*(sizes[name] for name in term)) for term in terms]


def _resized(dims: int) -> Callable[[Draw], tuple[Any, ...]]:
    return lambda d: (d.normal(d.size(), d.size(), *[3] * dims), [d.pick(4, 6)] * dims)


def _rolled(d: Draw) -> tuple[Any, ...]:
    x = d.any(2)
    return x, d.pick([1], [2]), d.pick([0], [-1], [1])


def _numbers(shape: tuple[int, ...]) -> tuple[Any, ...]:
    return torch.tensor(len(shape)), [torch.arange(extent) for extent in shape]


def _dropout(d: Draw, x: Tensor) -> tuple[Any, ...]:
    return x, *_numbers(x.shape), d.pick(0.1, 0.5)


_POLYNOMIALS = """chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w
shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v
shifted_chebyshev_polynomial_w hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l
legendre_polynomial_p""".split()

MORE: list[Drawn] = [
    *((f"special_{name}.default", 1, lambda d: (d.normal(4, 6).tanh(), d.ids(4, 6).double())) for name in _POLYNOMIALS),
    *((f"special_{name}.n_scalar", 1, lambda d: (d.normal(4, 6).tanh(), 3)) for name in _POLYNOMIALS),
    *((f"special_{name}.x_scalar", 1, lambda d: (0.5, d.ids(4, 4, 6).double())) for name in _POLYNOMIALS),
    (
        """leaky_relu.default hardtanh.default relu6.default hardsigmoid.default hardswish.default softplus.default
        elu.default celu.default selu.default mish.default log_sigmoid.default square.default expm1.default exp2.default
        sinh.default cosh.default atan.default asinh.default erfc.default floor.default ceil.default round.default
        trunc.default sign.default sgn.default frac.default nan_to_num.default isnan.default isinf.default
        isfinite.default signbit.default hardshrink.default softshrink.default""",
        4,
        lambda d: (d.any(),),
    ),
    ("asin.default acos.default atanh.default erfinv.default tan.default logit.default log1p.default", 4, _unit),
    ("log2.default log10.default", 4, lambda d: (d.positive(*d.shape()),)),
    ("any.dims all.dims", 6, lambda d: (d.mask(*d.shape(2)), d.pick([0], [0, 1], [1]), d.pick(True, False))),
    ("nanmedian.dim", 6, lambda d: (d.any(1), d.pick(0, -1), d.pick(True, False))),
    ("nanmedian.default", 4, lambda d: (d.any(),)),
    (
        """__lshift__.Scalar __rshift__.Scalar bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor_Scalar""",
        2,
        lambda d: (d.ids(9, *d.shape()), 1),
    ),
    (
        "bitwise_and.Scalar_Tensor bitwise_or.Scalar_Tensor bitwise_xor.Scalar_Tensor",
        2,
        lambda d: (9, d.ids(9, *d.shape())),
    ),
    ("bitwise_left_shift.Scalar_Tensor bitwise_right_shift.Scalar_Tensor", 2, lambda d: (9, d.ids(3, *d.shape()))),
    (
        """__lshift__.Tensor __rshift__.Tensor bitwise_left_shift.Tensor bitwise_right_shift.Tensor gcd.default
        lcm.default""",
        4,
        lambda d: (d.ids(9, 4, 6), d.ids(3, 6)),
    ),
    ("copysign.Scalar", 4, lambda d: (d.any(), -1.0)),
    ("frexp.Tensor", 4, lambda d: (d.positive(*d.shape()),)),
    ("igamma.default igammac.default special_zeta.default", 4, lambda d: (d.ids(3, 4, 6) + 2, d.positive(6) + 1)),
    ("isclose.default nextafter.default", 4, _pair),
    ("special_zeta.other_scalar", 4, lambda d: (d.ids(3, *d.shape()) + 2, 2.5)),
    ("remainder.Scalar_Tensor", 4, lambda d: (7, d.ids(3, *d.shape()) + 1)),
    ("view.dtype", 6, lambda d: (d.any(1), d.pick(torch.int64, torch.int32))),
    ("acosh.default", 4, lambda d: (d.positive(*d.shape()) + 1,)),
    ("round.decimals", 4, lambda d: (d.any(), {"decimals": 1})),
    ("threshold.default", 4, lambda d: (d.any(), 0.1, 0.5)),
    ("logical_xor.default bitwise_xor.Tensor __xor__.Tensor", 4, lambda d: (d.mask(4, 3), d.mask(4, 3))),
    ("bitwise_xor.Scalar __xor__.Scalar", 4, lambda d: (d.ids(4, *d.shape()), 2)),
    ("floor_divide.default", 6, lambda d: (d.ids(9, 4, 6), d.ids(3, 6) + 1)),
    ("floor_divide.Scalar", 6, lambda d: (d.ids(9, 4, 6), 2)),
    ("div.Tensor_mode", 6, lambda d: (d.ids(9, 4, 6), d.ids(3, 6) + 1, {"rounding_mode": "floor"})),
    ("div.Scalar_mode", 6, lambda d: (d.ids(9, 4, 6), 2, {"rounding_mode": "trunc"})),
    ("remainder.Scalar fmod.Scalar", 6, lambda d: (d.any(), 0.7)),
    ("remainder.Tensor fmod.Tensor", 6, lambda d: (d.any(), torch.tensor(0.7, dtype=torch.float64))),
    ("min.other max.other fmin.default fmax.default clamp_min.Tensor clamp_max.Tensor", 8, _pair),
    ("clamp_min.default clamp_max.default", 6, lambda d: (d.any(), 0.1)),
    ("clamp.Tensor", 6, lambda d: (d.normal(4, 6), -d.positive(6), d.positive(6))),
    ("pow.Tensor_Tensor atan2.default hypot.default logaddexp.default xlogy.Tensor", 8, _pair),
    ("pow.Scalar", 6, lambda d: (2.0, d.any())),
    ("addcmul.default addcdiv.default", 8, _three),
    ("lerp.Scalar", 8, lambda d: (*_pair(d), 0.3)),
    ("lerp.Tensor", 8, _three),
    ("glu.default", 8, lambda d: (d.normal(*d.shape(0, 2), d.pick(8, 12, 6)), -1)),
    ("prelu.default", 8, _prelu),
    ("_prelu_kernel.default", 8, _pair),
    ("baddbmm.default", 10, _baddbmm),
    ("mv.default", 6, lambda d: (d.normal(4, 6), d.normal(6))),
    ("dot.default", 6, lambda d: (d.normal(12), d.normal(12))),
    ("outer.default", 6, lambda d: (d.normal(4), d.normal(6))),
    ("einsum.default", 12, _einsum),
    *((f"conv{n}d.default", 10, _convolution(n, False)) for n in (1, 2, 3)),
    *((f"conv{n}d.padding", 4, _padded_convolution(n)) for n in (1, 2, 3)),
    *(
        (f"conv_transpose{n}d.{end}", 8, _convolution(n, True))
        for n, end in ((1, "default"), (2, "input"), (3, "input"))
    ),
    ("convolution.default", 8, _plain_convolution),
    *((f"max_pool{n}d.default avg_pool{n}d.default", 6, _pooled(n)) for n in (1, 2, 3)),
    *((f"max_pool{n}d_with_indices.default", 6, _pooled(n)) for n in (2, 3)),
    *((f"adaptive_avg_pool{n}d.default", 4, lambda d, n=n: (_image(d, n), [2] * n)) for n in (1, 2, 3)),
    *((f"adaptive_max_pool{n}d.default", 4, lambda d, n=n: (_image(d, n), [2] * n)) for n in (2, 3)),
    ("_adaptive_avg_pool2d.default", 4, lambda d: (_image(d, 2), [2, 2])),
    ("upsample_nearest1d.default _upsample_nearest_exact1d.default", 4, _resized(1)),
    ("upsample_nearest1d.vec _upsample_nearest_exact1d.vec", 4, lambda d: (*_resized(1)(d), None)),
    ("upsample_linear1d.default", 4, lambda d: (*_resized(1)(d), False)),
    ("upsample_linear1d.vec", 4, lambda d: (*_resized(1)(d), False, None)),
    ("upsample_nearest2d.default _upsample_nearest_exact2d.default", 4, _resized(2)),
    ("upsample_nearest2d.vec _upsample_nearest_exact2d.vec", 4, lambda d: (*_resized(2)(d), None)),
    ("upsample_bilinear2d.default upsample_bicubic2d.default", 4, lambda d: (*_resized(2)(d), False)),
    ("upsample_bilinear2d.vec upsample_bicubic2d.vec", 4, lambda d: (*_resized(2)(d), False, None)),
    (
        "_upsample_bilinear2d_aa.default _upsample_bicubic2d_aa.default",
        4,
        lambda d: (*_resized(2)(d), False),
    ),
    ("_upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec", 4, lambda d: (*_resized(2)(d), False, None)),
    ("upsample_nearest3d.default _upsample_nearest_exact3d.default", 4, _resized(3)),
    ("upsample_nearest3d.vec _upsample_nearest_exact3d.vec", 4, lambda d: (*_resized(3)(d), None)),
    ("upsample_trilinear3d.default", 4, lambda d: (*_resized(3)(d), False)),
    ("upsample_trilinear3d.vec", 4, lambda d: (*_resized(3)(d), False, None)),
    ("reflection_pad1d.default replication_pad1d.default", 4, lambda d: (d.normal(4, d.size(), 5), [1, 2])),
    ("reflection_pad2d.default replication_pad2d.default", 4, lambda d: (d.normal(4, d.size(), 5, 4), [1, 2, 1, 1])),
    ("pixel_shuffle.default", 6, lambda d: (d.normal(d.size(), 4 * d.size(), 2, 3), 2)),
    ("pixel_unshuffle.default", 6, lambda d: (d.normal(d.size(), d.size(), 4, 6), 2)),
    ("im2col.default", 6, lambda d: (d.normal(d.size(), d.size(), 5, 4), [2, 2], [1, 1], [0, 0], [1, 1])),
    (
        "col2im.default",
        6,
        lambda d: (d.normal(d.size(), 4 * d.size(), 12), [5, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    ),
    (
        "grid_sampler.default grid_sampler_2d.default",
        4,
        lambda d: (d.normal(4, d.size(), 4, 4), d.normal(4, 3, 2, 2), 0, 0, False),
    ),
    ("grid_sampler_3d.default", 4, lambda d: (d.normal(4, d.size(), 4, 4, 4), d.normal(4, 3, 2, 2, 3), 0, 0, False)),
    ("group_norm.default", 10, _group_norm),
    ("batch_norm.default", 10, _batch_norm),
    ("instance_norm.default", 6, _instance_norm),
    ("autopar.batch_norm.default", 6, lambda d: (d.normal(4, 6, 3), d.normal(6), d.normal(6), 1e-5, 1)),
    ("autopar.experts.default", 10, _experts),
    ("autopar.ctc.default", 10, _ctc),
    ("autopar.collect.default", 6, lambda d: (d.any(0), 0)),
    ("autopar.replica_sum.default autopar.replica_share.default", 6, lambda d: (d.any(0), 1)),
    ("autopar.written.default", 6, lambda d: (d.any(0), d.normal(2, 3), d.normal(2, 3), 1)),
    ("autopar.replica_gather.default", 6, lambda d: (d.normal(4, d.size(), 3), 0, d.pick(1, 2), d.pick(1, 2))),
    ("autopar.dropout.default", 20, lambda d: _dropout(d, d.any(0))),
    (
        "autopar.uniform.default autopar.normal.default autopar.random_integers.default",
        10,
        lambda d: _numbers(d.shape(0)),
    ),
    ("topk.default", 8, lambda d: (_distinct(d, *d.shape(1, 2), 6), d.pick(1, 2), -1)),
    ("sort.default argsort.default max.dim min.dim median.dim mode.default argmin.default", 6, _ordered),
    ("sort.stable argsort.stable", 4, lambda d: (_ordered(d)[0], {"stable": True, "dim": 0})),
    ("cummax.default cummin.default cumprod.default logcumsumexp.default", 6, _ordered),
    ("kthvalue.default", 6, lambda d: (_distinct(d, *d.shape(1, 2), 4), 2)),
    ("amin.default logsumexp.default prod.dim_int", 6, lambda d: (_distinct(d, *d.shape(1, 2), 4) + 1, -1)),
    ("max.default min.default median.default prod.default", 6, lambda d: (_distinct(d, 4, 3) + 1,)),
    ("var.dim std.dim", 6, lambda d: (d.normal(*d.shape(1, 2), 4), [-1])),
    ("var.default std.default", 4, lambda d: (d.normal(4, 3),)),
    (
        "var.correction std.correction var_mean.correction std_mean.correction",
        6,
        lambda d: (d.normal(*d.shape(1, 2), 4), [-1], {"correction": 1, "keepdim": d.pick(True, False)}),
    ),
    ("linalg_vector_norm.default", 6, lambda d: (_statistic(d)[0], 2, *_statistic(d)[1:])),
    ("norm.ScalarOpt_dim", 6, lambda d: (_statistic(d)[0], 2, [-1])),
    ("norm.Scalar", 4, lambda d: (d.positive(4, 3),)),
    ("roll.default", 8, _rolled),
    ("flip.default", 6, lambda d: (d.any(2), d.pick([0], [-1], [0, 1]))),
    ("gather.default", 12, _gather),
    ("index_select.default", 8, _index_select),
    ("scatter.value", 8, lambda d: _scatter(d, True)),
    ("scatter.src scatter_add.default", 8, lambda d: _scatter(d, False)),
    ("index_add.default index_copy.default", 8, _index_add),
    ("scatter_reduce.two", 12, _scatter_reduce),
    ("index_reduce.default", 8, _index_reduce),
    ("index_fill.int_Scalar", 6, lambda d: _index_fill(d, 2.0)),
    ("index_fill.int_Tensor", 6, lambda d: _index_fill(d, torch.tensor(2.0, dtype=torch.float64))),
    ("index_put.default", 8, _index_put),
    ("one_hot.default", 6, lambda d: (d.ids(5, *d.shape()), 5)),
    ("repeat.default", 10, _repeat),
    ("repeat_interleave.self_int", 10, _repeat_interleave),
    ("slice_scatter.default", 8, _slice_scatter),
    ("select_scatter.default", 8, _select_scatter),
    ("swapaxes.default swapdims.default", 6, lambda d: (d.any(2), 0, -1)),
    ("movedim.int", 6, lambda d: (d.any(3, 4), d.pick(0, 2), d.pick(-1, 0))),
    ("numpy_T.default", 4, lambda d: (d.any(1, 3),)),
    ("diagonal.default", 6, lambda d: (d.any(2, 3), 0, 0, -1)),
    ("diagonal_scatter.default", 6, _diagonal_scatter),
    ("unfold.default", 6, lambda d: (d.normal(*d.shape(1, 2), 6), -1, 2, 2)),
    ("linspace.default logspace.default", 4, lambda d: (0.0, 1.0, d.pick(4, 6))),
    ("eye.default", 4, lambda d: (d.pick(4, 6),)),
    (
        "bartlett_window.default blackman_window.default hamming_window.default kaiser_window.default",
        2,
        lambda d: (d.pick(4, 6),),
    ),
    (
        "bartlett_window.periodic blackman_window.periodic hamming_window.periodic kaiser_window.periodic",
        2,
        lambda d: (d.pick(4, 6), False),
    ),
    ("hamming_window.periodic_alpha kaiser_window.beta", 2, lambda d: (6, True, 0.6)),
    ("hamming_window.periodic_alpha_beta", 2, lambda d: (6, False, 0.6, 0.4)),
    ("eye.m", 4, lambda d: (4, 6)),
    ("tril_indices.default triu_indices.default", 4, lambda d: (4, 4)),
    (
        "mse_loss.default l1_loss.default smooth_l1_loss.default huber_loss.default soft_margin_loss.default",
        6,
        lambda d: (*_losses(d), 0),
    ),
    ("binary_cross_entropy_with_logits.default", 6, lambda d: (*_losses(d), None, None, 0)),
    ("binary_cross_entropy.default", 6, _bounded),
    ("kl_div.default", 6, lambda d: (*_losses(d), 0)),
    ("poisson_nll_loss.default", 6, lambda d: (*_losses(d), True, False, 1e-8, 0)),
    ("margin_ranking_loss.default", 6, lambda d: (d.normal(4, 3), d.normal(4, 3), d.normal(4, 3).sign(), 0.1, 0)),
    ("hinge_embedding_loss.default", 6, lambda d: (d.normal(4, 3), d.normal(4, 3).sign(), 1.0, 0)),
    ("_fft_c2c.default", 6, lambda d: _transformed(_complex(d), d.pick(True, False))),
    ("_fft_r2c.default", 6, lambda d: _transformed(d.normal(*d.shape(1, 2), 4), True)),
    ("_fft_c2r.default", 6, lambda d: _transformed(_complex(d), 4)),
    ("view_as_real.default conj_physical.default angle.default", 6, lambda d: (_complex(d),)),
    ("complex.default polar.default", 6, lambda d: tuple(d.positive(*shape) for shape in [d.shape()] * 2)),
    (
        """digamma.default lgamma.default special_erfcx.default special_ndtri.default special_i0e.default i0.default
        special_i1.default special_i1e.default""",
        6,
        lambda d: (d.positive(*d.shape()).tanh(),),
    ),
    (
        """special_bessel_j0.default special_bessel_j1.default special_bessel_y0.default special_bessel_y1.default
        special_modified_bessel_i0.default special_modified_bessel_i1.default special_modified_bessel_k0.default
        special_modified_bessel_k1.default special_scaled_modified_bessel_k0.default
        special_scaled_modified_bessel_k1.default special_spherical_bessel_j0.default special_airy_ai.default""",
        2,
        lambda d: (d.positive(*d.shape()),),
    ),
    ("polygamma.default", 4, lambda d: (1, d.positive(*d.shape()))),
    ("copysign.Tensor ldexp.Tensor", 6, lambda d: tuple(d.normal(*shape) for shape in [d.shape()] * 2)),
    ("searchsorted.Tensor", 8, _searched),
    ("bucketize.Tensor", 4, lambda d: (d.normal(*d.shape()), torch.linspace(-1, 1, 5).double())),
    (
        """linalg_cholesky_ex.default linalg_inv_ex.default _linalg_det.default _linalg_slogdet.default
        linalg_matrix_exp.default linalg_lu_factor_ex.default cholesky_inverse.default""",
        6,
        lambda d: (_definite(d),),
    ),
    ("special_zeta.self_scalar", 4, lambda d: (2.5, d.positive(*d.shape()) + 1)),
    ("triangular_solve.default", 6, lambda d: _solved(d)[::-1]),
    ("linalg_lu.default", 6, lambda d: (_definite(d),)),
    ("linalg_householder_product.default", 6, lambda d: torch.geqrf(_definite(d))),
    ("linalg_pinv.atol_rtol_tensor", 6, lambda d: (_definite(d),)),
    ("linalg_qr.default", 6, lambda d: (_definite(d), "reduced")),
    ("_linalg_svd.default", 6, lambda d: (_definite(d), False, True)),
    ("_linalg_eigh.default", 6, lambda d: (_definite(d), "L", True)),
    ("_linalg_solve_ex.default", 6, _solved),
    ("linalg_lu_solve.default", 6, _solved_by_factors),
    ("cholesky_solve.default", 6, lambda d: _solved(d)[::-1]),
    ("linalg_solve_triangular.default", 6, lambda d: (*_solved(d), {"upper": True})),
    ("_cdist_forward.default", 6, lambda d: (d.normal(4, 6, 3), d.normal(4, 2, 3), 2.0, None)),
    ("linalg_cross.default", 6, lambda d: (d.normal(4, 3), d.normal(4, 3), {"dim": -1})),
]
"""Like ``op_draws.DRAWN``."""
