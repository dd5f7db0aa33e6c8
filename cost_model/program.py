"""The program as prices see it: blocks of instructions over named values.

``passes`` builds these nouns from the very fx graphs that code generation prints, so the simulator
and the liveness analysis look at what will run, without knowing torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cost_model.crossing import End, Message, messages
from cost_model.mesh import Degree, Mesh, meshes_of
from cost_model.shards import Bucket, ParameterShard
from cost_model.tensor import TensorMeta


@dataclass(frozen=True)
class OpCost:
    """Work of one op on one device: what a device file turns into seconds.

    kind: the row of a device file's efficiency table ("matmul", "attention", "elementwise", ...).
    flops: floating-point operations; nbytes: bytes read and written at least once.
    gemm: (batch, m, n, k) of a matrix multiplication; (batch x heads, queries, keys, width) of fused attention.
    op: its name in the op table, where known; a measured device has rows of their own for some ops.
    parts: of a compiled kernel: the costs of its ops as each would run alone; its own are those of the whole.
    rows: of a table that are looked up or added to one by one.
    """

    kind: str
    flops: float
    nbytes: float
    dtype: str
    gemm: tuple[int, int, int, int] | None = None
    op: str | None = None
    parts: tuple[OpCost, ...] = ()
    rows: int = 0


@dataclass(frozen=True)
class Collective:
    """One collective as issued by one rank.

    kind: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast.
    axis: mesh axes whose ranks take part ("tp", "tp0", "tp1_tp0", "dp", "dp_tp", "tied:<name>", "world"; see
      ``cost_model.axes``).
    nbytes: bytes of the full (gathered or reduced) tensor, as torch's op sees its larger side.
    """

    kind: str
    axis: str
    nbytes: int


@dataclass(frozen=True)
class Value:
    """A tensor of a block. Values with one ``storage`` share its bytes; ``storage_bytes`` is that storage's size."""

    name: str
    meta: TensorMeta
    storage: str
    storage_bytes: int


@dataclass(frozen=True)
class Instruction:
    """One line of generated code.

    op: name in the op table or of a collective; inputs: value names; cost: None for views and pure collectives;
    workspace_bytes: transient bytes inside the op beyond its outputs;
    frees: storages whose last reference is dropped right after this line; segment: index in the chain.
    begins: whether ``collective`` only begins here and moves on behind what follows, until an instruction that
    ``awaits`` its output; awaits: the value that this one waits for. completes: the group of gradients that is complete
    here in the last microbatch.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[Value, ...]
    cost: OpCost | None
    collective: Collective | None
    workspace_bytes: int
    frees: tuple[str, ...]
    segment: int
    begins: bool = False
    awaits: str | None = None
    completes: str | None = None


@dataclass(frozen=True)
class Block:
    """A straight-line function. Inputs are owned by the caller unless named in some ``frees``."""

    name: str
    inputs: tuple[Value, ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[str, ...]

    def collectives(self) -> tuple[Collective, ...]:
        return tuple(i.collective for i in self.instructions if i.collective is not None)


@dataclass(frozen=True)
class StepWork:
    """Work done once per step on each rank of a stage: gradient reduction, the optimizer, gathering of parameters.

    optimized_bytes: sizes of the tensors that the optimizer updates, each of which has state of its own; None where
    these are the trainable parameters. master_bytes: of those that are copies of parameters in another dtype.
    beside_bytes: of the copy in another dtype that each of ``collectives`` works on, and of what arrives beside a row
    outside buckets; none where it is empty.
    groups: for each of ``collectives`` the group of gradients with whose completion it begins, behind the rest of the
    last microbatch's backward; None for those that are waited for where they stand, and all where it is empty.
    """

    collectives: tuple[Collective, ...]
    optimizer_costs: tuple[OpCost, ...]
    optimizer_state_bytes: int
    optimizer_workspace_bytes: int
    gathers: tuple[Collective, ...] = ()
    optimized_bytes: tuple[int, ...] | None = None
    master_bytes: tuple[int, ...] = ()
    beside_bytes: tuple[int, ...] = ()
    groups: tuple[str | None, ...] = ()

    @property
    def reductions(self) -> tuple[tuple[Collective, str | None], ...]:
        """``collectives`` with their groups."""
        groups = self.groups or (None,) * len(self.collectives)
        return tuple(zip(self.collectives, groups, strict=True))


@dataclass(frozen=True)
class Chunk:
    """Neighbouring segments as a stage runs them, microbatch by microbatch.

    forward: reads microbatch inputs and the activation received; its outputs are the activation sent (or the loss)
    and the saved values. backward: reads saved values and the gradient received; its outputs are the gradient sent and
    the values kept. Parameter gradients are accumulated in place into a flat buffer.
    saved: storages alive from a microbatch's forward to its backward.
    sent / received: the activation that crosses the cut after / before this chunk (None at the ends of the chain);
    the gradient that comes back has the same meta. sent_split / received_split: whether tp shards hold parts of it.
    constants: values that the blocks read and that never change.
    weight: None, or the part of the backward that adds gradients to their buffers, run some time after the rest;
    kept: storages alive from a microbatch's backward to its weight block.
    """

    segments: tuple[int, ...]
    forward: Block
    backward: Block
    saved: tuple[str, ...]
    sent: TensorMeta | None
    received: TensorMeta | None
    constants: tuple[Value, ...] = ()
    weight: Block | None = None
    kept: tuple[str, ...] = ()
    sent_split: bool = False
    received_split: bool = False

    @property
    def backwards(self) -> tuple[Block, ...]:
        """The backward in one block, or in two."""
        return (self.backward, *([] if self.weight is None else [self.weight]))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What runs once per microbatch."""
        return (self.forward, *self.backwards)


