"""A measured step as a Chrome trace that lies beside the estimated one, under the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autopar.runtime.measure import Event, stream_of, title_of
from cost_model.cluster import Cluster
from cost_model.program import Program
from cost_model.rank_clock import STREAMS
from cost_model.simulate import chrome_trace, simulate

_MEASURED = 1000  # added to a rank for its process in the trace, where the estimate's processes are stages


def step_trace(program: Program, cluster: Cluster, ranks: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """The trace event format of chrome://tracing and Perfetto: a process for each stage as estimated, and for each rank
    as measured, from the moment all ranks were ready. Of a send the wait for its end is measured.

    ranks: what ``RankExecutor.trace`` returned, in order.
    """
    trace = chrome_trace(simulate(program, cluster))
    events = trace["traceEvents"]
    assert isinstance(events, list)
    for event in events:
        if event["name"] == "process_name":
            event["args"] = {"name": f"{event['args']['name']}, estimated"}
    for rank, found in enumerate(ranks):
        process = _MEASURED + rank
        names = {"process_name": [f"rank {rank} of stage {found['stage']}, measured"], "thread_name": list(STREAMS)}
        events += [
            {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}
            for kind, labels in names.items()
            for thread, name in enumerate(labels)
        ]
        events += [_event(Event(*item), process, found["start_s"]) for item in found["events"]]
    return trace


def _event(event: Event, process: int, start_s: float) -> dict[str, object]:
    return {
        "ph": "X",
        "name": title_of(event.name, event.microbatch, event.label, event.chunk),
        "pid": process,
        "tid": STREAMS.index(stream_of(event.name)),
        "ts": (event.start_s - start_s) * 1e6,
        "dur": (event.end_s - event.start_s) * 1e6,
    }
