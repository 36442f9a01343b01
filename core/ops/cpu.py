"""The native CPU kernels of csrc/ as ops. Contracts: reference.py.

A kernel is called with addresses, sizes and a number of threads; what surrounds the call here makes
tensors contiguous, allocates the result and keeps what the backward pass needs. torch.compile does
not look inside: each function that has a gradient is a graph break to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference

try:
    from .. import _native
except ImportError:  # installed without a compiler
    _native = None  # type: ignore[assignment]

# The dtypes that there are kernels for, with the ending of the kernels' names.
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# A module left over from an older build may lack the kernels: as good as none.
AVAILABLE = hasattr(_native, "norm_forward_fp32") and hasattr(_native, "block_step_fp32")
FEW_ROWS = 32  # up to which our own matrix product is faster than the library's


def simd() -> str:
    """Return the name of the instruction set the kernels run with, for the log."""
    return _native.simd()


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees, and return whether it can.

    Large temporaries of a step then cost no page faults in the next one. The C library decides
    whether it has such a setting.
    """
    return AVAILABLE and _native.keep_freed_memory()


# --- calling an autograd function ---


class _NoContext:
    """Takes what a forward pass would keep for its backward, and forgets it."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Call function.apply, or its forward alone where gradients are off.

    When tokens are generated one by one, torch's bookkeeping is a tenth of the time of a token.
    """
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoContext(), *arguments)


# --- norms ---


@torch.compiler.disable
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute reference.rms_norm in one pass. Raises TypeError unless x is fp32 or bf16."""
    weight = weight.to(x.dtype)
    return _apply(_Norm, x, None, weight, None, eps, False)


@torch.compiler.disable
def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute reference.add_rms_norm in one pass."""
    weight = weight.to(x.dtype)
    return _apply(_Norm, x, branch, weight, None, eps, False)


@torch.compiler.disable
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Compute reference.layer_norm in one pass."""
    bias = None if bias is None else bias.to(x.dtype)
    weight = weight.to(x.dtype)
    return _apply(_Norm, x, None, weight, bias, eps, True)


@torch.compiler.disable
def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute reference.add_layer_norm in one pass."""
    bias = None if bias is None else bias.to(x.dtype)
    weight = weight.to(x.dtype)
    return _apply(_Norm, x, branch, weight, bias, eps, True)


