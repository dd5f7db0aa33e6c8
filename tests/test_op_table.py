"""Every factor map is proved by execution: shards run, results and gradients joined, compared with the whole.

One process plays all ranks. For each op, random small shapes; for each strategy on axes of 2, 3 and 4 ranks, inputs
are placed, each rank runs the op on its own, and outputs and gradients must mean what their placements say.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from effort import drawn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cost_model.factors import FactorMap, Strategy, split_factor, unsplit_strategies
from cost_model.ops import OPS, OpCall
from cost_model.ops.table import backward_only
from cost_model.placement import Partial, Placement, Shard, Varying, local_shape

sys.path.append(str(Path(__file__).parent))
from op_calls import Case, attention
from op_draws import CALLS, EXAMPLES, drawn_arguments

Tensor = torch.Tensor
AXIS_SIZES = (2, 3, 4)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are tiny: threads only cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- Placements -----------------------------------------------------------------------------------------------------


def shard(x: Tensor, place: Shard, size: int, rank: int) -> Tensor:
    parts = x.unflatten(place.dim, (place.outer, size, -1)).select(place.dim + 1, rank)
    return parts.flatten(place.dim, place.dim + 1).contiguous()


def joined(parts: list[Tensor], place: Shard) -> Tensor:
    split = [p.unflatten(place.dim, (place.outer, -1)) for p in parts]
    return torch.stack(split, place.dim + 1).flatten(place.dim, place.dim + 2)


def differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def parts_of(x: Tensor, size: int) -> list[Tensor]:
    """``size`` random tensors whose sum is ``x``."""
    draw = torch.randn_like if differentiable(x) else lambda t: torch.randint_like(t, -5, 5)
    first = [draw(x) for _ in range(size - 1)]
    return [*first, x - sum(first)]


def values(x: Tensor, place: Placement, size: int) -> list[Tensor]:
    """Each rank's value of ``x`` in a placement."""
    if isinstance(place, Shard):
        return [shard(x, place, size, rank) for rank in range(size)]
    return parts_of(x, size) if isinstance(place, Partial) else [x.clone() for _ in range(size)]


def gradients(g: Tensor, place: Placement, size: int) -> list[Tensor]:
    """Each rank's gradient of a tensor in a placement, of the whole gradient ``g``."""
    if isinstance(place, Shard):
        return [shard(g, place, size, rank) for rank in range(size)]
    return parts_of(g, size) if isinstance(place, Varying) and differentiable(g) else [g] * size


def assert_means(parts: list[Tensor], whole: Tensor, sums: type, place: Placement, tolerance: float) -> None:
    """Shards reassemble, parts in the placement ``sums`` add up, all others are equal."""
    limits = {"rtol": tolerance, "atol": tolerance}
    if isinstance(place, Shard):
        torch.testing.assert_close(joined(parts, place), whole, **limits)
    elif isinstance(place, sums):
        torch.testing.assert_close(sum(parts[1:], parts[0]), whole, check_dtype=False, **limits)
    else:
        for part in parts:
            torch.testing.assert_close(part, whole, **limits)


# --- Execution ------------------------------------------------------------------------------------------------------


