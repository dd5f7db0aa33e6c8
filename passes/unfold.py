"""Unfold: a call that no rule is known for, and that torch itself makes of other calls, becomes those.

``expand_as`` is an ``expand``, an LSTM is its steps, ``rfft`` is a transform and a change of layout: rules are about
what such ops are made of. An op stays whole where torch has no such form of it, or one that writes into its operands.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from cost_model.errors import VerificationError
from cost_model.ops import entry_of
from cost_model.ops.table import backward_only
from passes.fakes import fake_like
from passes.graph import is_getitem, op_name
from passes.plain_forms import PLAIN_FORMS
from passes.rewriter import SOURCE_KEYS
from passes.unmutate import unmutate


@dataclass(frozen=True)
class Unfolded:
    """module: the calls that an op is made of; operands: what takes the place of its placeholders."""

    module: fx.GraphModule
    operands: tuple[fx.Node, ...]


def unfolded(node: fx.Node) -> Unfolded | None:
    """What a call is made of; None where it is to be kept."""
    target: Any = node.target
    function, composite = _made_of(node)
    if function is None:
        return None
    leaves, form = pytree.tree_flatten((node.args, node.kwargs))
    operands = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    values = [operand.meta["val"] for operand in operands]
    known = (*values, node.meta.get("val"))  # what is made of nothing has no operands
    mode = next((value.fake_mode for value in known if isinstance(value, FakeTensor)), None)
    if mode is None:
        return None
    values = [fake_like(value, mode=mode) for value in values]  # those of the trace have gradients of their own

    def call(*tensors: Any) -> Any:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(x, fx.Node) else x for x in leaves], form)
        return (target if composite else function)(*args, **kwargs)

    table = {target: function} if composite else {}
    with mode, _without_onednn():  # whose layers are one device's
        made = make_fx(call, table, pre_dispatch=True)(*values)
    if not all(n.op in ("placeholder", "output") or _is_plain(n, target) for n in made.graph.nodes):
        return None
    try:
        unmutate(made.graph)
    except VerificationError:
        return None
    for call_inside in made.graph.nodes:
        call_inside.meta.update({key: node.meta[key] for key in SOURCE_KEYS if key in node.meta})
    return Unfolded(made, tuple(operands))


@contextmanager
def _without_onednn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")  # torch warns of every flag it sets, this one among them
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _is_plain(node: fx.Node, target: Any) -> bool:
    """A call of another op: no constant, and no wrapper of several results."""
    is_op = isinstance(node.target, torch._ops.OpOverload) and node.target is not target
    return node.op == "call_function" and (is_op or is_getitem(node))


def _made_of(node: fx.Node) -> tuple[Callable[..., Any] | None, bool]:
    """What computes an op without a rule by other ops, and whether it is torch's own composite kernel."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None, False
    entry = entry_of(op_name(node))
    if entry is not None and entry.factors is not backward_only:
        return None, False
    composite = target._can_decompose()
    return (target.decompose if composite else _decompositions().get(target)), composite


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    return {**torch.export.default_decompositions(), **PLAIN_FORMS}
