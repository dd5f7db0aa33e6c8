"""How many things a kernel handles one by one beside the bytes it moves, and whose kernel an op runs.

A kernel that works along rows begins each of them anew, so narrow rows take longer than their bytes say; one that
looks things up finds each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest

from cost_model.ops.table import OpCall, Ref, dims_of
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta

Price = Callable[[OpCall], OpCost]
VECTOR_BYTES = 64
"""Of the widest vectors of CPUs: softmax takes rows shorter than that number by number (ATen/cpu/vec/functional)."""


def counting(price: Price, rows: Callable[[OpCall], int]) -> Price:
    """A price that says how many things are handled one by one."""
    return lambda call: replace(price(call), rows=rows(call))


def alike(name: str, price: Price) -> Price:
    """The price of an op that runs the kernel of another, or one that takes as long: it goes by that one's row."""
    return lambda call: replace(price(call), op=name)


def reduced_rows(call: OpCall) -> int:
    """Rows that end in one number each; none where what is reduced lies apart, which goes by vectors."""
    rank = len(call.inputs[0].shape)
    return call.outputs[0].numel if rank - 1 in dims_of(call, "dim", rank) else 0


def softmax_rows(call: OpCall) -> int:
    """Rows, or numbers where a row is shorter than a vector; none across rows, which goes by vectors."""
    source = call.inputs[0]
    rank = len(source.shape)
    if dims_of(call, "dim", rank) != (rank - 1,):
        return 0
    width = source.shape[-1]
    is_short = width * source.nbytes < VECTOR_BYTES * source.numel
    return source.numel if is_short else source.numel // max(width, 1)


def looked_up(indices: Sequence[object], source: TensorMeta, inputs: Sequence[TensorMeta]) -> int:
    """Pieces that ``source[indices]`` finds: each is contiguous, what follows on the last dim that is indexed."""
    metas = {d: inputs[term.index] for d, term in enumerate(indices) if isinstance(term, Ref)}
    shapes = (reversed(meta.shape) for meta in metas.values())
    found = math.prod(max(sizes) for sizes in zip_longest(*shapes, fillvalue=1))
    before = (extent for d, extent in enumerate(source.shape[: max(metas, default=0)]) if d not in metas)
    return found * math.prod(before)


def strided_elements(call: OpCall) -> int:
    """Elements that gather and scatter find across rows; none along them."""
    index = call.inputs[1]
    rank = len(index.shape)
    return 0 if dims_of(call, "dim", rank) == (rank - 1,) or not rank else index.numel
