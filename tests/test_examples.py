"""The examples are right by themselves: a GPT on one device, and batches that repeat."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    """An example as a module, under a name that shadows nothing."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


gpt, text = load("gpt"), load("text")
TINY = {"vocab_size": 32, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}


def tiny(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return gpt.GPT(gpt.GPTConfig(**TINY, **options)).double()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(32, (3, 16), generator=generator) for name in ("idx", "targets")}


def test_logits_or_loss(batch: dict[str, torch.Tensor]) -> None:
    model = tiny()
    logits, loss = model(batch["idx"]), model(**batch)
    assert logits.shape == (3, 16, 32)
    chosen = logits.log_softmax(-1).gather(2, batch["targets"].unsqueeze(2))
    torch.testing.assert_close(loss, -chosen.mean())


def test_shorter_than_a_block(batch: dict[str, torch.Tensor]) -> None:
    model = tiny()
    torch.testing.assert_close(model(batch["idx"][:, :5]), model(batch["idx"])[:, :5])


@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_no_logit_sees_the_future(batch: dict[str, torch.Tensor], attention: str) -> None:
    model, idx = tiny(attention=attention), batch["idx"]
    changed = idx.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 32
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_fused_attention_is_explicit_attention(batch: dict[str, torch.Tensor]) -> None:
    fused, explicit = tiny(attention="fused"), tiny(attention="explicit")
    losses = [model(**batch) for model in (fused, explicit)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(fused.parameters(), explicit.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_fused_qkv_is_three_linears(batch: dict[str, torch.Tensor]) -> None:
    fused, separate = tiny(), tiny(fused_qkv=False)
    state = fused.state_dict()
    for name in [name for name in state if ".qkv." in name]:
        for part, value in zip(("query", "key", "value"), state.pop(name).chunk(3), strict=True):
            state[name.replace("qkv", part)] = value
    separate.load_state_dict(state)
    torch.testing.assert_close(fused(**batch), separate(**batch))


def test_tied_head_is_one_parameter() -> None:
    tied, untied = tiny(tied=True), tiny(tied=False)
    assert tied.head.weight is tied.token.weight
    assert untied.head.weight is not untied.token.weight
    counts = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert counts[1] - counts[0] == 32 * 16


@pytest.mark.parametrize("wrong", [{"n_head": 3}, {"attention": "flash"}])
def test_wrong_shape_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        gpt.GPTConfig(**{**TINY, **wrong})


def test_batches_are_windows_of_the_library() -> None:
    (batch,) = itertools.islice(text.batches(4, 32, seed=1), 1)
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "idx": ((4, 32), torch.int64),
        "targets": ((4, 32), torch.int64),
    }
    assert torch.equal(batch["idx"][:, 1:], batch["targets"][:, :-1])
    library = bytes(text.library_bytes().tolist())
    assert all(bytes(row.tolist()) in library for row in batch["idx"])


def test_batches_repeat_for_a_seed() -> None:
    def three(seed: int) -> torch.Tensor:
        return torch.stack([batch["idx"] for batch in itertools.islice(text.batches(2, 16, seed=seed), 3)])

    assert torch.equal(three(5), three(5))
    assert not torch.equal(three(5), three(6))


def test_library_bytes_is_as_long_as_asked() -> None:
    short, long = text.library_bytes(1000), text.library_bytes(2_000_000)
    assert (len(short), len(long)) == (1000, 2_000_000)
    assert torch.equal(short, long[:1000])


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch in itertools.islice(text.batches(8, 32), 40):
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0
