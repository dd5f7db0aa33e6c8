"""Checkpoints as the driving process sees them: a folder whose newest complete part is named by one small file.

    folder/latest           the name of the newest complete checkpoint, replaced at once when that is whole
    folder/step-100/        torch.distributed.checkpoint's files, written by all ranks, and
    folder/step-100/driver-0.pt   what is no shard: options of groups, scheduler, step count, random states

A process that dies while it writes leaves ``latest`` as it was.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pickle
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cost_model.errors import CheckpointError, ConfigError

LATEST = "latest"
_PREFIX = "step-"
_FORMAT = 2


def new_part(folder: Path, steps: int) -> str:
    """A name that no part of this folder has had use of yet; the part is made empty."""
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = (f"{_PREFIX}{steps}" + (f".{copy}" if copy else "") for copy in itertools.count())
        name = next(name for name in names if not (folder / name).exists())
        (folder / name).mkdir()
        return name


def publish(folder: Path, name: str) -> str:
    """Make a complete part the newest one, at once, and remove the others. Errors: CheckpointError."""
    with _named(folder):
        _publish(folder, name)
    return name


def _publish(folder: Path, name: str) -> None:
    _write_synced(folder / f"{LATEST}.new", name.encode())
    os.replace(folder / f"{LATEST}.new", folder / LATEST)
    _sync_folder(folder)
    for part in folder.glob(f"{_PREFIX}*"):
        if part.name != name and part.is_dir():
            shutil.rmtree(part)


def newest_part(folder: Path) -> str:
    """Name of the newest complete part. Errors: CheckpointError where there is none."""
    try:
        return (folder / LATEST).read_text()
    except FileNotFoundError as error:
        raise CheckpointError(str(folder), "there is no complete checkpoint here; save one with exe.save") from error


def driver_file(state: Mapping[str, Any]) -> bytes:
    """What one driving process keeps, with its random states; plain values and tensors only. Errors: ConfigError."""
    content = io.BytesIO()
    try:
        torch.save({"format": _FORMAT, **state, "random": random_states()}, content)
        content.seek(0)
        torch.load(content, weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"extra or the scheduler's state holds what a checkpoint cannot keep ({str(error).splitlines()[0]}); "
            "use numbers, strings, tensors and dicts, lists and tuples of them"
        ) from error
    return content.getvalue()


def write_driver(part: Path, process: int, content: bytes) -> None:
    """Errors: CheckpointError."""
    with _named(part):
        _write_synced(part / f"driver-{process}.pt", content)


def read_driver(part: Path, process: int) -> dict[str, Any]:
    """What the process of that number kept, or, where there was none, the first. Errors: CheckpointError."""
    own = part / f"driver-{process}.pt"
    file = own if own.exists() else part / "driver-0.pt"
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(str(part), f"{file.name} cannot be read ({error}); load another checkpoint") from error
    if state["format"] != _FORMAT:
        raise CheckpointError(str(part), f"it has format {state['format']}, this version reads {_FORMAT}; save it anew")
    return state


def random_states() -> dict[str, Any]:
    """Of the generators that data loading uses: torch's, Python's and NumPy's."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    numbers = np.asarray(keys).tolist()
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (kind, numbers, *rest)}


def set_random_states(states: Mapping[str, Any]) -> None:
    """Inverse of ``random_states``."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def check_fits(part: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """CheckpointError naming the first parameter that differs in name, shape or dtype, or the optimizer."""
    for name in sorted({*saved["tensors"], *here["tensors"]}):
        one, other = saved["tensors"].get(name), here["tensors"].get(name)
        if one != other:
            raise CheckpointError(
                str(part),
                f"it has {_text(one)} for {name!r} but the model has {_text(other)}; load it into the model it is of",
            )
    for what in ("optimizer", "groups of parameters", "scheduler"):
        if saved[what] != here[what]:
            raise CheckpointError(
                str(part), f"its {what}: {saved[what]}, here: {here[what]}; compile with what it was saved with"
            )


def _text(described: tuple[tuple[int, ...], str] | None) -> str:
    return "nothing" if described is None else f"{described[1]}{list(described[0])}"


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the system refuses, a full disk say, as CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(str(path), f"it cannot be written ({error}); give it a folder with room") from error


def _write_synced(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
