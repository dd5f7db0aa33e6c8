"""What a rank does while this machine is measured: ops on its own thread, and messages to the other ranks.

Every op comes with its cost from the op table, so that a measured second stands for exactly the flops and bytes
that programs are priced by.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from autopar.runtime import kernels
from autopar.runtime.exchange import End, Exchange, exchange_of
from autopar.runtime.transfers import Transfers, connect_stages
from cost_model.cluster import BEHIND, ONCE, ONCE_KINDS, TRANSFER
from cost_model.device import BLAS, PRODUCT_LIBRARIES, STREAM_KINDS
from cost_model.device_rows import is_small_product
from cost_model.ops import OpCall, Ref, price_of
from cost_model.prices import BEHIND_KINDS
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta

Call: TypeAlias = Callable[[], object]
Steps: TypeAlias = tuple[float, float]
"""(seconds of any step, of each tensor that it updates besides)."""
Cold: TypeAlias = tuple[float, float, float, float]
"""(seconds since the last call, by which an op takes longer, by which a view does, a product)."""
COLD_BYTES = 64 * 2**20
"""Operands that rotate over so many bytes are found in memory, not in a cache (which ranks share)."""
_LINK = TRANSFER
ALONE = "alone"
"""The row of a probe whose op is unlike the others of its kind: its time tells that of the op and nothing else."""
NARROW = "narrow"
"""The row of a probe that looks up rows so narrow that finding each takes its time, not its bytes."""
_BETWEEN = 512  # width of the product between two messages: some milliseconds
MESSAGE_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "transfer")
STEP_KINDS = tuple(kind + ONCE for kind in ONCE_KINDS)
MOVING_KINDS = tuple(kind + BEHIND for kind in BEHIND_KINDS)
_MAX_COPIES = 256
_HOT_SHARE = 0.4  # of the time given to a probe
_WARM_UP_S = 0.002
_BATCH_S = 1e-4  # calls are timed in batches of at least so long: reading the clock takes most of a microsecond
_MIN_SAMPLES = 3
_MESSAGE_ROUNDS = 2
_TURNS = 5


@dataclass(frozen=True)
class Probe:
    """One op on tensors of one shape. make: builds (op, arguments, keyword arguments) on other memory each time.

    row: what it helps to fill in the device file: an op kind, "dtype:<name>", or ``ALONE``.
    """

    row: str
    label: str
    make: Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]

    def call(self) -> functools.partial[Any]:
        op, args, kwargs = self.make()
        return functools.partial(op, *args, **kwargs)

    def cost(self) -> OpCost:
        """The op table's price of this very call, which is made once."""
        op, args, kwargs = self.make()
        call = op_call(op, args, kwargs, op(*args, **kwargs))
        cost = price_of(call)
        assert cost is not None, self.label
        return dataclasses.replace(cost, op=cost.op or call.op)


