"""Shard: one stage's graph becomes the program of one rank of a mesh.

Every parameter-dependent call runs the strategy the plan names; where a value lies otherwise than a call wants
it, a conversion is inserted, once per form and shared by all its users. Ambient values stay whole and are
sliced at use. Shapes become local.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from cost_model.axes import Axes
from cost_model.errors import VerificationError
from cost_model.factors import Strategy
from cost_model.placement import REPLICATE, Partial, Placements, Shard, mesh_shape, parse_placements
from cost_model.strategies import MeshStrategy, parse_mesh_strategy, replicated
from cost_model.tensor import TensorMeta
from passes.calls import tensor_args
from passes.cut import SHARE
from passes.dependence import active_nodes
from passes.graph import Meta, ModelGraph, drop_dead_calls, is_getitem
from passes.localise import localise
from passes.pieces import AMBIENT, segment_of
from passes.redistribute import ambient_shard, redistribute
from passes.rewriter import GraphBuilder


@dataclass(frozen=True)
class ShardedStage:
    """graph: local shapes; placements: of each input by node name; exit: of the output."""

    graph: ModelGraph
    placements: Mapping[str, Placements] = field(hash=False)
    exit: Placements


def input_key(node: str) -> str:
    return f"input:{node}"


def op_key(node: str) -> str:
    return f"op:{node}"


def form_key(node: str) -> str:
    return f"form:{node}"


def own_form_key(node: str, inside: str) -> str:
    """The second form of a value in one segment, of which ``inside`` is a call, where that is another."""
    return f"form.{node}:{inside}"


def is_own_form(key: str) -> bool:
    return key.startswith("form.")


def form_of(key: str) -> str:
    """The key that says the second form of the same value in the other segments."""
    return form_key(key.partition(":")[0].removeprefix("form."))


def exit_key(node: str) -> str:
    """How a value leaves a stage; where no choice says so, as its call makes it."""
    return f"exit:{node}"


def shard(model: ModelGraph, choices: Mapping[str, str], mesh: Axes, *, last: bool) -> ShardedStage:
    """Apply ``choices`` on a mesh; calls without a choice are replicated. ``last``: the output is the loss."""
    return _Shard(model, choices, mesh).run(last)


class _Shard:
    def __init__(self, model: ModelGraph, choices: Mapping[str, str], mesh: Axes) -> None:
        self.model, self.choices, self.mesh = model, choices, mesh
        self.whole: Placements = (REPLICATE,) * len(mesh.sizes)
        self.active = active_nodes(model)
        self.changed = {i.node for i in model.inputs if i.changes}
        self.placed_inputs = self.changed | {i.node for i in model.inputs if i.kind in ("parameter", "activation")}
        self.built = GraphBuilder()
        self.mapped: dict[fx.Node, fx.Node] = {}
        self.places: dict[fx.Node, Placements] = {}
        self.outputs_of: dict[fx.Node, tuple[Placements, ...]] = {}
        self.forms: dict[tuple[fx.Node, Placements, int], fx.Node] = {}
        numbers = {node.name: segment_of(node) for node in model.nodes()}
        own = {key: label for key, label in choices.items() if is_own_form(key)}
        self.own_forms = {(form_of(key), numbers[key.partition(":")[2]]): label for key, label in own.items()}

    def run(self, last: bool) -> ShardedStage:
        for node in self.model.graph.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "call_function":
                self._call(node)
                if node.meta.get("carried") and node.name in self.active:
                    self.mapped[node] = self._form(node, self.whole, node)
                    self.places[node] = self.whole
                if "segment" in node.meta:
                    self.mapped[node].meta.setdefault("segment", node.meta["segment"])
        exit_node = next(n for n in self.model.graph.nodes if n.name == self.model.outputs[0])
        leaves = self.choices.get(exit_key(exit_node.name))
        target = self.whole if last else parse_placements(leaves) if leaves else self.places[exit_node]
        out = self._form(exit_node, target, exit_node)
        by_name = {n.name: n for n in self.model.graph.nodes}
        outs = (out, *(self.mapped[by_name[name]] for name in self.model.outputs[1:]))
        self.built.graph.output(outs)
        drop_dead_calls(self.built.graph)
        inputs = self.model.inputs
        graph = ModelGraph(self.built.graph, self.built.metas, inputs, tuple(n.name for n in outs), self.model.batch)
        places = {n.name: self.places[n] for n in self.model.graph.nodes if n.op == "placeholder"}
        return ShardedStage(graph, places, target)

    def _input(self, node: fx.Node) -> None:
        text = self.choices.get(input_key(node.name))
        places = self.whole if text is None else parse_placements(text)
        self.places[node] = places
        self.mapped[node] = self.built.placeholder(node.name, self._local(self.model.tensor(node.name), places))

    def _local(self, meta: TensorMeta, places: Placements) -> TensorMeta:
        return TensorMeta(mesh_shape(meta.shape, places, self.mesh.sizes), meta.dtype)

    def _call(self, node: fx.Node) -> None:
        if is_getitem(node):
            self._item(node)
        elif node.name not in self.active:
            self.places[node] = self.whole
            meta = self.model.metas[node.name]
            self.outputs_of[node] = (self.whole,) * (1 if isinstance(meta, TensorMeta) else len(meta))
            self.mapped[node] = self.built.copy(node, self.mapped, meta)
        else:
            self._active(node)

    def _item(self, node: fx.Node) -> None:
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        self.places[node] = self.outputs_of[source][index]
        local = self.built.metas[self.mapped[source].name]
        assert not isinstance(local, TensorMeta) and local[index] is not None
        self.mapped[node] = self.built.copy(node, self.mapped, local[index])  # type: ignore[arg-type]

    def _active(self, node: fx.Node) -> None:
        operands = tensor_args(node)
        strategy = self._strategy(node, len(operands))
        if len(strategy.inputs) != len(operands):
            raise VerificationError("shard", f"{node} has {len(operands)} tensor operands, its strategy {strategy}")
        wanted = dict(zip(operands, strategy.inputs, strict=True))
        converted = {o: self._operand(o, place, node) for o, place in wanted.items()}
        local_out = self._output_meta(node, strategy)
        target, args, kwargs = localise(node, strategy, local_out, converted, self.mesh)
        made = self.built.call(target, args, local_out, like=node, **kwargs)
        self.mapped[node] = made
        self.outputs_of[node] = strategy.outputs
        self.places[node] = strategy.outputs[0]

    def _strategy(self, node: fx.Node, num_inputs: int) -> MeshStrategy:
        text = self.choices.get(op_key(node.name))
        if text is not None:
            return parse_mesh_strategy(text)
        if node.name.startswith(SHARE):  # which no plan knows: the term lies as it lay
            (term,) = tensor_args(node)
            return MeshStrategy(tuple(Strategy((place,), (place,)) for place in self.places[term]))
        meta = self.model.metas[node.name]
        plain = replicated(num_inputs, 1 if isinstance(meta, TensorMeta) else len(meta))
        return MeshStrategy((plain,) * len(self.whole))

    def _output_meta(self, node: fx.Node, strategy: MeshStrategy) -> Meta:
        meta = self.model.metas[node.name]
        if isinstance(meta, TensorMeta):
            return self._local(meta, strategy.outputs[0])
        return tuple(None if m is None else self._local(m, p) for m, p in zip(meta, strategy.outputs, strict=True))

    def _operand(self, operand: fx.Node, wanted: Placements, user: fx.Node) -> fx.Node:
        if operand.name not in self.active and operand.name not in self.placed_inputs:
            return self._ambient(operand, wanted, user)
        if operand.name in self.changed:  # its new value is whole where it is not split, no sum
            wanted = tuple(place if isinstance(place, Shard) else REPLICATE for place in wanted)
        key = form_key(operand.name)
        form = self.own_forms.get((key, segment_of(user)), self.choices.get(key))
        return self._form(operand, wanted, user, parse_placements(form) if form else None)

    def _ambient(self, operand: fx.Node, wanted: Placements, user: fx.Node) -> fx.Node:
        wanted = tuple(place if isinstance(place, Shard | Partial) else REPLICATE for place in wanted)
        if wanted == self.whole:
            return self.mapped[operand]
        key = (operand, wanted, AMBIENT)
        if key not in self.forms:
            start, meta = self.mapped[operand], self.model.tensor(operand.name)
            self.forms[key] = ambient_shard(self.built, start, meta, wanted, self.mesh, operand)
        return self.forms[key]

    def _form(self, operand: fx.Node, wanted: Placements, user: fx.Node, via: Placements | None = None) -> fx.Node:
        """``operand`` in placement ``wanted``, through its shared second form if the plan names one.

        Segments share no conversion of an input: each is traced by itself.
        """
        source = self.places[operand]
        if wanted == source:
            return self.mapped[operand]
        key = (operand, wanted, segment_of(user) if operand.op == "placeholder" else AMBIENT)
        if key not in self.forms:
            start, meta = self.mapped[operand], self.model.tensor(operand.name)
            if via is not None and via not in (source, wanted):
                start, source = self._form(operand, via, user), via
            self.forms[key] = redistribute(self.built, start, meta, (source, wanted), self.mesh, user)
        return self.forms[key]
