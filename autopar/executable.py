"""Executable: training as its user knows it, on whatever ranks the plan has."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from autopar.checkpoint import (
    check_fits,
    driver_file,
    new_part,
    newest_part,
    publish,
    read_driver,
    set_random_states,
    write_driver,
)
from autopar.engine import Engine
from autopar.options import Options, SchedulerFactory
from autopar.parameter_groups import ParameterGroups, advance, make_scheduler
from autopar.ranks import decided, process_index
from autopar.runtime.optim import OptimizerSpec
from autopar.step_trace import step_trace
from cost_model.cluster import Cluster
from cost_model.errors import ConfigError, NonFiniteLossError


@dataclass(frozen=True)
class StepRecord:
    """One update of the parameters, as a hook gets it.

    step: how many there have been; loss: the mean over what was accumulated for it; samples: in all ranks;
    seconds: since the batch was handed over, accumulation included; learning_rates: of each group, as used;
    grad_norm: before clipping, None where nothing was clipped. loss_scale: of the next step, 1 where losses are not
    scaled; skipped: a gradient was infinite or NaN, so nothing was updated and the step does not count.
    """

    step: int
    loss: float
    samples: int
    seconds: float
    learning_rates: tuple[float, ...]
    grad_norm: float | None
    loss_scale: float = 1.0
    skipped: bool = False


Hook = Callable[[StepRecord], None]


class Executable(Engine):
    """A model compiled for a cluster: an engine that trains.

    step(batch): one training step, the same mean loss on every rank; with ``update=False`` gradients are only
    accumulated, for ``update()``. eval_step(batch): the loss alone. save(folder), load(folder): checkpoints.
    optimizer, scheduler: learning rates. add_hook: told of every step.
    """

    def __init__(self, model: nn.Module, cluster: Cluster, options: Options) -> None:
        super().__init__(model, cluster, options)
        self._groups: ParameterGroups | None = None
        self._scheduler: LRScheduler | None = None
        self._hooks: list[Hook] = []
        self._steps = 0
        self._pending = _Pending()

    def prepare(self, inputs: Any) -> None:
        super().prepare(inputs)
        self._groups, self._scheduler = _groups_and_scheduler(self.planned.optimizer, self._options.scheduler)

    @property
    def steps(self) -> int:
        """Updates so far, those before a loaded checkpoint included."""
        return self._steps

    @property
    def optimizer(self) -> ParameterGroups:
        """The groups of the optimizer, for a learning-rate scheduler of one's own; ConfigError where there is none."""
        if self.planned and self._groups is None:
            raise ConfigError("there is no optimizer: it was compiled with optimizer=None")
        assert self._groups is not None
        return self._groups

    @property
    def scheduler(self) -> LRScheduler | None:
        """The scheduler of ``compile(..., scheduler=)``, which every update advances."""
        return self._scheduler

    @property
    def grad_norm(self) -> float:
        """Norm of all gradients, before clipping, in the last step that clipped; NaN where none did."""
        return float(self.call("gradient_norm")[0])

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by so that its fp16 gradients are neither lost nor infinite; else 1."""
        return self._scaling()[0]

    def _scaling(self) -> tuple[float, bool]:
        """The scale of the loss, and whether the last update was skipped."""
        if not self.plan.precision.scales_loss:
            return 1.0, False
        found = self.call("scaling")[0]
        return float(found["state"][0]), bool(found["skipped"])

    def add_hook(self, hook: Hook) -> Callable[[], None]:
        """Call a function with a StepRecord after every update, in this process; returns what takes it away again."""
        self._hooks.append(hook)
        return lambda: self._hooks.remove(hook)

    # --- Steps

    def step(self, batch: Any, *, update: bool = True) -> float:
        """Forward, backward and optimizer on one global batch; returns the global mean loss.

        update=False: gradients add up and parameters stay until ``update()`` or a step that updates, which takes the
        mean over all batches since the last update. Errors: BatchError for another batch than planned, WorkerError
        when a rank fails, ClosedError afterwards, NonFiniteLossError.
        """
        begin = time.perf_counter()
        if self._pending.norm is not None:
            raise ConfigError("clip_grad_norm_ has reduced the gradients already; call update() before the next batch")
        parts = self.sent_parts(batch)
        self._send_changed_options()
        if update and not self._pending.losses:
            return self._stepped(float(self.call("step", parts)[0]), begin)
        loss = float(self.call("accumulate", parts)[0])
        self._accumulated(loss, begin)
        if update:
            self.update()
        return loss

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Clip what ``step(batch, update=False)`` accumulated to a norm over all ranks; returns the norm before.

        Every parameter counts once, whoever holds copies of it. To clip in every step, and have it in the estimate,
        pass ``max_grad_norm`` to compile. Errors: ConfigError where nothing has been accumulated.
        """
        self._check_accumulated("clip_grad_norm_")
        if not max_norm > 0:
            raise ConfigError(f"max_norm must be above 0, math.inf to only know the norm, not {max_norm!r}")
        norm = float(self.call_alike("clip", float(max_norm))[0])
        self._pending.norm = norm if self._pending.norm is None else self._pending.norm
        return norm

    def update(self) -> None:
        """Update the parameters with the mean of the accumulated gradients; ConfigError where there are none."""
        begin = time.perf_counter()
        self._check_accumulated("update")
        self._send_changed_options()
        self.call("update")
        self._pending.seconds += time.perf_counter() - begin
        self._updated()

    def eval_step(self, batch: Any) -> float:
        """The global mean loss of a batch, parameters, gradients and everything else left as they are.

        In the mode that ``train()`` and ``eval()`` set, at first that of the model. Errors: those of ``step``.
        """
        if self.training != self._model.training:
            return float(self.inferred(batch, loss=True))
        return float(self.call("evaluate", self.sent_parts(batch, evaluates=True))[0])

    def forward(self, batch: Any) -> Any:
        """What the model returns for a global batch, in the form in which it does: tensors on the CPU, on every rank.

        With local_batches each rank passes its replica's samples, which may be more or fewer than in training, and gets
        what belongs to them; what is summed over samples is of all of them.

        In the mode that is set; buffers stay as they are. The batch may differ from that which was planned for: its
        program is traced when its like is first seen. Errors: those of tracing, BatchError, UnsupportedError.
        """
        return self.inferred(batch, loss=False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of ``eval_step`` and ``forward``; the model itself, and how ``step`` trains it, stay."""
        self.training = mode
        return self

    def eval(self) -> Self:
        """``train(False)``: no dropout, running statistics."""
        return self.train(False)

    def trace(self, path: str | os.PathLike[str], batch: Any) -> float:
        """A step on a batch, measured: writes it as a Chrome trace beside the estimated one, with the same names.

        It trains as ``step`` does; all ranks of a job call it, and rank 0 writes. Returns the loss.
        """
        begin = time.perf_counter()
        if self._pending.losses:
            raise ConfigError("gradients are accumulated, and what is traced is a whole step; call update() before")
        parts = self.sent_parts(batch)
        self._send_changed_options()
        ranks = self.call("trace", parts)
        if self.is_main:
            trace = step_trace(self.planned.linked.program, self.cluster, ranks)
            Path(path).write_text(json.dumps(trace))
        return self._stepped(float(ranks[0]["loss"]), begin)

    def _stepped(self, loss: float, begin: float) -> float:
        """What follows a whole step."""
        self._accumulated(loss, begin)
        self._updated()
        return loss

    def _accumulated(self, loss: float, begin: float) -> None:
        if not math.isfinite(loss) and not self._is_scaled_down():
            self._discard()
            raise NonFiniteLossError(self._steps, loss)
        self._pending.add(loss, time.perf_counter() - begin)

    def _is_scaled_down(self) -> bool:
        """Whether an update was skipped for the loss and a smaller scale may help: none below 1 does."""
        return self.plan.precision.scales_loss and self.loss_scale >= 1

    def _updated(self) -> None:
        """Schedulers, hooks, and the count, after an update; one that was skipped is told to hooks alone."""
        pending, self._pending = self._pending, _Pending()
        (scale, skipped), loss = self._scaling(), sum(pending.losses) / len(pending.losses)
        rates = () if self._groups is None else tuple(float(g.get("lr", math.nan)) for g in self._groups.param_groups)
        if not skipped:
            self._advance(loss)
        if self._hooks:
            samples = len(pending.losses) * self.plan.batch
            norm = None if skipped else self._norm_before(pending)
            record = StepRecord(self._steps, loss, samples, pending.seconds, rates, norm, scale, skipped)
            for hook in tuple(self._hooks):
                hook(record)

    def _norm_before(self, pending: _Pending) -> float | None:
        """Of all gradients, before the first clipping; an update clips once more what was clipped by hand."""
        return self.grad_norm if pending.norm is None and self._options.max_grad_norm is not None else pending.norm

    def _advance(self, loss: float) -> None:
        self._steps += 1
        if self._groups is not None:
            self._groups.step()
        if self._scheduler is not None:
            advance(self._scheduler, loss)

    def _send_changed_options(self) -> None:
        changes = {} if self._groups is None else self._groups.changes()
        if changes:
            self.call_alike("configure", changes)

    def _check_accumulated(self, what: str) -> None:
        self._check_open()
        if not self._pending.losses:
            raise ConfigError(f"there are no gradients for {what}(): call step(batch, update=False) before")

    def _discard(self) -> None:
        """Forget what was accumulated."""
        self._pending = _Pending()
        self.call("discard")

    # --- Checkpoints

    def save(self, folder: str | os.PathLike[str], extra: Any = None) -> None:
        """Write a checkpoint that any plan of the same model and optimizer can load; all ranks of a job call it.

        It holds parameters, optimizer state, the scheduler, the step count, the random states of data loading, and
        ``extra``: plain values and tensors of the caller's own. What was in the folder before stays whole until the
        new one is. Errors: CheckpointError, ConfigError for an extra that cannot be kept, and for options of the
        optimizer that were changed on some ranks only, UnsupportedError.
        """
        self._check_open()
        if self._pending.losses:
            raise ConfigError("gradients are accumulated that a checkpoint does not keep; call update() before")
        self._send_changed_options()
        if self._groups is not None:
            advice = "change exe.optimizer.param_groups alike on every rank, and load the last checkpoint"
            self._running().check_same("optimizer", self._groups.numbers(), advice)
        state = self._described()
        ranks = self.call("training_state")
        state["groups"] = {index: tree for rank in reversed(ranks) for index, tree in rank["groups"].items()}
        state["states"] = {name: kinds for rank in ranks for name, kinds in rank["states"].items()}
        scheduler = None if self._scheduler is None else self._scheduler.state_dict()
        state["loss_scale"] = ranks[0]["loss_scale"]
        state |= {"scheduler_state": scheduler, "steps": self._steps, "drawn": self._drawn[False], "extra": extra}
        content, root = driver_file(state), Path(folder).resolve()
        name = decided(lambda: new_part(root, self._steps))
        write_driver(root / name, process_index(), content)
        self.call_alike("save", str(root / name))
        decided(lambda: publish(root, name))

    def load(self, folder: str | os.PathLike[str]) -> Any:
        """Go on from the newest complete checkpoint in a folder, whatever plan wrote it; returns its ``extra``.

        Gradients accumulated before are forgotten. All ranks of a job call it. Errors: CheckpointError where there is
        none, or one of another model or optimizer.
        """
        self._check_open()
        root = Path(folder).resolve()
        here = self._described()
        part = root / decided(lambda: newest_part(root))
        saved = read_driver(part, process_index())
        check_fits(part, saved, here)
        request = {"folder": str(part), **{name: saved.get(name) for name in ("states", "groups", "loss_scale")}}
        self.call_alike("load", request)
        self._discard()
        if self._groups is not None:
            self._groups.restore(saved["groups"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(saved["scheduler_state"])
        set_random_states(saved["random"])
        self._steps, self._drawn[False] = saved["steps"], saved["drawn"]
        return saved["extra"]

    def _described(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the executable that loads it."""
        optimizer, held = self.planned.optimizer, self._linked.first_holder
        return {
            "tensors": {
                name: (tuple(t.shape), str(t.dtype).removeprefix("torch."))
                for name, t in self._model.state_dict().items()
                if name in held
            },
            "optimizer": None if optimizer is None else optimizer.path,
            "groups of parameters": [] if optimizer is None else [list(group.names) for group in optimizer.groups],
            "scheduler": None if self._scheduler is None else type(self._scheduler).__name__,
        }


class _Pending:
    """What has been accumulated since the last update; norm: before it was clipped by hand, None where it was not."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds = 0.0
        self.norm: float | None = None

    def add(self, loss: float, seconds: float) -> None:
        self.losses.append(loss)
        self.seconds += seconds


def _groups_and_scheduler(
    optimizer: OptimizerSpec | None, factory: SchedulerFactory | None
) -> tuple[ParameterGroups | None, LRScheduler | None]:
    groups = None if optimizer is None else ParameterGroups(optimizer)
    if factory is None:
        return groups, None
    if groups is None:
        raise ConfigError("a scheduler needs an optimizer, and optimizer is None; pass both, or neither")
    return groups, make_scheduler(factory, groups)
