"""The native CPU kernels as torch functions. Only this package may import it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from ..autograd import apply

try:
    from .. import _native
except ImportError:  # installed without a compiler
    _native = None

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # and what their kernels end in
# A module left over from an older build may lack the kernels: as good as none.
AVAILABLE = hasattr(_native, "norm_forward_fp32") and hasattr(_native, "block_step_fp32")


def simd() -> str:
    """The instruction set the kernels run with, for the log."""
    return _native.simd()


@torch.compiler.disable
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dim of x [..., H], weight [H] of the same dtype, fp32 or bf16, both on the CPU.

    Raises TypeError on any other dtype.
    """
    return apply(_Norm, x, None, weight, None, eps, False)


@torch.compiler.disable
def add_rms_norm(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + branch and its RMSNorm."""
    return apply(_Norm, x, branch, weight, None, eps, False)


@torch.compiler.disable
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """LayerNorm over the last dim of x [..., H]; dtypes as for rms_norm."""
    return apply(_Norm, x, None, weight, bias, eps, True)


@torch.compiler.disable
def add_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + branch and its LayerNorm."""
    return apply(_Norm, x, branch, weight, bias, eps, True)


class _Norm(torch.autograd.Function):
    """y, or with a branch x + branch and y. What reaches the sum past the norm is added to its gradient in the same pass."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, centred):
        kernel = _kernel("norm_forward", x, weight, *(t for t in (branch, bias) if t is not None))
        x, weight = x.contiguous(), weight.contiguous()
        branch, bias = (None if t is None else t.contiguous() for t in (branch, bias))
        y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
        mean = torch.empty_like(rstd) if centred else None
        total = None if branch is None else torch.empty_like(x)
        if x.numel():
            kernel(
                centred,
                *_addresses(x, branch, weight, bias, total, y, mean, rstd),
                rstd.numel(),
                x.shape[-1],
                eps,
                torch.get_num_threads(),
            )
        normalised = x if branch is None else total
        ctx.save_for_backward(normalised, weight, mean, rstd)
        ctx.has_bias, ctx.has_branch = bias is not None, branch is not None
        return y if branch is None else (total, y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        x, weight, mean, rstd = ctx.saved_tensors
        dsum, dy = (None, *gradients) if not ctx.has_branch else gradients
        dy, dsum = dy.contiguous(), None if dsum is None else dsum.contiguous()
        dx, dweight = torch.empty_like(x), torch.zeros(weight.shape, dtype=torch.float32)
        dbias = torch.zeros_like(dweight) if ctx.has_bias else None
        if x.numel():
            arguments = _addresses(dy, x, weight, mean, rstd, dsum, dx, dweight, dbias)
            _kernel("norm_backward", x)(
                mean is not None, *arguments, rstd.numel(), x.shape[-1], torch.get_num_threads()
            )
        dbias = None if dbias is None else dbias.to(weight.dtype)
        return dx, dx if ctx.has_branch else None, dweight.to(weight.dtype), dbias, None, None


@torch.compiler.disable
def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """f(x) for a kind of silu, gelu_tanh, gelu_erf, squared_relu; fp32 or bf16."""
    return apply(_Activation, x, kind, False)


@torch.compiler.disable
def gated_activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """f(gate) * up for x [..., 2F], gate before up; [..., F]."""
    return apply(_Activation, x, kind, True)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind, gated):
        x = x.contiguous()
        columns = x.shape[-1] // 2 if gated else x.shape[-1]
        y = x.new_empty(*x.shape[:-1], columns)
        if x.numel():
            if gated:
                _kernel("gated_forward", x)(
                    _kind(kind),
                    *_addresses(x, y),
                    y.numel() // columns,
                    columns,
                    torch.get_num_threads(),
                )
            else:
                _kernel("activation_forward", x)(
                    _kind(kind), *_addresses(x, y), x.numel(), torch.get_num_threads()
                )
        ctx.save_for_backward(x)
        ctx.kind, ctx.gated = kind, gated
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        if x.numel():
            if ctx.gated:
                columns = dy.shape[-1]
                _kernel("gated_backward", x)(
                    _kind(ctx.kind),
                    *_addresses(dy, x, dx),
                    dy.numel() // columns,
                    columns,
                    torch.get_num_threads(),
                )
            else:
                _kernel("activation_backward", x)(
                    _kind(ctx.kind), *_addresses(dy, x, dx), x.numel(), torch.get_num_threads()
                )
        return dx, None, None


@torch.compiler.disable
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """See Ops.rope; the angles stay fp32."""
    return apply(_Rope, x, cos, sin, interleaved)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(x, torch.empty(x.shape, dtype=x.dtype), cos, sin, interleaved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return (
            _rotated(dy, torch.empty(dy.shape, dtype=dy.dtype), cos, sin, ctx.interleaved, -1.0),
            None,
            None,
            None,
        )


@torch.compiler.disable
def split_heads(
    heads: torch.Tensor,
    sizes: tuple[int, int, int],
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See Ops.split_heads. The heads of q and k are rotated where they stand."""
    return apply(_SplitHeads, heads, sizes, cos, sin, interleaved)


class _SplitHeads(torch.autograd.Function):
    """Forward in place; backward brings the three gradients, rotated back, into one tensor in one pass over them."""

    @staticmethod
    def forward(ctx, heads, sizes, cos, sin, interleaved):
        heads = heads.detach().contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.sizes, ctx.interleaved = sizes, interleaved
        turning = heads[:, :, : sizes[0] + sizes[1]]
        _rotated(turning, turning, cos, sin, interleaved)
        return heads.split(sizes, dim=2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv):
        cos, sin = ctx.saved_tensors
        packed = dq.new_empty(*dq.shape[:2], sum(ctx.sizes), dq.shape[3])
        into_q, into_k, into_v = packed.split(ctx.sizes, dim=2)
        for gradient, place in ((dq, into_q), (dk, into_k)):
            _rotated(gradient, place, cos, sin, ctx.interleaved, -1.0)
        into_v.copy_(dv)
        return packed, None, None, None, None


def _rotated(
    x: torch.Tensor,
    y: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    direction: float = 1.0,
) -> torch.Tensor:
    """y, filled with the rotated heads of x, both [B, T, A, D] of any strides but in D; y may be x."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = (t.to(torch.float32).contiguous() for t in (cos, sin))
    half = cos.shape[-1]
    batch_stride = 0 if cos.dim() == 2 else cos.shape[1]
    if x.numel():
        arguments = (
            _strides(x),
            y.data_ptr(),
            _strides(y),
            *_addresses(cos, sin),
            batch_stride,
            half,
            interleaved,
            direction,
        )
        _kernel("rope", x)(x.data_ptr(), *arguments, *x.shape, torch.get_num_threads())
    return y


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def few_rows_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T for x [..., I] of few rows and weight [O, I]; sums in fp32."""
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    if y.numel():
        _kernel("few_rows_product", x, weight)(
            *_addresses(x, weight, y),
            y.numel() // weight.shape[0],
            *weight.shape,
            torch.get_num_threads(),
        )
    return y


@dataclass(frozen=True)
class BlockShape:
    """A block's shape, and what it does between its weights.

    hidden, ffn: widths. size: of a head. window: how many tokens a query sees, its own among them. softcap c: scores become
    c tanh(score / c). norm_of_projection: q_norm and k_norm go over all heads together. activation: a kind, as for `activation`.
    """

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    size: int
    window: int | None
    scale: float | None
    softcap: float | None
    eps: float
    interleaved: bool
    norm_of_projection: bool
    gated: bool
    parallel_residual: bool
    activation: str


class BlockStep:
    """See Ops.block_step. Of the weights the tensors are kept, not their addresses: what an optimizer or a load puts there is seen."""

    def __init__(self, shape: BlockShape, weights: Sequence[torch.Tensor | None]):
        values = asdict(shape) | {
            "window": shape.window or 0,
            "scale": shape.size**-0.5 if shape.scale is None else shape.scale,
            "softcap": shape.softcap or 0.0,
            "activation": _kind(shape.activation),
        }
        self._block, self._weights = _native.Block(**values), tuple(weights)

    @staticmethod
    def takes(weights: Sequence[torch.Tensor | None]) -> bool:
        """Whether all are on the CPU, without gaps and of one dtype that the kernels have."""
        given = [weight for weight in weights if weight is not None]
        return all(
            weight.device.type == "cpu"
            and weight.is_contiguous()
            and weight.dtype == given[0].dtype in DTYPES
            for weight in given
        )

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        length: int,
    ) -> torch.Tensor:
        """The block's output [B, 1, H] for x [B, 1, H]; cos and sin fp32 [1, R/2], or None where heads are not rotated.

        keys, values [B, S, K, D]: the first `length` places are read, and the next one is written. Raises ValueError where there is none,
        TypeError where x, keys and values are not of the weights' dtype.
        """
        kernel = _kernel(
            "block_step",
            x,
            keys,
            values,
            *(weight for weight in self._weights if weight is not None),
        )
        if length >= keys.shape[1]:
            raise ValueError(f"a cache of {keys.shape[1]} places is full")
        x = x.contiguous()
        y, half = torch.empty_like(x), 0 if cos is None else cos.shape[-1]
        held = (keys.data_ptr(), values.data_ptr(), keys.shape[1], length)
        kernel(
            self._block,
            _addresses(*self._weights),
            *_addresses(cos, sin),
            half,
            *held,
            *_addresses(x, y),
            x.shape[0],
            torch.get_num_threads(),
        )
        return y


