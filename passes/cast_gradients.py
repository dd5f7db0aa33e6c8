"""Cast gradients: each finished gradient in the dtype that it is accumulated in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from passes import vocabulary
from passes.fakes import fake_tensor
from passes.graph import torch_dtype
from passes.storage import own_storage


def cast_gradients(backward: fx.Graph, dtypes: Mapping[str, str]) -> None:
    """Casts before the ``accumulate`` calls of a backward graph. dtypes: parameter -> that of its buffer."""
    for node in [n for n in backward.nodes if n.target is vocabulary.accumulate]:
        gradient, parameter = node.args
        assert isinstance(gradient, fx.Node)
        dtype = dtypes.get(str(parameter))
        if dtype is not None and gradient.meta["val"].dtype != torch_dtype(dtype):
            node.replace_input_with(gradient, _cast(backward, node, gradient, torch_dtype(dtype)))


def _cast(graph: fx.Graph, before: fx.Node, gradient: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A contiguous copy, just before the call that takes it."""
    with graph.inserting_before(before):
        made = graph.call_function(torch.ops.aten.to.dtype, (gradient, dtype))
    value = fake_tensor(gradient.meta["val"].shape, dtype)
    made.meta = {**gradient.meta, "val": value, "storage": own_storage(made)}
    return made
