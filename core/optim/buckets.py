"""Flat memory for parameters: working weights, fp32 masters and fp32 gradients side by side, each parameter a view."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..layout import Piece

_ALIGNMENT = 64  # elements: a slot starts on a cache line in every dtype


class Bucket:
    """Parameters that are reduced and updated together, under one weight decay.

    weights: flat, in the working dtype; every parameter's data is a view of it. masters: flat fp32, the same memory when the
    working dtype is fp32. gradients: flat fp32; each backward pass adds to it. Between the slots lies alignment, always zero.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype, device: torch.device, *, decayed: bool):
        self.parameters, self.decayed = tuple(parameters), decayed
        self.slots: list[tuple[nn.Parameter, int, int]] = []
        end = 0
        for parameter in self.parameters:
            self.slots.append((parameter, end, end + parameter.numel()))
            end += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        self.masters = torch.zeros(end, dtype=torch.float32, device=device)
        for parameter, start, stop in self.slots:
            self.masters[start:stop] = parameter.detach().flatten()
        self.weights = self.masters if dtype == torch.float32 else self.masters.to(dtype)
        self.gradients = torch.zeros_like(self.masters)
        for parameter, start, stop in self.slots:
            parameter.data = self.weights[start:stop].view(parameter.shape)
            parameter.register_post_accumulate_grad_hook(_accumulate_into(self.gradients[start:stop].view(parameter.shape)))

    def pieces(self, flat: torch.Tensor, prefix: str = "") -> Iterator[Piece]:
        """The named pieces of a flat tensor of this bucket: masters under their plain names, moments under a prefix."""
        for parameter, start, stop in self.slots:
            yield from parameter.param_layout.pieces(flat[start:stop].view(parameter.shape), prefix)


def make_buckets(parameters: Iterable[nn.Parameter], dtype: torch.dtype, device: torch.device) -> list[Bucket]:
    """Matrices and embeddings, which are decayed, and biases and norms, which are not."""
    parameters = list(parameters)
    matrices = [p for p in parameters if len(p.shape) > 1]
    vectors = [p for p in parameters if len(p.shape) <= 1]
    return [Bucket(group, dtype, device, decayed=decayed) for group, decayed in ((matrices, True), (vectors, False)) if group]


def _accumulate_into(main: torch.Tensor):
    """A hook that moves a finished gradient into the fp32 buffer, so that micro-batches add up in fp32 whatever the working dtype."""

    def accumulate(parameter: nn.Parameter) -> None:
        main.add_(parameter.grad)
        parameter.grad = None

    return accumulate
