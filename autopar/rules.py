"""Rules of the user's own: how an op that autopar does not know may be split, proved by execution if asked."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.aten_call import AtenCall, tensors_in
from autopar.runtime.comm import join_shards, shard_of
from cost_model.errors import AutoparError, ConfigError, RuleError
from cost_model.factors import FactorMap, Strategy, parse_map, split_factor
from cost_model.ops.table import OPS, Op, OpCall, bytes_moved, register
from cost_model.placement import Partial, Placement, Shard
from cost_model.program import OpCost
from passes.graph import ModelGraph, op_name

_Call = tuple[list[Any], dict[str, Any]]
_FACTOR = re.compile(r"\w+")
_UNCHECKED: set[str] = set()
_RANKS = 2
_TOLERANCE = 1e-4
_BACKWARD_FLOPS = 2.0
"""Of a backward, in those of its forward: the gradients of two operands."""


def register_rule(op: str, notation: str, *, whole: str = "", check: Sequence[Any] | None = None) -> None:
    """Say how an op may be split: ``register_rule("my_lib::op", "b s d, e d -> b s e")``.

    notation: factors of each dim of each tensor operand and result, as in einsum; "..." stands for leading dims,
    "(q c)" for a dim made of two. A factor of the operands alone is summed over, by the op: split, its results add up.
    Say so only of what is a plain sum. A factor of the results alone is not split. whole: others that may not be.
    Gradients follow from the map. check: arguments of one call; shards of it are run and compared with the whole,
    forward and (but under torch.no_grad) backward; notes say which rules were not checked.
    Errors: ConfigError for an op that is not there or a notation that does not fit it, RuleError where a check fails.
    """
    name = _overload(op)
    if name in OPS:
        raise ConfigError(f"{op} has a rule already; `autopar coverage` lists them")
    if not isinstance(notation, str) or notation.count("->") != 1:
        raise ConfigError(f"a rule reads 'operands -> results', as \"b s d, e d -> b s e\", not {notation!r}")

    given, made = (set(_FACTOR.findall(side)) for side in notation.split("->"))
    if unknown := set(_FACTOR.findall(whole)) - given - made:
        raise ConfigError(f"whole={whole!r} names {min(unknown)!r}, which the rule {notation!r} of {op} does not have")
    unsplit = " ".join(sorted({*_FACTOR.findall(whole), *(made - given)}))

    def factors(call: OpCall) -> FactorMap:
        try:
            return parse_map(notation, call.inputs, call.outputs, whole=unsplit)
        except (AssertionError, ValueError) as error:
            shapes = ", ".join(str(list(m.shape)) for m in (*call.inputs, *call.outputs))
            raise ConfigError(f"the rule {notation!r} of {op} does not fit a call on {shapes}; correct it") from error

    def price(call: OpCall) -> OpCost:
        return _price(call, factors(call))

    def backward(call: OpCall) -> tuple[OpCost, ...]:
        cost = price(call)
        return (OpCost("other", _BACKWARD_FLOPS * cost.flops, _BACKWARD_FLOPS * cost.nbytes, cost.dtype),)

    def saves(call: OpCall) -> tuple[str, ...]:
        return tuple(f"in{i}" for i in range(len(call.inputs))) if call.outputs[0].is_floating else ()

    if check is not None:
        prove(op, factors, check)
    register(Op(name, factors, price, backward, saves))
    (_UNCHECKED.add if check is None else _UNCHECKED.discard)(name)


def unchecked_notes(model: ModelGraph) -> tuple[str, ...]:
    """Which rules of the user's own a program relies on that nothing has proved."""
    names = sorted({op_name(node) for node in model.nodes()} & _UNCHECKED)
    return tuple(
        f"{name} is split as autopar.register_rule said, which was not checked: pass check=(its arguments in one call)"
        for name in names
    )


def _overload(op: str) -> str:
    """ "my_lib::op" as graphs name it; ConfigError where there is none."""
    if not isinstance(op, str):
        raise ConfigError(f'an op is given by its name, as "my_lib::op", not {op!r}')
    namespace, _, rest = op.partition("::")
    name, _, overload = rest.partition(".")
    try:
        return str(getattr(getattr(getattr(torch.ops, namespace), name), overload or "default"))
    except (AttributeError, RuntimeError) as error:
        raise ConfigError(
            f'there is no op {op!r}; write it as "my_lib::op", and import the module that defines it before'
        ) from error


def _price(call: OpCall, rule: FactorMap) -> OpCost:
    """Two operations for each combination of the factors where some are summed, else one; every tensor moved once."""
    summed = {f for dims in rule.inputs for names in dims for f in names} - {
        f for dims in rule.outputs for names in dims for f in names
    }
    flops = float(math.prod(rule.sizes.values())) * (2.0 if summed else 1.0)
    return OpCost("other", flops, float(bytes_moved(call)), call.inputs[0].dtype if call.inputs else "float32")


