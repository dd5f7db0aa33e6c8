"""The five networks of DT-FM as cluster files, from the reference data.

    python benchmarks/dtfm_clusters.py [--data DIR] [--check]

Writes cost_model/clusters/dtfm-case1.toml ... dtfm-case5.toml; --check only says which would change.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = HERE / "reference"
FILES = HERE.parent / "cost_model" / "clusters"
SOURCE = "DS3Lab/Decentralized_FM_alpha @ 2a6b658, scheduler/generate_heterogeneous_tc.py (arXiv:2206.01288)"
# Fitted on cases 1, 3 and 5 of that system's results (python benchmarks/reference.py --table dtfm --fit).
COPY_BANDWIDTH = "660 MB/s"
NIC_EFFICIENCY = 0.545
_TRANSPORT = f"""\
[transport]
start = "112 us"
efficiency = 0.95
copy_bandwidth = "{COPY_BANDWIDTH}"
source = "start: as fitted in dgx2-v100-32gb; efficiency: headers of TCP over Ethernet frames of 1500 bytes, 1448 of \
1538; copy_bandwidth: both ends of NCCL's socket transport, fitted on cases 1, 3 and 5 of DT-FM's results \
(benchmarks/reference.py --table dtfm); physical range 0.2 to 2 GB/s"
"""
_INSIDE = """\
[nodes.inside]
latency = "1.9 us"
bandwidth = "{bandwidth}"
efficiency = 0.387
source = "bandwidth: NVLink, as in p3.8xlarge and p3.16xlarge; efficiency: as fitted in dgx2-v100-32gb"
"""


def cluster_text(number: str, case: Mapping[str, Any]) -> str:
    """One cluster file."""
    head = f"""\
schema = 1
name = "dtfm-case{number}"
backend = "nccl"
source = "{SOURCE}: {case["name"]}, {case["instances"]}; written by benchmarks/dtfm_clusters.py"
shared_egress = true
"""
    return "\n".join([head, _TRANSPORT, *_nodes(case), *_links(case)])


def _nodes(case: Mapping[str, Any]) -> Iterator[str]:
    """Nodes of equal size that follow each other, as they were launched."""
    if "launch_order_gpus_per_instance" in case:
        yield from _sized("data center", case["launch_order_gpus_per_instance"], "100 GB/s")
    elif not case["tc"]:
        yield from _sized("data center", [8] * 8, "150 GB/s")
    else:
        for region, devices in itertools.groupby(case["regions"]):
            yield from _sized(region, [1] * len(list(devices)), "")


def _sized(region: str, sizes: list[int], inside: str) -> Iterator[str]:
    for size, alike in itertools.groupby(sizes):
        counted = f"count = {len(list(alike))}\n" + (f"devices = {size}\n" if size > 1 else "")
        yield f'[[nodes]]\nregion = "{region}"\ndevice = "v100-sxm2-16gb"\n{counted}' + (
            _INSIDE.format(bandwidth=inside) if size > 1 else ""
        )


def _links(case: Mapping[str, Any]) -> Iterator[str]:
    if not case["tc"]:
        rate = case["physical"]["inter_node_gbps_per_instance"]
        source = (
            "delay: about 0.1 ms in a data center, an assumption; bandwidth of an instance, Amazon EC2 P3 page, 2017; "
            "efficiency: fitted on case 1 (as copy_bandwidth); physical range 0.3 to 0.97"
        )
        yield _figures("[within]", 0.1, rate, source, NIC_EFFICIENCY)
        return
    yield _figures("[within]", case["intra"]["delay_ms"], case["intra"]["bandwidth_gbps"], "shaped by tc netem")
    for pair, link in case["inter"].items():
        a, b = pair.split("-")
        table = f'[[links]]\nregions = ["{a}", "{b}"]'
        yield _figures(
            table, link["delay_ms"], link["bandwidth_gbps"], "measured between AWS regions, shaped by tc netem"
        )


def _figures(table: str, delay_ms: float, gbps: float, source: str, efficiency: float | None = None) -> str:
    share = f"efficiency = {efficiency}\n" if efficiency else ""
    return f'{table}\nlatency = "{delay_ms:g} ms"\nbandwidth = "{gbps:g} Gbit/s"\n{share}source = "{source}"\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the tables")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    cases = json.loads((options.data / "dtfm_networks.json").read_text(encoding="utf-8"))["cases"]
    changed = 0
    for number, case in cases.items():
        path, text = FILES / f"dtfm-case{number}.toml", cluster_text(number, case)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            changed += 1
            print(f"{'would write' if options.check else 'wrote'} {path.name}")
            if not options.check:
                path.write_text(text, encoding="utf-8")
    return int(options.check and changed > 0)


if __name__ == "__main__":
    sys.exit(main())
