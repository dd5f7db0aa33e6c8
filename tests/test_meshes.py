"""Stages with meshes of their own: what crosses between them, and that training is that of one device."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import example_gpt
from parity import ADAMW, SGD, check_parity, cpu_cluster, largest_error, reference
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)

import autopar
from autopar.options import Options
from autopar.payload import links
from autopar.planning import Planned, plan_model
from cost_model.cluster import Cluster
from cost_model.collectives import Link
from cost_model.crossing import End, messages
from cost_model.device import Device
from cost_model.errors import (
    VerificationError,
)
from cost_model.mesh import Mesh
from cost_model.network import Network
from cost_model.prices import price_stages


def planned(devices: int, tied: bool = True, **pins: Any) -> Planned:
    model, batch = example_gpt(torch.float64, tied=tied)
    options = Options.of(None, ADAMW, autopar.Parallelism(**pins), None, None, None)
    found = plan_model(model, cpu_cluster(devices), batch, options)
    found.linked.verify()
    return found


# --- What crosses

meshes = st.builds(Mesh, st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 4, 6]))


def _row(end: End, cell: tuple[int, int], whole: torch.Tensor, by_shard: bool) -> torch.Tensor:
    """What a rank holds of a tensor, taken from the meaning of its mesh."""
    dp, tp = cell
    samples = whole.chunk(end.mesh.dp)[dp]
    return samples.chunk(end.mesh.tp)[tp] if end.split and not by_shard else samples


@given(source=meshes, target=meshes, splits=st.tuples(st.booleans(), st.booleans()), scale=st.integers(1, 3))
def test_every_element_arrives_once_in_its_place(
    source: Mesh, target: Mesh, splits: tuple[bool, bool], scale: int
) -> None:
    by_shard = source.tp == target.tp
    whole = torch.arange(144 * scale)
    sides = ((source, splits[0]), (target, splits[1]))
    parts = [mesh.dp * (mesh.tp if split and not by_shard else 1) for mesh, split in sides]
    ends = [End(*side, len(whole) // count) for side, count in zip(sides, parts, strict=True)]
    found = {cell: torch.full((ends[1].numel,), -1) for cell in target.cells()}
    for m in messages(*ends):
        sent = _row(ends[0], m.source, whole, by_shard)[m.start : m.start + m.numel]
        assert not by_shard or m.source[1] == m.target[1]
        assert (found[m.target][m.target_start : m.target_start + m.numel] == -1).all()
        found[m.target][m.target_start : m.target_start + m.numel] = sent
    for cell, row in found.items():
        assert torch.equal(row, _row(ends[1], cell, whole, by_shard)), cell


def test_ranks_share_what_they_send() -> None:
    """Whole values go out from one rank each; shards between 2 and 4 ranks are a half and a quarter, both ways."""
    two, four = Mesh(1, 2), Mesh(1, 4)
    assert Counter(m.source[1] for m in messages(End(two, False, 8), End(four, False, 8))) == {0: 2, 1: 2}
    assert Counter(m.source[1] for m in messages(End(four, False, 8), End(two, False, 8))) == {0: 1, 2: 1}
    there = messages(End(two, True, 4), End(four, True, 2))
    back = messages(End(four, True, 2), End(two, True, 4))
    assert [m.numel for m in (*there, *back)] == [2] * 8
    assert {(m.source, m.target, m.start, m.target_start) for m in there} == {
        (m.target, m.source, m.target_start, m.start) for m in back
    }


def test_ends_that_do_not_hold_the_same_are_refused() -> None:
    with pytest.raises(VerificationError, match="crossing"):
        messages(End(Mesh(1, 2), False, 8), End(Mesh(1, 4), False, 4))


# --- The program


def test_what_ranks_send_is_what_is_priced() -> None:
    """Every piece that a rank sends is awaited by the rank at the other end, and all are those of the price."""
    found = planned(6, dp=1, tp=(2, 4), microbatch_size=4)
    linked = found.linked
    for back in (False, True):
        priced = sum(m.numel for m in linked.program.crossing(0, 0, back=back))
        names = ("send_backward", "receive_backward") if back else ("send_forward", "receive_forward")
        sent, received = (
            Counter(
                (rank, other, last - first) if name == names[0] else (other, rank, last - first)
                for rank in range(6)
                for other, first, last in links(linked, rank, 0).get(name, ("", ()))[1]
            )
            for name in names
        )
        assert sent == received and sum(size * count for (_, _, size), count in sent.items()) == priced


def test_a_transfer_takes_as_long_as_its_busiest_rank() -> None:
    """Whole values from one rank to two take turns on its link; the way back brings one message to that rank."""
    found = planned(3, dp=1, tp=(1, 2), microbatch_size=4, sequence_parallel=False)
    program, cluster = found.linked.program, cpu_cluster(3)
    chunk, price = program.stages[0].chunks[0], price_stages(program, cluster)[0].chunks[0]
    assert chunk.sent is not None
    one_s = cluster.transfer_time_s(chunk.sent.nbytes, 0, 1)
    empty_s = cluster.transfer_time_s(0, 0, 1)
    parts = 1 if program.stages[1].chunks[0].received_split else 2
    assert price.to_next_s == pytest.approx(empty_s + parts * (one_s - empty_s))
    assert price.from_next_s == pytest.approx(one_s) and price.delay_s == pytest.approx(empty_s)


def test_parameters_are_split_over_the_shards_of_their_stage() -> None:
    found = planned(5, dp=1, tp=(4, 1), tied=False)
    sizes = {name: tensor.numel() for name, tensor in example_gpt(torch.float64, tied=False)[0].state_dict().items()}
    for stage, mesh in zip(found.linked.program.stages, found.plan.meshes, strict=True):
        for shard in stage.parameters:
            parts = mesh.tp if shard.placement.startswith("S") else 1
            assert shard.meta.numel * parts == sizes.get(shard.name, shard.meta.numel), shard
    assert found.plan.mesh_text() == "dp=1 x tp=(4, 1) x pp=2"
    assert [len(ranks) for ranks in found.plan.stage_devices] == [4, 1]


def test_plan_files_hold_meshes_of_stages() -> None:
    plan = planned(6, dp=2, tp=(1, 2)).plan
    text = plan.to_json()
    assert autopar.Plan.from_json(text) == plan and '"tp": [\n  1,\n  2\n ]' in text
    assert planned(6, dp=2, tp=(1, 2)).plan.to_json() == text
    model, batch = example_gpt(torch.float64, tied=True)
    again = autopar.estimate(model, cpu_cluster(6), batch, optimizer=ADAMW, plan=plan)
    assert again.plan == plan and again.step_time_s == pytest.approx(planned(6, dp=2, tp=(1, 2)).estimate.step_time_s)


# --- Training


CASES: list[Any] = [
    (3, {"dp": 1, "tp": (2, 1), "microbatch_size": 2, "schedule": "1f1b"}),
    pytest.param((6, {"dp": 1, "tp": (2, 4), "microbatch_size": 4, "schedule": "gpipe"}), marks=pytest.mark.slow),
    (7, {"dp": 1, "tp": (1, 2, 4), "microbatch_size": 2, "schedule": "1f1b", "recompute": "full"}),
    pytest.param(
        (6, {"dp": 2, "tp": (1, 2), "microbatch_size": 2, "schedule": "1f1b", "zero": 1}), marks=pytest.mark.slow
    ),
    (6, {"dp": 2, "tp": (1, 2), "microbatch_size": 2, "zero": 2, "recompute": "selective"}),
    (6, {"dp": 2, "tp": (2, 1), "microbatch_size": 2, "zero": 3}),
    (6, {"dp": 2, "tp": (2, 1), "microbatch_size": 2, "schedule": "zero_bubble"}),
    pytest.param((6, {"dp": (4, 2), "tp": 1, "microbatch_size": 1, "schedule": "1f1b"}), marks=pytest.mark.slow),
    (8, {"dp": (4, 2), "tp": (1, 2), "microbatch_size": 1, "zero": 1}),
    (6, {"dp": (2, 1), "tp": 2, "microbatch_size": 1, "zero": 3}),
    (6, {"dp": (1, 2), "tp": (4, 1), "microbatch_size": 4, "schedule": "gpipe"}),
]


def _case(case: tuple[int, dict[str, Any]]) -> str:
    return " ".join(f"{name}{value}" for name, value in case[1].items())


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"])
@pytest.mark.parametrize("case", CASES, ids=_case)
def test_training_is_that_of_one_device(case: tuple[int, dict[str, Any]], tied: bool, thread_ranks: None) -> None:  # noqa: F811
    devices, pins = case
    model, batch = example_gpt(torch.float64, tied=tied, n_layer=max(2, len(str(pins["tp"])) // 3))
    plan = check_parity(model, batch, devices, 1e-9, **pins)
    assert (plan.dp, plan.tp) == (pins["dp"], pins["tp"])


@pytest.mark.slow
def test_two_shards_feed_four_on_real_ranks() -> None:
    model, batch = example_gpt(torch.float64, tied=True)
    check_parity(model, batch, 6, 1e-9, dp=1, tp=(2, 4), microbatch_size=2, schedule="1f1b")


@pytest.mark.usefixtures("shared_ranks")
def test_real_ranks(tmp_path: Path) -> None:
    """3 ranks, 1 that feeds 2: a norm over all, a checkpoint into another plan, and evaluation."""
    model, batch = example_gpt(torch.float64, tied=True)
    losses, trained = reference(model, batch, ADAMW, steps=2)
    pins = autopar.Parallelism(dp=1, tp=(1, 2), microbatch_size=2, schedule="1f1b")
    with autopar.compile(model, cpu_cluster(3), batch, optimizer=ADAMW, parallelism=pins, max_grad_norm=1e6) as exe:
        assert exe.step(batch) == pytest.approx(losses[0], rel=1e-9)
        norm = exe.grad_norm
        assert exe.eval_step(batch) == pytest.approx(losses[1], rel=1e-9)
        exe.save(tmp_path)
        assert exe.step(batch) == pytest.approx(losses[1], rel=1e-9)
        assert largest_error(exe.full_state_dict(), trained.state_dict()) < 1e-8
    with autopar.compile(model, cpu_cluster(1), batch, optimizer=ADAMW, max_grad_norm=1e6) as alone:
        alone.step(batch)
        assert alone.grad_norm == pytest.approx(norm, rel=1e-9)
        alone.load(tmp_path)
        assert alone.step(batch) == pytest.approx(losses[1], rel=1e-9)


CPU = Device.load("cpu")


def device(speed: float, mebibytes: float) -> Device:
    """A core so many times as fast, with so much memory for a program."""
    peaks = {dtype: speed * flops for dtype, flops in CPU.peak_flops.items()}
    return replace(CPU, peak_flops=peaks, memory_bytes=CPU.reserve_bytes + int(mebibytes * 2**20))


def nodes(*each: tuple[Device, int]) -> Cluster:
    """Nodes of so many devices of a kind, near to each other."""
    rows = [tuple((value,) * len(each) for _ in each) for value in (1e-5, 1e10)]
    inside = tuple(Link(1e-6, 1e11) if devices > 1 else None for _, devices in each)
    node_of = tuple(node for node, (_, devices) in enumerate(each) for _ in range(devices))
    every = tuple(range(len(each)))
    network = Network(tuple(f"node {node}" for node in every), *rows, every, node_of, inside)
    return Cluster("of several kinds", tuple(each[node][0] for node in node_of), (), "gloo", network)


@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize(
    "cluster",
    [
        nodes((device(1.0, 4), 1), (device(0.5, 2), 2)),
        pytest.param(nodes((device(1.0, 4), 1), (device(0.5, 2), 1), (device(0.5, 2), 2)), marks=pytest.mark.slow),
    ],
    ids=["3 ranks", "4 ranks"],
)
def test_meshes_that_the_search_chose_train_as_one_device_does(cluster: Cluster) -> None:
    """Nothing of layout or placement is pinned; devices differ in speed and memory, nodes in devices."""
    model, batch = example_gpt(n_layer=4, n_embd=96, n_head=6)
    losses, trained = reference(model, batch, SGD)
    pins = autopar.Parallelism(microbatch_size=2)
    with autopar.compile(model, cluster, batch, optimizer=SGD, parallelism=pins) as exe:
        assert [exe.step(batch) for _ in range(3)] == pytest.approx(losses, rel=1e-4)
        assert largest_error(exe.full_state_dict(), trained.state_dict()) < 1e-4
        plan, peaks = exe.plan, [stage.peak_bytes for stage in exe.estimate.stages]
    assert plan.meshes_differ and len({mesh.tp for mesh in plan.meshes}) > 1
    rooms = [min(cluster.devices[rank].usable_bytes for rank in ranks) for ranks in plan.stage_devices]
    assert all(peak <= room for peak, room in zip(peaks, rooms, strict=True)) and len(set(rooms)) > 1
