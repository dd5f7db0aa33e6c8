"""Verify: the code that was printed does what was priced, and stages fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cost_model.axes import ACROSS, INSIDE
from cost_model.background import check_waited
from cost_model.errors import VerificationError
from cost_model.mesh import Mesh
from cost_model.placement import REPLICATE, Placements, Shard, placements_text
from cost_model.program import Block, Collective, Program, StageProgram, StepWork
from cost_model.shards import Bucket
from cost_model.tensor import DTYPE_BYTES, TensorMeta
from passes import overlap_vocabulary, vocabulary
from passes.fakes import fake_tensor
from passes.graph import torch_dtype
from passes.printed import check_printed
from passes.stage import StageCode


def verify_priced(linked: Program, priced: Program) -> None:
    """Stage by stage the same work on the same bytes, names aside; VerificationError for the first that differs."""
    for a, b in zip(linked.stages, priced.stages, strict=True):
        blocks = [
            (x, y) for c, d in zip(a.chunks, b.chunks, strict=True) for x, y in zip(c.blocks, d.blocks, strict=True)
        ]
        if _work(a) != _work(b) or not all(_is_renamed(x, y) for x, y in blocks):
            raise VerificationError(
                "priced stage", f"stage {a.stage} runs another program than the one that was priced"
            )


def _work(stage: StageProgram) -> list[object]:
    """What a stage's price depends on."""
    blocks = [block for c in stage.chunks for block in (c.forward, c.backward, c.weight) if block is not None]
    work: list[object] = [
        [
            (
                i.op,
                i.cost,
                i.collective,
                i.workspace_bytes,
                len(i.frees),
                [v.storage_bytes for v in i.outputs],
                i.completes,
            )
            for i in block.instructions
        ]
        for block in blocks
    ]
    work += [[(v.meta, v.storage_bytes) for v in block.inputs] for block in blocks]
    work += [(c.segments, len(c.saved), len(c.kept), c.sent, c.received) for c in stage.chunks]
    work += [sorted({v.storage: v.storage_bytes for v in c.constants}.values()) for c in stage.chunks]
    work += [(s.meta, s.placement, s.trainable, s.reduce_axis, s.tied) for s in stage.parameters]
    work += [[(v.meta, v.storage_bytes) for v in stage.persistent], stage.step]
    return work


def _is_renamed(block: Block, other: Block) -> bool:
    """Whether blocks that do the same work read, make and free the same values, each under one name of its own."""
    pairs = list(zip(_names(block), _names(other), strict=True))
    renamed = dict(pairs)
    alone = len(set(pairs)) == len(renamed) == len({name for _, name in pairs})
    return alone and {renamed["value", name][1] for name in block.outputs} == set(other.outputs)


def _names(block: Block) -> list[tuple[str, str]]:
    """Of all values and storages, as they come."""
    found = [name for v in block.inputs for name in (("value", v.name), ("storage", v.storage))]
    for line in block.instructions:
        found += [("value", name) for name in line.inputs]
        found += [name for v in line.outputs for name in (("value", v.name), ("storage", v.storage))]
        found += [("storage", name) for name in line.frees]
    return found


