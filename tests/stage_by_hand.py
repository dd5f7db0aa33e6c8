"""Blocks and stages of programs, written by hand."""

from collections.abc import Iterable

from cost_model.program import Block, Chunk, Instruction, StageProgram, StepWork, Value
from cost_model.shards import ParameterShard
from cost_model.tensor import TensorMeta

KIB = 1024


def value(name: str, nbytes: int, storage: str | None = None) -> Value:
    return Value(name, TensorMeta((nbytes,), "uint8"), storage or name, nbytes)


def line(outputs: Iterable[Value] = (), frees: Iterable[str] = (), workspace: int = 0) -> Instruction:
    return Instruction("aten.add", (), tuple(outputs), None, None, workspace, tuple(frees), 0)


def same(nbytes: int) -> int:
    return nbytes


NO_STEP = StepWork((), (), 0, 0)


ACTIVATION = 40


def hand_stage(stage: int, pp: int, step: StepWork = NO_STEP) -> StageProgram:
    """Saves 100 and the activation it received; forward needs 10 and backward 70 more for a while."""
    received = stage > 0
    incoming = (value("in", ACTIVATION),) if received else ()
    saved = ("h", "in") if received else ("h",)
    forward = Block(
        "forward",
        (value("w", 1000), *incoming),
        (line([value("t", 10)]), line([value("h", 100)], ["t"]), line([value("out", ACTIVATION)])),
        ("out", "h"),
    )
    backward = Block(
        "backward",
        (value("h", 100), value("grad_out", ACTIVATION), *incoming),
        (
            line([value("u", 30)], ["h", "grad_out"], workspace=40),
            line([value("grad_in", ACTIVATION)], ["u", *saved[1:]]),
        ),
        ("grad_in",) if received else (),
    )
    meta = TensorMeta((ACTIVATION,), "uint8")
    chunk = Chunk(
        segments=(stage,),
        forward=forward,
        backward=backward,
        saved=saved,
        sent=meta if stage < pp - 1 else None,
        received=meta if received else None,
    )
    return StageProgram(
        stage=stage,
        chunks=(chunk,),
        parameters=(
            ParameterShard("w", TensorMeta((250,), "float32"), "R", True, None, None),
            ParameterShard("mask", TensorMeta((3,), "bool"), "R", False, None, None),
        ),
        persistent=(value("idx", 64), Value("first", TensorMeta((32,), "uint8"), "idx", 64)),
        step=step,
    )
