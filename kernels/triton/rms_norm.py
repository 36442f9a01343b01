"""RMSNorm forward and backward (Zhang and Sennrich 2019).

Memory plan, for R rows of H elements. Up to MAX_TILE columns a program holds whole rows in
registers:

    forward    reads x once; writes y, and one fp32 rstd a row
    backward   reads dy and x once; writes dx. The sum for the weight stays in registers and is
               written once, one fp32 row a program; a small deterministic reduction adds them up

Wider rows are walked in blocks, so that registers never spill:

    forward    reads x twice, the second time mostly from L2
    backward   first reduces each row to one number, then takes columns by blocks
"""

import torch
import triton
import triton.language as tl

# Columns that a program holds at most: 16 elements a thread at 16 warps. At twice that the backward
# spills registers.
MAX_TILE = 8192
_TILE = 4096  # elements of a tile where rows are narrow: several rows share a program
_BLOCK = 2048  # columns of a block where rows are wide
# Whether the kernels below run on the CPU, slowly. Read here because Triton reads it at @jit.
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _load(pointers, mask):
    """Load as fp32, zero where the mask is false."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward(x, weight, y, rstd, rows, columns, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute y and rstd of a tile of ROWS whole rows."""
    # int64 first: row * columns wraps at 2^31 elements otherwise.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_rows = row < rows
    in_columns = column < columns
    mask = in_rows[:, None] & in_columns[None, :]
    offset = row[:, None] * columns + column[None, :]
    v = _load(x + offset, mask)
    mean_square = tl.sum(v * v, axis=1) / columns
    r = 1.0 / tl.sqrt(mean_square + eps)
    tl.store(rstd + row, r, mask=in_rows)
    x_hat = v * r[:, None]
    x_hat = x_hat.to(x.dtype.element_ty).to(tl.float32)  # rounded before the weight, as Llama does
    w = _load(weight + column, in_columns)
    tl.store(y + offset, x_hat * w[None, :], mask=mask)


@triton.jit
def _forward_wide(x, weight, y, rstd, columns, eps, BLOCK: tl.constexpr):
    """Compute y and rstd of one wide row: its sum of squares by blocks, then y by blocks."""
    row = tl.program_id(0).to(tl.int64)
    first = row * columns
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        v = _load(x + first + column, column < columns)
        total += v * v
    mean_square = tl.sum(total, axis=0) / columns
    r = 1.0 / tl.sqrt(mean_square + eps)
    tl.store(rstd + row, r)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        v = _load(x + first + column, mask)
        w = _load(weight + column, mask)
        x_hat = (v * r).to(x.dtype.element_ty)
        x_hat = x_hat.to(tl.float32)
        tl.store(y + first + column, x_hat * w, mask=mask)


@triton.jit
def _backward(
    dy, x, weight, rstd, dx, partial, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute dx, and in partial[p] the sum for the weight of all tiles of program p.

    Program p of P takes tiles p, p + P, p + 2P, ...: the same rows for the same P, so the sums are
    the same every time.  With g = dy * weight:  dx = rstd (g - x_hat mean(g x_hat)).
    """
    program = tl.program_id(0).to(tl.int64)  # and with it every tile and row below
    column = tl.arange(0, BLOCK)
    in_columns = column < columns
    w = _load(weight + column, in_columns)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    tiles = tl.cdiv(rows, ROWS)
    for tile in range(program, tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        in_rows = row < rows
        mask = in_rows[:, None] & in_columns[None, :]
        offset = row[:, None] * columns + column[None, :]
        r = tl.load(rstd + row, mask=in_rows, other=0.0)
        r = r[:, None]
        x_hat = _load(x + offset, mask) * r
        g = _load(dy + offset, mask)
        dw += g * x_hat
        g *= w[None, :]
        projection = tl.sum(g * x_hat, axis=1)
        mean = projection[:, None] / columns
        tl.store(dx + offset, r * (g - x_hat * mean), mask=mask)
    own = partial + program * columns
    tl.store(own + column, tl.sum(dw, axis=0), mask=in_columns)


@triton.jit
def _row_means(dy, x, weight, rstd, mean, columns, BLOCK: tl.constexpr):
    """Compute mean[row] = mean(dy * weight * x_hat) of wide rows."""
    row = tl.program_id(0).to(tl.int64)
    first = row * columns
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        v = _load(x + first + column, mask)
        g = _load(dy + first + column, mask)
        w = _load(weight + column, mask)
        total += v * g * w
    r = tl.load(rstd + row)
    tl.store(mean + row, tl.sum(total, axis=0) * r / columns)


@triton.jit
def _backward_wide(dy, x, weight, rstd, mean, dx, partial, rows, columns, BLOCK: tl.constexpr):
    """Compute what _backward does, for block b of the columns of rows p, p + P, p + 2P, ...

    Program (b, p) knows each row's mean from _row_means.
    """
    program = tl.program_id(1).to(tl.int64)  # and with it every row below
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    w = _load(weight + column, mask)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(1)):
        first = row * columns
        r = tl.load(rstd + row)
        x_hat = _load(x + first + column, mask) * r
        g = _load(dy + first + column, mask)
        dw += g * x_hat
        m = tl.load(mean + row)
        tl.store(dx + first + column, r * (g * w - x_hat * m), mask=mask)
    own = partial + program * columns
    tl.store(own + column, dw, mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize the last dim of x [..., H] and scale it by weight [H], in fp32 arithmetic.

    x and weight are of one dtype: fp32, bf16 or fp16. Runs on the current device, which must be
    x's.
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        weight = weight.contiguous()
        y = torch.empty_like(x)
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        if x.numel():
            _launch_forward(x, weight, y, rstd, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dx = torch.empty_like(x)
        if not x.numel():
            return dx, torch.zeros_like(weight), None
        dweight = _launch_backward(dy.contiguous(), x, weight, rstd, dx)
        return dx, dweight.to(weight.dtype), None


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
    """Fill dx and return dweight [H] in fp32."""
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
    """Return rows and columns of a tile, and the warps that hold it: 16 elements a thread."""
    block = triton.next_power_of_2(columns)
    rows = max(1, min(64, _TILE // block))
    return rows, block, max(1, min(16, rows * block // 512))


def _resident_programs(device: torch.device) -> int:
    """Return how many programs run at once: two a multiprocessor, one loads while one computes."""
    if device.type != "cuda":
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
