"""State every fused op as a problem: what runs, on which inputs, and what it must move at least."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trivium.mesh import Axis
from trivium.ops import Ops
from trivium.optim.rules.adamw import terms_at
from trivium.parallel.loss import head_loss
from trivium.parallel.sharding import Sharding

TOKENS = {"cpu": 4096, "cuda": 8192}
WIDTH = {"cpu": 1024, "cuda": 4096}  # H; F is 3.5 times as much
VOCABULARY = {"cpu": 32000, "cuda": 128256}
HEAD_TOKENS = {"cpu": 1024, "cuda": 8192}
HEAD_WIDTH = {"cpu": 384, "cuda": 4096}
PARAMETERS = {"cpu": 25_000_000, "cuda": 500_000_000}
EPS = 1e-5
ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

Run = Callable[[Ops], Any]


@dataclass(frozen=True)
class Problem:
    """An op on given inputs.

    name: how the table calls it
    op: its name in trivium.ops.OPS
    run: what is timed
    inputs: if any, the backward pass to their gradients is timed too, by itself
    moved: bytes that must be moved at the least, forward and backward
    flops: of a matrix product, where that is the limit
    """

    name: str
    op: str
    run: Run
    inputs: tuple[torch.Tensor, ...] = ()
    moved: tuple[int, int] = (0, 0)
    flops: float = 0.0


def problems(device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """Return every op on a device, with activations of `dtype`."""
    return [
        *norms(device, dtype),
        rope(device, dtype),
        *activations(device, dtype),
        *losses(device, dtype),
        *optimizer_passes(device, dtype),
    ]


def random_input(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a random tensor that needs a gradient."""
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def norms(device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """Return the norms of x [tokens, H], alone and with the residual sum in front of them."""
    n = TOKENS[device.type]
    h = WIDTH[device.type]
    random = partial(random_input, device, dtype)
    x = random(n, h)
    branch = random(n, h)
    weight = random(h)
    bias = random(h)
    alone = (2 * x.nbytes, 3 * x.nbytes)
    with_sum = (4 * x.nbytes, 4 * x.nbytes)

    def rms_norm(ops: Ops) -> Any:
        return ops.rms_norm(x, weight, EPS)

    def add_rms_norm(ops: Ops) -> Any:
        return ops.add_rms_norm(x, branch, weight, EPS)

    def layer_norm(ops: Ops) -> Any:
        return ops.layer_norm(x, weight, bias, EPS)

    def add_layer_norm(ops: Ops) -> Any:
        return ops.add_layer_norm(x, branch, weight, bias, EPS)

    of_layer = (x, branch, weight, bias)
    return [
        Problem("rms_norm", "rms_norm", rms_norm, (x, weight), alone),
        Problem("add + rms_norm", "rms_norm", add_rms_norm, (x, branch, weight), with_sum),
        Problem("layer_norm", "layer_norm", layer_norm, (x, weight, bias), alone),
        Problem("add + layer_norm", "layer_norm", add_layer_norm, of_layer, with_sum),
    ]


def rope(device: torch.device, dtype: torch.dtype) -> Problem:
    """Return the rotation of packed q, k, v, with 4 query heads for each key-value head."""
    query_heads = WIDTH[device.type] // 64
    kv_heads = query_heads // 4
    samples = TOKENS[device.type] // 256
    packed = random_input(device, dtype, samples, 256, query_heads + 2 * kv_heads, 64)
    angle = torch.rand(256, 32, device=device)
    cos = angle.cos()
    sin = angle.sin()
    heads = (query_heads, kv_heads, kv_heads)

    def run(ops: Ops) -> Any:
        # A product with 1: the op may write into its input, which autograd forbids for a leaf.
        return ops.split_heads(packed * 1, heads, cos, sin)

    # What is not rotated moves in backward alone, where three gradients become one.
    moved = (4 * packed.nbytes, 3 * packed.nbytes)
    return Problem(
        "rope of packed q, k, v",
        "rope",
        run,
        (packed,),
        moved,
    )


def activations(device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """Return the activations of [tokens, F], and of gate and value [tokens, 2F]."""
    n = TOKENS[device.type]
    f = 7 * WIDTH[device.type] // 2
    random = partial(random_input, device, dtype)
    gated = random(n, 2 * f)
    wide = random(n, f)
    of_gated = (3 * wide.nbytes, 5 * wide.nbytes)
    of_wide = (2 * wide.nbytes, 3 * wide.nbytes)

    def swiglu(ops: Ops) -> Any:
        return ops.gated_activation(gated, "silu")

    def geglu(ops: Ops) -> Any:
        return ops.gated_activation(gated, "gelu_tanh")

    def gelu(ops: Ops) -> Any:
        return ops.activation(wide, "gelu_tanh")

    return [
        Problem(
            "swiglu",
            "activation",
            swiglu,
            (gated,),
            of_gated,
        ),
        Problem(
            "geglu",
            "activation",
            geglu,
            (gated,),
            of_gated,
        ),
        Problem(
            "gelu",
            "activation",
            gelu,
            (wide,),
            of_wide,
        ),
    ]


def losses(device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """Return cross-entropy from logits to their gradient in place, and the head with it.

    The head gives the loss, dx, and dW in fp32.
    """
    n = HEAD_TOKENS[device.type]
    h = HEAD_WIDTH[device.type]
    v = VOCABULARY[device.type]
    logits = torch.randn(n, v, device=device).to(dtype)
    labels = torch.randint(v, (n,), device=device)
    x = random_input(device, dtype, 1, n, h)
    weights = torch.full((1, n), 1 / n, device=device)
    table = torch.nn.Parameter(torch.randn(v, h, device=device).to(dtype))
    one = Sharding(Axis("tp"))

    def cross_entropy(ops: Ops) -> torch.Tensor:
        highest, rest, target = ops.cross_entropy_statistics(logits, labels, v)
        scale = weights[0] / (rest + torch.exp(target - highest))
        ops.cross_entropy_gradient_(logits, labels, highest, scale, -rest * scale, v)
        return rest

    def head(ops: Ops) -> torch.Tensor:
        return head_loss(x, table, labels[None], weights, v, one, ops)[0]

    moved = (3 * logits.nbytes, 0)
    flops = 6.0 * n * h * v
    return [
        Problem(
            "cross-entropy and gradient",
            "cross_entropy",
            cross_entropy,
            moved=moved,
        ),
        Problem(
            "head + cross-entropy, all gradients",
            "cross_entropy",
            head,
            flops=flops,
        ),
    ]


def optimizer_passes(device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """Return the optimizer's passes over flat memory."""
    count = PARAMETERS[device.type]
    flat = partial(torch.rand, count, device=device)
    masters = flat()
    exp_avg = flat()
    exp_avg_sq = flat()
    grads = flat()
    weights = masters if dtype == torch.float32 else masters.to(dtype)
    on_device = {
        "step": torch.tensor(3, device=device),
        "grad_scale": torch.tensor(1.0, device=device),
        "skip": torch.tensor(False, device=device),
    }

    def adamw(ops: Ops) -> torch.Tensor:
        terms = terms_at(**on_device, **ADAMW)
        ops.adamw_(masters, exp_avg, exp_avg_sq, grads, weights, terms)
        return weights

    def global_norm(ops: Ops) -> Any:
        return ops.squared_norm([grads])

    rounded = 0 if weights is masters else weights.nbytes
    return [
        Problem(
            "adamw",
            "adamw",
            adamw,
            moved=(28 * count + rounded, 0),
        ),
        Problem(
            "global norm",
            "grad_norm",
            global_norm,
            moved=(grads.nbytes, 0),
        ),
    ]
