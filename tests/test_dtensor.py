"""Our rules beside DTensor's: what torch offers for an op, ours offers too, or why not is said here.

torch's tables are private and change between versions: ``dtensor_rules.py`` reads them, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from op_draws import CALLS
from op_examples import example

from cost_model.factors import Strategy, split_factor, unsplit_strategies
from cost_model.ops import OPS

RANKS = 2
Offer = tuple[tuple[str, ...], tuple[str, ...]]
"""Placements of inputs and of outputs: "R" (whole, whatever its gradient), "P" or "S(dim)"."""


def _of(*names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in names)


def _is_fresh(name: str, offer: Offer) -> bool:
    return any(word in name for word in ("new_", "_like")) and offer[1] == ("R",)


WHY_NOT: dict[str, Callable[[str, Offer], bool]] = {
    "a sum is the only way in which ours put ranks together": lambda name, offer: any("P(" in p for p in offer[1]),
    "its sums are of bools": lambda name, offer: name in _of("any.default", "any.dim"),
    "its parts are norms, whose squares add up": lambda name, offer: "norm" in name and "P" in offer[1],
    "every product would have two more strategies, for chains of products with nothing between": lambda name, offer: (
        name in _of("mm.default", "bmm.default", "addmm.default", "baddbmm.default") and "P" in offer[0]
    ),
    "it gives the matrix's factors too, which are no sum where what it is solved for is one": lambda name, offer: (
        name in _of("_linalg_solve_ex.default") and "P" in offer[1]
    ),
    "matrices of a batch cannot be whole where what they are solved for is split along it": lambda name, offer: (
        name in _of("linalg_solve_triangular.default") and offer in [(("R", f"S({d})"), (f"S({d})",)) for d in (0, 1)]
    ),
    "a constant made in the shape of a value is no reason to reduce it: its operand is ambient": _is_fresh,
    "it splits the dim that is scanned, where that is counted from the last": lambda name, offer: (
        name in _of("cumsum.default", "cumprod.default", "logcumsumexp.default")
    ),
}


@pytest.fixture(scope="module")
def theirs() -> dict[str, list[Offer]]:
    script = Path(__file__).with_name("dtensor_rules.py")
    names = sorted(name for name in CALLS if name.startswith("aten."))
    run = subprocess.run([sys.executable, str(script), *names], capture_output=True, text=True, timeout=900, check=True)
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('["aten')]
    return {name: [(tuple(inputs), tuple(outputs)) for inputs, outputs in offers] for name, offers in rows}


@cache
def ours(name: str) -> frozenset[Offer]:
    case = example(name)
    rule = OPS[name].factors(case.call)
    assert rule is not None
    found = list(unsplit_strategies(rule, len(case.tensors), len(case.outputs)))
    for factor, extent in rule.sizes.items():
        split = [split_factor(rule, factor, outer, RANKS) for outer in range(1, extent + 1) if extent % outer == 0]
        found += [strategy for strategy in split if strategy is not None]
    return frozenset(map(_offer, found))


def _offer(strategy: Strategy) -> Offer:
    inputs, outputs = (tuple(str(p).replace("V", "R") for p in side) for side in (strategy.inputs, strategy.outputs))
    return inputs, outputs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ours_offer_what_dtensor_offers(theirs: dict[str, list[Offer]]) -> None:
    missing = [(name, offer) for name, offers in theirs.items() for offer in offers if offer not in ours(name)]
    unsaid = [found for found in missing if not any(holds(*found) for holds in WHY_NOT.values())]
    assert not unsaid, f"DTensor offers what ours do not: {unsaid}"
    assert len(theirs) >= 230 and sum(map(len, theirs.values())) > 400
    for reason, holds in WHY_NOT.items():
        assert any(holds(*found) for found in missing), f"nothing is left out any more because {reason}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ours_offer_more(theirs: dict[str, list[Offer]]) -> None:
    """Rows of a table, channels of a convolution, classes of a loss: ops that DTensor knows none or less of."""
    more = [name for name in theirs if ours(name) - set(theirs[name])]
    assert len(more) > 40
    assert len([name for name in CALLS if name.startswith("aten.") and name not in theirs]) > 90
