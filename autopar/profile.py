"""Profile: this machine measured anew and kept, and what was found as text and as a tree."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from autopar.calibrate import cache_path, local_cluster
from autopar.report import bytes_text, make_table, render, seconds_text
from cost_model.cluster import Cluster
from cost_model.device_rows import GemmRow, Row
from cost_model.errors import ConfigError


@dataclass(frozen=True)
class Profile:
    """cluster: as ``Cluster.local`` gives it from now on; path: its file, None where nothing had to be measured."""

    cluster: Cluster
    path: Path | None

    def summary(self) -> str:
        """Where it is kept, then tables of the device and of the links."""
        device = self.cluster.devices[0]
        kept = (
            f"kept in {self.path}" if self.path else "CUDA devices are priced by their shipped file; nothing measured"
        )
        head = f"{self.cluster.num_devices} x {device.name}\n{kept}\n"
        return render(head, self._ops(), *([self._messages()] if self.cluster.levels else []))

    def as_dict(self) -> dict[str, Any]:
        """Every figure in SI units."""
        device = self.cluster.devices[0]
        return {
            "path": None if self.path is None else str(self.path),
            "num_devices": self.cluster.num_devices,
            "backend": self.cluster.backend,
            "device": device.name,
            "memory_bytes": device.memory_bytes,
            "reserve_bytes": device.reserve_bytes,
            "peak_flops": dict(device.peak_flops),
            "kinds": {kind: _rate(row, max(device.peak_flops.values())) for kind, row in device.rows.items()},
            "messages": [
                {"kind": curve.kind, "ranks": curve.ranks, "points": [list(point) for point in curve.points]}
                for level in self.cluster.levels
                for curve in level.measured
            ],
        }

    def _ops(self) -> Group:
        device = self.cluster.devices[0]
        peak = device.peak_flops.get("float32", max(device.peak_flops.values()))
        rows = []
        for kind, row in device.rows.items():
            rate = _rate(row, peak)
            unit = "GFLOP/s" if "flops_per_s" in rate else "GB/s"
            rows.append((kind, f"{next(iter(rate.values())) / 1e9:.3g} {unit}", seconds_text(rate["overhead_s"])))
        return make_table("Ops: rate of the largest, in float32, and overhead", ("kind", "rate", "overhead"), rows)

    def _messages(self) -> Group:
        rows = [
            (
                curve.kind,
                str(curve.ranks),
                seconds_text(curve.points[0][1]),
                f"{curve.points[-1][0] / curve.points[-1][1] / 1e9:.3g} GB/s",
            )
            for level in self.cluster.levels
            for curve in level.measured
        ]
        sizes = [size for level in self.cluster.levels for curve in level.measured for size, _ in curve.points]
        span = f" of {bytes_text(min(sizes))} to {bytes_text(max(sizes))}" if sizes else ""
        return make_table(f"Messages{span}", ("kind", "ranks", "smallest", "largest"), rows)


def _rate(row: Row, peak_flops: float) -> dict[str, float]:
    if isinstance(row, GemmRow):
        return {"flops_per_s": peak_flops * row.efficiency, "overhead_s": row.overhead_s}
    return {"bytes_per_s": row.points[-1][1], "overhead_s": row.overhead_s}


def profile(num_devices: int, save: Path | None = None) -> Profile:
    """Measure so many ranks of this machine at once, keep the result for ``Cluster.local``, and copy it to ``save``.

    Errors: ConfigError, WorkerError.
    """
    cluster = local_cluster(num_devices, refresh=True)
    path = cache_path(num_devices)
    measured = cluster.backend == "gloo" and path.exists()
    if save is not None:
        if not measured:
            raise ConfigError("nothing was measured that could be saved: CUDA devices have shipped files; leave --save")
        shutil.copyfile(path, save)
    return Profile(cluster, path if measured else None)