def cross_entropy_statistics(
    logits: torch.Tensor, column: torch.Tensor, real: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See Ops.cross_entropy_statistics."""
    highest, rest, target = (torch.empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    if logits.shape[0]:
        addresses = _addresses(logits, column, highest, rest, target)
        _kernel("cross_entropy_statistics", logits)(
            *addresses, logits.shape[0], real, logits.stride(0), torch.get_num_threads()
        )
    return highest, rest, target


def cross_entropy_gradient_(
    logits: torch.Tensor,
    column: torch.Tensor,
    highest: torch.Tensor,
    scale: torch.Tensor,
    target_gradient: torch.Tensor,
    real: int,
) -> None:
    """See Ops.cross_entropy_gradient_."""
    if logits.shape[0]:
        addresses = _addresses(logits, column, highest, scale, target_gradient)
        _kernel("cross_entropy_gradient", logits)(
            *addresses,
            logits.shape[0],
            real,
            logits.shape[1],
            logits.stride(0),
            torch.get_num_threads(),
        )


def squared_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """See Ops.squared_norm."""
    threads = torch.get_num_threads()
    return torch.tensor(
        sum(_native.squared_norm(t.data_ptr(), t.numel(), threads) for t in tensors),
        dtype=torch.float64,
    )


def adamw_(
    masters,
    exp_avg,
    exp_avg_sq,
    grads,
    weights,
    *,
    step_size,
    root_correction,
    grad_scale,
    skip,
    lr_decay,
    beta1,
    beta2,
    eps,
) -> None:
    """One update in place of contiguous CPU buffers of one size, fp32 but for weights: fp32 or bf16, and perhaps masters itself.

    step_size, root_correction, grad_scale: 0-d fp32; skip: 0-d bool. lr_decay = 1 - lr * weight_decay.
    Raises TypeError on weights of another dtype.
    """
    kernel = _kernel("adamw", weights)
    copy = None if weights.data_ptr() == masters.data_ptr() else weights
    addresses = _addresses(
        masters, exp_avg, exp_avg_sq, grads, copy, step_size, root_correction, grad_scale, skip
    )
    kernel(*addresses, lr_decay, beta1, beta2, eps, masters.numel(), torch.get_num_threads())


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees: large temporaries of a step then cost no page faults in the next one.

    False where the C library has no such setting.
    """
    return AVAILABLE and _native.keep_freed_memory()


def _kernel(name: str, *tensors: torch.Tensor):
    """The kernel for the dtype that all of these have."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES or any(tensor.dtype != dtype for tensor in tensors):
        found = ", ".join(sorted({str(tensor.dtype) for tensor in tensors}))
        raise TypeError(
            f"the native {name.partition('_')[0]} kernels take tensors of one dtype, float32 or bfloat16; got {found}"
        )
    return getattr(_native, f"{name}_{DTYPES[dtype]}")


def _kind(name: str):
    return getattr(_native.Activation, name)


def _addresses(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
