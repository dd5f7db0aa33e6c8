"""Analyse the batch: prove that shards and microbatches of the batch add up to the global loss.

Splitting the batch is one more axis on which every value has a placement: inputs are Shard(0), parameters
Varying (their gradients add up), the loss Partial. Nothing is chosen: placements follow forward from the
inputs. The graph at a second batch size tells what depends on the batch's size: a value that is split must be
of a size proportional to it, and of a part of the batch an op must compute the part of its result.

Ambient values (those that depend on no parameter) have a way out: what depends on the whole batch (the count of
labels) is computed once per step from the global batch. A mask made for all samples alike is made again for a
part; that it is alike is assumed here and checked by ``constant``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from cost_model.factors import FactorMap, Strategy, factor_of, split_factor
from cost_model.ops import entry_of
from cost_model.placement import PARTIAL, REPLICATE, VARYING, Partial, Placement, Shard
from cost_model.tensor import TensorMeta
from passes.batch_sizes import CannotSplitError, Sizes
from passes.calls import call_of, tensor_args
from passes.dependence import active_nodes, ancestors
from passes.graph import ModelGraph, is_getitem, op_name, source_of
from passes.specialise import BatchMismatchError
from passes.vocabulary import collect


@dataclass(frozen=True)
class BatchAnalysis:
    """reason: why the batch cannot be split, None if it can.

    hoisted: ambient nodes to compute once per step from the global batch, in execution order.
    sliced: those of them that have the batch as dim 0 and are sliced per microbatch like inputs.
    shared: (user, operand) pairs where a value that knows no batch joins a sum over it: scaled by local / global.
    synchronised: calls that need statistics of all samples, which replicas exchange; each has one microbatch then.
    constant: (ambient node, dim, outer) assumed equal along the batch, where the dim is outer x batch x inner; to be
    checked by evaluation.
    collected: output of the model by number -> how it lies along the batch; None: it depends on no
    parameter and is made once, of the whole batch.
    summed: (user, operand) pairs where a sum over the batch must be made whole across replicas first; shares_loss: the
    loss follows from what replicas exchange, and each has its share of it. See ``passes.replicas``.
    joined: calls that mix samples, and what follows from them, made of all samples by each replica; gathered: values of
    theirs that replicas gather first, by how they lie; again: other values of theirs, made again of all samples.
    in_rows: values whose samples lie one behind the other, so that those of replicas joined are those of their samples.
    """

    reason: str | None
    hoisted: tuple[str, ...] = ()
    sliced: frozenset[str] = frozenset()
    shared: frozenset[tuple[str, str]] = frozenset()
    constant: tuple[tuple[str, int, int], ...] = ()
    synchronised: frozenset[str] = frozenset()
    collected: tuple[tuple[int, Placement | None], ...] = ()
    in_rows: frozenset[str] = frozenset()
    summed: frozenset[tuple[str, str]] = frozenset()
    shares_loss: bool = False
    joined: frozenset[str] = frozenset()
    gathered: tuple[tuple[str, Shard], ...] = ()
    again: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Global:
    """An ambient value that must be computed from the global batch."""

    def __str__(self) -> str:
        return "a value of the whole batch"


@dataclass(frozen=True)
class _Sized:
    """An ambient value made from the batch's size alone: made for a part where all samples are alike, else global."""

    def __str__(self) -> str:
        return "made for the batch's size"


BATCH_NORM = "autopar.batch_norm.default"
REPLICA_SUM = "autopar.replica_sum.default"
REPLICA_SHARE = "autopar.replica_share.default"
REPLICA_GATHER = "autopar.replica_gather.default"
WRITTEN = "autopar.written.default"
Place = Placement | _Global | _Sized
_GLOBAL, _SIZED = _Global(), _Sized()


def analyse_batch(
    model: ModelGraph, other: ModelGraph | None, *, exchange: bool = False, numbered: frozenset[str] = frozenset()
) -> BatchAnalysis:
    """Follow the batch through the global graph; ``other``: the same graph at a second batch size, if there is one.

    exchange: what is not linear in a sum over the batch may be given it whole (``BatchAnalysis.summed``), and what
    mixes samples all of them (``BatchAnalysis.joined``). numbered: values made for the batch's size that are known to
    tell samples apart.
    """
    if other is None:
        return BatchAnalysis("it is a single sample" if model.batch == 1 else "the model traces at one batch size only")
    try:
        run = _Analysis(model, other, exchange, numbered)
        run.follow()
        return run.result()
    except (CannotSplitError, BatchMismatchError) as error:
        deeper = None if exchange else analyse_batch(model, other, exchange=True).reason
        return BatchAnalysis(deeper or str(error))


