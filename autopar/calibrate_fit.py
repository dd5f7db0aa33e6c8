"""From measured seconds to a cluster file: least squares for products, curves for everything else."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.calibrate_cold import COLD_KINDS
from autopar.calibrate_worker import ALONE, NARROW, Cold, Steps
from cost_model.device import GEMM_KINDS, STREAM_KINDS
from cost_model.device_rows import GemmRow, StreamRow
from cost_model.hardware_file import SCHEMA
from cost_model.program import OpCost

CAUSAL_BLOCK = 512
"""Keys that torch's flash attention for CPUs takes at once (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp)."""
_LEAST_S = 1e-9  # where nothing was found
_LEAST_SHARE = 0.1  # of an op's time that moving its bytes takes, where its overhead hides the rest


@dataclass(frozen=True)
class OpTime:
    """One measured op: the row of the device file it was measured for, its cost, and the seconds of one call."""

    row: str
    cost: OpCost
    seconds: float

    @property
    def op(self) -> str:
        assert self.cost.op is not None
        return self.cost.op


@dataclass(frozen=True)
class MessageTime:
    """One measured message: kind of collective or "transfer", ranks of the group, bytes, seconds."""

    kind: str
    ranks: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Machine:
    """What was measured where. memory_bytes: of one rank; reserve_bytes: taken by its interpreter and libraries;
    products: what multiplies matrices of float32; cold: what calls take longer behind others;
    steps: what steps take beside ops and messages; cores: that the ranks share."""

    description: str
    num_ranks: int
    cores: float
    memory_bytes: int
    reserve_bytes: int
    products: str
    cold: Sequence[Cold] = ()
    steps: Steps | None = None


def fit_gemm(times: Sequence[OpTime]) -> tuple[float, GemmRow]:
    """The full rate (operations per second) and the row, with efficiency 1, that reproduce these products best.

    seconds = overhead + per_matrix b + F / rate (1 + half_m / m + half_n / n + half_k / k) is linear in the
    products of its unknowns: least squares of the relative error, none of them negative.
    """
    blank = GemmRow(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, float(CAUSAL_BLOCK))
    rows = []
    for time in times:
        flops = blank.computed_flops(time.cost)
        b, m, n, k = time.cost.gemm or (1, math.inf, math.inf, math.inf)
        rows.append([flops, flops / m, flops / n, flops / k, b, 1.0])
    seconds = np.array([time.seconds for time in times])
    per_flop, m_s, n_s, k_s, per_matrix_s, overhead_s = _not_negative(np.array(rows) / seconds[:, None])
    row = GemmRow(1.0, m_s / per_flop, n_s / per_flop, k_s / per_flop, 0.0, per_matrix_s, overhead_s, CAUSAL_BLOCK)
    return 1.0 / per_flop, row


def _not_negative(relative: NDArray[np.float64]) -> list[float]:
    """x >= 0 with x[0] > 0 that minimises |relative x - 1|, by trying every set of unknowns that may be above 0."""
    scale = relative.max(axis=0)
    scale[scale == 0] = 1.0
    scaled = relative / scale
    best, least = None, math.inf
    for chosen in _subsets(relative.shape[1]):
        found, *_ = np.linalg.lstsq(scaled[:, chosen], np.ones(len(scaled)), rcond=None)
        error = float(np.square(scaled[:, chosen] @ found - 1).sum())
        if (found >= 0).all() and found[0] > 0 and error < least - 1e-12:
            best, least = (chosen, found), error
    assert best is not None, "more work took less time at every size"
    solution = np.zeros(relative.shape[1])
    solution[best[0]] = best[1]
    return [float(x) for x in solution / scale]


def _subsets(count: int) -> Iterable[list[int]]:
    """All sets of unknowns that hold the first."""
    for size in range(count):
        for others in itertools.combinations(range(1, count), size):
            yield [0, *others]


