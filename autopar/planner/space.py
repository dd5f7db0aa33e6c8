"""Space: the traced model as chains of factor graphs, one chain for each mesh and microbatch size.

Variables of a segment's graph are what a plan file holds: ``op:<node>`` (a strategy), ``input:<node>`` (a placement
of a parameter or of the activation that comes in) and ``form:<node>`` (the second form in which a value with
several users is shared).
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import numpy as np

from autopar.optimizer_price import OptimizerPrice
from autopar.planner.chain import Chain, Floor
from autopar.planner.factor_graph import FactorGraph, FloatArray
from autopar.planner.least import floors_s, least_saved_bytes
from autopar.planner.local_model import LocalModel, Sizes, Structure
from autopar.planner.prices import MeshPrices
from autopar.planner.saving import NONE, SAVE_ALL, Saving
from autopar.planner.segment_graph import SegmentGraph
from autopar.planner.several_axes import divides_better, pairs, spans_levels
from cost_model.cluster import Cluster
from cost_model.errors import UnsupportedError
from cost_model.mesh import Mesh
from cost_model.parallelism import RECOMPUTES
from cost_model.placement import (
    parse_placements,
)
from cost_model.precision import Precision
from cost_model.tensor import TensorMeta
from passes.batch import BatchAnalysis
from passes.segment import Segment
from passes.shard import input_key
from passes.specialise import BatchMismatchError, Specialiser
from passes.trace import Traced
from passes.zero import zero_key

_EXCHANGED = 5
"""Copies of a segment's parameters that are there where exchanges move behind compute: what backward uses and has
gathered for the next segment, its gradients and those of the one before, as they were and as they arrive."""


class ModelSpace:
    """What the search asks: a chain for each (dp, axes of tp, microbatch size); None where the batch does not split so.

    sharded: False keeps every parameter whole (an optimizer that is not elementwise); divisible: False keeps its state
    on every replica (one that treats pieces of a flattened parameter otherwise than the parameter).
    """

    def __init__(
        self,
        traced: Traced,
        analysis: BatchAnalysis,
        cluster: Cluster,
        optimizer: OptimizerPrice,
        parameter_bytes: int,
        precision: Precision,
        *,
        sharded: bool,
        divisible: bool,
    ) -> None:
        self.traced, self.analysis, self.cluster = traced, analysis, cluster
        self.divisible, self.precision = divisible, precision
        self.optimizer, self.parameter_bytes, self.sharded = optimizer, parameter_bytes, sharded
        self._models: dict[int, LocalModel | None] = {}
        self._chains: dict[tuple[int, Sizes, int, Saving, bool | None], Chain | None] = {}
        self._graphs: dict[tuple[int, Sizes, bool | None, str], SegmentGraph] = {}
        self._least_saved_bytes: dict[tuple[int, Sizes, bool | None], float] = {}
        self._floors_s: dict[tuple[int, bool | None], dict[Sizes, FloatArray]] = {}
        self._prices: dict[Sizes, MeshPrices] = {}
        self._mesh_prices: dict[tuple[int, Sizes], MeshPrices] = {}
        self._updated: list[int] | None = None
        self._moves = False
        self.structure, self.specialiser = Structure(traced), Specialiser(traced)

    def local_model(self, microbatch_size: int) -> LocalModel | None:
        """Specialised and segmented once per size; None where the model does not allow the size."""
        if microbatch_size not in self._models:
            self._models[microbatch_size] = self._specialised(microbatch_size)
        return self._models[microbatch_size]

    def _specialised(self, microbatch_size: int) -> LocalModel | None:
        whole = self.traced.global_graph.batch
        if self.analysis.reason is not None and microbatch_size != whole:
            return None
        names = {name for part in self.structure.representatives.values() for name in part.nodes}
        try:
            model = self.specialiser.part(microbatch_size, names)
        except (UnsupportedError, BatchMismatchError):
            return None
        return LocalModel(self.structure, self.specialiser, model)

    def chain(
        self, dp: int, sizes: Sizes, microbatch_size: int, saving: Saving = SAVE_ALL, sequence: bool | None = None
    ) -> Chain | None:
        """The chain with these ways to save memory to choose from. sequence: whether values between segments are split
        along the sequence, None where that is a choice too."""
        key = (dp, sizes, microbatch_size, saving, sequence)
        if key not in self._chains:
            local = self._possible(dp, sizes, microbatch_size, sequence)
            self._chains[key] = None if local is None else self._chain(local, dp, sizes, saving, sequence)
        return self._chains[key]

    def _possible(self, dp: int, sizes: Sizes, microbatch_size: int, sequence: bool | None) -> LocalModel | None:
        """The model at this size; None where it cannot run so."""
        if self.analysis.synchronised and dp * microbatch_size != self.traced.global_graph.batch:
            return None
        local = self.local_model(microbatch_size)
        splits = local is not None and (not sequence or sizes == (1,) or local.has_sequence(sizes))
        return local if splits else None

    def floor(
        self, dp: int, sizes: Sizes, microbatch_size: int, above_s: float, sequence: bool | None = None
    ) -> Floor | None:
        """What the ops of segments that repeat take, parameters apart: as fewer ranks bound it, or by their strategies.

        Half of the ranks take at most twice as long: what they do is what two of the others do, with fewer to talk to.
        That holds up to the factor by which larger ops may run at lower rates.
        """
        local = self._possible(dp, sizes, microbatch_size, sequence)
        if local is None:
            return None
        known = self._floors_s.setdefault((microbatch_size, sequence), {})
        if not known:  # one rank splits no sequence
            known[(1,)] = floors_s(*self._repeated(local, self.mesh_prices(dp, (1,)), None))
        found_s = self._inherited_s(known, sizes)
        if found_s[0] <= above_s and sizes not in known:
            known[sizes] = floors_s(*self._repeated(local, self.mesh_prices(dp, sizes), sequence))
            found_s = np.maximum(found_s, known[sizes])
        alike = zip(self.structure.repeated.values(), found_s[1:].tolist(), strict=True)
        return Floor(len(local.segments), float(found_s[0]), tuple(alike))

    def _inherited_s(self, known: Mapping[Sizes, FloatArray], sizes: Sizes) -> FloatArray:
        ranks, slowing = math.prod(sizes), self.slowing
        fewer = [(math.prod(other), floors) for other, floors in known.items() if other != sizes]
        parts = [floors * count / ranks / slowing for count, floors in fewer if count < ranks and ranks % count == 0]
        parts = [floors for floors in parts if np.isfinite(floors).all()]  # more ranks may do what fewer cannot
        own = known.get(sizes, np.zeros_like(known[(1,)]))
        found: FloatArray = np.maximum.reduce([own, *parts])
        return found

    @cached_property
    def slowing(self) -> float:
        """Larger ops may run at so many times lower rates than smaller ones."""
        return max(device.slowing for device in {id(device): device for device in self.cluster.devices}.values())

    def _repeated(
        self, local: LocalModel, prices: MeshPrices, sequence: bool | None
    ) -> tuple[list[str], dict[str, FactorGraph]]:
        """The kind of each segment, and graphs of the ops of those that repeat."""
        parts = local.structure.representatives
        graphs = {kind: self._graph(local, parts[kind], prices, sequence).ops_alone for kind in self.structure.repeated}
        return [part.kind for part in local.segments], graphs

    def least_saved_bytes(self, dp: int, sizes: Sizes, microbatch_size: int, sequence: bool | None = None) -> float:
        """What segments that repeat save of one microbatch at least, where nothing is made again."""
        local = self._possible(dp, sizes, microbatch_size, sequence)
        if local is None:
            return 0.0
        key = (microbatch_size, sizes, sequence)
        if key not in self._least_saved_bytes:
            row, graphs = self._repeated(local, self.mesh_prices(dp, sizes), sequence)
            self._least_saved_bytes[key] = least_saved_bytes(row, graphs)
        return self._least_saved_bytes[key]

    def _graph(self, local: LocalModel, part: Segment, prices: MeshPrices, sequence: bool | None) -> SegmentGraph:
        """prices: any of the mesh that differ in dp alone."""
        key = (local.model.batch, prices.sizes, sequence, part.kind)
        if key not in self._graphs:
            known, last = self._prices.setdefault(prices.sizes, prices), part is local.segments[-1]
            self._graphs[key] = SegmentGraph(local, part, known, self.sharded, last, sequence)
        return self._graphs[key]

    def _chain(self, local: LocalModel, dp: int, sizes: Sizes, saving: Saving, sequence: bool | None) -> Chain:
        prices = self.mesh_prices(dp, sizes)
        kinds: dict[str, int] = {}
        graphs: list[FactorGraph] = []
        several = dp * local.model.batch < self.traced.global_graph.batch
        for part in local.structure.representatives.values():
            kinds[part.kind] = len(graphs)
            graphs.append(self._graph(local, part, prices, sequence).build(prices, saving, accumulates=several))
        order = tuple(kinds[part.kind] for part in local.segments)
        inputs, moments = self._input_bytes // dp, self._momentary_bytes(local, sizes, saving, sequence)
        if order.count(order[-1]) == 1:  # all that its stage saved is there while its backward runs
            last = self._graphs[(local.model.batch, sizes, sequence, local.segments[-1].kind)]
            moments[order[-1]] = max(moments[order[-1]], last.segment_levels.gradient_bytes() // math.prod(sizes))

        def reserve_bytes(first: int, last: int) -> int:
            return inputs + max(moments[kind] for kind in set(order[first:last]))

        update_bytes = self._update_bytes(local, order, prices, saving)
        return Chain(tuple(graphs), order, self._cut_s(local, prices), reserve_bytes, update_bytes=update_bytes)

    def _update_bytes(
        self, local: LocalModel, order: Sequence[int], prices: MeshPrices, saving: Saving
    ) -> Callable[[int, int], float]:
        """Of the parameters of a range, those that other segments have, too, left out."""
        levels = saving.zero or ((0, 1) if self.divisible else (0,))
        split = math.prod(prices.sizes) if self.sharded else 1
        of_kind = [prices.update_bytes(nbytes, levels) / split for nbytes in self._updated_bytes(local)]
        until = [0.0, *itertools.accumulate(of_kind[kind] for kind in order)]
        return lambda first, last: until[last] - until[first]

    def _updated_bytes(self, local: LocalModel) -> list[int]:
        """Of the parameters of each kind of segment, as the optimizer sees them."""
        if self._updated is None:
            own, kept = local.structure.trainable - local.structure.shared, self.precision.kept
            parts = [
                [local.tensor(n) for n in p.parameters if n in own] for p in local.structure.representatives.values()
            ]
            self._updated = [sum(replace(m, dtype=kept(m.dtype).updated).nbytes for m in part) for part in parts]
        return self._updated

    def _cut_s(self, local: LocalModel, prices: MeshPrices) -> Callable[[int, str], float]:
        @functools.cache
        def transfer_s(meta: TensorMeta, label: str, carried_bytes: int) -> float:
            return prices.transfer_s(meta, parse_placements(label), carried_bytes)

        def cut_s(position: int, label: str) -> float:
            exit, carried_bytes = local.cut_before[position]
            return transfer_s(exit, label, carried_bytes)

        return cut_s

    def _momentary_bytes(self, local: LocalModel, sizes: Sizes, saving: Saving, sequence: bool | None) -> list[int]:
        """Of each kind of segment, what the highest levels hold while its backward runs: what is made again, gradients
        before they are scattered, and gathered parameters twice, as they arrive and as they lie."""
        found, whole = [], self._exchanged_bytes(local, max(saving.zero, default=0))
        for kind in local.structure.representatives:
            graph = self._graphs[(local.model.batch, sizes, sequence, kind)]
            again = 0 if saving.recompute == (NONE,) else graph.segment_levels.again_bytes(saving.recompute[-1])
            found.append((again + whole[kind]) // math.prod(sizes))
        return found

    def _exchanged_bytes(self, local: LocalModel, level: int) -> dict[str, int]:
        """Of each kind of segment, whole parameters and gradients that are there for an exchange between replicas;
        where it moves, beside those of a segment of mean size, which prices know."""
        parts = local.structure.representatives
        own = {kind: sum(local.tensor(n).nbytes for n in part.parameters) for kind, part in parts.items()}
        if not self._moves or level < 3:
            return {kind: {0: 0, 1: 0, 2: 1, 3: 2}[level] * nbytes for kind, nbytes in own.items()}
        row = [own[part.kind] for part in local.segments]
        mean, found = _EXCHANGED * sum(row) / len(row), dict.fromkeys(own, 0)
        for part, before, here, after in zip(local.segments, [0, *row], row, [*row[1:], 0], strict=False):
            found[part.kind] = max(found[part.kind], int(before + 2 * here + 2 * after - mean))
        return found

    def worth_splitting(self, dp: int, tp: int, microbatch_size: int, sequence: bool | None) -> list[Sizes]:
        """Axes that tp might better consist of: what links and factors suggest, the inner one ever larger."""
        keys = [key for key in self._graphs if key[:3] == (microbatch_size, (tp,), sequence)]
        spaces = [self._graphs[key].space for key in keys]
        return [
            pair
            for pair in pairs(tp)
            if spans_levels(self.mesh_prices(dp, pair).axes) or any(divides_better(s, tp, pair) for s in spaces)
        ]

    def mesh_prices(self, dp: int, sizes: Sizes) -> MeshPrices:
        if (dp, sizes) not in self._mesh_prices:
            known = (self.optimizer, self.parameter_bytes, self._reduced_bytes, self.precision)
            stages = self.cluster.num_devices / (dp * math.prod(sizes))
            copies = _EXCHANGED * stages / len(self.traced.segments) if self._moves else None
            self._mesh_prices[dp, sizes] = MeshPrices(self.cluster, dp, sizes, *known, copies=copies)
        return self._mesh_prices[dp, sizes]

    def moving(self) -> ModelSpace:
        """The same where what microbatches gather and scatter of parameters hides behind compute."""
        space = copy.copy(self)
        space._chains, space._mesh_prices, space._moves = {}, {}, True
        return space

    @cached_property
    def _reduced_bytes(self) -> int:
        whole = self.traced.global_graph
        return max(1, sum(whole.tensor(i.node).nbytes for i in whole.inputs if i.trainable))

    @cached_property
    def _input_bytes(self) -> int:
        """Smallest batch input: every stage may need none but one of them; the rest is found exactly later."""
        whole = self.traced.global_graph
        sizes = [whole.tensor(i.node).nbytes for i in whole.inputs if i.kind == "batch"]
        return min(sizes, default=0) if len(sizes) == 1 else 0


def renaming(representative: Segment, instance: Segment) -> Callable[[str], str]:
    """Variables of the segment that was solved -> those of an equal segment."""
    names: Mapping[str, str] = {
        **dict(zip(representative.nodes, instance.nodes, strict=True)),
        **dict(zip(representative.parameters, instance.parameters, strict=True)),
        **dict(zip(representative.reads, instance.reads, strict=True)),
        **({representative.entry: instance.entry} if representative.entry and instance.entry else {}),
    }

    def rename(variable: str) -> str:
        prefix, _, name = variable.partition(":")
        return f"{prefix}:{names.get(name, name)}"

    return rename


@dataclass(frozen=True)
class _SavingChains(Sequence[Chain]):
    """A chain for each of ``savings``, made when it is asked for."""

    space: ModelSpace
    dp: int
    sizes: Sizes
    microbatch_size: int
    sequence: bool | None
    savings: Sequence[Saving]

    def __len__(self) -> int:
        return len(self.savings)

    @overload
    def __getitem__(self, index: int) -> Chain: ...

    @overload
    def __getitem__(self, index: slice) -> list[Chain]: ...

    def __getitem__(self, index: int | slice) -> Chain | list[Chain]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        chain = self.space.chain(self.dp, self.sizes, self.microbatch_size, self.savings[index], self.sequence)
        assert chain is not None, "there are none where the model cannot run so"
        return chain


@dataclass(frozen=True)
class PinnedSpace:
    """A space under pins; see ``autopar.planner.search.Space``. axes: those that tp consists of, if pinned."""

    space: ModelSpace
    recompute: str | None = None
    zero: int | None = None
    sequence: bool | None = None
    axes: Sizes | None = None

    @property
    def crowding(self) -> float:
        """Of the cluster."""
        return self.space.cluster.crowding

    def sizes(self, tp: int) -> Sizes:
        """Of the axes of a tp."""
        return self.axes if self.axes and math.prod(self.axes) == tp else (tp,)

    def floor(self, dp: int, tp: int, microbatch_size: int, above_s: float = -1.0) -> Floor | None:
        """See ``ModelSpace.floor``."""
        return self.space.floor(dp, self.sizes(tp), microbatch_size, above_s, self.sequence)

    def least_saved_bytes(self, dp: int, tp: int, microbatch_size: int) -> float:
        """See ``ModelSpace.least_saved_bytes``."""
        if self.recompute not in (None, NONE):
            return 0.0
        return self.space.least_saved_bytes(dp, self.sizes(tp), microbatch_size, self.sequence)

    def chain(self, dp: int, tp: int, microbatch_size: int) -> Chain | None:
        """Unless pinned otherwise nothing is recomputed, and only optimizer state is split, where that is faster."""
        recompute = NONE if self.recompute is None else self.recompute
        saving = Saving((recompute,), self._zero(()))
        return self.space.chain(dp, self.sizes(tp), microbatch_size, saving, self.sequence)

    def saving_chains(self, dp: int, tp: int, microbatch_size: int) -> Sequence[Chain]:
        """With all that is not pinned to choose from, up to each level: the higher ones hold more for a moment."""
        recompute = [RECOMPUTES[: i + 1] for i in range(3)] if self.recompute is None else [(self.recompute,)]
        zero = list(dict.fromkeys(self._zero(free) for free in ((0, 1), (0, 1, 2, 3)))) if dp > 1 else [(0,)]
        savings = [Saving(levels, known) for levels in recompute for known in zero]
        return _SavingChains(self.space, dp, self.sizes(tp), microbatch_size, self.sequence, savings)

    def _zero(self, free: tuple[int, ...]) -> tuple[int, ...]:
        if not self.space.divisible:
            return (0,)
        return free if self.zero is None else (self.zero,)

    def zero_levels(
        self,
        segments: Sequence[tuple[Segment, Segment, Mapping[str, str]]],
        meshes: Sequence[Mesh],
        local: LocalModel,
    ) -> dict[str, int]:
        """The level of each parameter, by node, where it is not 0; the first segment that holds it decides, unless all
        have one.

        segments: each with its representative and the latter's assignment; meshes: of the stage of each. Parts of a
        parameter lie alike only on as many replicas: one that stages with other numbers of them hold is not split.
        """
        levels: dict[str, int] = {}
        replicas: dict[str, set[int]] = {}
        for (part, _, _), mesh in zip(segments, meshes, strict=True):
            for name in part.parameters:
                replicas.setdefault(name, set()).add(mesh.dp)
        for (part, like, assignment), mesh in zip(segments, meshes, strict=True):
            prices = self.space.mesh_prices(mesh.dp, self.sizes(mesh.tp))
            for name, known in zip(part.parameters, like.parameters, strict=True):
                trainable = name in local.structure.trainable
                if name in levels or mesh.dp == 1 or not self.space.divisible or len(replicas[name]) > 1:
                    continue
                place = parse_placements(assignment[input_key(known)])
                fastest = prices.fastest_zero(local.tensor(name), place) if trainable else 0
                level = int(assignment.get(zero_key(known), fastest)) if self.zero is None else self.zero
                levels[name] = level if trainable or level == 3 else 0
        return {name: level for name, level in levels.items() if level}
