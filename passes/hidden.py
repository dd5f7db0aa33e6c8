"""Hidden: parameters of modules that repeat another, kept out of the sight of torch's tracer.

Every parameter costs the tracer a millisecond: a fake tensor, a proxy, a placeholder, its name. Those of a module that
only repeats another are asked of nothing, so they are taken out of their modules while the model is exported, put back
while its forward runs, and become inputs of the graph afterwards (``passes.unroll``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


class Hidden:
    """names: of each hidden parameter, by its id; twins: its name -> that in its place in the first module that is
    alike; order: of all parameters of the model. ``own`` is equal for modules that may be alike.

    A module with a parameter that others hold too hides nothing.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], own: Callable[[nn.Module], Any]) -> None:
        named = list(model.named_parameters(remove_duplicate=False))
        self.order = tuple(name for name, _ in named)
        self.tensors = dict(named)
        self.names: dict[int, str] = {}
        self.twins: dict[str, str] = {}
        holders, paths = Counter(id(tensor) for _, tensor in named), {id(m): path for path, m in model.named_modules()}
        places = {module: place for place, module in enumerate(paths)}
        firsts: dict[Any, str] = {}
        self._modules: list[nn.Module] = []
        for module in sorted(modules, key=lambda each: places[id(each)]):
            path, inner = paths[id(module)], dict(module.named_parameters(remove_duplicate=False))
            first = firsts.setdefault(own(module), path)
            if first == path or any(holders[id(tensor)] > 1 for tensor in inner.values()):
                continue
            self._modules.append(module)
            self.names.update({id(tensor): f"{path}.{name}" for name, tensor in inner.items()})
            self.twins.update({f"{path}.{name}": f"{first}.{name}" for name in inner})
        self._held = [part._parameters for module in self._modules for part in module.modules()]
        self._saved = [dict(held) for held in self._held]
        self._of = {id(module.__dict__) for module in self._modules}  # which the tracer's proxies of modules share

    def is_of(self, module: nn.Module) -> bool:
        """Whether its parameters are hidden."""
        return id(module.__dict__) in self._of

    @contextmanager
    def away(self) -> Iterator[None]:
        """The modules without them."""
        self._take()
        try:
            yield
        finally:
            self._put()

    @contextmanager
    def back(self) -> Iterator[None]:
        """The modules as they are, inside ``away``."""
        self._put()
        try:
            yield
        finally:
            self._take()

    def _take(self) -> None:
        for held in self._held:
            held.clear()

    def _put(self) -> None:
        for held, saved in zip(self._held, self._saved, strict=True):
            held.clear()
            held.update(saved)
