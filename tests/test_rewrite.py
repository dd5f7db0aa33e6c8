"""Rewriting: text before and after ``shard``, and every change of placement run on simulated ranks."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stage_text import built, graph_text, whole_stage
from thread_ranks import ThreadComm, Wires
from torch import Tensor, fx, nn

from autopar.runtime.comm import join_shards, shard_of
from cost_model.axes import Axes
from cost_model.errors import VerificationError
from cost_model.placement import (
    REPLICATE,
    Partial,
    Placement,
    Shard,
    Varying,
    local_shape,
    parse_placement,
    placements_text,
)
from cost_model.redistribution import can_convert, conversion_steps, step_collectives
from cost_model.tensor import TensorMeta
from passes import vocabulary
from passes.redistribute import redistribute
from passes.rewriter import GraphBuilder
from passes.shard import shard


class Block(nn.Module):
    """A norm and an MLP around which the input is added: half a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.down(F.gelu(self.up(self.norm(x))))).pow(2).mean()


BEFORE = """
p_model_norm_weight [8]
p_model_norm_bias [8]
p_model_up_weight [16, 8]
p_model_up_bias [16]
p_model_down_weight [8, 16]
p_model_down_bias [8]
x [4, 6, 8]
layer_norm [4, 6, 8] = layer_norm(x, [8], p_model_norm_weight, p_model_norm_bias, 1e-05, False)
linear [4, 6, 16] = linear(layer_norm, p_model_up_weight, p_model_up_bias)
gelu [4, 6, 16] = gelu(linear)
linear_1 [4, 6, 8] = linear(gelu, p_model_down_weight, p_model_down_bias)
add [4, 6, 8] = add.Tensor(x, linear_1)
pow_1 [4, 6, 8] = pow.Tensor_Scalar(add, 2)
sum_default [] = sum(pow_1)
mul_tensor [] = mul.Tensor(sum_default, 0.005208333333333333)
"""
COLUMN_THEN_ROW = {
    "input:p_model_up_weight": "S(0)",
    "input:p_model_up_bias": "S(0)",
    "input:p_model_down_weight": "S(1)",
    "op:linear": "V S(0) S(0) -> S(2)",
    "op:gelu": "S(2) -> S(2)",
    "op:linear_1": "S(2) S(1) P -> P",
}
AFTER_COLUMN_THEN_ROW = """
p_model_norm_weight [8]
p_model_norm_bias [8]
p_model_up_weight [8, 8]
p_model_up_bias [8]
p_model_down_weight [8, 8]
p_model_down_bias [8]
x [4, 6, 8]
layer_norm_default [4, 6, 8] = layer_norm(x, [8], p_model_norm_weight, p_model_norm_bias, 1e-05, False)
copy [4, 6, 8] = copy(layer_norm_default, tp)
linear_default [4, 6, 8] = linear(copy, p_model_up_weight, p_model_up_bias)
gelu_default [4, 6, 8] = gelu(linear_default)
portion [8] = portion(p_model_down_bias, 2)
linear_default_1 [4, 6, 8] = linear(gelu_default, p_model_down_weight, portion)
reduce [4, 6, 8] = reduce(linear_default_1, tp)
add_tensor [4, 6, 8] = add.Tensor(x, reduce)
pow_tensor_scalar [4, 6, 8] = pow.Tensor_Scalar(add_tensor, 2)
sum_default [] = sum(pow_tensor_scalar)
mul_tensor [] = mul.Tensor(sum_default, 0.005208333333333333)
"""
SEQUENCE = {
    **COLUMN_THEN_ROW,
    "input:p_model_norm_weight": "V",
    "input:p_model_norm_bias": "V",
    "op:layer_norm": "S(1) V V -> S(1)",
    "op:add": "S(1) S(1) -> S(1)",
    "op:pow_1": "S(1) -> S(1)",
    "op:sum_default": "S(1) -> P",
    "op:mul_tensor": "P -> P",
}
AFTER_SEQUENCE = """
p_model_norm_weight [8]
p_model_norm_bias [8]
p_model_up_weight [8, 8]
p_model_up_bias [8]
p_model_down_weight [8, 8]
p_model_down_bias [8]
x [4, 6, 8]
take_shard_default [4, 3, 8] = take_shard(x, tp, 2, 1, 1)
layer_norm_default [4, 3, 8] = layer_norm(take_shard_default, [8], p_model_norm_weight, p_model_norm_bias, 1e-05, False)
gather [4, 6, 8] = gather(layer_norm_default, tp, 2, 1, 1, True)
linear_default [4, 6, 8] = linear(gather, p_model_up_weight, p_model_up_bias)
gelu_default [4, 6, 8] = gelu(linear_default)
portion [8] = portion(p_model_down_bias, 2)
linear_default_1 [4, 6, 8] = linear(gelu_default, p_model_down_weight, portion)
scatter_sum [4, 3, 8] = scatter_sum(linear_default_1, tp, 2, 1, 1)
add_tensor [4, 3, 8] = add.Tensor(take_shard_default, scatter_sum)
pow_tensor_scalar [4, 3, 8] = pow.Tensor_Scalar(add_tensor, 2)
sum_default [] = sum(pow_tensor_scalar)
mul_tensor [] = mul.Tensor(sum_default, 0.005208333333333333)
reduce [] = reduce(mul_tensor, tp)
"""


