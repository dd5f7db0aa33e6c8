"""autopar: compile an ordinary PyTorch model into a distributed program, and know beforehand what it costs.

Names load on first use, all at once, so that worker processes, which use none, start quickly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import cost_model as _cost_model
import passes as _passes

if TYPE_CHECKING:
    from autopar.api import compile, estimate
    from autopar.cluster import Cluster
    from autopar.comparison import Comparison, compare
    from autopar.deferral import deferred
    from autopar.executable import Executable
    from autopar.explanation import Explanation, explain
    from autopar.sizing import size_cost, size_days, size_model, size_nodes
    from cost_model import errors
    from cost_model.estimate import Estimate
    from cost_model.parallelism import Parallelism
    from cost_model.plan import Plan
    from cost_model.precision import Precision

__version__ = "0.1.0"

for _module in (_cost_model, _passes):
    if getattr(_module, "PACKAGE", None) != "autopar":
        raise ImportError(
            f"{_module.__file__} shadows autopar's package {_module.__name__!r}; rename it or change sys.path"
        )

_HOMES = {
    "compile": "autopar.api",
    "estimate": "autopar.api",
    "Cluster": "autopar.cluster",
    "compare": "autopar.comparison",
    "Comparison": "autopar.comparison",
    "deferred": "autopar.deferral",
    "Executable": "autopar.executable",
    "explain": "autopar.explanation",
    "Explanation": "autopar.explanation",
    "Estimate": "cost_model.estimate",
    "Parallelism": "cost_model.parallelism",
    "Plan": "cost_model.plan",
    "Precision": "cost_model.precision",
    "errors": "cost_model",
    "register_rule": "autopar.rules",
    "size_cost": "autopar.sizing",
    "size_days": "autopar.sizing",
    "size_model": "autopar.sizing",
    "size_nodes": "autopar.sizing",
}
__all__ = [
    "Cluster",
    "Comparison",
    "Estimate",
    "Executable",
    "Explanation",
    "Parallelism",
    "Plan",
    "Precision",
    "compare",
    "compile",
    "deferred",
    "errors",
    "estimate",
    "explain",
    "register_rule",
    "size_cost",
    "size_days",
    "size_model",
    "size_nodes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    homes = {home: importlib.import_module(home) for home in dict.fromkeys(_HOMES.values())}
    return getattr(homes[_HOMES[name]], name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