class _Norm(torch.autograd.Function):
    """Returns y, or with a branch (x + branch, y).

    The gradient that reaches the sum past the norm is added to the norm's own in the same pass.
    """

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, centred):
        given = [tensor for tensor in (x, weight, branch, bias) if tensor is not None]
        kernel = _kernel("norm_forward", *given)
        x = x.contiguous()
        weight = weight.contiguous()
        branch = None if branch is None else branch.contiguous()
        bias = None if bias is None else bias.contiguous()
        y = torch.empty_like(x)
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
        mean = torch.empty_like(rstd) if centred else None
        total = None if branch is None else torch.empty_like(x)
        if x.numel():
            addresses = _addresses(x, branch, weight, bias, total, y, mean, rstd)
            sizes = (rstd.numel(), x.shape[-1])
            kernel(centred, *addresses, *sizes, eps, torch.get_num_threads())
        # The norm's own input: with a branch that is the sum, and neither summand is needed again.
        ctx.save_for_backward(x if branch is None else total, weight, mean, rstd)
        ctx.has_bias = bias is not None
        ctx.has_branch = branch is not None
        return y if branch is None else (total, y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        x, weight, mean, rstd = ctx.saved_tensors
        dy = gradients[-1].contiguous()
        dsum = gradients[0] if ctx.has_branch else None
        dsum = None if dsum is None else dsum.contiguous()
        dx = torch.empty_like(x)
        # Sums over all tokens: in bf16 they would lose small terms.
        dweight = torch.zeros(weight.shape, dtype=torch.float32)
        dbias = torch.zeros_like(dweight) if ctx.has_bias else None
        if x.numel():
            addresses = _addresses(dy, x, weight, mean, rstd, dsum, dx, dweight, dbias)
            sizes = (rstd.numel(), x.shape[-1])
            kernel = _kernel("norm_backward", x)
            kernel(mean is not None, *addresses, *sizes, torch.get_num_threads())
        dbias = None if dbias is None else dbias.to(weight.dtype)
        # d(x + branch) is the gradient of both summands.
        dbranch = dx if ctx.has_branch else None
        return dx, dbranch, dweight.to(weight.dtype), dbias, None, None


# --- activations ---


def has_activation(kind: str) -> bool:
    """Return whether the kernels have this kind; what they lack runs in plain PyTorch."""
    return hasattr(_native.Activation, kind)


@torch.compiler.disable
def activation(x: Tensor, kind: str) -> Tensor:
    """Compute reference.activation in one pass."""
    if not has_activation(kind):
        return reference.activation(x, kind)
    return _apply(_Activation, x, kind)


@torch.compiler.disable
def gated_activation(x: Tensor, kind: str) -> Tensor:
    """Compute reference.gated_activation in one pass."""
    if not has_activation(kind):
        return reference.gated_activation(x, kind)
    return _apply(_GatedActivation, x, kind)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind):
        x = x.contiguous()
        y = torch.empty_like(x)
        if x.numel():
            threads = torch.get_num_threads()
            kernel = _kernel("activation_forward", x)
            kernel(_kind(kind), *_addresses(x, y), x.numel(), threads)
        ctx.save_for_backward(x)
        ctx.kind = kind
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dy = dy.contiguous()
        dx = torch.empty_like(x)
        if x.numel():
            threads = torch.get_num_threads()
            kernel = _kernel("activation_backward", x)
            kernel(_kind(ctx.kind), *_addresses(dy, x, dx), x.numel(), threads)
        return dx, None


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind):
        x = x.contiguous()
        columns = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], columns)
        if x.numel():
            sizes = (y.numel() // columns, columns)
            threads = torch.get_num_threads()
            kernel = _kernel("gated_forward", x)
            kernel(_kind(kind), *_addresses(x, y), *sizes, threads)
        ctx.save_for_backward(x)
        ctx.kind = kind
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dy = dy.contiguous()
        dx = torch.empty_like(x)
        if x.numel():
            columns = dy.shape[-1]
            sizes = (dy.numel() // columns, columns)
            threads = torch.get_num_threads()
            kernel = _kernel("gated_backward", x)
            kernel(_kind(ctx.kind), *_addresses(dy, x, dx), *sizes, threads)
        return dx, None


# --- rotary positions ---


@torch.compiler.disable
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Compute reference.rope with the angles left in fp32."""
    return _apply(_Rope, x, cos, sin, interleaved)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        y = torch.empty(x.shape, dtype=x.dtype)
        return _rotated(x, y, cos, sin, interleaved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        dx = torch.empty(dy.shape, dtype=dy.dtype)
        _rotated(dy, dx, cos, sin, ctx.interleaved, -1.0)
        return dx, None, None, None


@torch.compiler.disable
def split_heads(
    heads: Tensor,
    sizes: tuple[int, int, int],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
) -> reference.Tensors3:
    """Compute reference.split_heads, rotating the heads of q and k where they stand."""
    return _apply(_SplitHeads, heads, sizes, cos, sin, interleaved)


class _SplitHeads(torch.autograd.Function):
    """q, k and v of packed heads, rotated in place.

    Backward brings the three gradients, rotated back, into one tensor.
    """

    @staticmethod
    def forward(ctx, heads, sizes, cos, sin, interleaved):
        # Rotated in place: nobody else reads the packed heads, which saves a copy of q and k.
        heads = heads.detach().contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.sizes = sizes
        ctx.interleaved = interleaved
        a, k, _ = sizes
        turning = heads[:, :, : a + k]
        _rotated(turning, turning, cos, sin, interleaved)
        return heads.split(sizes, dim=2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv):
        cos, sin = ctx.saved_tensors
        batch, tokens, _, size = dq.shape
        packed = dq.new_empty(batch, tokens, sum(ctx.sizes), size)
        # Rotating by the negative angle is the transpose of the rotation, so its backward.
        into_q, into_k, into_v = packed.split(ctx.sizes, dim=2)
        _rotated(dq, into_q, cos, sin, ctx.interleaved, -1.0)
        _rotated(dk, into_k, cos, sin, ctx.interleaved, -1.0)
        into_v.copy_(dv)
        return packed, None, None, None, None


def _rotated(
    x: Tensor,
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    direction: float = 1.0,
) -> Tensor:
    """Fill y with the rotated heads of x and return it.

    x, y: [B, T, A, D] of any strides but in D; y may be x.
    direction: 1 by the angles, -1 back.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos = cos.to(torch.float32).contiguous()
    sin = sin.to(torch.float32).contiguous()
    if x.numel():
        # Angles [T, R/2] serve all samples: a stride of 0 reads the same ones again.
        batch_stride = 0 if cos.dim() == 2 else cos.shape[1]
        angles = (*_addresses(cos, sin), batch_stride, cos.shape[-1])
        kernel = _kernel("rope", x)
        kernel(
            x.data_ptr(),
            _strides(x),
            y.data_ptr(),
            _strides(y),
            *angles,
            interleaved,
            direction,
            *x.shape,
            torch.get_num_threads(),
        )
    return y


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


# --- products of few rows, steps of a block ---


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """Compute reference.few_rows_product, summing in fp32; without a gradient."""
    x = x.contiguous()
    weight = weight.contiguous()
    outputs, inputs = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    if y.numel():
        sizes = (y.numel() // outputs, outputs, inputs)
        kernel = _kernel("few_rows_product", x, weight)
        kernel(*_addresses(x, weight, y), *sizes, torch.get_num_threads())
    return y


@dataclass(frozen=True)
class BlockShape:
    """The shape of a block, and what it does between its weights.

    hidden, ffn: widths, H and F.
    heads, kv_heads, size: A, K and D.
    window: number of tokens that a query sees, its own among them.
    scale, softcap: of the attention scores, as in AttentionRule.
    eps: of the norms.
    norm_of_projection: q_norm and k_norm go over all heads together.
    activation: a kind, as for the op of that name.
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


def block_step(
    shape: BlockShape, weights: Sequence[Tensor | None], sequences: int
) -> "BlockStep | None":
    """Return a call that passes one more token of each sequence through a block.

    It has no gradient. None where the kernel cannot serve: the block is then run op by op.

    weights: weight and bias, or None, of the block's attention_norm, qkv, q_norm, k_norm, out,
        attention_post_norm, mlp_norm, up, down, mlp_post_norm, in this order; a norm with a bias
        is a LayerNorm.
    sequences: how many there are at most.
    """
    if sequences > FEW_ROWS or not has_activation(shape.activation):
        return None
    given = [weight for weight in weights if weight is not None]
    dtype = given[0].dtype
    for weight in given:
        fits = weight.device.type == "cpu" and weight.is_contiguous()
        if not fits or weight.dtype != dtype or dtype not in DTYPES:
            return None
    return BlockStep(shape, weights)


class BlockStep:
    """One block's step on one more token, in a single native call: see block_step.

    The weights are kept as tensors, not as addresses: what an optimizer or a load puts there later
    is seen.
    """

    def __init__(self, shape: BlockShape, weights: Sequence[Tensor | None]):
        values = asdict(shape)
        # 0 stands for "none" in the kernel; no window and no cap is 0 by itself.
        values["window"] = shape.window or 0
        values["scale"] = shape.size**-0.5 if shape.scale is None else shape.scale
        values["softcap"] = shape.softcap or 0.0
        values["activation"] = _kind(shape.activation)
        self._block = _native.Block(**values)
        self._weights = tuple(weights)
        self._given = [weight for weight in weights if weight is not None]

    def __call__(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        keys: Tensor,
        values: Tensor,
        length: int,
    ) -> Tensor:
        """Return the block's output [B, 1, H].

        x: [B, 1, H].
        cos, sin: fp32 [1, R/2], or None where heads are not rotated.
        keys, values: [B, S, K, D]; the first `length` places are read, the next one is written.
        Raises ValueError where there is no next place, TypeError where x, keys or values are not of
        the weights' dtype.
        """
        kernel = _kernel("block_step", x, keys, values, *self._given)
        if length >= keys.shape[1]:
            raise ValueError(f"a cache of {keys.shape[1]} places is full")
        x = x.contiguous()
        y = torch.empty_like(x)
        half = 0 if cos is None else cos.shape[-1]
        angles = (*_addresses(cos, sin), half)
        held = (*_addresses(keys, values), keys.shape[1], length)
        weights = _addresses(*self._weights)
        batch = (*_addresses(x, y), x.shape[0])
        kernel(self._block, weights, *angles, *held, *batch, torch.get_num_threads())
        return y


# --- cross-entropy ---


def cross_entropy_statistics(logits: Tensor, column: Tensor, real: int) -> reference.Tensors3:
    """Compute reference.cross_entropy_statistics in one pass over the logits."""
    rows = logits.shape[0]
    highest = torch.empty(rows, dtype=torch.float32)
    rest = torch.empty_like(highest)
    target = torch.empty_like(highest)
    if rows:
        addresses = _addresses(logits, column, highest, rest, target)
        sizes = (rows, real, logits.stride(0))
        kernel = _kernel("cross_entropy_statistics", logits)
        kernel(*addresses, *sizes, torch.get_num_threads())
    return highest, rest, target


def cross_entropy_gradient_(
    logits: Tensor,
    column: Tensor,
    highest: Tensor,
    scale: Tensor,
    target_gradient: Tensor,
    real: int,
) -> None:
    """Compute reference.cross_entropy_gradient_ in one pass over the logits."""
    rows, columns = logits.shape
    if rows:
        addresses = _addresses(logits, column, highest, scale, target_gradient)
        sizes = (rows, real, columns, logits.stride(0))
        kernel = _kernel("cross_entropy_gradient", logits)
        kernel(*addresses, *sizes, torch.get_num_threads())


# --- the optimizer's passes over flat memory ---


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Compute reference.squared_norm: fp32 inside short runs of elements, fp64 between them."""
    threads = torch.get_num_threads()
    total = 0.0
    for tensor in tensors:
        total += _native.squared_norm(tensor.data_ptr(), tensor.numel(), threads)
    return torch.tensor(total, dtype=torch.float64)


def adamw_(
    masters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: Tensor,
    weights: Tensor,
    terms: reference.AdamWTerms,
) -> None:
    """Compute reference.adamw_ in one pass. Raises TypeError unless weights are fp32 or bf16."""
    state = (masters, exp_avg, exp_avg_sq, grads)
    if not _are_flat((*state, weights)) or any(one.dtype != torch.float32 for one in state):
        reference.check_flat(*state, weights)  # names what is wrong
    kernel = _kernel("adamw", weights)
    copy = None if weights.data_ptr() == masters.data_ptr() else weights
    buffers = _addresses(masters, exp_avg, exp_avg_sq, grads, copy)
    scalars = _addresses(terms.step_size, terms.root_correction, terms.grad_scale, terms.skip)
    constants = (terms.lr_decay, terms.beta1, terms.beta2, terms.eps)
    size = masters.numel()
    kernel(*buffers, *scalars, *constants, size, torch.get_num_threads())


# --- helpers ---


def _are_flat(buffers: Sequence[Tensor]) -> bool:
    """Return whether all are one-dimensional, without gaps and of one size."""
    shape = (buffers[0].numel(),)
    return all(buffer.shape == shape and buffer.is_contiguous() for buffer in buffers)


def _kernel(name: str, *tensors: Tensor) -> Callable[..., None]:
    """Return the kernel for the dtype that all of these have; TypeError where there is none."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES or any(tensor.dtype != dtype for tensor in tensors):
        kind, _, _ = name.partition("_")
        found = sorted({str(tensor.dtype) for tensor in tensors})
        raise TypeError(
            f"the native {kind} kernels take tensors of one dtype, "
            f"float32 or bfloat16; got {', '.join(found)}"
        )
    return getattr(_native, f"{name}_{DTYPES[dtype]}")


def _kind(name: str) -> Any:
    return getattr(_native.Activation, name)


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    # A list first: a generator would be one more call for every tensor.
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
