"""Factor maps: which index of an op's iteration space each dim of each tensor is made of.

``linear: "... k, n k -> ... n"`` says all a planner needs: sharding factor ``n`` shards the weight and
the output, sharding ``k`` shards both inputs and leaves a Partial output. The form follows XLA Shardy's
sharding rules; a dim may be a product of factors in row-major order, "(q c)", as views need it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from cost_model.placement import PARTIAL, REPLICATE, VARYING, Partial, Placement, Replicate, Shard, Varying
from cost_model.tensor import TensorMeta

Dims = tuple[tuple[str, ...], ...]
NO_SIZES: Mapping[str, int] = {}


@dataclass(frozen=True)
class FactorMap:
    """sizes: factor -> extent. inputs / outputs: per tensor, per dim, the factors it is made of (outermost first).

    whole: factors that may not be split.
    inside: factors that may be split because the op's own collectives finish the reduction; the outputs
      that lack them are then Replicate, not Partial, and inputs that lack them stay Replicate.
    ordered: factors that may only be split in consecutive runs (their indices are compared with rank offsets).
    halo: factors whose neighbours are exchanged by the op itself where they are split, with the least extent of a part.
    addends: inputs added to the result of a contraction; while a contracted factor is split they are Partial.
    linear: sets of inputs which, Partial together (all other inputs Varying), give Partial outputs.
    A factor in no output is contracted (summed): splitting it gives Partial outputs.
    """

    sizes: Mapping[str, int] = field(hash=False)
    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    whole: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()
    ordered: frozenset[str] = frozenset()
    halo: Mapping[str, int] = field(default_factory=dict, hash=False)
    addends: frozenset[int] = frozenset()
    linear: tuple[frozenset[int], ...] = ()

    def splittable(self, factor: str) -> bool:
        return factor not in self.whole


@dataclass(frozen=True)
class Strategy:
    """One op's choice on one axis: the placement it wants of each input and gives each output.

    factor: what is split ("" if nothing is); inside: whether the op's own collectives finish it; parts: the smallest
    equal parts that it has; most_ranks: among how many it can be split, where that is fewer, else 0.
    """

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    factor: str = ""
    inside: bool = False
    parts: int = field(default=0, compare=False)
    most_ranks: int = 0

    def can_be_split(self, ranks: int) -> bool:
        """Whether so many ranks can have a part each."""
        return self.parts % ranks == 0 and not (self.most_ranks and ranks > self.most_ranks)


def _terms(side: str) -> list[list[list[str]]]:
    """ "b (q c), n" -> [[["b"], ["q", "c"]], [["n"]]]."""
    tensors = []
    for text in side.split(","):
        tokens = re.findall(r"\([^)]*\)|\.\.\.|[^\s()]+", text)
        tensors.append([t.strip("()").split() if t.startswith("(") else [t] for t in tokens])
    return tensors


def _expand(dims: list[list[str]], meta: TensorMeta) -> list[list[str]]:
    """Replace "..." by factors named from the right ("_1" is the last), so that operands align as in broadcasting."""
    rank = len(meta.shape)
    if ["..."] in dims:
        at = dims.index(["..."])
        extra = rank - (len(dims) - 1)
        assert extra >= 0, (dims, meta)
        dims = dims[:at] + [[f"_{extra - i}"] for i in range(extra)] + dims[at + 1 :]
    assert len(dims) == rank, (dims, meta)
    return dims


def _bind_single(names: list[str], extent: int, sizes: dict[str, int]) -> None:
    if len(names) == 1 and extent != 1:
        known = sizes.setdefault(names[0], extent)
        assert known == extent, (names, known, extent)


def _bind_product(names: list[str], extent: int, sizes: dict[str, int]) -> None:
    """Infer the one unknown factor of a product, if there is one, and check it; a dim of size 1 broadcasts."""
    if len(names) == 1 or extent == 1:
        return
    unknown = [name for name in names if name not in sizes]
    known = math.prod(sizes[name] for name in names if name in sizes)
    assert len(unknown) <= 1 and extent % known == 0, (names, extent, sizes)
    if unknown:
        sizes[unknown[0]] = extent // known
    assert math.prod(sizes[name] for name in names) == extent, (names, extent, sizes)


def _factors(names: list[str], extent: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """A dim's factors; those of size 1, and dims of size 1 (which broadcast), carry none."""
    return () if extent == 1 else tuple(name for name in names if sizes[name] != 1)


def parse_map(
    notation: str,
    inputs: tuple[TensorMeta, ...],
    outputs: tuple[TensorMeta, ...],
    *,
    whole: str = "",
    inside: str = "",
    ordered: str = "",
    halo: Mapping[str, int] = NO_SIZES,
    addends: tuple[int, ...] = (),
    linear: tuple[tuple[int, ...], ...] = (),
    sizes: Mapping[str, int] = NO_SIZES,
) -> FactorMap:
    """Bind an einsum-like notation to real shapes; "..." stands for any leading dims, aligned from the right.

    sizes: extents that the shapes alone do not tell, as of one factor of a product "(q c)".
    """
    more = (tuple(halo.items()), tuple(addends), tuple(linear), tuple(sizes.items()))
    return _parsed(notation, inputs, outputs, whole, inside, ordered, *more)


