"""Code generation: the program of one rank as Python that a person can read and a worker executes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.graph import is_getitem, op_name
from passes.group import Kernel
from passes.lower import Function, Line

RUNTIME_CALLS = {
    "autopar.all_reduce.default": "comm.all_reduce",
    "autopar.all_gather.default": "comm.all_gather",
    "autopar.reduce_scatter.default": "comm.reduce_scatter",
    "autopar.begin_all_reduce.default": "comm.begin_all_reduce",
    "autopar.begin_all_gather.default": "comm.begin_all_gather",
    "autopar.begin_reduce_scatter.default": "comm.begin_reduce_scatter",
    "autopar.wait.default": "comm.wait",
    "autopar.complete.default": "accumulate.complete",
    "autopar.sum_arrived.default": "comm.sum_arrived",
    "autopar.take_shard.default": "comm.take_shard",
    "autopar.all_to_all.default": "comm.all_to_all",
    "autopar.shard_ids.default": "comm.shard_ids",
    "autopar.collect.default": "comm.collect",
    "autopar.attention.default": "kernels.attention",
    "autopar.attention_backward.default": "kernels.attention_backward",
    "autopar.attention_rows.default": "kernels.attention_rows",
    "autopar.attention_rows_backward.default": "kernels.attention_rows_backward",
    "autopar.by_rows.default": "kernels.by_rows",
    "autopar.class_gradients.default": "kernels.class_gradients",
    "autopar.class_shares.default": "kernels.class_shares",
    "autopar.count_labels.default": "kernels.count_labels",
    "autopar.product.default": "kernels.product",
    "autopar.put.default": "kernels.put",
    "autopar.put_product.default": "kernels.put_product",
    "autopar.random_keys.default": "kernels.random_keys",
    "autopar.keep.default": "kernels.keep",
    "autopar.drop.default": "kernels.drop",
    "autopar.uniform.default": "kernels.uniform",
    "autopar.normal.default": "kernels.normal",
    "autopar.random_integers.default": "kernels.random_integers",
    "autopar.experts.default": "kernels.experts",
    "autopar.experts_backward.default": "kernels.experts_backward",
    "autopar.ctc.default": "kernels.ctc",
    "autopar.ctc_backward.default": "kernels.ctc_backward",
}
_PLACED = ("kernels.attention_rows", "kernels.attention_rows_backward")
"""Kernels that take a rank's place on an axis where the op names the axis."""
ACCUMULATIONS = {
    "autopar.accumulate.default": "accumulate",
    "autopar.accumulate_product.default": "accumulate.product",
}
_INDENT = "    "
_WIDTH = 120


@dataclass(frozen=True)
class Sources:
    """Where a function's inputs come from: variable -> Python expression, and the variables taken from ``saved``."""

    expressions: Mapping[str, str]
    saved: tuple[str, ...]


class _Names:
    """Short module-level names of the overloads used: ``mm``, ``add_Tensor``; and the kernels."""

    def __init__(self) -> None:
        self.used: dict[str, str] = {}
        self.kernels: dict[str, Kernel] = {}

    def of(self, node: fx.Node) -> str:
        target = op_name(node)
        if isinstance(node.target, Kernel):
            self.kernels[target] = node.target
            return target
        if target in RUNTIME_CALLS:
            return RUNTIME_CALLS[target]
        namespace, name, overload = target.split(".")
        short = name if overload == "default" else f"{name}_{overload}"
        short = short.removeprefix("_") if namespace == "aten" else f"{namespace}_{short}"
        self.used[f"op_{short}"] = f"torch.ops.{namespace}.{name}.{overload}"
        return f"op_{short}"


def render_function(
    function: Function,
    signature: str,
    sources: Sources,
    names: _Names,
    header: str,
    segments: Sequence[str] = (),
) -> str:
    """One ``def``: fetch inputs, run the lines with their deletions, return.

    segments: labels of the chain's segments; where each begins the function says so, for profilers.
    """
    body = [f'"""{header}"""']
    body += [f"{name} = {expression}" for name, expression in sources.expressions.items()]
    if sources.saved:
        body += [_wrapped("[", sources.saved, "] = saved"), "saved.clear()"]
    label, segment = "", -1
    for line in function.lines:
        if segments and line.instruction.segment not in (-1, segment):
            segment = line.instruction.segment
            body.append(f'comm.segment("{segments[segment]}")')
        if line.label and line.label != label:
            label = line.label
            body.append(f"# {label}")
        body.append(_line(line, names))
    if segment >= 0:
        body.append("comm.segment()")
    return f"def {function.name}({signature}):\n" + textwrap.indent("\n".join(body), _INDENT)


