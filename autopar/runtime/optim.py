"""Optimizers as data: what a user's factory made, by class path, names and plain values, made again on each rank."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import numbers
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from cost_model.errors import ConfigError, UnsupportedError
from passes.fakes import as_parameter, fake_tensor

Factory: TypeAlias = Callable[[Any], Optimizer]
"""Called once, with the list of trainable parameters in model order."""
Plain: TypeAlias = Any
"""None, bool, int, float, str, torch.dtype, real tensor, or a list, tuple or dict of plain values."""

_PASS_A_CLASS = "pass a torch.optim class with its options bound, e.g. functools.partial(torch.optim.AdamW, lr=3e-4)"
_PARAMETERS = "params"
_IMPLEMENTATIONS = ("foreach", "fused")
"""Options that say how an update is computed; None leaves that to ``chosen``."""
_FUSED_AS_LOOP = ("float32", "float64")


@dataclass(frozen=True)
class ParameterGroup:
    """One entry of ``optimizer.param_groups``: every option it had, and its parameters by the model's names."""

    names: tuple[str, ...]
    options: Mapping[str, Plain] = field(hash=False)


@dataclass(frozen=True)
class OptimizerSpec:
    """All that a rank needs to make the optimizer again.

    path: importable in a fresh process, "torch.optim.adamw.AdamW"; arguments: the constructor's, after the
    parameters, as they were passed or defaulted. Invariant: no parameter is in two groups.
    """

    path: str
    arguments: Mapping[str, Plain] = field(hash=False)
    groups: tuple[ParameterGroup, ...]

    def __post_init__(self) -> None:
        names = [name for group in self.groups for name in group.names]
        assert len(names) == len(set(names)), names

    def to_tree(self) -> dict[str, Any]:
        """None, bool, int, float, str, tensors, and lists and dicts of them."""
        groups = [{"names": list(g.names), "options": _packed(dict(g.options))} for g in self.groups]
        return {"path": self.path, "arguments": _packed(dict(self.arguments)), "groups": groups}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> OptimizerSpec:
        """Inverse of ``to_tree``."""
        groups = tuple(ParameterGroup(tuple(g["names"]), _unpacked(g["options"])) for g in tree["groups"])
        return cls(tree["path"], _unpacked(tree["arguments"]), groups)


# --- From a factory to a spec ---------------------------------------------------------------------------------------


def capture(
    factory: Factory | None, named_shapes: Mapping[str, tuple[Sequence[int], torch.dtype]]
) -> OptimizerSpec | None:
    """Call the factory once on stand-ins for the parameters, in the mapping's order, and read what it made.

    None stays None: no optimizer, gradients only. Parameters the factory leaves out stay as they are. Attributes set
    on the optimizer after its construction are not seen. Errors: ConfigError, UnsupportedError.
    """
    if factory is None:
        return None
    if not callable(factory):
        raise ConfigError(f"optimizer is a {type(factory).__name__}, not a function of parameters; {_PASS_A_CLASS}")
    probes = _probes(named_shapes)
    optimizer = _made(factory, list(probes.values()))
    _check_supported(optimizer)
    path = _importable_path(type(optimizer))
    names = {id(probe): name for name, probe in probes.items()}
    groups = tuple(_group(group, names) for group in optimizer.param_groups)
    _check_once(groups)
    spec = OptimizerSpec(path, _plain_options(_arguments(factory, optimizer), f"{path}'s argument"), groups)
    _check_alike(optimizer, build(spec, probes))
    return spec


def _probes(named_shapes: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, nn.Parameter]:
    """Parameters without memory that say they are on the CPU."""
    return {
        name: as_parameter(fake_tensor(shape, dtype), dtype.is_floating_point)
        for name, (shape, dtype) in named_shapes.items()
    }


def _made(factory: Factory, parameters: list[nn.Parameter]) -> Optimizer:
    """What the factory returns."""
    try:
        optimizer = factory(parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the optimizer factory failed on a list of {len(parameters)} parameters: {error}; "
            f"it is called once with the list of all trainable parameters: {_PASS_A_CLASS}"
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"the optimizer factory returned a {type(optimizer).__name__}, not a torch.optim.Optimizer; {_PASS_A_CLASS}"
        )
    return optimizer


def _arguments(factory: Factory, optimizer: Optimizer) -> dict[str, Any]:
    """Constructor arguments: the options it keeps as defaults, and what a ``functools.partial`` of the class names."""
    kind = type(optimizer)
    accepted = inspect.signature(kind.__init__).parameters
    defaults = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    is_partial = isinstance(factory, functools.partial) and factory.func is kind
    return {**defaults, **(factory.keywords if is_partial else {})}  # type: ignore[attr-defined]


