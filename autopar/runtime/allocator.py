"""How a rank's process keeps memory: what tensors free stays with it."""

from __future__ import annotations

import ctypes
import os
import sys

_OPTIONS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back: mapping pages anew for every tensor makes adding two of 2 MiB ten times
    slower. Other C libraries are left as they are, and so is what the environment says.
    """
    if not sys.platform.startswith("linux"):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option in (number for variable, number in _OPTIONS.items() if variable not in os.environ):
            set_option(option, _LARGEST)
