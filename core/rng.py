"""Draw every random number of a run as a function of its use, never of the rank that draws it.

Problem. A run must give the same numbers under any layout, and go on after a restart as if nothing
had happened. A generator with a state gives neither: what it draws depends on what was drawn
before, by this rank, since the start.

Idea. Draw by *counter*: a random word is a hash of (key, counter), where the key says what the
number is for and the counter where it lies. Nothing is stored, and any range can be drawn alone.

Example. The weight `layers.0.mlp.up.weight` [8, 4] at seed 1234, on rank 1 of 2 that cut its rows:

    key      a hash of "1234/layers.0.mlp.up.weight"
    counter  4 rows on: rows 4-7 of the matrix that belongs to the key

Rank 0 draws rows 0-3 of the same matrix, and one process all eight. A rank that holds columns 2-3
draws the rows whole and keeps those columns.

Dropout masks come the same way: the key from (seed, iteration, sample) and the site in the model,
the counter from the token's place in its sequence and its column. So a mask is the same under any
cut of tokens, on any device, and when recompute asks for it again.

Attention dropout is the exception: its kernels draw from torch's own generator. Its seed is made
from the run's seed and the place in the run, so that it can be repeated, but only under the same
layout.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .layout import Layout, Part, attach_layout

_ELEMENTS_PER_DRAW = 1 << 20  # drawn at a time: keeps the temporaries in cache
_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio: SplitMix64's increment


@dataclass(frozen=True)
class Init:
    """The initial values of a parameter.

    seed: of the run; None for memory only, to be loaded into.
    std: of a normal distribution around 0; None for the constant `fill`.
    """

    seed: int | None
    std: float | None = None
    fill: float = 0.0


def new_parameter(layout: Layout, init: Init) -> nn.Parameter:
    """Return an fp32 parameter on the CPU, with its layout attached (layout.layout_of).

    Each element depends on (seed, part name, global row, column) alone, so any cut of a part gives
    the same values. Padding is zero.
    """
    tensor = torch.zeros(layout.shape)
    if init.seed is not None:
        for part in layout.parts:
            view = part.within(tensor)
            if init.std is None:
                view.fill_(init.fill)
            else:
                _fill_normal(view, part, init.seed, init.std)
    parameter = nn.Parameter(tensor)
    attach_layout(parameter, layout)
    return parameter


def _fill_normal(view: torch.Tensor, part: Part, seed: int, std: float) -> None:
    """Fill the box of a part [rows, columns] with its slice of the part's random matrix."""
    (first, last), (left, right) = part.box
    columns = part.shape[1]
    step = max(1, _ELEMENTS_PER_DRAW // columns)
    for start in range(first, last, step):
        stop = min(start + step, last)
        rows = normal_rows(seed, part.name, start, stop, columns)
        scaled = rows[:, left:right] * np.float32(std)
        view[start - first : stop - first] = torch.from_numpy(scaled)


def normal_rows(seed: int, name: str, start: int, stop: int, columns: int) -> np.ndarray:
    """Return rows [start, stop) of the endless standard-normal matrix of (seed, name).

    Philox 4x64 (Salmon et al. 2011) keyed by a hash of (seed, name), its counter given by the row,
    turned normal by Box and Muller (1958): a fixed number of words per row, so that any row can be
    drawn alone.

    Returns float32 [stop - start, columns].
    """
    key = _hash(f"{seed}/{name}", 16)
    blocks = -(-columns // 8)  # a counter value gives 4 words of 64 bits, each of them two normals
    generator = np.random.Philox(key=key, counter=start * blocks)
    words = generator.random_raw((stop - start) * blocks * 4)
    halves = words.view(np.uint32).reshape(-1, 2)
    # Two uniform numbers of 24 bits each, u in (0, 1] and v in [0, 1):
    #   radius = sqrt(-2 ln u), angle = 2 pi v, normals = radius cos(angle), radius sin(angle).
    u_steps = (halves[:, 0] >> 8) + 1
    v_steps = halves[:, 1] >> 8
    u = u_steps.astype(np.float32) * np.float32(2**-24)
    radius = np.sqrt(np.float32(-2) * np.log(u))
    angle = v_steps.astype(np.float32) * np.float32(2**-24 * 2 * np.pi)
    x = radius * np.cos(angle)
    y = radius * np.sin(angle)
    normals = np.stack((x, y), axis=1)
    rows = normals.reshape(stop - start, blocks * 8)
    return rows[:, :columns]


@dataclass(frozen=True)
class DropoutStream:
    """The source of the hidden-dropout masks of one micro-batch.

    keys: int32 [2, B, 1], two words for each sample, made from (seed, iteration, global sample).
    positions: int32 [T], the place in the whole sequence of each token of this rank.
    """

    keys: torch.Tensor
    positions: torch.Tensor

    @staticmethod
    def of(
        seed: int, iteration: int, samples: torch.Tensor, positions: torch.Tensor
    ) -> "DropoutStream":
        """Return the stream of a micro-batch.

        samples: int64 [B] on the host, the global positions of its samples.
        positions: int [T] on the device.
        """
        start = splitmix64(seed * _GOLDEN + iteration)
        words = [splitmix64(start ^ int(sample)) for sample in samples]
        low = [_signed(word & _MASK32) for word in words]
        high = [_signed(word >> 32) for word in words]
        keys = torch.tensor([low, high], dtype=torch.int32).unsqueeze(-1)
        keys = keys.to(positions.device, non_blocking=True)
        return DropoutStream(keys, positions.to(torch.int32))

    def keep(self, shape: torch.Size, p: float, site: str) -> torch.Tensor:
        """Return the mask of the elements that stay, each with probability 1 - p.

        shape: [B, T, H].
        site: where in the model, such as `layers.3.attention`.

        A counter hash (two rounds of Wellons' lowbias32) of the element's place in its whole
        sample: no state, the same on every device, under recompute, and for any cut of the tokens.

        Returns bool [B, T, H].
        """
        low, high = self.keys
        mix = splitmix64(_hash(site, 8))
        width = shape[-1]
        columns = torch.arange(width, dtype=torch.int32, device=low.device)
        places = (self.positions.unsqueeze(1) * width + columns).flatten()
        first = _hash32_(low ^ _signed(mix & _MASK32))
        second = high ^ _signed(mix >> 32)
        x = _hash32_(places ^ first)
        x = _hash32_(x ^ second)
        # The hash is uniform from -2^31 to 2^31 - 1: a share p of it lies below the threshold.
        threshold = min(2**31 - 1, int(-(2**31) + p * 2**32))
        return (x >= threshold).view(shape)


@torch.compiler.disable
def dropout(x: torch.Tensor, p: float, stream: DropoutStream | None, site: str) -> torch.Tensor:
    """Return inverted dropout of x [B, T, H], by a mask that no layout changes.

    stream: None in evaluation, which drops nothing.
    """
    if stream is None or p == 0.0:
        return x
    kept = stream.keep(x.shape, p, site)
    scaled = x * (1.0 / (1.0 - p))
    # Selected, never multiplied by zero: 0 x inf is NaN.
    return torch.where(kept, scaled, 0.0)


def attention_dropout_seed(
    seed: int, iteration: int, micro_batch: int, chunk: int, rank: int
) -> int:
    """Return a seed of 32 bits for torch's own generator, which attention dropout draws from.

    It can be repeated, but depends on the layout.
    """
    update = splitmix64(splitmix64(seed) ^ (iteration << 32 | micro_batch))
    return splitmix64(update ^ (chunk << 32 | rank)) & _MASK32


def splitmix64(x: int) -> int:
    """Return one step of SplitMix64 (Steele et al. 2014).

    It is a bijection of 64-bit integers that mixes well.
    """
    x = (x + _GOLDEN) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _hash(text: str, num_bytes: int) -> int:
    """Return a hash of a text as a whole number of so many bytes."""
    digest = hashlib.blake2b(text.encode(), digest_size=num_bytes).digest()
    return int.from_bytes(digest, "little")


def _signed(word: int) -> int:
    """Return the int32 that has the bits of a 32-bit word."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _hash32_(x: torch.Tensor) -> torch.Tensor:
    """Apply lowbias32 to int32 in place."""
    # torch shifts are arithmetic: the masks make them logical.
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x