def _check_alike(made: Optimizer, again: Optimizer | None) -> None:
    """A rank's optimizer must have the options of the user's; those outside the groups show as attributes."""
    for name, value in vars(made).items():
        if isinstance(value, bool | int | float | str) and again is not None and getattr(again, name, None) != value:
            kind = type(made).__name__
            raise UnsupportedError(
                f"{kind} keeps {name}={value!r} outside its parameter groups, where a rank cannot see it; "
                f"pass functools.partial({kind}, {name}={value!r}, ...) as optimizer"
            )


def _check_supported(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UnsupportedError("SparseAdam needs sparse gradients, and gradients here are dense; use torch.optim.Adam")
    needed = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in needed):
        raise UnsupportedError(
            f"{name}.step needs a closure that runs the model again, which a distributed step cannot give it; "
            "use an optimizer whose step() takes no arguments, such as torch.optim.AdamW"
        )
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise UnsupportedError(
            f"the {name} has step hooks, and code cannot be sent to a rank; "
            "override step() in a subclass defined in a module instead"
        )


def _importable_path(kind: type[Optimizer]) -> str:
    """Module and qualified name, by which another process finds the very same class."""
    path = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__ == "__main__" or "<" in kind.__qualname__ or not _is_found(kind, path):
        raise ConfigError(
            f"optimizer class {path} cannot be imported by another process; "
            "define it in a module (a .py file beside the script, at top level) and import it from there"
        )
    return path


def _is_found(kind: type[Optimizer], path: str) -> bool:
    try:
        return importlib.util.find_spec(kind.__module__) is not None and pkgutil.resolve_name(path) is kind
    except (ImportError, AttributeError, ValueError):
        return False


def _group(group: Mapping[str, Any], names: Mapping[int, str]) -> ParameterGroup:
    unknown = [parameter for parameter in group[_PARAMETERS] if id(parameter) not in names]
    if unknown:
        raise ConfigError(
            f"the optimizer factory added a parameter of shape {tuple(unknown[0].shape)} that it was not given; "
            "use only the parameters in its argument, and make any other a parameter of the model"
        )
    options = {name: value for name, value in group.items() if name != _PARAMETERS}
    return ParameterGroup(tuple(names[id(p)] for p in group[_PARAMETERS]), _plain_options(options, "group option"))


def _check_once(groups: Iterable[ParameterGroup]) -> None:
    names = [name for group in groups for name in group.names]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ConfigError(f"the optimizer factory uses parameter {twice[0]!r} twice; put it in one group, once")


# --- Plain values ---------------------------------------------------------------------------------------------------


def _plain_options(options: Mapping[str, Any], what: str) -> dict[str, Plain]:
    return {name: _plain(value, f"{what} {name!r}") for name, value in options.items()}


