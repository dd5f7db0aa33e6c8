"""Mixed precision on one device: the cast graph run by plain PyTorch, with the master copies written out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from autopar.runtime import kernels
from cost_model.precision import DTYPES, Precision
from passes.graph import ModelGraph
from passes.layer_vocabulary import DIFFERENTIABLE
from passes.precision import cast
from passes.trace import trace


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Any:
    attend = nn.functional.scaled_dot_product_attention
    return attend(q, k, v, mask, is_causal=is_causal, scale=scale), None


_REAL = {
    **DIFFERENTIABLE,
    torch.ops.autopar.attention.default: _attention,
    torch.ops.autopar.count_labels.default: kernels.count_labels,
}


class _Run(fx.Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(_REAL.get(target, target), args, kwargs)


class OneDevice:
    """A model trained with the casts of a precision. state: parameters by name, from the master copies."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], precision: Precision, optimizer: Any) -> None:
        self.graph: ModelGraph = cast(trace(model, batch), precision).global_graph
        self.run, self.precision = _Run(nn.Module(), graph=self.graph.graph), precision
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.own = {
            i.target: named[i.target].detach().clone() for i in self.graph.inputs if i.kind not in ("batch", "scale")
        }
        master = precision.master
        self.updated = {
            n: t.to(self._dtype(master, self._stored(t))).requires_grad_()
            for n, t in self.own.items()
            if n in dict(model.named_parameters())
        }
        self.optimizer = optimizer(self.updated.values())
        self.gradients: dict[str, Tensor] = {}

    def _stored(self, tensor: Tensor) -> torch.dtype:
        return self._dtype(self.precision.params, tensor.dtype)

    @staticmethod
    def _dtype(name: str | None, otherwise: torch.dtype) -> torch.dtype:
        return otherwise if name is None else getattr(torch, DTYPES[name])

    def step(self, batch: Mapping[str, Tensor], scale: float = 1.0) -> float:
        """One update; the loss before it. scale: of the loss, where the graph has one."""
        params = {n: t.detach().to(self._stored(self.own[n])).requires_grad_() for n, t in self.updated.items()}
        scale = scale if self.precision.scales_loss else 1.0
        values = {**self.own, **batch, **params, "loss_scale": torch.tensor(scale)}
        (loss,) = self.run.run(*(values[i.target] for i in self.graph.inputs))
        found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for tensor, gradient in zip(self.updated.values(), found, strict=True):
            if gradient is not None:
                kept = gradient.to(self._dtype(self.precision.grads, gradient.dtype))
                tensor.grad = kept.to(tensor.dtype) / scale
        self.optimizer.step()
        return float(loss.detach()) / scale

    def state(self) -> dict[str, Tensor]:
        """In the model's own dtypes."""
        return {n: t.detach().to(self.own[n].dtype) for n, t in self.updated.items()}
