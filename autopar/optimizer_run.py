"""One run of an optimizer's real step on fake shards: its ops priced, its storages counted from birth to death."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from autopar.aten_call import AtenCall, tensors_in
from autopar.runtime.optim import OptimizerSpec, build
from cost_model.errors import UnsupportedError
from cost_model.ops import price_of
from cost_model.program import OpCost
from cost_model.tensor import TensorMeta
from passes.fakes import as_parameter, fake_tensor
from passes.graph import torch_dtype

_STEADY = 1000
"""What a fake scalar reads as: a step count far into training, where warm-up branches are behind."""


@dataclass(frozen=True)
class Transient:
    """A storage that is alive within the step only. birth: the op that made it; owner: the parameter it is for."""

    nbytes: int
    birth: int
    owner: int | None


@dataclass(frozen=True)
class Work:
    """One op of the observed step.

    owner: the last parameter, by position in the run, that any of its tensors belongs to; alive: transients after it;
    number_bytes: what numbers take while it runs; elements: for an op over lists, (owner, price) of each element,
    None where its lists do not go by parameters, empty for other ops; ends: the price of its first and last together,
    where there are two.
    """

    cost: OpCost | None
    owner: int | None
    alive: tuple[Transient, ...]
    number_bytes: int
    is_list: bool
    elements: tuple[tuple[int, OpCost | None], ...] | None
    ends: OpCost | None


@dataclass(frozen=True)
class Observation:
    """Two steps on a run of parameters; ``works`` is the second. states: bytes of each parameter's own state."""

    works: tuple[Work, ...]
    states: tuple[int, ...]
    state_bytes: int
    workspace_bytes: int

    @property
    def costs(self) -> tuple[OpCost, ...]:
        return tuple(work.cost for work in self.works if work.cost is not None)


def observe(
    spec: OptimizerSpec, parameters: Mapping[str, TensorMeta], names: Sequence[str], device: str
) -> Observation:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    held = {name: _parameter(parameters[name], torch.device(device), fake) for name in names}
    recorder = _Recorder()
    for position, parameter in enumerate(held.values()):
        recorder.give(parameter, position)
        recorder.give(parameter.grad, position)
    with recorder:
        optimizer = build(spec, held)
    assert optimizer is not None
    _make_fake(optimizer, fake, recorder)
    with _explained(spec, device), fake, recorder:
        optimizer.step()
        states = tuple(recorder.claim(optimizer.state[p], i) for i, p in enumerate(held.values()))
        recorder.start_recording()
        optimizer.step()
    return recorder.observation(states)


