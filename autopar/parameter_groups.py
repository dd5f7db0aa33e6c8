"""The groups of the user's optimizer as the user sees them while ranks hold the real ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from autopar.options import SchedulerFactory
from autopar.runtime.optim import OptimizerSpec, options_from_tree, options_to_tree
from cost_model.errors import ConfigError


class ParameterGroups(Optimizer):
    """Stands for the optimizers of all ranks: its ``param_groups`` are the user's groups, with the options they have.

    What is changed in them, by hand or by a learning-rate scheduler made on this object, holds from the next step on.
    The parameters in it are empty and its ``step`` does nothing.
    """

    def __init__(self, spec: OptimizerSpec) -> None:
        groups = [{**copy.deepcopy(dict(g.options)), "params": [torch.empty(0)]} for g in spec.groups]
        shared = {n: v for n, v in spec.arguments.items() if all(n in group.options for group in spec.groups)}
        super().__init__(groups, dict(shared))
        self._names = [tuple(group.options) for group in spec.groups]
        self._sent = self._copies()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_sent"):
            raise ConfigError(
                "ranks hold the groups that compile was given: make all of them in the optimizer factory, "
                "and change what they have in exe.optimizer.param_groups"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        raise ConfigError("the optimizer's state lies on the ranks: exe.save(folder) writes it, with its options")

    def load_state_dict(self, state_dict: Any) -> None:
        raise ConfigError("the optimizer's state lies on the ranks: exe.load(folder) reads what exe.save wrote")

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: ranks update the parameters. Schedulers ask that it is called before they are."""

    def changes(self) -> dict[int, Any]:
        """Options that have changed since they were last asked for, by group, as ``set_group_options`` takes them.

        Those alone: optimizers that count in their groups do so on the ranks. Errors: ConfigError for options that are
        gone, or no longer numbers.
        """
        now, changed = self._copies(), {}
        for index, (old, new) in enumerate(zip(self._sent, now, strict=True)):
            other = {name: value for name, value in new.items() if not _same(value, old[name])}
            for name, value in other.items():
                _check_stays_a_number(index, name, old[name], value)
            if other:
                changed[index] = options_to_tree(other)
        self._sent = now
        return changed

    def numbers(self) -> dict[str, torch.Tensor]:
        """Learning rates and other numbers that ranks were sent last, by name."""
        options = ((f"{name} of group {k}", value) for k, sent in enumerate(self._sent) for name, value in sent.items())
        return {name: torch.as_tensor(v) for name, v in options if isinstance(v, int | float | torch.Tensor)}

    def restore(self, groups: Mapping[int, Any]) -> None:
        """Take options that ranks hold already."""
        for index, tree in groups.items():
            self.param_groups[index].update(options_from_tree(tree))
        self._sent = self._copies()

    def _copies(self) -> list[dict[str, Any]]:
        """The options of each group, as plain values of their own."""
        groups = list(zip(self.param_groups, self._names, strict=True))
        for index, (group, names) in enumerate(groups):
            for gone in sorted(set(names) - group.keys()):
                raise ConfigError(f"group {index} of exe.optimizer has lost its {gone!r}; put it back")
        return [options_from_tree(options_to_tree({name: group[name] for name in names})) for group, names in groups]


def _check_stays_a_number(index: int, name: str, old: Any, new: Any) -> None:
    """What ranks would fail by in the middle of a step. Errors: ConfigError."""
    if isinstance(old, int | float) and not isinstance(new, int | float | torch.Tensor):
        raise ConfigError(f"{name!r} of group {index} of exe.optimizer was {old} and is {new!r}; set it to a number")


def _same(one: Any, other: Any) -> bool:
    """Whether two plain values are equal."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def make_scheduler(factory: SchedulerFactory, groups: ParameterGroups) -> LRScheduler:
    """The user's scheduler on these groups. Errors: ConfigError."""
    try:
        scheduler = factory(groups)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the scheduler factory failed on the optimizer: {error}; pass a torch.optim.lr_scheduler class with its "
            "options bound, e.g. functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=1000)"
        ) from error
    if not isinstance(scheduler, LRScheduler):
        raise ConfigError(f"the scheduler factory returned a {type(scheduler).__name__}, not an LRScheduler")
    return scheduler


def advance(scheduler: LRScheduler, loss: float) -> None:
    """One step of a scheduler, which some take by the loss."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()
