"""The ops suite: every fused op, forward and backward, on each implementation that this machine has, against PyTorch, eager and compiled.

Bytes are those that the op must move at the least; the share is of the speed of a copy, or of a matrix product, measured in the same run.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.limits import PEAK_SECONDS, copy_speed, matrix_peaks, synchronize
from trivium import launch, ops
from trivium.mesh import Axis
from trivium.ops import OPS, Ops
from trivium.parallel.loss import head_loss
from trivium.parallel.sharding import Sharding

TOKENS = {"cpu": 4096, "cuda": 8192}
WIDTH = {"cpu": 1024, "cuda": 4096}  # H; F is 3.5 times as much
VOCABULARY = {"cpu": 32000, "cuda": 128256}
HEAD_TOKENS, HEAD_WIDTH = {"cpu": 1024, "cuda": 8192}, {"cpu": 384, "cuda": 4096}
PARAMETERS = {"cpu": 25_000_000, "cuda": 500_000_000}
SECONDS = 0.2  # that one measurement of one candidate takes at least


@dataclass(frozen=True)
class Problem:
    """An op on given inputs. run(ops): what is timed; where `backward`, its outputs' gradients too, and those alone are timed.

    moved: bytes at the least, forward and backward; flops: of a matrix product, where that is what limits.
    """

    name: str
    op: str
    run: Callable[[Ops], Any]
    inputs: tuple[torch.Tensor, ...] = ()
    moved: tuple[int, int] = (0, 0)
    flops: float = 0.0


def problems(device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """Every op at a width of its own; inputs of `dtype` that need gradients."""
    kind = device.type
    n, h, v = TOKENS[kind], WIDTH[kind], VOCABULARY[kind]
    f = 7 * h // 2

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    x, branch, weight, bias, gated, wide = (
        some(n, h),
        some(n, h),
        some(h),
        some(h),
        some(n, 2 * f),
        some(n, f),
    )
    size = x.nbytes
    heads = some(n // 256, 256, h // 64 * 3 // 2, 64)  # 4 query heads for each key-value head
    a, k = h // 64, h // 256
    angle = torch.rand(256, 32, device=device)
    cos, sin = angle.cos(), angle.sin()
    return [
        Problem(
            "rms_norm",
            "rms_norm",
            lambda o: o.rms_norm(x, weight, 1e-5),
            (x, weight),
            (2 * size, 3 * size),
        ),
        Problem(
            "add + rms_norm",
            "rms_norm",
            lambda o: o.add_rms_norm(x, branch, weight, 1e-5),
            (x, branch, weight),
            (4 * size, 4 * size),
        ),
        Problem(
            "layer_norm",
            "layer_norm",
            lambda o: o.layer_norm(x, weight, bias, 1e-5),
            (x, weight, bias),
            (2 * size, 3 * size),
        ),
        Problem(
            "add + layer_norm",
            "layer_norm",
            lambda o: o.add_layer_norm(x, branch, weight, bias, 1e-5),
            (x, branch, weight, bias),
            (4 * size, 4 * size),
        ),
        # What is not rotated moves in backward alone, where three gradients become one.
        Problem(
            "rope of packed q, k, v",
            "rope",
            lambda o: o.split_heads(heads * 1, (a, k, k), cos, sin),
            (heads,),
            (4 * heads.nbytes, 3 * heads.nbytes),
        ),
        Problem(
            "swiglu",
            "activation",
            lambda o: o.gated_activation(gated, "silu"),
            (gated,),
            (3 * wide.nbytes, 5 * wide.nbytes),
        ),
        Problem(
            "geglu",
            "activation",
            lambda o: o.gated_activation(gated, "gelu_tanh"),
            (gated,),
            (3 * wide.nbytes, 5 * wide.nbytes),
        ),
        Problem(
            "gelu",
            "activation",
            lambda o: o.activation(wide, "gelu_tanh"),
            (wide,),
            (2 * wide.nbytes, 3 * wide.nbytes),
        ),
        *losses(device, dtype, v),
        *flat(device, dtype),
    ]


def losses(device: torch.device, dtype: torch.dtype, v: int) -> list[Problem]:
    """Cross-entropy in place, from logits to their gradient, and the head with it: loss, dx and dW in fp32."""
    n, h = HEAD_TOKENS[device.type], HEAD_WIDTH[device.type]
    logits, labels = (
        torch.randn(n, v, device=device).to(dtype),
        torch.randint(v, (n,), device=device),
    )
    x, weights = (
        torch.randn(1, n, h, device=device).to(dtype).requires_grad_(),
        torch.full((1, n), 1 / n, device=device),
    )
    table = torch.nn.Parameter(torch.randn(v, h, device=device).to(dtype))

    def cross_entropy(o: Ops) -> torch.Tensor:
        highest, rest, target = o.cross_entropy_statistics(logits, labels, v)
        scale = weights[0] / (rest + torch.exp(target - highest))
        o.cross_entropy_gradient_(logits, labels, highest, scale, -rest * scale, v)
        return rest

    def head(o: Ops) -> torch.Tensor:
        return head_loss(x, table, labels[None], weights, v, Sharding(Axis("tp")), o)[0]

    return [
        Problem(
            "cross-entropy and gradient",
            "cross_entropy",
            cross_entropy,
            moved=(3 * logits.nbytes, 0),
        ),
        Problem(
            "head + cross-entropy, all gradients", "cross_entropy", head, flops=6.0 * n * h * v
        ),
    ]


def flat(device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """The optimizer's passes over flat memory."""
    count = PARAMETERS[device.type]
    masters, m, s, grads = (torch.rand(count, device=device) for _ in range(4))
    weights = masters if dtype == torch.float32 else masters.to(dtype)
    step, scale, skip = (torch.tensor(value, device=device) for value in (3, 1.0, False))

    def adamw(o: Ops) -> torch.Tensor:
        settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
        o.adamw_(masters, m, s, grads, weights, step=step, grad_scale=scale, skip=skip, **settings)
        return weights

    rounded = 0 if weights is masters else weights.nbytes
    return [
        Problem("adamw", "adamw", adamw, moved=(28 * count + rounded, 0)),
        Problem(
            "global norm", "grad_norm", lambda o: o.squared_norm([grads]), moved=(grads.nbytes, 0)
        ),
    ]


