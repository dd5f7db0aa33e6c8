"""Stitch: a stage's joint graph from the joint graphs of its pieces, each distinct piece traced once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from passes.fakes import fake_tensor
from passes.graph import ModelGraph, copied_node, torch_dtype
from passes.joint import JointGraph, TracedPiece, trace_joint, trace_values
from passes.lower import label_of
from passes.pieces import AMBIENT, cut_pieces, piece_key, segment_of
from passes.storage import own_storage, renamed, storage_of
from passes.vocabulary import forward_end

aten = torch.ops.aten


@dataclass(frozen=True)
class Templates:
    """Traces by key, with the labels of what was traced; never changed once made.

    pieces: of a chain, with their backward; ambient: what depends on no parameter, with the names of its outputs.
    """

    pieces: dict[str, tuple[TracedPiece, list[str]]] = field(default_factory=dict)
    ambient: dict[str, tuple[fx.Graph, tuple[str, ...], list[str]]] = field(default_factory=dict)


def stage_joint(
    model: ModelGraph, templates: Templates, *, last: bool, zeros: frozenset[str] = frozenset()
) -> JointGraph:
    """The joint graph of a stage; ``last``: its output is the loss. New traces are added to ``templates``.

    zeros: parameters that get a gradient of zeros where the stage has none for them.
    """
    try:
        return _Stitch(model, templates, last).run(zeros, whole=False)
    except _UnevenGradientsError:
        return _Stitch(model, templates, last).run(zeros, whole=True)


class _UnevenGradientsError(Exception):
    """Of the values that a piece gives to others, some get a gradient and some get none."""


@dataclass(frozen=True)
class _Laid:
    """A piece in the stage's graph: its trace, the stage's node for each of its nodes, what its storages stand for."""

    piece: ModelGraph
    joint: TracedPiece
    mapped: dict[fx.Node, fx.Node]
    bound: dict[Hashable, Hashable]
    labels: dict[str, str]
    segment: int


class _Stitch:
    def __init__(self, model: ModelGraph, templates: Templates, last: bool) -> None:
        self.model, self.templates, self.last = model, templates, last
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.gradients: dict[str, fx.Node | None] = {i.node: None for i in model.inputs if i.has_gradient}

    def run(self, zeros: frozenset[str], *, whole: bool) -> JointGraph:
        """whole: as one piece."""
        grad_in = self._placeholders()
        pieces = cut_pieces(self.model, whole=whole)
        if pieces.ambient is not None:
            self._lay_ambient(pieces.ambient)
        laid = []
        for piece in pieces.chain:
            laid.append(self._lay_forward(piece, piece is pieces.chain[-1]))
        output = self.nodes[self.model.outputs[0]]
        mark = self.graph.call_function(forward_end, (output,))
        self._lay_backwards(laid, grad_in)
        for item in self.model.inputs:
            if item.target in zeros and item.trainable and self.gradients[item.node] is None:
                self.gradients[item.node] = self._zeros(item.node)
        results = [g for g in self.gradients.values() if g is not None]
        self.graph.output((output, mark, *results))
        return JointGraph(
            graph=self.graph,
            inputs=tuple(i.node for i in self.model.inputs),
            grad_in=None if grad_in is None else grad_in.name,
            output=output.name,
            mark=mark.name,
            gradients={k: None if g is None else g.name for k, g in self.gradients.items()},
        )

    def _placeholders(self) -> fx.Node | None:
        for item in self.model.inputs:
            self.nodes[item.node] = self._placeholder(item.node, item.node)
        return None if self.last else self._placeholder("grad_in", self.model.outputs[0])

    def _placeholder(self, name: str, like: str) -> fx.Node:
        node = self.graph.placeholder(name)
        meta = self.model.tensor(like)
        node.meta["val"] = fake_tensor(meta.shape, torch_dtype(meta.dtype))
        node.meta["storage"] = ("input", node.name)
        return node

    def _lay_ambient(self, ambient: ModelGraph) -> None:
        graph, results, traced_labels = self._ambient_template(ambient)
        labels = dict(zip(traced_labels, _labels(ambient), strict=True))
        bound: dict[Hashable, Hashable] = {}
        mapped: dict[fx.Node, fx.Node] = {}
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        for node, item in zip(placeholders, ambient.inputs, strict=True):
            self._bind(node, self.nodes[item.node], mapped, bound)
        for node in graph.nodes:
            if node.op == "call_function":
                mapped[node] = self._copy(node, mapped, bound, AMBIENT, labels)
        by_name = {n.name: n for n in graph.nodes}
        for name, result in zip(ambient.outputs, results, strict=True):
            self.nodes[name] = mapped[by_name[result]]

    def _ambient_template(self, ambient: ModelGraph) -> tuple[fx.Graph, tuple[str, ...], list[str]]:
        """Its trace, shared by equal ones, the names of its outputs, and the labels of the one that was traced."""
        key, known = piece_key(ambient, last=False), self.templates.ambient
        if key not in known:
            known[key] = (*trace_values(ambient), _labels(ambient))
        return known[key]

    def _bind(
        self, node: fx.Node, actual: fx.Node, mapped: dict[fx.Node, fx.Node], bound: dict[Hashable, Hashable]
    ) -> None:
        """A placeholder of a trace stands for a node of the stage."""
        mapped[node] = actual
        bound[storage_of(node)] = storage_of(actual)

    def _copy(
        self,
        node: fx.Node,
        mapped: dict[fx.Node, fx.Node],
        bound: dict[Hashable, Hashable],
        segment: int,
        labels: dict[str, str],
    ) -> fx.Node:
        made = copied_node(self.graph, node, mapped)
        made.meta["storage"] = renamed(node.meta["storage"], lambda s: bound.get(s, (f"segment {segment}", s)))
        label = label_of(node)
        made.meta["label"] = labels.get(label, label)
        made.meta["segment"] = segment
        return made

    def _template(self, piece: ModelGraph, last: bool) -> tuple[TracedPiece, list[str]]:
        """The piece's trace, shared by equal pieces, and the labels of the piece that was traced."""
        strides = self._strides(piece)
        key = f"{piece_key(piece, last=last)} {strides}"
        known = self.templates.pieces
        if key not in known:
            named = {item.node: strides[k] for k, item in enumerate(piece.inputs) if k in strides}
            known[key] = (trace_joint(piece, last=last, strides=named), _labels(piece))
        return known[key]

    def _strides(self, piece: ModelGraph) -> dict[int, tuple[int, ...]]:
        """Of inputs that do not lie contiguously, by number: views of others."""
        values, alone = [self.nodes[i.node].meta["val"] for i in piece.inputs], _only_activation(piece)
        apart = (k for k, i in enumerate(piece.inputs) if i.node != alone and not values[k].is_contiguous())
        return {k: tuple(values[k].stride()) for k in apart}

    def _lay_forward(self, piece: ModelGraph, final: bool) -> _Laid:
        joint, traced_labels = self._template(piece, final and self.last)
        labels = dict(zip(traced_labels, _labels(piece), strict=True))
        laid = _Laid(piece, joint, {}, {}, labels, segment_of(piece.nodes()[0]))
        by_name, alone = {n.name: n for n in joint.graph.nodes}, _only_activation(piece)
        for name, item in zip(joint.inputs, piece.inputs, strict=True):
            actual = self.nodes[item.node]
            if item.node == alone:
                actual = self._contiguous(actual, laid.segment)
            self._bind(by_name[name], actual, laid.mapped, laid.bound)
        for node in joint.graph.nodes:
            if node.name == joint.mark:
                break
            if node.op == "call_function":
                laid.mapped[node] = self._copy(node, laid.mapped, laid.bound, laid.segment, labels)
        for output, name in zip(piece.outputs, joint.outputs, strict=True):
            self.nodes[output] = laid.mapped[by_name[name]]
        return laid

    def _lay_backwards(self, laid: list[_Laid], grad_in: fx.Node | None) -> None:
        sent = {} if grad_in is None else {self.model.outputs[0]: grad_in}
        for part in reversed(laid):
            pairs = zip(part.piece.outputs, part.joint.grads_in, strict=True)
            wanted = {name: placeholder for name, placeholder in pairs if placeholder is not None}
            given = wanted.keys() & sent.keys()
            if given != wanted.keys() and given:
                raise _UnevenGradientsError
            if given == wanted.keys():
                self._lay_backward(part, {placeholder: sent[name] for name, placeholder in wanted.items()}, sent)

    def _lay_backward(self, part: _Laid, given: Mapping[str, fx.Node], sent: dict[str, fx.Node]) -> None:
        """Copy a piece's backward.

        given: placeholder -> the gradient it stands for. sent: value that goes from piece to piece -> its gradient so
        far, to which this one's is added.
        """
        joint = part.joint
        by_name = {n.name: n for n in joint.graph.nodes}
        for placeholder, gradient in given.items():
            self._bind(by_name[placeholder], self._contiguous(gradient, part.segment), part.mapped, part.bound)
        after = False
        for node in joint.graph.nodes:
            if after and node.op == "call_function":
                part.mapped[node] = self._copy(node, part.mapped, part.bound, part.segment, part.labels)
            after = after or node.name == joint.mark
        for name, item in zip(joint.inputs, part.piece.inputs, strict=True):
            found = joint.gradients.get(name)
            if found is None:
                continue
            node = part.mapped[by_name[found]]
            if item.node in self.gradients:
                self.gradients[item.node] = self._summed(self.gradients[item.node], node, part.segment)
            elif item.kind == "activation":
                sent[item.node] = self._summed(sent.get(item.node), node, part.segment)

    def _summed(self, before: fx.Node | None, new: fx.Node, segment: int) -> fx.Node:
        """A parameter that several pieces use has the sum of their gradients."""
        if before is None:
            return new
        parts = [node.meta["val"] for node in (before, new)]
        made = self._call(aten.add.Tensor, (before, new), parts[0], segment)
        laid = [fake_tensor(part.shape, part.dtype, part.stride()) for part in parts]
        made.meta["val"] = laid[0] + laid[1]  # gradients may lie as their kernels leave them, column by column
        return made

    def _zeros(self, name: str) -> fx.Node:
        """In the segment that uses the parameter."""
        segment = min((segment_of(u) for u in self.nodes[name].users), default=AMBIENT)
        like = self.nodes[name].meta["val"]
        made = self._call(aten.zeros.default, (), like, segment, dtype=like.dtype, device=torch.device("cpu"))
        made.args = (list(like.shape),)
        return made

    def _contiguous(self, node: fx.Node, segment: int) -> fx.Node:
        """Pieces are traced with contiguous gradients, and those of a plain chain with contiguous activations."""
        value = node.meta["val"]
        if value.is_contiguous():
            return node
        return self._call(aten.clone.default, (node,), value, segment, memory_format=torch.contiguous_format)

    def _call(self, target: Any, args: tuple[fx.Node, ...], like: torch.Tensor, segment: int, **kwargs: Any) -> fx.Node:
        made = self.graph.call_function(target, args, kwargs)
        made.meta["val"] = fake_tensor(like.shape, like.dtype)
        made.meta["storage"] = own_storage(made)
        made.meta["label"] = ""
        made.meta["segment"] = segment
        return made


def _only_activation(piece: ModelGraph) -> str | None:
    """What a piece of a plain chain takes from the one before: contiguous, so that equal pieces stay equal.

    What several pieces read is read as it lies.
    """
    found = [i.node for i in piece.inputs if i.kind == "activation"]
    return found[0] if len(found) == 1 else None


def _labels(piece: ModelGraph) -> list[str]:
    return [label_of(node) for node in piece.nodes()]
