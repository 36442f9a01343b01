"""What a machine reaches at the most: the limits that every suite's shares are of, measured in its own run."""

import time

import torch

Peaks = dict[str, float]  # FLOP/s of a matrix product, by number format

CUBE = {"cpu": 2048, "cuda": 8192}
PEAK_SECONDS = 1.5
COPIED = {"cpu": 1 << 26, "cuda": 1 << 29}  # fp32 numbers
COPIES = 5


def copy_speed(device: torch.device) -> float:
    """Bytes read and written in a second by the best of a few copies."""
    source = torch.rand(COPIED[device.type], device=device)
    target, rate = torch.empty_like(source).copy_(source), 0.0
    for _ in range(COPIES):
        synchronize(device.type)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device.type)
        rate = max(rate, 2 * source.nbytes / (time.perf_counter() - start))
    return rate


def matrix_peaks(device: str, seconds: float) -> Peaks:
    """The best of several products of two squares, as a linear layer forms them, in each number format."""
    return {
        name: matrix_peak(device, dtype, seconds)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }


def matrix_peak(device: str, dtype: torch.dtype, seconds: float) -> float:
    """A large square where a small one says that it will be done in time."""
    best = 0.0
    for size in (CUBE[device] // 4, CUBE[device]):
        if best and 2 * size**3 / best > PEAK_SECONDS / 3:
            break
        x, weight = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        end, rate = time.perf_counter() + seconds, 0.0
        while time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(x, weight.t())
            synchronize(device)
            rate = max(rate, 2 * size**3 / (time.perf_counter() - start))
        best = rate
    return best


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
