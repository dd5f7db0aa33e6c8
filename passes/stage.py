"""Build: one stage from its cut graph to readable code and its priced program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cost_model.placement import Partial, Placement, Varying
from cost_model.program import Block, Bucket, ParameterShard, Value
from cost_model.tensor import TensorMeta
from passes.codegen import Sources, new_names, render_function, render_module, returns, returns_named
from passes.graph import GraphInput, ModelGraph
from passes.lower import Function, Storages, lower
from passes.pack import pack
from passes.shard import ShardedStage, shard
from passes.split import SplitGraphs, split
from passes.stitch import Templates, stage_joint
from passes.zero import finished, make_buckets, shard_name, shard_state

SETUP = "setup"
FORWARD_SIGNATURE = "params, buffers, constants, batch, step, received, comm, kernels, device"
BACKWARD_SIGNATURE = "params, buffers, constants, batch, step, saved, grads, accumulate, comm, kernels, device"
SETUP_SIGNATURE = "buffers, comm, kernels, device"
AXIS = "tp"
_SAVE_ALL: Mapping[int, str] = {}


@dataclass(frozen=True)
class StageCode:
    """One stage as every one of its ranks runs it.

    source: a module with ``setup``, ``forward`` and ``backward``; forward, backward: their priced blocks.
    saved: storages kept from forward to backward; keeps: how many values of ``saved`` a microbatch carries.
    inputs: what the stage reads, with placements on the tensor-parallel axis; constants: made by ``setup``.
    sent, received: local activation metas at the cuts; exit: how what is sent lies on the axis.
    gradients: parameters that get one, in the order in which
    backward finishes them (a parameter the loss does not reach has none, as on one device).
    buckets: parameters whose state is split over the dp axis.
    updates: buffers that backward gives a new value.
    """

    source: str
    forward: Block
    backward: Block
    saved: tuple[str, ...]
    inputs: tuple[GraphInput, ...]
    placements: Mapping[str, Placement] = field(hash=False)
    metas: Mapping[str, TensorMeta] = field(hash=False)
    constants: tuple[Value, ...]
    sent: TensorMeta | None
    received: TensorMeta | None
    exit: Placement
    gradients: tuple[str, ...]
    buckets: tuple[Bucket, ...]
    updates: tuple[str, ...]


def build_stage(
    model: ModelGraph,
    choices: Mapping[str, str],
    tp: int,
    templates: Templates,
    *,
    last: bool,
    zeros: frozenset[str] = frozenset(),
    recompute: Mapping[int, str] = _SAVE_ALL,
    dp: int = 1,
    shared: frozenset[str] = frozenset(),
) -> StageCode:
    """Shard, trace jointly, split, lower and print one stage's cut graph.

    templates: traces made so far. zeros: parameters that must have a gradient though this stage gives them none.
    recompute: segment -> its level. shared: parameters that other stages hold too.
    """
    sharded = pack(shard(model, choices, AXIS, tp, last=last))
    joint = stage_joint(sharded.graph, templates, last=last, zeros=zeros)
    inputs = sharded.graph.inputs
    invariant = frozenset(i.node for i in inputs if i.kind in ("buffer", "constant") and not i.changes)
    parameters = {i.node: i.target for i in inputs if i.kind == "parameter" or i.changes}
    graphs = split(joint, invariant, parameters, recompute)
    metas = {i.node: sharded.graph.tensor(i.node) for i in inputs}
    buckets = make_buckets(graphs, inputs, sharded.placements, metas, choices, (dp, tp), shared)
    gradients = finished(graphs.backward)
    return _Builder(sharded, shard_state(graphs, buckets, parameters), last, buckets, gradients).build()


class _Builder:
    def __init__(
        self,
        sharded: ShardedStage,
        graphs: SplitGraphs,
        last: bool,
        buckets: tuple[Bucket, ...],
        gradients: tuple[str, ...],
    ) -> None:
        self.sharded, self.graphs, self.last = sharded, graphs, last
        self.buckets, self.gradients = {shard_name(b): b for b in buckets}, gradients
        self.inputs = {i.node: i for i in sharded.graph.inputs}
        self.activation = next((i.node for i in sharded.graph.inputs if i.kind == "activation"), None)
        given = {i.node: i.target for i in sharded.graph.inputs if i.kind == "parameter"}
        given.update({name: bucket.name for name, bucket in self.buckets.items()})
        self.storages = Storages(given)
        self.names = new_names()

    def build(self) -> StageCode:
        graphs = self.graphs
        backward_reads = {n.name for n in graphs.backward.nodes if n.op == "placeholder"}
        keeps_activation = self.activation is not None and self.activation in backward_reads
        kept = (*graphs.saved, *((self.activation,) if keeps_activation and self.activation else ()))
        setup = lower(graphs.setup, SETUP, frozenset(), graphs.constants, self.storages)
        owned = frozenset([self.activation] if self.activation else [])
        forward = lower(graphs.forward, "forward", owned, (graphs.output, *kept), self.storages)
        grad_in = graphs.grad_in if graphs.grad_in in backward_reads else None
        handed = (*kept, *((grad_in,) if grad_in else ()))
        results = self._returned_gradient()
        backward = lower(graphs.backward, "backward", frozenset(handed), results, self.storages)
        texts = [
            self._text(setup, SETUP_SIGNATURE, (), None, "Values that never change, computed once."),
            self._text(forward, FORWARD_SIGNATURE, (), kept, "One microbatch: (activation or loss, saved values)."),
            self._text(
                backward,
                BACKWARD_SIGNATURE,
                self._taken(kept, grad_in),
                None,
                "One microbatch: gradients into their buffers.",
            ),
        ]
        changed = {i.target for i in self.inputs.values() if i.changes}
        return StageCode(
            source=render_module(["Program of one pipeline stage, generated by autopar."], self.names, texts),
            forward=forward.block,
            backward=backward.block,
            saved=self._saved_storages(forward, kept),
            inputs=self.sharded.graph.inputs,
            placements=self.sharded.placements,
            metas={i.node: self.sharded.graph.tensor(i.node) for i in self.sharded.graph.inputs},
            constants=self._constant_values(forward, backward),
            sent=None if self.last else self.sharded.graph.tensor(self.sharded.graph.outputs[0]),
            received=self.sharded.graph.tensor(self.activation) if self.activation else None,
            exit=self.sharded.exit,
            gradients=tuple(name for name in self.gradients if name not in changed),
            updates=tuple(name for name in self.gradients if name in changed),
            buckets=tuple(self.buckets.values()),
        )

    def _returned_gradient(self) -> tuple[str, ...]:
        output = next(n for n in self.graphs.backward.nodes if n.op == "output")
        return tuple(n.name for n in output.args[0])

    def _taken(self, kept: tuple[str, ...], grad_in: str | None) -> tuple[str, ...]:
        """Variables unpacked from ``saved``, the incoming gradient last ("_" where it is not needed)."""
        if self.last:
            return kept
        return (*kept, grad_in or "_")

    def _text(
        self, function: Function, signature: str, taken: tuple[str, ...], kept: tuple[str, ...] | None, doc: str
    ) -> str:
        expressions = {name: self._expression(name) for name in function.inputs if name not in taken}
        body = render_function(function, signature, Sources(expressions, taken), self.names, doc)
        if function.name == SETUP:
            return f"{body}\n{returns_named({name: name for name in function.results})}"
        values = function.results[:1] if kept is not None else function.results
        return f"{body}\n{returns(values, kept)}"

    def _expression(self, name: str) -> str:
        item = self.inputs.get(name)
        if name in self.buckets:
            return f'params["{self.buckets[name].name}"]'
        if item is None:
            return f'constants["{name}"]'
        source = {"parameter": "params", "buffer": "buffers", "constant": "buffers", "batch": "batch", "step": "step"}
        if item.kind == "activation":
            return "received.pop()"
        return f'{source[item.kind]}["{item.target}"]'

    def _saved_storages(self, forward: Function, kept: tuple[str, ...]) -> tuple[str, ...]:
        values = {v.name: v for i in forward.block.instructions for v in i.outputs}
        values.update({v.name: v for v in forward.block.inputs})
        return tuple(dict.fromkeys(values[name].storage for name in kept))

    def _constant_values(self, *functions: Function) -> tuple[Value, ...]:
        known = {v.storage: v for f in functions for v in f.block.inputs if v.name in self.graphs.constants}
        return tuple(known.values())


def parameter_shards(code: StageCode, dp: int, tp: int, tied: Mapping[str, str]) -> tuple[ParameterShard, ...]:
    """The stage's parameters and buffers; ``tied``: parameter -> its cross-stage group."""
    return tuple(
        ParameterShard(
            name=i.target,
            meta=code.metas[i.node],
            placement=str(code.placements[i.node]),
            trainable=i.target in code.gradients,
            reduce_axis=reduce_axis(code.placements[i.node], dp, tp),
            tied=tied.get(i.target),
        )
        for i in code.inputs
        if i.kind in ("parameter", "buffer", "constant")
    )


def reduce_axis(placement: Placement, dp: int, tp: int) -> str | None:
    """Axis over which a parameter's gradient is summed once per step."""
    varying = tp > 1 and isinstance(placement, Varying)
    assert not isinstance(placement, Partial)
    if dp > 1:
        return "dp_tp" if varying else "dp"
    return "tp" if varying else None
