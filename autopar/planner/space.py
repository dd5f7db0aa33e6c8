"""Space: the traced model as chains of factor graphs, one chain for each mesh and microbatch size.

Variables of a segment's graph are what a plan file holds: ``op:<node>`` (a strategy), ``input:<node>`` (a placement
of a parameter or of the activation that comes in) and ``form:<node>`` (the second form in which a value with
several users is shared).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.optimizer_price import OptimizerPrice
from autopar.planner.chain import Chain, Floor
from autopar.planner.factor_graph import Factor, FactorGraph
from autopar.planner.least import floor_s
from autopar.planner.mesh_strategies import MeshOp, combined, mesh_space
from autopar.planner.prices import MeshPrices
from autopar.planner.saving import NONE, RECOMPUTE, SAVE_ALL, OpUse, Saving, SegmentLevels, TensorUse, saves_of
from autopar.planner.several_axes import divides_better, pairs, spans_levels
from autopar.planner.strategies import SEQUENCE, OpSpace, op_space, pin_sequence
from cost_model.cluster import Cluster
from cost_model.errors import UnsupportedError
from cost_model.mesh import Mesh
from cost_model.ops import BETWEEN_REPLICAS
from cost_model.placement import (
    PARTIAL,
    REPLICATE,
    VARYING,
    Placement,
    Placements,
    Shard,
    parse_placements,
    placements_text,
    split_axes,
)
from cost_model.plan import RECOMPUTES
from cost_model.precision import Precision
from cost_model.tensor import TensorMeta
from passes.batch import BatchAnalysis
from passes.dependence import active_nodes
from passes.graph import ModelGraph
from passes.segment import Segment, carried_values
from passes.shard import form_key, input_key, op_key
from passes.specialise import BatchMismatchError, Specialiser
from passes.trace import Traced
from passes.zero import zero_key

EXIT = "exit"
Sizes = tuple[int, ...]
"""Of the axes that tp consists of."""


class Structure:
    """What is the same at every microbatch size: the chain of segments and what its values are, by node."""

    def __init__(self, traced: Traced) -> None:
        model, self.segments = traced.global_graph, traced.segments
        self.carried = carried_values(self.segments)
        self.trainable = frozenset(i.node for i in model.inputs if i.trainable)
        counts = Counter(name for part in self.segments for name in set(part.parameters))
        self.shared = frozenset(name for name, count in counts.items() if count > 1)
        placed = {i.node for i in model.inputs if i.kind == "parameter"} | active_nodes(model)
        self.ambient = frozenset(n.name for n in model.graph.nodes if n.name not in placed)
        self.representatives: dict[str, Segment] = {}
        for part in self.segments:
            self.representatives.setdefault(part.kind, part)

    @cached_property
    def first_holders(self) -> dict[str, Segment]:
        """Parameter -> the first segment that has it."""
        return {name: part for part in reversed(self.segments) for name in part.parameters}


@dataclass(frozen=True, eq=False)
class LocalModel:
    """The model at one microbatch size. model: the calls of one segment of each kind; the others are like these."""

    structure: Structure
    specialiser: Specialiser
    model: ModelGraph

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.structure.segments

    @cached_property
    def cut_before(self) -> list[tuple[TensorMeta, int]]:
        """Of each segment but the first, the activation that comes in and the bytes carried beside it; the first has
        its own exit there."""
        known: dict[tuple[str, tuple[str, ...]], tuple[TensorMeta, int]] = {}
        found = []
        for before, after in zip((self.segments[0], *self.segments), self.segments, strict=False):
            key = (before.kind, after.carried)
            if key not in known:
                exit = self.tensor(self.structure.representatives[before.kind].exit)
                known[key] = exit, sum(self.tensor(name).nbytes for name in after.carried)
            found.append(known[key])
        return found

    def has_sequence(self, sizes: tuple[int, ...]) -> bool:
        """Whether a value between segments can be split along a sequence."""
        return any(sequence_of(self.tensor(part.exit), sizes) for part in self.structure.representatives.values())

    def tensor(self, name: str) -> TensorMeta:
        """The meta of any value."""
        if name in self.model.metas:
            return self.model.tensor(name)
        return self.specialiser.tensor(name, self.model.batch)


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
        self._graphs: dict[tuple[int, Sizes, bool | None, str], _SegmentGraph] = {}
        self._floors_s: dict[tuple[int, bool | None], dict[Sizes, float]] = {}
        self._prices: dict[Sizes, MeshPrices] = {}
        self._mesh_prices: dict[tuple[int, Sizes], MeshPrices] = {}
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
            known[(1,)] = self._floor_s(local, self.mesh_prices(dp, (1,)), None)
        time_s = self._inherited_s(known, sizes)
        if time_s <= above_s and sizes not in known:
            known[sizes] = self._floor_s(local, self.mesh_prices(dp, sizes), sequence)
            time_s = max(time_s, known[sizes])
        return Floor(len(local.segments), time_s)

    def _inherited_s(self, known: Mapping[Sizes, float], sizes: Sizes) -> float:
        ranks, slowing = math.prod(sizes), self._slowing
        fewer = [(math.prod(other), floor_s) for other, floor_s in known.items() if other != sizes]
        parts = [floor_s * count / ranks / slowing for count, floor_s in fewer if count < ranks and ranks % count == 0]
        return max([*filter(math.isfinite, parts), known.get(sizes, 0.0)])  # more ranks may do what fewer cannot

    @cached_property
    def _slowing(self) -> float:
        return max(device.slowing for device in {id(device): device for device in self.cluster.devices}.values())

    def _floor_s(self, local: LocalModel, prices: MeshPrices, sequence: bool | None) -> float:
        representatives, counts = local.structure.representatives, Counter(part.kind for part in local.segments)
        graphs = {
            kind: self._graph(local, part, prices, sequence).ops_alone
            for kind, part in representatives.items()
            if counts[kind] > 1
        }
        return floor_s([part.kind for part in local.segments], graphs)

    def _graph(self, local: LocalModel, part: Segment, prices: MeshPrices, sequence: bool | None) -> _SegmentGraph:
        """prices: any of the mesh that differ in dp alone."""
        key = (local.model.batch, prices.sizes, sequence, part.kind)
        if key not in self._graphs:
            known, last = self._prices.setdefault(prices.sizes, prices), part is local.segments[-1]
            self._graphs[key] = _SegmentGraph(local, part, known, self.sharded, last, sequence)
        return self._graphs[key]

    def _chain(self, local: LocalModel, dp: int, sizes: Sizes, saving: Saving, sequence: bool | None) -> Chain:
        prices = self.mesh_prices(dp, sizes)
        kinds: dict[str, int] = {}
        graphs: list[FactorGraph] = []
        for part in local.structure.representatives.values():
            kinds[part.kind] = len(graphs)
            graphs.append(self._graph(local, part, prices, sequence).build(prices, saving))
        order = tuple(kinds[part.kind] for part in local.segments)
        inputs, moments = self._input_bytes // dp, self._momentary_bytes(local, sizes, saving, sequence)

        def reserve_bytes(first: int, last: int) -> int:
            return inputs + max(moments[kind] for kind in set(order[first:last]))

        return Chain(tuple(graphs), order, self._cut_s(local, prices), reserve_bytes)

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
        copies = {0: 0, 1: 0, 2: 1, 3: 2}[max(saving.zero, default=0)]
        found = []
        for kind in local.structure.representatives:
            graph = self._graphs[(local.model.batch, sizes, sequence, kind)]
            parameters = sum(local.tensor(name).nbytes for name in graph.part.parameters)
            again = 0 if saving.recompute == (NONE,) else graph.segment_levels.again_bytes(saving.recompute[-1])
            found.append((again + copies * parameters) // math.prod(sizes))
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
            self._mesh_prices[dp, sizes] = MeshPrices(self.cluster, dp, sizes, *known)
        return self._mesh_prices[dp, sizes]

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


def boundary_placements(meta: TensorMeta, sizes: Sizes) -> list[Placements]:
    """How an activation may lie between segments: on each axis whole, a sum, or split along one dim."""
    if sizes == (1,):
        return [(REPLICATE,)]
    known: list[Placement] = [REPLICATE, PARTIAL, *(Shard(d) for d, e in enumerate(meta.shape) if e > 1)]
    return combined([known] * len(sizes), meta.shape, sizes)


def sequence_of(meta: TensorMeta, sizes: Sizes) -> Placements | None:
    """``SEQUENCE`` on all axes, where a boundary [batch, sequence, features] may lie so."""
    if len(meta.shape) != 3 or meta.shape[1] == 1:
        return None
    found = combined([(SEQUENCE,)] * len(sizes), meta.shape, sizes)
    return found[0] if found else None


class _SegmentGraph:
    """The factor graph of one kind of segment at one microbatch size and tp; dp enters in ``build``."""

    def __init__(
        self,
        local: LocalModel,
        part: Segment,
        prices: MeshPrices,
        sharded: bool,
        last: bool,
        sequence: bool | None,
    ) -> None:
        self.local, self.part, self.prices, self.sizes = local, part, prices, prices.sizes
        self.sharded, self.last, self.sequence = sharded, last, sequence
        self.space = mesh_space(self._axis_spaces(), self.sizes)
        self.ops = {op.node: op for op in self.space.ops}
        self.domains: dict[str, tuple[str, ...]] = {}
        self.factors: list[Factor] = []
        self.uses: dict[int, Callable[[], OpUse | TensorUse]] = {}
        self._with_levels: dict[tuple[str, ...], tuple[Factor, ...]] = {}
        self.labels: dict[str, tuple[Placements, ...]] = {}
        self.users = self._users()
        for op in self.space.ops:
            self._op(op)
        for name in part.parameters:
            self._placed(name, self._parameter_places(name))
        if part.entry is not None:
            self._placed(part.entry, self._boundary(part.entry))
        self.held: dict[str, str] = {}
        for name in (*part.reads, *part.gives):
            self._hold(name)
        for tensor, tensor_users in self.users.items():
            self._redistributions(tensor, tensor_users)
        self.exit = self._exit()

    def _axis_spaces(self) -> list[OpSpace]:
        """What each axis allows by itself; axes of one size share theirs."""
        ends = [name for name in (self.part.entry, self.part.exit) if name and self._along(name)]
        found: dict[int, OpSpace] = {}
        for size in dict.fromkeys(self.sizes):
            space = op_space(self.local.model, self.part.nodes, self.local.structure.ambient, size)
            pins = self.sequence is not None and size > 1
            found[size] = pin_sequence(space, ends, split=bool(self.sequence)) if pins else space
        return [found[size] for size in self.sizes]

    def _users(self) -> dict[str, list[tuple[MeshOp, int]]]:
        """tensor -> (op, operand index), each op once."""
        users: dict[str, list[tuple[MeshOp, int]]] = {}
        for op in self.space.ops:
            for index, operand in enumerate(op.operands):
                if operand not in self.local.structure.ambient and all(u[0] is not op for u in users.get(operand, [])):
                    users.setdefault(operand, []).append((op, index))
        return users

    @cached_property
    def segment_levels(self) -> SegmentLevels:
        entry = None if self.part.entry is None else (self.part.entry, self._meta(self.part.entry).nbytes)
        parameters = frozenset(self.part.parameters)
        return SegmentLevels(self.space, entry, parameters | self.local.structure.ambient, set(parameters))

    def _at_levels(self, names: tuple[str, ...]) -> tuple[Factor, ...]:
        """The factors that know no mesh, under a choice of recompute levels."""
        if names == (NONE,):
            return tuple(self.factors)
        if names not in self._with_levels:
            levels = self.segment_levels.levels(names)
            found: list[Factor] = []
            for index, factor in enumerate(self.factors):
                if index not in self.uses:
                    found.append(factor)
                    continue
                use = self.uses[index]()
                found += [use.factor(levels)] if isinstance(use, OpUse) else use.factors(levels)
            self._with_levels[names] = tuple(found)
        return self._with_levels[names]

    @property
    def ops_alone(self) -> FactorGraph:
        """The graph where parameters cost nothing: what every mesh with this tp and every way to save builds on."""
        entry = None if self.part.entry is None else input_key(self.part.entry)
        return FactorGraph(self.domains, tuple(self.factors), entry, self.exit)

    def build(self, prices: MeshPrices, saving: Saving) -> FactorGraph:
        """The graph on a mesh: ``prices`` differ from those of the ops in dp alone."""
        zero = {name: self._zero_levels(name, prices, saving) for name in self.part.parameters}
        steps = tuple(self._parameter(name, prices, levels) for name, levels in zero.items())
        steps += tuple(self._exchanged(op, prices) for op in self.space.ops if op.call.op in BETWEEN_REPLICAS)
        entry = None if self.part.entry is None else input_key(self.part.entry)
        shared = tuple(input_key(p) for p in self.part.parameters if p in self.local.structure.shared)
        levels = saving.recompute
        domains = self.domains if levels == (NONE,) else {**self.domains, RECOMPUTE: levels}
        free = {zero_key(name): tuple(map(str, known)) for name, known in zero.items() if len(known) > 1}
        domains = {**domains, **free} if free else domains
        return FactorGraph(domains, (*self._at_levels(levels), *steps), entry, self.exit, shared)

    def _meta(self, tensor: str) -> TensorMeta:
        return self.local.tensor(tensor)

    @property
    def whole(self) -> Placements:
        return (REPLICATE,) * len(self.sizes)

    def _boundary(self, name: str) -> tuple[Placements, ...]:
        """Placements of an activation at a cut; one that is carried on is whole."""
        if name in self.local.structure.carried:
            return (self.whole,)
        meta, along = self._meta(name), self._along(name)
        places = boundary_placements(meta, self.sizes)
        if self.sequence is None or not along:
            return tuple(places)
        if self.sequence:
            return tuple(combined([(PARTIAL, SEQUENCE)] * len(self.sizes), meta.shape, self.sizes))
        return tuple(p for p in places if not any(isinstance(own, Shard) and own.dim == SEQUENCE.dim for own in p))

    def _along(self, name: str) -> Placements | None:
        return None if name in self.local.structure.carried else sequence_of(self._meta(name), self.sizes)

    def _hold(self, name: str) -> None:
        """A carried value is whole on every rank: one that is made here is brought into that form."""
        variable = f"carried:{name}"
        self.domains[variable] = (placements_text(self.whole),)
        if name in self.space.values:
            self._pair(name, self._source(name), (variable, (self.whole,)), saves=False, kept=True)
        self.held[name] = variable

    def _op(self, op: MeshOp) -> None:
        times = np.array([self.prices.op_time_s(op.call, s) for s in op.strategies])
        saved = np.array([self._saved_outputs(op, k) for k in range(len(op.strategies))], dtype=float)
        self.domains[op_key(op.node)] = tuple(map(str, op.strategies))
        plain = Factor((op_key(op.node),), time_s=times, saved_bytes=saved)
        self._add(plain, lambda: self._op_use(op, plain))

    def _exchanged(self, op: MeshOp, prices: MeshPrices) -> Factor:
        """What replicas exchange in an op."""
        return Factor((op_key(op.node),), time_s=np.array([prices.exchanged_s(op.call, s) for s in op.strategies]))

    def _add(self, factor: Factor, use: Callable[[], OpUse | TensorUse]) -> None:
        """A factor that recompute changes."""
        self.uses[len(self.factors)] = use
        self.factors.append(factor)

    def _op_use(self, op: MeshOp, plain: Factor) -> OpUse:
        again_s = np.array([self.prices.again_s(op.call, s) for s in op.strategies])
        unread = {}
        for index, meta in enumerate(op.call.outputs):
            tensor = self.segment_levels.output(op, index)
            if tensor not in self.users:
                sizes = [self.prices.local_meta(meta, s.outputs[index]).nbytes for s in op.strategies]
                unread[tensor] = np.array(sizes, dtype=float)
        return OpUse(op.node, plain, again_s, unread)

    def _saved_outputs(self, op: MeshOp, index: int) -> int:
        strategy = op.strategies[index]
        kept = [int(name[3:]) for name in saves_of(op) if name.startswith("out")]
        return sum(self.prices.local_meta(op.call.outputs[k], strategy.outputs[k]).nbytes for k in kept)

    def _parameter_places(self, name: str) -> tuple[Placements, ...]:
        meta = self._meta(name)
        if self.sizes == (1,):
            return ((REPLICATE,),)
        if name not in self.local.structure.shared:
            return tuple(self.space.places(name, meta.shape, (REPLICATE, VARYING), sharded=self.sharded))
        shards = [Shard(d) for d, e in enumerate(meta.shape) if e > 1] if self.sharded else []
        return tuple(combined([(REPLICATE, VARYING, *shards)] * len(self.sizes), meta.shape, self.sizes))

    def _zero_levels(self, name: str, prices: MeshPrices, saving: Saving) -> tuple[int, ...]:
        """What the search chooses from: nothing where the fastest is taken, and not twice for one parameter."""
        if prices.dp == 1:
            return (0,)
        first = name not in self.local.structure.shared or self._is_first_holder(name)
        return saving.zero if len(saving.zero) < 2 or first else (0,)

    def _parameter(self, name: str, prices: MeshPrices, levels: tuple[int, ...]) -> Factor:
        """[placement] or, with several levels, [placement, level]"""
        meta, places = self._meta(name), self.labels[name]
        trainable = name in self.local.structure.trainable
        weight = 1.0 if name not in self.local.structure.shared or self._is_first_holder(name) else 0.0

        def costs(place: Placements, zero: int) -> tuple[float, float, float]:
            time_s, step_s, state_bytes = prices.parameter_costs(meta, place, trainable, zero)
            return time_s, weight * step_s, weight * state_bytes

        chosen = [levels or (prices.fastest_zero(meta, place) if trainable else 0,) for place in places]
        table = np.array([[costs(p, zero) for zero in known] for p, known in zip(places, chosen, strict=True)])
        several = len(levels) > 1
        parts = [table[..., k] if several else table[:, 0, k] for k in range(3)]
        return Factor((input_key(name), *([zero_key(name)] if several else [])), *parts)

    def _is_first_holder(self, name: str) -> bool:
        """A shared parameter's state is counted in the first segment that holds it; copies are found exactly later."""
        return self.local.structure.first_holders[name] is self.part

    def _placed(self, name: str, places: tuple[Placements, ...]) -> None:
        self.labels[name] = places
        self.domains[input_key(name)] = tuple(map(placements_text, places))

    def _source(self, tensor: str) -> tuple[str, tuple[Placements, ...]]:
        """(variable, placement under each of its labels) of where a tensor comes from."""
        if tensor in self.held:
            return self.held[tensor], (self.whole,)
        if tensor in self.labels:
            return input_key(tensor), self.labels[tensor]
        op_name, index = self.space.values[tensor]
        return op_key(op_name), tuple(s.outputs[index] for s in self.ops[op_name].strategies)

    def _redistributions(self, tensor: str, users: list[tuple[MeshOp, int]]) -> None:
        variable, places = self._source(tensor)
        kept = self._kept_by_source(tensor)
        if len(users) > 1 and self.sizes != (1,) and tensor not in self.held:
            forms = self._forms(tensor, places)
            self.domains[form_key(tensor)] = tuple(map(placements_text, forms))
            self._pair(tensor, (variable, places), (form_key(tensor), forms), saves=False, kept=kept)
            variable, places = form_key(tensor), forms
        first = variable != form_key(tensor)
        saved_by_form = False
        for op, index in users:
            wanted = tuple(s.inputs[index] for s in op.strategies)
            saves = f"in{index}" in saves_of(op) and tensor not in self.part.parameters
            again = saves and saved_by_form
            self._pair(
                tensor,
                (variable, places),
                (op_key(op.node), wanted),
                saves=saves,
                kept=kept or again,
                user=op.node,
                first=first,
            )
            first = False
            saved_by_form = saved_by_form or saves

    def _kept_by_source(self, tensor: str) -> bool:
        """Whether the op that makes a tensor already saves it."""
        if tensor not in self.space.values:
            return False
        op_name, index = self.space.values[tensor]
        return f"out{index}" in saves_of(self.ops[op_name])

    def _forms(self, tensor: str, places: tuple[Placements, ...]) -> tuple[Placements, ...]:
        more = self.space.places(tensor, self._meta(tensor).shape, (REPLICATE, VARYING, PARTIAL))
        return tuple(dict.fromkeys([*places, *more]))

    def _pair(
        self,
        tensor: str,
        source: tuple[str, tuple[Placements, ...]],
        target: tuple[str, tuple[Placements, ...]],
        *,
        saves: bool,
        kept: bool,
        user: str | None = None,
        first: bool = True,
    ) -> None:
        """Conversion costs between two variables, and the bytes that the target's op saves.

        kept: the source saves it as it is; first: on its way from where it is made; user: the target, if an op.
        """
        meta = self._meta(tensor)
        (source_variable, given), (target_variable, wanted) = source, target
        rows, columns = list(dict.fromkeys(given)), list(dict.fromkeys(wanted))
        pairs = self.prices.conversions_s(meta, rows, columns)
        before, after = (np.array([self._local_bytes(meta, p) for p in places]) for places in (rows, columns))
        at = np.ix_([rows.index(a) for a in given], [columns.index(b) for b in wanted])
        local = np.broadcast_to(after, pairs.shape)
        saved = None
        if saves:
            again = np.array([[kept and a == b for b in columns] for a in rows])
            saved = np.where(again, 0.0, local)[at]
        plain = Factor((source_variable, target_variable), time_s=pairs[at], saved_bytes=saved)

        def use() -> TensorUse:
            given_bytes = np.broadcast_to(before[:, None], pairs.shape)
            travels = np.array([[self.prices.travels_forward(meta, a, b) for b in columns] for a in rows])
            return TensorUse(tensor, plain, first, user, given_bytes[at], local[at], travels[at])

        self._add(plain, use)

    def _local_bytes(self, meta: TensorMeta, places: Placements) -> float:
        return meta.nbytes / self.prices.ranks(split_axes(places))

    def _exit(self) -> str | None:
        """Tie the last op's strategy to the boundary's label; the loss must end up whole."""
        variable, places = self._source(self.part.exit)
        if self.last:
            self._pair(self.part.exit, (variable, places), self._whole_loss(), saves=False, kept=True)
            return None
        ends = self._boundary(self.part.exit)
        self.domains[EXIT] = tuple(map(placements_text, ends))
        allowed = np.array([[0.0 if a == b else np.inf for b in ends] for a in places])
        self.factors.append(Factor((variable, EXIT), time_s=allowed))
        return EXIT

    def _whole_loss(self) -> tuple[str, tuple[Placements, ...]]:
        self.domains["loss"] = (placements_text(self.whole),)
        return "loss", (self.whole,)


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
class PinnedSpace:
    """A space under pins; see ``autopar.planner.search.Space``. axes: those that tp consists of, if pinned."""

    space: ModelSpace
    recompute: str | None = None
    zero: int | None = None
    sequence: bool | None = None
    axes: Sizes | None = None

    def sizes(self, tp: int) -> Sizes:
        """Of the axes of a tp."""
        return self.axes if self.axes and math.prod(self.axes) == tp else (tp,)

    def floor(self, dp: int, tp: int, microbatch_size: int, above_s: float = -1.0) -> Floor | None:
        """See ``ModelSpace.floor``."""
        return self.space.floor(dp, self.sizes(tp), microbatch_size, above_s, self.sequence)

    def chain(self, dp: int, tp: int, microbatch_size: int) -> Chain | None:
        """Unless pinned otherwise nothing is recomputed, and only optimizer state is split, where that is faster."""
        recompute = NONE if self.recompute is None else self.recompute
        saving = Saving((recompute,), self._zero(()))
        return self.space.chain(dp, self.sizes(tp), microbatch_size, saving, self.sequence)

    def saving_chains(self, dp: int, tp: int, microbatch_size: int) -> list[Chain]:
        """With all that is not pinned to choose from, up to each level: the higher ones hold more for a moment."""
        recompute = [RECOMPUTES[: i + 1] for i in range(3)] if self.recompute is None else [(self.recompute,)]
        zero = list(dict.fromkeys(self._zero(free) for free in ((0, 1), (0, 1, 2, 3)))) if dp > 1 else [(0,)]
        savings = [Saving(levels, known) for levels in recompute for known in zero]
        found = [self.space.chain(dp, self.sizes(tp), microbatch_size, saving, self.sequence) for saving in savings]
        return [chain for chain in found if chain is not None]

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
        """The level of each parameter, by node, where it is not 0; the first segment that holds it decides.

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
                level = int(assignment.get(zero_key(known), fastest if self.zero is None else self.zero))
                levels[name] = level if trainable or level == 3 else 0
        return {name: level for name, level in levels.items() if level}
