"""Random calls of every plannable op on small shapes, among them sizes of 1 and sizes that no axis divides."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from more_draws import MORE

Tensor = torch.Tensor


class Draw:
    """Small shapes and the tensors of them."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        torch.manual_seed(data.draw(st.integers(0, 1000)))

    def pick(self, *options: Any) -> Any:
        return self.data.draw(st.sampled_from(options))

    def order(self, count: int) -> list[int]:
        """A permutation of 0 .. count - 1."""
        left = list(range(count))
        return [left.pop(self.pick(*range(len(left)))) for _ in range(count)]

    def size(self) -> int:
        return self.pick(4, 6, 3, 2, 1)

    def shape(self, low: int = 1, high: int = 3) -> tuple[int, ...]:
        return tuple(self.size() for _ in range(self.pick(*range(high, low - 1, -1))))

    def narrowed(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to ``shape``."""
        kept = shape[self.pick(*range(len(shape) + 1)) :]
        return tuple(self.pick(extent, extent, 1) for extent in kept)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64) + 0.5

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape)

    def mask(self, *shape: int) -> Tensor:
        return torch.randint(0, 2, shape) == 1

    def any(self, low: int = 1, high: int = 3) -> Tensor:
        return self.normal(*self.shape(low, high))


def _operands(d: Draw) -> tuple[Tensor, Tensor]:
    """Two operands, one of which broadcasts to the other."""
    shape = d.shape(1, 4)
    pair = d.positive(*shape), d.positive(*d.narrowed(shape))
    return pair if d.pick(True, False) else pair[::-1]


def _small_integers(d: Draw) -> tuple[Any, ...]:
    shape = d.shape()
    return d.ids(3, *shape), d.ids(3, *d.narrowed(shape))


def _masks(d: Draw) -> tuple[Any, ...]:
    shape = d.shape()
    return d.mask(*shape), d.mask(*d.narrowed(shape))


def _where(d: Draw) -> tuple[Any, ...]:
    shape = d.shape()
    return d.mask(*d.narrowed(shape)), d.normal(*shape), d.normal(*d.narrowed(shape))


def _where_number(d: Draw) -> tuple[Any, ...]:
    shape = d.shape()
    return d.mask(*d.narrowed(shape)), d.normal(*shape), -1.5


def _number_where(d: Draw) -> tuple[Any, ...]:
    shape = d.shape()
    return d.mask(*shape), -1.5, d.normal(*d.narrowed(shape))


def _masked_fill(d: Draw) -> tuple[Any, ...]:
    shape = d.shape()
    return d.normal(*shape), d.mask(*d.narrowed(shape)), -1.5


def _masked_fill_tensor(d: Draw) -> tuple[Any, ...]:
    shape = d.shape()
    return d.normal(*shape), d.mask(*d.narrowed(shape)), d.normal()


# Matrix multiplications.


def _linear(d: Draw) -> tuple[Any, ...]:
    k, n = d.size(), d.size()
    bias = (d.normal(n),) if d.pick(True, False) else ()
    return d.normal(*d.shape(), k), d.normal(n, k), *bias


def _addmm(d: Draw) -> tuple[Any, ...]:
    m, k, n = d.size(), d.size(), d.size()
    addend = d.normal(*d.pick((n,), (m, n), (1, n), (m, 1), ()))
    return addend, d.normal(m, k), d.normal(k, n), {"alpha": 2.0, "beta": d.pick(1.0, 0.5)}


def _mm(d: Draw) -> tuple[Any, ...]:
    m, k, n = d.size(), d.size(), d.size()
    return d.normal(m, k), d.normal(k, n)


def _bmm(d: Draw) -> tuple[Any, ...]:
    b, m, k, n = d.size(), d.size(), d.size(), d.size()
    return d.normal(b, m, k), d.normal(b, k, n)


def _matmul(d: Draw) -> tuple[Any, ...]:
    batch, m, k, n = d.shape(0, 2), d.size(), d.size(), d.size()
    left, right = d.pick((batch, batch), (batch, d.narrowed(batch)), (d.narrowed(batch), batch))
    left_shape, right_shape = d.pick(((*left, m, k), (*right, k, n)), ((k,), (*right, k, n)), ((*left, m, k), (k,)))
    return d.normal(*left_shape), d.normal(*right_shape)


# Views and copies.


def _regrouped(d: Draw) -> tuple[Tensor, list[int]]:
    """A tensor and another shape of as many elements."""
    shape = list(d.shape(2, 4))
    total = math.prod(shape)
    head = d.pick(*(n for n in range(1, total + 1) if total % n == 0))
    at = d.pick(*range(len(shape)))
    merged = [*shape[:at], *[math.prod(shape[at : at + 2])], *shape[at + 2 :]]
    return d.normal(*shape), d.pick(merged, [head, total // head], [total], [1, *shape], [*shape, 1])


def _unsqueeze(d: Draw) -> tuple[Any, ...]:
    x = d.any(0)
    return x, d.pick(*range(-x.ndim - 1, x.ndim + 1))


def _squeeze(d: Draw) -> tuple[Any, ...]:
    x = d.any()
    return x, d.pick(*range(-x.ndim, x.ndim))


def _flatten(d: Draw) -> tuple[Any, ...]:
    x = d.any(1, 4)
    start = d.pick(*range(x.ndim))
    return x, start, d.pick(*range(start, x.ndim), -1)


def _unflatten(d: Draw) -> tuple[Any, ...]:
    sizes = d.shape(2, 3)
    return d.normal(*d.shape(0, 2), math.prod(sizes)), -1, list(sizes)


def _expand(d: Draw) -> tuple[Any, ...]:
    shape = d.shape(1, 4)
    return d.normal(*d.narrowed(shape)), list(shape)


def _transpose(d: Draw) -> tuple[Any, ...]:
    x = d.any(1, 4)
    return x, d.pick(*range(-x.ndim, x.ndim)), d.pick(*range(x.ndim))


def _permute(d: Draw) -> tuple[Any, ...]:
    x = d.any(1, 4)
    return x, d.order(x.ndim)


def _select(d: Draw) -> tuple[Any, ...]:
    x = d.any()
    dim = d.pick(*range(-x.ndim, x.ndim))
    return x, dim, d.pick(*range(x.shape[dim]))


def _slice(d: Draw) -> tuple[Any, ...]:
    x = d.any()
    return x, d.pick(*range(-x.ndim, x.ndim)), *d.pick((0, 2**63 - 1), (None, None), (0, -1, 1), (1, 9), (0, 9, 2))


def _split(d: Draw) -> tuple[Any, ...]:
    x = d.normal(*d.shape(0, 2), d.pick(12, 8, 6, 5))
    return x, d.pick(3, 4, 2, 1, 12), x.ndim - 1


def _split_with_sizes(d: Draw) -> tuple[Any, ...]:
    sizes = d.pick([4, 4, 4], [4, 2], [6], [1, 1, 1])
    return d.normal(d.size(), sum(sizes)), sizes, 1


def _unbind(d: Draw) -> tuple[Any, ...]:
    x = d.any()
    return x, d.pick(*range(-x.ndim, x.ndim))


def _cat(d: Draw) -> tuple[Any, ...]:
    shape, size = d.shape(2, 3), d.size()
    return [d.normal(d.pick(size, size, d.size()), *shape) for _ in range(d.pick(2, 3, 1))], 0


def _stack(d: Draw) -> tuple[Any, ...]:
    shape = d.shape()
    return [d.normal(*shape) for _ in range(d.pick(2, 3, 1))], d.pick(*range(-len(shape) - 1, len(shape) + 1))


def _pad(d: Draw) -> tuple[Any, ...]:
    mode = d.pick(("constant", 0.0), ("constant", -2.0), ("constant", None))
    return d.any(2), d.pick([1, 0], [0, 0, 1, 2], [1, -1], [0, 0]), *mode


# Reductions, norms, attention.


def _dims(d: Draw, x: Tensor) -> list[int]:
    return d.pick([0], [-1], list(range(x.ndim)), [0, -1] if x.ndim > 1 else [0])


def _sum(d: Draw) -> tuple[Any, ...]:
    x = d.any()
    return x, _dims(d, x), d.pick(True, False)


def _cumsum(d: Draw) -> tuple[Any, ...]:
    x = d.any()
    return x, d.pick(*range(-x.ndim, x.ndim))


def _diff(d: Draw) -> tuple[Any, ...]:
    x = d.normal(*d.shape(0, 2), d.pick(4, 6, 2))
    extra = d.normal(*x.shape[:-1], d.pick(1, 2))
    return x, 1, -1, *d.pick((), (extra,), (None, extra), (extra, extra))


def _normalised(d: Draw, with_bias: bool, needs_weight: bool = False) -> tuple[Any, ...]:
    last = d.shape(1, 2)
    has_weight, has_bias = d.pick((True, True), (True, False), (False, False))
    weight = d.normal(*last) if has_weight or needs_weight else None
    bias = (d.normal(*last) if has_bias else None,) if with_bias else ()
    return d.normal(*d.shape(1, 2), *last), list(last), weight, *bias


def _softmax(d: Draw) -> tuple[Any, ...]:
    x = d.any(1, 4)
    return x, d.pick(*range(-x.ndim, x.ndim))


def _half_softmax(d: Draw) -> tuple[Any, ...]:
    return *_softmax(d), False


def _attended(d: Draw, groups: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """q, k, v and perhaps a mask; heads are a multiple (one of ``groups``) of those of k and v."""
    b, g, t, s, width = d.size(), d.pick(4, 2, 3, 1), d.pick(4, 3, 5), d.pick(4, 3, 5), d.pick(2, 4)
    h = g * d.pick(*groups)
    shape = (b, h, t, s)
    mask = d.pick(None, d.normal(*d.narrowed((b, h)), t, s), d.normal(t, s))
    mask = None if mask is None else mask.expand(*mask.shape[:-2], *shape[-2:])
    return (d.normal(b, h, t, width), d.normal(b, g, s, width), d.normal(b, g, s, width)), mask


def _scaled_dot_product_attention(d: Draw) -> tuple[Any, ...]:
    tensors, mask = _attended(d, (1, 2, 4))
    return *tensors, mask, 0.0, mask is None and d.pick(True, False), {"enable_gqa": True, "scale": d.pick(None, 0.3)}


def _fused_attention(d: Draw) -> tuple[Any, ...]:
    tensors, mask = _attended(d, (1,))
    return *tensors, mask, d.pick(True, False), None


# Lookups, losses, factories.


def _embedding(d: Draw) -> tuple[Any, ...]:
    rows = d.pick(6, 4, 12, 5)
    return d.normal(rows, d.size()), d.ids(rows, *d.shape(0, 2)), d.pick(-1, -1, 2)


def _index(d: Draw) -> tuple[Any, ...]:
    x = d.any(2, 4)
    taken = d.pick((0,), (x.ndim - 1,), (0, 1), (0, x.ndim - 1), (1,))
    shape = d.shape(0, 2)
    indices = [d.ids(x.shape[i], *d.narrowed(shape)) if i in taken else None for i in range(max(taken) + 1)]
    return x, indices


def _cross_entropy(d: Draw) -> tuple[Any, ...]:
    n, v = d.pick(4, 6, 3, 12), d.pick(6, 8, 12, 5)
    labels = d.ids(v, n).masked_fill(d.mask(n), -100)
    return d.normal(n, v), labels, -100, d.pick(0.0, 0.0, 0.1)


DRAWN: list[tuple[str, int, Callable[[Draw], tuple[Any, ...]]]] = [
    (
        "neg.default exp.default abs.default tanh.default relu.default silu.default sigmoid.default erf.default",
        6,
        lambda d: (d.any(),),
    ),
    ("cos.default sin.default detach.default alias.default clone.default contiguous.default", 6, lambda d: (d.any(0),)),
    ("log.default sqrt.default rsqrt.default reciprocal.default", 6, lambda d: (d.positive(*d.shape()),)),
    ("gelu.default", 20, lambda d: (d.any(), {"approximate": d.pick("none", "tanh")})),
    ("pow.Tensor_Scalar", 20, lambda d: (d.positive(*d.shape()), d.pick(2, 3.0, 1.7))),
    ("clamp.default", 20, lambda d: (d.any(), d.pick(None, -0.5), 0.7)),
    ("to.dtype", 20, lambda d: (d.any(), d.pick(torch.float32, torch.float64, torch.int64))),
    ("to.dtype_layout _to_copy.default", 8, lambda d: (d.any(), {"dtype": d.pick(torch.float32, torch.float64)})),
    ("mul.Tensor div.Tensor maximum.default minimum.default", 20, _operands),
    ("add.Tensor sub.Tensor rsub.Tensor", 20, lambda d: (*_operands(d), {"alpha": d.pick(1, 3)})),
    ("add.Scalar sub.Scalar rsub.Scalar mul.Scalar div.Scalar", 6, lambda d: (d.any(0), 2.5)),
    ("eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor", 6, _small_integers),
    (
        "eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar bitwise_and.Scalar bitwise_or.Scalar",
        6,
        lambda d: (d.ids(4, *d.shape()), 2),
    ),
    ("__and__.Scalar __or__.Scalar", 6, lambda d: (d.ids(4, *d.shape()), 2)),
    (
        "logical_and.default logical_or.default bitwise_and.Tensor bitwise_or.Tensor __and__.Tensor __or__.Tensor",
        6,
        _masks,
    ),
    ("logical_not.default bitwise_not.default", 6, lambda d: (d.mask(*d.shape()),)),
    ("where.self", 20, _where),
    ("where.ScalarOther", 20, _where_number),
    ("where.ScalarSelf", 20, _number_where),
    ("where.Scalar", 20, lambda d: (d.mask(*d.shape()), 1.5, 2.5)),
    ("masked_fill.Scalar", 20, _masked_fill),
    ("masked_fill.Tensor", 20, _masked_fill_tensor),
    ("linear.default", 40, _linear),
    ("addmm.default", 20, _addmm),
    ("mm.default", 20, _mm),
    ("bmm.default", 20, _bmm),
    ("matmul.default", 60, _matmul),
    ("view.default reshape.default _unsafe_view.default", 40, _regrouped),
    ("unsqueeze.default", 20, _unsqueeze),
    ("squeeze.default", 20, lambda d: (d.any(0, 4),)),
    ("squeeze.dim", 20, _squeeze),
    ("squeeze.dims", 20, lambda d: (d.any(2), [0, -1])),
    ("flatten.using_ints", 20, _flatten),
    ("unflatten.int", 20, _unflatten),
    ("expand.default", 20, _expand),
    ("transpose.int", 20, _transpose),
    ("permute.default", 20, _permute),
    ("t.default", 20, lambda d: (d.any(1, 2),)),
    ("select.int", 20, _select),
    ("slice.Tensor", 20, _slice),
    ("split.Tensor chunk.default", 40, _split),
    ("split_with_sizes.default", 20, _split_with_sizes),
    ("unbind.int", 20, _unbind),
    ("cat.default", 20, _cat),
    ("stack.default", 20, _stack),
    ("pad.default", 20, _pad),
    ("constant_pad_nd.default", 20, lambda d: (d.any(2), d.pick([1, 0], [0, 0, 1, 2]), d.pick(0, 3.0))),
    ("sum.default mean.default", 20, lambda d: (d.any(0),)),
    ("sum.dim_IntList mean.dim amax.default", 30, _sum),
    ("histc.default", 20, lambda d: (d.any(), 4, d.pick(-1, 0), d.pick(1, 2))),
    ("argmax.default any.default all.default", 6, lambda d: (d.any(),)),
    ("any.dim all.dim", 6, lambda d: (d.mask(*d.shape()), d.pick(0, -1), d.pick(True, False))),
    ("cumsum.default", 20, _cumsum),
    ("diff.default", 20, _diff),
    ("layer_norm.default native_layer_norm.default", 30, lambda d: (*_normalised(d, with_bias=True), 1e-5)),
    ("rms_norm.default _fused_rms_norm.default", 30, lambda d: (*_normalised(d, with_bias=False), 1e-5)),
    ("softmax.int log_softmax.int _safe_softmax.default", 20, _softmax),
    ("_softmax.default _log_softmax.default", 20, _half_softmax),
    ("scaled_dot_product_attention.default", 60, _scaled_dot_product_attention),
    ("autopar.attention.default", 60, _fused_attention),
    ("embedding.default", 60, _embedding),
    ("index.Tensor", 60, _index),
    ("autopar.cross_entropy_sum.default", 60, _cross_entropy),
    ("autopar.count_labels.default", 30, lambda d: (d.ids(3, d.pick(4, 6, 12, 5, 1)), 1)),
    ("arange.default", 6, lambda d: (d.size(),)),
    ("arange.start", 6, lambda d: (1, 7)),
    ("arange.start_step", 6, lambda d: (1, 13, 2)),
    ("full.default", 6, lambda d: (list(d.shape()), 3.0)),
    ("zeros.default ones.default", 6, lambda d: (list(d.shape(0)),)),
    ("scalar_tensor.default", 1, lambda d: (3.0,)),
    ("new_zeros.default new_ones.default", 6, lambda d: (d.any(), list(d.shape(0)))),
    ("new_full.default", 6, lambda d: (d.any(), list(d.shape(0)), 2.0)),
    ("zeros_like.default ones_like.default", 6, lambda d: (d.any(),)),
    ("full_like.default", 6, lambda d: (d.any(), 2.0)),
    ("tril.default triu.default", 20, lambda d: (d.any(2, 4), d.pick(0, 1, -1))),
]

"""(ops, examples each, their positional arguments, a last dict being keyword arguments)"""
CALLS = {
    name if name.startswith("autopar.") else f"aten.{name}": draw
    for names, _, draw in (*DRAWN, *MORE)
    for name in names.split()
}
EXAMPLES = {
    name if name.startswith("autopar.") else f"aten.{name}": count
    for names, count, _ in (*DRAWN, *MORE)
    for name in names.split()
}


def drawn_arguments(name: str, data: st.DataObject) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one call."""
    drawn = CALLS[name](Draw(data))
    return (drawn[:-1], drawn[-1]) if drawn and isinstance(drawn[-1], dict) else (drawn, {})
