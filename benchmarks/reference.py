"""Estimates held against published measurements.

    python benchmarks/reference.py [--data DIR] [--table NAME ...] [--json] [--fit]

For every row of a table: measured and estimated time (and memory, where it was measured), with the shipped device and
cluster files. --fit adds the constants that fit the table's rows best, and each model, network or case predicted from
constants that were fitted without it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference_a64fx import A64fx
from reference_autodist import AutoDistPipeline, AutoDistTensor
from reference_dtfm import Dtfm
from reference_megatron import Megatron
from reference_networks import Networks
from reference_tables import Prediction, Table

TABLES: tuple[type[Table], ...] = (AutoDistTensor, AutoDistPipeline, Megatron, Networks, Dtfm, A64fx)
DATA = Path(__file__).resolve().parent / "reference"


@dataclass(frozen=True)
class Errors:
    """mean: of absolute errors; bias: of signed ones; worst: the largest in size; under: the lowest."""

    mean: float
    bias: float
    worst: float
    under: float

    @staticmethod
    def of(values: Sequence[float]) -> Errors:
        return Errors(
            statistics.fmean(map(abs, values)), statistics.fmean(values), max(values, key=abs), min(0.0, *values)
        )

    def __str__(self) -> str:
        return f"mean {self.mean:.1%}, bias {self.bias:+.1%}, largest {self.worst:+.1%}, lowest {self.under:+.1%}"


def report(table: Table, *, fitted: bool) -> dict[str, Any]:
    """Everything that is said of a table, as plain values."""
    found = table.predict()
    memory = [p.memory_error for p in found if p.memory_error is not None]
    tree: dict[str, Any] = {
        "table": table.name,
        "rows": [_row(p) for p in found],
        "time": vars(Errors.of([p.time_error for p in found])),
        "memory": vars(Errors.of(memory)) if memory else None,
        "judged": dict(table.judged(found)),
        "constants": _constants(table),
    }
    if carried := table.carried():
        tree["carried"] = _scored(carried, table.predict({**table.shipped(), **carried}))
    if fitted and table.constants:
        own = table.fitted(lambda row: row.fits)
        tree["fitted"] = _scored(own, table.predict(own, lambda row: row.fits))
        tree["left_out"] = _left_out(table)
    return tree


def _scored(constants: Mapping[str, float], found: Sequence[Prediction]) -> dict[str, Any]:
    return {"constants": dict(constants), "time": vars(Errors.of([p.time_error for p in found]))}


def _row(p: Prediction) -> dict[str, Any]:
    return {
        "row": p.row.label,
        "plan": p.text,
        "measured_s": p.row.measured_s,
        "estimated_s": p.seconds,
        "time_error": p.time_error,
        "measured_bytes": p.row.measured_bytes,
        "estimated_bytes": p.peak_bytes,
        "memory_error": p.memory_error,
    }


def _constants(table: Table) -> list[dict[str, Any]]:
    values = table.shipped()
    rows = [row.label for row in table.rows if row.fits]
    return [
        {"name": c.name, "value": values[c.name], "low": c.low, "high": c.high, "why": c.why, "rows": rows}
        for c in table.constants
    ]


def _left_out(table: Table) -> dict[str, Any]:
    groups = table.left_out()
    errors = [p.time_error for _, _, own in groups for p in own]
    cases = {name: _scored(constants, own) for name, constants, own in groups}
    return {"time": vars(Errors.of(errors)) if errors else None, "groups": cases}


def show(tree: Mapping[str, Any]) -> None:
    """As a table of text."""
    print(f"\n{tree['table']}")
    for row in tree["rows"]:
        memory = ""
        if row["memory_error"] is not None:
            gib = 2**30
            memory = (
                f"{row['measured_bytes'] / gib:8.2f}{row['estimated_bytes'] / gib:8.2f} GiB{row['memory_error']:+8.1%}"
            )
        times = f"{row['measured_s']:10.2f}{row['estimated_s']:10.2f} s{row['time_error']:+8.1%}"
        print(f"  {row['row']:34}{times}  {memory:28} {row['plan']}")
    print(f"  time: {Errors(**tree['time'])}")
    if tree["memory"]:
        print(f"  memory: {Errors(**tree['memory'])}")
    for name, value in tree["judged"].items():
        print(f"  {name}: {value:.4f}")
    for constant in tree["constants"]:
        span = f"{constant['low']:g} to {constant['high']:g}"
        print(f"  constant: {constant['name']} = {constant['value']:g} ({span}: {constant['why']})")
    if "carried" in tree:
        print(f"  nothing fitted: {Errors(**tree['carried']['time'])}; {_short(tree['carried']['constants'])}")
    if "fitted" in tree:
        print(f"  fitted to these rows: {Errors(**tree['fitted']['time'])}; {_short(tree['fitted']['constants'])}")
        if tree["left_out"]["time"]:
            print(f"  each left out: {Errors(**tree['left_out']['time'])}")
        for name, case in tree["left_out"]["groups"].items():
            print(f"    without {name}: {Errors(**case['time'])}; {_short(case['constants'])}")


def _short(constants: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in constants.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the tables")
    parser.add_argument("--table", nargs="*", choices=[t.name for t in TABLES], help="tables (default: all)")
    parser.add_argument("--fit", action="store_true", help="fit constants, and leave each group out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    trees = []
    for kind in TABLES:
        if options.table and kind.name not in options.table:
            continue
        start = time.perf_counter()
        table = kind(options.data)
        trees.append({**report(table, fitted=options.fit), "seconds": time.perf_counter() - start})
        if not options.json:
            show(trees[-1])
    if options.json:
        print(json.dumps(trees, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
