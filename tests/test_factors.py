"""Factor maps: the notation, strided shards, views as splits and merges, and what is not offered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_model.factors import FactorMap, Strategy, factor_of, parse_map, split_factor, unsplit_strategies
from cost_model.ops import OPS, OpCall, Ref
from cost_model.placement import PARTIAL, REPLICATE, VARYING, Shard, local_shape
from cost_model.strategies import follow
from cost_model.tensor import TensorMeta


def floats(*shape: int) -> TensorMeta:
    return TensorMeta(shape, "float32")


def rule_of(op: str, inputs: list[TensorMeta], outputs: list[TensorMeta], **args: object) -> FactorMap:
    rule = OPS[op].factors(OpCall(op, tuple(inputs), tuple(outputs), args))
    assert rule is not None
    return rule


LINEAR = rule_of("aten.linear.default", [floats(2, 8, 4), floats(6, 4), floats(6)], [floats(2, 8, 6)])


def test_notation_binds_to_shapes() -> None:
    assert LINEAR.inputs == ((("_2",), ("_1",), ("k",)), (("n",), ("k",)), (("n",),))
    assert LINEAR.outputs == ((("_2",), ("_1",), ("n",)),)
    assert LINEAR.sizes == {"_2": 2, "_1": 8, "k": 4, "n": 6}


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        ("n", Strategy((VARYING, Shard(0), Shard(0)), (Shard(2),), "n")),
        ("k", Strategy((Shard(2), Shard(1), PARTIAL), (PARTIAL,), "k")),
        ("_1", Strategy((Shard(1), VARYING, VARYING), (Shard(1),), "_1")),
    ],
)
def test_strategies_of_linear(factor: str, expected: Strategy) -> None:
    assert split_factor(LINEAR, factor, 1, 2) == expected


def test_indivisible_is_not_offered() -> None:
    assert split_factor(LINEAR, "n", 1, 4) is None
    assert split_factor(LINEAR, "n", 3, 2) is not None
    assert split_factor(LINEAR, "n", 3, 4) is None
    assert split_factor(LINEAR, "n", 4, 2) is None


def test_dims_of_size_one_carry_no_factor() -> None:
    rule = parse_map("..., ... -> ...", (floats(4, 1, 6), floats(1, 5, 6)), (floats(4, 5, 6),))
    assert rule.inputs == ((("_3",), (), ("_1",)), ((), ("_2",), ("_1",)))
    assert split_factor(rule, "_2", 1, 5) == Strategy((VARYING, Shard(1)), (Shard(1),), "_2")


def test_products_infer_their_unknown_factor() -> None:
    rule = parse_map("(q c) -> c, c", (floats(12),), (floats(6), floats(6)), whole="q", sizes={"q": 2})
    assert rule.sizes == {"q": 2, "c": 6} and rule.inputs == ((("q", "c"),),)
    one_chunk = parse_map("(q c) -> c", (floats(12),), (floats(12),), whole="q", sizes={"q": 1})
    assert one_chunk.inputs == ((("c",),),) and one_chunk.whole == frozenset()


@pytest.mark.parametrize(
    ("notation", "shapes"),
    [("a b -> a", ((2, 3), (4,))), ("a -> a b", ((2,), (2,))), ("(a b) -> a", ((5,), (2,)))],
)
def test_notation_that_does_not_fit_is_an_error(notation: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(AssertionError):
        parse_map(notation, (floats(*shapes[0]),), (floats(*shapes[1]),))


def test_whole_inside_and_sum() -> None:
    logits, labels = floats(8, 12), TensorMeta((8,), "int64")
    args = {"ignore_index": -100, "label_smoothing": 0.0}
    rule = rule_of("autopar.cross_entropy_sum.default", [logits, labels], [floats()], **args)
    assert split_factor(rule, "v", 1, 4) == Strategy((Shard(1), REPLICATE), (REPLICATE,), "v", inside=True)
    assert split_factor(rule, "n", 2, 4) == Strategy((Shard(0, 2), Shard(0, 2)), (PARTIAL,), "n")
    smoothed = rule_of("autopar.cross_entropy_sum.default", [logits, labels], [floats()], label_smoothing=0.1)
    assert split_factor(smoothed, "v", 1, 4) is None


def test_vocabulary_parallel_lookup_is_partial() -> None:
    ids = TensorMeta((2, 3), "int64")
    operands, out = [floats(8, 4), ids], [floats(2, 3, 4)]
    rule = rule_of("aten.embedding.default", operands, out, padding_idx=-1)
    assert split_factor(rule, "v", 1, 2) == Strategy((Shard(0), VARYING), (PARTIAL,), "v")
    assert split_factor(rule_of("aten.embedding.default", operands, out, padding_idx=0), "v", 1, 2) is None


def reshape(source: tuple[int, ...], target: tuple[int, ...]) -> FactorMap:
    return rule_of("aten.reshape.default", [floats(*source)], [floats(*target)])


def test_a_merge_carries_a_shard_of_its_inner_factor_as_a_strided_shard() -> None:
    rule = reshape((4, 6, 5), (24, 5))
    assert rule.outputs == ((("f0", "f1"), ("f2",)),)
    strategy = follow(rule, "in", 0, Shard(1), 3)
    assert strategy is not None and strategy.outputs == (Shard(0, 4),)


def test_a_split_takes_a_strided_shard_back() -> None:
    strategy = follow(reshape((24, 5), (4, 6, 5)), "in", 0, Shard(0, 4), 3)
    assert strategy is not None and strategy.outputs == (Shard(1),)


def test_a_shard_across_factors_fits_none() -> None:
    assert follow(reshape((6, 5), (3, 2, 5)), "in", 0, Shard(0), 2) is None
    assert follow(reshape((6, 5), (3, 2, 5)), "in", 0, Shard(0, 2), 3) is None


def test_shapes_without_common_factors_are_whole() -> None:
    rule = reshape((2, 9, 5), (9, 2, 5))
    assert rule.whole == {f for dims in (*rule.inputs, *rule.outputs) for names in dims[:2] for f in names}
    assert [split_factor(rule, f, 1, rule.sizes[f]) for f in rule.whole] == [None] * len(rule.whole)
    assert follow(rule, "in", 0, Shard(2), 5) is not None


def test_fused_qkv_goes_through_projection_split_and_heads() -> None:
    """[b, t, c] x [3c, c] -> three of [b, t, h, d]: heads over 2 ranks are Shard(0, outer=3) of the fused weight."""
    b, t, h, d = 2, 5, 4, 3
    c = h * d
    hidden, fused = floats(b, t, c), floats(b, t, 3 * c)
    linear = rule_of("aten.linear.default", [hidden, floats(3 * c, c)], [fused])
    projected = follow(linear, "in", 1, Shard(0, 3), 2)
    assert projected is not None and projected.outputs == (Shard(2, 3),)
    split = rule_of("aten.split.Tensor", [fused], [hidden] * 3, dim=-1)
    parted = follow(split, "in", 0, Shard(2, 3), 2)
    assert parted is not None and parted.outputs == (Shard(2),) * 3
    heads = follow(reshape((b, t, c), (b, t, h, d)), "in", 0, Shard(2), 2)
    assert heads is not None and heads.outputs == (Shard(2),)
    at_once = follow(reshape((b, t, 3 * c), (b, t, 3, h, d)), "in", 0, Shard(2, 3), 2)
    assert at_once is not None and at_once.outputs == (Shard(3),)


def test_grouped_queries_follow_their_keys() -> None:
    q, kv = floats(2, 8, 5, 4), floats(2, 2, 5, 4)
    rule = rule_of("aten.scaled_dot_product_attention.default", [q, kv, kv], [q], dropout_p=0.0)
    assert follow(rule, "in", 1, Shard(1), 2) == Strategy((Shard(1),) * 3, (Shard(1),), "g")
    assert follow(rule, "in", 0, Shard(1, 2), 4) == Strategy((Shard(1, 2), VARYING, VARYING), (Shard(1, 2),), "r")
    assert follow(rule, "in", 0, Shard(2), 5) == Strategy((Shard(2), VARYING, VARYING), (Shard(2),), "t")
    assert follow(rule, "in", 1, Shard(2), 5) is None and follow(rule, "in", 0, Shard(3), 2) is None


def test_unequal_parts_and_partial_slices_are_whole() -> None:
    split = rule_of("aten.split_with_sizes.default", [floats(4, 6)], [floats(4, 4), floats(4, 2)], dim=1)
    assert follow(split, "in", 0, Shard(1), 2) is None and follow(split, "in", 0, Shard(0), 2) is not None
    assert follow(rule_of("aten.slice.Tensor", [floats(4, 6)], [floats(4, 4)], dim=1), "in", 0, Shard(1), 2) is None
    assert follow(rule_of("aten.slice.Tensor", [floats(4, 6)], [floats(4, 6)], dim=1), "in", 0, Shard(1), 2)


@pytest.mark.parametrize(
    ("op", "operands", "linear"),
    [
        ("aten.add.Tensor", 2, ((0, 1),)),
        ("aten.add.Tensor", 1, ()),
        ("aten.add.Scalar", 1, ()),
        ("aten.mul.Tensor", 2, ((0,), (1,))),
        ("aten.mul.Tensor", 1, ((0,),)),
        ("aten.div.Tensor", 2, ((0,),)),
        ("aten.tanh.default", 1, ()),
    ],
)
def test_what_is_linear(op: str, operands: int, linear: tuple[tuple[int, ...], ...]) -> None:
    x = floats(4)
    rule = rule_of(op, [x] * operands, [x])
    strategies = unsplit_strategies(rule, operands, 1)
    assert [s.inputs for s in strategies[2:]] == [
        tuple(PARTIAL if i in group else VARYING for i in range(operands)) for group in linear
    ]
    assert all(s.outputs == (PARTIAL,) for s in strategies[2:])


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("aten.tanh_backward.default", {}),
        ("aten.cross_entropy_loss.default", {}),
    ],
)
def test_ops_that_are_only_replicated(op: str, args: dict[str, object]) -> None:
    x = floats(4, 4)
    call = OpCall(op, (x, x), (x,), {"self": Ref(0), **args})
    rule = OPS[op].factors(call)
    assert rule is None
    assert [s.inputs[0] for s in unsplit_strategies(rule, 2, 1)] == [REPLICATE, VARYING]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_factor_of_inverts_split_factor(shape: list[int], data: st.DataObject) -> None:
    """The shard that a strategy places on a merged tensor leads back to the strategy."""
    total = floats(*shape).numel
    head = data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    rule = reshape(tuple(shape), (head, total // head))
    for factor, extent in rule.sizes.items():
        strategy = split_factor(rule, factor, 1, extent)
        if strategy is None:
            continue
        for side, places in (("in", strategy.inputs), ("out", strategy.outputs)):
            assert isinstance(places[0], Shard)
            assert factor_of(rule, side, 0, places[0]) == (factor, 1)
        assert local_shape(tuple(shape), strategy.inputs[0], extent).count(0) == 0
