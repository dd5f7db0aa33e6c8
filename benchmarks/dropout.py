"""Dropout that does not depend on the plan, beside torch's own: `python benchmarks/dropout.py`.

Both are run in turn in one process, one thread, mask and product; the medians' ratio is printed. Uses a GPU where there
is one.
"""

from __future__ import annotations

import statistics
import time

import torch

from autopar.runtime import kernels

SHAPES = ((8, 12, 128, 128), (32, 128, 768), (4096, 1024), (64, 50257), (8, 16, 16))
ROUNDS = 15


def main() -> None:
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{'shape':>20} {'torch ns/element':>18} {'ours':>8} {'ratio':>8}   ({device})")
    for shape in SHAPES:
        theirs, ours = _nanoseconds(shape, device)
        print(f"{'x'.join(map(str, shape)):>20} {theirs:18.3f} {ours:8.3f} {ours / theirs:8.2f}")


def _nanoseconds(shape: tuple[int, ...], device: str) -> tuple[float, float]:
    """Medians for one element, by torch and by a program."""
    x, out = torch.randn(shape, device=device), []
    coordinates = [torch.arange(extent, device=device) for extent in shape]
    key = kernels.random_keys(torch.tensor([0, 0], device=device), 1)[0]

    def theirs() -> None:
        torch.ops.aten.native_dropout.default(x, 0.1, True)

    def ours() -> None:
        kernels.drop(x, kernels.keep(key, coordinates, 0.1), 1 / 0.9)

    for _ in range(ROUNDS + 1):
        out.append((_seconds(theirs), _seconds(ours)))
    a, b = (statistics.median(times) / x.numel() * 1e9 for times in zip(*out[1:], strict=True))
    return a, b


def _seconds(run: object) -> float:
    assert callable(run)
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
