"""Rules of the user's own: given in one call, proved by execution, followed by the planner and priced."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from cost_model.errors import ConfigError, RuleError
from cost_model.ops.table import OPS
from cost_model.placement import Shard

sys.path.append(str(Path(__file__).parent))
import user_ops
from parity import check_parity, cpu_cluster
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("shared_ranks")
PROJECT, NOTATION = "user_ops::project", "b s d, e d -> b s e"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Rules of a test are its own."""
    known = dict(OPS)
    yield
    OPS.clear()
    OPS.update(known)


def call() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 6), torch.randn(8, 6)


class Projected(nn.Module):
    """Two products by the user's op."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = (nn.Parameter(torch.randn(shape) / 8) for shape in ((256, 64), (64, 256)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(user_ops.project(user_ops.project(x, self.up).relu(), self.down), y)  # the line


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(8, 4, 64), "y": torch.randn(8, 4, 64)}


def test_a_right_rule_is_proved() -> None:
    autopar.register_rule(PROJECT, NOTATION, check=call())
    autopar.register_rule("user_ops::centre", "... d -> ... d", whole="d", check=(torch.randn(4, 6),))
    with torch.no_grad():
        autopar.register_rule("user_ops::counted", "b s -> b s", check=(torch.randn(4, 6),))
    assert {"user_ops.project.default", "user_ops.centre.default"} <= OPS.keys()


def test_lists_and_arguments_by_name_are_checked() -> None:
    """Shards of a list's tensors were its whole tensors, and there was no way to give arguments by name."""
    values, named = [torch.randn(4, 6) for _ in range(3)], {"scale": 0.5, "bias": torch.randn(6)}
    with torch.no_grad():  # it has no backward
        with pytest.raises(RuleError, match="along 'd', it does not run"):
            autopar.register_rule("user_ops::added", "b d, b d, b d, e -> b d", check=(values, named))
        autopar.register_rule("user_ops::added", "b d, b d, b d, d -> b d", check=(values, named))
    assert "user_ops.added.default" in OPS


@pytest.mark.parametrize(
    ("op", "notation", "arguments", "said"),
    [
        ("user_ops::counted", "b s -> b s", (torch.randn(4, 6),), "its backward fails .* torch.no_grad"),
        ("user_ops::paired", "b s -> b s", (torch.arange(12).reshape(2, 6),), "along 'b', it does not run .*whole="),
        ("user_ops::centre", "... d -> ... d", (torch.arange(24.0).reshape(4, 6) ** 2,), "along 'd'.*whole="),
        ("user_ops::project", "b s d, e d -> b s e", call()[:1], "does not run on the arguments of check"),
        ("user_ops::project", "b s e, e d -> b s d", call(), "does not fit"),
        ("user_ops::project", "b s d, e d -> b s f", call(), "along 'e', result 0"),
        ("user_ops::project", "b s d, e d", call(), "operands -> results"),
        (None, NOTATION, call(), "by its name"),
        ("user_ops::nothing", NOTATION, call(), "import the module"),
        ("aten::linear", NOTATION, call(), "already"),
    ],
)
def test_wrong_rules_are_refused(op: str, notation: str, arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises((ConfigError, RuleError), match=said):
        autopar.register_rule(op, notation, check=arguments)
    assert "user_ops.project.default" not in OPS and "user_ops.centre.default" not in OPS


def test_a_factor_that_is_kept_whole_is_one_of_the_rule() -> None:
    with pytest.raises(ConfigError, match="whole='D' names 'D', which the rule .* does not have"):
        autopar.register_rule("user_ops::centre", "b s d -> b s d", whole="D")


def test_a_rule_that_no_shards_follow_is_named() -> None:
    autopar.register_rule(PROJECT, "b s d, e d -> b s f")
    pins, shape = autopar.Parallelism(dp=1, tp=2, pp=1), (2, 2)
    links = {"latency_s": np.full(shape, 1e-12), "bandwidth_bytes_per_s": np.full(shape, 1e15)}
    with pytest.raises(RuleError, match="shards of a call give .* correct it in register_rule"):
        autopar.estimate(Projected(), autopar.Cluster.from_matrix(device="cpu", **links), batch(), parallelism=pins)


@pytest.mark.parametrize("check", [None, call()])
def test_a_rule_that_was_not_checked_is_noted(check: Any) -> None:
    autopar.register_rule(PROJECT, NOTATION, check=check)
    notes = autopar.estimate(Projected(), cpu_cluster(1), batch()).notes
    assert any("user_ops.project.default is split as" in note for note in notes) == (check is None)


def test_programs_follow_the_rule() -> None:
    autopar.register_rule(PROJECT, NOTATION)
    check_parity(Projected(), batch(), 2, 1e-5, dp=1, tp=2, pp=1)
    parallelism = autopar.Parallelism(dp=1, tp=2, pp=1)
    with autopar.compile(Projected(), cpu_cluster(2, 1e12), batch(), parallelism=parallelism) as exe:
        places = exe.planned.linked.stages[0].places
        assert isinstance(places["up"][0], Shard) and isinstance(places["down"][0], Shard)
        assert not any("no rule" in note for note in exe.notes)


@pytest.mark.parametrize("pins", [{"dp": 1, "tp": 2}, {"dp": 2, "tp": 1}], ids=str)
def test_a_missing_rule_is_named_with_its_line_and_its_cost(pins: dict[str, int]) -> None:
    est = autopar.estimate(Projected(), cpu_cluster(2), batch(), parallelism=autopar.Parallelism(pp=1, **pins))
    (note,) = (n for n in est.notes if "no rule (" in n)
    assert "user_ops.project.default" in note and "# the line" in note
    assert "2 call(s)" in note and "ms of a step" in note and "register_rule" in note


class Spoken(nn.Module):
    """A connectionist temporal classification of frames."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.head, self.own = nn.Linear(6, 32), nn.Linear(32, 10), own

    def forward(self, x: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        likely = self.head(torch.relu(self.enter(x))).log_softmax(-1).transpose(0, 1)
        if self.own:
            return (user_ops.ctc(likely, labels, lengths) / lengths.clamp(min=1)).mean()
        return F.ctc_loss(likely, labels, torch.full((x.shape[0],), x.shape[1]), lengths)


def spoken() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(8, 12, 6), "labels": torch.randint(1, 10, (8, 4)), "lengths": torch.randint(1, 5, (8,))}


def test_a_loss_of_ones_own_runs_as_torchs() -> None:
    autopar.register_rule("user_ops::ctc", "t b c, b s, b -> b", whole="t c s")
    model, batch = Spoken(own=True), spoken()
    torch.testing.assert_close(model(**batch), Spoken(own=False)(**batch))
    for made, pins in ((model, {"dp": 2, "tp": 1, "pp": 1}), (Spoken(own=False), {"dp": 1, "tp": 2, "pp": 1})):
        check_parity(made, batch, 2, 1e-5, **pins)