class RecordingComm:
    """Stands in for the runtime's communicator under fake tensors and writes down what is called."""

    def __init__(self) -> None:
        self.calls: list[Collective] = []

    def _note(self, kind: str, axis: str, x: Tensor, out: Tensor) -> Tensor:
        self.calls.append(Collective(kind, axis, max(t.numel() * t.element_size() for t in (x, out))))
        return out

    def index(self, axis: str) -> str:
        """Ops on fake tensors take the axis where kernels take a rank's place on it."""
        return axis

    def all_reduce(self, x: Tensor, axis: str, op: str) -> Tensor:
        return self._note("all_reduce", axis, x, vocabulary.all_reduce(x, axis, op))

    def all_reduce_(self, x: Tensor, axis: str, op: str) -> Tensor:
        return self._note("all_reduce", axis, x, x)

    def all_gather(self, x: Tensor, axis: str, *place: int) -> Tensor:
        return self._note("all_gather", axis, x, vocabulary.all_gather(x, axis, *place))

    def reduce_scatter(self, x: Tensor, axis: str, *place: int) -> Tensor:
        return self._note("reduce_scatter", axis, x, vocabulary.reduce_scatter(x, axis, *place))

    def begin_all_reduce(self, x: Tensor, axis: str, op: str) -> Tensor:
        return self._note("all_reduce", axis, x, overlap_vocabulary.begin_all_reduce(x, axis, op))

    def begin_all_reduce_(self, x: Tensor, axis: str, op: str) -> Tensor:
        return self._note("all_reduce", axis, x, x)

    def begin_all_gather(self, x: Tensor, axis: str, *place: int) -> Tensor:
        return self._note("all_gather", axis, x, overlap_vocabulary.begin_all_gather(x, axis, *place))

    def begin_reduce_scatter(self, x: Tensor, axis: str, *place: int) -> Tensor:
        return self._note("reduce_scatter", axis, x, overlap_vocabulary.begin_reduce_scatter(x, axis, *place))

    def wait(self, begun: Tensor) -> Tensor:
        return begun

    def sum_arrived(self, x: Tensor, arriving: Tensor, axis: str, *place: int) -> Tensor:
        out: Tensor = overlap_vocabulary.sum_arrived(x, arriving, axis, *place)
        return out

    def all_to_all(self, x: Tensor, axis: str, *place: int) -> Tensor:
        return self._note("all_to_all", axis, x, vocabulary.all_to_all(x, axis, *place))

    def take_shard(self, x: Tensor, axis: str, *place: int) -> Tensor:
        out: Tensor = vocabulary.take_shard(x, axis, *place)
        return out

    def collect(self, x: Tensor, number: int) -> Tensor:
        return x

    def segment(self, label: str | None = None) -> None:
        """Nothing is profiled."""

    def shard_ids(self, ids: Tensor, axis: str, *place: int) -> Tensor:
        out: Tensor = vocabulary.shard_ids(ids, axis, *place)
        return out


def verify_emitted(code: StageCode) -> None:
    """Run the printed source on fake tensors: its collectives must be those of the priced blocks, in order, with
    equal bytes and axes, and what it sends must have the announced shape. Line by line it must be what is priced."""
    check_printed(code.source, *code.blocks)
    namespace: dict[str, Any] = {}
    exec(compile(code.source, "<autopar program>", "exec"), namespace)
    calls, output = _run(code, namespace)
    for block, emitted in zip(code.blocks, calls, strict=True):
        check_waited(block)
        _compare(block.name, block, emitted)
    if code.sent is not None and tuple(output.shape) != code.sent.shape:
        raise VerificationError("sent shape", f"the code sends {tuple(output.shape)}, the estimate {code.sent.shape}")


def _run(code: StageCode, namespace: dict[str, Any]) -> tuple[list[list[Collective]], Tensor]:
    """The collectives of each block, and what is sent."""

    with FakeTensorMode() as mode, torch.no_grad():

        def fake(meta: TensorMeta) -> Tensor:
            return fake_tensor(meta.shape, torch_dtype(meta.dtype), mode=mode)

        by_kind: dict[str, dict[str, Tensor]] = {"parameter": {}, "buffer": {}, "batch": {}, "step": {}}
        for item in code.inputs:
            if item.kind != "activation":
                kind = {"constant": "buffer", "scale": "step"}.get(item.kind, item.kind)
                by_kind[kind][item.target] = fake(code.metas[item.node])
        for bucket in code.buckets:
            if bucket.zero == 3:
                by_kind["parameter"][bucket.name] = fake(bucket.part)
        received = [fake(code.received)] if code.received is not None else []
        kernels, device = torch.ops.autopar, torch.device("cpu")
        constants = namespace[f"setup{code.suffix}"](by_kind["buffer"], RecordingComm(), kernels, device)
        common = (by_kind["parameter"], by_kind["buffer"], constants, by_kind["batch"], by_kind["step"])
        comms = [RecordingComm() for _ in code.blocks]
        output, saved = namespace[code.forward.name](*common, received, comms[0], kernels, device)
        if code.sent is not None:
            saved.append(fake(code.sent))
        parameters = [i for i in code.inputs if i.kind == "parameter"]
        grads = {i.target: fake(code.gradient(i)) for i in parameters}
        grads.update({bucket.name: fake(bucket.gradients or bucket.part) for bucket in code.buckets})
        grads |= {name: by_kind["buffer"][name] for name in code.updates}
        returned = namespace[code.backward.name](*common, saved, grads, _CheckGradient(), comms[1], kernels, device)
        if code.weight is not None:
            namespace[code.weight.name](*common, returned[1], grads, _CheckGradient(), comms[2], kernels, device)
    return [comm.calls for comm in comms], output


