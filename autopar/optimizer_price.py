"""What an optimizer costs on one rank: the real step run on fake shards, its ops priced and its bytes counted."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

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

_STEADY = 1000
"""What a fake scalar reads as: a step count far into training, where warm-up branches are behind."""
Key: TypeAlias = tuple[int, TensorMeta]
"""Group and local shard: parameters alike in both are updated alike."""


@dataclass(frozen=True)
class OptimizerPrice:
    """One step of a rank's optimizer in its steady state.

    costs: of each op, in order, repeated where ops repeat; state_bytes: alive from step to step;
    workspace_bytes: the most that is alive within a step beyond state, parameters and gradients.
    """

    costs: tuple[OpCost, ...]
    state_bytes: int
    workspace_bytes: int


def price_optimizer(
    spec: OptimizerSpec, parameters: Mapping[str, TensorMeta], *, device: str = "cpu"
) -> OptimizerPrice:
    """Price of updating the local shards ``parameters``; those the spec does not name are not updated.

    device: "cpu" or "cuda", which choose different implementations where the options leave it open.
    An optimizer that updates its parameters one after the other is run on every pair of neighbours that occurs,
    once each; any other on all of them. Errors: ConfigError, UnsupportedError.
    """
    names = [name for group in spec.groups for name in group.names if name in parameters]
    if not names:
        return OptimizerPrice((), 0, 0)
    group_of = {name: index for index, group in enumerate(spec.groups) for name in group.names}
    keys = [(group_of[name], parameters[name]) for name in names]
    spans = _spans(keys)
    if 2 * sum(stop - start for start, stop in spans) <= len(keys):
        runs = [_observed(spec, parameters, names[start:stop], device) for start, stop in spans]
        if (sampled := _from_samples(keys, spans, runs)) is not None:
            return sampled
    whole = _observed(spec, parameters, names, device)
    return OptimizerPrice(whole.costs, whole.state_bytes, whole.workspace_bytes)


# --- From runs of neighbours to all parameters ----------------------------------------------------------------------


def _spans(keys: Sequence[Key]) -> list[tuple[int, int]]:
    """Runs [start, stop) in which every two neighbours that occur anywhere stand side by side."""
    seen: set[tuple[Key, Key]] = set()
    chosen = {0}
    for position, pair in enumerate(zip(keys, keys[1:], strict=False), start=1):
        if pair not in seen:
            seen.add(pair)
            chosen |= {position - 1, position}
    starts = [p for p in sorted(chosen) if p - 1 not in chosen]
    stops = [p + 1 for p in sorted(chosen) if p + 1 not in chosen]
    return list(zip(starts, stops, strict=True))


def _from_samples(
    keys: Sequence[Key], spans: Sequence[tuple[int, int]], runs: Sequence[_Observation]
) -> OptimizerPrice | None:
    """The price of all parameters, or None where the runs do not show a loop that treats like parameters alike."""
    shares: dict[Key, _Share] = {}
    for (start, stop), run in zip(spans, runs, strict=True):
        found = _shares(run)
        if found is None or any(shares.setdefault(k, s) != s for k, s in zip(keys[start:stop], found, strict=True)):
            return None
    costs = tuple(cost for key in keys for cost in shares[key].costs)
    state_bytes = sum(shares[key].state_bytes for key in keys)
    return OptimizerPrice(costs, state_bytes, max(run.workspace_bytes for run in runs))


def _shares(run: _Observation) -> list[_Share] | None:
    """Each parameter's part of a run, or None where the run is no loop over parameters.

    In a loop ops take no lists and work for one parameter after the other; all state is some parameter's; and when a
    parameter is done, no transient of an earlier one is alive, so that the workspace depends on neighbours only.
    """
    if any(work.is_list for work in run.works) or sum(run.states) != run.state_bytes:
        return None
    places = _places(run.works)
    if sorted(places) != places or set(places) != set(range(len(run.states))):
        return None
    last = dict(zip(places, run.works, strict=True))
    if any(places[birth] < place for place, work in last.items() for birth in work.alive):
        return None
    costs: list[list[OpCost]] = [[] for _ in run.states]
    for place, work in zip(places, run.works, strict=True):
        costs[place] += [work.cost] if work.cost is not None else []
    return [_Share(tuple(own), state) for own, state in zip(costs, run.states, strict=True)]


def _places(works: Sequence[_Work]) -> list[int]:
    """The parameter each op works for; one that touches none works for the next that is touched, or the last."""
    places: list[int] = []
    place = max((work.owner for work in works if work.owner is not None), default=0)
    for work in reversed(works):
        place = place if work.owner is None else work.owner
        places.append(place)
    return places[::-1]


# --- One run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """One op of the observed step.

    owner: the last parameter, by position in the run, that any of its tensors belongs to; alive: for each transient
    storage alive after it, the op that made it; is_list: it takes a list of tensors.
    """

    cost: OpCost | None
    owner: int | None
    alive: tuple[int, ...]
    is_list: bool


@dataclass(frozen=True)
class _Share:
    """What one parameter adds."""

    costs: tuple[OpCost, ...]
    state_bytes: int


@dataclass(frozen=True)
class _Observation:
    """Two steps on a run of parameters; ``works`` is the second. states: bytes of each parameter's own state."""

    works: tuple[_Work, ...]
    states: tuple[int, ...]
    state_bytes: int
    workspace_bytes: int

    @property
    def costs(self) -> tuple[OpCost, ...]:
        return tuple(work.cost for work in self.works if work.cost is not None)


