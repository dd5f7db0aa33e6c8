"""Optimizers travel as data and come back the same."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from autopar.runtime.channel import decode, encode
from autopar.runtime.optim import OptimizerSpec, build, capture, chosen, group_options, set_group_options
from autopar.runtime.probe import is_elementwise, is_separable
from cost_model.errors import ConfigError, UnsupportedError

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
import user_optimizers as own  # noqa: E402
from user_optimizers import by_ndim  # noqa: E402

partial = functools.partial
SHAPES = {"emb": (7, 4), "ln.weight": (4,), "fc.weight": (8, 4), "fc.bias": (8,)}
FLOATS = {name: (shape, torch.float32) for name, shape in SHAPES.items()}


def captured(factory: Callable[[Any], torch.optim.Optimizer], shapes: Any = FLOATS) -> OptimizerSpec:
    spec = capture(factory, shapes)
    assert spec is not None
    return spec


# --- Capture --------------------------------------------------------------------------------------------------------


def test_capture_reads_groups_by_name_and_calls_the_factory_once_in_model_order() -> None:
    seen: list[list[tuple[int, ...]]] = []

    def factory(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        seen.append([tuple(p.shape) for p in parameters])
        return by_ndim(parameters)

    spec = captured(factory)
    assert seen == [list(SHAPES.values())]
    assert spec.path == "torch.optim.adamw.AdamW"
    assert [group.names for group in spec.groups] == [("emb", "fc.weight"), ("ln.weight", "fc.bias")]
    assert [group.options["weight_decay"] for group in spec.groups] == [0.1, 0.0]
    assert all(group.options["betas"] == (0.9, 0.95) and group.options["lr"] == 1e-3 for group in spec.groups)


def test_no_factory_is_no_spec() -> None:
    assert capture(None, FLOATS) is None


def test_left_out_parameters_are_in_no_group() -> None:
    spec = captured(lambda parameters: SGD(parameters[1:3], lr=0.1))
    assert [group.names for group in spec.groups] == [("ln.weight", "fc.weight")]


def test_a_spec_survives_the_channel_as_plain_values() -> None:
    spec = captured(lambda ps: AdamW([{"params": ps, "state_dtype": torch.bfloat16}], lr=torch.tensor(3e-4)))
    tree = spec.to_tree()
    assert OptimizerSpec.from_tree(decode(bytearray(b"".join(encode(tree))))) == spec
    assert spec.groups[0].options["state_dtype"] is torch.bfloat16
    assert torch.equal(spec.groups[0].options["lr"], torch.tensor(3e-4))

    def check(value: Any) -> None:
        assert value is None or type(value) in (bool, int, float, str, list, dict, torch.Tensor), value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)

    check(tree)


def test_the_users_lr_tensor_is_not_shared() -> None:
    lr = torch.tensor(0.1)
    spec = captured(partial(SGD, lr=lr))
    lr.fill_(9.0)
    first, second = (build(spec, {"emb": nn.Parameter(torch.ones(7, 4))}) for _ in range(2))
    assert first is not None and second is not None
    first.param_groups[0]["lr"].fill_(5.0)
    assert float(second.param_groups[0]["lr"]) == pytest.approx(0.1)


def duplicated(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    with pytest.warns(UserWarning, match="duplicate parameters"):
        return SGD([*parameters, parameters[0]], lr=0.1)


class Local(torch.optim.SGD):
    """At the top level of a module, but taken below for one of a script."""


def of_a_script(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    Local.__module__ = "__main__"
    return Local(parameters, lr=0.1)


def of_a_function(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    class Hidden(torch.optim.SGD):
        pass

    return Hidden(parameters, lr=0.1)


def hooked(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = SGD(parameters, lr=0.1)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def with_code(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return SGD([{"params": parameters, "schedule": lambda step: step}], lr=0.1)


MADE_BEFORE = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)


@pytest.mark.parametrize(
    ("factory", "error", "words"),
    [
        (MADE_BEFORE, ConfigError, "not a function of parameters; pass a torch.optim class with its options bound"),
        (lambda ps: MADE_BEFORE, ConfigError, "added a parameter"),
        (lambda ps: None, ConfigError, "returned a NoneType, not a torch.optim.Optimizer"),
        (lambda ps: SGD([], lr=0.1), ConfigError, "empty parameter list"),
        (partial(SGD, lr=-1.0), ConfigError, "Invalid learning rate"),
        (partial(own.Trusting, speed=1), ConfigError, "unexpected keyword"),
        (lambda ps: SGD([nn.Parameter(torch.zeros(2, 3))], lr=1), ConfigError, r"added a parameter of shape \(2, 3\)"),
        (duplicated, ConfigError, "uses parameter 'emb' twice"),
        (of_a_script, ConfigError, "define it in a module"),
        (of_a_function, ConfigError, "define it in a module"),
        (with_code, ConfigError, "group option 'schedule' of the optimizer is a builtins.function"),
        (hooked, UnsupportedError, "override step"),
        (torch.optim.LBFGS, UnsupportedError, "closure"),
        (torch.optim.SparseAdam, UnsupportedError, "use torch.optim.Adam"),
    ],
)
def test_what_cannot_travel_is_refused_with_a_next_move(factory: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        capture(factory, FLOATS)


def test_a_constructor_that_makes_its_own_groups_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="turns 1 parameter groups into 4; let its constructor keep"):
        capture(own.Splitting, FLOATS)


# --- Build ----------------------------------------------------------------------------------------------------------


def trained(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    generators = {name: torch.Generator().manual_seed(i) for i, name in enumerate(SHAPES)}
    for _ in range(3):
        for name, parameter in parameters.items():
            parameter.grad = torch.randn(parameter.shape, generator=generators[name])
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def fresh(*names: str) -> dict[str, nn.Parameter]:
    return {n: nn.Parameter(torch.linspace(-1, 1, torch.Size(SHAPES[n]).numel()).view(SHAPES[n])) for n in names}


BUILT = {
    "adamw by ndim": by_ndim,
    "fused adamw": partial(AdamW, lr=1e-2, fused=True),
    "foreach adam": partial(Adam, lr=1e-2, weight_decay=0.1, foreach=True, amsgrad=True),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adagrad": partial(Adagrad, initial_accumulator_value=0.5),
    "adafactor": torch.optim.Adafactor,
    "lr tensor": partial(AdamW, lr=torch.tensor(0.05)),
}


@pytest.mark.parametrize("factory", BUILT.values(), ids=BUILT)
def test_stages_together_train_as_the_factory_does(factory: Callable[[Any], torch.optim.Optimizer]) -> None:
    whole = fresh(*SHAPES)
    expected = trained(factory(list(whole.values())), whole)
    spec = OptimizerSpec.from_tree(captured(factory).to_tree())
    for names in (("emb", "ln.weight"), ("fc.bias", "fc.weight")):
        part = fresh(*names)
        optimizer = build(spec, part)
        assert optimizer is not None
        for name, value in trained(optimizer, part).items():
            assert torch.equal(value, expected[name]), name


def test_groups_without_a_parameter_here_are_left_out() -> None:
    optimizer = build(captured(by_ndim), fresh("ln.weight"))
    assert optimizer is not None
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]
    assert build(captured(by_ndim), {"other": nn.Parameter(torch.zeros(2))}) is None


def test_constructor_options_outside_the_groups_come_back() -> None:
    optimizer = build(captured(partial(own.Signed, lr=0.1, sharpness=7.0)), fresh("emb"))
    assert isinstance(optimizer, own.Signed)
    assert optimizer.sharpness == 7.0
    with pytest.raises(UnsupportedError, match=r"keeps sharpness=7.0 outside .* functools.partial\(Signed"):
        capture(lambda ps: own.Signed(ps, 0.1, sharpness=7.0), FLOATS)


def test_options_are_as_captured_whatever_the_constructor_does_to_them() -> None:
    optimizer = build(captured(partial(own.Scaling, lr=0.5)), fresh("emb"))
    assert optimizer is not None and optimizer.param_groups[0]["lr"] == 5.0


def test_a_constructor_that_passes_all_on_is_repeated() -> None:
    optimizer = build(captured(partial(own.Renamed, lr=0.5, weight_decay=0.25)), fresh("emb"))
    assert type(optimizer) is own.Renamed and optimizer.param_groups[0]["weight_decay"] == 0.25


def test_another_process_makes_the_same_optimizer() -> None:
    spec = captured(lambda ps: own.Signed([{"params": ps[:1], "lr": 0.5}, {"params": ps[1:]}], 0.1))
    program = (
        "import json, sys, torch\n"
        "from autopar.runtime.optim import OptimizerSpec, build\n"
        "here = {'emb': torch.zeros(7, 4), 'fc.bias': torch.ones(8)}\n"
        "o = build(OptimizerSpec.from_tree(json.load(sys.stdin)), here)\n"
        "groups = [[g['lr'], g['params'][0].numel()] for g in o.param_groups]\n"
        "print(json.dumps([type(o).__name__, o.sharpness, groups]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    made = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(spec.to_tree()),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout) == ["Signed", 1.0, [[0.5, 28], [0.1, 8]]]


def test_a_class_this_process_cannot_import_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.Lion.*PYTHONPATH"):
        build(OptimizerSpec("nowhere.Lion", {}, captured(AdamW).groups), fresh("emb"))


# --- Elementwise ----------------------------------------------------------------------------------------------------

ELEMENTWISE = {
    "adam": partial(Adam, lr=1e-3, weight_decay=0.1),
    "adamw by ndim": by_ndim,
    "fused adamw": partial(AdamW, fused=True),
    "capturable adamw": partial(AdamW, capturable=True, lr=torch.tensor(1e-3)),
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
    "rmsprop": partial(RMSprop, centered=True, momentum=0.9),
    "adagrad": Adagrad,
}
WHOLE = {
    "adafactor": torch.optim.Adafactor,
    "muon": torch.optim.Muon,
    "still adafactor": partial(torch.optim.Adafactor, lr=0.0),
}


@pytest.mark.parametrize("factory", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_elementwise_optimizers_are_found(factory: Any) -> None:
    assert is_elementwise(factory)


@pytest.mark.parametrize("factory", WHOLE.values(), ids=WHOLE)
def test_optimizers_that_see_the_whole_parameter_are_found(factory: Any) -> None:
    assert not is_elementwise(factory)


def test_own_optimizers_are_judged_by_what_they_do() -> None:
    assert is_elementwise(partial(own.Signed, lr=0.1))
    assert not is_elementwise(own.Trusting)
    assert not is_elementwise(captured(own.Trusting))
    assert not is_elementwise(own.Limiting)


@pytest.mark.parametrize(
    "factory", [*ELEMENTWISE.values(), torch.optim.Adafactor, own.Trusting], ids=[*ELEMENTWISE, "adafactor", "trusting"]
)
def test_most_optimizers_update_each_parameter_by_itself(factory: Any) -> None:
    assert is_separable(captured(factory))


@pytest.mark.parametrize("factory", [own.Clipping, own.Limiting, own.Adding], ids=lambda kind: kind.__name__)
def test_what_couples_parameters_is_found(factory: Any) -> None:
    """``Limiting`` does so at large gradients only."""
    assert is_separable(captured(factory)) == (factory is own.Adding)


FUSED_WHERE_OPEN = [
    (AdamW, "float32", True),
    (functools.partial(SGD, lr=0.1, momentum=0.9), "float64", True),
    (AdamW, "bfloat16", None),  # its kernel rounds otherwise than the loop
    (functools.partial(AdamW, fused=False), "float32", False),
    (functools.partial(AdamW, foreach=True), "float32", None),
    (functools.partial(AdamW, lr=torch.tensor(0.1)), "float32", None),
    (own.Renamed, "float32", None),
]


@pytest.mark.parametrize(("factory", "dtype", "fused"), FUSED_WHERE_OPEN)
def test_cpus_take_fused_kernels_where_torchs_own_optimizer_leaves_it_open(
    factory: Any, dtype: str, fused: Any
) -> None:
    spec = captured(factory, {"w": ((3, 2), getattr(torch, dtype))})
    assert chosen(spec, "cpu", {"w": dtype}).groups[0].options["fused"] is fused


@pytest.mark.parametrize("factory", [AdamW, Adam, Adagrad, functools.partial(SGD, lr=0.1, momentum=0.9)])
def test_fused_kernels_update_as_the_loop_does(factory: Any) -> None:
    spec = captured(factory, {"w": ((37, 5), torch.float64)})
    found = []
    for taken in (spec, chosen(spec, "cpu", {"w": "float64"})):
        weight = torch.linspace(-1, 1, 185, dtype=torch.float64).view(37, 5)
        optimizer = build(taken, {"w": weight})
        assert optimizer is not None
        for step in range(3):
            weight.grad = torch.cos(weight * (1 + step))
            optimizer.step()
        found.append(weight)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_how_an_update_is_computed_is_no_part_of_what_is_trained() -> None:
    """Neither a checkpoint nor a scheduler takes the fused kernel away, or brings it to another device."""
    spec = captured(AdamW, {"w": ((3, 2), torch.float32)})
    optimizer = build(chosen(spec, "cpu", {"w": "float32"}), {"w": torch.zeros(3, 2)})
    assert optimizer is not None and optimizer.param_groups[0]["fused"] is True
    told = group_options(spec, optimizer, ["w"])
    other = build(spec, {"w": torch.zeros(3, 2)})
    assert other is not None
    other.param_groups[0]["lr"] = 0.5
    set_group_options(spec, other, ["w"], told)
    assert (other.param_groups[0]["fused"], other.param_groups[0]["lr"]) == (None, 1e-3)
    set_group_options(spec, optimizer, ["w"], told)
    assert optimizer.param_groups[0]["fused"] is True
