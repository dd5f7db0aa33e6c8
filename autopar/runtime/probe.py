"""Whether an optimizer may be run on parts: of a parameter, or of all parameters; found by running it both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from autopar.runtime.optim import Factory, OptimizerSpec, ParameterGroup, build, capture

_LOOP = {"foreach": False, "fused": False, "capturable": False}
"""Options that choose an implementation of the same update; this one runs on any device and dtype."""
_STEPS = 3
_LR = 0.1
_TOLERANCE = 1e-10  # of the largest change: rounding in float64; updates that see more differ in the first digits
_SCALES = (1.0, 1e-8, 1e8)  # of gradients: clipping and trust ratios act on large ones, or on small ones
_PROBE, _PROBE_SHAPE = "probe", (6, 4)
_PROBE_CUT = 9  # neither at the end of a row nor in the middle


def is_elementwise(optimizer: Factory | OptimizerSpec, *, flat: bool = False) -> bool:
    """Whether updating the shards of a parameter one by one is updating the parameter, found by doing both.

    Every group's options are tried on a float64 matrix split along either dim, over three steps, at a learning rate
    large enough to tell and gradients of any size. flat: whether that also holds of pieces of the flattened parameter.
    Errors: of ``capture``.
    """
    if isinstance(optimizer, OptimizerSpec):
        return all(_is_elementwise(optimizer, g, scale, flat) for g in optimizer.groups for scale in _SCALES)
    spec = capture(optimizer, {_PROBE: (_PROBE_SHAPE, torch.float64)})
    return spec is None or is_elementwise(spec, flat=flat)


def is_separable(spec: OptimizerSpec) -> bool:
    """Whether updating parameters apart is updating them together, found by doing both with two of each group.

    A step that clips by the norm of all gradients is not.
    """
    names = [tuple(f"{_PROBE}{number}{side}" for side in "ab") for number in range(len(spec.groups))]
    groups = tuple(replace(group, names=own) for group, own in zip(spec.groups, names, strict=True))
    every = [name for own in names for name in own]
    for scale in _SCALES:
        drawn = {name: _drawn(scale, seed) for seed, name in enumerate(every)}
        together = _updated(replace(spec, groups=groups), drawn)
        for group in groups:
            for name in group.names:
                alone = replace(spec, groups=(replace(group, names=(name,)),))
                if not _is_same(_updated(alone, {name: drawn[name]})[name], together[name], drawn[name][0]):
                    return False
    return True


def _is_elementwise(spec: OptimizerSpec, group: ParameterGroup, scale: float, flat: bool) -> bool:
    alone = replace(spec, groups=(replace(group, names=(_PROBE,)),))
    drawn = _drawn(scale)

    def updated(part: torch.Tensor) -> torch.Tensor:
        return _updated(alone, {_PROBE: part})[_PROBE]

    whole = updated(drawn)
    others = [torch.cat([updated(half) for half in drawn.chunk(2, 1 + dim)], dim) for dim in (0, 1)]
    if flat:
        row = drawn.flatten(1)
        others.append(torch.cat([updated(row[:, :_PROBE_CUT]), updated(row[:, _PROBE_CUT:])]).view(_PROBE_SHAPE))
    return all(_is_same(whole, other, drawn[0]) for other in others)


def _drawn(scale: float, seed: int = 0) -> torch.Tensor:
    """A parameter, then its gradients."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(1 + _STEPS, *_PROBE_SHAPE, generator=generator, dtype=torch.float64)
    drawn *= torch.linspace(1, 9, drawn[0].numel(), dtype=torch.float64).view(_PROBE_SHAPE)
    drawn[1:] *= scale
    return drawn


def _is_same(a: torch.Tensor, b: torch.Tensor, before: torch.Tensor) -> bool:
    """Up to rounding of the parameter and of its change."""
    epsilon = torch.finfo(before.dtype).eps
    rounding = 100 * epsilon * float(before.abs().max()) + _TOLERANCE * float((a - before).abs().max())
    return torch.allclose(a, b, rtol=0, atol=rounding, equal_nan=True)


def _updated(spec: OptimizerSpec, drawn: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each ``drawn[name][0]`` after one step with each of the other gradients."""
    parameters = {name: nn.Parameter(values[0].clone()) for name, values in drawn.items()}
    optimizer = build(spec, parameters)
    assert optimizer is not None
    for group in optimizer.param_groups:
        group.update({name: value for name, value in _LOOP.items() if name in group})
        if isinstance(lr := group.get("lr"), float | int | torch.Tensor):
            group["lr"] = torch.full_like(lr, _LR) if isinstance(lr, torch.Tensor) else _LR
    for step in range(1, 1 + _STEPS):
        for name, parameter in parameters.items():
            parameter.grad = drawn[name][step].clone()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}
