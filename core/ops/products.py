"""Every matrix product of a model: forward, its two gradients, and those of the head in chunks.

A linear layer is y = x W^T. Training multiplies three times for it:

    y  = x W^T      product            [N, I] x [O, I] -> [N, O]
    dx = dy W       input_gradient     [N, O] x [O, I] -> [N, I]
    dW = dy^T x     weight_gradient    [N, O] x [N, I] -> [O, I], often straight into fp32 memory

All of them are here so that another way to multiply (another number format, another library) is a
change of this file alone. None of them records a gradient: autograd functions are made of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class ProductOps:
    """Matrix products, as this processor computes them fastest.

    fp32_matmul: multiply 16-bit numbers in fp32 and round at the end; x86 processors without
        instructions for 16-bit products are 10 to 100 times slower at these.
    few_rows: the largest number of rows that few_rows_product takes; 0 where there is no kernel.
    """

    fp32_matmul: bool
    few_rows: int

    @staticmethod
    def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
        """Compute x W^T for few rows: see reference.few_rows_product."""
        raise NotImplementedError

    def operand(self, x: Tensor) -> Tensor:
        """Return x as products take it: in fp32 where 16-bit numbers are multiplied so.

        The functions below do this themselves. Do it before them only to do it once for several.
        """
        return x.float() if self.fp32_matmul and x.dtype in _SIXTEEN_BITS else x

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute x W^T.

        x: [..., I].
        weight: [O, I] of x's dtype, which is also the result's.
        """
        if x.numel() <= self.few_rows * x.shape[-1]:
            return self.few_rows_product(x, weight)
        if self.fp32_matmul:
            return F.linear(self.operand(x), self.operand(weight)).to(x.dtype)
        return F.linear(x, weight)

    def input_gradient(self, dy: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute dx = dy W in `dtype`: [..., O] x [O, I] -> [..., I]."""
        return (self.operand(dy) @ self.operand(weight)).to(dtype)

    def weight_gradient(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute dW = dy^T x in `dtype`: [..., O] and [..., I] -> [O, I]."""
        rows = self.operand(dy).flatten(0, -2)
        return (rows.t() @ self.operand(x).flatten(0, -2)).to(dtype)

    def add_weight_gradient_(self, main: Tensor, dy: Tensor, x: Tensor) -> None:
        """Add dW = dy^T x to fp32 memory [O, I]; in fp32 the product itself accumulates."""
        dy = self.operand(dy).flatten(0, -2)
        x = self.operand(x).flatten(0, -2)
        if x.dtype == main.dtype:
            main.addmm_(dy.t(), x)
        else:
            main.add_(dy.t() @ x)

    def product_into(self, out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Write x W^T into `out` [N, O] and return it; x [N, I] and weight are operands already."""
        return torch.mm(x, weight.t(), out=out)

    def input_gradient_into(self, out: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        """Write dy W into `out` [N, I] and return it; dy [N, O] and weight are operands already."""
        return torch.mm(dy, weight, out=out)