@pytest.fixture(scope="module")
def stage() -> Any:
    return whole_stage(Block(), {"x": torch.empty(4, 6, 8)})


@pytest.mark.parametrize(
    ("choices", "after"),
    [(COLUMN_THEN_ROW, AFTER_COLUMN_THEN_ROW), (SEQUENCE, AFTER_SEQUENCE)],
    ids=["column then row", "sequence"],
)
def test_shard(stage: Any, choices: dict[str, str], after: str) -> None:
    assert graph_text(stage) == BEFORE.strip()
    assert graph_text(shard(stage, choices, Axes.flat(2), last=True).graph) == after.strip()


def test_nothing_chosen_changes_nothing(stage: Any) -> None:
    sharded = shard(stage, {}, Axes.flat(2), last=True)
    before, after = stage.nodes(), sharded.graph.nodes()
    assert [(n.target, len(n.all_input_nodes)) for n in after] == [(n.target, len(n.all_input_nodes)) for n in before]
    assert {placements_text(p) for p in sharded.placements.values()} == {"R"} and sharded.exit == (REPLICATE,)


def _kinds(block: Any) -> list[tuple[str, int]]:
    return [(c.kind, c.nbytes) for c in block.collectives()]


def test_column_then_row_costs_one_all_reduce_each_way(stage: Any) -> None:
    code = built(stage, COLUMN_THEN_ROW, 2)
    activation = 4 * 6 * 8 * 4
    assert _kinds(code.forward) == [("all_reduce", activation)]
    assert _kinds(code.backward) == [("all_reduce", activation)]


def test_sequence_shards_cost_a_gather_and_a_scatter_each_way(stage: Any) -> None:
    code = built(stage, SEQUENCE, 2)
    activation = 4 * 6 * 8 * 4
    assert _kinds(code.forward) == [("all_gather", activation), ("reduce_scatter", activation), ("all_reduce", 4)]
    assert _kinds(code.backward) == [("all_gather", activation), ("reduce_scatter", activation)]


def test_a_strategy_for_another_op_is_found(stage: Any) -> None:
    with pytest.raises(VerificationError, match="operands"):
        shard(stage, {"op:linear": "S(2) -> S(2)"}, Axes.flat(2), last=True)


def test_a_rule_that_promises_another_shape_is_found(stage: Any) -> None:
    with pytest.raises(VerificationError, match="rule says"):
        built(stage, {"op:gelu": "S(2) -> S(1)"}, 2)


# --- every change of placement, by execution

SHAPE = (6, 12, 6)
PLACEMENTS = ("R", "V", "P", "S(0)", "S(1)", "S(2)", "S(1,2)")
PAIRS = [(a, b) for a, b in itertools.product(PLACEMENTS, PLACEMENTS) if a != b]
POSSIBLE = [(a, b) for a, b in PAIRS if can_convert(parse_placement(a), parse_placement(b))]


def _addends(whole: Tensor, size: int) -> list[Tensor]:
    parts = [torch.randn_like(whole) for _ in range(size - 1)]
    return [*parts, whole - sum(parts)]