def ops_suite(options: argparse.Namespace) -> dict[str, Any]:
    """Every op in fp32 and bf16 on every implementation, in turn; medians over --rounds and the spread between them."""
    device = launch.choose_device("auto", 0)
    ours = "native" if device.type == "cpu" else "triton"
    if device.type == "cpu":
        ops.keep_freed_memory()  # as in training; else most of what is timed are page faults of the outputs
    results: dict[str, Any] = {"limits": limits(device)}
    for dtype in (torch.float32, torch.bfloat16):
        chosen = ops.select_ops("torch", device, dtype)
        available = ops.select_ops("auto", device, dtype)
        word = str(dtype).removeprefix("torch.")
        copy, product = (
            results["limits"]["copy GB/s"],
            results["limits"]["float32 GFLOP/s" if available.fp32_matmul else f"{word} GFLOP/s"],
        )
        if available.kernels == "torch":
            print(f"no {ours} kernels here: see the line above")
        print(
            f"\n{word:<37}{'pass':<10}{'torch':>9}{'compile':>9}{ours:>9}{'spread':>8}{'x torch':>9}{'x compile':>11}{'speed':>14}{'share':>7}"
        )
        for problem in problems(device, dtype):
            kernels = {"torch": chosen} | (
                {ours: available} if ours in OPS[problem.op] and available.kernels == ours else {}
            )
            for part in ("forward", "backward") if problem.inputs else ("all",):
                row = measure(problem, kernels, part, options.rounds, device)
                moved = problem.moved[part == "backward"]
                best = row[ours] if ours in row else row["torch"]
                row |= (
                    {"gigabytes_per_second": moved / best / 1e6}
                    if moved
                    else {"gigaflops": problem.flops / best / 1e6}
                )
                row["share"] = (
                    row["gigabytes_per_second"] / copy if moved else row["gigaflops"] / product
                )
                results[f"{problem.name}, {part}, {word}"] = row
                show(problem.name, part, row, ours)
    return results


