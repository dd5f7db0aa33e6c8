"""Prices: every entry answers, nothing that runs is free, matmul flops agree with torch's own count."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from effort import drawn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cost_model.ops import BETWEEN_REPLICAS, OPS, OpCall, price_of
from cost_model.ops.table import KINDS, backward_only, bytes_moved
from cost_model.program import OpCost
from cost_model.tensor import DTYPE_BYTES, TensorMeta

sys.path.append(str(Path(__file__).parent))
from backward_calls import BACKWARD
from op_calls import Case, describe, function_of, named_arguments
from op_draws import CALLS, drawn_arguments

Tensor = torch.Tensor
PRICED_ONLY = sorted(name for name, op in OPS.items() if op.factors is backward_only)
X, Y, IDS = torch.rand(4, 6), torch.rand(4, 6), torch.tensor([[0, 2, 1], [3, 1, 0]])
ON_META = X.to("meta")  # for kernels that no CPU has
LABELS, STATISTICS = torch.tensor([0, 5, 2, 1]), torch.rand(4, 1)
HEADS, LSE = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 5)


def assert_cost(cost: OpCost) -> None:
    assert cost.kind in KINDS and cost.dtype in DTYPE_BYTES
    assert cost.nbytes > 0 and cost.flops >= 0 and math.isfinite(cost.nbytes + cost.flops)
    assert cost.kind != "matmul" or cost.gemm is None or cost.flops == 2 * math.prod(cost.gemm)


# --- Entries that are planned ---------------------------------------------------------------------------------------


def _aliases(case: Case) -> bool:
    storages = {t.untyped_storage().data_ptr() for t in case.tensors}
    return all(o.untyped_storage().data_ptr() in storages for o in case.outputs)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_planned_entries_answer_and_only_views_are_free(name: str) -> None:
    @settings(
        max_examples=drawn(6),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        case = Case(name, *drawn_arguments(name, data))
        if any(0 in meta.shape for meta in case.call.outputs):
            return
        entry, cost = OPS[name], price_of(case.call)
        if cost is None and name in BETWEEN_REPLICAS:
            assert all(nbytes > 0 for _, nbytes in BETWEEN_REPLICAS[name](case.call, 2))
        elif cost is None:
            assert _aliases(case)
        else:
            assert_cost(cost)
        for planned in entry.backward_price(case.call):
            assert_cost(planned)
        tensors = {f"in{i}" for i in range(len(case.tensors))} | {f"out{i}" for i in range(len(case.outputs))}
        assert set(entry.saves(case.call)) <= tensors
        if not case.call.outputs[0].has_gradient:
            assert entry.saves(case.call) == () and entry.backward_price(case.call) == ()

    holds()


# --- Entries met in traced backward graphs and optimizers -----------------------------------------------------------

HAND_MADE: dict[str, tuple[Any, ...]] = {
    "_fused_rms_norm_backward.default": (ON_META, ON_META, [6], STATISTICS.to("meta"), ON_META[0], [True, True]),
    "_log_softmax_backward_data.default": (X, X, 1, torch.float32),
    "_scaled_dot_product_flash_attention_for_cpu.default": (HEADS, HEADS, HEADS),
    "_scaled_dot_product_flash_attention_for_cpu_backward.default": (*[HEADS] * 5, LSE, 0.0, False),
    "_softmax_backward_data.default": (X, X, 1, torch.float32),
    "addmm_.default": (X, X, torch.rand(6, 6)),
    "clamp_.default": (X, 0.1, 0.9),
    "as_strided.default": (X, [2, 2], [2, 1]),
    "as_strided_copy.default": (X, [2, 2], [2, 1]),
    "baddbmm.default": (torch.rand(2, 3, 3), torch.rand(2, 3, 4), torch.rand(2, 4, 3)),
    "baddbmm_.default": (torch.rand(2, 3, 3), torch.rand(2, 3, 4), torch.rand(2, 4, 3)),
    "cross_entropy_loss.default": (X, LABELS),
    "bitwise_and_.Tensor": (IDS, IDS),
    "flip.default": (X, [1]),
    "embedding_dense_backward.default": (torch.rand(2, 3, 6), IDS, 4, -1, False),
    "empty.memory_format": ([4, 6],),
    "new_empty.default": (X, [4, 6]),
    "_conj.default": (torch.complex(X, X),),
    "diagonal_scatter.default": (X, X[:, 0]),
    "view_as_complex.default": (torch.rand(4, 2),),
    "gather.default": (X, 1, torch.zeros(4, 1, dtype=torch.int64)),
    "index_add.default": (X, 0, LABELS[:2] % 4, Y[:2]),
    "index_add_.default": (X, 0, LABELS[:2] % 4, Y[:2]),
    "index_put.default": (X, [LABELS % 4], Y),
    "index_put_.default": (X, [LABELS % 4], Y),
    "index_select.default": (X, 0, LABELS % 4),
    "masked_fill_.Scalar": (X, X > 0.5, 1.0),
    "masked_fill_.Tensor": (X, X > 0.5, torch.tensor(1.0)),
    "native_layer_norm_backward.default": (
        X, X, [6], STATISTICS, STATISTICS, torch.rand(6), torch.rand(6), [True, True, True],
    ),
    "nll_loss_backward.default": (torch.tensor(1.0), X, LABELS, None, 2, -100, torch.tensor(4.0)),
    "nll_loss_forward.default": (X, LABELS, None, 2, -100),
    **{f"scatter{end}.value": (X, 1, torch.zeros(4, 1, dtype=torch.int64), 1.0) for end in ("", "_")},
    **{f"scatter{end}.src": (X, 1, torch.zeros(4, 1, dtype=torch.int64), Y) for end in ("", "_")},
    **{f"scatter_add{end}.default": (X, 1, torch.zeros(4, 1, dtype=torch.int64), Y) for end in ("", "_")},
    "select_backward.default": (X, [4, 3, 6], 1, 0),
    "select_scatter.default": (X, Y[0], 0, 1),
    "slice_backward.default": (X, [4, 9], 1, 0, 6, 1),
    "slice_scatter.default": (X, Y[:2], 0, 0, 2),
    "_local_scalar_dense.default": (torch.tensor(1.0),),
    "_foreach_pow.ScalarAndTensor": (2.0, [X]),
    **{f"_foreach_{op}{end}.Tensor": ([X, Y], torch.tensor(2.0)) for op in ("add", "mul", "div") for end in ("", "_")},
    **{f"_foreach_addcdiv{end}.Tensor": (*[[X, Y]] * 3, torch.tensor([1.0, 2.0])) for end in ("", "_")},
    **{f"_fused_{op}_.default": (*[[X, Y]] * 4, [], [torch.tensor(1.0)] * 2) for op in ("adam", "adamw")},
    "_fused_sgd_.default": (*[[X, Y]] * 3,),
}  # fmt: skip
FILLERS: dict[str, Callable[[], Any]] = {
    "Tensor": lambda: torch.rand(4, 6),
    "List[Tensor]": lambda: [torch.rand(4, 6), torch.rand(3)],
    "number": lambda: 2.0,
    "float": lambda: 0.5,
    "bool": lambda: False,
    "List[number]": lambda: [2.0, 3.0],
}


def filled_call(name: str) -> OpCall:
    """A real call with arguments by hand, or else made up from the schema."""
    function = function_of(name)
    required = [a for a in function._schema.arguments if not a.has_default_value()]
    positional = {**HAND_MADE, **BACKWARD}.get(name.removeprefix("aten."))
    if positional is None:
        positional = tuple(FILLERS[str(a.type)]() for a in required if not a.kwarg_only)
    kwargs = {a.name: FILLERS[str(a.type)]() for a in required if a.kwarg_only}
    args = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, positional)
    arguments = named_arguments(name, args, kwargs)
    return describe(name, arguments, function(*args, **kwargs))


FREE = {
    "aten._conj.default",
    "aten.as_strided.default",
    "aten.detach_.default",
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.lift_fresh.default",
    "aten.new_empty.default",
    "aten.view_as_complex.default",
    "autopar.all_reduce.default",
    "autopar.begin_all_gather.default",
    "autopar.begin_all_reduce.default",
    "autopar.begin_reduce_scatter.default",
    "autopar.complete.default",
    "autopar.forward_end.default",
}
LOCAL = {
    "x": TensorMeta((4, 6), "float32"),
    "gathered": TensorMeta((4, 12), "float32"),
    "weight": TensorMeta((6, 8), "float32"),
    "made": TensorMeta((4, 8), "float32"),
    "ids": TensorMeta((4,), "int64"),
    "index": TensorMeta((6,), "int64"),
    "key": TensorMeta((), "int64"),
    "state": TensorMeta((2,), "int64"),
    "mask": TensorMeta((4, 6), "bool"),
    "heads": TensorMeta((2, 3, 5, 4), "float32"),
    "lse": TensorMeta((2, 3, 5), "float32"),
    "each": TensorMeta((4,), "float32"),
    "likely": TensorMeta((5, 4, 3), "float32"),
    "ids2": TensorMeta((4, 2), "int64"),
    "routing": TensorMeta((4, 2), "float32"),
    "gate_up": TensorMeta((2, 16, 6), "float32"),
    "down": TensorMeta((2, 6, 8), "float32"),
}
OURS: dict[str, tuple[str, str, dict[str, object]]] = {
    "all_reduce": ("x", "x", {"op": "sum"}),
    "all_gather": ("x", "gathered", {"size": 2, "dim": 1, "outer": 1}),
    "reduce_scatter": ("gathered", "x", {"size": 2, "dim": 1, "outer": 1}),
    "begin_all_reduce": ("x", "x", {"op": "sum"}),
    "begin_all_gather": ("x", "gathered", {"size": 2, "dim": 1, "outer": 1}),
    "begin_reduce_scatter": ("gathered", "x", {"size": 2, "dim": 1, "outer": 1}),
    "complete": ("", "", {"group": "0"}),
    "take_shard": ("gathered", "x", {"size": 2, "dim": 1, "outer": 1}),
    "all_to_all": ("x", "x", {"size": 2, "split_dim": 0, "concat_dim": 1}),
    "shard_ids": ("ids", "ids", {"size": 2, "extent": 8}),
    "forward_end": ("x", "x", {}),
    "accumulate": ("x", "", {"parameter": "w"}),
    "accumulate_product": ("x weight", "", {"parameter": "w"}),
    "by_rows": ("x", "x", {}),
    "class_shares": ("x", "x each", {}),
    "class_gradients": ("x each each ids", "x", {"dtype": "torch.float32"}),
    "product": ("x weight", "made", {}),
    "put": ("gathered x", "", {"offset": 0}),
    "put_product": ("gathered x weight", "", {"offset": 0}),
    "experts_backward": ("x x ids2 routing gate_up down", "x routing gate_up down", {"activation": "silu", "total": 4}),
    "ctc_backward": ("each likely ids2 ids ids", "likely", {"blank": 0, "zero_infinity": False}),
    "random_keys": ("state", "ids", {"count": 4}),
    "keep": ("key ids index", "mask", {"p": 0.1}),
    "drop": ("x mask", "x", {"scale": 1.0}),
    "attention_backward": ("heads heads heads heads heads lse", "heads heads heads", {"is_causal": False}),
    "attention_rows": ("heads heads heads", "heads lse", {"size": 2}),
    "attention_rows_backward": ("heads heads heads heads heads lse", "heads heads heads", {"size": 2}),
}


def our_call(name: str) -> OpCall:
    inputs, outputs, args = OURS[name.split(".")[1]]
    return OpCall(name, tuple(LOCAL[i] for i in inputs.split()), tuple(LOCAL[o] for o in outputs.split()), args)


@pytest.mark.parametrize("name", PRICED_ONLY)
def test_priced_only_entries_answer(name: str) -> None:
    call = our_call(name) if name.startswith("autopar.") else filled_call(name)
    cost, entry = price_of(call), OPS[name]
    assert entry.factors(call) is None
    if cost is None:
        assert name in FREE
    else:
        assert_cost(cost)


# --- What the numbers mean ------------------------------------------------------------------------------------------


def case_of(name: str, *args: Any, **kwargs: Any) -> Case:
    return Case(name, args, kwargs)


def test_unknown_op_is_priced_by_its_bytes() -> None:
    meta = TensorMeta((4, 6), "bfloat16")
    call = OpCall("aten.no_such_op.default", (meta, meta), (meta,), {})
    cost = price_of(call)
    assert cost == OpCost("other", 0.0, 3 * 4 * 6 * 2.0, "bfloat16") and cost.nbytes == bytes_moved(call)


def test_bytes_are_those_touched() -> None:
    """Broadcast operands count their own size, lookups the rows they read, factories what they write."""
    x = torch.rand(8, 16, 32)
    cases = {
        8 * 16 * 32 * 4 * 2 + 32 * 4: case_of("aten.add.Tensor", x, torch.rand(32)),
        2 * (10 * 32 * 4) + 10 * 8: case_of("aten.embedding.default", torch.rand(1000, 32), torch.arange(10)),
        1000 * 32 * 4: case_of("aten.zeros.default", [1000, 32]),
        8 * 16 * 32 * 4 + 4: case_of("aten.sum.default", x),
    }
    assert {nbytes: price_of(case.call).nbytes for nbytes, case in cases.items()} == {n: n for n in cases}


def test_causal_attention_is_half() -> None:
    q = torch.rand(2, 3, 8, 4)
    whole, causal = (case_of("autopar.attention.default", q, q, q, None, flag).call for flag in (False, True))
    assert price_of(whole).flops == 4 * 2 * 3 * 8 * 8 * 4 == 2 * price_of(causal).flops
    assert OPS[whole.op].backward_price(whole)[0].flops == 2.5 * price_of(whole).flops


def test_of_ranks_that_share_causal_queries_the_last_is_priced() -> None:
    """It sees all keys but those above the diagonal of its own square."""
    q, k = torch.rand(2, 3, 2, 4), torch.rand(2, 3, 8, 4)
    last = case_of("autopar.attention.default", q, k, k, None, True).call
    assert price_of(last).flops == 4 * 2 * 3 * 4 * (2 * 6 + 2 * 2 / 2)


ROWS = torch.rand(2, 5, 12)


@pytest.mark.parametrize(
    "case",
    [
        case_of("aten.linear.default", ROWS, torch.rand(7, 12), torch.rand(7)),
        case_of("aten.addmm.default", torch.rand(7), ROWS[0], torch.rand(12, 7)),
        case_of("aten.mm.default", ROWS[0], torch.rand(12, 7)),
        case_of("aten.bmm.default", ROWS, torch.rand(2, 12, 7)),
        case_of("aten.matmul.default", ROWS, torch.rand(12, 7)),
        case_of("aten.matmul.default", torch.rand(3, 2, 5, 12), torch.rand(2, 12, 7)),
    ],
    ids=lambda case: case.name,
)
def test_flops_are_those_torch_counts(case: Case) -> None:
    inputs = [t.clone().requires_grad_() for t in case.tensors]
    with FlopCounterMode(display=False) as counter:
        case.run(inputs)[0].sum().backward()
    costs = [price_of(case.call), *OPS[case.name].backward_price(case.call)]
    assert sum(c.flops for c in costs if c.kind in ("matmul", "batched_matmul")) == counter.get_total_flops()


def test_a_batch_of_one_is_priced_as_what_multiplies_batches() -> None:
    """Single products may go to a faster library; what a batch goes to does not depend on its size."""
    kinds = [price_of(case_of("aten.bmm.default", torch.rand(b, 5, 12), torch.rand(b, 12, 7)).call) for b in (1, 2)]
    assert [cost.kind for cost in kinds if cost is not None] == ["batched_matmul"] * 2


def test_lookups_and_their_gradients_say_how_many_rows_they_find() -> None:
    case = case_of("aten.embedding.default", torch.rand(100, 8), torch.arange(30).view(5, 6))
    cost = price_of(case.call)
    (planned,) = OPS[case.name].backward_price(case.call)
    args = (torch.rand(5, 6, 8), torch.arange(30).view(5, 6), 100, -1, False)
    run = price_of(case_of("aten.embedding_dense_backward.default", *args).call)
    assert cost is not None and cost.rows == 30
    assert planned == run and planned.rows == 30


def test_attention_flops_are_those_torch_counts() -> None:
    case = case_of("aten.scaled_dot_product_attention.default", *[torch.rand(2, 3, 8, 4)] * 3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        case.run(case.tensors)
    assert price_of(case.call).flops == counter.get_total_flops()


# --- Planned against traced -----------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Every ATen call below autograd, as the op table sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if str(func).startswith("aten."):
            self.calls.append(describe(str(func), named_arguments(str(func), args, kwargs or {}), out))
        return out


def _block(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


B = functools.partial(_block, 8, 64, 96)
MASK = torch.randint(0, 2, (8, 64, 96)) == 1
BACKWARDS: list[tuple[Any, ...]] = [
    ("linear.default", B(), _block(48, 96), _block(48)),
    ("addmm.default", _block(48), _block(512, 96), _block(96, 48)),
    ("matmul.default", B(), _block(8, 96, 64)),
    *((f"{op}.Tensor", B(), other) for op in ("add", "sub", "mul", "div") for other in (B(), _block(96), 2.0)),
    *((f"{op}.default", B()) for op in "neg exp log sqrt rsqrt tanh gelu relu silu sigmoid erf cos sin abs".split()),
    ("pow.Tensor_Scalar", B(), 3.0),
    ("clamp.default", B(), 0.2, 0.9),
    ("maximum.default", B(), B()),
    ("where.self", MASK, B(), B()),
    ("masked_fill.Scalar", B(), MASK, 1.0),
    ("to.dtype", B(), torch.float64),
    ("expand.default", _block(1, 64, 96), [8, 64, 96]),
    ("slice.Tensor", B(), 2, 0, 32),
    ("select.int", B(), 1, 3),
    ("split.Tensor", B(), 32, 2),
    ("unbind.int", B(), 0),
    ("constant_pad_nd.default", B(), [1, 1]),
    ("mean.dim", B(), [2]),
    ("amax.default", B(), [2]),
    ("cumsum.default", B(), 1),
    ("layer_norm.default", B(), [96], _block(96), _block(96)),
    ("rms_norm.default", B(), [96], _block(96)),
    ("softmax.int", B(), -1),
    ("log_softmax.int", B(), -1),
    ("scaled_dot_product_attention.default", *[_block(2, 4, 64, 32)] * 3),
    ("group_norm.default", _block(8, 32, 16, 16), 4, _block(32), _block(32)),
    ("batch_norm.default", _block(8, 32, 16, 16), _block(32), _block(32), None, None, True, 0.1, 1e-5, False),
    ("embedding.default", _block(100, 96), torch.randint(0, 100, (8, 64))),
    ("index.Tensor", B(), [torch.randint(0, 8, (20,)), torch.randint(0, 64, (20,))]),
    ("tril.default", B()),
]


WINDOW = ([1, 1], [1, 1], [1, 1])
CONVOLUTIONS: list[tuple[Any, ...]] = [
    ("conv2d.default", _block(4, 16, 12, 12), _block(8, 16, 3, 3), _block(8), *WINDOW),
    ("conv2d.default", _block(4, 16, 12, 12), _block(16, 4, 3, 3), None, *WINDOW, 4),
    ("conv2d.default", _block(4, 16, 12, 12), _block(16, 1, 3, 3), None, *WINDOW, 16),
    ("conv1d.default", _block(4, 16, 12), _block(8, 16, 4), _block(8), [4]),
    ("conv_transpose2d.input", _block(4, 16, 12, 12), _block(16, 8, 2, 2), _block(8), [2, 2]),
]


@pytest.mark.parametrize("drawn", BACKWARDS, ids=lambda drawn: drawn[0])
def test_planned_backward_is_the_traced_one(drawn: tuple[Any, ...]) -> None:
    """Bytes of the planned backward, against those of the ops that autograd really runs."""
    case, calls = backward_of(*drawn)
    traced = sum(cost.nbytes for call in calls if (cost := price_of(call)) is not None)
    planned = sum(cost.nbytes for cost in OPS[case.name].backward_price(case.call))
    assert planned == pytest.approx(traced, rel=0.2)


@pytest.mark.parametrize("drawn", CONVOLUTIONS, ids=["plain", "grouped", "depthwise", "line", "transposed"])
def test_planned_backward_of_a_convolution_is_one_call(drawn: tuple[Any, ...]) -> None:
    """Devices that measured it have rows for both products together."""
    case, calls = backward_of(*drawn)
    assert [price_of(call) for call in calls] == list(OPS[case.name].backward_price(case.call))


def backward_of(name: str, *args: Any) -> tuple[Case, list[OpCall]]:
    """A call, and the priced ones that autograd makes for its gradients."""
    leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    case = Case(f"aten.{name}", tuple(leaves), {})
    outputs = [o for o in case.outputs if o.requires_grad]
    upstream = [torch.ones_like(o) for o in outputs]
    with Recorder() as recorder:
        torch.autograd.grad(outputs, [t for t in case.tensors if t.requires_grad], upstream)
    assert all(call.op in OPS for call in recorder.calls)
    return case, recorder.calls


class Block(torch.nn.Module):
    """A small transformer with both kinds of attention and of position lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = torch.nn.Embedding(20, 16), torch.nn.LayerNorm(16)
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.register_buffer("mask", torch.ones(8, 8).tril().bool())

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(ids)
        q, k, v = (p.view(2, 8, 4, 4).transpose(1, 2) for p in self.qkv(self.norm(x)).split(16, -1))
        fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = (q @ k.transpose(-1, -2) / 2.0).masked_fill(~self.mask, float("-inf"))
        explicit = F.dropout(scores.softmax(-1), 0.0) @ v
        x = x + self.out(F.gelu((fused + explicit).transpose(1, 2).reshape(2, 8, 16)))
        return F.cross_entropy((x @ self.tokens.weight.T).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.AdamW, foreach=False),
        functools.partial(torch.optim.AdamW, foreach=True),
        functools.partial(torch.optim.AdamW, fused=True),
        functools.partial(torch.optim.SGD, momentum=0.9),
    ],
)
def test_a_training_step_holds_no_unknown_op(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model = Block()
    update = optimizer(model.parameters(), lr=0.1)
    ids = torch.randint(0, 20, (2, 8))
    with Recorder() as recorder:
        for _ in range(2):
            model(ids, ids).backward()
            update.step()
            update.zero_grad()
    assert {call.op for call in recorder.calls} - set(OPS) == set()
    for call in recorder.calls:
        cost = price_of(call)
        if cost is not None:
            assert_cost(cost)
