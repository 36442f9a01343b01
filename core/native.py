"""The native CPU kernels as torch functions. Only ops may import this."""

import torch

try:
    from . import _native
except ImportError:  # installed without a compiler
    _native = None

DTYPES = (torch.float32, torch.bfloat16)
# A module left over from an older build may lack the kernels: as good as none.
AVAILABLE = hasattr(_native, "rms_norm_forward_fp32") and hasattr(_native, "adamw_fp32")


def simd() -> str:
    """The instruction set the kernels run with, for the log."""
    return _native.simd()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dim of x [..., H], weight [H] of the same dtype, fp32 or bf16, both on the CPU.

    Raises TypeError on any other dtype.
    """
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise TypeError(f"the native rms_norm takes x and weight of one dtype, float32 or bfloat16; got {x.dtype} and {weight.dtype}")
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x, weight = x.contiguous(), weight.contiguous()
        y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
        if x.numel():
            kernel = _native.rms_norm_forward_fp32 if x.dtype == torch.float32 else _native.rms_norm_forward_bf16
            kernel(*_addresses(x, weight, y, rstd), rstd.numel(), x.shape[-1], eps, torch.get_num_threads())
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        dx, dweight = torch.empty_like(x), torch.zeros(weight.shape, dtype=torch.float32)
        if x.numel():
            kernel = _native.rms_norm_backward_fp32 if x.dtype == torch.float32 else _native.rms_norm_backward_bf16
            kernel(*_addresses(dy, x, weight, rstd, dx, dweight), rstd.numel(), x.shape[-1], torch.get_num_threads())
        return dx, dweight.to(weight.dtype), None


def adamw_(masters, exp_avg, exp_avg_sq, grads, weights, *, step_size, root_correction, grad_scale, skip, lr_decay, beta1, beta2, eps) -> None:
    """One update in place of contiguous CPU buffers of one size, fp32 but for weights: fp32 or bf16, and perhaps masters itself.

    step_size, root_correction, grad_scale: 0-d fp32; skip: 0-d bool. lr_decay = 1 - lr * weight_decay.
    Raises TypeError on weights of another dtype.
    """
    if weights.dtype not in DTYPES:
        raise TypeError(f"the native adamw takes weights in float32 or bfloat16, not {weights.dtype}")
    kernel = _native.adamw_fp32 if weights.dtype == torch.float32 else _native.adamw_bf16
    copy = 0 if weights.data_ptr() == masters.data_ptr() else weights.data_ptr()
    addresses = (*_addresses(masters, exp_avg, exp_avg_sq, grads), copy, *_addresses(step_size, root_correction, grad_scale, skip))
    kernel(*addresses, lr_decay, beta1, beta2, eps, masters.numel(), torch.get_num_threads())


def _addresses(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)