def op_call(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> OpCall:
    """A call on tensors as the op table sees it."""
    inputs: list[TensorMeta] = []

    def refer(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        inputs.append(_meta_of(leaf))
        return Ref(len(inputs) - 1)

    given: dict[str, Any] = {}
    for position, argument in enumerate(op._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        value = args[position] if position < len(args) else kwargs.get(argument.name, default)
        given[argument.name] = pytree.tree_map(refer, value)
    outputs = tuple(_meta_of(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
    return OpCall(str(op), tuple(inputs), outputs, given)


def _meta_of(tensor: torch.Tensor) -> TensorMeta:
    return TensorMeta(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


class Calibrator:
    """The ranks' side of a calibration; each method is called on all of them at once."""

    def __init__(self, *, rank: int, world_size: int, payload: Any) -> None:
        torch.manual_seed(rank)
        self._costs: dict[int, OpCost] = {}
        sizes = {*message_ranks(world_size), *(() if world_size == 1 else (2,))}  # transfers go between pairs
        self._groups = {size: _own_group(rank, world_size, size) for size in sorted(sizes)}
        self._exchanges = {size: exchange_of(group, torch.device("cpu")) for size, group in self._groups.items()}
        others = [other for other in range(world_size) if other != rank]
        self._transfers = connect_stages({_LINK: dist.group.WORLD}, others, torch.device("cpu"))

    def resident_bytes(self, payload: Any) -> int:
        """The most this rank has held so far; asked for first, it is interpreter, torch and process group."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def measure_op(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """CPU seconds of one call of probe ``index`` of a library, all ranks at once, sampled for ``budget_s``; and its
        cost.

        Operands are in memory, as parameters and saved activations are. Ops that are bound by moving them, and small
        products, take the geometric mean of that and of operands in cache, since in a program the last ops' results
        still are, as are the weights of recurrent layers; but not updates, which find parameters and state as the step
        before left them.
        """
        from autopar.calibrate_probes import all_probes

        index, budget_s = payload["index"], payload["budget_s"]
        probe = all_probes(payload["library"])[index]
        cost = self._costs[index] = self._costs.get(index) or probe.cost()
        calls = [probe.call()]
        calls += [probe.call() for _ in range(_copies(_held_bytes(calls[0])) - 1)]
        dist.barrier()
        seconds = cpu_seconds(calls, (1 - _HOT_SHARE) * budget_s)
        if _finds_some_in_cache(probe.row, cost) and len(calls) > 1:
            seconds = math.sqrt(seconds * cpu_seconds(calls[:1], _HOT_SHARE * budget_s))
        return {"seconds": seconds, **dataclasses.asdict(cost)}

    def measure_cold(self, payload: Mapping[str, Any]) -> Cold:
        """Seconds of ``products``, and by which (an op, a view, a product) takes longer behind them than in a row."""
        from autopar.calibrate_cold import cold_s

        dist.barrier()
        return cold_s(payload["library"], payload["products"], payload["budget_s"])

    def measure_step(self, library: str) -> Steps:
        """CPU seconds of a step beside its ops and messages."""
        from autopar.calibrate_step import step_s

        dist.barrier()
        return step_s(library)

    def product_s(self, budget_s: float) -> dict[str, float]:
        """CPU seconds of one product by each library that this build of torch has, all ranks at once: the least of
        several in turn, since others disturb now one and now another."""
        from autopar.calibrate_probes import reference_product

        calls = {
            name: reference_product(name).call() for name in PRODUCT_LIBRARIES if name == BLAS or kernels.HAS_ONEDNN
        }
        found = dict.fromkeys(calls, math.inf)
        for _ in range(_TURNS):
            dist.barrier()
            for name, call in calls.items():
                found[name] = min(found[name], cpu_seconds([call], budget_s / _TURNS))
        return found

    def measure_message(self, payload: Mapping[str, Any]) -> float:
        """Wall seconds of one collective or transfer of ``nbytes`` in groups of ``ranks``, all groups at once; of a
        collective behind compute, what remains of it, and CPU seconds of a transfer there."""
        group = self._groups[payload["ranks"]]
        exchange = self._exchanges[payload["ranks"]]
        kind, behind, _ = payload["kind"].partition(BEHIND)
        if behind and kind == TRANSFER:
            return _handling_seconds(payload["nbytes"], payload["repeats"], group, self._transfers)
        if behind:
            begin = _begun(kind, payload["nbytes"], payload["ranks"], exchange)
            return _behind_seconds(begin, payload["repeats"], exchange, group)
        if kind.endswith(ONCE):
            return _once_seconds(kind.removesuffix(ONCE), payload["nbytes"], payload["repeats"], exchange, group)
        call, messages = _message(
            payload["kind"], payload["nbytes"], payload["ranks"], group, exchange, self._transfers
        )
        call()
        return _wall_seconds(call, payload["repeats"], group) / messages


def _own_group(rank: int, world_size: int, size: int) -> Any:
    """The group of ``size`` consecutive ranks, the last of fewer, that this one is in; every rank makes all groups."""
    blocks = [range(start, min(start + size, world_size)) for start in range(0, world_size, size)]
    groups = {block: dist.new_group(list(block)) for block in blocks}
    return next(group for block, group in groups.items() if rank in block)


def message_ranks(world_size: int) -> tuple[int, ...]:
    """Group sizes that a mesh of so many ranks can have: its divisors above 1."""
    return tuple(size for size in range(2, world_size + 1) if world_size % size == 0)


def cpu_seconds(calls: list[Call], budget_s: float) -> float:
    """Median CPU seconds of one call, turning over ``calls``; results live on for half a turn.

    CPU time of this thread rather than wall time: the same on a machine that does nothing else, and hardly
    touched by what else runs on one that does.
    """
    kept: collections.deque[object] = collections.deque(maxlen=max(1, len(calls) // 2))
    turn = itertools.cycle(calls)
    start = time.thread_time()
    for done in range(1, 2 + len(calls) // 2):
        kept.append(next(turn)())
        once_s = (time.thread_time() - start) / done
        if once_s * done > _WARM_UP_S:
            break
    repeat = math.ceil(_BATCH_S / max(once_s, 1e-7))
    samples: list[float] = []
    deadline = time.monotonic() + budget_s
    while time.monotonic() < deadline or len(samples) < _MIN_SAMPLES:
        start = time.thread_time()
        for call in itertools.islice(turn, repeat):
            kept.append(call())
        samples.append((time.thread_time() - start) / repeat)
    return statistics.median(samples)


def _finds_some_in_cache(row: str, cost: OpCost) -> bool:
    return row != "optimizer" and (row in (*STREAM_KINDS, ALONE, NARROW) or is_small_product(cost))


def _held_bytes(call: functools.partial[Any]) -> int:
    """Of the operands of a call, each once; fewer than it moves where it writes into them."""
    tensors = (leaf for leaf in pytree.tree_leaves((call.args, call.keywords)) if isinstance(leaf, torch.Tensor))
    return sum(tensor.nbytes for tensor in tensors)


def _copies(nbytes: float) -> int:
    return min(_MAX_COPIES, math.ceil(COLD_BYTES / max(nbytes, 1.0)))


def _wall_seconds(call: Call, repeats: int, group: dist.ProcessGroup) -> float:
    """Wall seconds of one call: the median of those of a few rounds, each started together. A call during which the
    scheduler lets another thread run takes some milliseconds longer, which the mean of a round would tell as usual.

    Ranks compute between calls, as they do in programs: one comes a little later than another, and finds messages in
    memory rather than in cache. Calls back to back took half as long as those of tensor-parallel steps.
    """
    samples = []
    operand = torch.rand(_BETWEEN, _BETWEEN)
    for _ in range(_MESSAGE_ROUNDS):
        dist.barrier(group)
        for _ in range(repeats):
            operand @ operand
            samples.append(_once_s(call))
    return statistics.median(samples)


def _once_seconds(kind: str, nbytes: int, repeats: int, exchange: Exchange, group: dist.ProcessGroup) -> float:
    """Wall seconds of one collective of ``ONCE_KINDS``, as a step with ZeRO ends: gradients are scattered after
    compute, this rank's part is updated, parameters are gathered. The median, as of ``_wall_seconds``."""
    ranks, rank = group.size(), group.rank()
    gradients, weights, arriving = (torch.zeros(max(1, nbytes // 4 // ranks) * n) for n in (ranks, ranks, ranks - 1))
    sent, kept = gradients.view(ranks, -1)[rank], weights.view(ranks, -1)[rank]
    operand, samples = torch.rand(_BETWEEN, _BETWEEN), []
    for _ in range(_MESSAGE_ROUNDS):
        dist.barrier(group)
        for _ in range(repeats):
            operand @ operand
            scattered_s = _once_s(lambda: exchange.begin_scatter(sent, gradients, arriving)())
            kept.add_(sent)
            gathered_s = _once_s(lambda: exchange.gather(weights, kept))
            samples.append({"reduce_scatter": scattered_s, "all_gather": gathered_s}[kind])
    return statistics.median(samples)


def _behind_seconds(begin: Callable[[], End], repeats: int, exchange: Exchange, group: dist.ProcessGroup) -> float:
    """Wall seconds that one collective keeps a rank from computing where products stand between its beginning and its
    end, for longer than it takes by itself: the median of those of a few rounds, each started together."""
    samples, operand = [], torch.rand(_BETWEEN, _BETWEEN)
    whole_s, product_s = _once_s(lambda: begin()()), _once_s(lambda: operand @ operand)
    for _ in range(_MESSAGE_ROUNDS):
        dist.barrier(group)
        for _ in range(repeats):
            start = time.perf_counter()
            end = begin()
            begun_s = time.perf_counter() - start
            for _ in range(1 + math.ceil(whole_s / product_s)):
                operand @ operand
            samples.append(begun_s + _once_s(end))
        exchange.settle()
    return statistics.median(samples)


def _handling_seconds(nbytes: int, repeats: int, group: dist.ProcessGroup, transfers: Transfers) -> float:
    """CPU seconds of this rank's thread for sending one tensor to the other of a pair and receiving one that is there
    by then: waiting for the other rank is no part of it. The median, as of ``_wall_seconds``; a rank alone looks on."""
    others = [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]
    sent, operand, samples = torch.zeros(max(1, nbytes // 4)), torch.rand(_BETWEEN, _BETWEEN), []
    received = torch.zeros_like(sent)
    for _ in range(_MESSAGE_ROUNDS):
        dist.barrier(group)
        for _ in range(repeats):
            start = time.thread_time()
            works = [transfers.send(_LINK, sent, there) for there in others]
            works += [transfers.receive(_LINK, received, there) for there in others]
            begun_s = time.thread_time() - start
            operand @ operand
            start = time.thread_time()
            for work in reversed(works):  # nobody waits for a reader who waits for him
                work.wait(None)
            samples.append(begun_s + time.thread_time() - start)
    return statistics.median(samples)


def _once_s(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _message(
    kind: str, nbytes: int, ranks: int, group: dist.ProcessGroup, exchange: Exchange, transfers: Transfers
) -> tuple[Call, int]:
    """A call that moves ``nbytes`` of the full tensor as its price counts them, and how many messages that is."""
    full = torch.zeros(max(1, nbytes // 4 // ranks) * ranks)
    other, piece = torch.zeros_like(full), torch.zeros(full.numel() // ranks)
    members = dist.get_process_group_ranks(group)
    calls: dict[str, Call] = {
        "all_reduce": lambda: exchange.begin_all_reduce(full, "sum")(),
        "all_gather": lambda: exchange.gather(full, piece),
        "reduce_scatter": lambda: exchange.begin_scatter(piece, full, other[piece.numel() :])(),
        "all_to_all": lambda: dist.all_to_all_single(other, full, group=group),
        "broadcast": lambda: dist.broadcast(full, members[0], group=group),
        "transfer": functools.partial(_ping_pong, full, members, transfers),
    }
    return calls[kind], 2 if kind == "transfer" else 1


def _begun(kind: str, nbytes: int, ranks: int, exchange: Exchange) -> Callable[[], End]:
    """What begins a collective of ``BEHIND_KINDS``."""
    full = torch.zeros(max(1, nbytes // 4 // ranks) * ranks)
    piece, other = full[: full.numel() // ranks].clone(), torch.zeros_like(full)
    calls: dict[str, Callable[[], End]] = {
        "all_reduce": lambda: exchange.begin_all_reduce(full, "sum"),
        "all_gather": lambda: exchange.begin_gather(full, piece),
        "reduce_scatter": lambda: exchange.begin_scatter(piece, full, other[piece.numel() :]),
    }
    return calls[kind]


def _ping_pong(tensor: torch.Tensor, members: list[int], transfers: Transfers) -> None:
    """There and back between the first two members, as between stages; the others look on, and so does one alone."""
    if len(members) == 1:
        return
    here, there = members[:2]
    if dist.get_rank() == here:
        transfers.send(_LINK, tensor, there).wait(None)
        transfers.receive(_LINK, tensor, there).wait(None)
    elif dist.get_rank() == there:
        transfers.receive(_LINK, tensor, here).wait(None)
        transfers.send(_LINK, tensor, here).wait(None)
