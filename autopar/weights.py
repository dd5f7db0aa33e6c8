"""Weights: where the values of a model come from: its own tensors, recipes of a deferred one, safetensors files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from autopar.deferral import recipes_of
from autopar.runtime.recipe import made
from autopar.runtime.weight_file import Place, WeightFiles
from cost_model.errors import ConfigError, WeightsError
from passes.trace import alias_map

_INDEX = "*.safetensors.index.json"
_FILES = "*.safetensors"
_FLOATING = ("F", "BF")
_LOOKED_AT = 2**16
"""Values of two tensors of files that are compared where the model has one for both."""


class LoadedWeights(NamedTuple):
    """What ``load_weights(strict=False)`` did without: names of the model, and names of the files."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


class ModelValues(Mapping[str, Tensor]):
    """Whole tensors of a model by their first names, each made or read when it is asked for.

    Those that nobody has values of are missing. Errors: ConfigError.
    """

    def __init__(self, model: nn.Module, files: Mapping[str, Place] = MappingProxyType({})) -> None:
        self.tensors = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
        self.recipes, self.files = recipes_of(model), files

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if name in self.files:
            with WeightFiles(self.files) as files:
                return files.block(name, (0,) * tensor.ndim, tensor.shape).to(tensor.dtype)
        if name in self.recipes:
            return made(self.recipes[name]).to(tensor.dtype)
        if tensor.is_meta:
            raise KeyError(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.files or name in self.recipes or (name in self.tensors and not self.tensors[name].is_meta)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.tensors if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def request(self) -> dict[str, Any]:
        """What ranks fill by themselves (``autopar.runtime.initial``)."""
        return {"recipes": self.recipes, "files": self.files}

    def check_known(self) -> None:
        """ConfigError where a tensor has no values."""
        unknown = sorted(name for name in self.tensors if name not in self)
        if unknown:
            raise ConfigError(
                f"{unknown[0]!r} of the model is on the meta device and has no values to train; build the model with "
                "autopar.deferred(build), which knows its initial values, call exe.load_weights(path), or use "
                "autopar.estimate, which needs none"
            )


def drawn_states(recipes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of torch's generator before each call that draws: equal where processes drew alike."""
    return {
        f"the random state {index} of {name}": step["state"]
        for name, recipe in recipes.items()
        for index, step in enumerate(recipe["steps"])
        if step["state"] is not None
    }


def find_weights(path: str | os.PathLike[str], model: nn.Module) -> tuple[dict[str, Place], LoadedWeights]:
    """Where the files have each tensor of the model's state dict, by its first name; and what does not match.

    path: a safetensors file, or a folder of such with or without an index. Errors: WeightsError.
    """
    root = Path(path).expanduser().resolve()
    entries, first = _entries(root), alias_map(model)
    expected = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    found: dict[str, Place] = {}
    for name in sorted(entries.keys() & expected.keys(), key=lambda name: (first[name] != name, name)):
        _check_fits(root, name, entries[name], expected[name])
        taken = found.setdefault(first[name], entries[name].place)
        if taken != entries[name].place and not torch.equal(_begin(taken), _begin(entries[name].place)):
            message = f"{taken[1]!r} and {name!r} differ there, but are one tensor of the model"
            raise WeightsError(str(root), f"{message}; load weights of this very model", (taken[1], name))
    missing = dict.fromkeys(first[name] for name in expected if first[name] not in found)
    return found, LoadedWeights(tuple(missing), tuple(sorted(entries.keys() - expected.keys())))


def _begin(place: Place) -> Tensor:
    """The first values of a tensor of a file, in single precision: those of two that are not tied differ there."""
    file, key = place
    with safe_open(file, framework="pt") as opened:
        values = opened.get_slice(key)
        shape = values.get_shape()
        rows = max(1, _LOOKED_AT // max(1, math.prod(shape[1:])))
        begin: Tensor = (values[:rows] if shape else opened.get_tensor(key)).float()
    return begin


def check_all_match(path: str, loaded: LoadedWeights) -> None:
    """WeightsError naming what is missing, else what is unexpected."""
    for what, names in (("lacks", loaded.missing), ("has more than the model:", loaded.unexpected)):
        if names:
            some = ", ".join(map(repr, names[:3]))
            advice = "load the weights of this very model, or pass strict=False"
            raise WeightsError(path, f"it {what} {some} ({len(names)} in all); {advice}", names)


@dataclass(frozen=True)
class _Entry:
    """A tensor of a file; kind: the letters of its dtype there ("F32": "F")."""

    place: Place
    shape: tuple[int, ...]
    kind: str


def _entries(root: Path) -> dict[str, _Entry]:
    """Every tensor of the files by its name there. Errors: WeightsError."""
    entries: dict[str, _Entry] = {}
    known = _places_said(root)
    for file in _files(root, known):
        try:
            with safe_open(file, framework="pt") as opened:
                own = (key for key in opened.keys() if known.get(key, file.name) == file.name)
                found = {key: _entry(str(file), key, opened.get_slice(key)) for key in own}
        except (SafetensorError, OSError) as error:
            raise WeightsError(str(file), f"it cannot be read ({error}); give a whole safetensors file") from error
        _check_apart(root, file, found, entries)
        entries.update(found)
    return entries


def _check_apart(root: Path, file: Path, found: Mapping[str, _Entry], known: Mapping[str, _Entry]) -> None:
    """WeightsError where a file before has a tensor of this one."""
    if twice := sorted(found.keys() & known.keys()):
        other = Path(known[twice[0]].place[0]).name
        message = f"{other} and {file.name} both have {twice[0]!r} ({len(twice)} in all); give one file, or an index"
        raise WeightsError(str(root), message, tuple(twice))


def _entry(file: str, key: str, found: Any) -> _Entry:
    return _Entry((file, key), tuple(found.get_shape()), found.get_dtype().rstrip("0123456789"))


def _places_said(root: Path) -> dict[str, str]:
    """The file of each tensor, where the folder has an index. Errors: WeightsError."""
    indexes = sorted(root.glob(_INDEX))
    if len(indexes) != 1:
        return {}
    try:
        return dict(json.loads(indexes[0].read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        advice = 'it maps names of tensors to files under "weight_map"; mend it, or leave it out'
        raise WeightsError(str(indexes[0]), f"it is no index ({error!r}); {advice}") from error


def _files(root: Path, known: Mapping[str, str]) -> list[Path]:
    """The file itself, those that the folder's index names, or all of the folder. Errors: WeightsError."""
    if not root.is_dir():
        return [root]
    if known:
        return [root / name for name in sorted(set(known.values()))]
    files = sorted(root.glob(_FILES))
    if not files:
        raise WeightsError(str(root), "it holds no *.safetensors; save some with safetensors.torch.save_file")
    return files


def _check_fits(root: Path, name: str, entry: _Entry, tensor: Tensor) -> None:
    """WeightsError for another shape, or whole numbers in place of others; precisions may differ."""
    floats = entry.kind in _FLOATING
    if entry.shape == tuple(tensor.shape) and floats == tensor.is_floating_point():
        return
    has = f"{'real' if floats else 'whole'} numbers {list(entry.shape)}"
    needs = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    message = f"{name!r} has {has} there but {needs} in the model; load weights of this very model"
    raise WeightsError(str(root), message, (name,))
