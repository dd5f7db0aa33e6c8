"""Printed: read generated source back and compare it, line by line, with the priced block.

A line that is missing, out of order, on other operands or freeing other values than its instruction is found
here, whatever its shapes are.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from cost_model.errors import VerificationError
from cost_model.program import Block, Instruction, Value
from passes.codegen import ACCUMULATIONS, RUNTIME_CALLS
from passes.group import KERNEL

_OPS = {printed: op for op, printed in RUNTIME_CALLS.items()}
_NOT_VALUES = ("comm", "device", "float", "grads", "torch")
_OPS.update(
    {f"{printed}_": op for op, printed in RUNTIME_CALLS.items()},
    **{printed: op for op, printed in ACCUMULATIONS.items()},
)


@dataclass(frozen=True)
class PrintedLine:
    """A call: its op by its full name, variables read (once each), variables made, variables deleted after it."""

    op: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    deletes: tuple[str, ...]


def check_printed(source: str, *blocks: Block) -> None:
    """VerificationError unless the functions named as the blocks do, call for call, what the blocks price."""
    module = ast.parse(source)
    for block in blocks:
        _check_function(tuple(printed_lines(module, block.name)), block)


def _check_function(lines: tuple[PrintedLine, ...], block: Block) -> None:
    held = _Held(block.inputs)
    for index, (line, instruction) in enumerate(zip(lines, block.instructions, strict=False)):
        expected = (instruction.op, instruction.inputs, {v.name for v in instruction.outputs})
        found = (line.op, line.reads, set(line.makes))
        if found != expected:
            raise VerificationError("printed = priced", f"line {index} of {block.name} is {found}, priced {expected}")
        freed = held.after(line, instruction)
        if freed != set(instruction.frees):
            frees = f"frees {freed}, priced {set(instruction.frees)}"
            raise VerificationError("printed = priced", f"line {index} of {block.name} {frees}")
    if len(lines) != len(block.instructions):
        counts = f"{len(lines)} lines for {len(block.instructions)} instructions"
        raise VerificationError("printed = priced", f"{block.name} has {counts}")


class _Held:
    """Which variables hold which storage, line after line."""

    def __init__(self, inputs: tuple[Value, ...]) -> None:
        self.storage: dict[str, str] = {}
        self.holders: Counter[str] = Counter()
        self._hold(inputs)

    def _hold(self, values: tuple[Value, ...]) -> None:
        self.storage.update({v.name: v.storage for v in values})
        self.holders.update(v.storage for v in values)

    def after(self, line: PrintedLine, instruction: Instruction) -> set[str]:
        """Storages that die with the variables a line deletes."""
        self._hold(instruction.outputs)
        freed = set()
        for name in line.deletes:
            if name not in self.storage:
                raise VerificationError("printed = priced", f"{line.op} is followed by del {name}, which is not there")
            storage = self.storage.pop(name)
            self.holders[storage] -= 1
            freed |= set() if self.holders[storage] else {storage}
        return freed


def printed_lines(module: ast.Module, function: str) -> Iterator[PrintedLine]:
    """The op calls of a function of generated source, in order."""
    ops = {**_OPS, **_overloads(module), **_kernels(module)}
    body = next(n.body for n in module.body if isinstance(n, ast.FunctionDef) and n.name == function)
    for statement, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        call = statement.value if isinstance(statement, ast.Assign | ast.Expr) else None
        op = ops.get(_dotted(call.func)) if isinstance(call, ast.Call) else None
        if op is not None and isinstance(call, ast.Call):
            makes = _names(*statement.targets) if isinstance(statement, ast.Assign) else []
            deletes = _names(*after.targets) if isinstance(after, ast.Delete) else []
            reads = [n for n in _names(*call.args, *call.keywords) if n not in _NOT_VALUES]
            yield PrintedLine(op, tuple(dict.fromkeys(reads)), tuple(makes), tuple(deletes))


def _overloads(module: ast.Module) -> dict[str, str]:
    """op_mm -> aten.mm.default."""
    assigns = [n for n in module.body if isinstance(n, ast.Assign)]
    return {name: _dotted(n.value).removeprefix("torch.ops.") for n in assigns for name in _names(*n.targets)}


def _kernels(module: ast.Module) -> dict[str, str]:
    """Functions of the module that its functions call by name."""
    names = [n.name for n in module.body if isinstance(n, ast.FunctionDef) and n.name.startswith(KERNEL)]
    return dict(zip(names, names, strict=True))


def _dotted(node: ast.expr) -> str:
    """A name with its attributes; empty for any other expression."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _names(*nodes: ast.AST) -> list[str]:
    """Variables in the order of the text."""
    found: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Name):
            found += [] if node.id == "_" else [node.id]
        elif not isinstance(node, ast.Constant):
            found += _names(*ast.iter_child_nodes(node))
    return found