class _Analysis:
    def __init__(self, model: ModelGraph, other: ModelGraph, exchange: bool, numbered: frozenset[str]) -> None:
        self.numbered = numbered
        self.model, self.active, self.exchange = model, active_nodes(model), exchange
        self.sizes = Sizes(model, other)
        self.places: dict[str, Place] = {}
        self.outputs_of: dict[str, tuple[Place, ...]] = {}
        self.hoisted: dict[str, None] = {}
        self.sliced: set[str] = set()
        self.shared: set[tuple[str, str]] = set()
        self.synchronised: set[str] = set()
        self.summed: set[tuple[str, str]] = set()
        self.joined: set[str] = set()
        self.gathered: dict[str, Shard] = {}
        self.again: set[str] = set()
        self.shares_loss = False
        self.constant: dict[tuple[str, int, int], None] = {}
        for node, item in zip(self.sizes.placeholders(), model.inputs, strict=True):
            if item.kind == "batch" and item.batched:
                self.places[item.node] = Shard(0)
            elif self.sizes.changes_shape(node):
                self.places[item.node] = _GLOBAL
            else:
                self.places[item.node] = VARYING if item.kind == "parameter" else REPLICATE

    def follow(self) -> None:
        for node in self.model.nodes():
            if is_getitem(node):
                source, index = node.args
                assert isinstance(source, fx.Node) and isinstance(index, int)
                self.places[node.name] = self.outputs_of[source.name][index]
                if source.name in self.joined:
                    self.joined.add(node.name)
            else:
                places = self._ambient(node) if node.name not in self.active else self._active(node)
                self.outputs_of[node.name] = places
                self.places[node.name] = places[0]
        loss = self.places[self.model.outputs[0]]
        if loss == VARYING and self.exchange and (self.summed or self.synchronised or self.joined):
            self.shares_loss = True
        elif loss == VARYING:
            raise CannotSplitError("the loss does not depend on the batch")
        elif not isinstance(loss, Partial):
            raise CannotSplitError(f"the loss is {loss} over the batch, not a sum over samples")

    def _operands(self, node: fx.Node) -> tuple[list[fx.Node], list[Place]]:
        operands = tensor_args(node)
        return operands, [self.places[o.name] for o in operands]

    # --- ambient values

    def _ambient(self, node: fx.Node) -> tuple[Place, ...]:
        operands, places = self._operands(node)
        if any(isinstance(p, Shard) for p in places):
            try:
                outputs = self._split(node, operands, places)
            except CannotSplitError:
                return self._all(node, _GLOBAL)
            return self._all(node, _GLOBAL) if PARTIAL in outputs else outputs
        if _GLOBAL in places:
            return self._all(node, _GLOBAL)
        return self._all(node, _SIZED if _SIZED in places or self.sizes.changes(node) else REPLICATE)

    def _all(self, node: fx.Node, place: Place) -> tuple[Place, ...]:
        meta = self.model.metas[node.name]
        return (place,) * (1 if isinstance(meta, TensorMeta) else len(meta))

    # --- parameter-dependent values

    def _active(self, node: fx.Node) -> tuple[Place, ...]:
        operands, places = self._operands(node)
        exchanged = self._exchanged(op_name(node), places[0] if places else None)
        if exchanged is not None:
            self.synchronised.add(node.name)
            return (exchanged,)
        if op_name(node) == WRITTEN:
            self.synchronised.add(node.name)
        return self._placed(node, operands, places)

    def _exchanged(self, target: str, place: Place | None) -> Place | None:
        """Of what a call that exchanges something over the replicas gives."""
        if target == BATCH_NORM and place == Shard(0):
            return Shard(0)
        if (target == REPLICA_SUM and isinstance(place, Partial)) or (
            target == REPLICA_GATHER and isinstance(place, Shard)
        ):
            return VARYING
        return PARTIAL if target == REPLICA_SHARE and place == VARYING else None

    def _placed(self, node: fx.Node, operands: list[fx.Node], places: list[Place]) -> tuple[Place, ...]:
        if any(o.name in self.joined and self.sizes.changes_shape(o) for o in operands):
            return self._joined(node, operands)
        if any(isinstance(p, Partial) for p in places):
            try:
                return self._linear(node, operands, places)
            except CannotSplitError:
                if not self.exchange:
                    raise
                return self._placed(node, operands, self._with_sum(node, operands, places))
        try:
            return self._apart(node, operands, places)
        except CannotSplitError:
            if not self.exchange:
                raise
            return self._joined(node, operands)

    def _apart(self, node: fx.Node, operands: list[fx.Node], places: list[Place]) -> tuple[Place, ...]:
        """A call that keeps samples apart, or knows none."""
        if any(isinstance(p, Shard) for p in places):
            return self._split(node, operands, places)
        if self.sizes.changes(node):
            return self._made(node, operands, places)
        self._hoist_all(operands, places)
        return self._all(node, VARYING)

    # --- values made of all samples by each replica

    def _joined(self, node: fx.Node, operands: list[fx.Node]) -> tuple[Place, ...]:
        self.joined.add(node.name)
        for operand in operands:
            self._as_whole(node, operand)
        return self._all(node, VARYING)

    def _as_whole(self, node: fx.Node, operand: fx.Node) -> None:
        """The operand of all samples: gathered, or made again where it depends on no parameter or is a view (so that a
        value travels once for all of its views)."""
        name, place = operand.name, self.places[operand.name]
        if isinstance(place, Partial):
            self.summed.add((node.name, name))
        elif name in self.joined or not self.sizes.changes_shape(operand):
            return
        elif name in self.active and not is_view(operand, self.model):
            assert isinstance(place, Shard)
            self.gathered[name] = place
        else:
            self.again.add(name)
            for each in operand.all_input_nodes:
                self._as_whole(operand, each)

    def _rule(self, node: fx.Node) -> FactorMap:
        entry = entry_of(op_name(node))
        rule = entry.factors(call_of(node, self.model.metas)) if entry else None
        if rule is None:
            raise CannotSplitError(f"{node.target} has no rule for its batch dim ({source_of(node)})")
        return rule

    def _split(self, node: fx.Node, operands: list[fx.Node], places: list[Place]) -> tuple[Place, ...]:
        """A call of which some operand is split along the batch."""
        rule = self._rule(node)
        index, place = next((i, p) for i, p in enumerate(places) if isinstance(p, Shard))
        return self._accepted(node, operands, places, _along(rule, factor_of(rule, "in", index, place)))

    def _made(self, node: fx.Node, operands: list[fx.Node], places: list[Place]) -> tuple[Place, ...]:
        """A call that makes something for every sample of what knows no batch: a class token expanded to the batch."""
        dims = self.sizes.batch_dims(node)
        if len(dims) != 1:
            raise CannotSplitError(f"{node.target} depends on the batch's size ({source_of(node)})")
        rule = self._rule(node)
        return self._accepted(node, operands, places, _along(rule, factor_of(rule, "out", 0, Shard(dims[0]))))

    def _accepted(
        self, node: fx.Node, operands: list[fx.Node], places: list[Place], strategy: Strategy | None
    ) -> tuple[Place, ...]:
        """Every operand as the strategy wants it; the strategy's outputs."""
        if strategy is None or strategy.inside:
            raise CannotSplitError(f"{node.target} mixes samples of the batch ({source_of(node)})")
        self.sizes.check(node, strategy.outputs)
        for operand, place, wanted in zip(operands, places, strategy.inputs, strict=True):
            self._accept(node, operand, place, wanted)
        return strategy.outputs

    def _accept(self, node: fx.Node, operand: fx.Node, place: Place, wanted: Placement) -> None:
        if place == wanted or (place == REPLICATE and wanted == VARYING):
            return
        if isinstance(wanted, Partial) and place in (VARYING, REPLICATE):
            self._share(node, operand)
        elif isinstance(wanted, Shard) and place == _SIZED and self._may_be_alike(operand, wanted):
            self.constant[(operand.name, wanted.dim, wanted.outer)] = None
        elif wanted == Shard(0) and place in (_GLOBAL, _SIZED):
            self._hoist(operand)
            self.sliced.add(operand.name)
        elif wanted == VARYING and place in (_GLOBAL, _SIZED):
            self._hoist_whole(operand)
        else:
            raise CannotSplitError(f"{node.target} needs {operand} as {wanted}, but it is {place} ({source_of(node)})")

    def _may_be_alike(self, operand: fx.Node, wanted: Shard) -> bool:
        """Whether what is made for a part of the batch may be that part of what is made for all of it."""
        try:
            self.sizes.check(operand, (wanted,))
        except CannotSplitError:
            return False
        return operand.name not in self.numbered

    def _linear(self, node: fx.Node, operands: list[fx.Node], places: list[Place]) -> tuple[Place, ...]:
        """A call on sums over the batch: it must be linear in all of them together."""
        partial = {i for i, p in enumerate(places) if isinstance(p, Partial)}
        if any(isinstance(p, Shard) for p in places):
            raise CannotSplitError(f"{node.target} combines a sum over the batch with its samples ({source_of(node)})")
        groups = [g for g in self._rule(node).linear if partial <= g]
        if not groups:
            raise CannotSplitError(f"{node.target} is not linear in a sum over the batch ({source_of(node)})")
        outputs = (PARTIAL,) * len(self._all(node, PARTIAL))
        self.sizes.check(node, outputs)
        others = min(groups, key=len) - partial
        for i in others:
            self._share(node, operands[i])
        self._hoist_all(operands, places)
        return outputs

    def _share(self, node: fx.Node, operand: fx.Node) -> None:
        """A value that knows no batch joins a sum over it: each part has its share, which integers do not have."""
        meta = self.model.metas[operand.name]
        if isinstance(meta, TensorMeta) and not meta.has_gradient:
            raise CannotSplitError(f"{node.target} adds integers to a sum over the batch ({source_of(node)})")
        self.shared.add((node.name, operand.name))

    def _with_sum(self, node: fx.Node, operands: list[fx.Node], places: list[Place]) -> list[Place]:
        """The smallest sum over the batch among the operands is made whole across replicas first."""
        partial = {o.name for o, p in zip(operands, places, strict=True) if isinstance(p, Partial)}
        name = min(sorted(partial), key=lambda each: self.model.tensor(each).nbytes)
        self.summed.add((node.name, name))
        return [VARYING if o.name == name else p for o, p in zip(operands, places, strict=True)]

    # --- values of the whole batch

    def _hoist_all(self, operands: list[fx.Node], places: list[Place]) -> None:
        for operand, place in zip(operands, places, strict=True):
            if place in (_GLOBAL, _SIZED):
                self._hoist_whole(operand)

    def _hoist_whole(self, operand: fx.Node) -> None:
        """Computed from the global batch and used as it is."""
        if self.sizes.changes_shape(operand):
            raise CannotSplitError(f"all samples of {operand} are needed at once ({source_of(operand)})")
        self._hoist(operand)

    def _hoist(self, operand: fx.Node) -> None:
        if operand.op == "placeholder":
            raise CannotSplitError(f"{operand} holds something for every sample of the batch")
        self.hoisted[operand.name] = None

    def result(self) -> BatchAnalysis:
        order = tuple(n.name for n in self.model.nodes() if n.name in self.hoisted)
        return BatchAnalysis(
            None,
            order,
            frozenset(self.sliced),
            frozenset(self.shared),
            tuple(self.constant),
            frozenset(self.synchronised),
            tuple(self._collected()),
            frozenset(self._in_rows()),
            frozenset(self.summed),
            self.shares_loss,
            frozenset(self.joined),
            tuple(self.gathered.items()),
            frozenset(self.again),
        )

    def _in_rows(self) -> Iterator[str]:
        for name, place in self.places.items():
            meta = self.model.metas[name]
            if isinstance(place, Shard) and isinstance(meta, TensorMeta) and place.is_consecutive(meta.shape):
                yield name

    def _collected(self) -> Iterator[tuple[int, Placement | None]]:
        by_name = {n.name: n for n in self.model.graph.nodes}
        hoisted = set(ancestors([by_name[name] for name in self.hoisted]))
        for node in self.model.nodes():
            if node.target is collect:
                place, number = self.places[node.name], node.args[1]
                assert isinstance(number, int)
                yield number, None if node in hoisted or isinstance(place, _Global | _Sized) else place


def is_view(node: fx.Node, model: ModelGraph) -> bool:
    """Whether a value is its one operand, seen otherwise."""
    entry = entry_of(op_name(node)) if node.op == "call_function" and not is_getitem(node) else None
    return entry is not None and len(tensor_args(node)) == 1 and entry.price(call_of(node, model.metas)) is None


def _along(rule: FactorMap, found: tuple[str, int] | None) -> Strategy | None:
    """The op split to the last along a factor (outer x n x inner into n parts)."""
    return split_factor(rule, found[0], found[1], rule.sizes[found[0]] // found[1]) if found else None
