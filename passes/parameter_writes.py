"""Parameter writes: what forward writes to parameters (``w.data.clamp_()``, rows that an embedding with ``max_norm``
scales, ``w.data = renorm(w.data)``) goes to a copy without gradient.

Who reads the parameter afterwards reads the copy, and sends its gradient to the parameter: ``copy + (w - w)``, the
second ``w`` detached. At the end the copy is written to the parameter, in one call, and the optimizer starts from that
value, as on one device (``passes.written``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cost_model.errors import UnsupportedError
from passes.detach import body_of, given_to, inside, is_region, roots_written, roots_written_in, written_by
from passes.graph import is_getitem
from passes.in_place import called_before

aten = torch.ops.aten
_NEEDS_NO_VALUES = (
    aten.embedding.default,
    aten.embedding_bag.padding_idx,
    aten.index.Tensor,
    aten.index_select.default,
)
"""Calls whose backward does not read the parameter, so that it may change after them."""


def divert_writes(exported: torch.export.ExportedProgram) -> None:
    """Change a graph in place. Errors: UnsupportedError where no backward would be one device's."""
    graph, names = exported.graph_module.graph, exported.graph_signature.inputs_to_parameters
    parameters = {node: names[node.name] for node in graph.find_nodes(op="placeholder") if node.name in names}
    if not any(_writes_any(node) for node in graph.nodes):
        return
    _name_once(graph, parameters)
    written, output = roots_written_in(graph), graph.output_node()
    for node in [node for node in parameters if node in written]:
        copy = _Diverted(graph, node, parameters[node]).run()
        called_before(output, aten.copy_.default, called_before(output, aten.detach.default, node), copy)
    exported.graph_module.recompile()


def _writes_any(node: fx.Node) -> bool:
    """Whether a call, or a region that it runs, writes to anything."""
    return body_of(node) is not None or any(True for _ in roots_written(node))


def _name_once(graph: fx.Graph, parameters: Iterable[fx.Node]) -> None:
    """What a ``no_grad`` region returns of a parameter, itself or written to, is the parameter."""
    for region in [node for node in graph.nodes if is_region(node)]:
        returned: Any = inside(region).output_node().args[0]
        given = {name: operand for name, operand in given_to(region).items() if operand in parameters}
        for output in [user for user in region.users if is_getitem(user)]:
            result = returned[output.args[1]]
            while _is_in_place(result) and result not in given:
                result = result.args[0]
            if result in given:
                output.replace_all_uses_with(given[result])


def _is_in_place(value: Any) -> bool:
    """Whether it is a call that returns the very tensor that it wrote to: its first operand."""
    target = getattr(value, "target", None)
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and target._schema.name.endswith("_")


@dataclass(frozen=True)
class _Diverted:
    """One parameter of a graph."""

    graph: fx.Graph
    parameter: fx.Node
    name: str

    def run(self) -> fx.Node:
        """The copy that is written to instead."""
        users = sorted(self.parameter.users)
        writers = [node for node in self.graph.nodes if self.parameter in written_by(node)]
        without = called_before(users[0], aten.detach.default, self.parameter)
        copy = called_before(users[0], aten.clone.default, without)
        copy.meta["val"] = without.meta["val"]  # in whose memory its views lie
        reads: dict[fx.Node, fx.Node] = {}
        for user in users:
            if user.target is aten.detach.default:
                user.replace_all_uses_with(copy)
                self.graph.erase_node(user)
            elif user in writers or is_region(user):
                self._check(user)
                user.replace_input_with(self.parameter, copy)
            else:
                self._read(user, (without, copy), writers, reads)
        return copy

    def _check(self, user: fx.Node) -> None:
        if body_of(user) is not None and not is_region(user):
            raise self._refused("within torch.autocast", "change it before")

    def _read(
        self, user: fx.Node, made: tuple[fx.Node, fx.Node], writers: list[fx.Node], reads: dict[fx.Node, fx.Node]
    ) -> None:
        """A call that reads the parameter, with its gradient, as the last call before left it."""
        if user.target not in _NEEDS_NO_VALUES and any(writer > user for writer in writers):
            raise self._refused("after it has read it", "change it before, or after the optimizer's step")
        before = [writer for writer in writers if writer < user]
        if not before:
            return
        without, copy = made
        if before[-1] not in reads:
            none = called_before(user, aten.sub.Tensor, self.parameter, without)
            now = called_before(user, aten.detach.default, copy)
            reads[before[-1]] = called_before(user, aten.add.Tensor, now, none)
        user.replace_input_with(self.parameter, reads[before[-1]])

    def _refused(self, where: str, instead: str) -> UnsupportedError:
        return UnsupportedError(f"forward changes {self.name.removeprefix('model.')!r} {where}: {instead}")
