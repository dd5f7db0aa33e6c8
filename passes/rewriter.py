"""Building fx graphs with metas: what every pass that makes nodes shares."""

from __future__ import annotations

from typing import Any

from torch import fx

from cost_model.tensor import TensorMeta
from passes.graph import Meta, copied_node


class GraphBuilder:
    """A new graph and the metas of its nodes, grown in execution order."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.metas: dict[str, Meta] = {}

    def placeholder(self, name: str, meta: Meta) -> fx.Node:
        node = self.graph.placeholder(name)
        self.metas[node.name] = meta
        return node

    def call(
        self,
        target: Any,
        args: tuple[Any, ...],
        meta: Meta,
        *,
        like: fx.Node | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Append a call; ``like`` lends its source annotations."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        self.metas[node.name] = meta
        if like is not None:
            node.meta.update({k: v for k, v in like.meta.items() if k in SOURCE_KEYS})
        return node

    def copy(self, node: fx.Node, mapped: dict[fx.Node, Any], meta: Meta) -> fx.Node:
        """Append a copy of ``node`` with operands replaced through ``mapped``, keeping its name where it is free."""
        made = copied_node(self.graph, node, mapped)
        made.meta = {k: v for k, v in node.meta.items() if k in SOURCE_KEYS}
        self.metas[made.name] = meta
        return made

    def tensor(self, node: fx.Node) -> TensorMeta:
        meta = self.metas[node.name]
        assert isinstance(meta, TensorMeta), node
        return meta


PICKED = "picked"
FIRST, MASK, LAST, LOSS = "first", "mask", "last", "loss"
"""What a call is to rows that a mask picks (``passes.pick``): where they begin, what says which they are, where those
that are not picked become zero, and a loss that ignores them."""
SOURCE_KEYS = ("nn_module_stack", "stack_trace", "segment", PICKED)
