"""RankExecutor: one rank's program, its shards and its part in a step.

Receives plain data only (source text, tensors, numbers), so it runs the same in a worker process and under torchrun.
"""

from __future__ import annotations

import copy
import datetime
import functools
import importlib
import itertools
import linecache
from collections import ChainMap, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from autopar.runtime import kernels
from autopar.runtime.accumulation import Add, Store
from autopar.runtime.gradients import WORLD_REDUCTION, Gradients
from autopar.runtime.measure import ONCE, measure, traced_step
from autopar.runtime.timed import Part
from autopar.runtime.transfers import Transfer, Transfers, connect_stages

Tree = Any
Awaited = tuple[Transfer, int]
"""A tensor under way, and the rank at the other end."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One part of the chain on this rank; received, sent: (shape, dtype) of what crosses its ends; links: what this
    rank sends and receives of that -> (process group, (the rank at the other end, first element, behind the last)
    of each piece)."""

    setup: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    weight: Callable[..., Any] | None
    received: Tree
    sent: Tree
    links: Mapping[str, tuple[str, Sequence[tuple[int, int, int]]]]


class RankExecutor(Gradients):
    """One rank. ``payload`` is built by ``autopar.payload``; methods take and return plain trees."""

    def __init__(self, rank: int, world_size: int, payload: Tree) -> None:
        super().__init__(rank, world_size, payload)
        self.module = _load(payload, self.device)
        self.kernels: ModuleType = kernels
        self.chunks = [self._chunk(described) for described in payload["chunks"]]
        self.transfers = self._connected()
        self.constants = self._set_up()
        self.accumulated, self.reduced = 0, False
        self.is_stale = False
        self.attached: dict[str, RankExecutor] = {}
        self._reset()

    def attach(self, payload: Tree) -> None:
        """Another program over the same parameters and buffers, and what it alone reads, for ``infer``."""
        other = copy.copy(self)
        other.spec = {**self.spec, **payload["program"]}
        other.module = _load(other.spec, self.device)
        other.params = ChainMap(self.params, self._here(payload["params"]))
        other.buffers = ChainMap(self.buffers, self._here(payload["buffers"]))
        other.chunks = [other._chunk(described) for described in other.spec["chunks"]]
        self.attached[payload["name"]] = other

    def infer(self, request: Tree) -> Tree:
        """The loss of an attached program on this rank's part of a batch, and the parts of what it collects."""
        other = self.attached[request["name"]]
        self.comm.collected = {}
        other.constants = other._set_up()  # buffers may have changed since
        loss = other.evaluate(request["batch"])
        return {"loss": loss, "collected": self.comm.collected}

    def _chunk(self, described: Tree) -> _Chunk:
        names = ("setup", "forward", "backward", *(["weight"] if described["splits_backward"] else []))
        found = {name: getattr(self.module, f"{name}{described['suffix']}") for name in names}
        return _Chunk(**{"weight": None, **found}, **{key: described[key] for key in ("received", "sent", "links")})

    def _connected(self) -> Transfers:
        """What carries tensors between stages; all ranks ask for it together."""
        others = {rank for chunk in self.chunks for _, pieces in chunk.links.values() for rank, _, _ in pieces}
        groups = {name: group for name, (ranks, group) in self.groups.items() if len(ranks) == self.world_size}
        return connect_stages(groups, others, self.device)

    def release(self) -> None:
        super().release()
        self.transfers.close()

    def _set_up(self) -> list[dict[str, Tensor]]:
        """Values of each chunk that never change."""
        return [chunk.setup(self.buffers, self.comm, kernels, self.device) for chunk in self.chunks]

    def _reset(self) -> None:
        self.batch: dict[str, Tensor] = {}
        self.step_values: dict[str, Tensor] = {}
        self.saved: dict[Part, list[Tensor]] = {}
        self.kept: dict[Part, list[Tensor]] = {}
        self.received: dict[Part, Tensor] = {}
        self.outgoing: dict[Part, Tensor] = {}
        self.grad_received: dict[Part, Tensor] = {}
        self.grad_outgoing: dict[Part, Tensor] = {}
        self.expected: defaultdict[str, deque[tuple[list[Awaited], Tensor]]] = defaultdict(deque)
        self.sending: defaultdict[str, deque[tuple[list[Awaited], Tensor, Part]]] = defaultdict(deque)
        self.peer = self._only_other()
        self.begun = {}
        self.reducing = False
        self.loss: Tensor | None = None

    # --- the step, as the generated program calls it

    def step(self, batch: Tree) -> float:
        """One training step on this rank's part of the global batch; returns the global mean loss."""
        with torch.no_grad(), self.named_faults():
            self._begin(batch)
            self.reducing = True
            self.module.step(self)
            return self._finish()

    def accumulate(self, batch: Tree) -> float:
        """Forward and backward alone; gradients add up until ``update``, which takes their mean."""
        with torch.no_grad(), self.named_faults():
            self._begin(batch)
            self.module.accumulate(self)
            self.accumulated += 1
            return self._finish()

    def clip(self, max_norm: float) -> float:
        """Reduce what has been accumulated, and clip it; returns the norm before."""
        with torch.no_grad(), self.named_faults():
            self._reduce_accumulated()
            self.clip_gradients(max_norm)
        return self.grad_norm

    def gradient_norm(self, _: Tree = None) -> float:
        """Of the last step that clipped; NaN before."""
        return self.grad_norm

    def update(self, _: Tree = None) -> None:
        """Update the parameters with what has been accumulated."""
        with torch.no_grad(), self.named_faults():
            self._reduce_accumulated()
            self.module.update(self)
        self.discard()

    def discard(self, _: Tree = None) -> None:
        """Forget what has been accumulated."""
        self.accumulated, self.reduced = 0, False

    def evaluate(self, batch: Tree) -> float:
        """The global mean loss of this rank's part of a batch, and nothing else."""
        with torch.no_grad(), self.named_faults():
            self._begin(batch, keep=True)
            self.module.evaluate(self)
            return self._finish()

    def _reduce_accumulated(self) -> None:
        if self.reduced:
            return
        self.module.reduce(self)
        self.reduced = True
        if self.accumulated > 1:
            for buffer in self.flat.values():
                buffer.mul_(1 / self.accumulated)

    def _begin(self, batch: Mapping[str, Tensor], *, keep: bool = False) -> None:
        """keep: leave the gradients as they are; else those of the last step are cleared before the first backward."""
        self._reset()
        self.batch = {name: batch[name].to(self.device).contiguous() for name in self.spec["batch"]}
        self.module.feed(self)
        self.step_values = self.module.prologue(self.batch, self.buffers, self.comm, self.kernels, self.device)
        if self.scaler is not None:
            self.step_values["loss_scale"] = self.scaler.scale
        self.is_stale = self.spec["accumulates"] and self.accumulated == 0 and not keep

    def _clear_gradients(self) -> None:
        """What the step before left: once, while a stage waits for another if it does."""
        if self.is_stale:
            for buffer in self.flat.values():
                buffer.zero_()
            self.is_stale = False

    def _finish(self) -> float:
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.loss is not None and self.spec["reports_loss"]:
            loss.copy_(self.loss if self.scaler is None else self.loss / self.scaler.scale)
        if self.world_size > 1:
            self._timed("loss", ONCE, lambda: self.comm.all_reduce_(loss, "world", "sum"), WORLD_REDUCTION)
        value = float(loss)
        self._reset()
        return value

    def gather_rows(self, name: str, size: int) -> None:
        """A leaf of the global batch, from the rows that replicas were given."""
        rows = self.batch[name]
        whole = self._timed("feed", ONCE, lambda: self.comm.all_gather(rows, "dp", size, 0, 1), "all_gather dp")
        self.batch[name] = whole

    def forward(self, microbatch: int, chunk: int = 0) -> None:
        """Run a chunk's ``forward`` on one microbatch and keep what its backward reads."""
        part, own = (microbatch, chunk), self.chunks[chunk]
        inbox = [self.received.pop(part)] if part in self.received else []
        result = self._timed(
            "forward",
            part,
            lambda: own.forward(
                self.params, self.buffers, self.constants[chunk], *self._slices(microbatch),
                inbox, self.comm, self.kernels, self.device,
            ),
        )  # fmt: skip
        output, self.saved[part] = result
        if own.sent is not None:
            self.outgoing[part] = output
        else:
            self.loss = output.double() if self.loss is None else self.loss.add_(output)

    def backward(self, microbatch: int, chunk: int = 0) -> None:
        """Run a chunk's ``backward`` on one microbatch; its gradients are in the buffers afterwards."""
        part, own = (microbatch, chunk), self.chunks[chunk]
        saved = self.saved.pop(part)
        if own.sent is not None:
            saved.append(self.grad_received.pop(part))
        gradient = self._backward("backward", own.backward, part, saved)
        if own.weight is not None:
            gradient, self.kept[part] = gradient
        if own.received is not None:
            self.grad_outgoing[part] = gradient

    def weight(self, microbatch: int, chunk: int = 0) -> None:
        """Run a chunk's ``weight`` on one microbatch: the gradients that its backward left."""
        part, own = (microbatch, chunk), self.chunks[chunk]
        assert own.weight is not None
        self._backward("weight", own.weight, part, self.kept.pop(part))

    def _backward(self, name: str, function: Callable[..., Any], part: Part, saved: list[Tensor]) -> Any:
        self._clear_gradients()
        microbatch, chunk = part
        accumulate = Add if self.spec["accumulates"] or self.accumulated else Store
        last = self.reducing and microbatch == self.spec["microbatches"] - 1
        handed = accumulate(self._complete) if last else accumulate()
        return self._timed(
            name,
            part,
            lambda: function(
                self.params, self.buffers, self.constants[chunk], *self._slices(microbatch),
                saved, self.targets, handed, self.comm, self.kernels, self.device,
            ),
        )  # fmt: skip

    def expect_forward(self, microbatch: int, chunk: int = 0) -> None:
        """Post the receive of an activation from the stage before."""
        self._expect("receive_forward", self.chunks[chunk], self.chunks[chunk].received)

    def receive_forward(self, microbatch: int, chunk: int = 0) -> None:
        """Wait for the activation of a microbatch from the stage before."""
        self.received[microbatch, chunk] = self._receive("receive_forward", (microbatch, chunk))

    def expect_backward(self, microbatch: int, chunk: int = 0) -> None:
        """Post the receive of a gradient from the stage after."""
        self._expect("receive_backward", self.chunks[chunk], self.chunks[chunk].sent)

    def receive_backward(self, microbatch: int, chunk: int = 0) -> None:
        """Wait for the gradient of a microbatch from the stage after."""
        self.grad_received[microbatch, chunk] = self._receive("receive_backward", (microbatch, chunk))

    def send_forward(self, microbatch: int, chunk: int = 0) -> None:
        """Start sending an activation to the stage after."""
        self._send("send_forward", self.outgoing.pop((microbatch, chunk)), (microbatch, chunk))

    def send_backward(self, microbatch: int, chunk: int = 0) -> None:
        """Start sending a gradient to the stage before."""
        self._send("send_backward", self.grad_outgoing.pop((microbatch, chunk)), (microbatch, chunk))

    def wait_sends(self) -> None:
        """Wait until everything sent has left."""
        for link in self.sending:
            self._wait(link, 0)

    def _complete(self, group: str) -> None:
        self.module.complete(self, group)

    def forget(self, microbatch: int, chunk: int = 0) -> None:
        """Drop what a forward kept for a backward that does not come."""
        del self.saved[microbatch, chunk]

    def _slices(self, microbatch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Views of this microbatch's samples in the batch inputs and in step values that hold the batch."""
        rows = {name: (row + microbatch * on, count) for name, (row, on, count) in self.spec["sliced"].items()}
        batch = {n: v.narrow(0, *rows[n]) if n in rows else v for n, v in self.batch.items()}
        step = {n: v.narrow(0, *rows[n]) if n in rows else v for n, v in self.step_values.items()}
        return batch, step

    def _expect(self, link: str, chunk: _Chunk, meta: Tree) -> None:
        (name, pieces), (shape, dtype) = chunk.links[link], meta
        buffer = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
        row = buffer.view(-1)
        works = [(self.transfers.receive(name, row[first:last], rank), rank) for rank, first, last in pieces]
        self.expected[link].append((works, buffer))
        for works, _ in itertools.chain(*self.expected.values()):
            for work, _ in works:
                work.advance()

    def _receive(self, link: str, part: Part) -> Tensor:
        self._clear_gradients()
        works, buffer = self.expected[link].popleft()
        self._timed(link, part, lambda: self._wait_for(works))
        return buffer

    def _send(self, link: str, tensor: Tensor, part: Part) -> None:
        self._wait(link, self.spec["window"] - 1)
        name, pieces = self.chunks[part[1]].links[link]
        contiguous = tensor.contiguous()
        row = contiguous.view(-1)
        works = [(self.transfers.send(name, row[first:last], rank), rank) for rank, first, last in pieces]
        self.sending[link].append((works, contiguous, part))

    def _wait(self, link: str, most: int) -> None:
        """Until at most so many sends are under way."""
        while len(self.sending[link]) > most:
            works, _, part = self.sending[link].popleft()
            self._timed(link, part, functools.partial(self._wait_for, works))

    def _wait_for(self, works: Sequence[Awaited]) -> None:
        """As long as the user wants to wait: what a message waits by itself is what its group was made with."""
        timeout_s = self.spec["timeout_s"]
        for work, peer in works:
            with self._waiting_for(peer):
                work.wait(None if timeout_s is None else datetime.timedelta(seconds=timeout_s))

    def fill(self, request: Tree) -> None:
        super().fill(request)
        self.constants = self._set_up()

    def load(self, request: Tree) -> None:
        super().load(request)
        self.constants = self._set_up()

    def trace(self, batch: Tree) -> Tree:
        """A step that trains, with what this rank did in it from when all ranks were ready."""
        loss, start_s, events = traced_step(self, batch)
        return {"loss": loss, "stage": self.stage, "start_s": start_s, "events": [tuple(event) for event in events]}

    def measure(self, request: Tree) -> Tree:
        """Time and memory of this rank, for ``compare``."""
        return measure(self, request)


def _load(program: Tree, device: torch.device) -> SimpleNamespace:
    """The generated module, its kernels compiled; its code shows in tracebacks."""
    source = program["source"]
    for module in program["imports"]:  # they define ops of the user's own
        importlib.import_module(module)
    filename = "<autopar program>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), namespace)
    if program["kernels"]:
        from autopar.runtime.compiled import compile_kernels

        compile_kernels(namespace, program["kernels"], device)
    return SimpleNamespace(**{k: v for k, v in namespace.items() if not k.startswith("__")})
