"""Programs of known times, and what their simulation says."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cost_model.cold_calls import ColdCalls
from cost_model.program import Block, Chunk, Collective, Instruction, OpCost, Program, StageProgram, StepWork, Value
from cost_model.shards import ParameterShard
from cost_model.simulate import SimulationResult, simulate
from cost_model.tensor import TensorMeta

CUT = TensorMeta((8,), "float32")


@dataclass(frozen=True)
class Device:
    """Seconds of an op are its flops times ``slowness``."""

    kind: str = "cuda"
    op_overhead_s: float = 0.25
    slowness: float = 1.0
    update_s: float = 0.0
    cold_calls: ColdCalls | None = None

    def op_time_s(self, cost: OpCost) -> float:
        return cost.flops * self.slowness

    def call_overhead_s(self, cost: OpCost) -> float:
        return self.op_overhead_s

    def step_s(self, tensors: int) -> float:
        return self.update_s * tensors


@dataclass(frozen=True)
class Cluster:
    """Seconds of a collective are its bytes times the sum of its devices; of a transfer, as listed by (from, to).

    delay_s: of an empty message, delays_s: from and to devices where it differs. handled_s: of sending one and
    receiving one. behind: the part of a collective that remains behind compute; once: of one that comes once a step.
    """

    devices: tuple[Device, ...]
    transfer_s: float = 0.0
    delay_s: float = 0.0
    handled_s: float = 0.0
    transfers_s: Mapping[tuple[int, int], float] = field(default_factory=dict)
    uneven: bool = False
    rendezvous: bool = False
    crowding: float = 1.0
    shared: frozenset[int] = frozenset()
    behind: float = 0.0
    once: float = 1.0
    delays_s: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def collective_time_s(self, kind: str, nbytes: int, devices: tuple[int, ...]) -> float:
        return float(nbytes * sum(devices))

    def once_time_s(self, kind: str, nbytes: int, devices: tuple[int, ...]) -> float:
        return self.once * self.collective_time_s(kind, nbytes, devices)

    def behind_time_s(self, kind: str, nbytes: int, devices: tuple[int, ...]) -> float:
        return self.behind * self.collective_time_s(kind, nbytes, devices)

    def senders(self, pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Devices that are ``shared`` send all their messages at one rate."""
        sources = [source for source, _ in pairs]
        return tuple(sources.count(source) if source in self.shared else 1 for source in sources)

    def transfer_time_s(self, nbytes: int, source: int, target: int, senders: int | None = None) -> float:
        assert nbytes in (0, CUT.nbytes)
        if not nbytes:
            return self.delays_s.get((source, target), self.delay_s)
        return self.transfers_s.get((source, target), self.transfer_s)

    def handling_time_s(self, nbytes: int, source: int, target: int) -> float:
        return self.handled_s


def op(seconds: float, kind: str = "matmul") -> Instruction:
    return Instruction("aten.mm", (), (), OpCost(kind, seconds, 0.0, "float32"), None, 0, (), 0)


def collective(axis: str, nbytes: int = 1) -> Collective:
    return Collective("all_reduce", axis, nbytes)


def issue(what: Collective | None) -> Instruction:
    """A collective, or a view where there is none."""
    return Instruction("aten.view", (), (), None, what, 0, (), 0)


def stage_program(
    stage: int,
    pp: int,
    forward: Sequence[Instruction],
    backward: Sequence[Instruction],
    step: Sequence[Collective] = (),
    optimizer_s: float = 0.0,
    tied: str | None = None,
) -> StageProgram:
    """A stage of given instructions; what crosses its cuts is one small activation."""
    cut = Value("cut", CUT, "cut", CUT.nbytes)
    emit = Instruction("aten.add", (), (cut,), OpCost("elementwise", 0.0, 0.0, "float32"), None, 0, (), 0)
    shard = ParameterShard("w", TensorMeta((4,), "float32"), "R", True, None, tied)
    chunk = Chunk(
        segments=(stage,),
        forward=Block("forward", (), (*forward, emit), ("cut",)),
        backward=Block("backward", (), (*backward, emit), ("cut",) if stage else ()),
        saved=(),
        sent=CUT if stage < pp - 1 else None,
        received=CUT if stage else None,
    )
    return StageProgram(
        stage=stage,
        chunks=(chunk,),
        parameters=(shard,),
        persistent=(),
        step=StepWork(tuple(step), (OpCost("optimizer", optimizer_s, 0.0, "float32"),), 0, 0),
    )


def program(stages: Sequence[StageProgram], microbatches: int, schedule: str, dp: int = 1, tp: int = 1) -> Program:
    cells = [(s, d, t) for s in range(len(stages)) for d in range(dp) for t in range(tp)]
    devices = {cell: index for index, cell in enumerate(cells)}
    return Program(dp, tp, len(stages), microbatches, schedule, tuple(stages), devices)


def pipeline(schedule: str, microbatches: int, times: Sequence[tuple[float, float]]) -> Program:
    """Stages of one forward and one backward op each."""
    stages = [stage_program(i, len(times), [op(f)], [op(b)]) for i, (f, b) in enumerate(times)]
    return program(stages, microbatches, schedule)


def run(what: Program, transfer_s: float = 0.0, device: Device = Device(), blocking: bool = False) -> SimulationResult:
    return simulate(what, Cluster((device,) * what.num_devices, transfer_s), blocking=blocking)


def interleaved(pp: int, virtual_stages: int, microbatches: int, forward_s: float, backward_s: float) -> Program:
    """Equal stages, each cut into equal chunks."""
    length = pp * virtual_stages
    chain = [
        stage_program(k, length, [op(forward_s / virtual_stages)], [op(backward_s / virtual_stages)])
        for k in range(length)
    ]
    stages = [
        dataclasses.replace(chain[stage], chunks=tuple(own.chunks[0] for own in chain[stage::pp]))
        for stage in range(pp)
    ]
    devices = {(stage, 0, 0): stage for stage in range(pp)}
    return Program(1, 1, pp, microbatches, "interleaved", tuple(stages), devices, virtual_stages)


def zero_bubble(pp: int, microbatches: int, forward_s: float, backward_s: float, weight_s: float) -> Program:
    """Equal stages; the first runs its backward in one."""
    stages = []
    for stage in range(pp):
        made = stage_program(stage, pp, [op(forward_s)], [op(backward_s)] if stage else [op(backward_s + weight_s)])
        weight = Block("weight", (), (op(weight_s),), ()) if stage else None
        stages.append(dataclasses.replace(made, chunks=(dataclasses.replace(made.chunks[0], weight=weight),)))
    return program(stages, microbatches, "zero_bubble")


def spans(result: SimulationResult, stage: int, name: str) -> list[tuple[float, float]]:
    return [(e.start_s, e.end_s) for e in result.timeline if e.stage == stage and e.name == name]
