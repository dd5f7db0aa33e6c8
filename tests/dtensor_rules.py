"""What torch's DTensor offers for a call, asked of its private tables: run as a process of its own.

    python tests/dtensor_rules.py [OP ...]

Without ops it prints a JSON list of the names of all that DTensor knows. Else it prints a JSON line an op that DTensor
knows: its name, and for its example call (see ``op_examples.example``) the combinations that DTensor takes on an axis
of two ranks without redistributing anything, as [inputs, outputs] of "R", "P" or "S(dim)".
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree

sys.path.append(str(Path(__file__).parent))
from op_calls import Case, function_of
from op_examples import example

RANKS = 2
MOST_COMBINATIONS = 400
_TABLES = DTensor._op_dispatcher.sharding_propagator  # type: ignore[attr-defined]


def ruled(name: str) -> bool:
    op = function_of(name)
    return op in _TABLES.op_single_dim_strategy_funcs or op in _TABLES.op_strategy_funcs or op in _TABLES.op_to_rules


def known() -> list[str]:
    ops = (*_TABLES.op_single_dim_strategy_funcs, *_TABLES.op_strategy_funcs, *_TABLES.op_to_rules)
    return sorted({str(op) for op in ops})


def offered(case: Case, mesh: Any) -> Iterator[tuple[list[str], list[str]]]:
    """Every combination of input placements that needs no redistribution, with what comes out."""
    choices = [_choices(t) for t in case.tensors]
    for places in itertools.islice(itertools.product(*choices), MOST_COMBINATIONS):
        outputs = _outputs(case, places, mesh)
        if outputs is not None and any(not isinstance(p, Replicate) for p in places):
            yield [_text(p) for p in places], [_text(p) for p in outputs]


def _choices(tensor: torch.Tensor) -> list[Any]:
    dims = [Shard(d) for d, extent in enumerate(tensor.shape) if extent % RANKS == 0 and extent]
    return [Replicate(), *dims, *([Partial()] if tensor.is_floating_point() else [])]


def _outputs(case: Case, places: tuple[Any, ...], mesh: Any) -> list[Any] | None:
    """None where DTensor has no such strategy, or an error in place of one."""
    given = iter(zip(case.tensors, places, strict=True))

    def spec(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        tensor, place = next(given)
        meta = TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)
        return DTensorSpec(mesh, (place,), tensor_meta=meta)

    op = function_of(case.name)
    args, kwargs = pytree.tree_map(spec, (case.args, case.kwargs))
    known = _TABLES.op_to_schema_info.get(op) or _TABLES.op_to_schema_info_for_single_dim_strategy.get(op)
    try:
        found = _TABLES.propagate_op_sharding_non_cached(OpSchema(op, args, kwargs, schema_info=known))
    except (RuntimeError, NotImplementedError):  # how it refuses a combination
        return None
    specs = [s for s in pytree.tree_leaves(found.output_spec, is_leaf=_is_spec) if _is_spec(s)]
    if found.needs_redistribute or not specs or any(len(s.placements) != 1 for s in specs):
        return None
    return [s.placements[0] for s in specs]


def _is_spec(value: Any) -> bool:
    return isinstance(value, DTensorSpec)


def _text(place: Any) -> str:
    if isinstance(place, Shard):
        return f"S({place.dim})"
    if isinstance(place, Partial):
        return "P" if place.reduce_op == "sum" else f"P({place.reduce_op})"
    return "R" if isinstance(place, Replicate) else str(place)


def main() -> None:
    if len(sys.argv) == 1:
        print(json.dumps(known()))
        return
    logging.disable(logging.CRITICAL)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for name in sys.argv[1:]:
        if ruled(name):
            print(json.dumps([name, list(offered(example(name), mesh))]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
