"""The order of samples, as Megatron defines it: split, epochs, three indices per dataset, and blends of datasets. Pure functions."""

import hashlib
import itertools
import json
import math
from dataclasses import dataclass

import numpy as np

from .errors import DataFlagError

try:
    from .. import _native
except ImportError:  # installed without a compiler
    _native = None

# A module left over from an older build may lack the index builder: as good as none.
NATIVE = hasattr(_native, "sample_index_int32")
SPLITS = ("train", "valid", "test")
MAX_DATASETS = np.iinfo(np.int16).max
SURPLUS = (
    0.005  # of samples built per dataset of a weighted blend, over those the blend means to draw
)


def parse_data_path(items: list[str] | tuple[str, ...]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of --data-path: weight, prefix pairs if every other item of an even number is a number, else prefixes alone.

    Raises DataFlagError on nothing at all, and on a weight that is not positive and finite.
    """
    if not items:
        raise DataFlagError("--data-path names no dataset")
    weights = [_number(item) for item in items[::2]] if len(items) % 2 == 0 else [None]
    if any(weight is None for weight in weights):
        return [item.strip() for item in items], None
    prefixes = [item.strip() for item in items[1::2]]
    for weight, prefix in zip(weights, prefixes, strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise DataFlagError(
                f"--data-path: weight {weight:g} of {prefix} must be above 0; leave the dataset out instead"
            )
    return prefixes, weights


def _number(item: str) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None


def split_bounds(split: str, num_sequences: int) -> list[tuple[int, int] | None]:
    """Sequences [start, stop) of training, validation and test; None for a share of zero. Shares are rounded as Python rounds: half to even.

    Raises DataFlagError if `split` is not up to three shares.
    """
    shares = [_number(share) for share in split.split(",")]
    if (
        len(shares) > 3
        or any(share is None or not 0 <= share < math.inf for share in shares)
        or sum(shares) == 0
    ):
        raise DataFlagError(f"--split {split!r} is not up to three shares such as 969,30,1")
    shares = normalized(shares + [0.0] * (3 - len(shares)))
    edges = [0.0]
    for share in shares:
        edges.append(edges[-1] + share)
    return [
        (round(low * float(num_sequences)), round(high * float(num_sequences)))
        if high > low
        else None
        for low, high in itertools.pairwise(edges)
    ]


def normalized(weights: list[float]) -> list[float]:
    """Weights over their sum, in float64."""
    array = np.array(weights, dtype=np.float64)
    return (array / np.sum(array)).tolist()


@dataclass(frozen=True)
class Epochs:
    """How often a split is gone through, and where its samples fall."""

    count: int  # E
    separate_final: bool  # the last epoch is shuffled by itself, because little of it is used
    samples_before_final: (
        int  # A, samples that end before the last epoch; all of them if it is not separate
    )
    num_samples: int  # n, everything the epochs hold


def plan_epochs(tokens: int, seq_length: int, num_samples: int | None) -> Epochs:
    """The fewest epochs of `tokens` that hold `num_samples` samples of `seq_length` tokens and one; one epoch if None.

    All in Python integers: nothing overflows. `tokens` must be above 0.
    """
    count = 1 if num_samples is None else max(1, -(-(num_samples * seq_length + 1) // tokens))
    total = (count * tokens - 1) // seq_length
    if count == 1:
        return Epochs(1, False, total, total)
    before_final = ((count - 1) * tokens - 1) // seq_length
    per_epoch = (tokens - 1) // seq_length
    separate = num_samples - before_final < int(0.80 * per_epoch)
    return Epochs(count, separate, before_final if separate else total, total)


def build_indices(
    lengths: np.ndarray, start: int, epochs: Epochs, seq_length: int, seed: int
) -> dict[str, np.ndarray]:
    """The three indices of one split; `lengths` are those of its sequences, the first of which is sequence `start`.

    document [E * S] int32: sequences in the order they are read. sample [n + 1, 2]: position in `document` and token offset at which
    samples begin. shuffle [n]: the place of sample k. The random draws come in the order document, shuffle; sample needs none.
    """
    random = np.random.RandomState(seed)
    document = _document_index(start, len(lengths), epochs, random)
    sample = sample_index(lengths, start, document, seq_length, epochs.num_samples)
    return {"document": document, "sample": sample, "shuffle": _shuffle_index(epochs, random)}


def index_shapes(num_sequences: int, epochs: Epochs) -> dict[str, tuple[int, ...]]:
    """The shapes that `build_indices` returns."""
    return {
        "document": (epochs.count * num_sequences,),
        "sample": (epochs.num_samples + 1, 2),
        "shuffle": (epochs.num_samples,),
    }


def _document_index(
    start: int, count: int, epochs: Epochs, random: np.random.RandomState
) -> np.ndarray:
    together = epochs.count - 1 if epochs.separate_final else epochs.count
    once = np.arange(start, start + count, dtype=np.int32)
    index = np.tile(once, together)
    random.shuffle(index)
    if not epochs.separate_final:
        return index
    random.shuffle(once)
    return np.concatenate([index, once])


def _shuffle_index(epochs: Epochs, random: np.random.RandomState) -> np.ndarray:
    dtype = np.uint32 if epochs.num_samples < np.iinfo(np.uint32).max - 1 else np.int64
    index = np.arange(epochs.num_samples, dtype=dtype)
    for part in (index[: epochs.samples_before_final], index[epochs.samples_before_final :]):
        random.shuffle(part)  # a view: in place
    return index


def sample_index(
    lengths: np.ndarray,
    first: int,
    document: np.ndarray,
    seq_length: int,
    num_samples: int,
    native: bool = NATIVE,
) -> np.ndarray:
    """[num_samples + 1, 2]: where token j * seq_length of the documents laid end to end lies; int32, or int64 where that is too small.

    lengths[d - first] is the length of document d. Both ways to build it give the same array.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int32)
    wide = len(document) > np.iinfo(np.int32).max
    if native:
        build = _native.sample_index_int64 if wide else _native.sample_index_int32
        return build(lengths, first, document, seq_length, num_samples)
    ends = np.cumsum(lengths[document - first], dtype=np.int64)
    tokens = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    position = np.searchsorted(ends, tokens, side="right")
    position[0] = 0  # the first sample begins at the first document, even if that is empty
    offset = tokens - np.concatenate([np.zeros(1, np.int64), ends])[position]
    return np.stack([position, offset], axis=1).astype(np.int64 if wide else np.int32)


