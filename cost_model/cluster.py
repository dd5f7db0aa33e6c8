"""A cluster: its devices, the levels of its network, and what messages and collectives cost on it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from cost_model.collectives import FLAT, Link, Tier, collective_s
from cost_model.device import BLAS, Device, device_of
from cost_model.errors import ConfigError, UnknownNameError, UnsupportedError
from cost_model.hardware_file import Table, parse_table, read_path, read_shipped, shipped_names
from cost_model.network import Network, Rows
from cost_model.region_file import KEYS as REGION_KEYS
from cost_model.region_file import devices_and_network

BACKENDS = ("nccl", "gloo", "mpi")
TRANSFER = "transfer"
_GROUPS = 1 << 14
"""Of devices, whose places are remembered: those of some dozen plans of the largest clusters."""
BEHIND = " behind"
"""After the kind of a collective: what remains of it where it moves behind compute that is long enough."""
ONCE = " once"
"""After the kind of a collective: of flat gradients before an update, or of flat parameters after it, in place."""
ONCE_KINDS = ("reduce_scatter", "all_gather")


@dataclass(frozen=True)
class Measured:
    """Seconds of one collective (or of a transfer) between ``ranks`` ranks at growing message sizes, as measured."""

    kind: str
    ranks: int
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        assert self.points and all(a[0] < b[0] for a, b in zip(self.points, self.points[1:], strict=False))

    def seconds(self, nbytes: float) -> float:
        """Straight lines between points; the first one's time below it, the last one's rate above it."""
        sizes, times = zip(*self.points, strict=True)
        if nbytes > sizes[-1]:
            return float(times[-1] * nbytes / sizes[-1])
        return float(np.interp(nbytes, sizes, times))


@dataclass(frozen=True)
class Level:
    """One level of the network: it joins blocks of ``group_size`` consecutive devices.

    link: what one device gets while all devices of the block talk. start_s: paid once by each collective and each
    transfer. efficiency: share of the nominal bandwidth that the link's already is. measured: curves that replace
    start and link for the group sizes they were taken at.
    """

    name: str
    group_size: int
    start_s: float
    link: Link
    measured: tuple[Measured, ...] = ()
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        assert self.group_size >= 1 and 0 < self.efficiency <= 1

    def curve(self, kind: str, ranks: int) -> Measured | None:
        return next((m for m in self.measured if (m.kind, m.ranks) == (kind, ranks)), None)


@dataclass(frozen=True)
class Cluster:
    """Devices by index, and what joins them: ``levels`` from innermost to outermost, or a ``network`` of pairs.

    Each level's group size is a multiple of the one inside it, and the outermost joins all devices; levels are
    empty where a network is given or where there is one device only. backend: of torch.distributed. table: of the file
    that describes it, where one does. crowding: devices per core where they share cores: so many times faster one is
    than its figures, which are of all at once, while the others wait; else 1.
    """

    name: str
    devices: tuple[Device, ...]
    levels: tuple[Level, ...]
    backend: str
    network: Network | None = None
    table: Table | None = field(default=None, compare=False, repr=False)
    crowding: float = 1.0

    def __post_init__(self) -> None:
        assert self.devices and self.backend in BACKENDS
        known: dict[Device, Device] = {}  # what is priced on a device is priced for all that are equal, by identity
        object.__setattr__(self, "devices", tuple(known.setdefault(device, device) for device in self.devices))
        assert self.network is not None or self.num_devices == 1 or self.levels[-1].group_size >= self.num_devices
        assert self.network is None or len(self.network.node_of) == self.num_devices
        assert self.crowding == 1 or (self.crowding > 1 and self.network is None and len(known) == 1)
        sizes = [level.group_size for level in self.levels]
        assert all(outer % inner == 0 for inner, outer in zip(sizes, sizes[1:], strict=False)), sizes

    @classmethod
    def load(cls, name_or_path: str | Path, num_devices: int | None = None) -> Self:
        """A shipped cluster by name or a TOML file by path, with so many devices (default: the file's number).

        More devices than a node holds make several nodes. Errors: UnknownNameError, ClusterFileError, ConfigError.
        """
        is_path = isinstance(name_or_path, Path) or name_or_path.endswith(".toml") or os.sep in name_or_path
        table = read_path(name_or_path) if is_path else read_shipped("clusters", "cluster", str(name_or_path))
        return cls.from_table(table, num_devices)

    @classmethod
    def from_toml(cls, text: str, path: str, num_devices: int | None = None) -> Self:
        """A cluster from the text of a file; ``path`` is for messages. Errors: ClusterFileError, ConfigError."""
        return cls.from_table(parse_table(text, path), num_devices)

    @classmethod
    def from_table(cls, table: Table, num_devices: int | None = None) -> Self:
        in_regions = table.has("nodes") or (any(map(table.has, REGION_KEYS)) and not table.has("levels"))
        own = REGION_KEYS if in_regions else ("device", "num_devices", "levels", "cores")
        table.only(("schema", "name", "source", "backend", *own))
        table.text("source")
        backend = table.text("backend")
        if backend not in BACKENDS:
            table.fail("backend", f"must be one of {', '.join(BACKENDS)}, not {backend!r}")
        if in_regions:
            devices, network = devices_and_network(table)
            _check_whole(table, len(devices), num_devices)
            return cls(table.text("name"), devices, (), backend, network, table)
        count = table.count("num_devices") if num_devices is None else _checked_count(num_devices)
        devices, levels, crowding = (device_of(table),) * count, _levels(table, count), _crowding(table)
        return cls(table.text("name"), devices, levels, backend, None, table, crowding)

    @classmethod
    def from_matrix(
        cls,
        *,
        device: str | Device | Sequence[str | Device],
        latency_s: ArrayLike,
        bandwidth_bytes_per_s: ArrayLike,
        name: str = "matrix",
        backend: str | None = None,
    ) -> Self:
        """A cluster from two square arrays [source][target]; one device for all, or one for each row.

        Errors: ConfigError for arrays that are not square, alike, finite, or positive off the diagonal.
        """
        latency = _square(latency_s, "latency_s", lowest=0.0)
        bandwidth = _square(bandwidth_bytes_per_s, "bandwidth_bytes_per_s", lowest=None)
        if len(latency) != len(bandwidth):
            raise ConfigError(
                f"latency_s is {len(latency)} x {len(latency)} but bandwidth_bytes_per_s is "
                f"{len(bandwidth)} x {len(bandwidth)}; give both for the same devices"
            )
        devices = _devices_for(device, len(latency))
        chosen = backend or ("nccl" if devices[0].kind == "cuda" else "gloo")
        if chosen not in BACKENDS:
            raise UnknownNameError("backend", chosen, BACKENDS)
        return cls(name, devices, (), chosen, Network.of_matrix(latency, bandwidth))

    def resized(self, num_devices: int) -> Self:
        """The same kind of cluster with so many devices. Errors: UnsupportedError, ClusterFileError, ConfigError."""
        return type(self).from_table(self._described(), num_devices)

    @property
    def node_size(self) -> int:
        """Devices below the outermost level of the file, which joins nodes. Errors: UnsupportedError."""
        levels = self._described().tables("levels")
        return levels[-2].count("group_size") if len(levels) > 1 else 1

    def _described(self) -> Table:
        if self.table is None or not self.table.has("levels"):
            raise UnsupportedError(
                f"the cluster {self.name} is no row of equal nodes, so no other size of it is known; describe it in "
                "a TOML file with [[levels]], as in cost_model/clusters/"
            )
        return self.table

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    @property
    def uneven(self) -> bool:
        """Whether devices differ, or the links between pairs of them."""
        return len(set(self.devices)) > 1 or (self.network is not None and not self.network.uniform)

    @property
    def rendezvous(self) -> bool:
        """gloo sends once the receiver has said that it waits; measured levels count that already."""
        return self.network is not None and self.backend == "gloo"

    @property
    def products(self) -> str:
        """Of ``PRODUCT_LIBRARIES``, what all devices multiply matrices of float32 by."""
        found = {device.products for device in self.devices}
        return found.pop() if len(found) == 1 else BLAS

    @functools.cached_property
    def memory_cap_bytes(self) -> int:
        """What a plan may use on every device unless told otherwise: the least memory less reserve."""
        return min(device.usable_bytes for device in self.devices)

    def collective_time_s(self, kind: str, nbytes: float, devices: tuple[int, ...]) -> float:
        """Seconds of a collective between these devices; nbytes of the full (gathered or reduced) tensor.

        all_to_all: nbytes on each device. Errors: UnknownNameError, ConfigError for a device that is not there.
        """
        if kind not in FLAT:
            raise UnknownNameError("collective", kind, FLAT)
        self._check(devices)
        if len(devices) < 2:
            return 0.0
        if self.network is not None:
            return self.network.collective_s(kind, nbytes, devices, self.backend)
        level = self._level_of(devices)
        curve = level.curve(kind, len(devices))
        return curve.seconds(nbytes) if curve else level.start_s + collective_s(kind, nbytes, self._tiers(devices))

    def once_time_s(self, kind: str, nbytes: float, devices: tuple[int, ...]) -> float:
        """Seconds of a collective once a step: each rank's part of gradients and parameters lies in its place, and
        parameters follow closely upon gradients, when ranks have met already.

        As measured; as any other where nothing was. Errors: as ``collective_time_s``.
        """
        whole_s = self.collective_time_s(kind, nbytes, devices)
        if self.network is not None or len(devices) < 2:
            return whole_s
        curve = self._level_of(devices).curve(kind + ONCE, len(devices))
        return curve.seconds(nbytes) if curve else whole_s

    def behind_time_s(self, kind: str, nbytes: float, devices: tuple[int, ...]) -> float:
        """Seconds that a collective keeps these devices from computing where it moves behind their compute.

        As measured; all of its time where nothing was. NCCL moves data on a stream of its own. Errors: as
        ``collective_time_s``.
        """
        whole_s = self.collective_time_s(kind, nbytes, devices)
        if self.backend == "nccl" or len(devices) < 2:
            return 0.0
        curve = self._level_of(devices).curve(kind + BEHIND, len(devices)) if self.network is None else None
        return min(whole_s, curve.seconds(nbytes)) if curve else whole_s

    def transfer_time_s(self, nbytes: float, source: int, target: int, senders: int | None = None) -> float:
        """Seconds of one message from device to device; 0 where both are one. Errors: ConfigError.

        senders: how many devices of a node send at once where they share its egress (None: all of them).
        """
        self._check((source, target))
        if source == target:
            return 0.0
        if self.network is not None:
            return self.network.transfer_s(nbytes, source, target, senders)
        level = self._level_of((source, target))
        curve = level.curve(TRANSFER, 2)
        return curve.seconds(nbytes) if curve else level.start_s + level.link.seconds(nbytes)

    def handling_time_s(self, nbytes: float, source: int, target: int) -> float:
        """Seconds that sending one message and receiving one keep a device from computing, even where they have arrived
        before they are needed. As measured; none where nothing was. Errors: as ``transfer_time_s``."""
        whole_s = self.transfer_time_s(nbytes, source, target)
        if source == target or self.network is not None:
            return 0.0
        curve = self._level_of((source, target)).curve(TRANSFER + BEHIND, 2)
        return min(whole_s, curve.seconds(nbytes)) if curve else 0.0

    def link_name(self, devices: tuple[int, ...]) -> str:
        """What messages between these devices cross: the name of a level, or how far apart their nodes are."""
        self._check(devices)
        if self.network is None:
            return self._level_of(devices).name
        nodes = {self.network.node_of[device] for device in devices}
        return "links inside nodes" if len(nodes) == 1 else "links between nodes"

    def senders(self, pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """How many messages share the egress of each of these, which go on at one time; levels count it already."""
        return (1,) * len(pairs) if self.network is None else self.network.senders(pairs)

    def fingerprint(self) -> str:
        """SHA-256 of every figure that prices depend on; names of files and sources do not count."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        kinds = {device: index for index, device in enumerate(dict.fromkeys(self.devices))}
        content = {
            "devices": [_figures(device) for device in kinds],
            "which": [kinds[device] for device in self.devices],
            "levels": [dataclasses.asdict(level) for level in self.levels],
            "network": None if self.network is None else dataclasses.asdict(self.network),
            "backend": self.backend,
            **({} if self.crowding == 1 else {"crowding": self.crowding}),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _check(self, devices: Iterable[int]) -> None:
        count = self.num_devices
        for device in devices:
            if not 0 <= device < count:
                raise ConfigError(f"device {device} of cluster {self.name}, which has 0 to {self.num_devices - 1}")

    def _level_of(self, devices: tuple[int, ...]) -> Level:
        """The innermost level that joins them."""
        return self.levels[_joined_at(self._group_sizes, devices)]

    def _tiers(self, devices: tuple[int, ...]) -> tuple[Tier, ...]:
        """How many meet at each level; where blocks differ, the fullest counts (priced as the regular group)."""
        meeting = _meeting(self._group_sizes, devices)
        return tuple(Tier(count, level.link) for count, level in zip(meeting, self.levels, strict=True))

    @functools.cached_property
    def _group_sizes(self) -> tuple[int, ...]:
        """Of levels."""
        return tuple(level.group_size for level in self.levels)


@functools.lru_cache(maxsize=_GROUPS)
def _joined_at(group_sizes: tuple[int, ...], devices: tuple[int, ...]) -> int:
    """The number of the innermost level that joins devices."""
    return next(n for n, size in enumerate(group_sizes) if len({device // size for device in devices}) == 1)


@functools.lru_cache(maxsize=_GROUPS)
def _meeting(group_sizes: tuple[int, ...], devices: tuple[int, ...]) -> tuple[int, ...]:
    """The most that meet in a block of each level: devices, then blocks of the level inside."""
    most, parts = [], list(devices)
    for size in group_sizes:
        blocks = Counter(part // size for part in parts)
        most.append(max(blocks.values()))
        parts = [block * size for block in blocks]
    return tuple(most)


def cluster_names() -> tuple[str, ...]:
    """Names of the shipped clusters, sorted."""
    return shipped_names("clusters")


def _figures(device: Device) -> dict[str, Any]:
    content = dataclasses.asdict(device)
    return {name: value for name, value in content.items() if name not in ("name", "sources", "reported_as", "path")}


def _checked_count(num_devices: object) -> int:
    if isinstance(num_devices, bool) or not isinstance(num_devices, int) or num_devices < 1:
        raise ConfigError(f"num_devices must be a whole number above zero, not {num_devices!r}")
    return num_devices


def _crowding(table: Table) -> float:
    """Of as many devices as the file gives figures for, which a cluster of another size keeps."""
    if not table.has("cores"):
        return 1.0
    cores = table.number("cores")
    if not cores:
        table.fail("cores", "must be above zero; leave it out where each device has a core of its own")
    return max(1.0, table.count("num_devices") / cores)


def _check_whole(table: Table, count: int, num_devices: object) -> None:
    """A file that lists its nodes has so many devices and no others. Errors: ConfigError."""
    if num_devices is not None and _checked_count(num_devices) != count:
        raise ConfigError(
            f"{table.path} lists nodes of {count} device(s), so num_devices cannot be {num_devices}; leave it out, or "
            "write a file with other nodes"
        )


def _levels(table: Table, num_devices: int) -> tuple[Level, ...]:
    """The levels that so many devices need; an outermost one without a group size joins any number."""
    if num_devices == 1 and not table.has("levels"):
        return ()
    parts = table.tables("levels")
    levels: list[Level] = []
    for part in parts:
        inner = levels[-1].group_size if levels else 1
        unbounded = -(-num_devices // inner) * inner if part is parts[-1] else None
        levels.append(_level(part, inner, unbounded))
    if not levels or levels[-1].group_size < num_devices:
        table.fail("levels", f"they join fewer than {num_devices} devices; leave the last group_size out to join any")
    inside = [1, *(level.group_size for level in levels)]
    return tuple(level for level, size in zip(levels, inside, strict=False) if size < num_devices)


def _level(part: Table, inner: int, unbounded: int | None) -> Level:
    """One level around blocks of ``inner`` devices; unbounded: its group size where the file gives none."""
    part.only(("name", "group_size", "start", "latency", "bandwidth", "efficiency", "measured", "source"))
    part.text("source")
    efficiency = part.number("efficiency")
    if not 0 < efficiency <= 1:
        part.fail("efficiency", f"must be above 0 and at most 1, not {efficiency!r}")
    group_size = part.count("group_size") if unbounded is None or part.has("group_size") else unbounded
    if group_size % inner:
        part.fail("group_size", f"must be a multiple of the level inside it, {inner}, not {group_size}")
    link = Link(part.seconds("latency"), part.bandwidth("bandwidth") * efficiency)
    curves = _measured(part) if part.has("measured") else ()
    return Level(part.text("name"), group_size, part.seconds("start"), link, curves, efficiency)


def _measured(part: Table) -> tuple[Measured, ...]:
    curves = []
    kinds = (*FLAT, TRANSFER, *(kind + BEHIND for kind in (*FLAT, TRANSFER)), *(kind + ONCE for kind in ONCE_KINDS))
    for item in part.tables("measured"):
        item.only(("kind", "ranks", "points"))
        if item.text("kind") not in kinds:
            item.fail("kind", f"must be one of {', '.join(kinds)}, not {item.text('kind')!r}")
        curves.append(Measured(item.text("kind"), item.count("ranks"), item.points("points")))
    return tuple(curves)


def _square(values: ArrayLike, name: str, *, lowest: float | None) -> Rows:
    """A square array of finite numbers at least ``lowest`` off the diagonal (None: above zero)."""
    try:
        if np.iscomplexobj(values):
            raise TypeError("its numbers are complex")
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is not an array of numbers: {error}") from error
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise ConfigError(f"{name} must be square, [devices, devices], not {list(array.shape)}")
    off = ~np.eye(len(array), dtype=bool)
    bad = off & ~(np.isfinite(array) & ((array > 0) if lowest is None else (array >= lowest)))
    if bad.any():
        i, j = (int(x) for x in np.argwhere(bad)[0])
        need = "above zero" if lowest is None else f"at least {lowest:g}"
        raise ConfigError(f"{name}[{i}, {j}] is {array[i, j]}; it must be finite and {need}")
    return tuple(tuple(float(x) for x in row) for row in array)


def _devices_for(device: str | Device | Sequence[str | Device], count: int) -> tuple[Device, ...]:
    given = (device,) * count if isinstance(device, str | Device) else tuple(device)
    if len(given) != count:
        raise ConfigError(f"{len(given)} devices for a matrix of {count}; give one device, or {count}")
    return tuple(item if isinstance(item, Device) else Device.load(item) for item in given)