@contextlib.contextmanager
def _explained(spec: OptimizerSpec, device: str) -> Iterator[None]:
    """Turns what torch raises in a step into an UnsupportedError."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(
            f"{spec.path} cannot be priced: its step on {device} tensors without values fails: {error}; "
            "check its options on that device, and let its step decide nothing by the values of parameters"
        ) from error


def _parameter(meta: TensorMeta, device: torch.device, mode: FakeTensorMode) -> nn.Parameter:
    held, grad = (fake_tensor(meta.shape, torch_dtype(meta.dtype), device=device, mode=mode) for _ in range(2))
    parameter = as_parameter(held, requires_grad=True)
    parameter.grad = grad
    return parameter


def _make_fake(optimizer: Optimizer, fake: FakeTensorMode, recorder: _Recorder) -> None:
    """Real tensors that the constructor made or was given become fake; what it made for a parameter is counted."""

    def faked(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else fake.from_tensor(tensor)

    for tensor in tensors_in([optimizer.defaults, *map(_options, optimizer.param_groups)]):
        recorder.give(tensor, None)
    for parameter, state in optimizer.state.items():
        optimizer.state[parameter] = tree_map_only(Tensor, faked, state)
        for tensor in tensors_in(optimizer.state[parameter]):
            recorder.track(tensor, None, None)
    for group in optimizer.param_groups:
        group.update(tree_map_only(Tensor, faked, _options(group)))
        for tensor in tensors_in(_options(group)):
            recorder.give(tensor, None)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


@dataclass
class _Storage:
    """Bytes that count; the parameter it belongs to; calls on its death."""

    nbytes: int
    owner: int | None
    death: weakref.ref[torch.UntypedStorage]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages from birth to death, and from ``start_recording`` on writes down every op."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, _Storage] = {}
        self._transients: dict[int, Transient] = {}
        self._alive_bytes = self._state_bytes = self._peak_bytes = 0
        self._works: list[Work] | None = None

    def give(self, tensor: Tensor | None, owner: int | None) -> None:
        """A tensor that others pay for, whether it was counted before or not."""
        assert tensor is not None
        self._count(tensor.untyped_storage(), 0, owner, None)

    def track(self, tensor: Tensor, owner: int | None, birth: int | None) -> None:
        """Count a tensor's storage until it dies, unless it is known already."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._count(storage, storage.nbytes(), owner, birth)

    def claim(self, state: Any, owner: int) -> int:
        """Give the state of a parameter its owner; the bytes that had none."""
        keys = {tensor.untyped_storage()._cdata for tensor in tensors_in(state)}
        mine = [self._storages[key] for key in keys & self._storages.keys() if self._storages[key].owner is None]
        for storage in mine:
            storage.owner = owner
        return sum(storage.nbytes for storage in mine)

    def start_recording(self) -> None:
        """What is alive now is state."""
        self._works = []
        self._state_bytes = self._peak_bytes = self._alive_bytes

    def observation(self, states: tuple[int, ...]) -> Observation:
        """What was written down."""
        assert self._works is not None
        return Observation(tuple(self._works), states, self._state_bytes, self._peak_bytes - self._state_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            result: Any = _steady_value(args[0].dtype)
        else:
            result = func(*args, **(kwargs or {}))
        if self._works is None:
            self._track_new(tensors_in(result), (args, kwargs), None, None)
        else:
            self._record(self._works, AtenCall(func, args, kwargs or {}, result))
        return result

    def _record(self, works: list[Work], call: AtenCall) -> None:
        outputs = tensors_in(call.result)
        if not call.tensors and not outputs:
            return
        owner = max((o for o in map(self._owner, call.tensors) if o is not None), default=None)
        owners = self._element_owners(call)
        owner_of_output = owners if owners and len(owners) == len(outputs) else [owner] * len(outputs)
        for output, its in zip(outputs, owner_of_output, strict=True):
            self._track_new([output], call.tensors, its, len(works))
        alive = tuple(self._transients.values())
        self._peak_bytes = max(self._peak_bytes, self._alive_bytes + call.number_bytes())
        elements = None if owners is None else tuple((o, price_of(call.part([i]))) for i, o in enumerate(owners))
        ends = price_of(call.part([0, -1])) if owners and len(owners) > 1 else None
        cost = price_of(call.op_call())
        works.append(Work(cost, owner, alive, call.number_bytes(), call.is_list, elements, ends))

    def _owner(self, tensor: Tensor) -> int | None:
        known = self._storages.get(tensor.untyped_storage()._cdata)
        return None if known is None else known.owner

    def _element_owners(self, call: AtenCall) -> list[int] | None:
        """The one parameter that each place in the op's lists is for; None where there is no such."""
        if not call.is_list:
            return []
        owners = [{o for o in map(self._owner, place) if o is not None} for place in call.places()]
        if not owners or any(len(its) != 1 for its in owners):
            return None
        found = [next(iter(its)) for its in owners]
        return found if len(set(found)) == len(found) else None

    def _track_new(self, outputs: list[Tensor], inputs: Any, owner: int | None, birth: int | None) -> None:
        """Track an op's results, save views of tensors from elsewhere."""
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in self._storages]
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in(inputs)} if new else ()
        for tensor in new:
            if tensor.untyped_storage()._cdata not in given:
                self.track(tensor, owner, birth)

    def _count(self, storage: torch.UntypedStorage, nbytes: int, owner: int | None, birth: int | None) -> None:
        key = storage._cdata
        if key in self._storages:
            self._forget(key)
        death = weakref.ref(storage, lambda _: self._forget(key))
        self._storages[key] = _Storage(nbytes, owner, death)
        self._alive_bytes += nbytes
        if birth is not None:
            self._transients[key] = Transient(nbytes, birth, owner)

    def _forget(self, key: int) -> None:
        self._alive_bytes -= self._storages.pop(key).nbytes
        self._transients.pop(key, None)


def _steady_value(dtype: torch.dtype) -> bool | int | float:
    return float(_STEADY) if dtype.is_floating_point else dtype == torch.bool or _STEADY
