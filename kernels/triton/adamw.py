"""AdamW over flat buffers in one launch: 28 bytes of fp32 state and gradient a parameter read and written once, and the working copy written."""

import torch
import triton
import triton.language as tl

_BLOCK = 2048  # 8 elements a thread: two 16-byte loads in flight for each of four arrays; at 16, too few threads fit their registers


@triton.jit
def _adamw(
    masters,
    exp_avg,
    exp_avg_sq,
    grads,
    weights,
    step_size,
    root_correction,
    grad_scale,
    skip,
    lr_decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    size,
    BLOCK: tl.constexpr,
    COPY: tl.constexpr,
):
    # A skipped update stores nothing, so that no NaN in the gradients can matter. The same for all programs.
    if tl.load(skip) == 0:
        # int64 first: the offset wraps at 2^31 elements otherwise.
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = i < size
        g = tl.load(grads + i, mask=mask, other=0.0) * tl.load(grad_scale)
        m = tl.load(exp_avg + i, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq + i, mask=mask, other=0.0)
        p = tl.load(masters + i, mask=mask, other=0.0)
        m += one_minus_beta1 * (g - m)
        v = v * beta2 + one_minus_beta2 * (g * g)
        p = p * lr_decay - tl.load(step_size) * m / (tl.sqrt(v) / tl.load(root_correction) + eps)
        tl.store(exp_avg + i, m, mask=mask)
        tl.store(exp_avg_sq + i, v, mask=mask)
        tl.store(masters + i, p, mask=mask)
        if COPY:
            tl.store(weights + i, p, mask=mask)


def adamw_(
    masters: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grads: torch.Tensor,
    weights: torch.Tensor,
    *,
    step_size: torch.Tensor,
    root_correction: torch.Tensor,
    grad_scale: torch.Tensor,
    skip: torch.Tensor,
    lr_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One update in place of contiguous buffers of one size, all fp32 but weights, which may be masters itself.

    step_size = lr / (1 - beta1^t), root_correction = sqrt(1 - beta2^t), grad_scale: 0-d fp32; skip: 0-d bool; all on the device.
    lr_decay = 1 - lr * weight_decay. Loshchilov and Hutter 2019. Runs on the current device, which must be the buffers'.
    """
    size = masters.numel()
    if size:
        _adamw[(triton.cdiv(size, _BLOCK),)](
            masters,
            exp_avg,
            exp_avg_sq,
            grads,
            weights,
            step_size,
            root_correction,
            grad_scale,
            skip,
            lr_decay,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            size,
            BLOCK=_BLOCK,
            COPY=weights.data_ptr() != masters.data_ptr(),
            num_warps=8,
        )
