"""Detach: state where gradients stop, before functionalisation forgets it.

Functionalising inlines no_grad regions and drops in-place detaches, and gradients would flow where the model
stops them, and values that were written to without gradients would have those of what was written. So the values
that leave a no_grad region are detached explicitly, inputs of the graph that it writes to (buffers) are for all that
comes after it, ``h.detach_()`` becomes ``h.detach()`` for all that comes after it, and other such writes are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from cost_model.errors import UnsupportedError
from passes.fakes import fake_like
from passes.graph import is_getitem, op_name

aten = torch.ops.aten
_LIFTED = (aten.lift_fresh_copy.default, aten.lift_fresh.default)


def detach(module: fx.GraphModule) -> fx.GraphModule:
    """The exported module, changed in place; UnsupportedError where gradients stop in a way that cannot be stated."""
    changed = False
    for owner in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        for node in list(owner.graph.nodes):
            if is_region(node):
                for written in _written_outside(getattr(owner, node.args[1].target), node):
                    _detach_from(written, node)
                _detach_outputs(node)
                changed = True
            elif node.target is aten.detach_.default and node.args[0].target not in _LIFTED:
                _detach_from_here(node)
                changed = True
            else:
                _check_written(node)
    if changed:
        module.recompile()
    return module


def _is_switch(node: fx.Node) -> bool:
    """Whether the node runs a part of the model with gradients switched on or off."""
    return op_name(node) == "wrap_with_set_grad_enabled"


def is_region(node: fx.Node) -> bool:
    return _is_switch(node) and node.args[0] is False


def _detach_outputs(region: fx.Node) -> None:
    """What a region makes has no gradient; what it only hands on is the operand that it was, with its gradient."""
    operands = _untouched(region)
    for output in list(region.users):
        assert is_getitem(output), output
        operand = operands.get(output.args[1])
        if operand is None:
            _insert_detach(output, output)
        else:
            output.replace_all_uses_with(operand)


def _untouched(region: fx.Node) -> dict[Any, fx.Node]:
    """Index of an output -> the operand that it is, where the region does not write to it.

    ``h.float()`` may be ``h`` itself, and the exporter calls ``h`` by its last name from then on.
    """
    returned: Any = inside(region).output_node().args[0]
    found = ((index, _handed_through(region, result)) for index, result in enumerate(returned))
    return {index: operand for index, operand in found if operand is not None}


def _handed_through(region: fx.Node, result: Any) -> fx.Node | None:
    """The operand of a region, of whatever kind, that a value inside is, if the region does not write to it."""
    root = _itself(result)
    operand = given_to(region).get(root)
    return None if operand is None or root in roots_written_in(inside(region)) else operand


def _itself(value: Any) -> Any:
    """What a value is, behind calls that give their operand back and regions that hand theirs through."""
    while isinstance(value, fx.Node):
        source: Any = value.args[0] if value.args else None
        if is_getitem(value) and body_of(source) is not None:
            returned: Any = inside(source).output_node().args[0]
            source = _handed_through(source, returned[value.args[1]])
        elif not _gives_back(value):
            return value
        if source is None:
            return value
        value = source
    return value


def _gives_back(node: fx.Node) -> bool:
    """Whether the result of a call is its first operand, the very tensor: found by calling it."""
    target, operands = node.target, node.all_input_nodes
    if not (isinstance(target, torch._ops.OpOverload) and target._can_decompose()) or target._schema.is_mutable:
        return False
    values = [value for each in (node, *operands) if (value := _static(each)) is not None]
    if not operands or node.args[0] is not operands[0] or len(values) <= len(operands):
        return False
    made, first = values[:2]
    if (first.shape, first.stride(), first.dtype) != (made.shape, made.stride(), made.dtype):
        return False
    empty = [fake_like(value, mode=first.fake_mode) for value in values[1:]]
    with first.fake_mode:
        given = dict(zip(operands, empty, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: given[each])
        return target(*args, **kwargs) is empty[0]


def _static(node: fx.Node) -> FakeTensor | None:
    """A value whose shape depends on no other's elements."""
    value = node.meta.get("val")
    return value if isinstance(value, FakeTensor) and all(isinstance(extent, int) for extent in value.shape) else None


