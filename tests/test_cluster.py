"""Hardware files: units, devices, clusters, and what is said when they are wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_model.cluster import Cluster, Level, cluster_names
from cost_model.collectives import Link
from cost_model.device import KINDS, Device, attention_cost, device_from_table, device_names
from cost_model.device_rows import GemmRow, StreamRow, interpolate
from cost_model.errors import ClusterFileError, ConfigError, UnknownNameError, UnsupportedError
from cost_model.hardware_file import key_lines, parse_table
from cost_model.program import OpCost
from cost_model.units import parse_bandwidth, parse_bytes, parse_rate, parse_time

# --- Units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("30GiB", 30 * 2**30), ("32 GB", 32 * 10**9), ("1.5 KiB", 1536), (512, 512), ("0", 0), ("1e3 B", 1000)],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


def test_bits_are_an_eighth_of_bytes() -> None:
    assert parse_bandwidth("200 Gbit/s") == parse_bandwidth("25 GB/s") == parse_bandwidth(25e9) == 25e9


def test_times_and_rates() -> None:
    assert parse_time("5us") == parse_time("5 µs") == pytest.approx(5e-6)
    assert parse_time("0.25 ms") == pytest.approx(2.5e-4)
    assert parse_rate("312 TFLOP/s") == parse_rate("312 TFLOPS") == 312e12


@pytest.mark.parametrize("value", ["30 gigs", "30g", "30 Gb", "-1 GB", "GiB", "", "inf", float("nan"), -3, True, None])
def test_sizes_that_are_refused(value: object) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["25 GB", "25 Gb/s", "0 GB/s", "5 us", 0])
def test_bandwidths_that_are_refused(value: str | int) -> None:
    with pytest.raises(ConfigError):
        parse_bandwidth(value)


def test_a_wrong_unit_names_the_nearest_right_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown unit 'GBps'; did you mean 'GB/s'"):
        parse_bandwidth("25 GBps")


# --- Devices --------------------------------------------------------------------------------------------------------

V100 = Device.load("v100-sxm2-16gb")


@pytest.mark.parametrize("name", device_names())
def test_every_shipped_device_prices_every_kind(name: str) -> None:
    device = Device.load(name)
    dtype = next(iter(device.peak_flops))
    small, large = (
        [device.op_time_s(OpCost(kind, 1e6 * n, 1e5 * n, dtype, (1, 64 * n, 64, 64))) for kind in KINDS]
        for n in (10, 800)
    )
    assert all(0 < a < b for a, b in zip(small, large, strict=True))
    assert device.name == name and 0 < device.usable_bytes < device.memory_bytes


def test_datasheet_figures() -> None:
    assert V100.peak("float16") == 125e12 and V100.memory_bandwidth_bytes_per_s == 900e9
    a100, h200 = Device.load("a100-sxm-80gb"), Device.load("h200")
    assert a100.peak("bfloat16") == 312e12 and a100.memory_bandwidth_bytes_per_s == 2039e9
    assert h200.memory_bandwidth_bytes_per_s == 4.8e12
    assert Device.load("a64fx").peak("float64") == 3.072e12


def test_a_large_product_runs_near_its_efficiency_and_a_small_one_far_from_it() -> None:
    row = V100.rows["matmul"]
    assert isinstance(row, GemmRow)

    def share(n: int) -> float:
        cost = OpCost("matmul", 2.0 * n**3, 6.0 * n**2, "float16", (1, n, n, n))
        return cost.flops / V100.op_time_s(cost) / V100.peak("float16")

    assert 0.9 * row.efficiency < share(8192) <= row.efficiency
    assert share(256) < 0.2 * row.efficiency


def test_products_of_one_row_are_bound_by_memory() -> None:
    nbytes = 2.0 * 8192 * 8192
    cost = OpCost("matmul", 2.0 * 8192 * 8192, nbytes, "float16", (1, 1, 8192, 8192))
    assert V100.op_time_s(cost) >= nbytes / V100.memory_bandwidth_bytes_per_s


def test_streams_run_at_their_share_of_the_bandwidth() -> None:
    cost = OpCost("elementwise", 0.0, 9e8, "float32")
    assert V100.op_time_s(cost) == pytest.approx(V100.op_overhead_s + 9e8 / (0.92 * 900e9))


def test_a_dtype_the_device_lacks_is_an_error_with_a_choice() -> None:
    with pytest.raises(UnsupportedError, match=r"v100-sxm2-16gb has no bfloat16.*float16, float32, float64"):
        V100.op_time_s(OpCost("matmul", 1.0, 1.0, "bfloat16", (1, 1, 1, 1)))


def test_unknown_kinds_and_devices_name_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'softmax'"):
        V100.op_time_s(OpCost("sofmax", 1.0, 1.0, "float32"))
    with pytest.raises(UnknownNameError, match="did you mean 'a100-sxm-80gb'"):
        Device.load("a100-80gb")


def test_a_causal_kernel_skips_whole_blocks_only() -> None:
    row = GemmRow(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, mask_block=512)

    def computed(t: int, causal: bool) -> float:
        return row.computed_flops(attention_cost(1, t, t, 64, causal=causal, backward=False, nbytes=0, dtype="float32"))

    assert computed(128, True) == computed(128, False)
    assert computed(1024, True) == pytest.approx(0.75 * computed(1024, False), rel=2e-3)
    assert computed(2**14, True) == pytest.approx((0.5 + 1 / 64) * computed(2**14, False), rel=2e-3)


def test_attention_flops_are_those_of_its_products() -> None:
    whole = attention_cost(2, 8, 6, 4, causal=False, backward=False, nbytes=0, dtype="float32")
    assert whole.flops == 2 * 2 * 2 * 8 * 6 * 4
    backward = attention_cost(2, 8, 6, 4, causal=False, backward=True, nbytes=0, dtype="float32")
    assert backward.flops == 2.5 * whole.flops
    assert attention_cost(1, 4, 4, 1, causal=True, backward=False, nbytes=0, dtype="float32").flops == 4 * (
        1 + 2 + 3 + 4
    )


def test_a_measured_op_comes_before_its_kind() -> None:
    slow = StreamRow(((1.0, 1e6),), 0.0)
    device = Device(**{**vars(V100), "ops": {"aten.tanh.default": slow}})
    known = OpCost("transcendental", 0.0, 1e6, "float32", op="aten.tanh.default")
    other = OpCost("transcendental", 0.0, 1e6, "float32", op="aten.exp.default")
    assert device.op_time_s(known) == 1.0
    assert device.op_time_s(other) == V100.op_time_s(other)


POINTS = st.lists(st.integers(1, 10**9), min_size=1, max_size=6, unique=True).flatmap(
    lambda xs: st.tuples(*(st.tuples(st.just(float(x)), st.floats(1e3, 1e12)) for x in sorted(xs)))
)


@given(POINTS, st.floats(1, 1e10))
def test_interpolation_goes_through_its_points_and_stays_between_them(
    points: tuple[tuple[float, float], ...], x: float
) -> None:
    assert all(interpolate(points, a) == pytest.approx(b) for a, b in points)
    rates = [b for _, b in points]
    assert min(rates) * (1 - 1e-9) <= interpolate(points, x) <= max(rates) * (1 + 1e-9)


# --- Clusters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in cluster_names() if not name.startswith("dtfm-")])
@pytest.mark.parametrize("count", [None, 1, 2, 24, 3072])
def test_every_shipped_cluster_loads_at_any_size(name: str, count: int | None) -> None:
    cluster = Cluster.load(name, count)
    assert cluster.name == name and (count is None or cluster.num_devices == count)
    everyone = tuple(range(cluster.num_devices))
    time_s = cluster.collective_time_s("all_reduce", 2**20, everyone)
    assert (time_s > 0) == (cluster.num_devices > 1)
    assert 0 < cluster.memory_cap_bytes < cluster.devices[0].memory_bytes


def test_the_clusters_of_the_design_are_shipped() -> None:
    assert set(cluster_names()) == {
        "a64fx",
        "dgx-a100-80gb",
        "dgx-h100",
        "dgx-h200",
        "dgx2-v100-32gb",
        *(f"dtfm-case{number}" for number in range(1, 6)),
        "p3.2xlarge",
        "p3.8xlarge",
        "p3.16xlarge",
    }


def test_a_fingerprint_follows_the_figures() -> None:
    one, again = Cluster.load("dgx-a100-80gb", 16), Cluster.load("dgx-a100-80gb", 16)
    assert one.fingerprint() == again.fingerprint()
    others = [Cluster.load("dgx-a100-80gb", 8), Cluster.load("dgx-h100", 16)]
    assert len({c.fingerprint() for c in (one, *others)}) == 3


def test_crossing_nodes_costs_more() -> None:
    cluster = Cluster.load("dgx-a100-80gb", 16)
    assert cluster.transfer_time_s(2**24, 0, 8) > 5 * cluster.transfer_time_s(2**24, 0, 7)
    assert cluster.transfer_time_s(2**24, 3, 3) == 0.0


def test_the_matrix_gives_transfers_and_the_cap() -> None:
    latency = np.array([[0, 1e-6], [2e-6, 0]])
    cluster = Cluster.from_matrix(
        device=["v100-sxm2-16gb", "a100-sxm-40gb"], latency_s=latency, bandwidth_bytes_per_s=[[0, 1e9], [2e9, 0]]
    )
    assert cluster.transfer_time_s(1e6, 0, 1) == pytest.approx(1e-6 + 1e-3)
    assert cluster.transfer_time_s(1e6, 1, 0) == pytest.approx(2e-6 + 5e-4)
    assert cluster.memory_cap_bytes == V100.usable_bytes and cluster.backend == "nccl"


@pytest.mark.parametrize(
    ("latency", "bandwidth", "message"),
    [
        (np.zeros((2, 3)), np.ones((2, 2)), r"latency_s must be square.*\[2, 3\]"),
        (np.zeros((2, 2)), np.ones((3, 3)), "2 x 2 but"),
        (np.zeros((2, 2)), np.eye(2), r"bandwidth_bytes_per_s\[0, 1\] is 0.0"),
        (np.full((2, 2), -1.0), np.ones((2, 2)), r"latency_s\[0, 1\] is -1.0"),
        (np.zeros((2, 2)), [[1, "fast"], [1, 1]], "not an array of numbers"),
        (np.zeros((2, 2)), np.full((2, 2), np.inf), "must be finite"),
        (np.zeros((2, 2)), np.ones((2, 2)) * 1j, "not an array of numbers: its numbers are complex"),
    ],
)
def test_matrices_that_are_refused(latency: object, bandwidth: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cluster.from_matrix(device="cpu", latency_s=latency, bandwidth_bytes_per_s=bandwidth)  # type: ignore[arg-type]


# --- Files that are wrong -------------------------------------------------------------------------------------------

GOOD = """\
schema = 1
name = "lab"
device = "a100-sxm-40gb"
num_devices = 4
backend = "nccl"
source = "the lab's own notes"

