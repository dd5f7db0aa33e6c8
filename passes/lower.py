"""Lower: a split graph becomes a function of lines, each one generated line and one priced instruction.

The line that is printed and the instruction that is priced are made together from the same node: where a value
dies, what a collective moves and what shares memory are decided here, once.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from cost_model.ops import price_of
from cost_model.placement import Shard
from cost_model.program import Block, Collective, Instruction, OpCost, Value
from cost_model.tensor import TensorMeta
from passes.calls import call_of
from passes.graph import Meta, is_getitem, meta_of, op_name
from passes.group import Kernel
from passes.operand_copies import copied_bytes
from passes.overlap_vocabulary import BEGIN, BEGINS, ENDS, complete
from passes.storage import is_view, storage_of
from passes.workspace import workspace_bytes

CPU = "cpu"
_COLLECTIVES = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"}


@dataclass(frozen=True)
class Line:
    """outputs: variable names, "_" where unused; deletes: variables whose last use this is; in_place: an all_reduce
    that overwrites its operand; instruction: what it costs.
    """

    node: fx.Node
    outputs: tuple[str, ...]
    deletes: tuple[str, ...]
    in_place: bool
    instruction: Instruction
    label: str


@dataclass(frozen=True)
class Function:
    """inputs: variable names; owned: those the function may free; results: variables returned, in order."""

    name: str
    inputs: tuple[str, ...]
    owned: tuple[str, ...]
    lines: tuple[Line, ...]
    results: tuple[str, ...]
    block: Block


class Storages:
    """Names and sizes of the storages of one stage, shared by its functions: the first value in each says both.

    An all_reduce in place passes its operand's storage on to its result. Later values may say otherwise: what was
    traced as the input of a segment may be part of what another made or a message brought, or one number read many
    times.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._given = dict(names)
        self._names: dict[Hashable, str] = {}
        self._sizes: dict[Hashable, int] = {}

    def of(self, node: fx.Node) -> str:
        return self._names.setdefault(storage_of(node), self._given.get(node.name, node.name))

    def pass_on(self, source: fx.Node, target: fx.Node) -> None:
        self._names[storage_of(target)], self._sizes[storage_of(target)] = self.of(source), self.bytes_of(source)

    def bytes_of(self, node: fx.Node) -> int:
        return self._sizes.setdefault(storage_of(node), int(node.meta["val"].untyped_storage().nbytes()))


def lower(
    graph: fx.Graph,
    name: str,
    owned: frozenset[str],
    returned: tuple[str, ...],
    storages: Storages,
    device_kind: str = CPU,
) -> Function:
    """``owned``: inputs handed over, which the function may free; ``returned``: values the function returns."""
    return _Lower(graph, name, owned, returned, storages, device_kind).run()


