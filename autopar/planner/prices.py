"""Prices of choices before rewriting: ops under a strategy, changes of placement, parameters once per step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from autopar.optimizer_price import OptimizerPrice
from cost_model.cluster import Cluster
from cost_model.factors import Strategy
from cost_model.ops import INSIDE, OpCall, entry_of, price_of
from cost_model.placement import Placement, Shard, Varying, local_shape
from cost_model.precision import Precision
from cost_model.program import OpCost
from cost_model.redistribution import can_convert, conversion_steps, step_collectives
from cost_model.tensor import TensorMeta


def local_meta(meta: TensorMeta, placement: Placement, size: int) -> TensorMeta:
    return TensorMeta(local_shape(meta.shape, placement, size), meta.dtype)


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


@functools.cache
def travels_forward(source: Placement, target: Placement) -> bool:
    """Whether a change of placement needs a collective in forward."""
    if not can_convert(source, target):
        return False
    steps = [step_collectives(a, b) for a, b in conversion_steps(source, target)]
    return any(step is not None and step.forward not in ("", "slice") for step in steps)


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

    optimizer: the price of one parameter of each shape, from which rates per byte are taken; parameter_bytes: theirs;
    reduced_bytes: of all parameters, whose gradients are reduced in a few large messages. precision: in which dtypes
    the gradient of a parameter, and what is updated, are kept.
    """

    cluster: Cluster
    dp: int
    tp: int
    optimizer: OptimizerPrice
    parameter_bytes: int
    reduced_bytes: int
    precision: Precision = Precision()

    @cached_property
    def tp_group(self) -> tuple[int, ...]:
        return tuple(range(self.tp))

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

    def op_time_s(self, call: OpCall, strategy: Strategy) -> float:
        """Forward and backward of one call under a strategy, its own collectives included."""
        local = self._local(call, strategy)
        cost, entry = price_of(local), entry_of(call.op)
        forward = self.view_s if cost is None else self.op_s(cost)
        backward = sum(self.op_s(c) for c in entry.backward_price(local)) if entry is not None else 2 * forward
        if cost is None:
            backward = max(backward, self.view_s)
        return forward + backward + self._inside_s(local, strategy)

    def again_s(self, call: OpCall, strategy: Strategy) -> float:
        """Forward of one call once more, without its own collectives."""
        cost = price_of(self._local(call, strategy))
        return self.view_s if cost is None else self.op_s(cost)

    def _local(self, call: OpCall, strategy: Strategy) -> OpCall:
        return OpCall(
            call.op,
            tuple(local_meta(m, p, self.tp) for m, p in zip(call.inputs, strategy.inputs, strict=True)),
            tuple(local_meta(m, p, self.tp) for m, p in zip(call.outputs, strategy.outputs, strict=True)),
            call.args,
        )

    def _inside_s(self, local: OpCall, strategy: Strategy) -> float:
        """Collectives by which the op itself finishes a split."""
        place = strategy.inputs[0]
        if not (strategy.inside and isinstance(place, Shard)):
            return 0.0
        return sum(self.collective_s(kind, nbytes) for kind, nbytes in INSIDE[local.op](local, place, self.tp))

    @cached_property
    def collective_s(self) -> Callable[[str, int], float]:
        """Seconds of a collective over the tp axis."""

        @functools.cache
        def seconds(kind: str, nbytes: int) -> float:
            return self.cluster.collective_time_s(kind, nbytes, self.tp_group) if self.tp > 1 else 0.0

        return seconds

    @cached_property
    def conversion_s(self) -> Callable[[TensorMeta, Placement, Placement], float]:
        """Seconds, forward and backward, of a change of placement of a tensor; infinite where there is none."""

        @functools.cache
        def kind_s(kind: str, nbytes: int, dtype: str, packed: int) -> float:
            moved = nbytes // self.tp if kind in ("slice", "all_to_all") else nbytes
            travel = 0.0 if kind == "slice" else self.collective_s(kind, moved)
            return travel + (self.op_s(OpCost("copy", 0.0, 2.0 * moved * packed, dtype)) if packed else 0.0)

        def seconds(meta: TensorMeta, source: Placement, target: Placement) -> float:
            """Shards that do not lie one behind the other are laid out so first, or interleaved after."""
            total = 0.0
            for kind, shards in conversion_kinds(source, target) or ():
                packed = 1 if kind == "slice" else sum(not shard.is_consecutive(meta.shape) for shard in shards)
                total += kind_s(kind, meta.nbytes, meta.dtype, packed)
            return total if can_convert(source, target) else float("inf")

        return seconds

    def parameter_step_s(self, meta: TensorMeta, placement: Placement, zero: int = 0) -> float:
        """Gradient reduction, optimizer and gathering once per step, at the rates of the whole model's buffers."""
        sizes, varying = self._sizes(local_meta(meta, placement, self.tp)), isinstance(placement, Varying)
        around = 2 * self._cast_s(sizes.gradient, sizes.reduced)
        update = sizes.updated.nbytes * self._optimizer_rate
        update += self._cast_s(sizes.gradient, sizes.updated) + self._cast_s(sizes.updated, sizes.stored)
        sent = sizes.reduced.nbytes
        if zero == 0:
            rate = self._rate_s("all_reduce", "dp_tp" if varying else "dp")
            return sent * rate + update + (around if rate else 0.0)
        part = update + ((sent * self._rate_s("all_reduce", "tp") + around) if varying else 0.0)
        scattered = sent * self._rate_s("reduce_scatter", "dp") + around if zero == 1 else 0.0
        gathered = sizes.stored.nbytes * self._rate_s("all_gather", "dp") if zero < 3 else 0.0
        return part / self.dp + scattered + gathered

    def _sizes(self, meta: TensorMeta) -> _Sizes:
        kept = self.precision.kept(meta.dtype)
        return _Sizes(meta, *(replace(meta, dtype=dtype) for dtype in (kept.grads, kept.reduce, kept.updated)))

    def _cast_s(self, source: TensorMeta, target: TensorMeta) -> float:
        if source.dtype == target.dtype:
            return 0.0
        return self.op_s(OpCost("copy", 0.0, float(source.nbytes + target.nbytes), target.dtype))

    @cached_property
    def _rate_s(self) -> Callable[[str, str], float]:
        """Seconds per byte of a large collective over an axis."""
        ranks = {
            "dp": tuple(range(0, self.dp * self.tp, self.tp)),
            "tp": tuple(range(self.tp)),
            "dp_tp": tuple(range(self.dp * self.tp)),
        }

        @functools.cache
        def rate_s(kind: str, axis: str) -> float:
            if len(ranks[axis]) == 1:
                return 0.0
            return self.cluster.collective_time_s(kind, self.parameter_bytes, ranks[axis]) / self.parameter_bytes

        return rate_s

    @cached_property
    def _optimizer_rate(self) -> float:
        return sum(map(self.op_s, self.optimizer.costs)) / max(self.parameter_bytes, 1)

    def parameter_time_s(self, meta: TensorMeta, placement: Placement, trainable: bool = True, zero: int = 0) -> float:
        """Once per microbatch: its gradient added to the buffer, after a reduction from level 2 on; at level 3 the
        parameter gathered for forward and for backward."""
        sizes = self._sizes(local_meta(meta, placement, self.tp))
        gathers = 2 * sizes.stored.nbytes * self._rate_s("all_gather", "dp") if zero == 3 else 0.0
        if not trainable:
            return gathers
        kept, part = sizes.gradient, self.dp if zero > 1 else 1
        added = self.op_s(OpCost("elementwise", 0.0, 3.0 * kept.nbytes / part, kept.dtype))
        if zero < 2:
            return added + self._cast_s(sizes.stored, kept)
        row = sizes.reduced
        packed = self.op_s(OpCost("copy", 0.0, float(sizes.stored.nbytes + 2 * row.nbytes), row.dtype))
        added += self._cast_s(row, kept) / self.dp
        return gathers + added + packed + row.nbytes * self._rate_s("reduce_scatter", "dp")

    def parameter_state_bytes(self, meta: TensorMeta, placement: Placement, trainable: bool, zero: int = 0) -> float:
        """Weight, gradient and optimizer state with the master copy, each split over dp from level 3, 2 and 1 on."""
        sizes = self._sizes(local_meta(meta, placement, self.tp))
        state = sizes.updated.nbytes * self.optimizer.state_bytes / max(self.parameter_bytes, 1)
        if self.optimizer.costs and sizes.updated != sizes.stored:
            state += sizes.updated.nbytes
        held = [(sizes.stored.nbytes, 3)] + ([(sizes.gradient.nbytes, 2), (state, 1)] if trainable else [])
        return sum(nbytes / (self.dp if zero >= level else 1) for nbytes, level in held)

    @cached_property
    def parameter_costs(self) -> Callable[[TensorMeta, Placement, bool, int], tuple[float, float, float]]:
        """Seconds per microbatch and per step and bytes of state; each asked for by many segments, at all sizes."""

        @functools.cache
        def costs(meta: TensorMeta, place: Placement, trainable: bool, zero: int) -> tuple[float, float, float]:
            time_s = self.parameter_time_s(meta, place, trainable, zero) if trainable or zero else 0.0
            step_s = self.parameter_step_s(meta, place, zero) if trainable else 0.0
            return time_s, step_s, self.parameter_state_bytes(meta, place, trainable, zero)

        return costs

    def fastest_zero(self, meta: TensorMeta, placement: Placement) -> int:
        """Of the levels that cost no time in a microbatch, 0 and 1, the faster; 0 where they are equal."""
        whole, split = (self.parameter_costs(meta, placement, True, zero)[1] for zero in (0, 1))
        return int(self.dp > 1 and split < whole * (1 - 1e-9))

    def transfer_s(self, meta: TensorMeta, placement: Placement, carried_bytes: int = 0) -> float:
        """An activation, with what is carried beside it, to the next stage and the gradients back."""
        stride = self.dp * self.tp
        if stride >= self.cluster.num_devices:
            return 0.0
        nbytes = local_meta(meta, placement, self.tp).nbytes + carried_bytes
        return self.cluster.transfer_time_s(nbytes, 0, stride) + self.cluster.transfer_time_s(nbytes, stride, 0)
