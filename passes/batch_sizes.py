"""What of a graph depends on the batch's size, by comparing it at two sizes."""

from __future__ import annotations

from torch import fx

from cost_model.placement import Placement, Shard
from cost_model.tensor import TensorMeta
from passes.graph import Meta, ModelGraph, source_of
from passes.specialise import changed_sizes, twins


class CannotSplitError(Exception):
    """Why the batch cannot be split; caught where it is analysed."""


class Sizes:
    """What depends on the batch's size, from the graph at two sizes."""

    def __init__(self, model: ModelGraph, other: ModelGraph) -> None:
        self.model, self.other = model, other
        self.twins = twins(model, other)

    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.twins if n.op == "placeholder"]

    def _metas(self, node: fx.Node) -> list[tuple[TensorMeta, TensorMeta]]:
        """The node's tensors at both sizes."""
        a, b = _listed(self.model.metas[node.name]), _listed(self.other.metas[self.twins[node].name])
        return [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]

    def changes_shape(self, node: fx.Node) -> bool:
        return any(a != b for a, b in self._metas(node))

    def changes(self, node: fx.Node) -> bool:
        """Whether the call itself, operands aside, depends on the batch's size."""
        return self.changes_shape(node) or bool(changed_sizes(node, self.twins[node]))

    def batch_dims(self, node: fx.Node) -> list[int]:
        """Dims of a node's one tensor whose extent depends on the batch."""
        metas = self._metas(node)
        if len(metas) != 1 or len(metas[0][0].shape) != len(metas[0][1].shape):
            return []
        return [d for d, (a, b) in enumerate(zip(metas[0][0].shape, metas[0][1].shape, strict=True)) if a != b]

    def check(self, node: fx.Node, outputs: tuple[Placement, ...]) -> None:
        """CannotSplitError unless the call, at a smaller batch, computes the parts that ``outputs`` say."""
        for (a, b), place in zip(self._metas(node), outputs, strict=True):
            expected = list(a.shape)
            if isinstance(place, Shard):
                part, rest = divmod(expected[place.dim] * self.other.batch, self.model.batch)
                expected[place.dim] = -1 if rest else part
            if list(b.shape) != expected:
                raise CannotSplitError(f"{node.target} groups the samples of a batch by its size ({source_of(node)})")
        changed = [n for n in changed_sizes(node, self.twins[node]) if n not in ("size", "shape")]
        if changed:
            raise CannotSplitError(f"{changed[0]} of {node.target} depends on the batch's size ({source_of(node)})")


def _listed(meta: Meta) -> list[TensorMeta | None]:
    return [meta] if isinstance(meta, TensorMeta) else list(meta)
