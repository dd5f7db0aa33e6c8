"""Weights: models that are built without memory, and weights read from files, shard by shard."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from parity import cpu_cluster, largest_error, reference
from safetensors import safe_open
from safetensors.torch import save_file
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

import autopar
from autopar.deferral import recipes_of
from autopar.runtime import weight_file
from autopar.runtime.recipe import made
from cost_model.errors import ConfigError, WeightsError
from passes.trace import alias_map

SGD = functools.partial(torch.optim.SGD, lr=0.1)
MASTER = autopar.Precision(params="bf16", master="fp32")
PLANS: dict[str, dict[str, int]] = {
    "dp2-zero1": {"dp": 2, "tp": 1, "pp": 1, "zero": 1},
    "dp2-zero3": {"dp": 2, "tp": 1, "pp": 1, "zero": 3},
    "tp2": {"dp": 1, "tp": 2, "pp": 1},
    "pp2": {"dp": 1, "tp": 1, "pp": 2},
}
DEFAULT = (("dp2-zero3", MASTER), ("tp2", None))
QUICK = ("gpt2", "swin", "wide_resnet")


def named(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_same_values(build: Callable[[], nn.Module]) -> None:
    """A deferred model's recipes give what an ordinary construction gives, and leave torch's generator as it does."""
    torch.manual_seed(3)
    expected, after = named(build()), torch.get_rng_state()
    torch.manual_seed(3)
    model = autopar.deferred(build)
    assert torch.equal(torch.get_rng_state(), after)
    recipes, found = recipes_of(model), named(model)
    assert found.keys() == expected.keys() == recipes.keys()
    for name, tensor in expected.items():
        assert found[name].is_meta and found[name].requires_grad == tensor.requires_grad
        assert torch.equal(made(recipes[name]), tensor) and made(recipes[name]).stride() == tensor.stride(), name
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in QUICK])
def test_every_family_is_initialised_as_on_one_device(family: str) -> None:
    check_same_values(lambda: FAMILIES[family]()[0])


@pytest.mark.parametrize("family", QUICK)
def test_families_are_initialised_as_on_one_device(family: str) -> None:
    check_same_values(lambda: FAMILIES[family]()[0])


@pytest.mark.parametrize(
    ("plan", "precision"),
    [
        pytest.param(plan, precision, marks=() if (plan, precision) in DEFAULT else pytest.mark.slow)
        for plan in PLANS
        for precision in (None, MASTER)
    ],
)
@pytest.mark.usefixtures("thread_ranks")
def test_a_deferred_model_trains_as_one_with_weights(plan: str, precision: Any) -> None:
    model, batch = FAMILIES["gpt2"]()
    pins, found = autopar.Parallelism(**PLANS[plan]), []
    for each in (model, autopar.deferred(lambda: FAMILIES["gpt2"]()[0])):
        with autopar.compile(each, cpu_cluster(2), batch, optimizer=SGD, parallelism=pins, precision=precision) as exe:
            before = exe.full_state_dict()
            losses = [exe.step(batch) for _ in range(2)]
            found.append((losses, before, exe.full_state_dict(), exe.notes, exe.plan))
    (losses, *states, notes, chosen), (losses_, *states_, notes_, chosen_) = found
    assert (losses, notes) == (losses_, notes_) and chosen == chosen_, "a plan is one for both"
    for state, state_ in zip(states, states_, strict=True):
        assert all(torch.equal(state[name], state_[name]) for name in state) and state.keys() == state_.keys()


def test_construction_may_read_values_and_take_them_from_elsewhere() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            assert torch.empty(3).device.type == "cpu" and not torch.empty(3).is_meta
            rates = torch.linspace(0, 0.5, 3).tolist()
            self.layers = nn.ModuleList(nn.Linear(4, 4, bias=rate > 0) for rate in rates)
            self.tied = self.layers[0].weight
            self.table = nn.Parameter(torch.from_numpy(torch.rand(3, 4).numpy()))
            self.register_buffer("known", torch.tensor([rates[1], 2.0]))
            generator = torch.Generator().manual_seed(5)
            self.own = nn.Parameter(torch.empty(20, 8, dtype=torch.bfloat16).normal_(generator=generator))
            self.more = nn.Parameter(torch.rand(2, generator=generator))
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)
            with torch.no_grad():
                nn.init.orthogonal_(self.layers[2].weight)
                self.layers[1].weight[2:].mul_(3).add_(self.layers[2].weight[:2])
                self.own[3].zero_()

    check_same_values(Model)


def test_ops_that_only_values_tell_the_shape_of_are_followed() -> None:
    """torch's parametrizations take an op without a kernel for meta tensors for one that cannot be inverted."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            orthogonal = torch.nn.utils.parametrizations.orthogonal
            self.based = orthogonal(nn.Linear(5, 3))
            self.plain = orthogonal(nn.Linear(4, 4), use_trivialization=False)
            self.sides = nn.Parameter(torch.distributions.Dirichlet(torch.ones(3)).sample((2,)))
            self.register_buffer("counts", torch.binomial(torch.full((6,), 9.0), torch.rand(6)))
            self.factor = nn.Parameter(torch.linalg.cholesky(torch.eye(3) + torch.full((3, 3), 0.1)))
            self.lazy = nn.LazyLinear(2)
            self.lazy(torch.zeros(1, 4))
            torch._foreach_mul_([self.sides.data, self.factor.data], 2)

    check_same_values(Model)