def _wrapped(head: str, items: Sequence[str], tail: str) -> str:
    """``head``, items, ``tail``; on several lines where one is too long to read."""
    inner = ", ".join(items)
    if len(head + inner + tail) <= _WIDTH:
        return f"{head}{inner}{tail}"
    lines = textwrap.wrap(f"{inner},", _WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join([head, *(_INDENT + line for line in lines), tail])


def _line(line: Line, names: _Names) -> str:
    node = line.node
    deletes = f"; del {', '.join(line.deletes)}" if line.deletes else ""
    if op_name(node) in ACCUMULATIONS:
        *operands, parameter = node.args
        arguments = [f'grads["{parameter}"]', *(_text(o) for o in operands)]
        return _wrapped(f"{ACCUMULATIONS[op_name(node)]}(", arguments, f"){deletes}")
    return _call(node, line.outputs, names, "_" if line.in_place else "", deletes)


def _call(node: fx.Node, outputs: tuple[str, ...], names: _Names, suffix: str = "", deletes: str = "") -> str:
    callee = names.of(node) + suffix
    text = _placed if callee in _PLACED else _text
    arguments = [text(a) for a in node.args] + [f"{k}={text(v)}" for k, v in node.kwargs.items()]
    if len(outputs) > 1:
        result = f"{', '.join(outputs)} = "
    elif outputs:
        meta_is_tuple = isinstance(node.meta.get("val"), tuple | list)
        result = f"({outputs[0]},) = " if meta_is_tuple else f"{outputs[0]} = "
    else:
        result = ""
    return _wrapped(f"{result}{callee}(", arguments, f"){deletes}")


def render_kernel(kernel: Kernel, names: _Names) -> str:
    """A kernel's calls as a function, which the runtime has compiled."""
    calls = [n for n in kernel.graph.nodes if n.op == "call_function" and not is_getitem(n)]
    placed = [f"device = {_first_input(kernel)}.device"] if any(map(_names_device, calls)) else []
    body = ['"""Compiled into one kernel."""', *placed, *(_call(n, _variables(n), names) for n in calls)]
    (results,) = kernel.graph.output_node().args
    assert isinstance(results, tuple)
    body.append(f"return ({', '.join(map(str, results))},)")
    inputs = ", ".join(n.name for n in kernel.graph.nodes if n.op == "placeholder")
    return f"def {kernel.name}({inputs}):\n" + textwrap.indent("\n".join(body), _INDENT)


def _first_input(kernel: Kernel) -> str:
    return str(next(n for n in kernel.graph.nodes if n.op == "placeholder"))


def _names_device(node: fx.Node) -> bool:
    return any(isinstance(value, torch.device) for value in (*node.args, *node.kwargs.values()))


def _variables(node: fx.Node) -> tuple[str, ...]:
    """Names of a call's results; "_" for those that nothing reads."""
    value = node.meta["val"]
    if not isinstance(value, tuple | list):
        return (node.name,)
    named = {user.args[1]: user.name for user in node.users if is_getitem(user)}
    return tuple(named.get(index, "_") for index in range(len(value)))


def _placed(value: Any) -> str:
    return f'comm.index("{value}")' if isinstance(value, str) else _text(value)


def _text(value: Any) -> str:
    """A literal argument as Python source."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        inner = ", ".join(_text(v) for v in value)
        return f"[{inner}]"
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return str(value)
    if isinstance(value, float):
        return repr(value) if value == value and abs(value) != float("inf") else f'float("{value}")'
    return repr(value)


def new_names() -> _Names:
    return _Names()


def render_module(doc: str, ops: Mapping[str, str], *functions: str) -> str:
    """The module: docstring, op names, functions."""
    lines = [f'"""{doc}\n"""', "", "import torch", ""]
    lines += [f"{short} = {full}" for short, full in sorted(ops.items())]
    return "\n".join(lines) + "\n\n\n" + "\n\n\n".join(text.strip("\n") for text in functions) + "\n"


def returns(values: tuple[str, ...], saved: tuple[str, ...] | None) -> str:
    """The last line of a function: its values, and after them the list of what it saves, if it saves."""
    out = ", ".join(values) if values else "None"
    if saved is None:
        return f"{_INDENT}return {out}"
    return textwrap.indent(_wrapped(f"return {out}, [", saved, "]"), _INDENT)


def returns_named(values: Mapping[str, str]) -> str:
    """The last line of a function that returns a dict: key -> variable."""
    pairs = [f'"{key}": {name}' for key, name in values.items()]
    return textwrap.indent(_wrapped("return {", pairs, "}"), _INDENT)
