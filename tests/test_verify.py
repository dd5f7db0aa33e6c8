"""Verification: whatever is changed in printed code, or between stages, is found."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from models import example_gpt
from parity import cpu_cluster

import autopar
from cost_model.errors import VerificationError
from cost_model.mesh import Mesh
from cost_model.placement import REPLICATE, VARYING, Shard
from cost_model.tensor import TensorMeta
from passes.stage import StageCode
from passes.verify import verify_cuts, verify_emitted

MESHES = (Mesh(1, 2), Mesh(1, 2))


@pytest.fixture(scope="module")
def codes() -> tuple[StageCode, ...]:
    """Two stages on two shards each, which reduce whole sums."""
    model, batch = example_gpt(tied=True)
    pins = autopar.Parallelism(dp=1, tp=2, pp=2, microbatch_size=1, sequence_parallel=False, schedule="1f1b")
    exe = autopar.compile(model, cpu_cluster(4, bandwidth=1e12), batch, parallelism=pins)
    return tuple(code for stage in exe.planned.linked.stages for code in stage.chunks)


@pytest.fixture(scope="module")
def code(codes: tuple[StageCode, ...]) -> StageCode:
    """One with collectives both ways."""
    found = next(c for c in codes if c.forward.collectives() and c.backward.collectives())
    return found


def _lines(source: str, pattern: str) -> list[int]:
    found = [i for i, line in enumerate(source.splitlines()) if re.search(pattern, line)]
    assert found, f"nothing like {pattern} in the code"
    return found


def _swapped(source: str) -> str:
    """Two neighbouring calls that do not depend on each other, exchanged."""
    lines = source.splitlines()
    pair = re.compile(r"    (\w+) = op_t\((\w+)\)$")
    for i in range(len(lines) - 1):
        first, second = pair.match(lines[i]), re.match(r"    (\w+) = op_\w+\(([^)]*)\)", lines[i + 1])
        if first and second and first[1] not in second[2]:
            lines[i], lines[i + 1] = lines[i + 1], lines[i]
            return "\n".join(lines) + "\n"
    raise AssertionError("no such pair")


def _without(pattern: str) -> Callable[[str], str]:
    """The first such call dropped: its result is its operand."""

    def change(source: str) -> str:
        at = _lines(source, pattern)[0]
        lines = source.splitlines()
        lines[at] = re.sub(r"(\w+) = [\w.]+\((\w+)[^;]*", r"\1 = \2", lines[at])
        return "\n".join(lines) + "\n"

    return change


def _replaced(pattern: str, old: str, new: str) -> Callable[[str], str]:
    def change(source: str) -> str:
        at = _lines(source, pattern)[0]
        lines = source.splitlines()
        assert re.search(old, lines[at])
        lines[at] = re.sub(old, new, lines[at], count=1)
        return "\n".join(lines) + "\n"

    return change


def _dropped(pattern: str) -> Callable[[str], str]:
    def change(source: str) -> str:
        lines = source.splitlines()
        del lines[_lines(source, pattern)[0]]
        return "\n".join(lines) + "\n"

    return change


CHANGES: dict[str, Callable[[str], str]] = {
    "a collective dropped": _without(r"comm\.all_reduce_\("),
    "a collective on another axis": _replaced(r"comm\.all_reduce_\(", r"'tp'", "'dp'"),
    "a collective that is not in place": _replaced(r"comm\.all_reduce_\(", r"all_reduce_", "all_gather"),
    "two lines swapped": _swapped,
    "an addition of something else": _replaced(r"op_add_Tensor\(\w+, \w+\)", r"\((\w+), (\w+)\)", r"(\1, \1)"),
    "operands exchanged": _replaced(r"op_add_Tensor\(\w+, \w+\)", r"\((\w+), (\w+)\)", r"(\2, \1)"),
    "another op": _replaced(r"op_add_Tensor\(", "op_add_Tensor", "op_mul_Tensor"),
    "a wrong shape": _replaced(r"op_view\(\w+, \[\d+, \d+\]\)", r"\[(\d+), (\d+)\]", r"[\2, \1]"),
    "an accumulation dropped": _dropped(r"accumulate\("),
    "an accumulation elsewhere": _replaced(
        r'accumulate\(grads\["[\w.]*bias"', r'grads\["[\w.]*"\]', 'grads["token.weight"]'
    ),
    "a deletion dropped": _replaced(r"op_add_Tensor\(.*; del \w+$", r"; del \w+$", ""),
    "a deletion too many": _replaced(r"op_gelu\(.*; del \w+$", r"$", ", t_that_is_not_there"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_code_is_found(code: StageCode, name: str) -> None:
    verify_emitted(code)
    functions = CHANGES[name](code.functions)
    assert functions != code.functions
    with pytest.raises((VerificationError, RuntimeError, NameError, KeyError)) as caught:
        verify_emitted(replace(code, functions=functions))
    assert isinstance(caught.value, VerificationError) or "shape" in name, caught.value


def test_another_price_is_found(code: StageCode) -> None:
    """The estimate counts a collective that the code does not run."""
    forward = code.forward
    with pytest.raises(VerificationError, match="printed = priced"):
        verify_emitted(replace(code, forward=replace(forward, instructions=forward.instructions[:-1])))


def _entry(code: StageCode) -> str:
    return next(i.node for i in code.inputs if i.kind == "activation")


def _with_places(code: StageCode, **places: Any) -> StageCode:
    return replace(code, placements={**code.placements, **places})


def test_stages_that_fit_are_accepted(codes: tuple[StageCode, ...]) -> None:
    verify_cuts(codes, MESHES)
    verify_cuts(codes[:1], MESHES[:1])


def test_another_shape_at_a_cut_is_found(codes: tuple[StageCode, ...]) -> None:
    first, second = codes
    assert first.sent is not None
    wrong = TensorMeta((*first.sent.shape[:-1], first.sent.shape[-1] * 2), first.sent.dtype)
    with pytest.raises(VerificationError, match="stage 0 sends"):
        verify_cuts((replace(first, sent=wrong), second), MESHES)


def test_another_placement_at_a_cut_is_found(codes: tuple[StageCode, ...]) -> None:
    """A sum taken for a whole value has the right shape and the wrong numbers."""
    first, second = codes
    other = VARYING if first.exit == (REPLICATE,) else REPLICATE
    with pytest.raises(VerificationError, match="stage 0 sends"):
        verify_cuts((first, _with_places(second, **{_entry(second): (other,)})), MESHES)


def test_tied_parameters_that_lie_differently_are_found(codes: tuple[StageCode, ...]) -> None:
    first, second = codes
    node = next(i.node for i in second.inputs if i.target == "token.weight")
    other = REPLICATE if second.placements[node] != (REPLICATE,) else Shard(1)
    with pytest.raises(VerificationError, match="token.weight"):
        verify_cuts((first, _with_places(second, **{node: (other,)})), MESHES)
