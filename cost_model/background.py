"""What moves behind compute: a block's collectives that begin in one instruction and are waited for in a later one."""

from __future__ import annotations

from cost_model.errors import VerificationError
from cost_model.program import Block, Instruction


class Streams:
    """A rank's clock inside a block, and for each axis the stream on which collectives move behind it.

    Streams move one collective after another; what is left of one when it is waited for holds up the clock, and so does
    the part of it that no stream takes from the rank that computes.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._free_s: dict[str, float] = {}
        self._ends: dict[str, tuple[float, float]] = {}

    def spend(self, seconds: float) -> None:
        """On a call, or on a collective that is waited for where it stands."""
        self.now_s += seconds

    def begin(self, instruction: Instruction, whole_s: float, behind_s: float) -> None:
        """whole_s: of the collective by itself; behind_s: the part that the rank must do or wait for in any case."""
        assert instruction.collective is not None and behind_s <= whole_s
        axis = instruction.collective.axis
        end_s = max(self.now_s, self._free_s.get(axis, 0.0)) + whole_s - behind_s
        self._free_s[axis] = end_s
        self._ends[instruction.outputs[0].name] = (end_s, behind_s)

    def wait(self, value: str) -> float:
        """Seconds until what has begun is there."""
        end_s, behind_s = self._ends.pop(value)
        seconds = max(0.0, end_s - self.now_s) + behind_s
        self.now_s += seconds
        return seconds


def check_waited(block: Block) -> None:
    """VerificationError unless what begins is waited for once, in the same block, and read by nothing before."""
    moving: dict[str, str] = {}
    for instruction in block.instructions:
        early = next(
            (moving[name] for name in instruction.inputs if name in moving and name != instruction.awaits), None
        )
        if early is not None:
            raise VerificationError("waited", f"{block.name}: {instruction.op} reads what {early} has not brought yet")
        if instruction.awaits is not None and moving.pop(instruction.awaits, None) is None:
            raise VerificationError(
                "waited", f"{block.name}: {instruction.op} waits for {instruction.awaits!r}, not begun"
            )
        if instruction.begins:
            moving[instruction.outputs[0].name] = instruction.op
    for name, op in moving.items():
        raise VerificationError("waited", f"{block.name}: nothing waits for {name!r}, which {op} begins")
