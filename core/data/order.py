"""Compute the order of samples, as Megatron defines it, by pure functions.

A split of a dataset is a range of its sequences. To make samples of T tokens, its sequences are
laid end to end, as often as there are epochs, and cut every T tokens. Three indices describe that:

    document   the sequences in the order in which they are laid: shuffled
    sample     for each sample, where in this row of sequences it begins
    shuffle    which of these samples is number k of the run

With sequences a (3 tokens), b (2) and c (4) and T = 4, document [c, a, b] gives

    c0 c1 c2 c3 | a0 a1 a2 b0 | b1        sample [(0, 0), (1, 0), (2, 1)]

two samples, each with the token that follows it as the last label. A blend has two indices more:
for each of its samples, which dataset it is from, and its number there.

Every random draw and every rounding here is Megatron's, in Megatron's order, so that a run moved
from there sees the same samples. That is why some lines look odd: do not tidy their arithmetic.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import DataFlagError

try:
    from .. import _native
except ImportError:  # installed without a compiler
    _native = None  # type: ignore[assignment]

# A module left over from an older build may lack the index builder: as good as none.
NATIVE = hasattr(_native, "sample_index_int32")
SPLITS = ("train", "valid", "test")
MAX_DATASETS = np.iinfo(np.int16).max
# Samples built per dataset of a weighted blend, over those that the blend means to draw.
SURPLUS = 0.005


def parse_data_path(items: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Return the prefixes of --data-path and their weights, None without weights.

    It is pairs of weight and prefix if every other item of an even number is a number, else
    prefixes alone. Raises DataFlagError on nothing at all, and on a weight that is not positive
    and finite.
    """
    if not items:
        raise DataFlagError("--data-path names no dataset")
    weights = []
    for item in items[::2]:
        weight = _number(item)
        if weight is not None:
            weights.append(weight)
    if 2 * len(weights) != len(items):
        return [item.strip() for item in items], None
    prefixes = [item.strip() for item in items[1::2]]
    for weight, prefix in zip(weights, prefixes, strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise DataFlagError(
                f"--data-path: weight {weight:g} of {prefix} must be above 0; "
                "leave the dataset out instead"
            )
    return prefixes, weights


def _number(item: str) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None


def split_bounds(split: str, num_sequences: int) -> list[tuple[int, int] | None]:
    """Return the sequences [start, stop) of training, validation and test.

    None for a share of zero. Bounds are rounded as Python rounds: half to even. Raises
    DataFlagError if `split` is not up to three shares.
    """
    numbers = [_number(share) for share in split.split(",")]
    shares = [share for share in numbers if share is not None and 0 <= share < math.inf]
    if len(numbers) > 3 or len(shares) < len(numbers) or sum(shares) == 0:
        raise DataFlagError(f"--split {split!r} is not up to three shares such as 969,30,1")
    missing = [0.0] * (3 - len(shares))
    edges = [0.0]
    for share in normalized(shares + missing):
        edges.append(edges[-1] + share)
    bounds: list[tuple[int, int] | None] = []
    for low, high in itertools.pairwise(edges):
        start = round(low * float(num_sequences))
        stop = round(high * float(num_sequences))
        bounds.append((start, stop) if high > low else None)
    return bounds


def normalized(weights: Sequence[float]) -> list[float]:
    """Return the weights over their sum, in float64."""
    array = np.array(weights, dtype=np.float64)
    return (array / np.sum(array)).tolist()


@dataclass(frozen=True)
class Epochs:
    """The passes over a split, and the number of samples in them.

    count: number of epochs.
    separate_final: the last epoch is shuffled by itself, because little of it is used.
    samples_before_final: samples that end before the last epoch; all if it is not separate.
    num_samples: samples of all epochs together.
    """

    count: int
    separate_final: bool
    samples_before_final: int
    num_samples: int


def plan_epochs(tokens: int, seq_length: int, num_samples: int | None) -> Epochs:
    """Return the fewest epochs of `tokens` that hold `num_samples`; one epoch if None.

    A sample is `seq_length` tokens and one. All in Python integers: nothing overflows. `tokens`
    must be above 0.
    """
    count = 1
    if num_samples is not None:
        # Neighbours share a token (last label of one, first input of the next): n samples need
        # n * T + 1 tokens, rounded up to whole epochs.
        needed = num_samples * seq_length + 1
        count = max(1, -(-needed // tokens))
    total = (count * tokens - 1) // seq_length
    if num_samples is None or count == 1:
        return Epochs(1, False, total, total)
    before_final = ((count - 1) * tokens - 1) // seq_length
    per_epoch = (tokens - 1) // seq_length
    in_final = num_samples - before_final
    # Shuffled together, a last epoch that is hardly used would make the run skip random samples of
    # the earlier epochs. Below 80% of an epoch it is kept apart, so that those are used up first.
    if in_final < int(0.80 * per_epoch):
        return Epochs(count, True, before_final, total)
    return Epochs(count, False, total, total)


def build_indices(
    lengths: np.ndarray, start: int, epochs: Epochs, seq_length: int, seed: int
) -> dict[str, np.ndarray]:
    """Build the three indices of one split of S sequences, E epochs and n samples.

    lengths: of its sequences, the first of which is sequence `start`.

    Returns document [E * S] int32: sequences in the order they are read; sample [n + 1, 2]:
    position in `document` and token offset at which samples begin; shuffle [n]: the place of
    sample k. The random draws come in the order document, shuffle; sample needs none.
    """
    random = np.random.RandomState(seed)
    document = _document_index(start, len(lengths), epochs, random)
    sample = sample_index(lengths, start, document, seq_length, epochs.num_samples)
    shuffle = _shuffle_index(epochs, random)
    return {"document": document, "sample": sample, "shuffle": shuffle}


def index_shapes(num_sequences: int, epochs: Epochs) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what `build_indices` returns."""
    return {
        "document": (epochs.count * num_sequences,),
        "sample": (epochs.num_samples + 1, 2),
        "shuffle": (epochs.num_samples,),
    }


def _document_index(
    start: int, count: int, epochs: Epochs, random: np.random.RandomState
) -> np.ndarray:
    """Return the sequences of all epochs in the order in which they are laid."""
    together = epochs.count - 1 if epochs.separate_final else epochs.count
    once = np.arange(start, start + count, dtype=np.int32)
    index = np.tile(once, together)
    random.shuffle(index)
    if not epochs.separate_final:
        return index
    random.shuffle(once)
    return np.concatenate([index, once])


def _shuffle_index(epochs: Epochs, random: np.random.RandomState) -> np.ndarray:
    """Return the place in the sample index of each sample of the run."""
    narrow = epochs.num_samples < np.iinfo(np.uint32).max - 1
    dtype = np.uint32 if narrow else np.int64
    index = np.arange(epochs.num_samples, dtype=dtype)
    # Views: each part of `index` is shuffled in place.
    before_final = index[: epochs.samples_before_final]
    final = index[epochs.samples_before_final :]
    random.shuffle(before_final)
    random.shuffle(final)
    return index


def sample_index(
    lengths: np.ndarray,
    first: int,
    document: np.ndarray,
    seq_length: int,
    num_samples: int,
    native: bool = NATIVE,
) -> np.ndarray:
    """Return where token j * seq_length of the documents laid end to end lies.

    [num_samples + 1, 2], int32, or int64 where that is too small. lengths[d - first] is the length
    of document d. The native builder and numpy give the same array.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int32)
    wide = len(document) > np.iinfo(np.int32).max
    if native:
        build = _native.sample_index_int64 if wide else _native.sample_index_int32
        return build(lengths, first, document, seq_length, num_samples)
    # Token j * T lies in the first document whose end is past it. side="right" also steps over
    # empty documents, which end where they begin.
    ends = np.cumsum(lengths[document - first], dtype=np.int64)
    tokens = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    position = np.searchsorted(ends, tokens, side="right")
    position[0] = 0  # the first sample begins at the first document, even if that is empty
    starts = np.concatenate([np.zeros(1, np.int64), ends])
    offset = tokens - starts[position]
    index = np.stack([position, offset], axis=1)
    return index.astype(np.int64 if wide else np.int32)


def blend_sizes(weights: list[float], num_samples: int) -> tuple[list[int], list[int]]:
    """Return two lists: the samples to draw from each dataset, and the samples to build of each.

    The sum of the first is the length of the blend. The second is a little larger, because the
    blend may take a few more of one dataset than its share.
    """
    drawn = [math.ceil(num_samples * weight) for weight in normalized(weights)]
    built = [math.ceil(count * (1 + SURPLUS)) for count in drawn]
    return drawn, built


def blend_index(
    weights: Sequence[float], size: int, native: bool = NATIVE
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each of `size` samples its dataset, int16, and its number there, int64.

    Each sample is drawn from the dataset that is furthest behind its weight. The weights are
    normalized here even if they were before, as in Megatron: that can move a last bit, and with it
    a tie.
    """
    weights = normalized(weights)
    if native:
        return _native.blend_index(np.array(weights), size)
    return _furthest_behind(np.array(weights), [size] * len(weights), size)


def exhaustive_blend_index(
    sizes: list[int], native: bool = NATIVE
) -> tuple[np.ndarray, np.ndarray]:
    """Return a `blend_index` that takes exactly sizes[k] samples from dataset k."""
    if native:
        return _native.exhaustive_blend_index(np.array(sizes, np.int64))
    total = sum(sizes)
    weights = np.array(sizes, np.float64) / total
    return _furthest_behind(weights, sizes, total)


def _furthest_behind(
    weights: np.ndarray, limits: list[int], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Build a blend index in numpy, dataset k giving at most limits[k] samples."""
    dataset = np.empty(size, np.int16)
    sample = np.empty(size, np.int64)
    used = np.zeros(len(weights))
    closed = np.array(limits) == 0
    for s in range(size):
        # How many samples a dataset is short of its share. The first sample is counted as if one
        # were drawn already, as in Megatron: with 0 all would be level.
        due = weights * float(max(s, 1))
        lag = np.where(closed, -np.inf, due - used)
        k = int(np.argmax(lag))
        dataset[s] = k
        sample[s] = used[k]
        used[k] += 1
        closed[k] = used[k] == limits[k]
    return dataset, sample


def fingerprint(facts: dict) -> str:
    """Return the SHA-256 (hex) of facts that JSON can hold, whatever their order."""
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