def prove(op: str, factors: Any, arguments: Sequence[Any]) -> None:
    """Run shards of a call along each factor, and compare with the whole. Errors: RuleError, ConfigError."""
    namespace, _, rest = op.partition("::")
    function = getattr(getattr(torch.ops, namespace), rest.partition(".")[0])
    target = getattr(function, rest.partition(".")[2] or "default")
    call = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), _call(target, arguments))
    outputs, seeds, gradients = _run(function, call, None, functools.partial(_unfit, op))
    made = outputs[0] if len(outputs) == 1 else outputs
    rule = factors(AtenCall(target, call[0], call[1], made).op_call())
    splits = [s for f in rule.sizes for s in (split_factor(rule, f, 1, _RANKS),) if s is not None]
    if not splits:
        raise ConfigError(f"no factor of {op}'s rule can be split in {_RANKS} on these arguments; pass even sizes")
    for strategy in splits:
        failed = functools.partial(_undivided, op, strategy.factor)
        local = [(_local(call, strategy, r), _parts(seeds, strategy, r)) for r in range(_RANKS)]
        parts = [_run(function, *given, failed) for given in local]
        results = [_joined([p[0][i] for p in parts], place) for i, place in enumerate(strategy.outputs)]
        _compare(op, strategy.factor, "result", results, outputs)
        back = [_summed([p[2][i] for p in parts], place) for i, place in enumerate(strategy.inputs)]
        _compare(op, strategy.factor, "gradient", back, gradients)


def _call(target: Any, arguments: Sequence[Any]) -> _Call:
    """Those by name in the order of the schema, as the op table has a call's tensors."""
    given = list(arguments)
    named = given.pop() if given and isinstance(given[-1], Mapping) else {}
    order = [argument.name for argument in target._schema.arguments]
    return given, dict(sorted(named.items(), key=lambda item: order.index(item[0]) if item[0] in order else -1))


def _unfit(op: str, said: str) -> AutoparError:
    return ConfigError(f"{op} does not run on the arguments of check ({said}); pass those of a call that works")


def _undivided(op: str, factor: str, said: str) -> AutoparError:
    return RuleError(
        op,
        f"split along {factor!r}, it does not run ({said}); correct the notation, or name the factor in whole=",
    )


def _run(
    function: Any, call: _Call, seeds: Sequence[Tensor] | None, failed: Callable[[str], AutoparError]
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Results, the gradients they were given (drawn where there are none), and those of all tensor operands.

    failed: the error where the op does not run, by what it said.
    """
    call = pytree.tree_map_only(Tensor, lambda t: t.clone().requires_grad_(t.is_floating_point()), call)
    args, kwargs = call
    try:
        made = function(*args, **kwargs)
    except Exception as error:
        raise failed(_said(error)) from error
    outputs = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
    seeds = [torch.randn_like(o) if o.is_floating_point() else o for o in outputs] if seeds is None else list(seeds)
    tensors = tensors_in(call)
    return (
        [o.detach() for o in outputs],
        list(seeds),
        _gradients(str(function).replace(".", "::", 1), tensors, outputs, seeds),
    )


def _gradients(
    op: str, tensors: Sequence[Tensor], outputs: Sequence[Tensor], seeds: Sequence[Tensor]
) -> list[Tensor | None]:
    """Of each operand, where results have any."""
    pairs = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad and o.shape == s.shape]
    wanted = [t for t in tensors if t.requires_grad] if pairs else []
    if not wanted:
        return [None] * len(tensors)
    try:
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [s for _, s in pairs], allow_unused=True)
    except Exception as error:
        raise RuleError(
            op,
            f"its backward fails on the arguments of check ({_said(error)}); mend it "
            "(torch.library.register_autograd) or, where no gradient passes through the op, register the rule under "
            "torch.no_grad()",
        ) from error
    known = {id(t): g for t, g in zip(wanted, found, strict=True)}
    return [known.get(id(t)) for t in tensors]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _local(call: _Call, strategy: Strategy, rank: int) -> _Call:
    places = iter(strategy.inputs)
    local: _Call = pytree.tree_map_only(Tensor, lambda t: _part(t, next(places), rank), call)
    return local


def _parts(seeds: Sequence[Tensor], strategy: Strategy, rank: int) -> list[Tensor]:
    return [_part(s, place, rank) for s, place in zip(seeds, strategy.outputs, strict=True)]


def _part(value: Tensor, place: Placement, rank: int) -> Tensor:
    return shard_of(value, rank, _RANKS, place.dim, place.outer) if isinstance(place, Shard) else value


def _joined(parts: list[Tensor], place: Placement) -> Tensor:
    if isinstance(place, Shard):
        return join_shards(parts, place.dim, place.outer)
    return torch.stack(parts).sum(0) if isinstance(place, Partial) else parts[0]


def _summed(parts: list[Tensor | None], place: Placement) -> Tensor | None:
    """Gradients of shards lie as these do; those of an operand that all ranks hold add up."""
    known = [p for p in parts if p is not None]
    if not known:
        return None
    return join_shards(known, place.dim, place.outer) if isinstance(place, Shard) else torch.stack(known).sum(0)


def _compare(op: str, factor: str, what: str, found: Sequence[Tensor | None], whole: Sequence[Tensor | None]) -> None:
    for number, (a, b) in enumerate(zip(found, whole, strict=True)):
        if a is not None and b is not None and not _are_close(a, b):
            raise RuleError(
                op,
                f"split along {factor!r}, {what} {number} is not that of the whole; correct the notation, or name the "
                "factor in whole=",
            )


def _are_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
