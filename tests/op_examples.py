"""Example calls of the op table, for which `autopar coverage` shows maps: drawn as those of the proofs, kept in a file.

    python tests/op_examples.py

Run it after adding an op; a test fails until then.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
from op_calls import Case
from op_draws import CALLS, Draw

from cost_model.factors import FactorMap
from cost_model.ops import OPS, Ref

FILE = Path(__file__).parent.parent / "cost_model" / "ops" / "examples.json"
SEEDS = 40


class Seeded(Draw):
    """Draws from a seed."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)


def example(name: str) -> Case:
    """Of a few calls, the one whose map tells most: the most factors that may be split, then the most of all."""
    cases = []
    for seed in range(SEEDS):
        drawn = CALLS[name](Seeded(seed))
        args, kwargs = (drawn[:-1], drawn[-1]) if drawn and isinstance(drawn[-1], dict) else (drawn, {})
        case = Case(name, args, kwargs)
        rule = OPS[name].factors(case.call)
        cases.append((_told(rule), -seed, case))
    return max(cases, key=lambda item: item[:2])[2]


def _told(rule: FactorMap | None) -> tuple[int, int]:
    return (0, 0) if rule is None else (len(set(rule.sizes) - rule.whole), len(rule.sizes))


def as_tree(case: Case) -> dict[str, Any]:
    call = case.call
    return {
        "inputs": [[m.dtype, list(m.shape)] for m in call.inputs],
        "outputs": [[m.dtype, list(m.shape)] for m in call.outputs],
        "args": {key: _plain(value) for key, value in call.args.items()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"input": value.index}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value if value != float("inf") and value != -float("inf") else str(value)
    return str(value).removeprefix("torch.")


def main() -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(as_tree(example(name)))}" for name in sorted(CALLS)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