class Constants(nn.Module):
    """Tensors that are no state: plain attributes, and what lies in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), torch.rand(4)
        self.more = [{"shift": torch.arange(4.0)}, self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        shift, weight = self.more
        assert isinstance(shift, dict) and isinstance(weight, Tensor)
        return (self.layer(x * self.scale) + shift["shift"] + weight.sum()).square().mean()


@pytest.mark.usefixtures("thread_ranks")
def test_plain_attributes_of_a_deferred_model_are_constants_with_values() -> None:
    batch, seen = {"x": torch.ones(4, 4)}, []
    for build in (Constants, lambda: autopar.deferred(Constants)):
        torch.manual_seed(3)
        pins = autopar.Parallelism(**PLANS["tp2"])
        with autopar.compile(build(), cpu_cluster(2), batch, optimizer=SGD, parallelism=pins) as exe:
            seen.append([exe.step(batch) for _ in range(2)])
    assert seen[0] == seen[1]


def test_the_default_dtype_of_the_construction_counts() -> None:
    def build() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            model = nn.Linear(3, 4)
            model.register_buffer("halves", torch.arange(4) / 2)
            return model
        finally:
            torch.set_default_dtype(before)

    check_same_values(build)


def test_a_model_that_was_on_the_meta_device_is_initialised_by_its_own_function() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    assert autopar.deferred(lambda: model) is model and not recipes_of(model)
    torch.manual_seed(3)
    autopar.deferred(lambda: model.apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None))
    torch.manual_seed(3)
    expected = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    recipes = recipes_of(model)
    assert all(torch.equal(made(recipes[name]), tensor) for name, tensor in named(expected).items())


def test_what_changes_a_deferred_model_afterwards_is_refused() -> None:
    model = autopar.deferred(nn.Linear, 3, 4)
    with torch.no_grad():
        model.bias.zero_()
    with pytest.raises(ConfigError, match=r"'bias' was changed after autopar.deferred"):
        recipes_of(model)
    with pytest.raises(ConfigError, match="this returned a int"):
        autopar.deferred(lambda: 3)


# --- Files


def saved(model: nn.Module, folder: Path, parts: int = 2) -> dict[str, Tensor]:
    """The model's weights as transformers saves them: shared ones once, an index over several files."""
    state, first = {n: t.detach().clone() for n, t in model.state_dict().items()}, alias_map(model)
    state = {name: tensor for name, tensor in state.items() if first[name] == name}
    names = {index: sorted(state)[index::parts] for index in range(parts)}
    for index, own in names.items():
        save_file({name: state[name].contiguous() for name in own}, folder / f"model-{index}.safetensors")
    weight_map = {name: f"model-{index}.safetensors" for index, own in names.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state


class CountedFile:
    """Stands in for ``safe_open``: counts the bytes of every block that is read."""

    read = 0

    def __init__(self, opened: Any) -> None:
        self.opened = opened

    def get_tensor(self, key: str) -> Tensor:
        return self.counted(self.opened.get_tensor(key))

    def get_slice(self, key: str) -> Any:
        found = self.opened.get_slice(key)
        return type("Slice", (), {"__getitem__": lambda _, where: self.counted(found[where])})()

    @classmethod
    def counted(cls, tensor: Tensor) -> Tensor:
        cls.read += tensor.nbytes
        return tensor


@pytest.mark.parametrize("plan", ["tp2", "dp2-zero3"])
@pytest.mark.usefixtures("thread_ranks")
def test_ranks_read_their_shards_of_files_alone(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = FAMILIES["gpt2"]()
    if plan == "tp2":  # three samples are not split, so parameters are
        batch = {name: value[:3] for name, value in batch.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    weights = saved(model, tmp_path)
    losses, trained = reference(model, batch, SGD, steps=2)

    @contextlib.contextmanager
    def counting(file: str, **options: Any) -> Iterator[CountedFile]:
        with safe_open(file, **options) as opened:
            yield CountedFile(opened)

    monkeypatch.setattr(weight_file, "safe_open", counting)
    CountedFile.read = 0
    pins = autopar.Parallelism(**PLANS[plan])
    deferred = autopar.deferred(lambda: FAMILIES["gpt2"]()[0])
    with autopar.compile(deferred, cpu_cluster(2), batch, optimizer=SGD, parallelism=pins) as exe:
        assert exe.load_weights(tmp_path) == ((), ())
        assert all(torch.equal(exe.full_state_dict()[name], tensor) for name, tensor in weights.items())
        CountedFile.read = 0
        found = [exe.step(batch) for _ in range(2)]
        held = sum(shard.meta.nbytes for shard in exe.planned.linked.stages[0].shards if shard.name in weights)
        total = sum(tensor.nbytes for tensor in weights.values())
        assert CountedFile.read == (total if plan == "dp2-zero3" else 2 * held) and held <= total
        assert plan == "dp2-zero3" or held < 0.75 * total  # MLPs are split; embeddings and attention are faster whole
        assert found == pytest.approx(losses, rel=1e-5)
        assert largest_error(exe.full_state_dict(), trained.state_dict()) < 1e-5
        exe.load_weights(tmp_path)
        assert all(torch.equal(exe.full_state_dict()[name], tensor) for name, tensor in weights.items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()).square().mean() + 0 * self.count


FIT = {
    "first.weight": torch.ones(4, 4),
    "first.bias": torch.ones(4),
    "last.bias": torch.ones(4),
    "count": torch.tensor(7),
}


@pytest.mark.parametrize(
    ("changed", "message", "names"),
    [
        ({"first.bias": None, "count": None}, r"lacks 'count', 'first.bias' \(2 in all\).*strict=False", 2),
        ({"head.bias": torch.ones(2)}, r"has more than the model: 'head.bias' \(1 in all\)", 1),
        ({"first.bias": torch.ones(5)}, r"'first.bias' has real numbers \[5\] there but float32\[4\] in the model", 1),
        ({"count": torch.tensor(1.0)}, r"'count' has real numbers \[\] there but int64\[\] in the model", 1),
    ],
)
def test_files_of_another_model_are_refused(changed: Any, message: str, names: int, tmp_path: Path) -> None:
    save_file({n: t for n, t in {**FIT, **changed}.items() if t is not None}, tmp_path / "model.safetensors")
    exe = autopar.compile(Tied(), cpu_cluster(1))
    with pytest.raises(WeightsError, match=message) as caught:
        exe.load_weights(tmp_path)
    assert len(caught.value.names) == names


def test_a_shared_weight_may_have_any_of_its_names_and_precisions_may_differ(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    renamed = {"last.weight" if name == "first.weight" else name: tensor for name, tensor in FIT.items()}
    save_file({n: t.bfloat16() if t.is_floating_point() else t for n, t in renamed.items()}, file)
    exe = autopar.compile(autopar.deferred(Tied), cpu_cluster(1))
    exe.load_weights(file)
    state = exe.full_state_dict()
    assert state.keys() == Tied().state_dict().keys() and int(state["count"]) == 7
    assert all(torch.equal(state[name], tensor) for name, tensor in FIT.items())


def test_missing_weights_keep_their_initial_values_where_that_is_asked_for(tmp_path: Path) -> None:
    save_file({"first.weight": FIT["first.weight"], "head": torch.ones(1)}, tmp_path / "w.safetensors")
    torch.manual_seed(2)
    expected = Tied()
    torch.manual_seed(2)
    exe = autopar.compile(autopar.deferred(Tied), cpu_cluster(1))
    loaded = exe.load_weights(tmp_path, strict=False)
    assert set(loaded.missing) == {"first.bias", "last.bias", "count"} and loaded.unexpected == ("head",)
    assert torch.equal(exe.full_state_dict()["first.bias"], expected.first.bias)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    exe = autopar.compile(Tied(), cpu_cluster(1))
    with pytest.raises(WeightsError, match=r"holds no \*\.safetensors"):
        exe.load_weights(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nothing")
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(WeightsError, match="cannot be read"):
            exe.load_weights(path)


def test_values_of_a_shared_weight_that_differ_are_refused(tmp_path: Path) -> None:
    """Those of one name were taken: a model that ties its head would have lost the file's."""
    own = {**FIT, "last.weight": FIT["first.weight"].clone()}
    save_file(own, tmp_path / "w.safetensors")
    exe = autopar.compile(Tied(), cpu_cluster(1))
    exe.load_weights(tmp_path)
    save_file({**own, "last.weight": torch.zeros(4, 4)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="'first.weight' and 'last.weight' differ"):
        exe.load_weights(tmp_path)


def test_two_files_with_one_tensor_are_refused_unless_an_index_says_which(tmp_path: Path) -> None:
    """The last of the files was taken, whatever it was."""
    torch.manual_seed(3)
    wanted = {name: value.clone() for name, value in Tied().state_dict().items()}
    save_file(wanted, tmp_path / "a.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in wanted.items()}, tmp_path / "b.safetensors")
    exe = autopar.compile(Tied(), cpu_cluster(1))
    with pytest.raises(WeightsError, match="a.safetensors and b.safetensors both have"):
        exe.load_weights(tmp_path)
    places = {name: "b.safetensors" if name == "first.bias" else "a.safetensors" for name in wanted}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    exe.load_weights(tmp_path)
    state = exe.full_state_dict()
    assert torch.equal(state["first.weight"], wanted["first.weight"]) and not state["first.bias"].any()
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(WeightsError, match="weight_map"):
        exe.load_weights(tmp_path)


# --- Memory


@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["pool", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_no_process_ever_holds_the_whole_model(launcher: str) -> None:
    script = [str(Path(__file__).with_name("deferred_peak.py"))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *(torchrun if launcher == "torchrun" else []), *script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    grown = [growth for line in lines for growth in line["grown"]]
    assert len(grown) == (3 if launcher == "pool" else 2)
    assert max(grown) < 0.8 * lines[0]["whole"], (grown, lines[0]["whole"])