class _RecordingRun:
    """Stands in for the executor in a printed step and writes down its collectives, before the update and after it."""

    def __init__(self, buckets: Sequence[Bucket], fed: Mapping[str, int]) -> None:
        self.buckets, self.fed = {bucket.name: bucket for bucket in buckets}, fed
        self.before: list[Collective] = []
        self.after: list[Collective] = []
        self.begun: list[Collective] = []
        self.calls = self.before

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def gather_rows(self, name: str, size: int) -> None:
        self.calls.append(Collective("all_gather", "dp", self.fed[name]))

    def reduce_gradients(self, axis: str, dtype: str, start: int, stop: int, reduced: str) -> None:
        self.calls.append(Collective("all_reduce", axis, (stop - start) * DTYPE_BYTES[reduced]))

    def begin_gradients(self, axis: str, dtype: str, start: int, stop: int, reduced: str) -> None:
        self.begun.append(Collective("all_reduce", axis, (stop - start) * DTYPE_BYTES[reduced]))

    def scatter_span(self, dtype: str, start: int, stop: int, inner: int) -> None:
        self.calls.append(Collective("reduce_scatter", INSIDE, (stop - start) * DTYPE_BYTES[dtype]))

    def reduce_span(self, dtype: str, start: int, stop: int, inner: int) -> None:
        self.calls.append(Collective("all_reduce", ACROSS, (stop - start) // inner * DTYPE_BYTES[dtype]))

    def gather_span(self, dtype: str, start: int, stop: int, inner: int) -> None:
        self.calls.append(Collective("all_gather", INSIDE, (stop - start) * DTYPE_BYTES[dtype]))

    def scatter_gradients(self, axis: str, bucket: str) -> None:
        self.calls.append(Collective("reduce_scatter", axis, self.buckets[bucket].reduced.nbytes))

    def reduce_part(self, axis: str, bucket: str) -> None:
        self.calls.append(Collective("all_reduce", axis, self.buckets[bucket].reduced_part.nbytes))

    def gather_parameters(self, axis: str, bucket: str) -> None:
        self.calls.append(Collective("all_gather", axis, self.buckets[bucket].meta.nbytes))

    def update_parameters(self) -> None:
        self.calls = self.after


def verify_step(source: str, buckets: Sequence[Bucket], fed: Mapping[str, int], work: StepWork) -> None:
    """What the printed step gathers of its batch, reduces, and gathers after the update, is what is priced, sums of
    single numbers aside. fed: bytes of the leaves of a batch."""
    namespace: dict[str, Any] = {}
    exec(compile(source, "<autopar program>", "exec"), namespace)
    run = _RecordingRun(buckets, fed)
    namespace["feed"](run)
    namespace["step"](run)
    for group in dict.fromkeys(group for _, group in work.reductions if group is not None):
        namespace["complete"](run, group)
    early = [collective for collective, group in work.reductions if group is not None]
    if run.begun != early:
        raise VerificationError("priced = run", f"groups of gradients begin {run.begun}, priced {early}")
    priced = ([c for c in work.collectives if c.axis != "world"], list(work.gathers))
    if (run.before, run.after) != priced:
        raise VerificationError("priced = run", f"the step reduces {run.before, run.after}, priced {priced}")


class _CheckGradient:
    """Stands in for what adds gradients to their buffers."""

    def __call__(self, buffer: Tensor, gradient: Tensor) -> None:
        if buffer.shape != gradient.shape:
            raise VerificationError("gradient shape", f"{tuple(gradient.shape)} for a parameter {tuple(buffer.shape)}")
        if buffer.dtype != gradient.dtype:
            raise VerificationError("gradient dtype", f"{gradient.dtype} for a buffer of {buffer.dtype}")

    def product(self, buffer: Tensor, left: Tensor, right: Tensor) -> None:
        self(buffer, left @ right)

    def complete(self, group: str) -> None:
        """Groups are compared where they are printed."""


def _compare(name: str, block: Block, emitted: list[Collective]) -> None:
    priced = list(block.collectives())
    if emitted != priced:
        at = next(
            (i for i, (a, b) in enumerate(zip(emitted, priced, strict=False)) if a != b), min(len(emitted), len(priced))
        )
        raise VerificationError(
            "priced = run",
            f"collective {at} of {name}: emitted {emitted[at : at + 1]}, priced {priced[at : at + 1]}",
        )


def verify_cuts(codes: Sequence[StageCode], meshes: Sequence[Mesh]) -> None:
    """What a stage sends is what the next receives; parameters of two stages lie alike in both. meshes: of each code.

    Between equal meshes shape and placement are equal, between others both ends lie so that a crossing knows them.
    """
    for index, (before, after) in enumerate(zip(codes, codes[1:], strict=False)):
        entry = next(after.placements[i.node] for i in after.inputs if i.kind == "activation")
        _check_cut(index, (before, before.exit, meshes[index]), (after, entry, meshes[index + 1]))
    parts: dict[str, int] = {}
    for bucket in (bucket for code in codes for bucket in code.buckets if bucket.tied is not None):
        if parts.setdefault(bucket.name, bucket.dp) != bucket.dp:
            raise VerificationError("tied parameters", f"{bucket.tied} is split over {bucket.dp} and other replicas")
    places: dict[str, tuple[str, Mesh]] = {}
    for index, (code, mesh) in enumerate(zip(codes, meshes, strict=True)):
        for item in code.inputs:
            if item.kind == "parameter":
                own = placements_text(code.placements[item.node]), mesh
                first = places.setdefault(item.target, own)
                _check_tied(index, item.target, own, first)


Side = tuple[StageCode, Placements, Mesh]


def _check_cut(index: int, before: Side, after: Side) -> None:
    (code, exit, mesh), (next_code, entry, next_mesh) = before, after
    sent, received = (code.sent, placements_text(exit)), (next_code.received, placements_text(entry))
    assert code.sent is not None and next_code.received is not None
    if mesh == next_mesh:
        fits = sent == received
    elif mesh.tp == next_mesh.tp:
        fits = exit == entry and code.sent.dtype == next_code.received.dtype
    else:
        ends = ((exit, code.sent, mesh), (entry, next_code.received, next_mesh))
        fits = code.sent.dtype == next_code.received.dtype and all(may_cross(*end) for end in ends)
    if not fits:
        raise VerificationError("cut", f"stage {index} sends {sent}, stage {index + 1} takes {received}")


def may_cross(places: Placements, local: TensorMeta, mesh: Mesh) -> bool:
    """Whether a tensor that lies so can go to another mesh: whole, or in shards one behind the other."""
    (place,) = places
    if isinstance(place, Shard) and mesh.tp > 1:
        shape = (local.shape[0] * mesh.dp, *local.shape[1:])
        return place.is_consecutive(shape)
    return mesh.tp == 1 or place == REPLICATE


def _check_tied(index: int, name: str, own: tuple[str, Mesh], first: tuple[str, Mesh]) -> None:
    """Parts of a parameter are the same in two stages if their meshes have equal numbers of shards."""
    (place, mesh), (known, known_mesh) = own, first
    whole = not place.startswith("S(") and not known.startswith("S(")
    if (place != known and mesh.tp == known_mesh.tp) or (mesh.tp != known_mesh.tp and not whole):
        found = f"{name} lies as {place} in stage {index}, as {known} before"
        raise VerificationError("tied parameters", found)