@dataclass(frozen=True)
class StageProgram:
    """All that one stage runs. Every rank of the stage runs the same program on its own shards.

    chunks: one for each virtual stage; chunk c of stage s is number c x pp + s of the chain.
    parameters: of all chunks, each once. persistent: values kept for the whole step beside parameters (batch inputs,
    step constants). buckets: parameters whose state is split over the dp axis; the others have state on every replica.
    """

    stage: int
    chunks: tuple[Chunk, ...]
    parameters: tuple[ParameterShard, ...]
    persistent: tuple[Value, ...]
    step: StepWork
    buckets: tuple[Bucket, ...] = ()

    @property
    def updated_tensors(self) -> int:
        """How many the optimizer updates."""
        if not self.step.optimizer_costs:
            return 0
        alone = self.step.optimized_bytes
        return sum(shard.trainable for shard in self.parameters) if alone is None else len(alone)

    def collectives(self) -> tuple[Collective, ...]:
        """Of its blocks and of its step."""
        blocks = (block for chunk in self.chunks for block in chunk.blocks)
        inside = (collective for block in blocks for collective in block.collectives())
        return (*inside, *self.step.collectives, *self.step.gathers)

    @property
    def segments(self) -> tuple[int, ...]:
        return tuple(segment for chunk in self.chunks for segment in chunk.segments)


@dataclass(frozen=True)
class Program:
    """The whole distributed program: one StageProgram per stage, all ranks by symmetry.

    dp, tp: mesh degrees, of all stages or of each; microbatches: per data-parallel replica; virtual_stages: chunks of
    each stage; window: as in ``stage_schedule``. tp_sizes: of the axes that tp consists of, none where it is one.
    dp_inner: as in ``Plan``.
    devices[(stage, dp, tp)] = device index in the cluster.
    """

    dp: Degree
    tp: Degree
    pp: int
    microbatches: int
    schedule: str
    stages: tuple[StageProgram, ...]
    devices: Mapping[tuple[int, int, int], int] = field(hash=False)
    virtual_stages: int = 1
    window: int = 1
    tp_sizes: tuple[int, ...] = ()
    dp_inner: int = 1

    def __post_init__(self) -> None:
        assert not self.tp_sizes or math.prod(self.tp_sizes) == self.tp
        assert len(self.stages) == self.pp
        assert all(len(stage.chunks) == self.virtual_stages for stage in self.stages)

    def sizes(self, stage: int) -> tuple[int, ...]:
        """Of the axes that tp of a stage consists of."""
        return self.tp_sizes or (self.meshes[stage].tp,)

    @property
    def chain(self) -> tuple[Chunk, ...]:
        """All chunks, from the first segments to the last."""
        return tuple(stage.chunks[index] for index in range(self.virtual_stages) for stage in self.stages)

    @cached_property
    def meshes(self) -> tuple[Mesh, ...]:
        """Of each stage."""
        return meshes_of(self.dp, self.tp, self.pp)

    @property
    def num_devices(self) -> int:
        return sum(mesh.size for mesh in self.meshes)

    def ranks(self, stage: int) -> tuple[int, ...]:
        """The devices of a stage, in the order of its mesh."""
        return self._ranks[stage]

    @cached_property
    def _ranks(self) -> tuple[tuple[int, ...], ...]:
        cells = enumerate(mesh.cells() for mesh in self.meshes)
        return tuple(tuple(self.devices[stage, dp, tp] for dp, tp in own) for stage, own in cells)

    def tied_stages(self, name: str) -> tuple[int, ...]:
        """Stages with a parameter whose ``tied`` is this name."""
        return tuple(s.stage for s in self.stages if any(shard.tied == name for shard in s.parameters))

    def tied_groups(self, name: str) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        """(stage, dp, tp) of the ranks that sum the gradient of a tied parameter.

        Ranks at one place of stages of equal meshes; where a degree differs, all along it, and of each stage the first
        rank of the group alone gives its gradient, the others nothing.
        """
        stages = self.tied_stages(name)
        meshes = [self.meshes[stage] for stage in stages]
        same_dp, same_tp = len({mesh.dp for mesh in meshes}) == 1, len({mesh.tp for mesh in meshes}) == 1
        found: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for stage, mesh in zip(stages, meshes, strict=True):
            for dp, tp in mesh.cells():
                found.setdefault((dp if same_dp else 0, tp if same_tp else 0), []).append((stage, dp, tp))
        return tuple(tuple(cells) for cells in found.values())

    def crossing(self, stage: int, chunk: int, *, back: bool) -> tuple[Message, ...]:
        """What a stage's chunk sends to the next one (the stage after, or the next chunk of the first stage); back:
        what returns."""
        after = (stage + 1) % self.pp
        sending, taking = self.stages[stage].chunks[chunk], self.stages[after].chunks[chunk + (after == 0)]
        assert sending.sent is not None and taking.received is not None
        there = End(self.meshes[stage], sending.sent_split, sending.sent.numel)
        here = End(self.meshes[after], taking.received_split, taking.received.numel)
        return messages(here, there) if back else messages(there, here)
