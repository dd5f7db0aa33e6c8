"""Rows of a device: how long ops of one kind take, by their arithmetic or by the bytes they move."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cost_model.program import OpCost

# Products of size batch x T x S x D inside attention: q k' and p v forward; p, dv, dp, dq, dk backward.
ATTENTION_PRODUCTS = {"attention": 2, "attention_backward": 5}

QUICK_FLOPS = 2**22
"""Of a product that gains by oneDNN: its calls take 10 microseconds where those of MKL take 2; at half, both tie."""


def is_small_product(cost: OpCost) -> bool:
    """Of float32, and below ``QUICK_FLOPS``."""
    return cost.kind == "matmul" and cost.gemm is not None and cost.dtype == "float32" and cost.flops < QUICK_FLOPS


@dataclass(frozen=True)
class Tiling:
    """How a GPU cuts a product's output: one tile a unit (streaming multiprocessor) at a time, in waves.

    shapes: (rows, columns) of the tiles that kernels exist for, the largest first. half: the side of a square tile
    at which loading its operands takes half of its time (a tile of a x b loads (a + b) k numbers for a b k products).
    """

    units: int
    shapes: tuple[tuple[int, int], ...]
    half: float

    def factor(self, batch: int, m: int, n: int) -> float:
        """How much longer than at the full rate of the largest tile: ragged tiles, idle units of the last wave."""
        best = min(self._busy(batch, m, n, *shape) for shape in self.shapes)
        return best / (batch * m * n * self._loading(*self.shapes[0]))

    def _busy(self, batch: int, m: int, n: int, rows: int, columns: int) -> float:
        tiles = batch * math.ceil(m / rows) * math.ceil(n / columns)
        waves = math.ceil(tiles / self.units)
        return waves * self.units * rows * columns * self._loading(rows, columns)

    def _loading(self, rows: int, columns: int) -> float:
        return 1.0 + self.half / 2 * (1.0 / rows + 1.0 / columns)


@dataclass(frozen=True)
class GemmRow:
    """Time of a product: flops / (peak x efficiency) x (1 + half_m/m + half_n/n + half_k/k + half_outputs/(b m n)).

    Each ``half_x`` is the size of x at which its part alone doubles the time. The four parts stand for loading the
    second operand, loading the first, writing the output, and for units that idle in the last wave of output tiles
    (on average half a wave). Where the device's tiles are known, ``tiling`` counts them instead: the time is that of
    the best tile x (1 + half_k/k). ``dtype_efficiency``: of dtypes whose units reach another share of their peak
    (tensor cores against plain ones). ``per_matrix_s`` is spent once per matrix of a batch, ``overhead_s`` once per
    call. ``mask_block``: attention only; keys that a causal kernel takes at once, so that it computes up to half a
    block per query more than the mask keeps.
    """

    efficiency: float
    half_m: float
    half_n: float
    half_k: float
    half_outputs: float
    per_matrix_s: float
    overhead_s: float
    mask_block: float = 0.0
    tiling: Tiling | None = None
    dtype_efficiency: Mapping[str, float] = field(default_factory=dict, hash=False)

    def rate_share(self, dtype: str) -> float:
        """Share of the dtype's peak that the largest products reach."""
        return self.dtype_efficiency.get(dtype, self.efficiency)

    def seconds(self, cost: OpCost, peak_flops: float, bandwidth_bytes_per_s: float) -> float:
        """Seconds of one call, never less than its bytes take."""
        rate = peak_flops * self.rate_share(cost.dtype)
        compute_s = self.computed_flops(cost) * self.shape_factor(cost.gemm) / rate
        batch = cost.gemm[0] if cost.gemm else 1
        busy_s = compute_s + batch * self.per_matrix_s
        return max(busy_s, cost.nbytes / bandwidth_bytes_per_s) + self.overhead_s

    def shape_factor(self, gemm: tuple[int, int, int, int] | None) -> float:
        """How much longer than at the full rate; 1 where the shape is not known."""
        if gemm is None:
            return 1.0
        b, m, n, k = (max(1, size) for size in gemm)
        if self.tiling is not None:
            return self.tiling.factor(b, m, n) * (1.0 + self.half_k / k)
        return 1.0 + self.half_m / m + self.half_n / n + self.half_k / k + self.half_outputs / (b * m * n)

    def computed_flops(self, cost: OpCost) -> float:
        """Operations the kernel does; a causal mask is skipped by whole blocks only.

        With s keys and blocks of B, the kept share f of the scores becomes f + B / 2s, at most all of them.
        """
        if cost.kind not in ATTENTION_PRODUCTS or cost.gemm is None:
            return cost.flops
        batch, queries, keys, depth = cost.gemm
        full = 2.0 * ATTENTION_PRODUCTS[cost.kind] * batch * queries * keys * depth
        if not 0 < cost.flops < full:
            return cost.flops
        return full * min(1.0, cost.flops / full + self.mask_block / (2 * keys))


@dataclass(frozen=True)
class StreamRow:
    """Time of an op that moves bytes: overhead + nbytes / rate(nbytes) + rows x per_row, of rows found one by one.

    points: (nbytes of the op, bytes per second), sizes growing; between them the rate is interpolated in the
    logarithms of both, outside them it is that of the nearest.
    """

    points: tuple[tuple[float, float], ...]
    overhead_s: float
    per_row_s: float = 0.0

    def __post_init__(self) -> None:
        assert self.points and all(a[0] < b[0] for a, b in zip(self.points, self.points[1:], strict=False))

    def seconds(self, nbytes: float, rows: int = 0) -> float:
        return self.overhead_s + self.moving_s(nbytes, rows)

    def moving_s(self, nbytes: float, rows: int = 0) -> float:
        """Without the overhead."""
        return nbytes / interpolate(self.points, nbytes) + rows * self.per_row_s

    @property
    def slowing(self) -> float:
        """The largest ratio of a rate to that at a larger size, at least 1."""
        rates = [rate for _, rate in self.points]
        return max(max(rates[: i + 1]) / rate for i, rate in enumerate(rates))


Row = GemmRow | StreamRow


def interpolate(points: tuple[tuple[float, float], ...], x: float) -> float:
    """The curve through positive points at x, straight in log-log, constant outside."""
    right = bisect.bisect_left(points, (x, 0.0))
    if right == 0:
        return points[0][1]
    if right == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    share = math.log(x / x0) / math.log(x1 / x0)
    return y0 * math.exp(share * math.log(y1 / y0))
