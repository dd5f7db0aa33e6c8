"""Batch statistics: running statistics that cannot travel as gradients do become writes that a graph shows.

Those of a batch norm in training take the place of a gradient, which needs one that flows through the norm, and nobody
else who writes to them or reads them. Where that is not so (a teacher under ``no_grad``, a buffer that forward scales
as well) the norm names none, and what they become is made of its input, as any other buffer's new value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from passes.graph import is_getitem
from passes.in_place import called_before

aten = torch.ops.aten
_NORM = aten._native_batch_norm_legit_functional.default
_RUNNING = (3, 4)
"""Where running statistics stand among a norm's operands and among its results."""


def show_moves(exported: torch.export.ExportedProgram) -> None:
    """Change the graph of a functional program in place."""
    graph = exported.graph_module.graph
    norms = set(graph.find_nodes(op="call_function", target=_NORM))
    if not norms:
        return
    plain = _plain(exported, norms)
    for norm in [node for node in graph.nodes if node in norms and node not in plain]:
        _show(norm)


def norms_between(made: fx.Node, held: fx.Node) -> list[fx.Node] | None:
    """The batch norms, each reading what the one before makes, that give a buffer this value; None for other values."""
    found = []
    while made is not held:
        if len(made.users) != 1 or not is_getitem(made) or made.args[1] not in _RUNNING:
            return None
        source, place = made.args
        assert isinstance(source, fx.Node) and isinstance(place, int)
        before = source.args[place] if source.target is _NORM else None
        if not isinstance(before, fx.Node) or set(before.users) != {source}:
            return None
        found.append(source)
        made = before
    return found


def _plain(exported: torch.export.ExportedProgram, norms: set[fx.Node]) -> set[fx.Node]:
    """The norms whose statistics are moved by norms alone, all of which send gradients back."""
    chains = [chain for _, made, held in written_buffers(exported).values() if (chain := norms_between(made, held))]
    receiving = _receiving(exported)
    plain = {norm for norm in norms & receiving if sum(norm in chain for chain in chains) == len(_RUNNING)}
    while mixed := [chain for chain in chains if plain & set(chain) and not plain >= set(chain)]:
        plain.difference_update(*mixed)
    return plain


def written_buffers(exported: torch.export.ExportedProgram) -> dict[int, tuple[str, fx.Node, fx.Node]]:
    """Of each buffer that is written, by the number of the output: its name, its new value and its old one."""
    signature, graph = exported.graph_signature, exported.graph_module.graph
    returned: Any = graph.output_node().args[0]
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    holders = {target: inputs[name] for name, target in signature.inputs_to_buffers.items()}
    kind = torch.export.graph_signature.OutputKind.BUFFER_MUTATION
    places = ((place, str(spec.target)) for place, spec in enumerate(signature.output_specs) if spec.kind == kind)
    return {place: (target, returned[place], holders[target]) for place, target in places}


def _receiving(exported: torch.export.ExportedProgram) -> set[fx.Node]:
    """Values to which the loss sends a gradient back."""
    kind = torch.export.graph_signature.OutputKind.USER_OUTPUT
    returned: Any = exported.graph_module.graph.output_node().args[0]
    specs = zip(returned, exported.graph_signature.output_specs, strict=True)
    stack, found = [node for node, spec in specs if spec.kind == kind and isinstance(node, fx.Node)], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node not in found and "detach" not in str(node.target) and _has_floats(node):
            found.add(node)
            stack += _sent_to(node)
    return found


def _sent_to(node: fx.Node) -> list[fx.Node]:
    """The operands that a gradient of a call goes on to; running statistics have none."""
    if node.target is _NORM:
        return [operand for operand in node.args[:3] if isinstance(operand, fx.Node)]
    (source, *place) = node.args if is_getitem(node) else (None,)
    is_statistic = isinstance(source, fx.Node) and source.target is _NORM and place != [0]
    return [] if is_statistic else node.all_input_nodes


def _has_floats(node: fx.Node) -> bool:
    tensors = (leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor))
    return any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors)


def _show(norm: fx.Node) -> None:
    """Unbiased variances move the running one, as in torch's kernel."""
    given: Any = norm.args
    x, weight, bias, *running, _, momentum, eps = given
    dims = [dim for dim in range(x.meta["val"].ndim) if dim != 1]
    source = called_before(norm, aten.detach.default, x)
    source = called_before(norm, aten.to.dtype, source, running[0].meta["val"].dtype)
    mean = called_before(norm, aten.mean.dim, source, dims)
    variance = called_before(norm, aten.var.correction, source, dims, correction=1)
    for place, old, own in zip(_RUNNING, running, (mean, variance), strict=True):
        kept = called_before(norm, aten.mul.Tensor, old, 1 - momentum)
        new = called_before(norm, aten.add.Tensor, kept, own, alpha=momentum)
        for user in [user for user in norm.users if user.args[1] == place]:
            user.replace_all_uses_with(new)
            norm.graph.erase_node(user)
    norm.target, norm.args = aten._native_batch_norm_legit.no_stats, (x, weight, bias, True, momentum, eps)
