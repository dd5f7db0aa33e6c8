"""Model since: what is done to the user's model after its program was planned, and after ranks took its weights.

What trains is part of a plan. Weights are copies: ranks have shards of their own, and the model keeps its values.
"""

from __future__ import annotations

import warnings

from torch import nn

from cost_model.errors import ConfigError

_NAMED = 3


class ModelSince:
    """Parameters as they were when the program was planned; ``taken``: as they were when ranks took their values."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [(name, parameter, parameter.requires_grad) for name, parameter in model.named_parameters()]
        self._taken: list[tuple[int, int]] | None = None
        self._returned = False

    def take(self) -> None:
        """Ranks take the values that the model has now."""
        self._taken, self._returned = self._values(), False

    def give(self) -> None:
        """The user is given what ranks have trained, and may load the model with it."""
        self._returned = True

    def check(self) -> None:
        """ConfigError where other parameters would train than when the program was planned; a warning, once for each
        time, where values were changed that ranks do not see."""
        others = [name for name, parameter, trains in self._parameters if parameter.requires_grad != trains]
        if others:
            raise ConfigError(
                f"requires_grad of {_listed(others)} is another than when the program was planned, which says what "
                "trains: set it before autopar.compile; to go on with what was trained, call exe.save(folder), compile "
                "again and load it"
            )
        if self._taken is None or (values := self._values()) == self._taken:
            return
        changed = [p[0] for p, now, before in zip(self._parameters, values, self._taken, strict=True) if now != before]
        if not self._returned:
            warnings.warn(
                f"the model's own {_listed(changed)} changed after its program took the weights, which trains copies "
                "of them and does not see it: call exe.load_weights(path) or exe.load(folder) to give it others",
                stacklevel=4,
            )
        self.take()

    def _values(self) -> list[tuple[int, int]]:
        """Of each parameter what tells whether it was written to or put into other memory."""
        return [(p.untyped_storage()._cdata, p._version) for _, p, _ in self._parameters]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
