"""Least squares within bounds, for the few constants that reference tables fix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
_ROUNDS, _STEP, _ENOUGH = 30, 1e-3, 1e-5


def fit(
    errors: Callable[[Sequence[float]], Sequence[float]], start: Sequence[float], bounds: Sequence[tuple[float, float]]
) -> list[float]:
    """Constants within bounds that minimise the sum of squared errors: Levenberg and Marquardt's, steps clipped."""
    low, high = (np.array(side, dtype=float) for side in zip(*bounds, strict=True))
    x = np.clip(np.array(start, dtype=float), low, high)
    scale = np.maximum(np.abs(x), 1e-3 * (high - low))
    found, damping = _of(errors, x), 1e-2
    for _ in range(_ROUNDS):
        slopes = _slopes(errors, x, found, scale, low, high)
        step = _within(slopes, found, damping, (low - x) / scale, (high - x) / scale)
        tried = np.clip(x + step * scale, low, high)
        value = _of(errors, tried)
        if value @ value < found @ found:
            gain = 1 - (value @ value) / (found @ found)
            x, found, damping = tried, value, damping / 5
            if gain < _ENOUGH:
                break
        else:
            damping *= 6
            if damping > 1e8:
                break
    return [float(value) for value in x]


def _of(errors: Callable[[Sequence[float]], Sequence[float]], x: Vector) -> Vector:
    return np.array(errors(list(map(float, x))), dtype=float)


def _slopes(
    errors: Callable[[Sequence[float]], Sequence[float]],
    x: Vector,
    found: Vector,
    scale: Vector,
    low: Vector,
    high: Vector,
) -> Vector:
    columns = []
    for index in range(len(x)):
        moved = x.copy()
        step = _STEP * scale[index] * (1 if x[index] + _STEP * scale[index] <= high[index] else -1)
        moved[index] = np.clip(x[index] + step, low[index], high[index])
        columns.append((_of(errors, moved) - found) * scale[index] / (moved[index] - x[index]))
    return np.stack(columns, axis=1)


def _within(slopes: Vector, found: Vector, damping: float, down: Vector, up: Vector) -> Vector:
    """A step that leaves no bounds: what would is stopped there, and the rest found again without it."""
    step, free = np.zeros_like(down), np.ones(len(down), dtype=bool)
    while free.any():
        step[free] = _step(slopes[:, free], found + slopes[:, ~free] @ step[~free], damping)
        out = free & ((step < down) | (step > up))
        if not out.any():
            break
        step[out] = np.clip(step[out], down[out], up[out])
        free &= ~out
    return step


def _step(slopes: Vector, found: Vector, damping: float) -> Vector:
    normal = slopes.T @ slopes
    normal += damping * np.diag(np.diag(normal) + 1e-12)
    return np.linalg.lstsq(normal, -slopes.T @ found, rcond=None)[0]
