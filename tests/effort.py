"""How much random tests draw: all of it where slow tests run too, a part where they are left out (``make test``)."""

from __future__ import annotations

import os

FEWER = 3
LEFT_OUT = "AUTOPAR_SLOW_TESTS_ARE_LEFT_OUT"
"""Set for this process and those it starts."""


def drawn(count: int) -> int:
    """Of so many examples, those that this run draws."""
    return max(1, count // FEWER) if LEFT_OUT in os.environ else count