def backward(outputs: list[Tensor], inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the inputs that require one (None of others, and of those the outputs do not depend on)."""
    pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    sources, seeds = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(sources, wanted, seeds, allow_unused=True))
    return [next(grads) if x.requires_grad else None for x in inputs]


NO_GRADIENT = {
    "aten.batch_norm.default": (3, 4),
    "aten.instance_norm.default": (3, 4),
    "aten.soft_margin_loss.default": (1,),
}
"""Operands torch gives no gradient of."""


def leaves(tensors: Sequence[Tensor], name: str = "") -> list[Tensor]:
    wanted = [differentiable(t) and i not in NO_GRADIENT.get(name, ()) for i, t in enumerate(tensors)]
    return [t.detach().clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]


Run = tuple[list[list[Tensor]], list[list[Tensor | None]]]
"""Outputs and input gradients of every rank."""


def run_ranks(case: Case, strategy: Strategy, size: int, upstream: list[Tensor]) -> Run:
    placed = [values(t, p, size) for t, p in zip(case.tensors, strategy.inputs, strict=True)]
    ups = [gradients(g, p, size) for g, p in zip(upstream, strategy.outputs, strict=True)]
    shapes = [local_shape(tuple(o.shape), p, size) for o, p in zip(case.outputs, strategy.outputs, strict=True)]
    ranks = [leaves([p[rank] for p in placed], case.name) for rank in range(size)]
    if strategy.inside and "conv" in case.name:
        return convolution_of_rows(case, strategy, ranks, ups[0])
    if strategy.inside:
        assert case.name == "autopar.cross_entropy_sum.default"
        return vocabulary_cross_entropy(case, strategy, ranks, ups[0])
    outputs = []
    for rank, inputs in enumerate(ranks):
        if case.name == "aten.embedding.default" and strategy.factor == "v":
            outputs.append([vocabulary_lookup(case, strategy, inputs, size, rank)])
        elif case.name == "autopar.attention.default" and strategy.factor == "t" and case.arguments["is_causal"]:
            outputs.append(attention_of_rows(case, inputs, size, rank))
        elif case.name == "autopar.experts.default" and strategy.factor == "e":
            outputs.append(case.run([inputs[0], own_experts(inputs[1], inputs[3].shape[0], rank), *inputs[2:]]))
        else:
            outputs.append(case.run(inputs, shapes))
    for out, shape in zip([o for rank in outputs for o in rank], shapes * size, strict=True):
        assert tuple(out.shape) == shape
    grads = [backward(outputs[r], ranks[r], [u[r] for u in ups]) for r in range(size)]
    return outputs, grads


def attention_of_rows(case: Case, inputs: list[Tensor], size: int, rank: int) -> list[Tensor]:
    """Queries of one rank see the keys up to their own place."""
    q, k, v = inputs
    rows = torch.arange(q.shape[2] * size).chunk(size)[rank]
    later = torch.arange(k.shape[2]) > rows.unsqueeze(1)
    mask = torch.zeros(later.shape, dtype=q.dtype).masked_fill(later, -torch.inf)
    return list(attention(q, k, v, mask, False, case.arguments["scale"]))


def convolution_of_rows(case: Case, strategy: Strategy, ranks: list[list[Tensor]], ups: list[Tensor]) -> Run:
    """Each rank has its rows, what it needs of its neighbours', and zeros beyond the first and the last."""
    place, count = strategy.inputs[0], case.tensors[1].ndim - 2
    assert isinstance(place, Shard)
    dim = place.dim - (case.tensors[0].ndim - count)
    stride, padding, dilation = (list(case.arguments[name]) for name in ("stride", "padding", "dilation"))
    before, padding[dim] = padding[dim], 0
    after = dilation[dim] * (case.tensors[1].shape[2 + dim] - 1) + 1 - stride[dim] - before
    rows = [inputs[0] for inputs in ranks]
    above = [torch.zeros_like(rows[0]), *rows[:-1]]
    below = [*rows[1:], torch.zeros_like(rows[0])]
    outputs = []
    for rank, (_, *rest) in enumerate(ranks):
        last = above[rank].narrow(place.dim, rows[rank].shape[place.dim] - before, before)
        seen = torch.cat([last, rows[rank], below[rank].narrow(place.dim, 0, after)], place.dim)
        convolve = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[count]
        weight, bias = rest[0], rest[1] if len(rest) > 1 else None
        outputs.append(convolve(seen, weight, bias, stride, padding, dilation, case.arguments["groups"]))
    grads = torch.autograd.grad(outputs, [t for inputs in ranks for t in inputs], ups)
    width = len(case.tensors)
    return [[out] for out in outputs], [list(grads[i : i + width]) for i in range(0, len(grads), width)]


def own_experts(index: Tensor, held: int, rank: int) -> Tensor:
    """Indices among the experts that a rank holds; -1 for others."""
    local = index - rank * held
    return local.masked_fill((local < 0) | (local >= held), -1)


def vocabulary_lookup(case: Case, strategy: Strategy, inputs: list[Tensor], size: int, rank: int) -> Tensor:
    """Rows of other ranks give zero."""
    weight, ids = inputs
    place = strategy.inputs[0]
    assert isinstance(place, Shard)
    rows = shard(torch.arange(case.tensors[0].shape[0]), place, size, rank)
    hit = ids.unsqueeze(-1) == rows
    return weight[hit.int().argmax(-1)] * hit.any(-1, keepdim=True)


def vocabulary_cross_entropy(case: Case, strategy: Strategy, ranks: list[list[Tensor]], ups: list[Tensor]) -> Run:
    """Maximum, sum of exponentials and target logit are reduced over ranks; each keeps its classes' gradients."""
    place, size = strategy.inputs[0], len(ranks)
    assert isinstance(place, Shard)
    ignored = case.arguments["ignore_index"]
    classes = torch.arange(case.tensors[0].shape[1])
    owned = [shard(classes, Shard(0, place.outer), size, rank) for rank in range(size)]
    logits = [inputs[0].detach() for inputs in ranks]
    counted = (ranks[0][1] != ignored).double()
    hits = [(inputs[1].unsqueeze(1) == mine).double() for inputs, mine in zip(ranks, owned, strict=True)]
    largest = torch.stack([x.amax(1) for x in logits]).amax(0)
    total = sum((x - largest.unsqueeze(1)).exp().sum(1) for x in logits)
    target = sum((x * hit).sum(1) for x, hit in zip(logits, hits, strict=True))
    loss = (counted * (largest + total.log() - target)).sum()
    grads = []
    for x, hit, up in zip(logits, hits, ups, strict=True):
        probability = (x - largest.unsqueeze(1)).exp() / total.unsqueeze(1)
        grads.append([up * counted.unsqueeze(1) * (probability - hit), None])
    return [[loss]] * size, grads


def check(case: Case, strategy: Strategy, size: int) -> None:
    """Outputs and gradients of the ranks mean the whole ones."""
    inputs = leaves(case.tensors, case.name)
    outputs = case.run(inputs)
    upstream = [torch.randn_like(o) if differentiable(o) else o for o in outputs]
    expected = backward(outputs, inputs, upstream)
    got, grads = run_ranks(case, strategy, size, upstream)
    is_rounded = any(o.dtype == torch.float32 for o in outputs)
    tolerance = 1e-5 if is_rounded else 1e-9
    for i, (whole, place) in enumerate(zip(outputs, strategy.outputs, strict=True)):
        assert_means([rank[i].detach() for rank in got], whole.detach(), Partial, place, tolerance)
    for i, (gradient, place) in enumerate(zip(expected, strategy.inputs, strict=True)):
        parts = [rank[i] for rank in grads]
        if gradient is not None:
            known = [torch.zeros_like(gradient) if p is None else p for p in parts]
            assert_means(known, gradient, Varying, place, tolerance)


def assert_well_formed(rule: FactorMap, call: OpCall) -> None:
    """Every dim is the product of its factors, a tensor has no factor twice, no factor is of size 1."""
    assert 1 not in rule.sizes.values()
    for dims, meta in zip((*rule.inputs, *rule.outputs), (*call.inputs, *call.outputs), strict=True):
        assert tuple(math.prod(rule.sizes[f] for f in names) for names in dims) == meta.shape
        used = [f for names in dims for f in names]
        assert len(used) == len(set(used))


def check_all(case: Case) -> None:
    rule = OPS[case.name].factors(case.call)
    assert rule is not None
    assert_well_formed(rule, case.call)
    for strategy in unsplit_strategies(rule, len(case.tensors), len(case.outputs)):
        check(case, strategy, 2)
    for size in AXIS_SIZES:
        for factor, extent in rule.sizes.items():
            for outer in (o for o in range(1, extent + 1) if extent % o == 0):
                strategy = split_factor(rule, factor, outer, size)
                if extent % (outer * size) or factor in rule.whole:
                    assert strategy is None
                elif strategy is not None:
                    check(case, strategy, size)


PLANNABLE = sorted(name for name, op in OPS.items() if op.factors is not backward_only)


def test_every_plannable_op_is_drawn() -> None:
    assert set(CALLS) == set(PLANNABLE)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_shards_joined_are_the_whole(name: str) -> None:
    @settings(
        max_examples=drawn(EXAMPLES[name]),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        check_all(Case(name, *drawn_arguments(name, data)))

    holds()