[[levels]]
name = "nvlink"
group_size = 4
start = "8 us"
latency = "2 us"
bandwidth = "300 GB/s"
efficiency = 0.8
source = "datasheet"

[[levels]]
name = "ethernet"
start = "8 us"
latency = "30 us"
bandwidth = "25 Gbit/s"
efficiency = 0.9
source = "datasheet"
"""


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(GOOD)
    cluster = Cluster.load(path, num_devices=6)
    assert [level.group_size for level in cluster.levels] == [4, 8]
    assert cluster.levels[1].link.bandwidth_bytes_per_s == pytest.approx(0.9 * 25e9 / 8)
    assert Cluster.load(str(path)).num_devices == 4


def test_devices_that_share_cores() -> None:
    """A figure that prices depend on; more cores than devices hasten none of them, and figures stay what they are
    where there are more devices or fewer."""
    own = Cluster.from_toml(GOOD, "lab.toml")
    few, many = (Cluster.from_toml(f"cores = {cores}\n{GOOD}", "lab.toml") for cores in (2, 16))
    assert [c.crowding for c in (own, few, many, few.resized(8), few.resized(2))] == [1.0, 2.0, 1.0, 2.0, 2.0]
    assert own.fingerprint() == many.fingerprint() != few.fingerprint()


@pytest.mark.parametrize(
    ("old", "new", "key", "line", "nearest"),
    [
        ('latency = "2 us"', 'lattency = "2 us"', "levels[0].lattency", 12, "latency"),
        ('latency = "30 us"\n', "", "levels[1].latency", 17, None),
        ('bandwidth = "25 Gbit/s"', "bandwidth = -1", "levels[1].bandwidth", 21, None),
        ('bandwidth = "300 GB/s"', 'bandwidth = "300 GB"', "levels[0].bandwidth", 13, None),
        ('device = "a100-sxm-40gb"', 'device = "a100-sxm-40g"', "device", 3, "a100-sxm-40gb"),
        ("efficiency = 0.9", "efficiency = 1.5", "levels[1].efficiency", 22, None),
        ("num_devices = 4", 'num_devices = "four"', "num_devices", 4, None),
        ('backend = "nccl"', 'backend = "ncl"', "backend", 5, None),
        ('name = "lab"', "name = 3", "name", 2, None),
        ("schema = 1", "schema = 2", "schema", 1, None),
        ("schema = 1", "schema = 1\ncores = 0", "cores", 2, None),
        ("schema = 1", "schema = 1\ncores = -2", "cores", 2, None),
        ('[[levels]]\nname = "ethernet"', '[levels.ethernet]\nname = "x"', "levels[0].ethernet", 17, None),
    ],
)
def test_faults_name_file_key_line_and_the_nearest_name(
    old: str, new: str, key: str, line: int, nearest: str | None
) -> None:
    assert old in GOOD
    with pytest.raises(ClusterFileError) as caught:
        Cluster.from_toml(GOOD.replace(old, new), "lab.toml")
    error = caught.value
    assert (error.path, error.key, error.line, error.nearest) == ("lab.toml", key, line, nearest)
    assert f"lab.toml:{line}: {key}: " in str(error)


def test_a_device_file_needs_every_kind_and_every_source() -> None:
    text = (Path(__file__).parents[1] / "cost_model" / "devices" / "cpu.toml").read_text()
    inline = text.replace("[memory]", "[device.memory]").replace("[peak]", "[device.peak]")
    inline = inline.replace("[overhead]", "[device.overhead]").replace("[cost.", "[device.cost.")
    head, body = inline.split("[device.memory]", 1)
    head = head.replace("schema = 1\n", "").replace("name =", "[device]\nname =", 1)
    cluster = f'schema = 1\nname = "one"\nnum_devices = 1\nbackend = "gloo"\nsource = "x"\n{head}[device.memory]{body}'
    assert Cluster.from_toml(cluster, "one.toml").devices[0].peak_flops == Device.load("cpu").peak_flops
    for old, key in (
        ("[device.cost.softmax]", "device.cost.softmax"),
        ("[device.cost.softmax]\nefficiency", "device.cost.softmax.efficency"),
        ("[device.overhead]\nop", "device.overhead.source"),
    ):
        broken = {
            "device.cost.softmax": cluster.replace(old, "[device.cost.sofmax]"),
            "device.cost.softmax.efficency": cluster.replace(old, "[device.cost.softmax]\nefficency"),
            "device.overhead.source": cluster.replace(old, '[device.overhead]\nop = "1 us"\n[device.x]\nop'),
        }[key]
        with pytest.raises(ClusterFileError) as caught:
            Cluster.from_toml(broken, "one.toml")
        assert caught.value.line is not None and caught.value.key.startswith("device")


def test_too_few_levels_for_the_devices() -> None:
    bounded = GOOD.replace('name = "ethernet"\n', 'name = "ethernet"\ngroup_size = 8\n')
    with pytest.raises(ClusterFileError, match="join fewer than 9 devices"):
        Cluster.from_toml(bounded, "lab.toml", num_devices=9)
    with pytest.raises(ClusterFileError, match="multiple of the level inside it, 4"):
        Cluster.from_toml(bounded.replace("= 8\n", "= 6\n"), "lab.toml", num_devices=6)


def test_names_and_paths_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'dgx2-v100-32gb'"):
        Cluster.load("dgx2-v100-32g")
    with pytest.raises(ConfigError, match=r"cannot read the hardware file .*nowhere\.toml"):
        Cluster.load(tmp_path / "nowhere.toml")
    for count in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="num_devices"):
            Cluster.load("dgx-h100", count)  # type: ignore[arg-type]


def test_a_file_that_is_not_toml_names_the_line() -> None:
    with pytest.raises(ClusterFileError) as caught:
        Cluster.from_toml(GOOD.replace('source = "the lab', "source = the lab"), "lab.toml")
    assert caught.value.line == 6


def test_lines_of_nested_arrays() -> None:
    text = "a = 1\n[[x]]\nb = 2\n[[x.y]]\nc = 3\n[[x.y]]\nc = 4\n[[x]]\nb = 5\n[z.w]\n'd e' = 6\n"
    lines = key_lines(text)
    assert (lines["x[0].b"], lines["x[0].y[1].c"], lines["x[1].b"], lines["z.w.d e"]) == (3, 7, 9, 11)
    assert math.prod(lines.values()) > 0


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("[256, 128], ", "[256, 0], ", "cost.matmul.tiles"),
        (
            "tiles = [[256, 128], [128, 256], [128, 128], [128, 64], [64, 128], [64, 64]]",
            "tiles = []",
            "cost.matmul.tiles",
        ),
        ("units = 80", "units = 0", "cost.matmul.units"),
        ("units = 80", "units = 80\nhalf_m = 8", "cost.matmul.half_m"),
        ("float32 = 0.75", "float32 = 1.75", "cost.matmul.dtype_efficiency.float32"),
        ("float32 = 0.75", "flaot32 = 0.75", "cost.matmul.dtype_efficiency.flaot32"),
    ],
)
def test_faults_of_tiles_name_key_and_line(old: str, new: str, key: str) -> None:
    text = (Path(__file__).parents[1] / "cost_model" / "devices" / "v100-sxm2-32gb.toml").read_text()
    assert old in text
    with pytest.raises(ClusterFileError) as caught:
        device_from_table(parse_table(text.replace(old, new), "mine.toml"))
    assert caught.value.key == key and caught.value.line is not None and caught.value.path == "mine.toml"


def test_tensor_cores_and_plain_units_reach_shares_of_their_own() -> None:
    cost = OpCost("matmul", 2.0 * 8192**3, 0.0, "float16", (1, 8192, 8192, 8192))
    ratio = V100.op_time_s(replace(cost, dtype="float32")) / V100.op_time_s(cost)
    assert ratio == pytest.approx((125 * 0.77) / (15.7 * 0.75), rel=1e-3)


def test_equal_devices_are_one_object() -> None:
    """What is priced on one is known of all."""
    devices = (Device.load("v100-sxm2-16gb"), Device.load("a100-sxm-40gb"), Device.load("v100-sxm2-16gb"))
    cluster = Cluster("three", devices, (Level("all", 3, 0.0, Link(1e-5, 1e9)),), "nccl")
    assert cluster.devices == devices and cluster.devices[0] is cluster.devices[2]