def fit_stream(times: Sequence[OpTime]) -> StreamRow:
    """The curve of one op from its times at growing sizes, the smallest of which is its overhead."""
    ordered = sorted(times, key=lambda time: time.cost.nbytes)
    overhead_s = min(time.seconds for time in ordered)
    points = tuple(
        (time.cost.nbytes, time.cost.nbytes / max(time.seconds - overhead_s, _LEAST_SHARE * time.seconds))
        for time in ordered[1:]
    )
    return StreamRow(points, overhead_s)


def with_rows(row: StreamRow, wide: OpTime, narrow: OpTime) -> StreamRow:
    """A curve whose points have as many rows a byte as ``wide``, where finding each row takes a time of its own.

    It is by what ``narrow``, with more rows, takes longer than as many bytes of the curve.
    """
    density = wide.cost.rows / wide.cost.nbytes
    more = narrow.cost.rows - density * narrow.cost.nbytes
    assert more > 0, "rows that are no narrower"
    per_row_s = max(0.0, narrow.seconds - row.seconds(narrow.cost.nbytes)) / more
    moving = [(nbytes, nbytes / rate) for nbytes, rate in row.points]
    rest = [max(taken - density * nbytes * per_row_s, _LEAST_SHARE * taken) for nbytes, taken in moving]
    points = tuple((nbytes, nbytes / left) for (nbytes, _), left in zip(moving, rest, strict=True))
    return StreamRow(points, row.overhead_s, per_row_s)


def mean_row(rows: Sequence[StreamRow]) -> StreamRow:
    """The geometric mean of rows that were taken at like sizes: the row of a kind from those of its ops."""
    points = tuple(
        (statistics.fmean(x for x, _ in sizes), statistics.geometric_mean(y for _, y in sizes))
        for sizes in zip(*(row.points for row in rows), strict=True)
    )
    return StreamRow(points, statistics.geometric_mean(row.overhead_s for row in rows))


def render_cluster(
    machine: Machine, times: Sequence[OpTime], dtypes: Mapping[str, float], messages: Sequence[MessageTime]
) -> str:
    """The TOML text of the measured cluster; dtypes: seconds of one product, by dtype."""
    rates = {kind: fit_gemm([time for time in times if time.row == kind]) for kind in GEMM_KINDS}
    rows = {
        kind: {op: fit_stream(list(group)) for op, group in _by_op(time for time in times if time.row == kind)}
        for kind in (*STREAM_KINDS, ALONE)
    }
    streams = {kind: dict(rows[kind]) for kind in STREAM_KINDS}
    for narrow in (time for time in times if time.row == NARROW):
        others = [time for time in times if time.cost.op == narrow.op and time != narrow]
        wide = max(others, key=lambda time: time.cost.nbytes)
        rows[wide.row][wide.op] = with_rows(rows[wide.row][wide.op], wide, narrow)
    peak = max(rate for rate, _ in rates.values())
    sections = [
        _head(machine),
        _device_head(machine, peak, dtypes, {kind: mean_row(list(ops.values())) for kind, ops in streams.items()}),
        *(_gemm_section(kind, row, rate / peak) for kind, (rate, row) in rates.items()),
        *(_stream_section(f"cost.{kind}", mean_row(list(ops.values()))) for kind, ops in streams.items()),
        *(_stream_section(f'op."{op}"', row) for ops in rows.values() for op, row in ops.items()),
        *(_level_sections(messages) if machine.num_ranks > 1 else ()),
    ]
    return "\n".join(sections)


def _by_op(times: Iterable[OpTime]) -> Iterable[tuple[str, Iterable[OpTime]]]:
    return itertools.groupby(sorted(times, key=lambda time: time.op), key=lambda time: time.op)


def _head(machine: Machine) -> str:
    return (
        f'schema = {SCHEMA}\nname = "local-{machine.num_ranks}"\nnum_devices = {machine.num_ranks}\n'
        f'backend = "gloo"\ncores = {machine.cores:g}\nsource = "measured: {machine.description}"\n'
    )


