"""From what a calibration timed to what is usual: each thing by its own low, at the rate that all of them tell.

On a shared machine a single time is right or too long, by as much as others disturbed it, and lows repeat from one
calibration to the next where medians do not. But steps run at the usual rate, not at the best: how much longer than
their lows things take is said by all of them together, which no single disturbance moves.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Seconds: TypeAlias = NDArray[np.float64]
_LOW = 0.15
"""The quantile that is a low; the least of all may be a fluke of the clock."""


def usual_seconds(times: Seconds) -> Seconds:
    """Seconds of each thing, from times by (thing, pass, rank), each the median of several calls.

    The rate of a rank in a pass is the median over things of their time over their low. All ranks wait for the slowest,
    and what is usual is the median over passes of the slowest rank's rate.
    """
    things, _, _ = times.shape
    low = np.quantile(times.reshape(things, -1), _LOW, axis=1)
    rates = np.median(times / low[:, None, None], axis=0)
    usual: Seconds = low * float(np.median(rates.max(axis=1)))
    return usual
