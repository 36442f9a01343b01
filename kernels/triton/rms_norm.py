"""RMSNorm forward and backward.

Memory plan, R rows of H elements. Up to MAX_TILE columns a program holds whole rows in registers: the forward reads x once and writes y and
one fp32 rstd a row; the backward reads dy and x, writes dx, and keeps its sum for the weight in registers, one fp32 row a program, summed by
one small deterministic reduction. Wider rows are walked in blocks: the forward reads x twice (the second time mostly from L2), the backward
first reduces each row to one number, then takes columns by blocks, so that registers never spill. Zhang and Sennrich 2019.
"""

import torch
import triton
import triton.language as tl

MAX_TILE = 8192  # columns a program holds at most: 16 elements a thread at 16 warps; at twice that the backward spills registers
_TILE = 4096  # elements of a tile where rows are narrow: several rows share a program
_BLOCK = 2048  # columns of a block where rows are wide
INTERPRETED = (
    triton.knobs.runtime.interpret
)  # read when @jit runs, as Triton does: the kernels below run on the CPU, slowly


@triton.jit
def _forward(x, weight, y, rstd, rows, columns, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # int64 first: row * columns wraps at 2^31 elements otherwise.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row[:, None] * columns + column[None, :]
    v = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(v * v, axis=1) / columns + eps)
    tl.store(rstd + row, r, mask=row < rows)
    x_hat = (v * r[:, None]).to(x.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(y + offset, x_hat * w[None, :], mask=mask)


@triton.jit
def _forward_wide(x, weight, y, rstd, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        total += v * v
    r = 1.0 / tl.sqrt(tl.sum(total, axis=0) / columns + eps)
    tl.store(rstd + row, r)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        v = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        x_hat = (v * r).to(x.dtype.element_ty).to(tl.float32)
        tl.store(y + row * columns + column, x_hat * w, mask=mask)


@triton.jit
def _backward(
    dy, x, weight, rstd, dx, partial, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program p takes tiles p, p + P, p + 2P, ...: the same rows for the same P, so the sums are the same every time."""
    program = tl.program_id(0).to(tl.int64)  # and with it every tile and row below
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        offset = row[:, None] * columns + column[None, :]
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        x_hat = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) * r
        g = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)
        dw += g * x_hat
        g *= w[None, :]
        mean = tl.sum(g * x_hat, axis=1)[:, None] / columns
        tl.store(dx + offset, r * (g - x_hat * mean), mask=mask)
    tl.store(partial + program * columns + column, tl.sum(dw, axis=0), mask=column < columns)


@triton.jit
def _row_means(dy, x, weight, rstd, mean, columns, BLOCK: tl.constexpr):
    """mean[row] = mean(dy * weight * x_hat)."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        v = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        total += v * g * w
    tl.store(mean + row, tl.sum(total, axis=0) * tl.load(rstd + row) / columns)


@triton.jit
def _backward_wide(dy, x, weight, rstd, mean, dx, partial, rows, columns, BLOCK: tl.constexpr):
    """Program (b, p) takes block b of the columns of rows p, p + P, p + 2P, ..."""
    program = tl.program_id(1).to(tl.int64)  # and with it every row below
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(1)):
        r = tl.load(rstd + row)
        x_hat = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32) * r
        g = tl.load(dy + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        dw += g * x_hat
        tl.store(dx + row * columns + column, r * (g * w - x_hat * tl.load(mean + row)), mask=mask)
    tl.store(partial + program * columns + column, dw, mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dim of x [..., H], weight [H] of the same dtype: fp32, bf16 or fp16; fp32 arithmetic.

    Runs on the current device, which must be x's.
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x, weight = x.contiguous(), weight.contiguous()
        y, rstd = (
            torch.empty_like(x),
            torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
        )
        if x.numel():
            _launch_forward(x, weight, y, rstd, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        if not x.numel():
            return dx, torch.zeros_like(weight), None
        return dx, _launch_backward(dy, x, weight, rstd, dx).to(weight.dtype), None


def _launch_forward(x, weight, y, rstd, eps):
    rows, columns = rstd.numel(), x.shape[-1]
    if columns > MAX_TILE:
        _forward_wide[(rows,)](x, weight, y, rstd, columns, eps, BLOCK=_BLOCK, num_warps=8)
        return
    tile, block, warps = _tile(columns)
    _forward[(triton.cdiv(rows, tile),)](
        x, weight, y, rstd, rows, columns, eps, ROWS=tile, BLOCK=block, num_warps=warps
    )


def _launch_backward(dy, x, weight, rstd, dx) -> torch.Tensor:
    """Fills dx and returns dweight [H] in fp32."""
    rows, columns = rstd.numel(), x.shape[-1]
    if columns > MAX_TILE:
        mean = torch.empty_like(rstd)
        _row_means[(rows,)](dy, x, weight, rstd, mean, columns, BLOCK=_BLOCK, num_warps=8)
        blocks = triton.cdiv(columns, _BLOCK)
        programs = min(rows, triton.cdiv(_resident_programs(x.device), blocks))
        partial = torch.empty((programs, columns), dtype=torch.float32, device=x.device)
        _backward_wide[(blocks, programs)](
            dy, x, weight, rstd, mean, dx, partial, rows, columns, BLOCK=_BLOCK, num_warps=8
        )
    else:
        tile, block, warps = _tile(columns)
        programs = min(triton.cdiv(rows, tile), _resident_programs(x.device))
        partial = torch.empty((programs, columns), dtype=torch.float32, device=x.device)
        _backward[(programs,)](
            dy, x, weight, rstd, dx, partial, rows, columns, ROWS=tile, BLOCK=block, num_warps=warps
        )
    return partial.sum(0)


def _tile(columns: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and the warps that hold it: 16 elements a thread."""
    block = triton.next_power_of_2(columns)
    rows = max(1, min(64, _TILE // block))
    return rows, block, max(1, min(16, rows * block // 512))


def _resident_programs(device: torch.device) -> int:
    """As many programs as run at once: two a multiprocessor, so that one loads while the other computes."""
    return (
        2 * torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 4
    )
