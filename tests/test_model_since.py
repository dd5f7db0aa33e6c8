"""What is done to the model after its program was planned: what trains is refused, values are warned of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from odd_models import Net, inputs
from parity import SGD, cpu_cluster
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import nn

import autopar
from cost_model.errors import ConfigError

pytestmark = pytest.mark.usefixtures("thread_ranks")


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def exe(net: Net) -> Iterator[autopar.Executable]:
    pins = autopar.Parallelism(dp=2, tp=1, pp=1)
    with autopar.compile(net, cpu_cluster(2), inputs(), optimizer=SGD, parallelism=pins) as made:
        yield made


@pytest.mark.parametrize("steps", [0, 1])
def test_what_trains_is_part_of_the_plan(net: Net, exe: autopar.Executable, steps: int) -> None:
    for _ in range(steps):
        exe.step(inputs())
    net.b.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"requires_grad of 'b.weight', 'b.bias' is another than when"):
        exe.step(inputs())
    net.b.requires_grad_(True)
    exe.step(inputs())


def _loaded(net: nn.Module) -> None:
    net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})


def _replaced(net: Any) -> None:
    net.a.weight.data = torch.zeros_like(net.a.weight)


@pytest.mark.parametrize("change", [_loaded, _replaced])
def test_weights_that_ranks_do_not_see_are_warned_of_once(
    net: Net, exe: autopar.Executable, change: Callable[[nn.Module], None]
) -> None:
    change(net)  # ranks take these
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exe.step(inputs())
        net.load_state_dict(exe.full_state_dict())
        exe.step(inputs())
        change(net)
        with pytest.raises(UserWarning, match="'a.weight'.* changed after its program took the weights"):
            exe.step(inputs())
    with pytest.warns(UserWarning, match="exe.load_weights"):
        exe.step(inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exe.step(inputs())
