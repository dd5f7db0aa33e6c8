"""Watch: what a trace would lose without a word is refused or noted: backwards and hooks of the user's own, and
Python values that forward changes or draws."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._functorch import eager_transforms

from cost_model.errors import ConfigError, UnsupportedError
from passes.functions import Functions
from passes.python_state import python_state

_MODULE_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_REGISTER = ("register_hook", "register_post_accumulate_grad_hook")
_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


def check_hooks(model: nn.Module) -> None:
    """UnsupportedError where gradients of modules or parameters go through the user's own hooks."""
    owners = [("module", name or "itself", m, _MODULE_HOOKS) for name, m in model.named_modules()]
    owners += [("parameter", name, p, _TENSOR_HOOKS) for name, p in model.named_parameters()]
    for what, name, owner, attributes in owners:
        if any(getattr(owner, attribute, None) for attribute in attributes):
            raise UnsupportedError(
                f"{what} {name!r} has a backward hook, which a program made ahead of time does not call; "
                "remove it, and state what it does in forward or in the optimizer"
            )


def check_loss(loss_fn: Any, model: nn.Module) -> None:
    """ConfigError for parameters of a loss, which the optimizer of the model would not be given."""
    of = loss_fn if isinstance(loss_fn, nn.Module) else getattr(loss_fn, "__self__", None)
    known = {id(parameter) for parameter in model.parameters()}
    for name, parameter in of.named_parameters() if isinstance(of, nn.Module) else ():
        if parameter.requires_grad and id(parameter) not in known:
            raise ConfigError(
                f"loss_fn has a parameter {name!r} that is none of the model's, and would not be trained: make it "
                "a part of the model (return the loss from forward), or freeze it"
            )


