"""Group: neighbouring calls that move memory become one kernel, for a compiler to fuse.

Products, attention, collectives and what adds to gradient buffers stay as they are. What lies between a kernel's calls
then exists for a moment at most: values that cross from one loop of the kernel to another.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from cost_model.ops import OpCall, price_of
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta
from passes import vocabulary
from passes.calls import call_of
from passes.graph import Meta, is_getitem, meta_of, op_name
from passes.storage import is_view

aten = torch.ops.aten
Worth = Callable[[OpCost], bool]
KERNEL = "fused"
_POINTWISE = ("elementwise", "transcendental")
_ROWS = ("softmax", "softmax_backward", "norm", "norm_backward", "loss", "loss_backward")
"""Kinds whose kernels keep two numbers for each row."""
_REDUCTION = "reduction"
_COPIES = ("aten._to_copy.default", "aten.to.dtype", "aten.clone.default")
_NAMED_OPS = 3
_STATISTIC_BYTES = 8


@dataclass(frozen=True, eq=False)
class Kernel:
    """Several calls as one: a graph of its own, which code generation prints as a function.

    inputs: metas of its operands, with strides, which a compiler wants to know; cost: of all of it;
    workspace_bytes: what it holds beyond its results. As the target of a node it stands for the call.
    """

    name: str
    graph: fx.Graph
    inputs: tuple[tuple[tuple[int, ...], tuple[int, ...], str], ...]
    cost: OpCost
    workspace_bytes: int

    @property
    def __name__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name

    def __call__(self, *operands: object) -> object:
        raise AssertionError(f"{self.name} is run as printed")


@dataclass
class Kernels:
    """The kernels of one part of the chain, each distinct one once. suffix: of the part."""

    suffix: str = ""
    known: dict[object, Kernel] = field(default_factory=dict)

    def of(self, body: _Body, ops: list[str], cost: OpCost, workspace_bytes: int) -> Kernel:
        """The kernel of a body, named after its first ops: fused_add_native_layer_norm."""
        values = [n.meta["val"] for n in body.operands]
        metas = tuple((tuple(v.shape), tuple(v.stride()), str(v.dtype).removeprefix("torch.")) for v in values)
        key = (str(body.graph), metas)
        if key not in self.known:
            title = "_".join([f"{KERNEL}{self.suffix}", *list(dict.fromkeys(ops))[:_NAMED_OPS]])
            name = _unused(title, {kernel.name for kernel in self.known.values()})
            self.known[key] = Kernel(name, body.graph, metas, cost, workspace_bytes)
        return self.known[key]


def _unused(title: str, names: set[str]) -> str:
    count, name = 1, title
    while name in names:
        count += 1
        name = f"{title}_{count}"
    return name


def group(graph: fx.Graph, returned: frozenset[str], kernels: Kernels, worth: Worth) -> None:
    """Replace each run of calls that move memory by a kernel, where ``worth`` says so of its cost.

    returned: names of values that the graph's function returns, which keep them. A run ends at a call of another kind;
    a sum over what a run has made joins it later, since it is small and its operand is then read once.
    """
    for run in _runs(graph):
        if len(run) > 1:
            _Run(graph, run, returned).replace(kernels, worth)


def _runs(graph: fx.Graph) -> list[list[fx.Node]]:
    runs: list[list[fx.Node]] = []
    run_of: dict[fx.Node, list[fx.Node]] = {}
    current: list[fx.Node] | None = None
    for node in graph.nodes:
        if node.op != "call_function" or _is_passed(node):
            continue
        kind = _kind(node)
        if kind is None:
            current = None
            continue
        joins = kind == _REDUCTION and current is None and len(node.all_input_nodes) == 1
        run = run_of.get(_origin(node.all_input_nodes[0])) if joins else current
        if run is None:
            run = current = []
            runs.append(run)
        run.append(node)
        run_of[node] = run
    return runs


def _is_passed(node: fx.Node) -> bool:
    """Whether a run goes on over it: views, and what adds a gradient to its buffer, which can be done later."""
    return is_getitem(node) or is_view(node) or node.target is vocabulary.accumulate


def _origin(node: fx.Node) -> fx.Node:
    """The call that made a value, or the input it is a view of."""
    while is_getitem(node) or is_view(node):
        node = node.all_input_nodes[0]
    return node


def _metas(*nodes: fx.Node) -> dict[str, Meta]:
    return {n.name: m for n in nodes if (m := meta_of(n.meta.get("val"))) is not None}


def _call(node: fx.Node) -> OpCall:
    return call_of(node, _metas(node, *node.all_input_nodes))


def _kind(node: fx.Node) -> str | None:
    """The kind of a call that may be part of a kernel."""
    if not op_name(node).startswith("aten.") or not node.all_input_nodes or not _metas(node):
        return None
    cost = price_of(_call(node))
    if cost is None:
        return None
    if cost.kind == "copy":
        return "elementwise" if op_name(node) in _COPIES else None
    return cost.kind if cost.kind in (*_POINTWISE, *_ROWS, _REDUCTION) else None


class _Run:
    """One run of calls. made: the values that they make."""

    def __init__(self, graph: fx.Graph, members: list[fx.Node], returned: frozenset[str]) -> None:
        self.graph, self.members, self.returned = graph, members, returned
        self.inside = set(members)
        self.made = [value for node in members for value in _results(node)]
        self.outputs = [value for value in self.made if self._is_needed(value)]

    def _is_needed(self, value: fx.Node) -> bool:
        """Whether anything but the run's own calls reads a value, be it through a view."""
        if value.name in self.returned:
            return True
        return any(self._is_needed(u) if is_view(u) else u not in self.inside for u in value.users)

    def replace(self, kernels: Kernels, worth: Worth) -> None:
        body = _Body(self)
        cost = self._cost(body)
        if not self.outputs or not worth(cost):
            return
        ops = [op_name(node).split(".")[1].strip("_") for node in self.members]
        kernel = kernels.of(body, ops, cost, self._workspace_bytes())
        last = self._last()
        moved = self._dependents(last)
        with self.graph.inserting_after(last):
            call = self.graph.call_function(kernel, tuple(body.operands))
        first = self.members[0]
        call.meta = {k: v for k, v in first.meta.items() if k in ("segment", "label", "nn_module_stack")}
        call.meta["val"] = tuple(v.meta["val"] for v in self.outputs)
        call.meta["storage"] = tuple(v.meta["storage"] for v in self.outputs)
        self._rewire(call, moved)

    def _last(self) -> fx.Node:
        """Where the kernel runs: where the run ended, before what joined it later."""
        last = self.members[0]
        for node in self.members[1:]:
            between = last.next
            while between is not node and (_is_passed(between) or between in self.inside):
                between = between.next
            if between is not node:
                break
            last = node
        return last

    def _dependents(self, last: fx.Node) -> list[fx.Node]:
        """What stands before the end of the run and reads what it makes: views, and what adds to gradient buffers."""
        found: list[fx.Node] = []
        node = self.members[0]
        while node is not last:
            if node not in self.inside and not is_getitem(node) and _reads(node, self.inside):
                found.append(node)
            node = node.next
        return found

    def _rewire(self, call: fx.Node, moved: list[fx.Node]) -> None:
        views = [n for n in self.graph.nodes if is_view(n) and _origin(n) in self.inside]
        after = call
        for index, old in enumerate(self.outputs):
            with self.graph.inserting_after(after):
                after = self.graph.call_function(operator.getitem, (call, index))
            after.meta = dict(old.meta)
            old.replace_all_uses_with(after, lambda user: user not in self.inside)
            old.name, after.name = f"{old.name}_fused", old.name
        for node in moved:
            after.append(node)
            after = node
        for node in reversed([n for n in self.graph.nodes if n in {*views, *self.made, *self.inside}]):
            if not node.users:
                self.graph.erase_node(node)

    # --- What it costs

    def _cost(self, body: _Body) -> OpCost:
        """Its operands read once and its results written once, in one call."""
        parts = tuple(cost for node in self.members if (cost := price_of(_call(node))) is not None)
        nbytes = sum(_nbytes(node) for node in (*dict.fromkeys(body.operands), *self.outputs))
        flops = sum(part.flops for part in parts)
        return OpCost(KERNEL, flops, float(nbytes), parts[0].dtype, parts=parts)

    def _workspace_bytes(self) -> int:
        """The most that is held between the calls: values that are not read element by element, two numbers a row."""
        last = {n: index for index, node in enumerate(self.members) for n in _sources(node)}
        held: dict[fx.Node, int] = {}
        most = 0
        for index, node in enumerate(self.members):
            held.update({v: _nbytes(v) for v in _results(node) if v not in self.outputs and self._is_kept(node, v)})
            if _kind(node) in _ROWS:
                held[node] = 2 * _STATISTIC_BYTES * _rows(_call(node))
                last.setdefault(node, index)
            most = max(most, sum(held.values()))
            for value in [v for v in held if last.get(v, index) <= index]:
                del held[value]
        return most

    def _is_kept(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether a compiler has to write a value down: a sum, and what is read by more than each element's own place.

        Results of other kinds are computed where they are read.
        """
        if _kind(node) == _REDUCTION:
            return True
        return any(_kind(user) not in _POINTWISE for user in self._readers(value))

    def _readers(self, value: fx.Node) -> Iterator[fx.Node]:
        for user in value.users:
            if user in self.inside:
                yield user
            elif is_view(user):
                yield from self._readers(user)


class _Body:
    """A run's calls as a graph of their own, with the views between them. operands: what it reads from outside."""

    def __init__(self, run: _Run) -> None:
        self.run, self.graph = run, fx.Graph()
        self.operands: list[fx.Node] = []
        self._mapped: dict[fx.Node, fx.Node] = {}
        order = {n: i for i, n in enumerate(run.graph.nodes)}
        calls = sorted(run.members, key=order.__getitem__)
        for node in sorted({o for n in calls for o in n.all_input_nodes}, key=order.__getitem__):
            if _origin(node) not in run.inside:
                self._operand(node)
        for node in calls:
            self._copy(node)
        self.graph.output(tuple(self._copy(value) for value in run.outputs))

    def _operand(self, node: fx.Node) -> None:
        self._mapped[node] = self.graph.placeholder(f"x{len(self.operands)}")
        self._mapped[node].meta = {"val": node.meta["val"]}
        self.operands.append(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node not in self._mapped:
            for operand in node.all_input_nodes:
                self._copy(operand)
            args, kwargs = (fx.map_arg(given, lambda n: self._mapped[n]) for given in (node.args, node.kwargs))
            self._mapped[node] = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            self._mapped[node].meta = {"val": node.meta["val"]}
        return self._mapped[node]


def _results(node: fx.Node) -> list[fx.Node]:
    """The nodes that name a call's results."""
    if isinstance(node.meta["val"], tuple | list):
        return [user for user in node.users if is_getitem(user)]
    return [node]


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """The values that a call reads, without the views between."""
    for operand in node.all_input_nodes:
        while is_view(operand) and not is_getitem(operand):
            operand = operand.all_input_nodes[0]
        yield operand


def _reads(node: fx.Node, made: set[fx.Node]) -> bool:
    return any(_origin(operand) in made for operand in node.all_input_nodes)


def _nbytes(node: fx.Node) -> int:
    meta = meta_of(node.meta["val"])
    assert isinstance(meta, TensorMeta)
    return meta.nbytes


def _rows(call: OpCall) -> int:
    """How many rows a softmax, a norm or a loss works along."""
    source = call.inputs[0]
    dim = call.args.get("dim")
    width = source.shape[dim] if isinstance(dim, int) and source.shape else None
    sizes: Mapping[str, object] = call.args
    normalised = sizes.get("normalized_shape")
    if isinstance(normalised, list):
        width = 1
        for size in normalised:
            width *= int(size)
    if width is None:
        width = source.shape[-1] if source.shape else 1
    return max(1, source.numel // max(1, width))
