"""The list of rules is complete, and is that of the table itself; every family of ops is drawn often enough."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from op_calls import Case
from op_draws import CALLS, EXAMPLES
from op_examples import FILE, Seeded, as_tree, example
from test_op_table import PLANNABLE, check_all

from autopar.cli import main
from autopar.coverage import coverage, coverage_text, example_call, map_text, priced_only
from cost_model.ops import OPS

SWEPT = 200
"""Random cases of a family of ops in the long run."""


def test_every_op_is_listed_with_a_map() -> None:
    rows = {row.op: row for row in coverage()}
    assert set(rows) == set(PLANNABLE) and not set(rows) & set(priced_only())
    assert [name for name, row in rows.items() if not row.map] == []
    assert rows["aten.mm.default"].map == "m k, k n -> m n" and rows["aten.mm.default"].summed == ("k",)
    assert rows["aten.conv2d.default"].whole and set("gnoc") <= set(rows["aten.conv2d.default"].split)


def test_examples_are_those_that_are_drawn() -> None:
    """After adding an op: python tests/op_examples.py"""
    known = json.loads(FILE.read_text())
    assert set(known) == set(CALLS)
    for name in ("aten.linear.default", "aten.gather.default", "autopar.experts.default"):
        assert known[name] == json.loads(json.dumps(as_tree(example(name))))
        rule = OPS[name].factors(example_call(name))
        assert rule is not None and map_text(rule) in coverage_text()


def test_the_command_prints_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert set(tree["ops"]) == set(PLANNABLE) and len(tree["ops"]) >= 340
    assert main(["coverage"]) == 0
    assert "aten.embedding.default" in capsys.readouterr().out


def _family(name: str) -> str:
    return OPS[name].factors.__module__


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({_family(name) for name in CALLS}))
def test_many_random_cases_of_every_family(family: str) -> None:
    """At least ``SWEPT`` a family, and no fewer than the short run draws of any op."""
    names = [name for name in CALLS if _family(name) == family]
    drawn: Counter[str] = Counter()
    seed = 0
    while sum(drawn.values()) < SWEPT or seed < max(EXAMPLES[name] for name in names) // 2:
        for name in names:
            made = CALLS[name](Seeded(seed))
            args, kwargs = (made[:-1], made[-1]) if made and isinstance(made[-1], dict) else (made, {})
            check_all(Case(name, args, kwargs))
            drawn[name] += 1
        seed += 1
    assert set(drawn) == set(names) and sum(drawn.values()) >= SWEPT
