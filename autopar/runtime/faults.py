"""What a backend says of ranks that are late or gone, as errors that name them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from cost_model.errors import CollectiveTimeoutError, LostRankError

LOST = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "remote process exited")
"""gloo, sockets, nccl."""
_TIMED_OUT = ("timed out", "timeout caused pair closure")  # gloo: the wait itself, and others on the same connection


def _nobody_known() -> None:
    """Any rank of a group may be meant."""


@contextlib.contextmanager
def named_faults(
    rank: int, timeout_s: float | None = None, peer: Callable[[], int | None] = _nobody_known
) -> Iterator[None]:
    """CollectiveTimeoutError and LostRankError for what a backend says when another rank did not come, or has ended.

    rank: this one; peer: whom it waits for where that is known, asked for when something has failed.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if any(words in text for words in _TIMED_OUT):
            raise CollectiveTimeoutError(rank, timeout_s, peer()) from error
        if any(words in text for words in LOST):
            raise LostRankError(rank, peer()) from error
        raise
