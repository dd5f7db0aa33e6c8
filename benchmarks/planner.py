"""Time of planning, tracing included, and the gap it leaves, for GPTs of 1.3B to 1T parameters; nothing is run.

    python benchmarks/planner.py [CASE ...] [--depths | --given]

Prints the seconds on the clock and of the processor (imports excluded), the chosen plan, its step time and peak memory,
and whether time and gap stay within the case's limits. --depths: the same model 12 to 96 layers deep instead, and how
much longer the deepest takes than the shallowest. --given: the published plans instead, of those cases that have one,
estimated from the plan as a user loads it, five times, the median told. The limits are of seconds on the clock: run it
alone on the machine.
The exit code is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

from planner_cases import CASES, DEPTHS, PUBLISHED, Case

import autopar

DEPTH_FACTOR = 2.0
GIVEN_LIMIT_S = 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(c.name for c in CASES)}; default: all")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--depths", action="store_true")
    instead.add_argument("--given", action="store_true")
    arguments = parser.parse_args()
    assert autopar.estimate  # what is imported on first use is imported now
    if arguments.depths:
        return _depths()
    unknown = set(arguments.cases) - {case.name for case in CASES}
    if unknown:
        parser.error(f"no case is called {', '.join(sorted(unknown))}")
    chosen = [case for case in CASES if not arguments.cases or case.name in arguments.cases]
    if arguments.given:
        slow = [case.name for case in chosen if case.name in PUBLISHED and _given(case) > GIVEN_LIMIT_S]
        return int(bool(slow))
    late = [case.name for case in chosen if measured(case) > case.limit_s]
    return int(bool(late))


def measured(case: Case) -> float:
    """Plan a case, print its row, and return the seconds on the clock; infinity where the gap is too large."""
    (model, inputs), cluster = case.model(), case.load_cluster()
    wall, own = time.perf_counter(), time.process_time()
    found = autopar.estimate(model, cluster, inputs, memory_cap=case.memory_cap)
    wall, own = time.perf_counter() - wall, time.process_time() - own
    plan = found.plan
    print(
        f"{case.name} on {case.devices}: {wall:.1f} s of {case.limit_s:.0f} s, processor {own:.1f} s; "
        f"gap {found.gap:.2%} of {case.gap:.0%}; dp={plan.dp} tp={plan.tp} pp={plan.pp} {plan.microbatches} x "
        f"{plan.microbatch_size}{plan.saving_text()}, step {found.step_time_s:.3f} s, "
        f"peak {found.peak_bytes / 2**30:.2f} of {plan.memory_cap_bytes / 2**30:.2f} GiB",
        flush=True,
    )
    return wall if found.gap <= case.gap else float("inf")


def _given(case: Case, repeats: int = 5) -> float:
    """The median seconds on the clock that an estimate of the case's published plan takes, tracing included."""
    (model, inputs), cluster = case.model(), case.load_cluster()
    name, pins = PUBLISHED[case.name][0]
    plan = autopar.estimate(model, cluster, inputs, parallelism=pins, memory_cap=case.memory_cap).plan
    walls, owns = [], []
    for _ in range(repeats):
        model, inputs = case.model()
        wall, own = time.perf_counter(), time.process_time()
        found = autopar.estimate(model, cluster, inputs, plan=plan)
        walls.append(time.perf_counter() - wall)
        owns.append(time.process_time() - own)
    median_s = statistics.median(walls)
    print(
        f"{case.name}, {name} plan on {case.devices}: {median_s:.2f} s of {GIVEN_LIMIT_S:.0f} s "
        f"({min(walls):.2f} to {max(walls):.2f}), processor {statistics.median(owns):.2f} s; "
        f"step {found.step_time_s:.3f} s",
        flush=True,
    )
    return median_s


def _depths(cases: Sequence[Case] = DEPTHS) -> int:
    seconds = [measured(case) for case in cases]
    factor = seconds[-1] / seconds[0]
    print(f"{cases[-1].layers / cases[0].layers:.0f} times the layers: {factor:.2f} times the time, of {DEPTH_FACTOR}")
    return int(factor > DEPTH_FACTOR)


if __name__ == "__main__":
    sys.exit(main())
