"""Kernels of a rank's program, compiled by torch.compile as the program is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

Tree = Any
_CALLS, _ROUNDS = 50, 21


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a kernel for operands of the first call's shapes and strides.

    Programs have one shape each, which the kernel checks itself, so torch.compile's guards would only cost time.
    """
    made: Callable[..., Any] = torch.compile(
        function,
        backend="inductor",
        fullgraph=True,
        dynamic=False,
        options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
    )
    return made


def compile_kernels(namespace: MutableMapping[str, Any], kernels: Mapping[str, Tree], device: torch.device) -> None:
    """Put compiled kernels in place of a program's functions; kernels: name -> (shape, stride, dtype) of each operand.

    Each is called once, so that nobody waits for a compiler within a step.
    """
    for name, operands in kernels.items():
        namespace[name] = compiled(namespace[name])
        with torch.no_grad():
            namespace[name](*(_zeros(operand, device) for operand in operands))


def _zeros(operand: Tree, device: torch.device) -> Tensor:
    shape, stride, dtype = operand
    return torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device=device).zero_()


class CallTimer:
    """A rank that measures what calling a kernel costs, whatever it computes."""

    def __init__(self, *, rank: int, world_size: int, payload: Tree) -> None:
        namespace: dict[str, Any] = {"small": lambda x, y: torch.tanh(x + y) * y}
        operand = ([8], [1], "float32")
        compile_kernels(namespace, {"small": (operand, operand)}, torch.device("cpu"))
        self._call = namespace["small"]

    def call_s(self, payload: Tree) -> float:
        """CPU seconds of a call: the median of some rounds."""
        x, y, samples = torch.ones(8), torch.ones(8), []
        with torch.no_grad():
            for _ in range(_ROUNDS):
                start = time.thread_time()
                for _ in range(_CALLS):
                    self._call(x, y)
                samples.append((time.thread_time() - start) / _CALLS)
        return sorted(samples)[len(samples) // 2]
