"""AdamW over flat buffers in one launch.

Memory plan, for each parameter: masters, exp_avg and exp_avg_sq are read and written once and the
gradient is read once, 28 bytes of fp32; the working copy is written if there is one. All else, the
terms of the update, is one scalar a program. Nothing is read twice, so memory speed is the limit.
"""

from typing import Protocol

import torch
import triton
import triton.language as tl

# 8 elements a thread: two 16-byte loads in flight for each of four arrays. At 16 elements, too few
# threads fit their registers.
_BLOCK = 2048


class Terms(Protocol):
    """The numbers of one update, the same for all buffers; tensors are 0-d and on the device.

    step_size: lr / (1 - beta1^t), fp32. root_correction: sqrt(1 - beta2^t), fp32.
    grad_scale: factor on the gradients, fp32. skip: bool, change nothing.
    lr_decay: 1 - lr * weight_decay.
    """

    @property
    def step_size(self) -> torch.Tensor: ...
    @property
    def root_correction(self) -> torch.Tensor: ...
    @property
    def grad_scale(self) -> torch.Tensor: ...
    @property
    def skip(self) -> torch.Tensor: ...
    @property
    def lr_decay(self) -> float: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def eps(self) -> float: ...


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
    # A skipped update stores nothing, so that no NaN in the gradients can matter. All programs take
    # the same branch.
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
    terms: Terms,
) -> None:
    """Update contiguous buffers of one size in place (Loshchilov and Hutter 2019).

    All are fp32 but weights, which becomes a rounded copy of masters and may be masters itself.
    Runs on the current device, which must be the buffers'.
    """
    size = masters.numel()
    if not size:
        return
    _adamw[(triton.cdiv(size, _BLOCK),)](
        masters,
        exp_avg,
        exp_avg_sq,
        grads,
        weights,
        terms.step_size,
        terms.root_correction,
        terms.grad_scale,
        terms.skip,
        terms.lr_decay,
        1 - terms.beta1,
        terms.beta2,
        1 - terms.beta2,
        terms.eps,
        size,
        BLOCK=_BLOCK,
        COPY=weights.data_ptr() != masters.data_ptr(),
        num_warps=8,
    )
