"""Prices of choices before rewriting: ops under a strategy, changes of placement, parameters once per step."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from autopar.optimizer_price import OptimizerPrice
from autopar.planner.factor_graph import BoolArray, FloatArray
from cost_model.axes import Axes
from cost_model.cluster import Cluster
from cost_model.collectives import Link
from cost_model.ops import BETWEEN_REPLICAS, INSIDE, INSIDE_COSTS, OpCall, entry_of, price_of
from cost_model.placement import Placement, Placements, Shard, mesh_shape, varying_axes
from cost_model.precision import Precision
from cost_model.program import OpCost
from cost_model.redistribution import can_convert, conversion_steps, step_collectives
from cost_model.routes import RouteBook
from cost_model.strategies import MeshStrategy, splits
from cost_model.tensor import TensorMeta

_LARGE = 1 << 26
_SHORTEST_S = 1e-12


@functools.cache
def conversion_kinds(source: Placement, target: Placement) -> tuple[tuple[str, tuple[Shard, ...]], ...] | None:
    """Collectives and slices of a change of placement, forward and backward, with the shards that each moves.

    None where there is no way.
    """
    if not can_convert(source, target):
        return None
    found = []
    for a, b in conversion_steps(source, target):
        step, shards = step_collectives(a, b), tuple(place for place in (a, b) if isinstance(place, Shard))
        assert step is not None
        found += [(kind, shards) for kind in (step.forward, step.backward) if kind]
    return tuple(found)


@dataclass(frozen=True)
class _Sizes:
    """A parameter on a rank: as stored; its gradient as accumulated, and as summed; what is updated."""

    stored: TensorMeta
    gradient: TensorMeta
    reduced: TensorMeta
    updated: TensorMeta


@dataclass(frozen=True, eq=False)
class MeshPrices:
    """Seconds and bytes on a (dp, tp) mesh of a cluster whose ranks are laid out tp innermost.

    sizes: of the axes that tp consists of.
    optimizer: the price of one parameter of each shape, from which rates per byte are taken; parameter_bytes: theirs;
    reduced_bytes: of all parameters, whose gradients are reduced in a few large messages. precision: in which dtypes
    the gradient of a parameter, and what is updated, are kept. copies: where what a microbatch gathers and scatters of
    parameters hides behind compute, so many of the bytes of each that a rank has are there for that, as a mean over the
    segments of a stage; None: it takes its time.
    """

    cluster: Cluster
    dp: int
    sizes: tuple[int, ...]
    optimizer: OptimizerPrice
    parameter_bytes: int
    reduced_bytes: int
    precision: Precision = Precision()
    copies: float | None = None

    @cached_property
    def tp(self) -> int:
        return math.prod(self.sizes)

    @cached_property
    def axes(self) -> Axes:
        """What a plan keeps: links as they are for large and for small messages over the first group of each kind."""
        if len(self.sizes) == 1:
            return Axes.flat(self.tp)
        small, large = self.copy_s(0, "float32"), self.copy_s(_LARGE, "float32")
        return Axes.of(self.sizes, self._link, Link(small, _LARGE / max(large - small, _SHORTEST_S)))

    def _link(self, axes: tuple[int, ...]) -> Link:
        """By which a ring takes as long as the cluster says."""
        ranks = self.ranks(axes)
        empty, full = (self.collective_s("all_gather", nbytes, axes) / (ranks - 1) for nbytes in (0, _LARGE))
        return Link(empty, _LARGE / ranks / max(full - empty, _SHORTEST_S))

    def ranks(self, axes: Sequence[int]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    @cached_property
    def group(self) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
        """The first ranks that differ in their places on some axes alone."""

        @functools.cache
        def ranks(axes: tuple[int, ...]) -> tuple[int, ...]:
            strides = [math.prod(self.sizes[axis + 1 :]) for axis in axes]
            places = itertools.product(*(range(self.sizes[axis]) for axis in axes))
            return tuple(sum(i * n for i, n in zip(at, strides, strict=True)) for at in places)

        return ranks

    def local_meta(self, meta: TensorMeta, places: Placements) -> TensorMeta:
        """What a rank holds."""
        return TensorMeta(mesh_shape(meta.shape, places, self.sizes), meta.dtype)

    @cached_property
    def op_s(self) -> Callable[[OpCost], float]:
        """Seconds of an op on the slowest device; distinct ops are asked for once."""
        devices = tuple({id(d): d for d in self.cluster.devices}.values())
        known: dict[OpCost, float] = {}

        def seconds(cost: OpCost) -> float:
            if cost not in known:
                known[cost] = max(device.op_time_s(cost) for device in devices)
            return known[cost]

        return seconds

    @cached_property
    def view_s(self) -> float:
        """A call that computes nothing still costs its line on a CPU."""
        return max((d.op_overhead_s for d in self.cluster.devices if d.kind == "cpu"), default=0.0)

    def op_time_s(self, call: OpCall, strategy: MeshStrategy) -> float:
        """Forward and backward of one call under a strategy, its own collectives included."""
        local = self._local(call, strategy)
        if (split := _split_costs(local, strategy)) is not None:
            return sum(map(self.op_s, split)) + self._inside_s(local, strategy)
        cost, entry = price_of(local), entry_of(call.op)
        forward = self.view_s if cost is None else self.op_s(cost)
        backward = sum(self.op_s(c) for c in entry.backward_price(local)) if entry is not None else 2 * forward
        if cost is None:
            backward = max(backward, self.view_s)
        return forward + backward + self._inside_s(local, strategy)

    def again_s(self, call: OpCall, strategy: MeshStrategy) -> float:
        """Forward of one call once more, without its own collectives."""
        local = self._local(call, strategy)
        split = _split_costs(local, strategy)
        cost = price_of(local) if split is None else split[0]
        return self.view_s if cost is None else self.op_s(cost)

    def _local(self, call: OpCall, strategy: MeshStrategy) -> OpCall:
        return OpCall(
            call.op,
            tuple(self.local_meta(m, p) for m, p in zip(call.inputs, strategy.inputs, strict=True)),
            tuple(self.local_meta(m, p) for m, p in zip(call.outputs, strategy.outputs, strict=True)),
            call.args,
        )

    def _inside_s(self, local: OpCall, strategy: MeshStrategy) -> float:
        """Collectives by which the op itself finishes a split."""
        if not any(own.inside for own in strategy.axes):
            return 0.0
        total = 0.0
        for axes, own in splits(strategy, self.sizes):
            place = own.inputs[0]
            if own.inside and isinstance(place, Shard):
                moved = INSIDE[local.op](local, place, self.ranks(axes))
                total += sum(self.collective_s(kind, nbytes, axes) for kind, nbytes in moved)
        return total

    def exchanged_s(self, call: OpCall, strategy: MeshStrategy) -> float:
        """Collectives by which replicas exchange something in a call, forward and backward."""
        local, replicas = self._local(call, strategy), tuple(range(0, self.dp * self.tp, self.tp))
        moved = BETWEEN_REPLICAS[call.op](local, self.dp) if self.dp > 1 else ()
        return sum(self.cluster.collective_time_s(kind, nbytes, replicas) for kind, nbytes in moved)

    @cached_property
    def collective_s(self) -> Callable[[str, int, Sequence[int]], float]:
        """Seconds of a collective over some of the tp axes together."""

        @functools.cache
        def seconds(kind: str, nbytes: int, axes: tuple[int, ...]) -> float:
            return self.cluster.collective_time_s(kind, nbytes, self.group(axes)) if self.tp > 1 else 0.0

        return seconds

    def copy_s(self, nbytes: int, dtype: str) -> float:
        """Seconds of a local copy of so many bytes, read and written."""
        return self.op_s(OpCost("copy", 0.0, float(nbytes), dtype))

    @cached_property
    def routes(self) -> RouteBook:
        """Ways between placements on several axes, by these prices."""
        return RouteBook(self)

    def conversions_s(
        self, meta: TensorMeta, sources: Sequence[Placements], targets: Sequence[Placements]
    ) -> FloatArray:
        """[source, target] seconds, forward and backward, of a change of placement; infinite where there is none."""
        if len(self.sizes) > 1:
            return self.routes.seconds(meta, sources, targets)
        return self._changes_s(meta, tuple(place for (place,) in sources), tuple(place for (place,) in targets))

    @cached_property
    def _changes_s(self) -> Callable[[TensorMeta, tuple[Placement, ...], tuple[Placement, ...]], FloatArray]:
        """``conversions_s`` on the only axis; most tensors of a segment are like others."""

        @functools.cache
        def seconds(meta: TensorMeta, sources: tuple[Placement, ...], targets: tuple[Placement, ...]) -> FloatArray:
            found = np.array([[self.conversion_s(meta, a, b) for b in targets] for a in sources])
            found.setflags(write=False)  # all that ask get this one
            return found

        return seconds

    def made_forward(
        self, meta: TensorMeta, sources: Sequence[Placements], targets: Sequence[Placements], *, sliced: bool
    ) -> BoolArray:
        """[source, target] whether a collective makes the new placement in forward or, if ``sliced``, a local copy."""
        free = ("",) if sliced else ("", "slice")
        if len(self.sizes) > 1:
            return self.routes.makes(meta, sources, targets, free)
        return np.array([[not self._forward_kinds(a[0], b[0]) <= set(free) for b in targets] for a in sources])

    @cached_property
    def _forward_kinds(self) -> Callable[[Placement, Placement], set[str]]:
        """Of the steps of a change of placement on the only axis; none where there is no way."""

        @functools.cache
        def kinds(source: Placement, target: Placement) -> set[str]:
            steps = conversion_steps(source, target) if can_convert(source, target) else ()
            return {step.forward for step in (step_collectives(a, b) for a, b in steps) if step is not None}

        return kinds

    @cached_property
    def conversion_s(self) -> Callable[[TensorMeta, Placement, Placement], float]:
        """Seconds, forward and backward, of a change of placement of a tensor on the only axis; infinite where there is
        none."""

        @functools.cache
        def kind_s(kind: str, nbytes: int, dtype: str, packed: int) -> float:
            moved = nbytes // self.tp if kind in ("slice", "all_to_all") else nbytes
            travel = 0.0 if kind == "slice" else self.collective_s(kind, moved, (0,))
            return travel + (self.op_s(OpCost("copy", 0.0, 2.0 * moved * packed, dtype)) if packed else 0.0)

        def seconds(meta: TensorMeta, source: Placement, target: Placement) -> float:
            """Shards that do not lie one behind the other are laid out so first, or interleaved after."""
            total = 0.0
            for kind, shards in conversion_kinds(source, target) or ():
                packed = 1 if kind == "slice" else sum(not shard.is_consecutive(meta.shape) for shard in shards)
                total += kind_s(kind, meta.nbytes, meta.dtype, packed)
            return total if can_convert(source, target) else float("inf")

        return seconds

    def parameter_step_s(self, meta: TensorMeta, places: Placements, zero: int = 0) -> float:
        """Gradient reduction, optimizer and gathering once per step, at the rates of the whole model's buffers."""
        sizes, varying = self._sizes(meta, places), varying_axes(places)
        around = 2 * self._cast_s(sizes.gradient, sizes.reduced)
        update = sizes.updated.nbytes * self._optimizer_rate
        update += self._cast_s(sizes.gradient, sizes.updated) + self._cast_s(sizes.updated, sizes.stored)
        sent = sizes.reduced.nbytes
        if zero == 0:
            rate = self._rate_s("all_reduce", varying, with_dp=True)
            return sent * rate + update + (around if rate else 0.0)
        part = update + ((sent * self._rate_s("all_reduce", varying, with_dp=False) + around) if varying else 0.0)
        scattered = sent * self._rate_s("reduce_scatter") + around if zero == 1 else 0.0
        gathered = sizes.stored.nbytes * self._rate_s("all_gather") if zero < 3 else 0.0
        return part / self.dp + scattered + gathered

    @cached_property
    def _sizes(self) -> Callable[[TensorMeta, Placements], _Sizes]:
        """Of a parameter on a rank."""

        @functools.cache
        def sizes(meta: TensorMeta, places: Placements) -> _Sizes:
            local, kept = self.local_meta(meta, places), self.precision.kept(meta.dtype)
            return _Sizes(local, *(replace(local, dtype=dtype) for dtype in (kept.grads, kept.reduce, kept.updated)))

        return sizes

    def _cast_s(self, source: TensorMeta, target: TensorMeta) -> float:
        if source.dtype == target.dtype:
            return 0.0
        return self.op_s(OpCost("copy", 0.0, float(source.nbytes + target.nbytes), target.dtype))

    @cached_property
    def _rate_s(self) -> Callable[..., float]:
        """Seconds per byte of a large collective over some of the tp axes, over replicas too, or over these alone."""

        @functools.cache
        def rate_s(kind: str, axes: tuple[int, ...] = (), *, with_dp: bool = True) -> float:
            replicas = range(0, self.dp * self.tp, self.tp) if with_dp else (0,)
            ranks = tuple(first + rank for first in replicas for rank in self.group(axes))
            if len(ranks) == 1:
                return 0.0
            return self.cluster.once_time_s(kind, self.reduced_bytes, ranks) / self.reduced_bytes

        return rate_s

    @cached_property
    def _optimizer_rate(self) -> float:
        return sum(map(self.op_s, self.optimizer.costs)) / max(self.parameter_bytes, 1)

    def parameter_time_s(
        self, meta: TensorMeta, places: Placements, trainable: bool = True, zero: int = 0, accumulates: bool = True
    ) -> float:
        """Once per microbatch: its gradient added to the buffer where there are several, after a reduction from level 2
        on; at level 3 the parameter gathered for forward and for backward."""
        sizes = self._sizes(meta, places)
        gathers = 2 * sizes.stored.nbytes * self._microbatch_rate_s("all_gather") if zero == 3 else 0.0
        if not trainable:
            return gathers
        kept, part = sizes.gradient, self.dp if zero > 1 else 1
        added = self.op_s(OpCost("elementwise", 0.0, 3.0 * kept.nbytes / part, kept.dtype))
        if zero < 2:
            return (added if accumulates else 0.0) + self._cast_s(sizes.stored, kept)
        row = sizes.reduced
        packed = self.op_s(OpCost("copy", 0.0, float(sizes.stored.nbytes + 2 * row.nbytes), row.dtype))
        added += self._cast_s(row, kept) / self.dp
        return gathers + added + packed + row.nbytes * self._microbatch_rate_s("reduce_scatter")

    def _microbatch_rate_s(self, kind: str) -> float:
        return self._rate_s(kind) if self.copies is None else 0.0

    def parameter_state_bytes(self, meta: TensorMeta, places: Placements, trainable: bool, zero: int = 0) -> float:
        """Weight, gradient and optimizer state with the master copy, each split over dp from level 3, 2 and 1 on."""
        sizes = self._sizes(meta, places)
        state = sizes.updated.nbytes * self.optimizer.state_bytes / max(self.parameter_bytes, 1)
        if self.optimizer.costs and sizes.updated != sizes.stored:
            state += sizes.updated.nbytes
        held = [(sizes.stored.nbytes, 3)] + ([(sizes.gradient.nbytes, 2), (state, 1)] if trainable else [])
        kept = sum(nbytes / (self.dp if zero >= level else 1) for nbytes, level in held)
        return kept + (sizes.stored.nbytes * self.copies if self.copies and zero == 3 else 0.0)

    def update_bytes(self, updated_bytes: int, zero: Sequence[int]) -> float:
        """What the update of so many bytes on all ranks of a mesh needs of each beside state, when nothing else is
        there, split over replicas if a level of those to choose from allows it.

        Nothing of an optimizer that updates one parameter after the other.
        """
        if not self.optimizer.grows:
            return 0.0
        needed = self.optimizer.workspace_bytes / max(self.parameter_bytes, 1)
        return needed * updated_bytes / (self.dp if any(zero) else 1)

    @cached_property
    def parameter_costs(self) -> Callable[[TensorMeta, Placements, bool, int, bool], tuple[float, float, float]]:
        """Seconds per microbatch and per step and bytes of state; each asked for by many segments, at all sizes."""

        @functools.cache
        def costs(
            meta: TensorMeta, places: Placements, trainable: bool, zero: int, accumulates: bool
        ) -> tuple[float, float, float]:
            time_s = self.parameter_time_s(meta, places, trainable, zero, accumulates) if trainable or zero else 0.0
            step_s = self.parameter_step_s(meta, places, zero) if trainable else 0.0
            return time_s, step_s, self.parameter_state_bytes(meta, places, trainable, zero)

        return costs

    @cached_property
    def parameter_table(self) -> Callable[..., FloatArray]:
        """[placement, level, component] ``parameter_costs`` at each of several levels, or, of none, at the fastest."""

        @functools.cache
        def table(
            meta: TensorMeta,
            places: tuple[Placements, ...],
            trainable: bool,
            levels: tuple[int, ...],
            accumulates: bool,
        ) -> FloatArray:
            chosen = [levels or (self.fastest_zero(meta, own) if trainable else 0,) for own in places]
            return np.array(
                [
                    [self.parameter_costs(meta, own, trainable, zero, accumulates) for zero in known]
                    for own, known in zip(places, chosen, strict=True)
                ]
            )

        return table

    def fastest_zero(self, meta: TensorMeta, places: Placements) -> int:
        """Of the levels that cost no time in a microbatch, 0 and 1, the faster; 0 where they are equal."""
        whole, split = (self.parameter_costs(meta, places, True, zero, True)[1] for zero in (0, 1))
        return int(self.dp > 1 and split < whole * (1 - 1e-9))

    @cached_property
    def _hops(self) -> Mapping[tuple[int, int], float]:
        """Ends of messages between neighbouring stages, and the share of all cuts whose slowest message is as fast."""
        stride, level_of = self.dp * self.tp, self.cluster.link_name
        found: dict[str, tuple[tuple[int, int], int]] = {}
        for first in range(stride, self.cluster.num_devices, stride):
            pairs = [(after - stride, after) for after in (first, first + stride - 1)]  # others cross no more nodes
            slowest = max(pairs, key=lambda ends: self.cluster.transfer_time_s(_LARGE, *ends))
            ends, count = found.get(level_of(slowest), (slowest, 0))
            found[level_of(slowest)] = ends, count + 1
        return {ends: count / (self.cluster.num_devices // stride - 1) for ends, count in found.values()}

    def transfer_s(self, meta: TensorMeta, places: Placements, carried_bytes: int = 0) -> float:
        """An activation, with what is carried beside it, to the next stage and the gradients back, in the mean of all
        cuts; cast where they go in a narrower dtype."""
        if not self._hops:
            return 0.0
        held = self.local_meta(meta, places).nbytes + carried_bytes
        nbytes = self.precision.sent_bytes(held, meta)
        casts_s = 4 * self.copy_s(held + nbytes, meta.dtype) if nbytes < held else 0.0
        ways = ((share, ends[::step]) for ends, share in self._hops.items() for step in (1, -1))
        return casts_s + sum(share * self.cluster.transfer_time_s(nbytes, *ends) for share, ends in ways)


def _split_costs(local: OpCall, strategy: MeshStrategy) -> tuple[OpCost, ...] | None:
    """What a rank runs, forward and backward, where a split makes other ops of a call; None where it does not."""
    if local.op not in INSIDE_COSTS or not any(own.inside for own in strategy.axes):
        return None
    return INSIDE_COSTS[local.op](local)
