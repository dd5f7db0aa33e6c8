"""The choices of one segment, and what each costs: the tables that elimination works on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from autopar.planner.backward_reads import read_back, saves_of, with_views
from autopar.planner.factor_graph import Factor, FactorGraph
from autopar.planner.local_model import EXIT, LocalModel, boundary_placements, sequence_of
from autopar.planner.mesh_strategies import MeshOp, combined, mesh_space
from autopar.planner.prices import MeshPrices
from autopar.planner.saving import NONE, RECOMPUTE, OpUse, Saving, SegmentLevels, TensorUse
from autopar.planner.strategies import SEQUENCE, OpSpace, op_space, pin_sequence
from cost_model.ops import BETWEEN_REPLICAS, price_of
from cost_model.placement import (
    PARTIAL,
    REPLICATE,
    VARYING,
    Placements,
    Shard,
    placements_text,
    split_axes,
)
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta
from passes.segment import Segment
from passes.shard import form_key, input_key, op_key
from passes.zero import zero_key


class SegmentGraph:
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
        self.weights = with_views(self.space, part.parameters)
        self.read_back = read_back(self.space, self.weights, self.local.structure.differentiable)
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
        return SegmentLevels(
            self.space,
            entry,
            parameters | self.local.structure.ambient,
            set(parameters),
            self.local.structure.differentiable,
        )

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

    def build(self, prices: MeshPrices, saving: Saving, *, accumulates: bool) -> FactorGraph:
        """The graph on a mesh: ``prices`` differ from those of the ops in dp alone. accumulates: whether gradients of
        several microbatches add up."""
        zero = {name: self._zero_levels(name, prices, saving) for name in self.part.parameters}
        steps = tuple(self._parameter(name, prices, levels, accumulates) for name, levels in zero.items())
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
        kept = [int(name[3:]) for name in self._saves(op) if name.startswith("out")]
        return sum(self.prices.local_meta(op.call.outputs[k], strategy.outputs[k]).nbytes for k in kept)

    def _saves(self, op: MeshOp) -> tuple[str, ...]:
        return saves_of(op, self.local.structure.differentiable)

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

    def _parameter(self, name: str, prices: MeshPrices, levels: tuple[int, ...], accumulates: bool) -> Factor:
        """[placement] or, with several levels, [placement, level]"""
        meta, places = self._meta(name), self.labels[name]
        trainable = name in self.local.structure.trainable
        weight = 1.0 if name not in self.local.structure.shared or self._is_first_holder(name) else 0.0
        added = accumulates or not self._is_multiplied(name)

        table = prices.parameter_table(meta, places, trainable, levels, added) * np.array([1.0, weight, weight])
        several = len(levels) > 1
        parts = [table[..., k] if several else table[:, 0, k] for k in range(3)]
        return Factor((input_key(name), *([zero_key(name)] if several else [])), *parts)

    def _is_multiplied(self, name: str) -> bool:
        """Whether the only gradient of a parameter is a product of matrices, which is written into the buffer."""
        users = self.users.get(name, [])
        costs = [price_of(op.call) for op, _ in users]
        return (
            len(users) == 1 and len(self._meta(name).shape) > 1 and costs[0] is not None and costs[0].kind == "matmul"
        )

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
            self._pair(tensor, (variable, places), (form_key(tensor), forms), saves=tensor in self.read_back, kept=kept)
            variable, places = form_key(tensor), forms
        self._summed_gradients(tensor, users, variable, places)
        first = variable != form_key(tensor)
        saved_by_form = False
        for op, index in users:
            wanted = tuple(s.inputs[index] for s in op.strategies)
            saves = tensor in self.read_back if tensor in self.weights else f"in{index}" in self._saves(op)
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

    def _summed_gradients(
        self, tensor: str, users: list[tuple[MeshOp, int]], variable: str, places: tuple[Placements, ...]
    ) -> None:
        """Of each user one is added to those before; what is done with those of weights is of their own."""
        known = self.local.structure.differentiable
        count = sum(any(self.segment_levels.output(op, k) in known for k in _outputs(op)) for op, _ in users)
        if count > 1 and tensor in known and tensor not in self.weights:
            meta = self._meta(tensor)
            sums = (OpCost("elementwise", 0.0, 3.0 * self._local_bytes(meta, p), meta.dtype) for p in places)
            self.factors.append(Factor((variable,), time_s=np.array([(count - 1) * self.prices.op_s(c) for c in sums])))

    def _kept_by_source(self, tensor: str) -> bool:
        """Whether the op that makes a tensor already saves it."""
        if tensor not in self.space.values:
            return False
        op_name, index = self.space.values[tensor]
        return f"out{index}" in self._saves(self.ops[op_name])

    def _forms(self, tensor: str, places: tuple[Placements, ...]) -> tuple[Placements, ...]:
        meta = self._meta(tensor)
        sums = (PARTIAL,) if meta.has_gradient else ()
        more = self.space.places(tensor, meta.shape, (REPLICATE, VARYING, *sums))
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

        kept: the source saves it as it is; first: on its way from where it is made; user: the target, if an op. Of a
        weight only what is made of it is saved.
        """
        meta, is_weight = self._meta(tensor), tensor in self.weights
        (source_variable, given), (target_variable, wanted) = source, target
        rows, columns = list(dict.fromkeys(given)), list(dict.fromkeys(wanted))
        pairs = self.prices.conversions_s(meta, rows, columns)
        before, after = (np.array([self._local_bytes(meta, p) for p in places]) for places in (rows, columns))
        at = np.ix_([rows.index(a) for a in given], [columns.index(b) for b in wanted])
        local = np.broadcast_to(after, pairs.shape)
        saved = None
        if saves and is_weight:
            saved = (local * self.prices.made_forward(meta, rows, columns, sliced=True))[at]
        elif saves:
            again = np.array([[kept and a == b for b in columns] for a in rows])
            saved = np.where(again, 0.0, local)[at]
        plain = Factor((source_variable, target_variable), time_s=pairs[at], saved_bytes=saved)

        def use() -> TensorUse:
            given_bytes = np.broadcast_to(before[:, None], pairs.shape)
            travels = self.prices.made_forward(meta, rows, columns, sliced=False)
            return TensorUse(tensor, plain, first, user, given_bytes[at], local[at], travels[at], is_weight)

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


def _outputs(op: MeshOp) -> range:
    return range(len(op.call.outputs))
