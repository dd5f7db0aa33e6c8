"""Prices drawn at random: the planner's optimum under them is a legal plan that nobody would choose."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from autopar.planner.prices import MeshPrices, conversion_kinds


def draw_prices(patch: pytest.MonkeyPatch, seed: int) -> None:
    """Positive costs for ops, conversions and parameters, each drawn once; what is impossible stays so."""
    known: dict[tuple[Any, ...], float] = {}

    def draw(*key: Any) -> float:
        text = repr((seed, *key))
        return known.setdefault(key, 10 ** random.Random(text).uniform(-4, 0))

    def op_time_s(prices: MeshPrices, call: Any, strategy: Any) -> float:
        return draw("op", call.op, str([m.shape for m in call.inputs]), strategy)

    def conversion_s(meta: Any, source: Any, target: Any) -> float:
        if source == target:
            return 0.0
        impossible = conversion_kinds(source, target) is None
        return math.inf if impossible else draw("as", meta.nbytes, str(source), str(target))

    def conversions_s(prices: MeshPrices, meta: Any, sources: Any, targets: Any) -> Any:
        """On several axes there is always a way."""
        if len(prices.sizes) == 1:
            return np.array([[conversion_s(meta, a[0], b[0]) for b in targets] for a in sources])
        return np.array([[0.0 if a == b else draw("as", meta.nbytes, a, b) for b in targets] for a in sources])

    patch.setattr(MeshPrices, "op_time_s", op_time_s)
    patch.setattr(MeshPrices, "conversions_s", conversions_s)
    patch.setattr(
        MeshPrices, "parameter_time_s", lambda prices, meta, place, *zero: draw("parameter", meta, str(place), *zero)
    )
