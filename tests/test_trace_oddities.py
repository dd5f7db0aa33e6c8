"""What forward does beside computing: refused with its line, noted, or traced as it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from odd_models import inputs, net
from torch import Tensor, nn

from cost_model.errors import TraceError, UnsupportedError
from passes.trace import trace


def test_the_users_line_is_in_the_error() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        if self.a(x).sum() > 0:  # the culprit
            x = x * 2
        return F.mse_loss(self.b(x), y)

    with pytest.raises(TraceError) as caught:
        trace(net(forward), inputs())
    assert caught.value.source is not None
    assert __file__ in caught.value.source and "# the culprit" in caught.value.source


def test_rows_that_a_mask_picks_are_refused_with_what_to_write() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        out = self.body(x)
        for row in (x.sum(1) > 0).nonzero():  # the culprit
            out = out.index_add(0, row, self.body(x[row]))
        return F.mse_loss(out, y)

    with pytest.raises(TraceError, match=r"(?s)the culprit.*each expert over all tokens"):
        trace(net(forward), inputs())


def test_numbers_of_picked_rows_are_refused_with_what_to_write() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        picked = self.body(x)[x.sum(1) > 0]
        return picked.sum() / len(picked)

    with pytest.raises(TraceError, match=r"(?s)len\(picked\).*x\.shape\[0\] for len\(x\)"):
        trace(net(forward), inputs())


@pytest.mark.parametrize(
    ("build", "forward", "said"),
    [
        (None, lambda s, x, y: F.mse_loss(s.body(x + x.new_empty(x.shape).cauchy_()), y), "cauchy"),
        (None, lambda s, x, y: F.mse_loss(s.body(x) + torch.multinomial(x.abs(), 2).sum(), y), "multinomial"),
        (None, lambda s, x, y: F.mse_loss(s.body(x.mul_(2)), y), "input"),
        (None, lambda s, x, y: torch.sparse.mm(s.a.weight.to_sparse(), y.t()).sum(), r"sparse.*index_add"),
    ],
    ids=["cauchy", "several without replacement", "changed input", "sparse"],
)
def test_what_ranks_cannot_do_alike_is_refused(build: Any, forward: Any, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        trace(net(forward, build), inputs())


def _halved(h: Tensor) -> Tensor:
    h.data.mul_(0.5)
    return h


def _first_column_dropped(h: Tensor) -> Tensor:
    made = h * 1
    made.view(-1, 2).detach()[:, 0] = 0.0
    return made.relu()


def _other_data(h: Tensor) -> Tensor:
    h.data = h.data * 2
    return h


@pytest.mark.parametrize("changed", [_halved, _first_column_dropped, _other_data])
def test_values_written_behind_the_back_of_gradients_are_refused(changed: Callable[[Tensor], Tensor]) -> None:
    """They had the gradients of what was written, or were what they had been."""
    with pytest.raises(UnsupportedError, match=r"through .detach\(\) or .data .* reads it afterwards|other data"):
        trace(_Odd(lambda _, h: changed(h)), (torch.zeros(8, 4),))


def test_data_of_a_tensor_is_the_tensor_without_its_gradient() -> None:
    """Of torch's own, no tracer knows: rounding with the gradient of the identity became a constant."""

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        h = self.a(x)
        h = h + (h.round() - h).data
        noise = h.detach().mul_(0.5)  # h is read no more
        return F.mse_loss(noise * self.b.weight.data.norm(), y)

    called = [str(node.target) for node in trace(net(forward), inputs()).global_graph.nodes()]
    assert called.index("aten.round.default") < called.index("aten.detach.default") and "aten.mul.Tensor" in called
    assert not isinstance(vars(torch.Tensor).get("data"), property)


def _frozen(model: Any, h: Tensor) -> Tensor:
    model.inner.weight.requires_grad_(False)
    made = model.inner(h)
    model.inner.weight.requires_grad_(True)
    return made


def _penalised(model: Any, h: Tensor) -> Tensor:
    given = h.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.inner(given).sum(), given, create_graph=True)
    return h + gradient


def _ran_backward(_: Any, h: Tensor) -> Tensor:
    h.sum().backward(retain_graph=True)
    return h


def _clamped_anew(model: Any, h: Tensor) -> Tensor:
    model.inner.weight = nn.Parameter(model.inner.weight.detach().clamp(-0.1, 0.1))
    return h