def _device_head(machine: Machine, peak: float, dtypes: Mapping[str, float], kinds: Mapping[str, StreamRow]) -> str:
    """Rates of other dtypes stand to float32's as their products' times do."""
    plain, own_s = kinds["elementwise"], statistics.fmean(kinds[kind].overhead_s for kind in COLD_KINDS)
    peaks = "\n".join(f"{name} = {peak * dtypes['float32'] / seconds:.6g}" for name, seconds in dtypes.items())
    return (
        f'[device]\nname = "{machine.description}"\nkind = "cpu"\nproducts = "{machine.products}"\n'
        f'source = "measured"\n\n'
        f"[device.memory]\ncapacity = {machine.memory_bytes}\nreserve = {machine.reserve_bytes}\n"
        f'bandwidth = {plain.points[-1][1]:.6g}\nsource = "measured"\n\n'
        f'[device.peak]\n{peaks}\nsource = "measured"\n\n'
        f"[device.overhead]\nop = {plain.overhead_s:.6g}\n{_step_lines(machine.steps)}"
        f'{_cold_lines(machine.cold, own_s)}source = "measured"\n'
    )


def _step_lines(steps: Steps | None) -> str:
    """Where it was measured."""
    return "" if steps is None else "step = {:.6g}\nupdate = {:.6g}\n".format(*(max(s, _LEAST_S) for s in steps))


def _cold_lines(cold: Sequence[Cold], overhead_s: float) -> str:
    """All curves, where they were measured, and the overhead of the ops that they were measured with."""
    if not cold:
        return ""
    since_s, *columns = zip(*cold, strict=True)
    lines = []
    for name, longer_s in zip(("cold_op", "cold_view", "cold_product"), columns, strict=True):
        points = zip(since_s, longer_s, strict=True)
        lines.append(f"{name} = [{', '.join(f'[{x:.6g}, {max(y, _LEAST_S):.6g}]' for x, y in points)}]")
    return "\n".join([*lines, f"cold_overhead = {overhead_s:.6g}", ""])


def _gemm_section(kind: str, row: GemmRow, efficiency: float) -> str:
    mask = f"mask_block = {row.mask_block:.6g}\n" if kind.startswith("attention") else ""
    return (
        f"[device.cost.{kind}]\nefficiency = {efficiency:.6g}\nhalf_m = {row.half_m:.6g}\nhalf_n = {row.half_n:.6g}\n"
        f"half_k = {row.half_k:.6g}\nhalf_outputs = {row.half_outputs:.6g}\n{mask}"
        f'per_matrix = {row.per_matrix_s:.6g}\noverhead = {row.overhead_s:.6g}\nsource = "measured"\n'
    )


def _stream_section(key: str, row: StreamRow) -> str:
    curve = ", ".join(f"[{nbytes:.0f}, {rate:.6g}]" for nbytes, rate in row.points)
    per_row = f"per_row = {row.per_row_s:.6g}\n" if row.per_row_s else ""
    return f'[device.{key}]\ncurve = [{curve}]\noverhead = {row.overhead_s:.6g}\n{per_row}source = "measured"\n'


def _level_sections(messages: Sequence[MessageTime]) -> list[str]:
    """One level for all ranks; latency and bandwidth from transfers, for group sizes without a curve."""
    curves: dict[tuple[str, int], list[MessageTime]] = {}
    for message in messages:
        curves.setdefault((message.kind, message.ranks), []).append(message)
    transfers = sorted(curves["transfer", 2], key=lambda message: message.nbytes)
    rate = transfers[-1].nbytes / transfers[-1].seconds
    sections = [
        f'[[levels]]\nname = "loopback"\nstart = 0.0\nlatency = {transfers[0].seconds:.6g}\n'
        f'bandwidth = {rate:.6g}\nefficiency = 1.0\nsource = "measured"\n'
    ]
    for (kind, ranks), taken in curves.items():
        points = ", ".join(f"[{m.nbytes}, {m.seconds:.6g}]" for m in sorted(taken, key=lambda m: m.nbytes))
        sections.append(f'[[levels.measured]]\nkind = "{kind}"\nranks = {ranks}\npoints = [{points}]\n')
    return sections