@contextmanager
def own_backwards(functions: Functions) -> Iterator[None]:
    """While a model is traced: autograd Functions as calls that have their gradients, UnsupportedError from hooks.

    Only the forward of either would be traced, and its derivative would take the place of the user's backward.
    Packed sequences are refused too, whose rows are as many as the lengths of a batch add up to.
    """

    plain = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        return functions.apply(plain, cls, *args, **kwargs)

    def refuse_hook(tensor: torch.Tensor, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(
            f"forward puts a gradient hook on a tensor {list(tensor.shape)}, which is lost when a model is traced; "
            "state what it does in forward or in the optimizer"
        )

    def refuse_packing(*_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(
            "forward packs sequences by their lengths, which differ from batch to batch, and programs are of fixed "
            "shapes: run the layer over the padded batch, and take each sample's last step from its output "
            "(out.gather(1, (lengths - 1).view(-1, 1, 1).expand(-1, 1, out.shape[2])))"
        )

    refused = [(torch.Tensor, name, refuse_hook) for name in _REGISTER]
    with ExitStack() as patched:
        for owner, name, instead in (
            (torch.autograd.Function, "apply", classmethod(apply)),
            (nn.utils.rnn.PackedSequence, "__new__", refuse_packing),
            *refused,
        ):
            patched.enter_context(mock.patch.object(owner, name, instead))
        yield


@contextmanager
def casts_of_modules() -> Iterator[None]:
    """While a model is traced: a cast of a module to the dtypes it has changes nothing, another is an UnsupportedError.

    torch casts by replacing parameters, which a trace does not allow even where they stay what they are.
    """

    def check(module: nn.Module, wanted: torch.dtype | None) -> nn.Module:
        tensors = [*module.named_parameters(), *module.named_buffers()]
        changed = next((name for name, t in tensors if wanted and t.is_floating_point() and t.dtype != wanted), None)
        if changed is None:
            return module
        raise UnsupportedError(
            f"forward casts a {type(module).__name__} whose {changed!r} is not {wanted}: cast it when the model "
            "is built, or cast what it is applied to"
        )

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        named = (a.dtype if isinstance(a, torch.Tensor) else a for a in (*args, *kwargs.values()))
        return check(module, next((a for a in named if isinstance(a, torch.dtype)), None))

    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(nn.Module, "to", to))
        for name, dtype in _CASTS.items():
            patched.enter_context(mock.patch.object(nn.Module, name, functools.partialmethod(check, dtype)))
        yield


@contextmanager
def gradients_as_written() -> Iterator[None]:
    """While a model is traced: ways to say that gradients stop, which a tracer does not see, as ways that it sees.

    ``tensor.data`` is the tensor without its gradient (calls on torch's own would be left out, or made once for all
    steps), a parameter whose data is set is written to, inference mode is no_grad. UnsupportedError where other data is
    set, where a parameter's gradient is switched on or off (what is called in between would be as before), and where
    forward runs a backward.
    """

    def set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
        if isinstance(tensor, nn.Parameter) and (tensor.shape, tensor.dtype) == (data.shape, data.dtype):
            tensor.detach().copy_(data.detach())
            return
        raise UnsupportedError(
            f"forward gives a tensor {list(tensor.shape)} other data, which is lost when a model is traced: assign a "
            "new tensor, keep what changes in a buffer, or change parameters outside of forward"
        )

    def require(tensor: torch.Tensor, requires_grad: bool = True) -> torch.Tensor:
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad != requires_grad:
            raise UnsupportedError(
                f"forward switches the gradient of a parameter {list(tensor.shape)} "
                f"{'on' if requires_grad else 'off'}, which is lost when a model is traced: call the module with "
                "detached parameters (torch.func.functional_call), or switch it before the model is compiled"
            )
        return plain(tensor, requires_grad)

    def refuse_backward(*_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(
            "forward runs a backward, which is lost when a model is traced: return the loss, and state gradients "
            "that enter it with torch.func.jvp, or by hand"
        )

    def refuse_jacobian(*_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(
            "forward takes a whole Jacobian (torch.func.jacfwd, hessian), which torch.export cannot trace: state its "
            "products with directions by torch.func.jvp, one for each input"
        )

    def enter(region: torch.inference_mode) -> None:
        regions.append(torch.no_grad() if region.mode else nullcontext())
        regions[-1].__enter__()

    plain, regions = torch.Tensor.requires_grad_, list[AbstractContextManager[None]]()
    with ExitStack() as patched:
        for owner, name, instead in (
            (torch.Tensor, "data", property(torch.Tensor.detach, set_data)),
            (torch.Tensor, "requires_grad_", require),
            (torch.Tensor, "backward", refuse_backward),
            (torch.autograd, "grad", refuse_backward),
            (eager_transforms, "_vjp_with_argnums", refuse_backward),
            (eager_transforms, "_construct_standard_basis_for", refuse_jacobian),
            (torch.inference_mode, "__enter__", enter),
            (torch.inference_mode, "__exit__", lambda _, *how: regions.pop().__exit__(*how)),
        ):
            patched.enter_context(mock.patch.object(owner, name, instead))
        yield


class ValueWatch:
    """Python values that forward changes or draws, as notes. torch.export puts changed attributes back, so that the
    traced function itself has to look."""

    def __init__(self) -> None:
        self.notes: tuple[str, ...] = ()

    @contextmanager
    def over(self, model: nn.Module, loss_fn: Any) -> Iterator[None]:
        """Around one run of forward and of the loss."""
        before, drawn, state = python_state(model, loss_fn), random.getstate(), _numpy_state()
        yield
        found = [
            f"forward changes {name!r}: every step uses the value it had when the model was traced"
            for name, value in python_state(model, loss_fn).items()
            if before.get(name, value) != value
        ]
        if random.getstate() != drawn:
            found.append("forward draws from Python's random: every step uses what was drawn when it was traced")
        if _numpy_state() != state:
            found.append("forward draws from numpy.random: every step uses what was drawn when it was traced")
        self.notes = tuple(found)


def _numpy_state() -> str:
    return repr([part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()])
