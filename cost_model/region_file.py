"""Clusters whose file lists nodes in regions: their devices, and the links inside nodes and between regions.

shared_egress = true        # destinations with equal latency and bandwidth share the sending node's rate

[transport]                 # what the protocol costs, on links that say nothing of their own
start = "8 us"
efficiency = 0.95
source = "..."

[[nodes]]                   # in the order in which devices are numbered
region = "Oregon"
device = "v100-sxm2-16gb"
count = 8                   # nodes like this (1 where left out)
devices = 4                 # on each (1 where left out)
[nodes.inside]              # between devices of one node
latency = "2 us"
bandwidth = "100 GB/s"
source = "..."

[within]                    # between nodes of any one region
[between]                   # between nodes of any two regions
[[links]]                   # and of these two, both ways or (one_way = true) from the first to the second;
regions = ["Oregon", "Virginia"]    # or, twice the same name, of one region
"""

from __future__ import annotations

from dataclasses import dataclass

from cost_model.collectives import Link
from cost_model.device import Device, device_of
from cost_model.hardware_file import Table, nearest_name
from cost_model.network import Network, Rows

KEYS = ("shared_egress", "transport", "nodes", "within", "between", "links")
_LINK = ("latency", "bandwidth", "efficiency", "source")
_Known = dict[tuple[str, str], Link]


@dataclass(frozen=True)
class _Transport:
    """What a protocol makes of a link.

    efficiency: share of the nominal bandwidth that is left to messages; copy_s_per_byte: as in ``Network``.
    """

    start_s: float
    efficiency: float
    copy_s_per_byte: float

    def link(self, table: Table) -> Link:
        table.text("source")
        efficiency = _fraction(table) if table.has("efficiency") else self.efficiency
        return Link(table.seconds("latency"), table.bandwidth("bandwidth") * efficiency)


@dataclass(frozen=True)
class _Nodes:
    table: Table
    region: str
    device: Device
    count: int
    devices: int
    inside: Link | None


def devices_and_network(table: Table) -> tuple[tuple[Device, ...], Network]:
    """All devices of a file and what joins them. Errors: ClusterFileError."""
    transport = _transport(table.table("transport"))
    nodes = [_nodes(part, transport) for part in table.tables("nodes")]
    if not nodes:
        table.fail("nodes", "there are none; add a table [[nodes]]")
    regions = tuple(dict.fromkeys(each.region for each in nodes))
    latency, bandwidth = _rows(regions, _links(table, transport, regions), table, nodes)
    every = [each for each in nodes for _ in range(each.count)]
    network = Network(
        regions,
        latency,
        bandwidth,
        region_of=tuple(regions.index(each.region) for each in every),
        node_of=tuple(index for index, each in enumerate(every) for _ in range(each.devices)),
        inside=tuple(each.inside for each in every),
        start_s=transport.start_s,
        copy_s_per_byte=transport.copy_s_per_byte,
        shares_egress=table.flag("shared_egress") if table.has("shared_egress") else False,
    )
    return tuple(each.device for each in every for _ in range(each.devices)), network


def _transport(table: Table) -> _Transport:
    table.only(("start", "efficiency", "copy_bandwidth", "source"))
    table.text("source")
    copying = 1.0 / table.bandwidth("copy_bandwidth") if table.has("copy_bandwidth") else 0.0
    return _Transport(table.seconds("start"), _fraction(table), copying)


def _fraction(table: Table) -> float:
    value = table.number("efficiency")
    if not 0 < value <= 1:
        table.fail("efficiency", f"must be above 0 and at most 1, not {value!r}")
    return value


def _nodes(table: Table, transport: _Transport) -> _Nodes:
    table.only(("region", "device", "count", "devices", "inside"))
    count, devices = (table.count(name) if table.has(name) else 1 for name in ("count", "devices"))
    if devices > 1 and not table.has("inside"):
        table.fail("inside", f"missing; give the link between the {devices} devices of a node as [nodes.inside]")
    inside = _link(table.table("inside"), transport) if table.has("inside") and devices > 1 else None
    return _Nodes(table, table.text("region"), device_of(table), count, devices, inside)


def _link(table: Table, transport: _Transport) -> Link:
    table.only(_LINK)
    return transport.link(table)


def _links(table: Table, transport: _Transport, regions: tuple[str, ...]) -> _Known:
    """The link of each pair of regions that the file speaks of; what it says of a pair comes before what of a level."""
    known: _Known = {}
    if table.has("within"):
        known.update({(a, a): _link(table.table("within"), transport) for a in regions})
    if table.has("between"):
        link = _link(table.table("between"), transport)
        known.update({(a, b): link for a in regions for b in regions if a != b})
    said: set[tuple[str, str]] = set()
    for part in table.tables("links") if table.has("links") else ():
        for pair, link in _pair(part, transport, regions).items():
            if pair in said:
                part.fail("regions", f"the link from {pair[0]} to {pair[1]} was given before; leave one of them out")
            said.add(pair)
            known[pair] = link
    return known


def _pair(table: Table, transport: _Transport, regions: tuple[str, ...]) -> _Known:
    table.only(("regions", "one_way", *_LINK))
    names = table.texts("regions")
    if len(names) != 2:
        table.fail("regions", f'must be two names, as ["Oregon", "Virginia"], not {list(names)}')
    for name in names:
        if name not in regions:
            table.fail("regions", f"no node is in {name!r}", nearest_name(name, regions))
    link, (a, b) = transport.link(table), names
    one_way = table.flag("one_way") if table.has("one_way") else False
    return {(a, b): link} if one_way else {(a, b): link, (b, a): link}


def _rows(regions: tuple[str, ...], known: _Known, table: Table, nodes: list[_Nodes]) -> tuple[Rows, Rows]:
    """Latency and bandwidth from each region to each; a region of one node needs no link of its own."""
    alone = {name for name in regions if sum(each.count for each in nodes if each.region == name) == 1}
    for a in regions:
        for b in regions:
            if (a, b) not in known and not (a == b and a in alone):
                level = "within" if a == b else "between"
                message = f'missing from {a} to {b}; add [[links]] with regions = ["{a}", "{b}"], or a table [{level}]'
                table.fail("links", message)
    found = [[known.get((a, b), Link(0.0, 1.0)) for b in regions] for a in regions]
    return (
        tuple(tuple(link.latency_s for link in row) for row in found),
        tuple(tuple(link.bandwidth_bytes_per_s for link in row) for row in found),
    )
