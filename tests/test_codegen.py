"""Generated code: what a person reads, and that each variable lives exactly as long as it must."""

from __future__ import annotations

import ast
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import example_gpt, hf_gpt2
from parity import cpu_cluster
from random_prices import draw_prices
from stage_text import built, whole_stage
from torch import Tensor, nn

import autopar


class MLP(nn.Module):
    """Two layers, the second without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x))).pow(2).mean()


COLUMN_THEN_ROW = {
    "input:p_model_up_weight": "S(0)",
    "input:p_model_up_bias": "S(0)",
    "input:p_model_down_weight": "S(1)",
    "op:linear": "V S(0) S(0) -> S(1)",
    "op:relu": "S(1) -> S(1)",
    "op:linear_1": "S(1) S(1) -> P",
}
GOLDEN = '''
def setup(buffers, comm, kernels, device):
    """Values that never change, computed once."""
    return {}


def forward(params, buffers, constants, batch, step, received, comm, kernels, device):
    """One microbatch: (activation or loss, saved values)."""
    p_model_up_weight = params["up.weight"]
    p_model_up_bias = params["up.bias"]
    x = batch["x"]
    p_model_down_weight = params["down.weight"]
    # up
    t = op_t(p_model_up_weight)
    addmm = op_addmm(p_model_up_bias, x, t); del t
    # model
    relu = op_relu(addmm); del addmm
    # down
    t_1 = op_t(p_model_down_weight)
    mm = op_mm(relu, t_1); del t_1
    # model
    all_reduce = comm.all_reduce_(mm, 'tp', 'sum'); del mm
    pow_1 = op_pow_Tensor_Scalar(all_reduce, 2)
    sum_1 = op_sum(pow_1); del pow_1
    mul = op_mul_Tensor(sum_1, 0.03125); del sum_1
    return mul, [relu, all_reduce]


def backward(params, buffers, constants, batch, step, saved, grads, accumulate, comm, kernels, device):
    """One microbatch: gradients into their buffers."""
    p_model_down_weight = params["down.weight"]
    x = batch["x"]
    [relu, all_reduce] = saved
    saved.clear()
    full_default = op_full([], 1, dtype=torch.float32, device=device)
    mul_1 = op_mul_Tensor(full_default, 0.03125); del full_default
    expand = op_expand(mul_1, [4, 8]); del mul_1
    pow_2 = op_pow_Tensor_Scalar(all_reduce, 1.0); del all_reduce
    mul_2 = op_mul_Scalar(pow_2, 2.0); del pow_2
    mul_3 = op_mul_Tensor(expand, mul_2); del expand, mul_2
    t_2 = op_t(mul_3)
    accumulate.product(grads["down.weight"], t_2, relu); del t_2
    # down
    t_1 = op_t(p_model_down_weight)
    t_4 = op_t(t_1); del t_1
    mm_2 = op_mm(mul_3, t_4); del mul_3, t_4
    threshold_backward = op_threshold_backward(mm_2, relu, 0); del mm_2, relu
    t_6 = op_t(threshold_backward)
    accumulate.product(grads["up.weight"], t_6, x); del t_6
    sum_2 = op_sum_dim_IntList(threshold_backward, [0], True); del threshold_backward
    view = op_view(sum_2, [8]); del sum_2
    accumulate(grads["up.bias"], view); del view
    return None
'''


def test_a_two_layer_mlp_in_full() -> None:
    source = built(whole_stage(MLP(), {"x": torch.empty(4, 8)}), COLUMN_THEN_ROW, 2).source
    header, body = source.split("\n\n\n", 1)
    assert body == GOLDEN.lstrip()
    assert "op_mm = torch.ops.aten.mm.default" in header.splitlines()


# --- whole programs


PROGRAMS: dict[str, tuple[Any, dict[str, Any], int | None]] = {
    "tp2": (lambda: example_gpt(), {"tp": 2}, None),
    "tp2-pp2": (
        lambda: example_gpt(tied=True),
        {"tp": 2, "pp": 2, "dp": 1, "microbatch_size": 2, "schedule": "1f1b"},
        5,
    ),
    "tp4-eager": (lambda: hf_gpt2("eager"), {"tp": 4}, 6),
    "dp2-pp2": (lambda: hf_gpt2("sdpa"), {"dp": 2, "pp": 2}, None),
}
"""Model, pins, and the seed of random prices (None: the planner's own choice)."""


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> Any:
    """An executable that is never run."""
    build, pins, seed = PROGRAMS[request.param]
    model, batch = build()
    with pytest.MonkeyPatch.context() as patch:
        if seed is not None:
            draw_prices(patch, seed)
        devices = pins.get("dp", 1) * pins.get("tp", 1) * pins.get("pp", 1)
        return autopar.compile(model, cpu_cluster(devices), batch, parallelism=autopar.Parallelism(**pins))


def _sources(program: Any) -> list[str]:
    return [program.code(rank) for rank in range(len(program.plan.placement))]


def test_every_rank_has_a_module_that_compiles(program: Any) -> None:
    for rank, source in enumerate(_sources(program)):
        namespace: dict[str, Any] = {}
        exec(compile(source, f"rank {rank}", "exec"), namespace)
        assert {"setup", "prologue", "forward", "backward", "step"} <= namespace.keys()
        assert f"Rank {rank} of {len(program.plan.placement)}" in namespace["__doc__"]


def test_lines_are_short_enough_to_read(program: Any) -> None:
    assert max(len(line) for source in _sources(program) for line in source.splitlines()) <= 200


def _functions(source: str) -> dict[str, ast.FunctionDef]:
    return {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}


def _events(function: ast.FunctionDef) -> list[tuple[str, str]]:
    """("make" | "read" | "delete", variable) in the order in which they happen."""
    found: list[tuple[str, str]] = []
    for statement in function.body:
        names = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
        for kind, context in (("read", ast.Load), ("make", ast.Store), ("delete", ast.Del)):
            found += [(kind, n.id) for n in names if isinstance(n.ctx, context)]
    return found


@pytest.mark.parametrize("name", ["forward", "backward", "weight"])
def test_variables_are_made_once_and_deleted_right_after_their_last_use(program: Any, name: str) -> None:
    for source in _sources(program):
        if name not in _functions(source):
            continue
        function = _functions(source)[name]
        arguments = {a.arg for a in function.args.args}
        events = [
            (kind, v) for kind, v in _events(function) if v not in arguments and v != "_" and not v.startswith("op_")
        ]
        made = Counter(v for kind, v in events if kind == "make")
        deleted = Counter(v for kind, v in events if kind == "delete")
        assert set(made.values()) == {1} and set(deleted.values()) <= {1}
        for variable in deleted:
            assert [kind for kind, v in events if v == variable][-1] == "delete"


def test_a_deletion_stands_on_the_line_of_the_last_use(program: Any) -> None:
    for source in _sources(program):
        for name in ("forward", "backward"):
            last: dict[str, int] = {}
            for statement in _functions(source)[name].body:
                names = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
                end = statement.end_lineno or 0
                if isinstance(statement, ast.Delete):
                    assert all(last[v] == end for v in names - {"_"})
                last.update(dict.fromkeys(names, end))


def test_intermediates_do_not_outlive_a_function(program: Any) -> None:
    """All that a function makes it deletes, returns, or was given."""
    for source in _sources(program):
        for name in ("forward", "backward"):
            function = _functions(source)[name]
            returned = {n.id for n in ast.walk(function.body[-1]) if isinstance(n, ast.Name)}
            calls = [s for s in function.body if isinstance(s, ast.Assign) and isinstance(s.value, ast.Call)]
            made = {n.id for s in calls for t in s.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            deleted = {v for kind, v in _events(function) if kind == "delete"}
            given = {"_"} | {
                t.id for s in calls if "received" in ast.dump(s) for t in s.targets if isinstance(t, ast.Name)
            }
            assert made - returned - given <= deleted


def test_one_accumulation_for_each_trained_parameter(program: Any) -> None:
    for rank, source in enumerate(_sources(program)):
        stage, _, _ = program.planned.linked.coordinates[rank]
        expected = {s.name for s in program.planned.linked.stages[stage].shards if s.trainable}
        backwards = [f for name, f in _functions(source).items() if name.startswith(("backward", "weight"))]
        calls = [n for function in backwards for n in ast.walk(function) if isinstance(n, ast.Call)]
        targets = [
            ast.literal_eval(n.args[0].slice)
            for n in calls
            if ast.unparse(n.func) in ("accumulate", "accumulate.product") and isinstance(n.args[0], ast.Subscript)
        ]
        assert sorted(targets) == sorted(expected)
