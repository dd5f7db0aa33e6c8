"""A call of an op on tensors, and the same call as the op table sees it; tests of the op table share this."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autopar.runtime import draws
from cost_model.ops import OpCall, Ref
from cost_model.tensor import TensorMeta

Tensor = torch.Tensor
aten = torch.ops.aten


# --- References for our own ops -------------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-1, -2) * (scale or 1.0 / math.sqrt(q.shape[-1]))
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -torch.inf)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v, scores.logsumexp(-1).detach()


def cross_entropy_sum(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )


def count_labels(labels: Tensor, ignore_index: int) -> Tensor:
    return (labels != ignore_index).sum()


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, replicas: int) -> Tensor:
    dims = [d for d in range(x.ndim) if d != 1]
    variance, mean = torch.var_mean(x, dims, correction=0)
    scale = (variance + eps).rsqrt()
    along = [1, -1, *[1] * (x.ndim - 2)]
    return (x - mean.view(along)) * (scale * weight).view(along) + bias.view(along)


def experts(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str, total: int
) -> Tensor:
    """Every expert for every token, then those that were not asked for times zero; -1 is asked of nobody."""
    gate, up = torch.einsum("th,eih->tei", x, gate_up).chunk(2, -1)
    made = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, down)
    asked = index.unsqueeze(-1) == torch.arange(gate_up.shape[0])
    return torch.einsum("teh,tke,tk->th", made, asked.to(x.dtype), weights)


def dropout(x: Tensor, key: Tensor, coordinates: Sequence[Tensor], p: float) -> tuple[Tensor, Tensor]:
    mask = draws.keep(key, coordinates, p)
    return x * mask / (1 - p), mask


def gathered_alike(x: torch.Tensor, dim: int, outer: int, replicas: int) -> torch.Tensor:
    """What replicas that all hold the same samples gather."""
    own = x.unflatten(dim, (outer, -1))
    return torch.cat([own] * replicas, dim + 1).flatten(dim, dim + 1)


def ctc(
    likely: torch.Tensor,
    labels: torch.Tensor,
    steps: torch.Tensor,
    lengths: torch.Tensor,
    blank: int,
    zero_infinity: bool,
) -> torch.Tensor:
    return torch.nn.functional.ctc_loss(likely, labels, steps, lengths, blank, "none", zero_infinity)


REFERENCES: dict[str, Callable[..., Any]] = {
    "autopar.attention.default": attention,
    "autopar.cross_entropy_sum.default": cross_entropy_sum,
    "autopar.count_labels.default": count_labels,
    "autopar.batch_norm.default": batch_norm,
    "autopar.experts.default": experts,
    "autopar.ctc.default": ctc,
    "autopar.collect.default": lambda x, number: x.clone(),
    "autopar.replica_sum.default": lambda x, replicas: x.clone(),
    "autopar.replica_gather.default": gathered_alike,
    "autopar.written.default": lambda x, buffer, value, replicas: x.view_as(x),
    "autopar.replica_share.default": lambda x, replicas: x.clone(),
    "autopar.dropout.default": dropout,
    **{f"autopar.{name}.default": getattr(draws, name) for name in ("uniform", "normal", "random_integers")},
}


def function_of(name: str) -> Callable[..., Any]:
    if name in REFERENCES:
        return REFERENCES[name]
    _, op, overload = name.split(".")
    return getattr(getattr(aten, op), overload)


# --- From a call on tensors to an OpCall ----------------------------------------------------------------------------


def meta_of(tensor: Tensor) -> TensorMeta:
    return TensorMeta(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def named_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    function = function_of(name)
    if name in REFERENCES:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
    declared = function._schema.arguments
    defaults = {a.name: a.default_value for a in declared}
    return defaults | {a.name: value for a, value in zip(declared, args, strict=False)} | kwargs


def tensors_in(outputs: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def describe(name: str, arguments: dict[str, Any], outputs: Any) -> OpCall:
    """The call as the op table sees it."""
    tensors = tensors_in(list(arguments.values()))
    positions = iter(range(len(tensors)))
    refs = pytree.tree_map(lambda v: Ref(next(positions)) if isinstance(v, Tensor) else v, arguments)
    return OpCall(name, tuple(map(meta_of, tensors)), tuple(map(meta_of, tensors_in(outputs))), refs)


@dataclass
class Case:
    """A call with its tensors, and the same call as the op table sees it."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        self.arguments = named_arguments(self.name, self.args, self.kwargs)
        self.tensors = tensors_in(list(self.arguments.values()))
        self.outputs = self.run(self.tensors)
        self.call = describe(self.name, self.arguments, self.outputs)

    def run(self, tensors: Sequence[Tensor], shapes: list[tuple[int, ...]] | None = None) -> list[Tensor]:
        """Run on other tensors; ``shapes`` of the outputs make local the arguments that name sizes."""
        resized = RESIZED.get(self.name)
        if shapes is not None and resized is not None:
            return resized(self, tensors[0], shapes)
        replacements = iter(tensors)
        values = pytree.tree_map(lambda v: next(replacements) if isinstance(v, Tensor) else v, self.arguments)
        if shapes is not None:
            values |= local_groups(self, tensors, shapes)
        if self.name in REFERENCES:
            return tensors_in(REFERENCES[self.name](**values))
        function = function_of(self.name)
        positional = [values[a.name] for a in function._schema.arguments if not a.kwarg_only]
        named = {a.name: values[a.name] for a in function._schema.arguments if a.kwarg_only}
        return tensors_in(function(*positional, **named))


def local_groups(case: Case, tensors: Sequence[Tensor], shapes: list[tuple[int, ...]]) -> dict[str, int]:
    """The number of groups of channels that local shapes leave."""
    if "group_norm" in case.name:
        whole = case.tensors[0].shape[1]
        return {"num_groups": case.arguments["num_groups"] * tensors[0].shape[1] // whole}
    if "groups" not in case.arguments:
        return {}
    of_groups = shapes[0] if "transpose" in case.name else tensors[0].shape
    return {"groups": of_groups[1] // tensors[1].shape[1]}


def _reshaped(case: Case, x: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [x.reshape(shapes[0])]


def _split(case: Case, x: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    dim = case.arguments["dim"]
    return list(x.split([shape[dim] for shape in shapes], dim))


RESIZED: dict[str, Callable[[Case, Tensor, list[tuple[int, ...]]], list[Tensor]]] = {
    "aten.expand.default": lambda case, x, shapes: [x.expand(shapes[0])],
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    **{
        f"aten.{op}": _reshaped
        for op in (
            "view.default reshape.default _unsafe_view.default squeeze.default squeeze.dim squeeze.dims unflatten.int"
        ).split()
    },
}
