"""Step work: how a stage's gradients are laid out and reduced once per step, and its parameters gathered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from cost_model.ops import OpCall, price_of
from cost_model.program import OpCost
from cost_model.shards import Bucket, ParameterShard
from cost_model.tensor import TensorMeta
from passes.schedule_code import PartStep, Reduction, SpanStep, casts_around

Layout = tuple[tuple[str, tuple[str, ...]], ...]
"""(dtype, parameters in order) of each flat gradient buffer."""


def gradient_layout(
    finished: Sequence[str],
    buckets: Sequence[Bucket],
    shards: Sequence[ParameterShard],
    group_of: Mapping[str, str],
) -> tuple[Layout, tuple[Reduction, ...]]:
    """Flat buffers by dtype of the gradients outside buckets; within each, runs of one reduction axis, in the order in
    which backward has finished gradients: group by group, then those of none. group_of: of parameters."""
    order = {name: k for k, name in enumerate(finished)}
    groups = {group: k for k, group in enumerate(dict.fromkeys(group_of[n] for n in finished if n in group_of))}
    bucketed = {name for bucket in buckets for name, _ in bucket.parameters}
    trainable = sorted(
        (s for s in shards if s.trainable and s.name not in bucketed),
        key=lambda s: (
            s.gradient.dtype,
            s.reduce_axis or "",
            s.tied or "",
            groups.get(group_of.get(s.name, ""), len(groups)),
            order[s.name],
        ),
    )
    layout: dict[str, list[str]] = {}
    offsets: dict[str, int] = {}
    runs: dict[tuple[str, str, int], tuple[int, int]] = {}
    for shard in trainable:
        dtype = shard.gradient.dtype
        start = offsets.get(dtype, 0)
        offsets[dtype] = start + shard.meta.numel
        layout.setdefault(dtype, []).append(shard.name)
        axes = [shard.reduce_axis, f"tied:{shard.tied}" if shard.tied else None]
        for axis in (a for a in axes if a):
            run = (axis, dtype, groups.get(group_of.get(shard.name, ""), len(groups)))
            known = runs.get(run, (start, start))
            runs[run] = (known[0], offsets[dtype])
    sent = {s.gradient.dtype: s.gradient.dtype if s.kept is None else s.kept.reduce for s in trainable}
    ordered = sorted(runs.items(), key=lambda item: item[0])
    names = (*groups, None)
    reductions = tuple(Reduction(axis, dtype, *span, sent[dtype], names[k]) for (axis, dtype, k), span in ordered)
    return tuple((d, tuple(n)) for d, n in layout.items()), reductions


def reductions_of(
    buckets: Sequence[Bucket], alone: tuple[Reduction, ...], tied: Mapping[str, str], inner: int
) -> tuple[Reduction | SpanStep | PartStep, ...]:
    """All reductions of a step in order: within the stage, then between stages, where all must come in one order.

    inner: so many neighbouring replicas sum gradients outside buckets among themselves first.
    """
    found: list[Reduction | SpanStep | PartStep] = []
    for reduction in alone:
        found += reduction.in_groups(inner) or (reduction,)
    for bucket in buckets:
        if bucket.trainable:
            found += _reductions_of_bucket(bucket, tied)
    return tuple(
        sorted(found, key=lambda r: (r.axis.startswith("tied:"), r.axis if r.axis.startswith("tied:") else ""))
    )


def _reductions_of_bucket(bucket: Bucket, tied: Mapping[str, str]) -> list[PartStep]:
    assert bucket.gradients is not None
    part = replace(bucket.part, dtype=bucket.gradients.dtype)
    casts = casts_around(part, part, bucket.reduced.dtype)
    found = []
    if bucket.zero == 1:
        around = casts_around(bucket.gradients, part, bucket.reduced.dtype)
        found.append(PartStep("reduce_scatter", "dp", bucket.name, bucket.reduced.nbytes, around))
    if bucket.varying:
        found.append(PartStep("all_reduce", bucket.varying, bucket.name, bucket.reduced_part.nbytes, casts))
    if bucket.tied in tied:
        found.append(PartStep("all_reduce", f"tied:{bucket.tied}", bucket.name, bucket.reduced_part.nbytes, casts))
    return found


def gathers_of(buckets: Sequence[Bucket], *, has_optimizer: bool) -> tuple[PartStep, ...]:
    """Parameters that every rank holds, of which each rank has updated its part; none without an optimizer."""
    if not has_optimizer:
        return ()
    updated = [b for b in buckets if b.trainable and b.zero < 3]
    return tuple(PartStep("all_gather", "dp", b.name, b.meta.nbytes) for b in updated)


def cast_costs(casts: Iterable[tuple[TensorMeta, TensorMeta]]) -> Iterator[OpCost]:
    """Of each (from, to), a pass over both."""
    for source, target in casts:
        cost = price_of(OpCall("aten.to.dtype", (source,), (target,), {}))
        assert cost is not None
        yield cost


def update_casts(
    shards: Iterable[ParameterShard], buckets: Iterable[Bucket]
) -> tuple[list[tuple[TensorMeta, TensorMeta]], list[tuple[TensorMeta, TensorMeta]]]:
    """What is cast around an update: gradients to the dtype of what is updated before, parameters from it after.

    shards: those that lie outside buckets and are updated.
    """
    rows = [(s.gradient, s.updated, s.meta) for s in shards]
    for bucket in buckets:
        if bucket.gradients is not None:
            rows.append((replace(bucket.part, dtype=bucket.gradients.dtype), bucket.updated, bucket.part))
    before = [(gradient, updated) for gradient, updated, _ in rows if gradient != updated]
    return before, [(updated, stored) for _, updated, stored in rows if updated != stored]
