"""Detach: state where gradients stop, before functionalisation forgets it.

Functionalising inlines no_grad regions and drops in-place detaches, and gradients would flow where the model
stops them. So the values that leave a no_grad region are detached explicitly, and ``h.detach_()`` becomes
``h.detach()`` for all that comes after it.
"""

from __future__ import annotations

import torch
from torch import fx

from cost_model.errors import UnsupportedError
from passes.graph import is_getitem

aten = torch.ops.aten
_LIFTED = (aten.lift_fresh_copy.default, aten.lift_fresh.default)


def detach(module: fx.GraphModule) -> fx.GraphModule:
    """The exported module, changed in place; UnsupportedError where gradients stop in a way that cannot be stated."""
    changed = False
    for owner in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        for node in list(owner.graph.nodes):
            if _is_region(node):
                _check_region(getattr(owner, node.args[1].target))
                _detach_outputs(node)
                changed = True
            elif node.target is aten.detach_.default and node.args[0].target not in _LIFTED:
                _detach_from_here(node)
                changed = True
    if changed:
        module.recompile()
    return module


def _is_switch(node: fx.Node) -> bool:
    """Whether the node runs a part of the model with gradients switched on or off."""
    return str(node.target) == "wrap_with_set_grad_enabled"


def _is_region(node: fx.Node) -> bool:
    return _is_switch(node) and node.args[0] is False


def _detach_outputs(region: fx.Node) -> None:
    for output in list(region.users):
        assert is_getitem(output), output
        _insert_detach(output, output)


def _detach_from_here(node: fx.Node) -> None:
    """The tensor itself is detached: its later uses are uses of the result."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    made = _insert_detach(source, node)
    after = {n for n in node.graph.nodes if n > made}
    source.replace_all_uses_with(made, delete_user_cb=lambda user: user in after)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _insert_detach(source: fx.Node, after: fx.Node) -> fx.Node:
    """``source`` detached right after a node; later users of that node take the result if it is ``source`` itself."""
    with after.graph.inserting_after(after):
        made = after.graph.call_function(aten.detach.default, (source,))
    made.meta = dict(source.meta)
    if source is after:
        source.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return made


def _check_region(region: fx.GraphModule) -> None:
    """UnsupportedError where a no_grad region does what cannot be said by detaching its outputs."""
    for node in region.graph.nodes:
        if _is_switch(node):
            raise UnsupportedError("the model nests torch.enable_grad in torch.no_grad; end no_grad before it")
        if _mutates_outside(node):
            raise UnsupportedError(
                f"the model changes a tensor from outside in torch.no_grad ({node.target}); assign a new tensor, "
                "or change it outside of forward"
            )


def _mutates_outside(node: fx.Node) -> bool:
    """Whether a call writes to a tensor that came into its graph as an input, by itself or through views."""
    if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
        return False
    root = node.args[0]
    while isinstance(root, fx.Node) and isinstance(root.target, torch._ops.OpOverload) and _aliases(root.target):
        root = root.args[0]
    return isinstance(root, fx.Node) and root.op == "placeholder"


def _aliases(target: torch._ops.OpOverload) -> bool:
    """Whether the result shares memory with the first argument."""
    first = target._schema.arguments[:1]
    return bool(first) and first[0].alias_info is not None