class _Lower:
    def __init__(
        self,
        graph: fx.Graph,
        name: str,
        owned: frozenset[str],
        returned: tuple[str, ...],
        storages: Storages,
        device_kind: str,
    ) -> None:
        self.name, self.owned, self.returned, self.storages = name, owned, returned, storages
        self.device_kind = device_kind
        self.nodes = [n for n in graph.nodes if n.op != "output"]
        self.metas: dict[str, Meta] = {n.name: m for n in self.nodes if (m := meta_of(n.meta.get("val"))) is not None}
        self.inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.calls = [n for n in self.nodes if n.op == "call_function" and not is_getitem(n)]
        self.last = self._last_uses()
        self.alive: dict[str, set[str]] = {}

    def _last_uses(self) -> dict[str, int]:
        """Variable -> index of the line after which it is not needed."""
        last: dict[str, int] = {}
        for index, node in enumerate(self.calls):
            for operand in node.all_input_nodes:
                last[operand.name] = index
            for out in self._variables(node):
                last.setdefault(out.name, index)
        for node in self.inputs:
            last.setdefault(node.name, -1)
        return last

    def _variables(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that name a call's results: itself, or its getitems."""
        meta = self.metas.get(node.name)
        if meta is None:
            return []
        return [u for u in node.users if is_getitem(u)] if isinstance(meta, tuple) else [node]

    def run(self) -> Function:
        values = tuple(self._value(n) for n in self.inputs)
        for node in self.inputs:
            self._hold(node)
        lines: list[Line] = []
        for index, node in enumerate(self.calls):
            lines.append(self._line(index, node))
        block = Block(self.name, values, tuple(line.instruction for line in lines), self.returned)
        names = tuple(n.name for n in self.inputs)
        return Function(
            self.name, names, tuple(n for n in names if n in self.owned), tuple(lines), self.returned, block
        )

    # --- storages

    def _value(self, node: fx.Node) -> Value:
        meta = self.metas[node.name]
        assert isinstance(meta, TensorMeta)
        return Value(node.name, meta, self.storages.of(node), self.storages.bytes_of(node))

    def _hold(self, node: fx.Node) -> None:
        self.alive.setdefault(self.storages.of(node), set()).add(node.name)

    def _release(self, index: int, node: fx.Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(variables to delete, storages that die) after line ``index``."""
        ended = [n for n in (*node.all_input_nodes, *self._variables(node)) if self.last[n.name] == index]
        ended = [n for n in dict.fromkeys(ended) if self._may_end(n)]
        frees = []
        for dead in ended:
            holders = self.alive[self.storages.of(dead)]
            holders.discard(dead.name)
            if not holders:
                frees.append(self.storages.of(dead))
        return tuple(n.name for n in ended), tuple(dict.fromkeys(frees))

    def _may_end(self, node: fx.Node) -> bool:
        if node.name in self.returned:
            return False
        return node.op == "call_function" or node.name in self.owned

    # --- lines

    def _line(self, index: int, node: fx.Node) -> Line:
        in_place = self._reduces_in_place(index, node)
        if in_place:
            self.storages.pass_on(node.all_input_nodes[0], node)
        variables = self._variables(node)
        for variable in variables:
            self._hold(variable)
        meta = self.metas.get(node.name)
        outputs = ["_"] * (len(meta) if isinstance(meta, tuple) else 0 if meta is None else 1)
        for variable in variables:
            outputs[variable.args[1] if is_getitem(variable) else 0] = variable.name  # type: ignore[index]
        deletes, frees = self._release(index, node)
        unused = ("_",) if "_" in outputs else ()
        instruction = self._instruction(node, variables, in_place, frees)
        return Line(node, tuple(outputs), (*deletes, *unused), in_place, instruction, label_of(node))

    def _instruction(
        self, node: fx.Node, variables: list[fx.Node], in_place: bool, frees: tuple[str, ...]
    ) -> Instruction:
        collective = _collective(node, self.metas)
        cost, workspace = self._work(node, in_place, collective)
        return Instruction(
            op=op_name(node),
            inputs=tuple(o.name for o in node.all_input_nodes),
            outputs=tuple(self._value(v) for v in variables),
            cost=cost,
            collective=collective,
            workspace_bytes=self._dropped_bytes(node, variables) + workspace,
            frees=frees,
            segment=int(node.meta.get("segment", -1)),
            begins=collective is not None and node.target in BEGINS,
            awaits=_awaited(node),
            completes=str(node.args[0]) if node.target is complete else None,
        )

    def _work(self, node: fx.Node, in_place: bool, collective: Collective | None) -> tuple[OpCost | None, int]:
        """(cost, bytes that the call needs beside its results)."""
        if isinstance(node.target, Kernel):
            return node.target.cost, node.target.workspace_bytes
        call = call_of(node, self.metas)
        cost = None if is_view(node) else price_of(call)
        copy = OpCost("copy", 0.0, 2.0 * call.inputs[0].nbytes, call.inputs[0].dtype) if call.inputs else None
        if collective is not None and collective.kind == "all_reduce":
            cost = None if in_place else copy
        staged = _staging_bytes(node, self.metas, collective) + _parts_bytes(node, self.metas)
        copies = copied_bytes(node) if self.device_kind == CPU and not is_view(node) else 0
        return cost, staged + copies + workspace_bytes(node, cost)

    def _dropped_bytes(self, node: fx.Node, variables: list[fx.Node]) -> int:
        """Outputs nobody uses still exist while the op returns."""
        value = node.meta.get("val")
        if not isinstance(value, tuple | list):
            return 0
        kept = {v.args[1] for v in variables}
        return sum(
            v.untyped_storage().nbytes() for i, v in enumerate(value) if isinstance(v, torch.Tensor) and i not in kept
        )

    def _reduces_in_place(self, index: int, node: fx.Node) -> bool:
        """An all_reduce whose operand is its own contiguous storage that dies here."""
        if _collective_kind(node) != "all_reduce":
            return False
        operand = node.all_input_nodes[0]
        value = operand.meta["val"]
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        alone = self.alive.get(self.storages.of(operand), set()) <= {operand.name}
        return whole and alone and self.last[operand.name] == index and self._may_end(operand)


def label_of(node: fx.Node) -> str:
    """The module path the op came from, for comments; empty where none is known."""
    if "label" in node.meta:
        return str(node.meta["label"])
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return paths[-1].removeprefix("L['self'].").removeprefix("model.") if paths else ""


def _collective(node: fx.Node, metas: Mapping[str, Meta]) -> Collective | None:
    """nbytes: the larger side of the op."""
    kind = _collective_kind(node)
    if kind is None:
        return None
    axis = node.args[1]
    assert isinstance(axis, str)
    return Collective(kind, axis, max(_bytes(metas[node.name]), _bytes(metas[node.all_input_nodes[0].name])))


def _collective_kind(node: fx.Node) -> str | None:
    """None where a call is not a collective or the beginning of one."""
    kind = _own_name(node).removeprefix(BEGIN)
    return kind if kind in _COLLECTIVES else None


def _own_name(node: fx.Node) -> str:
    """The name of one of this compiler's own ops; empty for others."""
    return _name_of(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""


@functools.cache
def _name_of(op: torch._ops.OpOverload) -> str:
    return op.overloadpacket.__name__ if op.namespace == "autopar" else ""


def _awaited(node: fx.Node) -> str | None:
    """What has begun and is waited for: the last operand."""
    return node.all_input_nodes[-1].name if node.target in ENDS else None


def _bytes(meta: Meta) -> int:
    assert isinstance(meta, TensorMeta)
    return meta.nbytes


def _staging_bytes(node: fx.Node, metas: Mapping[str, Meta], collective: Collective | None) -> int:
    """Buffers inside a collective: its operand laid out rank after rank, parts that arrive before they are interleaved.

    Shards that lie one behind the other need neither; what is summed arrives in parts all the same.
    """
    if collective is None or collective.kind == "all_reduce" or node.target in BEGINS:
        return 0
    operand = node.all_input_nodes[0]
    meta, (first, second) = metas[operand.name], node.args[3:5]
    assert isinstance(meta, TensorMeta) and isinstance(first, int) and isinstance(second, int)
    is_whole = operand.meta["val"].is_contiguous()
    if collective.kind == "all_to_all":
        packs = not (is_whole and Shard(first).is_consecutive(meta.shape))
        return collective.nbytes * (packs + (not Shard(second).is_consecutive(meta.shape)))
    is_consecutive = Shard(first, second).is_consecutive(meta.shape)
    if collective.kind == "all_gather":
        return (0 if is_whole else meta.nbytes) + (0 if is_consecutive else collective.nbytes)
    size = node.args[2]
    assert isinstance(size, int)
    arriving = collective.nbytes // size * (size - 1)
    return arriving + (0 if is_whole and is_consecutive else collective.nbytes)


def _parts_bytes(node: fx.Node, metas: Mapping[str, Meta]) -> int:
    """Attention of a rank's queries works over its own keys and over those before them: a second set of results."""
    if not _own_name(node).startswith("attention_rows"):
        return 0
    outputs = metas[node.name]
    assert isinstance(outputs, tuple)
    return sum(meta.nbytes for meta in outputs if meta is not None)
