"""Held: what a rank keeps between steps, parameters, gradients and optimizer state, and how it is saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from autopar.runtime.buckets import HeldBucket, gradient_buffers
from autopar.runtime.comm import Comm
from autopar.runtime.faults import named_faults
from autopar.runtime.groups import limit_waiting, make_groups
from autopar.runtime.optim import OptimizerSpec, build, chosen, group_options, set_group_options
from autopar.runtime.scaling import LossScaler

Tree = Any


class Held:
    """One rank's shards, and its groups. ``payload``: of ``autopar.payload``; methods take and return plain trees.

    peer: the rank that this one waits for, where known.
    """

    def __init__(self, rank: int, world_size: int, payload: Tree) -> None:
        self.rank, self.world_size, self.spec = rank, world_size, payload
        self.peer = self._only_other()
        self.device = torch.device(payload["device"])
        self.stage, self.dp_index = payload["stage"], payload["dp_index"]
        self.params: MutableMapping[str, Tensor] = self._here(payload["params"])
        self.buffers: MutableMapping[str, Tensor] = self._here(payload["buffers"])
        self.groups = make_groups(payload["groups"], rank)
        limit_waiting([group for _, group in self.groups.values()], payload["timeout_s"])
        axes = {name: ranks for name, (ranks, _) in self.groups.items()}
        self.comm = Comm(rank, axes, {name: group for name, (_, group) in self.groups.items()})
        self.flat, self.grads = gradient_buffers(payload["gradients"], self.params)
        self.masters: dict[str, Tensor] = self._here(payload.pop("masters"))
        self.updated = {name: self.masters.get(name, self.params[name]) for name in self.grads}
        self.gradients = dict(self.grads)
        self.buckets = {b["name"]: HeldBucket(b, self.dp_index, self.device) for b in payload.pop("buckets")}
        for name, bucket in self.buckets.items():
            self._hold(name, bucket)
        self.spans = {name: span for bucket in self.buckets.values() for name, span in bucket.spans.items()}
        self.updates = {name: torch.zeros_like(self.buffers[name]) for name in payload["updates"]}
        self.targets = {**self.grads, **self.updates}
        self._fill(payload.pop("initial"))
        self.optimizer = self._optimizer()
        self.scaler = LossScaler(self.device) if payload["scales_loss"] else None

    def _only_other(self) -> int | None:
        return 1 - self.rank if self.world_size == 2 else None

    def named_faults(self) -> AbstractContextManager[None]:
        """Errors that name the rank that is late or gone."""
        return named_faults(self.rank, self.spec["timeout_s"], lambda: self.peer)

    def _here(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In memory of their own, also where they had none."""
        return {name: tensor.to(self.device).contiguous() for name, tensor in tensors.items()}

    def _hold(self, name: str, bucket: HeldBucket) -> None:
        """A bucket's rows where forward and backward look for them."""
        self.params.update(bucket.params or {name: bucket.weights})
        if bucket.gradients is not None:
            self.flat[name] = bucket.gradients
            self.grads.update(bucket.grads or {name: bucket.gradients})

    def _optimizer(self) -> torch.optim.Optimizer | None:
        if self.spec["optimizer"] is None:
            return None
        for bucket in self.buckets.values():
            if bucket.gradients is not None:
                self.updated.update(bucket.own(bucket.source))
                self.gradients.update(bucket.own(bucket.gradients))
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in self.updated.items()}
        return build(chosen(OptimizerSpec.from_tree(self.spec["optimizer"]), self.device.type, dtypes), self.updated)

    def round(self) -> None:
        """Parameters from their master copies."""
        for name, master in self.masters.items():
            self.params[name].copy_(master)
        for bucket in self.buckets.values():
            bucket.round()

    def state(self, _: Tree = None) -> Tree:
        """Local shards of parameters by the model's names; all ranks must be asked at once."""
        alone = {n: self.masters.get(n, value) for n, value in self.params.items() if n not in self.buckets}
        with torch.no_grad(), self.named_faults():
            whole = {name: v for bucket in self.buckets.values() for name, v in bucket.whole(self.comm).items()}
        changed = {k: v.cpu() for k, v in self.buffers.items() if k in self.spec["changes"]}
        params = {k: v.cpu() for k, v in {**alone, **whole}.items()}
        return {"params": params, "changed": changed, "stage": self.stage}

    def configure(self, groups: Tree) -> None:
        """Set options of the optimizer's groups, by their place in the user's optimizer."""
        if self.optimizer is not None:
            set_group_options(OptimizerSpec.from_tree(self.spec["optimizer"]), self.optimizer, self.updated, groups)

    def scaling(self, _: Tree = None) -> Tree:
        """The scale of the loss and since when it holds, and whether the last update was skipped; None without one."""
        return None if self.scaler is None else {"state": self.scaler.state(), "skipped": self.scaler.skipped}

    def training_state(self, _: Tree = None) -> Tree:
        """What a checkpoint says beside tensors: options of groups, and what state the optimizer has."""
        from autopar.runtime import checkpoint

        groups: Tree = {}
        if self.optimizer is not None:
            groups = group_options(OptimizerSpec.from_tree(self.spec["optimizer"]), self.optimizer, self.updated)
        scale = None if self.scaler is None else self.scaler.state()
        return {"groups": groups, "states": checkpoint.described_states(self), "loss_scale": scale}

    def save(self, folder: str) -> None:
        """Write this rank's part of a checkpoint, with all ranks."""
        from autopar.runtime import checkpoint

        with self.named_faults():
            checkpoint.save(self, folder)

    def load(self, request: Tree) -> None:
        """Read this rank's part of a checkpoint, with all ranks."""
        from autopar.runtime import checkpoint

        with self.named_faults():
            checkpoint.load(self, request["folder"], request["states"])
            self._refresh()
        if self.scaler is not None and request["loss_scale"] is not None:
            self.scaler.load(request["loss_scale"])
        self.configure(request["groups"])

    def fill(self, request: Tree) -> None:
        """New values of parameters and buffers; see ``autopar.runtime.initial``."""
        self._fill(request)

    def _fill(self, request: Tree) -> None:
        if request["recipes"] or request["files"]:
            from autopar.runtime import initial

            initial.fill(self, request)
            with torch.no_grad():
                self.round()

    def _refresh(self) -> None:
        """Parameters from master copies that were loaded."""
        with torch.no_grad():
            self.round()
            for bucket in self.buckets.values():
                if bucket.master is not None and bucket.zero < 3:
                    self.comm.all_gather_(bucket.weights, "dp")

    def parts(self) -> dict[str, Tensor]:
        """This rank's piece of each parameter whose exact values no rank holds whole."""
        split = [bucket for bucket in self.buckets.values() if bucket.is_split]
        return {name: piece for bucket in split for name, piece in bucket.own(bucket.source).items()}

    def wholes(self) -> dict[str, Tensor]:
        """Parameters and buffers that this rank holds whole, or its shard of them on the tp axis."""
        split = {name for b in self.buckets.values() if b.is_split for name, _, _ in b.parameters}
        held = {**self.params, **self.masters, **self.buffers}
        return {name: tensor for name, tensor in held.items() if name not in split}

    def release(self) -> None:
        """Let go of every process group."""
        self.groups.clear()
        self.comm.release()
