"""Measure what a machine reaches at the most: matrix products and copies.

Every suite gives its results as shares of these numbers, measured in its own run.
"""

import time
from collections.abc import Callable

import torch

Peaks = dict[str, float]  # FLOP/s of a matrix product, by number format

CUBE = {"cpu": 2048, "cuda": 8192}
PEAK_SECONDS = 1.5
COPIED = {"cpu": 1 << 26, "cuda": 1 << 29}  # fp32 numbers
COPIES = 5
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def copy_speed(device: torch.device) -> float:
    """Return bytes read and written in a second by the best of a few copies."""
    source = torch.rand(COPIED[device.type], device=device)
    target = torch.empty_like(source).copy_(source)
    best = 0.0
    for _ in range(COPIES):
        seconds = timed(device.type, lambda: target.copy_(source))
        best = max(best, 2 * source.nbytes / seconds)
    return best


def matrix_peaks(device: str, seconds: float) -> Peaks:
    """Return the highest FLOP/s of products x W^T of two squares, for each number format.

    seconds: time spent on each size and number format
    """
    return {name: matrix_peak(device, dtype, seconds) for name, dtype in FORMATS.items()}


def matrix_peak(device: str, dtype: torch.dtype, seconds: float) -> float:
    """Return FLOP/s of a large square, or of a small one where a large one would take too long.

    device: "cpu" or "cuda"
    dtype: the number format of both factors
    seconds: time spent on each size
    """
    best = 0.0
    for size in (CUBE[device] // 4, CUBE[device]):
        flops = 2 * size**3
        if best and flops / best > PEAK_SECONDS / 3:
            break
        x = torch.randn(size, size, device=device, dtype=dtype)
        weight = torch.randn(size, size, device=device, dtype=dtype)
        best = best_rate(device, flops, seconds, x, weight)
    return best


def best_rate(
    device: str, flops: int, seconds: float, x: torch.Tensor, weight: torch.Tensor
) -> float:
    """Return the highest FLOP/s of x W^T, repeated for so many seconds.

    flops: of one product
    """
    end = time.perf_counter() + seconds
    rate = 0.0
    while time.perf_counter() < end:
        rate = max(rate, flops / timed(device, lambda: torch.mm(x, weight.t())))
    return rate


def timed(device: str, action: Callable[[], object]) -> float:
    """Return the seconds that an action takes on a device."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
