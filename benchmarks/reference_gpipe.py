"""GPipe as DT-FM runs it: one stream for sends and one for receives, over one communicator.

DT-FM pipeline_parallel/dist_gpipe_pipeline_async.py: a stage queues receive, block and send of each microbatch in this
order. NCCL up to 2.12 lets what is queued on another stream of a communicator wait for the kernel queued before
(src/enqueue.cc), so a stage receives no microbatch before its send of the last one has left it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_model.collectives import Link

BUFFER_BYTES = 6.3e6
"""What buffers of NCCL and of sockets hold of a message. The table of three shaped networks shows messages of 6.3 MB
sent and received as if nothing waited for them, DT-FM's table that 8.4 MB are not."""


@dataclass(frozen=True)
class Hop:
    """Messages from a stage to the next one: seconds on the wire, how long what is held anywhere takes to pass it, and
    seconds on the way that keep nobody busy."""

    wire_s: float
    held_s: float
    delay_s: float

    @classmethod
    def of(cls, nbytes: int, link: Link, added_s: float) -> Hop:
        """added_s: what both ends spend on a message beside the link. What is under way is held too."""
        rate = link.bandwidth_bytes_per_s
        return cls(nbytes / rate, BUFFER_BYTES / rate + link.latency_s, link.latency_s + added_s)


def half_pass_s(blocks_s: Sequence[float], hops: Sequence[Hop], microbatches: int) -> float:
    """Seconds until the last stage has run its block of every microbatch. blocks_s: of each stage, in the order in
    which microbatches pass them; hops: from each but the last."""
    last = len(hops)
    done, free, left = [0.0] * (last + 1), [0.0] * (last + 1), [0.0] * last
    for _ in range(microbatches):
        arrived = 0.0
        for stage, hop in enumerate(hops):
            done[stage] = max(done[stage], arrived) + blocks_s[stage]
            begun, heard = max(done[stage], free[stage]), free[stage + 1]
            left[stage] = max(begun, left[stage], heard - hop.held_s) + hop.wire_s
            free[stage] = max(begun, left[stage] - hop.held_s)
            arrived = max(left[stage] + hop.delay_s, heard)
        free[last] = arrived
        done[last] = max(done[last], arrived) + blocks_s[last]
    return max(done)