def _values(whole: Tensor, place: Placement, size: int) -> list[Tensor]:
    """What each rank holds of a value."""
    if isinstance(place, Shard):
        return [shard_of(whole, rank, size, place.dim, place.outer).clone() for rank in range(size)]
    return _addends(whole, size) if isinstance(place, Partial) else [whole.clone() for _ in range(size)]


def _gradients(whole: Tensor, place: Placement, size: int) -> list[Tensor]:
    """What each rank holds of the gradient of a value that lies so."""
    if isinstance(place, Shard):
        return _values(whole, place, size)
    return _addends(whole, size) if isinstance(place, Varying) else [whole.clone() for _ in range(size)]


def _check(held: list[Tensor], whole: Tensor, place: Placement, summed: type) -> None:
    """``held`` is ``whole`` lying so; ``summed``: the placement whose parts add up."""
    if isinstance(place, Shard):
        torch.testing.assert_close(join_shards(held, place.dim, place.outer), whole)
    elif isinstance(place, summed):
        torch.testing.assert_close(sum(held), whole)
    else:
        for part in held:
            torch.testing.assert_close(part, whole)


class _Simulated:
    """Our opaque ops, run over threads that each are one rank."""

    def __init__(self, size: int, patch: pytest.MonkeyPatch) -> None:
        self.size, self.wires, self.calls = size, Wires(), [list[str]() for _ in range(size)]
        self.local = threading.local()
        for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "take_shard"):
            patch.setattr(vocabulary, name, self._method(name))

    def _method(self, name: str) -> Any:
        def call(*args: Any) -> Tensor:
            rank: int = self.local.rank
            self.calls[rank].append("slice" if name == "take_shard" else name)
            found: Tensor = getattr(ThreadComm(self.wires, rank, {"tp": range(self.size)}), name)(*args)
            return found

        return call

    def run(self, graph: fx.Graph, values: list[Tensor], gradients: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Output and input gradient of every rank."""

        def one(rank: int) -> tuple[Tensor, Tensor]:
            self.local.rank = rank
            given = values[rank].requires_grad_()
            out = fx.Interpreter(fx.GraphModule(nn.Module(), graph)).run(given)
            self.calls[rank].append("|")
            (gradient,) = torch.autograd.grad(out, given, gradients[rank])
            return out.detach(), gradient

        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(one, range(self.size)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("source", "target"), POSSIBLE)
def test_conversion(source: str, target: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient lie as the placements say, and the collectives are those that are priced."""
    torch.manual_seed(0)
    before, after = parse_placement(source), parse_placement(target)
    value, gradient = torch.randn(2, *SHAPE, dtype=torch.float64)
    built_graph = GraphBuilder()
    given = built_graph.placeholder("x", TensorMeta(local_shape(SHAPE, before, size), "float64"))
    whole = TensorMeta(SHAPE, "float64")
    made = redistribute(built_graph, given, whole, ((before,), (after,)), Axes.flat(size), given)
    built_graph.graph.output(made)
    ranks = _Simulated(size, monkeypatch)
    results = ranks.run(built_graph.graph, _values(value, before, size), _gradients(gradient, after, size))
    _check([out for out, _ in results], value, after, Partial)
    _check([back for _, back in results], gradient, before, Varying)
    assert built_graph.tensor(made).shape == tuple(results[0][0].shape)
    assert all(calls == _priced(before, after) for calls in ranks.calls)


def _priced(before: Placement, after: Placement) -> list[str]:
    """Collectives and slices forward, "|", then backward; a division is priced as a slice but calls nothing."""
    steps = conversion_steps(before, after)
    forward, backward = [], []
    for a, b in steps:
        step = step_collectives(a, b)
        assert step is not None
        if not (isinstance(b, Partial) and step.forward == "slice"):
            forward.append(step.forward)
        if not (isinstance(b, Partial) and step.backward == "slice"):
            backward.append(step.backward)
    return [kind for kind in [*forward, "|", *reversed(backward)] if kind]


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair not in POSSIBLE])
def test_impossible_conversions_are_refused(source: str, target: str) -> None:
    assert source == "V" and target != "P"
    with pytest.raises(ValueError, match="no conversion"):
        conversion_steps(parse_placement(source), parse_placement(target))
