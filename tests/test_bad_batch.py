"""A step takes the batch that was planned and refuses every other before a rank sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from parity import SGD
from regression import BATCH, TWO, Regression
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from torch import Tensor

import autopar
from cost_model.errors import BatchError, ClosedError, ConfigError

pytestmark = pytest.mark.usefixtures("shared_ranks")
PLAIN_VALUES = {"factor": 2, "options": {"scale": (0.5, None), "name": "plain"}}


class Options(Regression):
    """Takes numbers, flags, and nested containers of tensors."""

    def forward(self, x: Tensor, y: Tensor, factor: int = 1, flag: bool = False, options: Any = None) -> Any:
        scale = options["scale"][0] if options else 1.0
        loss = super().forward(x, y) * factor * scale
        return -loss if flag else loss


def test_what_an_executable_without_a_batch_or_after_close_can_do() -> None:
    exe = autopar.compile(Regression(), TWO, optimizer=SGD)
    with pytest.raises(BatchError, match="nothing is planned yet: pass inputs"):
        exe.plan  # noqa: B018 - the property raises
    assert exe.full_state_dict().keys() == Regression().state_dict().keys()
    exe.prepare(BATCH)
    for rank in (-1, 2):
        with pytest.raises(ConfigError, match=rf"no rank {rank}: ranks are 0..1"):
            exe.code(rank)
    exe.close()
    exe.close()
    assert exe.plan.batch == 8
    with pytest.raises(ClosedError, match="compile again"):
        exe.step(BATCH)


@pytest.fixture(scope="module")
def trained(shared_ranks: None) -> Iterator[tuple[autopar.Executable, dict[str, Any]]]:  # noqa: F811
    """An executable whose batch holds numbers, None and nested containers."""
    batch = {**BATCH, **PLAIN_VALUES}
    with autopar.compile(Options(), TWO, batch, optimizer=SGD, parallelism=autopar.Parallelism(dp=2)) as exe:
        yield exe, batch


WRONG_BATCHES: dict[str, tuple[Any, str]] = {
    "set": ({1}, "must be a dict"),
    "list": ([torch.ones(8, 8)], "the batch is a tuple but the plan was made for a dict"),
    "none": (None, "must be a dict"),
    "shape": (
        {"x": torch.ones(4, 8), "y": torch.ones(4, 8)},
        r"'x' is float32\[4, 8\] but .* float32\[8, 8\]; have the DataLoader leave out .*drop_last=True.*, or compile",
    ),
    "dtype": ({"x": torch.ones(8, 8).double()}, r"'x' is float64\[8, 8\] but the plan is for float32"),
    "meta": ({"x": torch.ones(8, 8, device="meta")}, "'x' is on the meta device and has no values"),
    "sparse": ({"x": torch.eye(8).to_sparse()}, "'x' is sparse; pass a dense tensor"),
    "numpy": ({"x": np.ones((8, 8), np.float32)}, "'x' is a ndarray"),
    "number": ({"factor": 3}, "'factor' is int 3 but the plan is for int 2; compile again"),
    "kind of number": ({"factor": 2.0}, "'factor' is float 2.0 but the plan is for int 2"),
    "tensor for number": ({"factor": torch.tensor(2)}, r"'factor' is int64\[\] but the plan is for int 2"),
    "nested": ({"options": {"scale": (0.25, None), "name": "plain"}}, "'options.scale.0' is float 0.25"),
    "nested none": ({"options": {"scale": (0.5, 1), "name": "plain"}}, "'options.scale.1' is int 1 but .* for None"),
    "unplanned": ({"flag": True}, "has unplanned 'flag'; pass what the plan was made for"),
}


@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_a_batch_other_than_planned_is_refused_and_the_ranks_stay(
    trained: tuple[autopar.Executable, dict[str, Any]], name: str
) -> None:
    exe, batch = trained
    change, message = WRONG_BATCHES[name]
    with pytest.raises(BatchError, match=message):
        exe.step({**batch, **change} if isinstance(change, dict) else change)
    assert np.isfinite(exe.step(batch))


def test_a_batch_that_lacks_an_input_or_is_no_dict(trained: tuple[autopar.Executable, dict[str, Any]]) -> None:
    exe, batch = trained
    with pytest.raises(BatchError, match="the batch lacks 'factor'; pass"):
        exe.step({name: value for name, value in batch.items() if name != "factor"})
    with pytest.raises(BatchError, match="the batch is a tuple but the plan was made for a dict; pass a dict"):
        exe.step(tuple(batch.values()))


def test_plain_values_inside_a_batch_are_used_as_they_are() -> None:
    batch = {**BATCH, **PLAIN_VALUES}
    expected = float(Options()(**batch).detach())
    with autopar.compile(Options(), TWO, tuple(batch[n] for n in ("x", "y", "factor")), optimizer=SGD) as exe:
        assert exe.step((BATCH["x"], BATCH["y"], 2)) == pytest.approx(2 * expected, rel=1e-5)
        with pytest.raises(BatchError, match="'2' is int 3 but the plan is for int 2"):
            exe.step((BATCH["x"], BATCH["y"], 3))
    with autopar.compile(Options(), TWO, batch, optimizer=SGD) as exe:
        reordered = dict(reversed(batch.items()))
        reordered["x"] = batch["x"].t().contiguous().t().requires_grad_()
        assert exe.step(reordered) == pytest.approx(expected, rel=1e-5)


def test_a_data_loaders_lists_are_positional_arguments() -> None:
    with autopar.compile(Regression(), TWO, optimizer=SGD) as exe:
        samples = torch.utils.data.TensorDataset(BATCH["x"], BATCH["y"])
        losses = [exe.step(batch) for batch in torch.utils.data.DataLoader(samples, batch_size=8)]
        assert losses == pytest.approx([float(Regression()(**BATCH).detach())], rel=1e-5)
        assert exe.eval_step([BATCH["x"], BATCH["y"]]) == exe.eval_step((BATCH["x"], BATCH["y"]))
