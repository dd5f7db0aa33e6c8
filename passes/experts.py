"""Experts: mixtures of experts of Hugging Face models traced as one call, whose experts and samples stay apart.

The usual implementations sort tokens by expert, which mixes the samples of a batch, or run in Python over the experts
a batch happens to choose, which no trace can hold. transformers lets others register implementations of its experts:
while a model is traced, gated experts without biases are ``autopar.experts``, all others transformers' own
``batched_mm``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_MODULE = "transformers.integrations.moe"
_NAME = "autopar"
_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
}


@contextmanager
def traceable_experts(model: nn.Module) -> Iterator[None]:
    """Experts of the model run our implementation meanwhile; nothing happens without transformers or experts."""
    moe: Any = sys.modules.get(_MODULE)
    configs = {id(c): c for m in model.modules() if (c := _config(m)) is not None} if moe is not None else {}
    if not configs:
        yield
        return
    moe.ALL_EXPERTS_FUNCTIONS.register(_NAME, _forward)
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation_internal = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]


def _config(module: nn.Module) -> Any:
    """The configuration of a module of experts that asks transformers for its implementation."""
    is_experts = hasattr(module, "_apply_gate") and hasattr(module, "is_concatenated")
    config = getattr(module, "config", None) if is_experts else None
    return config if hasattr(config, "_experts_implementation_internal") else None


def _forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[tokens, width] through the experts of [tokens, k] with their weights."""
    activation = _activation(module)
    if activation is None:
        moe: Any = sys.modules[_MODULE]
        made: Tensor = moe.batched_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return made
    weights = (module.gate_up_proj, module.down_proj)
    count = module.gate_up_proj.shape[0]
    routed = (top_k_index, top_k_weights.to(hidden_states.dtype))
    out: Tensor = torch.ops.autopar.experts.default(hidden_states, *routed, *weights, activation, count)
    return out


def _activation(module: Any) -> str | None:
    """The name of the gate's activation where the experts are act(gate) * up, then down, and nothing else."""
    moe: Any = sys.modules[_MODULE]
    is_plain = (
        module.has_gate
        and module.is_concatenated
        and not (module.has_bias or module.is_transposed or module.has_post_expert_norm or module._is_expert_parallel)
        and type(module)._apply_gate is moe._default_apply_gate
    )
    return _ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__) if is_plain else None
