"""The only door to kernels: every fused op of a model and its optimizer, each on the implementation that this run chose."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from . import cpu, reference
from .attention import AttentionOps
from .cpu import BlockShape, BlockStep

try:
    from ..kernels import adamw as triton_adamw
    from ..kernels import rms_norm as triton_rms_norm
except ImportError:  # Triton has no wheel for every platform
    triton_adamw = triton_rms_norm = None

# Each op, and the implementations it has beside plain PyTorch.
OPS = {
    "rms_norm": ("native", "triton"),
    "layer_norm": ("native",),
    "rope": ("native",),
    "activation": ("native",),
    "few_rows": ("native",),
    "block_step": ("native",),
    "cross_entropy": ("native",),
    "grad_norm": ("native",),
    "adamw": ("native", "triton"),
}

FEW_ROWS = 32  # up to which our own product is faster than the library's
STEP_IS_MADE_OF = (
    "rms_norm",
    "layer_norm",
    "rope",
    "activation",
    "few_rows",
)  # by the same kernels, or not at all


@dataclass(frozen=True)
class Ops(AttentionOps):
    """The ops of a model and its optimizer. `Ops()` is plain PyTorch; `select_ops` picks by flag, device and dtype.

    kernels: torch, triton or native, for every op that has it; others are PyTorch's. overrides: (op, implementation) where one is to
    differ. Without a gradient are those that end in an underscore, those under no_grad, of which autograd functions are made, and
    block_step. Under torch.compile an op on Triton is the PyTorch one, which the compiler fuses with its neighbours where a kernel of our
    own would be a wall; native ones stay, as they are no slower.
    """

    kernels: str = "torch"
    attention_backend: str = "auto"  # as --attention-backend
    fp32_matmul: bool = False  # see AttentionOps
    overrides: tuple[tuple[str, str], ...] = ()

    implementations: dict[str, str] = field(
        init=False, compare=False, repr=False
    )  # what each op runs on

    def __post_init__(self):
        chosen = {
            op: self.kernels if self.kernels in others else "torch" for op, others in OPS.items()
        }
        chosen |= dict(self.overrides)
        if self.attention_backend != "auto" or any(
            chosen[op] != "native" for op in STEP_IS_MADE_OF
        ):
            chosen["block_step"] = "torch"
        object.__setattr__(self, "implementations", chosen)

    def describe(self) -> str:
        """One line for the log: what each op runs on."""
        used = dict.fromkeys(self.implementations.values())
        parts = [
            f"{', '.join(op for op, one in self.implementations.items() if one == name)} {_full_name(name)}"
            for name in used
        ]
        products = (
            " | matrix products of 16-bit numbers in fp32, which is faster on this processor"
            if self.fp32_matmul
            else ""
        )
        return f"kernels: {' | '.join(parts)} | attention sdpa ({self.attention_backend}){products}"

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., H] / sqrt(mean(x^2) + eps) in fp32, rounded to x's dtype, times weight [H] cast to that dtype; shape and dtype of x."""
        return self._implementation("rms_norm", triton_rms_norm).rms_norm(
            x, weight.to(x.dtype), eps
        )

    def add_rms_norm(
        self, x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + branch, and its rms_norm."""
        if self._runs_on("rms_norm") == "native":
            return cpu.add_rms_norm(x, branch, weight.to(x.dtype), eps)
        total = x + branch
        return total, self.rms_norm(total, weight, eps)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """x [..., H] to mean 0 and variance 1, times weight [H], plus bias [H]; both cast to x's dtype."""
        bias = None if bias is None else bias.to(x.dtype)
        return self._implementation("layer_norm").layer_norm(x, weight.to(x.dtype), bias, eps)

    def add_layer_norm(
        self,
        x: torch.Tensor,
        branch: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + branch, and its layer_norm."""
        if self._runs_on("layer_norm") == "native":
            return cpu.add_layer_norm(
                x, branch, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps
            )
        total = x + branch
        return total, self.layer_norm(total, weight, bias, eps)

    def rope(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
    ) -> torch.Tensor:
        """Rotate the first R of the D dims of every head of x [B, T, A, D] by the angles of cos and sin, [T, R/2] or [B, T, R/2].

        Dim i turns with dim i + R/2 (rotate-half, as Hugging Face's Llama), or 2i with 2i + 1 where `interleaved`. PyTorch's casts
        cos and sin to x's dtype, as Hugging Face's does; native leaves them in fp32 and rounds once. Su et al. 2021, section 3.4.
        """
        return self._implementation("rope").rope(x, cos, sin, interleaved)

    def split_heads(
        self,
        heads: torch.Tensor,
        sizes: tuple[int, int, int],
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of the packed heads [B, T, A + 2K, D], sizes (A, K, K), with q and k under rope.

        `heads` may be overwritten: it must be a result that nothing else reads.
        """
        if self._runs_on("rope") == "native":
            return cpu.split_heads(heads, sizes, cos, sin, interleaved)
        q, k, v = heads.split(sizes, dim=2)
        return self.rope(q, cos, sin, interleaved), self.rope(k, cos, sin, interleaved), v

    def activation(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        """f(x) for a kind of silu, gelu_tanh, gelu_erf, squared_relu.

        GELU by its tanh approximation, as GPT-2 and Megatron's fused kernel have it, or by the error function (Hendrycks and Gimpel 2016);
        squared ReLU is max(x, 0)^2 (So et al. 2021).
        """
        return self._implementation("activation").activation(x, kind)

    def gated_activation(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        """f(gate) * up for x [..., 2F], gate before up: [..., F]; SwiGLU with silu, GEGLU with either GELU (Shazeer 2020)."""
        return self._implementation("activation").gated_activation(x, kind)

    @torch.no_grad()
    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x W^T for x [..., I] and weight [O, I] of one dtype, which is that of the result.

        Of few rows, as when one token follows another, on the few_rows kernel where there is one: then reading the weight is all there is.
        """
        if self._runs_on("few_rows") == "native" and x.numel() <= FEW_ROWS * x.shape[-1]:
            return cpu.few_rows_product(x, weight)
        return F.linear(self.operand(x), self.operand(weight)).to(x.dtype)

    def block_step(
        self, shape: BlockShape, weights: Sequence[torch.Tensor | None], sequences: int
    ) -> BlockStep | None:
        """What passes one more token of each of some sequences through a block in one call, without a gradient. None: op by op.

        weights: weight and bias, or None, of the block's attention_norm, qkv, q_norm, k_norm, out, attention_post_norm, mlp_norm, up, down,
        mlp_post_norm, in this order; a norm with a bias is a LayerNorm.
        """
        if (
            self._runs_on("block_step") != "native"
            or sequences > FEW_ROWS
            or not BlockStep.takes(weights)
        ):
            return None
        return BlockStep(shape, weights)

    @torch.no_grad()
    def cross_entropy_statistics(
        self, logits: torch.Tensor, column: torch.Tensor, real: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of logits [N, C], of whose columns the first `real` count: fp32 [N] each, what the loss and its gradient are made of.

        column int64 [N]: where the label stands, -1 if not among these columns. The maximum (-inf if real is 0); the sum over all but the
        label of exp(logit - maximum); the label's logit (0 if not here). Without the label's own term in the sum, a probability near 1
        keeps its distance from 1.
        """
        return self._implementation("cross_entropy").cross_entropy_statistics(logits, column, real)

    @torch.no_grad()
    def cross_entropy_gradient_(
        self,
        logits: torch.Tensor,
        column: torch.Tensor,
        highest: torch.Tensor,
        scale: torch.Tensor,
        target_gradient: torch.Tensor,
        real: int,
    ) -> None:
        """Over the logits: exp(logit - highest) * scale, and target_gradient at the label; fp32 [N] each, rounded once.

        Zero in the columns from `real` on, and in whole rows of scale 0, whatever the logits hold.
        """
        self._implementation("cross_entropy").cross_entropy_gradient_(
            logits, column, highest, scale, target_gradient, real
        )

    @torch.no_grad()
    def squared_norm(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The squared 2-norm of one or more contiguous fp32 tensors together, 0-d fp64 on their device."""
        return self._implementation("grad_norm").squared_norm(tensors)

    @torch.no_grad()
    def sgd_(
        self,
        masters: torch.Tensor,
        momentum: torch.Tensor,
        grads: torch.Tensor,
        weights: torch.Tensor,
        *,
        lr: float,
        momentum_factor: float,
        weight_decay: float,
        grad_scale: torch.Tensor,
        skip: torch.Tensor,
    ) -> None:
        """One update by SGD with momentum and coupled weight decay, as torch.optim.SGD; buffers, grad_scale and skip as for adamw_."""
        step = momentum_factor * momentum + grads * grad_scale + weight_decay * masters
        updated = masters - lr * step
        torch.where(skip, weights, updated.to(weights.dtype), out=weights)
        torch.where(skip, momentum, step, out=momentum)
        if weights.data_ptr() != masters.data_ptr():
            torch.where(skip, masters, updated, out=masters)

    @torch.no_grad()
    def adamw_(
        self,
        masters: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        grads: torch.Tensor,
        weights: torch.Tensor,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: torch.Tensor,
        grad_scale: torch.Tensor,
        skip: torch.Tensor,
    ) -> None:
        """One AdamW update in place of four flat buffers: masters, exp_avg, exp_avg_sq (fp32) and weights (the working dtype).

        weights becomes a rounded copy of masters, and may be masters itself. grads (fp32) is read as grads * grad_scale. step (0-d)
        counts this update, from 1; grad_scale (0-d fp32) and skip (0-d bool) live on the device too: the host waits for none of
        them. Where skip is true nothing changes, whatever the gradients hold. Same arithmetic as torch.optim.AdamW (Loshchilov and
        Hutter 2019).
        """
        _check_flat(masters, exp_avg, exp_avg_sq, grads, weights)
        # In fp64, as torch.optim computes them on the host: 1 - 0.999**t in fp32 has lost three digits at t = 1.
        t = step.to(torch.float64)
        self._implementation("adamw", triton_adamw).adamw_(
            masters,
            exp_avg,
            exp_avg_sq,
            grads,
            weights,
            step_size=(lr / (1 - beta1**t)).float(),
            root_correction=(1 - beta2**t).sqrt().float(),
            grad_scale=grad_scale.float(),
            skip=skip.bool(),
            lr_decay=1 - lr * weight_decay,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
        )

    def _runs_on(self, op: str) -> str:
        one = self.implementations[op]
        return "torch" if one == "triton" and torch.compiler.is_compiling() else one

    def _implementation(self, op: str, triton=None):
        """The module that has the op's functions."""
        return {"torch": reference, "native": cpu, "triton": triton}[self._runs_on(op)]


def _full_name(implementation: str) -> str:
    return f"native ({cpu.simd()})" if implementation == "native" else implementation


def _check_flat(
    masters: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grads: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """The kernels go by address: what has gaps, or ends early, they would write past."""
    for name, buffer in {
        "masters": masters,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "grads": grads,
        "weights": weights,
    }.items():
        if buffer.shape != (masters.numel(),) or not buffer.is_contiguous():
            raise ValueError(
                f"adamw_ takes flat buffers of one size; masters has {masters.numel()} elements, {name} is {tuple(buffer.shape)}"
            )
        if buffer.dtype != torch.float32 and name != "weights":
            raise ValueError(f"adamw_ keeps its state in float32; {name} is {buffer.dtype}")
