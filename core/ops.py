"""The only door to kernels: which implementation of each op this run uses, chosen once, named in the log, passed in as a value."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import native, reference
from .logs import get_logger

try:
    from .kernels import adamw as triton_adamw
    from .kernels import rms_norm as triton_rms_norm
except ImportError:  # Triton has no wheel for every platform
    triton_adamw = triton_rms_norm = None

# --attention-backend, Megatron's words. None: torch picks the fastest that fits.
_ATTENTION = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "fused": SDPBackend.CUDNN_ATTENTION,
    "unfused": SDPBackend.MATH,
    "local": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Ops:
    """The ops of a model and its optimizer. `Ops()` is plain PyTorch; `choose` picks by flag, device and dtype.

    Everything but adamw_ is differentiable. Under torch.compile every op is the PyTorch one: the compiler fuses it with its
    neighbours, where a kernel of our own would be a wall between them.
    """

    kernels: str = "torch"  # torch, triton or native: of rms_norm and adamw_
    attention_backend: str = "auto"  # as --attention-backend

    def describe(self) -> str:
        """One line for the log: what each op runs on."""
        name = f"native ({native.simd()})" if self.kernels == "native" else self.kernels
        return f"kernels: rms_norm, adamw {name} | attention sdpa ({self.attention_backend}) | layer_norm, rope, activations torch"

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., H] / sqrt(mean(x^2) + eps) in fp32, rounded to x's dtype, times weight [H] cast to that dtype; shape and dtype of x."""
        weight = weight.to(x.dtype)
        if self.kernels == "torch" or torch.compiler.is_compiling():
            return reference.rms_norm(x, weight, eps)
        if self.kernels == "native":
            return native.rms_norm(x, weight, eps)
        return triton_rms_norm.rms_norm(x, weight, eps)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """x [..., H] to mean 0 and variance 1, times weight [H], plus bias [H]; both cast to x's dtype."""
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)

    def rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        """Rotate the first R of the D dims of every head of x [B, T, A, D] by the angles of cos and sin, [T, R/2] or [B, T, R/2].

        Dim i turns with dim i + R/2 (rotate-half, as Hugging Face's Llama), or 2i with 2i + 1 where `interleaved`. cos and sin are
        cast to x's dtype. Su et al. 2021, section 3.4.
        """
        return reference.rope(x, cos, sin, interleaved)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, elementwise (Shazeer 2020)."""
        return reference.swiglu(gate, up)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """GELU by its tanh approximation, as GPT-2 and Megatron's fused kernel have it (Hendrycks and Gimpel 2016)."""
        return F.gelu(x, approximate="tanh")

    def squared_relu(self, x: torch.Tensor) -> torch.Tensor:
        """max(x, 0)^2 (So et al. 2021)."""
        return F.relu(x).square()

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> torch.Tensor:
        """softmax(q k^T * scale) v: q [B, T, A, D], k and v [B, S, K, D] where K divides A; returns [B, T, A, D].

        causal: the last query sees every key and each one before it sees one less (T < S with a KV cache). scale None: D^-1/2.
        dropout: of the attention weights; give 0 when evaluating. With 1 < T < S, which flash and cuDNN cannot express, every backend
        is allowed, whatever attention_backend says.
        Raises ValueError on causal with more queries than keys.
        """
        queries, keys = q.shape[1], k.shape[1]
        if causal and queries > keys:
            raise ValueError(f"causal attention with {queries} queries and only {keys} keys: the first {queries - keys} queries would see nothing")
        # torch's is_causal aligns the first query with the first key, which is right only for T = S.
        aligned = causal and 1 < queries < keys
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries) if aligned else None
        with nullcontext() if aligned else _restricted_to(self.attention_backend):
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and queries == keys,
                scale=scale,
                enable_gqa=q.shape[2] != k.shape[2],
            )
        return y.transpose(1, 2)

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
        implementation = {"torch": reference, "native": native, "triton": triton_adamw}[self.kernels]
        implementation.adamw_(
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


def choose(kernels: str, device: torch.device, dtype: torch.dtype, attention_backend: str = "auto") -> Ops:
    """The ops for --kernels {auto, torch, triton, native} on `device` with activations of `dtype`.

    auto: native on a CPU, triton on a GPU, each where it can serve, else torch, and the log says why.
    Raises ValueError, naming the flag and the remedy, where an implementation or backend asked for by name cannot serve.
    """
    _check_attention_backend(attention_backend, device)
    if kernels not in ("auto", "torch", *_OBSTACLES):
        raise ValueError(f"--kernels {kernels} is not one of auto, torch, {', '.join(_OBSTACLES)}")
    if kernels == "torch":
        return Ops("torch", attention_backend)
    wanted = kernels if kernels != "auto" else "native" if device.type == "cpu" else "triton"
    obstacle = _OBSTACLES[wanted](device, dtype)
    if obstacle is None:
        return Ops(wanted, attention_backend)
    if kernels != "auto":
        raise ValueError(f"--kernels {kernels}: {obstacle}, or use --kernels auto")
    get_logger().info(f"kernels: PyTorch in place of {wanted}: {obstacle}")
    return Ops("torch", attention_backend)


def _native_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native kernels cannot serve, and what to do about it; None where they can."""
    if device.type != "cpu":
        return f"the native kernels run on the CPU and the device is {device.type}; use --kernels triton"
    if not native.AVAILABLE:
        return "trivium._native is not built; install a C++17 compiler and run `pip install --no-deps --no-build-isolation -e .`"
    if dtype not in native.DTYPES:
        return f"the native kernels have float32 and bfloat16, not {dtype}; use --bf16"
    return None


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot serve, and what to do about it; None where it can."""
    if triton_rms_norm is None:
        return "triton cannot be imported; install triton>=3.6"
    if device.type == "cpu" and not triton_rms_norm.INTERPRETED:
        return "Triton has no CPU target; set TRITON_INTERPRET=1 (slow, for tests)"
    if device.type == "cuda" and triton_rms_norm.INTERPRETED:
        return "TRITON_INTERPRET=1 would run the kernels on the CPU; unset it"
    return None


_OBSTACLES = {"triton": _triton_obstacle, "native": _native_obstacle}


def _check_attention_backend(backend: str, device: torch.device) -> None:
    if backend not in _ATTENTION:
        raise ValueError(f"--attention-backend {backend} is not one of {', '.join(_ATTENTION)}")
    if backend == "fused" and device.type != "cuda":
        raise ValueError(f"--attention-backend fused is cuDNN's and the device is {device.type}; use --attention-backend auto")


def _restricted_to(backend: str) -> AbstractContextManager:
    kernel = _ATTENTION[backend]
    return nullcontext() if kernel is None else sdpa_kernel(kernel)


def _check_flat(masters: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, grads: torch.Tensor, weights: torch.Tensor) -> None:
    """The kernels go by address: what has gaps, or ends early, they would write past."""
    for name, buffer in {"masters": masters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grads": grads, "weights": weights}.items():
        if buffer.shape != (masters.numel(),) or not buffer.is_contiguous():
            raise ValueError(f"adamw_ takes flat buffers of one size; masters has {masters.numel()} elements, {name} is {tuple(buffer.shape)}")
        if buffer.dtype != torch.float32 and name != "weights":
            raise ValueError(f"adamw_ keeps its state in float32; {name} is {buffer.dtype}")
