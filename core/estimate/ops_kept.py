"""Count what single operations keep for the backward pass: norms and activations.

Norms, of an input x of rows:

    a kernel of our own     x; one fp32 statistic a row (RMSNorm) or two (LayerNorm)
    PyTorch's LayerNorm     the same
    PyTorch's RMSNorm       an fp32 copy of x, what it normalized, one statistic a row

A norm that stores its weight as the distance from 1 (--apply-layernorm-1p) takes fp32 copies too.
"""

from dataclasses import dataclass

from ..config import ModelConfig
from .pass_spec import FP32, PassSpec


@dataclass(frozen=True)
class NormKept:
    """The bytes that a norm keeps of every number and of every row of its input.

    input: of a number of x.
    normalized: of a number of what PyTorch's RMSNorm has normalized; 0 for all other norms.
    statistics: of a row.
    copies: whether x is kept as a copy where x is a view of something else.
    """

    input: int
    normalized: int
    statistics: int
    copies: bool

    @staticmethod
    def of(model: ModelConfig, spec: PassSpec) -> "NormKept":
        """Read it off the model's kind of norm and the kernels that run."""
        rms = model.normalization == "RMSNorm"
        op = "rms_norm" if rms else "layer_norm"
        fused = op in spec.fused
        plain_rms = rms and not fused
        around_one = model.apply_layernorm_1p
        x = FP32 if plain_rms or around_one else spec.itemsize
        normalized = FP32 if around_one else spec.itemsize
        return NormKept(
            input=x,
            normalized=normalized if plain_rms else 0,
            statistics=FP32 if rms else 2 * FP32,
            copies=fused or x != spec.itemsize,
        )

    def bytes(self, rows: int, width: int, *, of_view: bool = False) -> int:
        """Return the bytes for an input of [rows, width].

        of_view: x is a view of something that is kept anyway, which costs nothing unless copied.
        """
        keeps_input = self.copies or not of_view
        a_number = self.normalized + (self.input if keeps_input else 0)
        return a_number * rows * width + self.statistics * rows


def activation_widths(model: ModelConfig, spec: PassSpec) -> int:
    """Return how many tensors [b, t, f] stay from the up projection to the down projection.

    Plain: what enters the activation and what comes out. Gated: gate, up and their product; PyTorch
    keeps the activated gate too, our kernel makes it again.
    """
    if not model.gated:
        return 2
    return 3 if "activation" in spec.fused else 4