def blend_sizes(weights: list[float], num_samples: int) -> tuple[list[int], list[int]]:
    """Samples a weighted blend means to draw from each dataset (their sum is its length), and those each dataset is built for."""
    drawn = [math.ceil(num_samples * weight) for weight in normalized(weights)]
    return drawn, [math.ceil(count * (1 + SURPLUS)) for count in drawn]


def blend_index(
    weights: list[float], size: int, native: bool = NATIVE
) -> tuple[np.ndarray, np.ndarray]:
    """For each of `size` samples the dataset it comes from, int16, and its number there, int64: always the dataset furthest behind its weight.

    The weights are normalized here even if they were before, as in Megatron: that can move a last bit, and with it a tie.
    """
    weights = normalized(weights)
    if native:
        return _native.blend_index(np.array(weights), size)
    return _furthest_behind(np.array(weights), [size] * len(weights), size)


def exhaustive_blend_index(
    sizes: list[int], native: bool = NATIVE
) -> tuple[np.ndarray, np.ndarray]:
    """`blend_index` that takes exactly sizes[k] samples from dataset k, in proportion to the sizes."""
    if native:
        return _native.exhaustive_blend_index(np.array(sizes, np.int64))
    return _furthest_behind(np.array(sizes, np.float64) / sum(sizes), sizes, sum(sizes))


def _furthest_behind(
    weights: np.ndarray, limits: list[int], size: int
) -> tuple[np.ndarray, np.ndarray]:
    dataset, sample = np.empty(size, np.int16), np.empty(size, np.int64)
    used = np.zeros(len(weights))
    closed = np.array(limits) == 0
    for s in range(size):
        lag = np.where(closed, -np.inf, weights * float(max(s, 1)) - used)
        k = int(np.argmax(lag))
        dataset[s], sample[s] = k, used[k]
        used[k] += 1
        closed[k] = used[k] == limits[k]
    return dataset, sample


def fingerprint(facts: dict) -> str:
    """SHA-256 (hex) of facts that JSON can hold, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
