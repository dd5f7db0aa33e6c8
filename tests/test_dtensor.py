"""Our rules beside DTensor's: what torch offers for an op, ours offers too, or why not is said here.

torch's tables are private and change between versions: ``dtensor_rules.py`` reads them, in a process of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from op_draws import CALLS
from op_examples import example
from parity import cpu_cluster
from torch import Tensor, nn

import autopar
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
    "its sums are of bools": lambda name, offer: name in _of("any.default", "any.dim", "any.dims"),
    "the bits of a sum are not the sums of bits": lambda name, offer: name in _of("view.dtype") and "P" in offer[0],
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


WITHOUT_RULE: dict[str, str] = {
    "optimizers are no part of a model's graph": r"_fused_adam",
    "a kernel that torch takes for attention, matrices or norms on some device: graphs hold the op itself": (
        r"_scaled_dot_product|_scaled_mm|_grouped_mm|_batch_norm_with|_native_batch_norm|nll_loss2d_forward|native_dropout"
        r"|_functional\."
    ),
    "what it makes is no value that a graph goes on from": r"equal\.|is_same_size|check_errors|new_empty_strided",
    "torch has no gradient of it, or says to take another in its place": (
        r"linalg_ldl|geqrf|ormqr|\.cholesky\.|linalg__powsum|lanczos"
    ),
    "windows that are drawn": r"fractional_max_pool|multinomial",
    "it takes matrices apart, or has eigenvectors of any phase": r"lu_unpack|linalg_eig\.",
}
"""Ops that DTensor has rules for and ours do not, whatever they are called with: why, and their names."""


class Restated(nn.Module):
    """Calls that DTensor knows under their own names and that a traced graph has others in place of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).sigmoid()
        pairs = torch.xlogy(2.0, h) + torch.xlogy(h, 2.0) + torch.logaddexp2(h, h) + torch.true_divide(h, h + 1)
        special = torch.special.entr(h) + torch.special.log_ndtr(h) + torch.mvlgamma(h + 2, 2) + torch.sinc(h)
        special = special + torch.special.xlog1py(h, h) + torch.special.xlog1py(h, 2.0) + torch.special.xlog1py(2.0, h)
        plain = torch.clip(h, 0.1, 0.5) + torch.clip(h, h * 0.5, h * 2) + torch.deg2rad(h) + torch.rad2deg(+h)
        powers = torch.float_power(h, 2.5) + torch.float_power(h, h) + torch.float_power(2.0, h)
        drawn = torch.rand_like(h) + torch.randn_like(h) + torch.randint_like(h, 5) + torch.bernoulli(h.detach())
        signs = torch.isneginf(h) | torch.isposinf(h)
        flat = torch.heaviside(h.detach(), h.detach()) + F.rrelu(h, training=True) + torch.normal(h.detach(), 1.0)
        pooled = F.adaptive_max_pool1d(h, 3).mean() + F.max_pool1d(h, 2, return_indices=True)[0].mean()
        pooled = pooled + F.max_unpool2d(*F.max_pool2d(h[:, None], 2, return_indices=True), 2).mean()
        solid = h[:, None, None]
        pooled = pooled + F.max_unpool3d(*F.max_pool3d(solid, (1, 2, 2), return_indices=True), (1, 2, 2)).mean()
        pooled = pooled + F.adaptive_avg_pool3d(solid, (1, 2, 2)).mean()
        sums = torch.diag_embed(h).mean() + torch.diag(h[0]).mean() + torch.diag(h[0, 0]).mean() + h.nansum(1).mean()
        return (pairs + special + plain + powers + drawn + flat + torch.positive(h)).masked_fill(signs, 0).mean() + (
            pooled + sums
        )


RESTATED = _of(
    *"""_adaptive_avg_pool3d.default adaptive_max_pool1d.default bernoulli.default clip.default clip.Tensor
    deg2rad.default rad2deg.default diag.default diag_embed.default float_power.Scalar float_power.Tensor_Scalar
    float_power.Tensor_Tensor heaviside.default isneginf.default isposinf.default logaddexp2.default
    max_pool1d_with_indices.default max_unpool2d.default max_unpool3d.default mvlgamma.default nansum.default
    positive.default rand_like.default randint_like.default randint_like.low_dtype randn_like.default sinc.default
    special_entr.default special_log_ndtr.default special_xlog1py.default special_xlog1py.other_scalar
    special_xlog1py.self_scalar true_divide.Tensor xlogy.Scalar_Other xlogy.Scalar_Self""".split()
)


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


def _in_graphs(name: str) -> bool:
    """Whether forward may have it: it writes nothing, and is not the backward or the copying twin of another."""
    _, op, overload = name.split(".")
    schema = getattr(getattr(torch.ops.aten, op), overload)._schema
    return not (schema.is_mutable or "backward" in op or op.startswith("_foreach") or op.endswith("_copy"))


@pytest.mark.slow
def test_ops_that_dtensor_knows_have_a_rule() -> None:
    """Or become ops that have one, or stand in a list that says why not."""
    script = Path(__file__).with_name("dtensor_rules.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=True)
    known = [name for name in json.loads(run.stdout) if name.startswith("aten.") and _in_graphs(name)]
    without = [name for name in known if name not in OPS and name not in RESTATED]
    reasons = {name: [why for why, words in WITHOUT_RULE.items() if re.search(words, name)] for name in without}
    assert len(known) > 400 and not [name for name, found in reasons.items() if not found]
    assert {why for found in reasons.values() for why in found} == set(WITHOUT_RULE)
    notes = autopar.estimate(Restated(), cpu_cluster(1), {"x": torch.rand(4, 6, 6)}).notes
    assert not [note for note in notes if "has no rule" in note]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ours_offer_more(theirs: dict[str, list[Offer]]) -> None:
    """Rows of a table, channels of a convolution, classes of a loss: ops that DTensor knows none or less of."""
    more = [name for name in theirs if ours(name) - set(theirs[name])]
    assert len(more) > 40
    assert len([name for name in CALLS if name.startswith("aten.") and name not in theirs]) > 90