def _plain(value: Any, where: str) -> Plain:
    """A copy made of plain values; ConfigError names the first that is not."""
    if value is None or isinstance(value, bool | torch.dtype):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if type(value) in (torch.Tensor, nn.Parameter) and not value.is_meta:
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {_plain(key, f"a key of {where}"): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise ConfigError(
        f"{where} of the optimizer is a {type(value).__module__}.{type(value).__qualname__}, which cannot be sent to "
        "a rank; use numbers, strings, tensors and lists of them, or fix it in a subclass defined in a module"
    )


def _packed(value: Plain) -> Any:
    """Without the types a tree lacks: a dict of one key says what stood there."""
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": [[_packed(key), _packed(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_packed(item) for item in value]}
    return [_packed(item) for item in value] if isinstance(value, list) else value


def _unpacked(value: Any) -> Plain:
    if isinstance(value, list | tuple):
        return [_unpacked(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    ((kind, inner),) = value.items()
    if kind == "dtype":
        return getattr(torch, inner)
    if kind == "tuple":
        return tuple(_unpacked(item) for item in inner)
    return {_unpacked(key): _unpacked(item) for key, item in inner}


# --- From a spec to an optimizer ------------------------------------------------------------------------------------


def chosen(spec: OptimizerSpec, device: str, dtypes: Mapping[str, str]) -> OptimizerSpec:
    """With the fastest implementation that torch has on a kind of device, in groups whose options leave it open.

    dtypes: of the parameters that are updated. On CUDA torch takes lists by itself (torch.optim.optimizer.
    _default_to_fused_or_foreach, which does not know fake tensors). On CPUs it loops, where its fused kernels take a
    quarter of the time and round as the loop does, but for half dtypes.
    """
    wanted = "fused" if device == "cpu" else "foreach"
    is_own = optimizer_class(spec.path).__module__.startswith("torch.optim.")

    def takes(group: ParameterGroup) -> bool:
        if wanted not in group.options or not _leaves_open(group.options):
            return False
        rounds_alike = all(dtypes[n] in _FUSED_AS_LOOP for n in group.names if n in dtypes)
        return device != "cpu" or (is_own and rounds_alike and not group.options.get("capturable"))

    groups = (replace(g, options={**g.options, wanted: True}) if takes(g) else g for g in spec.groups)
    return replace(spec, groups=tuple(groups))


def _leaves_open(options: Mapping[str, Plain]) -> bool:
    """Whether a group says nothing of how its update is computed, nor needs a loop."""
    if any(options.get(name) is not None for name in _IMPLEMENTATIONS):
        return False
    has_tensor_rate = isinstance(options.get("lr"), torch.Tensor)
    return not options.get("differentiable") and (not has_tensor_rate or bool(options.get("capturable")))


def build(spec: OptimizerSpec, parameters: Mapping[str, torch.Tensor]) -> Optimizer | None:
    """The optimizer of those of its parameters that are here, in the spec's order; None where none is.

    Groups without a parameter here are left out. Errors: ConfigError, UnsupportedError.
    """
    here = [replace(group, names=tuple(n for n in group.names if n in parameters)) for group in spec.groups]
    groups = [group for group in here if group.names]
    if not groups:
        return None
    held = [{**_copied(g.options), _PARAMETERS: [parameters[n] for n in g.names]} for g in groups]
    kind = optimizer_class(spec.path)
    try:
        made: Optimizer = kind(held, **_copied(spec.arguments))
    except (TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{spec.path} cannot be made again from its groups and arguments: {error}; "
            "give it a constructor that takes parameter groups first and its options by name"
        ) from error
    if len(made.param_groups) != len(groups):
        raise UnsupportedError(
            f"{spec.path} turns {len(groups)} parameter groups into {len(made.param_groups)}; "
            "let its constructor keep the groups it is given, and split them in the factory"
        )
    for group, wanted in zip(made.param_groups, groups, strict=True):
        group.update(_copied(wanted.options))
    return made


def optimizer_class(path: str) -> Any:
    """The class at an import path. Errors: ConfigError."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"this process cannot import the optimizer class {path}: {error}; "
            "put the folder of its module on PYTHONPATH, or install it"
        ) from error


def _copied(options: Mapping[str, Plain]) -> dict[str, Plain]:
    """Each optimizer has its own tensors."""
    return copy.deepcopy(dict(options))


# --- The options of groups while training --------------------------------------------------------------------------


def group_options(spec: OptimizerSpec, optimizer: Optimizer, parameters: Iterable[str]) -> dict[int, Any]:
    """Group of the spec -> what its options are now, as a tree; of the groups that ``build`` made of ``parameters``.

    How the update is computed is said as the spec says it: it may be another on other devices.
    """
    groups = zip(_groups_here(spec, parameters), optimizer.param_groups, strict=True)
    return {i: options_to_tree({**_trained(group), **_said(spec.groups[i].options)}) for i, group in groups}


def set_group_options(
    spec: OptimizerSpec, optimizer: Optimizer, parameters: Iterable[str], changes: Mapping[int, Any]
) -> None:
    """Inverse of ``group_options``; groups that are not here are passed over."""
    for index, group in zip(_groups_here(spec, parameters), optimizer.param_groups, strict=True):
        changed = options_from_tree(changes.get(index, options_to_tree({})))
        group.update({**_trained(changed), **{n: v for n, v in _said(changed).items() if v is not None}})


def _trained(options: Mapping[str, Plain]) -> dict[str, Plain]:
    """Options of the update itself."""
    return {name: value for name, value in options.items() if name not in (_PARAMETERS, *_IMPLEMENTATIONS)}


def _said(options: Mapping[str, Plain]) -> dict[str, Plain]:
    """Options of how it is computed."""
    return {name: options[name] for name in _IMPLEMENTATIONS if name in options}


def _groups_here(spec: OptimizerSpec, parameters: Iterable[str]) -> list[int]:
    here = set(parameters)
    return [index for index, group in enumerate(spec.groups) if not here.isdisjoint(group.names)]


def options_to_tree(options: Mapping[str, Plain]) -> Any:
    """Options as ranks and files take them."""
    return _packed(_plain_options(options, "group option"))


def options_from_tree(tree: Any) -> dict[str, Plain]:
    """Inverse of ``options_to_tree``."""
    options: dict[str, Plain] = _unpacked(tree)
    return options