def show(name: str, part: str, row: dict[str, float], ours: str) -> None:
    """One line: milliseconds of each, how much faster ours is, and at which share of the limit."""
    mine = row.get(ours)
    ratio = [
        f"{row[other] / mine:.2f}" if mine and other in row else "-"
        for other in ("torch", "compile")
    ]
    times = "".join(
        f"{row[one]:>9.3f}" if one in row else f"{'-':>9}" for one in ("torch", "compile", ours)
    )
    speed = (
        f"{row['gigabytes_per_second']:.1f} GB/s"
        if "gigabytes_per_second" in row
        else f"{row['gigaflops']:.0f} GFLOP/s"
    )
    print(
        f"{name:<37}{part:<10}{times}{row['spread']:>8.0%}{ratio[0]:>9}{ratio[1]:>11}{speed:>14}{row['share']:>7.0%}"
    )


def measure(
    problem: Problem, kernels: dict[str, Ops], part: str, rounds: int, device: torch.device
) -> dict[str, float]:
    """Milliseconds of each implementation, medians over rounds in which each has its turn; spread: of the last one's."""
    torch._dynamo.reset()
    runs = {name: partial_run(problem, one, part) for name, one in kernels.items()}
    if (
        part != "all"
    ):  # in-place passes are compared with PyTorch's eager form alone: compiled, they would copy
        runs["compile"] = partial_run(problem, kernels["torch"], part, compiled=True)
    times: dict[str, list[float]] = {name: [] for name in runs}
    counts = {
        name: max(1, int(SECONDS / max(seconds_of(run, 1, device), 1e-5) / rounds))
        for name, run in runs.items()
    }
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_of(run, counts[name], device) / counts[name] * 1e3)
    found = {name: median(taken) for name, taken in times.items()}
    last = sorted(times[list(kernels)[-1]])
    return found | {"spread": (last[-1 - len(last) // 4] - last[len(last) // 4]) / 2 / median(last)}


def partial_run(
    problem: Problem, one: Ops, part: str, *, compiled: bool = False
) -> Callable[[], Any]:
    """The op forward, or from its outputs' gradients to its inputs'; called twice already, so that it is warm."""

    def forward():
        return problem.run(one)

    forward = torch.compile(forward, dynamic=False) if compiled else forward
    if part != "backward":
        forward(), forward()
        return forward
    outputs = forward()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [torch.randn_like(output) for output in outputs]

    def backward():
        return torch.autograd.grad(outputs, problem.inputs, seeds, retain_graph=True)

    backward(), backward()
    return backward


def seconds_of(run: Callable[[], Any], count: int, device: torch.device) -> float:
    synchronize(device.type)
    start = time.perf_counter()
    for _ in range(count):
        run()
    synchronize(device.type)
    return time.perf_counter() - start


def limits(device: torch.device) -> dict[str, float]:
    """What this machine reaches at the most: bytes read and written by a copy, and matrix products, under the names of the table."""
    found = {"copy GB/s": copy_speed(device) / 1e9}
    words = {"fp32": "float32", "bf16": "bfloat16"}
    found |= {
        f"{words[name]} GFLOP/s": rate / 1e9
        for name, rate in matrix_peaks(device.type, PEAK_SECONDS).items()
    }
    print(" | ".join(f"{name} {value:.0f}" for name, value in found.items()))
    return found
