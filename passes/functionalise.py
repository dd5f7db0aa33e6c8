"""Functionalise: graphs that write to what is read elsewhere, in calls that return."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind

from cost_model.errors import UnsupportedError
from passes.calls import schema_arguments
from passes.detach import detach
from passes.fakes import as_parameter, fake_tensor
from passes.graph import op_name
from passes.in_place import state_writes, writes
from passes.instance_statistics import show_statistics


def functional(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Functionalise graphs that write to what is read elsewhere, and state what ``torch.vmap`` makes of calls and what
    autocast regions cast.

    Most graphs need none of it, and the second trace it costs takes longer than the first.
    """
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]
    for graph in graphs:
        show_statistics(graph)
        state_writes(graph)
    reasons = (writes, _moves_statistics, _is_of_vmap, _is_autocast)
    retraced = any(reason(node) for graph in graphs for node in graph.nodes for reason in reasons)
    detach(exported.graph_module)
    if retraced:
        _hold_as_traced(exported)
    return exported.run_decompositions({}) if retraced else exported


def _hold_as_traced(exported: torch.export.ExportedProgram) -> None:
    """Parameters on the meta device, of layers that were traced as others are, as fake tensors of a CPU like these."""
    held = exported.state_dict
    fakes = [tensor for tensor in held.values() if isinstance(tensor, FakeTensor)]
    for name, tensor in held.items():
        if tensor.is_meta and fakes:
            made = fake_tensor(tensor.shape, tensor.dtype, tensor.stride(), mode=fakes[0].fake_mode)
            held[name] = as_parameter(made, tensor.requires_grad)


def merge_buffers(exported: torch.export.ExportedProgram, aliases: Mapping[str, str]) -> None:
    """One input for each buffer, whatever its names: a trace of a graph that writes to one of two fails.

    aliases: name -> the first name of the same tensor.
    """
    signature = exported.graph_signature
    placeholders = exported.graph.find_nodes(op="placeholder")
    kept: dict[str, fx.Node] = {}
    specs = []
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind is InputKind.BUFFER:
            name = str(spec.target).removeprefix("model.")
            first = kept.setdefault(aliases.get(name, name), node)
            if first is not node:
                node.replace_all_uses_with(first)
                exported.graph.erase_node(node)
                exported.constants.pop(spec.target, None)
                continue
        specs.append(spec)
    signature.input_specs = specs


def _moves_statistics(node: fx.Node) -> bool:
    """Whether a batch norm in training writes to running statistics, of which its schema says nothing."""
    if node.target is not torch.ops.aten.batch_norm.default:
        return False
    given = schema_arguments(node)
    return bool(given["training"]) and given["running_mean"] is not None


def _is_of_vmap(node: fx.Node) -> bool:
    return str(getattr(node.target, "__module__", "")).startswith("torch._functorch")


def _is_autocast(node: fx.Node) -> bool:
    """Whether a region casts. UnsupportedError where it does so on devices of another kind than the traced ones."""
    if op_name(node) != "wrap_with_autocast" or not node.args[2]:
        return False
    values = (arg.meta.get("val") for arg in node.all_input_nodes)
    if all(value.device.type == node.args[0] for value in values if isinstance(value, torch.Tensor)):
        return True
    raise UnsupportedError(
        f"forward casts by torch.autocast({node.args[0]!r}), which does nothing on the devices that the model lies on: "
        "pass precision=autopar.Precision(compute=...) instead"
    )
