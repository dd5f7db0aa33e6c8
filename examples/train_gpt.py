"""Train a byte-level GPT on two local ranks, then check autopar's word: its estimate, and one device's losses.

python examples/train_gpt.py                               # autopar starts the two ranks itself
torchrun --nproc-per-node 2 examples/train_gpt.py          # the same script, one process per rank
"""

import copy
import functools
import itertools
import sys

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import autopar
from gpt import GPT, GPTConfig
from text import batches

STEPS, CHECKED_STEPS, TOLERANCE = 60, 20, 1e-4
BATCH_SIZE, CONFIG = 16, GPTConfig(n_layer=4, n_head=4, n_embd=256, block_size=128)
adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
console = Console()


def first_batches(count):
    """The same batches on every rank and in every run."""
    return list(itertools.islice(batches(BATCH_SIZE, CONFIG.block_size, seed=0), count))


def train(step, data, label, quiet):
    """Losses of step(batch) over data; a progress bar on a terminal, a line every ten steps elsewhere."""
    losses = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(label, total=len(data))
        for index, batch in enumerate(data):
            losses.append(float(step(batch)))
            progress.update(task, advance=1, description=f"{label}: loss {losses[-1]:.4f}")
            if not quiet and not console.is_terminal and (index + 1) % 10 == 0:
                print(f"{label}: step {index + 1}/{len(data)}  loss {losses[-1]:.4f}", flush=True)
    return losses


def one_device_step(model):
    """Plain PyTorch: what exe.step does, on one device."""
    optimizer = adamw(model.parameters())

    def step(batch):
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def same_losses(ours, reference):
    """Print both columns side by side; true where the largest relative difference is within TOLERANCE."""
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True)]
    table = Table("step", "two ranks", "one device", "relative difference", title="Loss")
    for index, row in enumerate(zip(ours, reference, differences, strict=True), start=1):
        table.add_row(str(index), f"{row[0]:.7f}", f"{row[1]:.7f}", f"{row[2]:.1e}")
    console.print(table)
    worst = max(differences)
    # A NaN compares false: it fails too.
    agree = all(difference <= TOLERANCE for difference in differences)
    print(f"largest relative difference {worst:.1e} ({'within' if agree else 'NOT within'} {TOLERANCE:.0e})")
    return agree


torch.manual_seed(0)
model = GPT(CONFIG)
untouched = copy.deepcopy(model)
data = first_batches(STEPS)

cluster = autopar.Cluster.local(2)
exe = autopar.compile(model, cluster, data[0], optimizer=adamw)
if exe.is_main:
    print(exe.summary())

losses = train(exe.step, data, "two ranks", quiet=not exe.is_main)
measured = autopar.compare(exe, data[0])
agree = True
if exe.is_main:
    print(measured.summary())
    reference = train(one_device_step(untouched), data[:CHECKED_STEPS], "one device", quiet=False)
    agree = same_losses(losses[:CHECKED_STEPS], reference)
exe.close()
sys.exit(0 if agree else 1)