@functools.lru_cache(maxsize=4096)
def _parsed(
    notation: str,
    inputs: tuple[TensorMeta, ...],
    outputs: tuple[TensorMeta, ...],
    whole: str,
    inside: str,
    ordered: str,
    halo: tuple[tuple[str, int], ...],
    addends: tuple[int, ...],
    linear: tuple[tuple[int, ...], ...],
    sizes: tuple[tuple[str, int], ...],
) -> FactorMap:
    """What ``parse_map`` says; a deep model asks for the same many times."""
    left, right = notation.split("->")
    terms = [*(_terms(left) if inputs else []), *(_terms(right) if outputs else [])]
    metas = (*inputs, *outputs)
    tensors = [_expand(dims, meta) for dims, meta in zip(terms, metas, strict=True)]
    known = dict(sizes)
    for bind in (_bind_single, _bind_product):
        for dims, meta in zip(tensors, metas, strict=True):
            for names, extent in zip(dims, meta.shape, strict=True):
                bind(names, extent, known)
    bound = tuple(
        tuple(_factors(names, extent, known) for names, extent in zip(dims, meta.shape, strict=True))
        for dims, meta in zip(tensors, metas, strict=True)
    )
    used = {factor for tensor in bound for dim in tensor for factor in dim}
    return FactorMap(
        sizes={name: extent for name, extent in known.items() if name in used},
        inputs=bound[: len(inputs)],
        outputs=bound[len(inputs) :],
        whole=frozenset(whole.split()) & used,
        inside=frozenset(inside.split()) & used,
        ordered=frozenset(ordered.split()) & used,
        halo={name: least for name, least in halo if name in used},
        addends=frozenset(addends),
        linear=tuple(frozenset(group) for group in linear),
    )


def _locate(dims: Dims, factor: str, sizes: Mapping[str, int]) -> tuple[int, int] | None:
    """(dim, product of the factors outside it in that dim) of a factor in a tensor."""
    for dim, names in enumerate(dims):
        outer = 1
        for name in names:
            if name == factor:
                return dim, outer
            outer *= sizes[name]
    return None


def _place(dims: Dims, factor: str, outer: int, sizes: Mapping[str, int]) -> Shard | None:
    found = _locate(dims, factor, sizes)
    return None if found is None else Shard(found[0], found[1] * outer)


def split_factor(rule: FactorMap, factor: str, outer: int, size: int) -> Strategy | None:
    """The strategy that splits ``factor`` (as outer x n x inner, n over ``size`` ranks); None if it is not offered."""
    extent = rule.sizes[factor]
    if not rule.splittable(factor) or extent == 0 or extent % (outer * size):
        return None
    if factor in rule.ordered and outer != 1:
        return None
    if factor in rule.halo and (outer != 1 or extent // size < rule.halo[factor]):
        return None
    shards_out = [_place(dims, factor, outer, rule.sizes) for dims in rule.outputs]
    shards_in = [_place(dims, factor, outer, rule.sizes) for dims in rule.inputs]
    if factor in rule.inside:
        return Strategy(
            tuple(s or REPLICATE for s in shards_in),
            tuple(s or REPLICATE for s in shards_out),
            factor,
            inside=True,
            parts=extent // outer,
        )
    contracted = all(s is None for s in shards_out)
    if not contracted and any(s is None for s in shards_out):
        return None
    inputs = tuple(s or (PARTIAL if contracted and i in rule.addends else VARYING) for i, s in enumerate(shards_in))
    most = extent // max(1, rule.halo[factor]) if factor in rule.halo else 0
    outputs = tuple(s or PARTIAL for s in shards_out)
    return Strategy(inputs, outputs, factor, factor in rule.halo, extent // outer, most)


def factor_of(rule: FactorMap, side: str, index: int, shard: Shard) -> tuple[str, int] | None:
    """(factor, outer within the factor) that ``shard`` of input or output ``index`` splits; None if it fits none."""
    dims = (rule.inputs if side == "in" else rule.outputs)[index]
    before = 1
    for name in dims[shard.dim]:
        extent = rule.sizes[name]
        if shard.outer % before == 0 and extent % (shard.outer // before) == 0 and shard.outer // before < extent:
            return name, shard.outer // before
        before *= extent
    return None


def unsplit_strategies(rule: FactorMap | None, num_inputs: int, num_outputs: int) -> tuple[Strategy, ...]:
    """Replicate, Varying, and the Partial strategies of linear ops."""
    fixed = [
        Strategy((REPLICATE,) * num_inputs, (REPLICATE,) * num_outputs),
        Strategy((VARYING,) * num_inputs, (VARYING,) * num_outputs),
    ]
    for group in rule.linear if rule else ():
        inputs = tuple(PARTIAL if i in group else VARYING for i in range(num_inputs))
        fixed.append(Strategy(inputs, (PARTIAL,) * num_outputs))
    return tuple(fixed)


__all__ = [
    "Dims",
    "FactorMap",
    "Partial",
    "Replicate",
    "Strategy",
    "Varying",
    "factor_of",
    "parse_map",
    "split_factor",
    "unsplit_strategies",
]