def _cast_elsewhere(model: Any, h: Tensor) -> Tensor:
    with torch.autocast("xpu", torch.bfloat16):
        return model.inner(h).float()


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (_frozen, r"switches the gradient of a parameter \[4, 4\] off"),
        (_penalised, "runs a backward"),
        (_ran_backward, "runs a backward"),
        (lambda model, h: torch.vmap(torch.func.jacrev(model.inner))(h).sum(1), "runs a backward"),
        (lambda model, h: torch.vmap(torch.func.jacfwd(model.inner))(h).sum(1), "whole Jacobian.*func.jvp"),
        (_clamped_anew, "in the place of the parameter 'inner.weight'"),
        (_cast_elsewhere, r"torch.autocast\('xpu'\)"),
    ],
)
def test_gradients_that_a_trace_would_lose_are_refused(odd: Any, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        trace(_Odd(odd), (torch.zeros(8, 4),))


def test_what_a_trace_is_told_is_not_logged(capfd: pytest.CaptureFixture[str]) -> None:
    weights = torch.ones(8, 1, dtype=torch.float64)  # which half of the batch does not fit
    trace(net(lambda self, x, y: F.mse_loss(self.body(x) * weights, y)), inputs())
    assert "failed while attempting" not in capfd.readouterr().err


def test_inference_mode_stops_gradients() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.inference_mode():
            gate = self.a(x)
        return F.mse_loss(self.b(x) * gate.clone(), y)

    graph = trace(net(forward), inputs()).global_graph
    assert [str(n.target) for n in graph.nodes()].count("aten.detach.default") == 1


def _in_an_attribute(model: Any, h: Tensor) -> Tensor:
    h = h + model.state
    model.state = h.detach().mean(0)
    return h


def _in_a_list(model: Any, h: Tensor) -> Tensor:
    h = h + model.states[-1]
    model.states.append(h.detach().mean(0))
    return h


@pytest.mark.parametrize(("odd", "name"), [(_in_an_attribute, "state"), (_in_a_list, "states")])
def test_tensors_that_one_step_keeps_for_the_next_are_refused(odd: Any, name: str) -> None:
    """An exporter puts back what was there before."""
    model = _Odd(odd)
    model.state, model.states = torch.zeros(4), [torch.zeros(4)]
    with pytest.raises(UnsupportedError, match=f"forward reads '{name}' .*register_buffer"):
        trace(model, (torch.zeros(8, 4),))


def test_tensors_that_are_kept_and_not_read_are_no_matter() -> None:
    def keep(model: Any, h: Tensor) -> Tensor:
        model.last, model.first = h.detach(), h.detach()
        return h

    model = _Odd(keep)
    model.last, model.first = torch.zeros(4), None
    (note,) = trace(model, (torch.zeros(8, 4),)).notes
    assert "forward keeps a tensor in 'first', where there was none" in note


def test_models_that_were_traced_to_torchscript_are_traced() -> None:
    traced = torch.jit.trace(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()), torch.zeros(8, 4))
    graph = trace(traced, (torch.zeros(8, 4),), lambda outputs, inputs: outputs.square().mean()).global_graph
    assert [entry.target for entry in graph.inputs if entry.trainable] == ["0.weight", "0.bias"]


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].sign()


class _Odd(nn.Module):
    """Does one odd thing in forward."""

    def __init__(self, odd: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.odd, self.calls = nn.Linear(4, 4), odd, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(self, self.inner(x)).pow(2).mean()


def _hooked(model: nn.Module, h: torch.Tensor) -> torch.Tensor:
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 0.1)
    return h


def _counted(model: Any, h: torch.Tensor) -> torch.Tensor:
    model.calls += 1
    return h * model.calls


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (lambda _, h: _Own.apply(h), "_Own is an autograd.Function"),
        (_hooked, r"gradient hook on a tensor \[8, 4\]"),
    ],
    ids=["function", "tensor hook"],
)
def test_a_backward_of_the_users_own_is_refused(odd: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        trace(_Odd(odd), (torch.zeros(8, 4),))
    assert torch.autograd.Function.apply.__qualname__ == "Function.apply" and torch.Tensor.register_hook is REGISTER


REGISTER = torch.Tensor.register_hook


def _cast_again(model: Any, h: torch.Tensor) -> torch.Tensor:
    model.inner = model.inner.to(h.dtype).float()
    return h


def _cast_for_good(model: Any, h: torch.Tensor) -> torch.Tensor:
    model.inner = model.inner.to(torch.bfloat16)
    return h


def test_a_module_cast_to_what_it_is_stays() -> None:
    """As routers of transformers do in every forward, though torch cannot replace parameters in a trace."""
    trace(_Odd(_cast_again), (torch.zeros(8, 4),))
    with pytest.raises(UnsupportedError, match=r"forward casts a Linear whose 'weight' is not torch.bfloat16"):
        trace(_Odd(_cast_for_good), (torch.zeros(8, 4),))


@pytest.mark.parametrize("where", ["module", "parameter"])
def test_backward_hooks_are_refused(where: str) -> None:
    model = _Odd(lambda _, h: h)
    if where == "module":
        model.inner.register_full_backward_hook(lambda *_: None)
    else:
        model.inner.weight.register_hook(lambda gradient: gradient * 0.1)
    with pytest.raises(UnsupportedError, match=f"{where} 'inner.*' has a backward hook"):
        trace(model, (torch.zeros(8, 4),))


def test_values_that_forward_changes_are_noted() -> None:
    notes = trace(_Odd(_counted), (torch.zeros(8, 4),)).notes
    assert any("'calls'" in note for note in notes)
    assert any("random" in note for note in trace(_Odd(lambda _, h: h * random.random()), (torch.zeros(8, 4),)).notes)
    noted = trace(_Odd(lambda _, h: h * np.random.beta(1, 1)), (torch.zeros(8, 4),)).notes
    assert any("numpy.random" in note for note in noted)
    assert not trace(_Odd(lambda _, h: h), (torch.zeros(8, 4),)).notes
