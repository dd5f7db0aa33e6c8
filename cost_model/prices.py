"""Seconds of a program's parts on a cluster: ops, blocks, collectives by mesh axis, transfers between stages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cost_model.axes import DP, is_inside_replica
from cost_model.axis_groups import axis_groups, collective_stages
from cost_model.block_price import BlockPrice, block_price, spent_seconds
from cost_model.cold_calls import cold_seconds
from cost_model.crossing import Message
from cost_model.errors import VerificationError
from cost_model.priced import PricedCluster, PricedDevice
from cost_model.program import Block, Collective, OpCost, Program, StageProgram
from cost_model.tensor import DTYPE_BYTES

BEHIND_KINDS = ("all_reduce", "all_gather", "reduce_scatter")
"""Collectives that can move behind compute."""


@dataclass(frozen=True)
class ChunkPrice:
    """Seconds of a chunk's parts on the slowest rank of its stage, or of its stage in one replica.

    backward: all of it, or what does not run apart as weight; to_next_s, from_next_s: one transfer of the activation
    to, and of its gradient from, the next chunk's stage; delay_s, delay_back_s: the part of each that an empty message
    takes as well. notices: whether a sender must learn that it is awaited, which takes an empty message the other way.
    handled_s: what a rank of either stage spends on sending such a transfer and receiving one.
    """

    forward: BlockPrice
    backward: BlockPrice
    to_next_s: float
    from_next_s: float
    delay_s: float = 0.0
    delay_back_s: float = 0.0
    notices: bool = False
    handled_s: float = 0.0
    weight: BlockPrice | None = None

    @property
    def backwards(self) -> tuple[BlockPrice, ...]:
        return (self.backward, *([] if self.weight is None else [self.weight]))

    @property
    def blocks_s(self) -> float:
        """All of one microbatch but the transfers."""
        return self.forward.total_s + sum(block.total_s for block in self.backwards)


@dataclass(frozen=True)
class StagePrice:
    """Seconds of a stage's parts on its slowest rank, or its slowest in one replica.

    step_collectives_s, step_gathers_s: each collective of ``StepWork`` in order; step_behind_s: what remains of each of
    the former behind compute; optimizer_s: the whole update.
    shares_egress: whether what it sends to the next stage and to the one before share a rate.
    """

    chunks: tuple[ChunkPrice, ...]
    step_collectives_s: tuple[float, ...]
    step_gathers_s: tuple[float, ...]
    optimizer_s: float
    optimizer_kinds_s: Mapping[str, float] = field(hash=False)
    shares_egress: bool = False
    step_behind_s: tuple[float, ...] = ()


Replicas = Sequence[Sequence[StagePrice]]
"""The stages of each replica that differs from the others."""


def price_stages(program: Program, cluster: PricedCluster) -> tuple[StagePrice, ...]:
    """Price every stage as its slowest replica; each distinct op, collective and transfer is asked for once."""
    _check_chain(program)
    pricer = _Pricer(program, cluster)
    return tuple(pricer.stage(stage, range(mesh.dp)) for stage, mesh in enumerate(program.meshes))


def price_replicas(program: Program, cluster: PricedCluster) -> Replicas:
    """The stages of every replica that differs from those before it.

    Replicas that meet in every microbatch (ZeRO gathers, batch norm, stages of fewer replicas) go at the pace of the
    slowest, and count as one.
    """
    dp = program.meshes[0].dp
    alone = all(mesh.dp == dp for mesh in program.meshes) and not _meet_in_blocks(program)
    if not cluster.uneven or dp == 1 or not alone:
        return (price_stages(program, cluster),)
    _check_chain(program)
    pricer = _Pricer(program, cluster)
    different = {pricer.signature(index): index for index in reversed(range(dp))}
    return tuple(tuple(pricer.stage(stage, (dp,)) for stage in range(program.pp)) for dp in sorted(different.values()))


def _meet_in_blocks(program: Program) -> bool:
    blocks = (block for chunk in program.chain for block in chunk.blocks)
    return any(not is_inside_replica(c.axis) for block in blocks for c in block.collectives())


def _check_chain(program: Program) -> None:
    """Every chunk but the last sends something to the next."""
    for number, chunk in enumerate(program.chain[:-1]):
        if chunk.sent is None:
            raise VerificationError("sent", f"chunk {number} of {len(program.chain)} sends nothing to the next")


def hidable_s(program: Program, cluster: PricedCluster) -> float:
    """The most that a step can gain where collectives move behind compute, of the stage that gains most.

    Of what every microbatch does, sums move, and what gathers and scatters the parts that replicas have. Gradients are
    complete in the last microbatch's backward, so what is done with them once a step hides behind no more than that;
    with several chunks behind those of others too.
    """
    pricer = _Pricer(program, cluster)

    def gain_s(stage: int, collectives: Iterable[Collective]) -> float:
        own, every = (stage,), range(program.meshes[stage].dp)
        moving = (c for c in collectives if c.kind in BEHIND_KINDS and collective_stages(program, c.axis, stage) == own)
        return sum(pricer.hidden_s(stage, every, c) for c in moving)

    def each_s(own: StageProgram) -> float:
        found = (c for chunk in own.chunks for block in chunk.blocks for c in block.collectives())
        return gain_s(own.stage, (c for c in found if c.kind == "all_reduce" or c.axis == DP))

    def once_s(own: StageProgram) -> float:
        found = gain_s(own.stage, own.step.collectives)
        return min(found, pricer.backward_s(own.stage)) if program.virtual_stages == 1 else found

    return max(program.microbatches * each_s(own) + once_s(own) for own in program.stages)


class _Pricer:
    """Prices with a memory; a rank's op takes as long as on the slowest device of its stage in some replicas."""

    def __init__(self, program: Program, cluster: PricedCluster) -> None:
        self.program, self.cluster = program, cluster
        self.op_prices: dict[tuple[int, ...], dict[OpCost, float]] = {}
        self.collective_prices: dict[tuple[object, ...], float] = {}
        self.asked: dict[tuple[object, ...], float] = {}
        self.blocks: dict[tuple[object, ...], BlockPrice] = {}
        self.longer: dict[tuple[object, ...], Mapping[int, Sequence[float]]] = {}
        self.moved: dict[int, tuple[tuple[Collective, ...], tuple[Collective, ...]]] = {}
        self.users = {step: self._users(step) for step in (1, -1)}
        self.groups: dict[tuple[object, ...], tuple[tuple[int, ...], ...]] = {}
        self.devices: dict[tuple[object, ...], tuple[PricedDevice, ...]] = {}

    def stage(self, stage: int, dps: Sequence[int]) -> StagePrice:
        own, optimizer = self.program.stages[stage], self._optimizer(stage, dps)
        once_s = tuple(self._once_s(stage, dps, c) for c in own.step.collectives)
        return StagePrice(
            chunks=tuple(self._chunk(stage, dps, number) for number in range(len(own.chunks))),
            step_collectives_s=once_s,
            step_gathers_s=tuple(
                self._once_s(stage, dps, self._inside(stage, "the step", c)) for c in own.step.gathers
            ),
            optimizer_s=sum(optimizer.values()),
            optimizer_kinds_s=optimizer,
            shares_egress=self._shares_egress(stage, dps),
            step_behind_s=tuple(map(min, once_s, (self._behind_s(stage, dps, c) for c in own.step.collectives))),
        )

    def _optimizer(self, stage: int, dps: Sequence[int]) -> dict[str, float]:
        """The update by kind, with what a step takes beside it and its blocks."""
        own, devices, op_s = self.program.stages[stage], self._devices(stage, dps), self._op_price(stage, dps)
        found = defaultdict(float, {"optimizer": max(d.step_s(own.updated_tensors) for d in devices)})
        for cost in own.step.optimizer_costs:
            found[cost.kind] += op_s(cost)
        return dict(found)

    def backward_s(self, stage: int) -> float:
        """Of one microbatch, on the slowest rank."""
        every = range(self.program.meshes[stage].dp)
        blocks = (block for chunk in self.program.stages[stage].chunks for block in chunk.backwards)
        return sum(self._block(stage, every, block).total_s for block in blocks)

    def signature(self, dp: int) -> tuple[object, ...]:
        """Equal for replicas whose every stage takes the same times."""
        found = []
        for stage, own in enumerate(self.program.stages):
            devices = tuple(map(id, self._devices(stage, (dp,))))
            kept = {c for chunk in own.chunks for block in chunk.blocks for c in block.collectives()}
            inside = tuple(self._collective_s(stage, (dp,), c) for c in (*dict.fromkeys(kept), *own.step.collectives))
            sent = [number for number, chunk in enumerate(own.chunks) if chunk.sent is not None]
            ways = [(number, back, empty) for number in sent for back in (False, True) for empty in (False, True)]
            hops = (self._transfer_s(stage, n, (dp,), back=back, empty=empty) for n, back, empty in ways)
            found.append((devices, inside, tuple(hops)))
        return tuple(found)

    def _chunk(self, stage: int, dps: Sequence[int], number: int) -> ChunkPrice:
        chunk = self.program.stages[stage].chunks[number]

        def sent_s(*, back: bool = False, empty: bool = False) -> float:
            return 0.0 if chunk.sent is None else self._transfer_s(stage, number, dps, back=back, empty=empty)

        return ChunkPrice(
            forward=self._block(stage, dps, chunk.forward),
            backward=self._block(stage, dps, chunk.backward),
            to_next_s=sent_s(),
            from_next_s=sent_s(back=True),
            delay_s=sent_s(empty=True),
            delay_back_s=sent_s(back=True, empty=True),
            notices=self.cluster.rendezvous,
            handled_s=0.0 if chunk.sent is None else self._handled_s(stage, number, dps),
            weight=None if chunk.weight is None else self._block(stage, dps, chunk.weight),
        )

    def _devices(self, stage: int, dps: Sequence[int]) -> tuple[PricedDevice, ...]:
        """The distinct devices of a stage."""
        if (stage, dps) not in self.devices:
            cells = ((stage, dp, tp) for dp in dps for tp in range(self.program.meshes[stage].tp))
            devices = (self.cluster.devices[self.program.devices[cell]] for cell in cells)
            self.devices[stage, dps] = tuple({id(device): device for device in devices}.values())
        return self.devices[stage, dps]

    def _block(self, stage: int, dps: Sequence[int], block: Block) -> BlockPrice:
        """Blocks that stages share are gone through once where their devices are alike and their collectives take as
        long."""
        devices, op_s, view_s = self._devices(stage, dps), self._op_price(stage, dps), self._view_s(stage, dps)
        every, begun = self._collectives(block)
        whole_s = {c: self._blocking_s(stage, dps, block.name, c) for c in every}
        behind_s = {c: self._behind_s(stage, dps, c) for c in begun}
        longer_s = self._longer(stage, dps).get(id(block))
        key = (id(block), id(longer_s), *map(id, devices), *whole_s.values(), *behind_s.values())
        if key not in self.blocks:
            self.blocks[key] = block_price(block, view_s, op_s, whole_s, behind_s, longer_s)
        return self.blocks[key]

    def _view_s(self, stage: int, dps: Sequence[int]) -> float:
        """A view costs a call on devices that wait for it."""
        return max((d.op_overhead_s for d in self._devices(stage, dps) if d.kind == "cpu"), default=0.0)

    def _longer(self, stage: int, dps: Sequence[int]) -> Mapping[int, Sequence[float]]:
        """What the instructions of each block of a stage take longer as their code has left the caches, by the block's
        id: in the mean of its microbatches, of which the first follows on what is done once per step."""
        if (stage, dps) not in self.longer:
            cold = [device for device in self._devices(stage, dps) if device.cold_calls is not None]
            self.longer[stage, dps] = self._cycle(stage, dps, cold) if cold else {}
        return self.longer[stage, dps]

    def _cycle(self, stage: int, dps: Sequence[int], cold: Sequence[PricedDevice]) -> dict[int, Sequence[float]]:
        chunks, step = self.program.stages[stage].chunks, self.program.stages[stage].step
        blocks = [*(c.forward for c in chunks), *(b for c in reversed(chunks) for b in c.backwards)]
        op_s, view_s, spent_s = self._op_price(stage, dps), self._view_s(stage, dps), []
        for block in blocks:
            whole_s = {c: self._blocking_s(stage, dps, block.name, c) for c in self._collectives(block)[0]}
            spent_s.append(spent_seconds(block, view_s, op_s, whole_s))
        once_s = sum(self._collective_s(stage, dps, c) for c in (*step.collectives, *step.gathers))
        once_s += sum(self._optimizer(stage, dps).values())
        first, others = (cold_seconds(blocks, spent_s, between_s, cold) for between_s in (once_s, 0.0))
        share = 1 / self.program.microbatches
        return {
            id(block): [share * a + (1 - share) * b for a, b in zip(*both, strict=True)]
            for block, *both in zip(blocks, first, others, strict=True)
        }

    def _collectives(self, block: Block) -> tuple[tuple[Collective, ...], tuple[Collective, ...]]:
        """The distinct ones of a block, and those that begin there to be awaited later."""
        if id(block) not in self.moved:
            found = [(i.collective, i.begins) for i in block.instructions if i.collective is not None]
            begun = dict.fromkeys(collective for collective, begins in found if begins)
            self.moved[id(block)] = tuple(dict.fromkeys(collective for collective, _ in found)), tuple(begun)
        return self.moved[id(block)]

    def _op_price(self, stage: int, dps: Sequence[int]) -> Callable[[OpCost], float]:
        """Price of an op on a stage's devices, asked for once for all stages on the same devices."""
        devices = self._devices(stage, dps)
        known = self.op_prices.setdefault(tuple(map(id, devices)), {})

        def price_s(cost: OpCost) -> float:
            seconds = known.get(cost)
            if seconds is None:
                seconds = known[cost] = max(device.op_time_s(cost) for device in devices)
            return seconds

        return price_s

    def _blocking_s(self, stage: int, dps: Sequence[int], where: str, collective: Collective) -> float:
        """A collective that a stage waits for by itself."""
        return self._collective_s(stage, dps, self._inside(stage, where, collective))

    def _inside(self, stage: int, where: str, collective: Collective) -> Collective:
        """The collective; one that spans stages would have no common moment there."""
        if collective_stages(self.program, collective.axis, stage) != (stage,):
            raise VerificationError("block_collectives", f"{where}: {collective} spans stages")
        return collective

    def _once_s(self, stage: int, dps: Sequence[int], collective: Collective) -> float:
        """A collective that comes once a step."""
        return self._slowest_s(stage, dps, collective, self.cluster.once_time_s)

    def _collective_s(self, stage: int, dps: Sequence[int], collective: Collective) -> float:
        """Seconds of the slowest of the groups that run it at the same time; nothing within a group of one."""
        return self._slowest_s(stage, dps, collective, self.cluster.collective_time_s)

    def hidden_s(self, stage: int, dps: Sequence[int], collective: Collective) -> float:
        """The part of a collective that can move behind compute."""
        whole_s = max(self._collective_s(stage, dps, collective), self._once_s(stage, dps, collective))
        return whole_s - self._behind_s(stage, dps, collective)

    def _behind_s(self, stage: int, dps: Sequence[int], collective: Collective) -> float:
        """What remains of a collective behind compute."""
        return self._slowest_s(stage, dps, collective, self.cluster.behind_time_s)

    def _slowest_s(
        self, stage: int, dps: Sequence[int], collective: Collective, price_s: Callable[..., float]
    ) -> float:
        """Equal collectives of a stage, one a layer, are asked for once; so are those of stages on the same ranks."""
        asked = (stage, dps, collective, price_s)
        if asked not in self.asked:
            if (where := (stage, dps, collective.axis)) not in self.groups:
                self.groups[where] = self._groups(*where)
            key = (self.groups[where], collective, price_s)
            if key not in self.collective_prices:
                self.collective_prices[key] = max(
                    price_s(collective.kind, collective.nbytes, group) if len(group) > 1 else 0.0 for group in key[0]
                )
            self.asked[asked] = self.collective_prices[key]
        return self.asked[asked]

    def _groups(self, stage: int, dps: Sequence[int], axis: str) -> tuple[tuple[int, ...], ...]:
        """Those of some replicas; they come one behind the other."""
        groups = axis_groups(self.program, axis, stage)
        if not is_inside_replica(axis):
            return groups
        each = len(groups) // self.program.meshes[stage].dp
        return tuple(group for dp in dps for group in groups[dp * each : (dp + 1) * each])

    def _transfer_s(self, stage: int, chunk: int, dps: Sequence[int], *, back: bool, empty: bool) -> float:
        """Seconds of what a chunk sends to the next one's stage, or gets back from it, on the slowest rank of some
        replicas, while all others go on. empty: of messages without a byte."""
        after, sent = (stage + 1) % self.program.pp, self.program.stages[stage].chunks[chunk].sent
        assert sent is not None
        users = self.users[-1 if back else 1]
        if self.program.meshes[stage] == self.program.meshes[after]:
            ends = (after, stage) if back else (stage, after)
            pairs = dict.fromkeys(self._pairs(*ends, dps))
            nbytes = 0 if empty else sent.nbytes
            return max(self.cluster.transfer_time_s(nbytes, *pair, users[pair]) for pair in pairs)
        own: defaultdict[tuple[int, bool], list[tuple[tuple[int, int], int]]] = defaultdict(list)
        for message, pair in self._messages(stage, chunk, back=back):
            if message.source[0] in dps or message.target[0] in dps:
                row = (pair, 0 if empty else message.numel * DTYPE_BYTES[sent.dtype])
                own[pair[0], True].append(row)
                own[pair[1], False].append(row)
        return max(self._one_rank_s(rows, users) for rows in own.values())

    def _handled_s(self, stage: int, chunk: int, dps: Sequence[int]) -> float:
        """Of what a chunk sends to the next one's stage, on the rank that receives most."""
        after, sent = (stage + 1) % self.program.pp, self.program.stages[stage].chunks[chunk].sent
        assert sent is not None
        if self.program.meshes[stage] == self.program.meshes[after]:
            pairs = dict.fromkeys(self._pairs(stage, after, dps))
            return max(self.cluster.handling_time_s(sent.nbytes, *pair) for pair in pairs)
        by_rank: defaultdict[int, float] = defaultdict(float)
        for message, pair in self._messages(stage, chunk, back=False):
            if message.target[0] in dps:
                by_rank[pair[1]] += self.cluster.handling_time_s(message.numel * DTYPE_BYTES[sent.dtype], *pair)
        return max(by_rank.values(), default=0.0)

    def _one_rank_s(self, rows: Sequence[tuple[tuple[int, int], int]], users: Mapping[tuple[int, int], int]) -> float:
        """Seconds of the messages that one rank sends, or receives: they leave at once and take turns on its link,
        but for those whose rate already counts that others share it."""
        start_s = turns_s = shared_s = 0.0
        for pair, nbytes in rows:
            empty_s = self.cluster.transfer_time_s(0, *pair, users[pair])
            own_s = self.cluster.transfer_time_s(nbytes, *pair, users[pair]) - empty_s
            start_s = max(start_s, empty_s)
            if users[pair] > 1:
                shared_s = max(shared_s, own_s)
            else:
                turns_s += own_s
        return start_s + max(turns_s, shared_s)

    def _messages(self, stage: int, chunk: int, *, back: bool) -> Iterator[tuple[Message, tuple[int, int]]]:
        """What crosses between stages of different meshes, with the devices at both ends."""
        after, device = (stage + 1) % self.program.pp, self.program.devices
        source, target = (after, stage) if back else (stage, after)
        for message in self.program.crossing(stage, chunk, back=back):
            yield message, (device[source, *message.source], device[target, *message.target])

    def _pairs(self, source: int, target: int, dps: Sequence[int]) -> list[tuple[int, int]]:
        """Of stages with equal meshes."""
        device, tps = self.program.devices, range(self.program.meshes[source].tp)
        return [(device[source, dp, tp], device[target, dp, tp]) for dp in dps for tp in tps]

    def _all_pairs(self, stage: int, step: int) -> list[tuple[int, int]]:
        """Who sends to whom from a stage to the next (step 1) or to the one before (-1)."""
        other = (stage + step) % self.program.pp
        if self.program.meshes[stage] == self.program.meshes[other]:
            return self._pairs(stage, other, range(self.program.meshes[stage].dp))
        first, back = (stage, False) if step == 1 else (other, True)
        chunks = enumerate(self.program.stages[first].chunks)
        sent = [number for number, chunk in chunks if chunk.sent is not None]
        return list(dict.fromkeys(pair for number in sent for _, pair in self._messages(first, number, back=back)))

    def _users(self, step: int) -> dict[tuple[int, int], int]:
        """Of every message to the next stage (step 1) or to the one before (-1): how many share its sender's rate."""
        pairs = [pair for stage in range(self.program.pp) for pair in self._all_pairs(stage, step)]
        return dict(zip(pairs, self.cluster.senders(pairs), strict=True))

    def _shares_egress(self, stage: int, dps: Sequence[int]) -> bool:
        """Whether some rank's messages to both neighbours share a rate."""
        if not 0 < stage < self.program.pp - 1:
            return False
        ranks = {self.program.devices[stage, dp, tp] for dp in dps for tp in range(self.program.meshes[stage].tp)}
        before: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for pair in self._all_pairs(stage, -1):
            before[pair[0]].append(pair)
        both = ((there, back) for there in self._all_pairs(stage, 1) if there[0] in ranks for back in before[there[0]])
        return any(max(self.cluster.senders(pairs)) > 1 for pairs in both)
