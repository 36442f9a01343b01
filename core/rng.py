"""Every random number of a run, as a function of what it is for and never of the rank that draws it: initial weights and dropout masks."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .layout import Layout, Part, attach_layout

_ROWS_PER_DRAW = 1 << 20  # elements drawn at a time: keeps the temporaries in cache
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Init:
    """How a parameter starts: normal with `std` around 0, or the constant `fill` where std is None. `seed` None: memory only, to be loaded into."""

    seed: int | None
    std: float | None = None
    fill: float = 0.0


def new_parameter(layout: Layout, init: Init) -> nn.Parameter:
    """An fp32 parameter on the CPU, with its layout attached (see layout.layout_of); padding is zero.

    Each element depends on (seed, part name, global row, column) alone, so any cut of a part gives the same values.
    """
    tensor = torch.zeros(layout.shape)
    if init.seed is not None:
        for part in layout.parts:
            view = part.within(tensor)
            if init.std is None:
                view.fill_(init.fill)
            else:
                _fill_normal(view, part, init)
    parameter = nn.Parameter(tensor)
    attach_layout(parameter, layout)
    return parameter


def _fill_normal(view: torch.Tensor, part: Part, init: Init) -> None:
    (first, last), (left, right) = part.box
    columns = part.shape[1]
    step = max(1, _ROWS_PER_DRAW // columns)
    for start in range(first, last, step):
        stop = min(start + step, last)
        rows = normal_rows(init.seed, part.name, start, stop, columns)[:, left:right]
        view[start - first : stop - first] = torch.from_numpy(rows * np.float32(init.std))


def normal_rows(seed: int, name: str, start: int, stop: int, columns: int) -> np.ndarray:
    """Rows [start, stop) of the endless standard-normal matrix that belongs to (seed, name): float32 [stop - start, columns].

    Philox 4x64 (Salmon et al. 2011) keyed by a hash of (seed, name), its counter given by the row, turned normal by Box and
    Muller (1958): a fixed number of words per row, so that any row can be drawn alone.
    """
    key = int.from_bytes(
        hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little"
    )
    blocks = -(-columns // 8)  # a counter value gives 4 words of 64 bits, each of them two normals
    words = np.random.Philox(key=key, counter=start * blocks).random_raw(
        (stop - start) * blocks * 4
    )
    halves = words.view(np.uint32).reshape(-1, 2)
    radius = np.sqrt(
        np.float32(-2) * np.log(((halves[:, 0] >> 8) + 1).astype(np.float32) * np.float32(2**-24))
    )
    angle = (halves[:, 1] >> 8).astype(np.float32) * np.float32(2**-24 * 2 * np.pi)
    normals = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)
    return normals.reshape(stop - start, blocks * 8)[:, :columns]


@dataclass(frozen=True)
class DropoutStream:
    """The key of one micro-batch's hidden-dropout masks, int32 [2, B, 1], made from (seed, iteration, global sample), and which tokens lie here."""

    keys: torch.Tensor
    positions: torch.Tensor  # int32 [T]: the place in the whole sequence of each token of this rank

    @staticmethod
    def of(
        seed: int, iteration: int, samples: torch.Tensor, positions: torch.Tensor
    ) -> "DropoutStream":
        """samples: int64 [B] on the host, the global positions of the micro-batch's samples. positions: int [T] on the device."""
        words = [
            splitmix64(splitmix64(seed * 0x9E3779B97F4A7C15 + iteration) ^ int(sample))
            for sample in samples
        ]
        halves = torch.tensor(
            [
                [_signed(word & 0xFFFFFFFF) for word in words],
                [_signed(word >> 32) for word in words],
            ],
            dtype=torch.int32,
        )
        return DropoutStream(
            halves.unsqueeze(-1).to(positions.device, non_blocking=True), positions.to(torch.int32)
        )

    def keep(self, shape: torch.Size, p: float, site: str) -> torch.Tensor:
        """The mask bool [B, T, H] of the elements that stay at `site` (such as `layers.3.attention`), each with probability 1 - p.

        A counter hash (two rounds of Wellons' lowbias32) of the element's place in its whole sample: no state, the same on every
        device, under recompute, and for any cut of the tokens.
        """
        low, high = self.keys
        mix = splitmix64(
            int.from_bytes(hashlib.blake2b(site.encode(), digest_size=8).digest(), "little")
        )
        width = shape[-1]
        places = (
            self.positions.unsqueeze(1) * width
            + torch.arange(width, dtype=torch.int32, device=low.device)
        ).flatten()
        x = places ^ _hash32_(low ^ _signed(mix & 0xFFFFFFFF))
        x = _hash32_(_hash32_(x) ^ (high ^ _signed(mix >> 32)))
        threshold = min(2**31 - 1, int(-(2**31) + p * 2**32))
        return (x >= threshold).view(shape)


@torch.compiler.disable
def dropout(x: torch.Tensor, p: float, stream: DropoutStream | None, site: str) -> torch.Tensor:
    """Inverted dropout of x [B, T, H] with the layout-independent mask of `stream`; the identity where there is no stream (evaluation) or p is 0."""
    if stream is None or p == 0.0:
        return x
    return torch.where(stream.keep(x.shape, p, site), x * (1.0 / (1.0 - p)), 0.0)


def attention_dropout_seed(
    seed: int, iteration: int, micro_batch: int, chunk: int, rank: int
) -> int:
    """A 32-bit seed for torch's own generator, which attention dropout draws from: reproducible, but dependent on the layout."""
    return (
        splitmix64(
            splitmix64(splitmix64(seed) ^ (iteration << 32 | micro_batch)) ^ (chunk << 32 | rank)
        )
        & 0xFFFFFFFF
    )


def splitmix64(x: int) -> int:
    """One step of SplitMix64 (Steele et al. 2014): a bijection of 64-bit integers that mixes well."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _hash32_(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 on int32 in place; torch shifts are arithmetic, hence the masks that make them logical."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x