def _observed(
    spec: OptimizerSpec, parameters: Mapping[str, TensorMeta], names: Sequence[str], device: str
) -> _Observation:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        held = {name: _parameter(parameters[name], device) for name in names}
    recorder = _Recorder()
    for position, parameter in enumerate(held.values()):
        recorder.give(parameter, position)
        recorder.give(parameter.grad, position)
    with recorder:
        optimizer = build(_chosen(spec, device), held)
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


def _parameter(meta: TensorMeta, device: str) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(meta.shape, dtype=getattr(torch, meta.dtype), device=device))
    parameter.grad = torch.empty_like(parameter)
    return parameter


def _chosen(spec: OptimizerSpec, device: str) -> OptimizerSpec:
    """With the implementation torch takes on CUDA where no option asks for one: over lists.

    torch.optim.optimizer._default_to_fused_or_foreach, which does not know fake tensors.
    """
    if device == "cpu":
        return spec
    return replace(spec, groups=tuple(replace(g, options=_over_lists(g.options)) for g in spec.groups))


def _over_lists(options: Mapping[str, Any]) -> Mapping[str, Any]:
    is_open = "foreach" in options and options["foreach"] is None and options.get("fused") is None
    needs_loop = options.get("differentiable") or (
        isinstance(options.get("lr"), Tensor) and not options.get("capturable")
    )
    return {**options, "foreach": True} if is_open and not needs_loop else options


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
    """Bytes that count; the parameter it belongs to; the op that made it in the observed step; calls on its death."""

    nbytes: int
    owner: int | None
    birth: int | None
    death: weakref.ref[torch.UntypedStorage]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages from birth to death, and from ``start_recording`` on writes down every op."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, _Storage] = {}
        self._births: dict[int, int] = {}
        self._alive_bytes = self._state_bytes = self._peak_bytes = 0
        self._works: list[_Work] | None = None

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

    def observation(self, states: tuple[int, ...]) -> _Observation:
        """What was written down."""
        assert self._works is not None
        return _Observation(tuple(self._works), states, self._state_bytes, self._peak_bytes - self._state_bytes)

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

    def _record(self, works: list[_Work], call: AtenCall) -> None:
        outputs = tensors_in(call.result)
        if not call.tensors and not outputs:
            return
        known = [self._storages.get(tensor.untyped_storage()._cdata) for tensor in call.tensors]
        owner = max((s.owner for s in known if s is not None and s.owner is not None), default=None)
        self._track_new(outputs, call.tensors, owner, len(works))
        self._peak_bytes = max(self._peak_bytes, self._alive_bytes + call.number_bytes())
        works.append(_Work(price_of(call.op_call()), owner, tuple(self._births.values()), call.is_list))

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
        self._storages[key] = _Storage(nbytes, owner, birth, death)
        self._alive_bytes += nbytes
        if birth is not None:
            self._births[key] = birth

    def _forget(self, key: int) -> None:
        self._alive_bytes -= self._storages.pop(key).nbytes
        self._births.pop(key, None)


def _steady_value(dtype: torch.dtype) -> bool | int | float:
    return float(_STEADY) if dtype.is_floating_point else dtype == torch.bool or _STEADY