def body_of(node: Any) -> int | None:
    """At which of its arguments a region of the model (without gradients, or of autocast) has its graph."""
    if not (isinstance(node, fx.Node) and isinstance(node.target, torch._ops.HigherOrderOperator)):
        return None
    return next((i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"), None)


def given_to(region: fx.Node) -> dict[fx.Node, Any]:
    """Placeholder of a region's graph -> operand."""
    place = body_of(region)
    assert place is not None
    return dict(zip(inside(region).find_nodes(op="placeholder"), region.args[place + 1 :], strict=True))


def roots_written_in(graph: fx.Graph) -> set[fx.Node]:
    """What the calls of a graph write to, those of regions in it included."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        found |= written_by(node)
    return found


def written_by(node: fx.Node) -> set[fx.Node]:
    """What a call, or a region that it runs, writes to."""
    if body_of(node) is None:
        return set(roots_written(node))
    inner = roots_written_in(inside(node))
    return {_lineage(operand)[-1] for name, operand in given_to(node).items() if name in inner}


def inside(region: Any) -> fx.Graph:
    graph: fx.Graph = getattr(region.graph.owning_module, region.args[body_of(region)].target).graph
    return graph


def _detach_from_here(node: fx.Node) -> None:
    """The tensor itself is detached: its later uses are uses of the result."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    made = _detach_from(source, node)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _detach_from(source: fx.Node, place: fx.Node) -> fx.Node:
    """A tensor is detached for all that comes after a place."""
    made = _insert_detach(source, place)
    after = {n for n in place.graph.nodes if n > made}
    source.replace_all_uses_with(made, delete_user_cb=lambda user: user in after)
    return made


def _insert_detach(source: fx.Node, after: fx.Node) -> fx.Node:
    """``source`` detached right after a node; later users of that node take the result if it is ``source`` itself."""
    with after.graph.inserting_after(after):
        made = after.graph.call_function(aten.detach.default, (source,))
    made.meta = dict(source.meta)
    if source is after:
        source.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return made


def _written_outside(region: fx.GraphModule, place: fx.Node) -> list[fx.Node]:
    """Inputs of the graph, and tensors of numbers alone, that a no_grad region (called at a place) writes to, and views
    of them that were made before it.

    UnsupportedError where it does what no detaching says.
    """
    given = dict(zip((n for n in region.graph.nodes if n.op == "placeholder"), place.args[2:], strict=True))
    found: dict[fx.Node, None] = {}
    for node in region.graph.nodes:
        if _is_switch(node):
            raise UnsupportedError("the model nests torch.enable_grad in torch.no_grad; end no_grad before it")
        for root in roots_written(node):
            lineage = _lineage(given[root]) if root in given else []
            if lineage and lineage[-1].op != "placeholder" and not _is_without_gradient(lineage[-1], place):
                raise UnsupportedError(
                    f"the model changes a tensor from outside in torch.no_grad ({node.target}); assign a new tensor, "
                    "or change it outside of forward"
                )
            found.update(dict.fromkeys(lineage[-1:]))
    before = itertools.takewhile(lambda node: node is not place, place.graph.nodes) if found else ()
    return [value for value in before if _lineage(value)[-1] in found]


def _is_without_gradient(made: fx.Node, place: fx.Node) -> bool:
    """Whether a value is made of sizes and numbers, and nothing was written to it with gradients before a place."""
    if not isinstance(made.target, torch._ops.OpOverload):
        return False
    if made.target is aten.detach.default:
        return True
    name = made.target._schema.name.removeprefix("aten::")
    of_shapes = name.endswith("_like") or name.startswith("new_")
    if not of_shapes and not all(_is_without_gradient(operand, place) for operand in made.all_input_nodes):
        return False
    before = itertools.takewhile(lambda node: node is not place, made.graph.nodes)
    return not any(_lineage(written)[-1] is made for node in before for written in _written(node))


def _check_written(node: fx.Node) -> None:
    """UnsupportedError from a write through ``h.detach()`` or ``h.data`` where ``h``, or another view, is read later.

    The gradient of ``h`` is that of what it was, its value what was written, which no functional graph says; views made
    before get the value without the gradient.
    """
    for written in _written(node):
        lineage = _lineage(written)
        source = next((n.args[0] for n in lineage if n.target is aten.detach.default), None)
        if source is not None and _may_have_gradient(written) and _others_read_after(lineage, node):
            raise UnsupportedError(
                f"the model changes a tensor that had no gradient ({node.target}) and reads a view of it from before "
                "that; take the view afterwards"
            )
        if not isinstance(source, fx.Node) or _lineage(source)[-1].op == "placeholder":
            continue
        if any(_is_read_after(alias, node) for alias in _lineage(source)):
            raise UnsupportedError(
                f"the model changes a tensor through .detach() or .data ({node.target}) and reads it afterwards; "
                "assign a new tensor, or change it outside of forward"
            )


def _may_have_gradient(value: fx.Node) -> bool:
    made = value.meta.get("val")
    return isinstance(made, torch.Tensor) and (made.is_floating_point() or made.is_complex())


def _others_read_after(lineage: list[fx.Node], place: fx.Node) -> bool:
    """Whether other views of what a value is a view of were made before a place, and are read after it."""
    before = itertools.takewhile(lambda node: node is not place, place.graph.nodes)
    others = (value for value in before if value not in lineage and _lineage(value)[-1] is lineage[-1])
    return any(user > place for other in others for user in other.users)


def _is_read_after(value: fx.Node, place: fx.Node) -> bool:
    """Whether a value is read with its gradient after a place, by itself or through views."""
    views = [user for user in value.users if user.target is not aten.detach.default and value in _lineage(user)[1:]]
    readers = value.users.keys() - {user for user in value.users if value in _lineage(user)[1:]}
    return any(reader > place for reader in readers) or any(_is_read_after(view, place) for view in views)


def _lineage(value: fx.Node) -> list[fx.Node]:
    """A value and what it is a view of, nearest first."""
    found = [value]
    while (source := _source(found[-1])) is not None:
        found.append(source)
    return found


def _source(value: fx.Node) -> fx.Node | None:
    """What a value is a view of; of what a region hands on, the operand of the region that it is."""
    operand: Any = value.args[0] if value.args else None
    if is_getitem(value) and is_region(operand):
        return _handed_on(operand, value.args[1])
    if not (isinstance(value.target, torch._ops.OpOverload) and _aliases(value.target)):
        return None
    return operand if isinstance(operand, fx.Node) and _storage(operand) == _storage(value) else None


def _handed_on(region: Any, index: Any) -> fx.Node | None:
    """The operand of a region that one of its outputs is, by itself, through views or by a write to it."""
    inner = inside(region)
    returned: Any = inner.output_node().args[0]
    result = returned[index]
    same = {*roots_written(result), _lineage(result)[-1]}
    given = zip(inner.find_nodes(op="placeholder"), region.args[2:], strict=True)
    return next((operand for name, operand in given if name in same), None)


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def roots_written(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that a call writes to, by itself or through views."""
    for root in _written(node):
        while isinstance(root.target, torch._ops.OpOverload) and _aliases(root.target):
            source = root.args[0]
            if not isinstance(source, fx.Node):
                break
            root = source
        yield root


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The operands that a call writes to."""
    if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
        return
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            root = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(root, fx.Node):
                yield root


def _aliases(target: torch._ops.OpOverload) -> bool:
    """Whether the result shares memory with the first argument."""
    first = target._schema.arguments[:1]
    return bool(first) and first[0].alias_info is not None
