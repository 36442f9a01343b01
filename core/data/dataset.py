"""Samples by number: one dataset's split, a blend of several, or made-up ones; and `build_datasets`, which makes the run's three splits."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .. import logs
from . import order
from .cache import IndexCache
from .errors import DataError, DataFlagError
from .indexed import IndexedDataset, bin_path

MOCK_SAMPLES = 1024  # of a mock split whose size is not given
MOCK_ALPHABET = (
    256  # ids a mock sample walks through, so that a small model learns them within minutes
)


class Samples(Protocol):
    """What every dataset offers. `fingerprint` (hex): equal if and only if the same samples come in the same order."""

    seq_length: int
    fingerprint: str

    def __len__(self) -> int: ...

    def tokens(self, k: int) -> np.ndarray:
        """The T + 1 ids of sample k, int64: inputs are the first T, labels the last T."""

    def locate(self, k: int, position: int) -> str:
        """Where the id at `position` of sample k comes from, for an error message."""


class GPTDataset:
    """Samples of `seq_length` tokens and one from the sequences [start, stop) of one dataset, in Megatron's order.

    num_samples: how many must be there, which decides the number of epochs; None for one epoch. It can hold more.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        bounds: tuple[int, int],
        seq_length: int,
        seed: int,
        num_samples: int | None,
        cache: IndexCache,
    ):
        self._made_of = (indexed, bounds, seq_length, seed, num_samples, cache)
        self.indexed, self.seq_length = indexed, seq_length
        start, stop = bounds
        epochs = order.plan_epochs(indexed.num_tokens(start, stop), seq_length, num_samples)
        facts = {
            "content": indexed.identity,
            "sequences": bounds,
            "epochs": [epochs.count, epochs.separate_final],
            "seq_length": seq_length,
            "seed": seed,
        }
        self.fingerprint = order.fingerprint(facts)
        arrays = cache.arrays(
            indexed.prefix,
            order.fingerprint(facts | {"modified": indexed.modified()}),
            order.index_shapes(stop - start, epochs),
            lambda: order.build_indices(
                indexed.sequence_lengths[start:stop], start, epochs, seq_length, seed
            ),
        )
        # Plain arrays over the same mapping: an item of a memmap costs several times as much.
        self._document, self._sample, self._shuffle = (
            np.asarray(arrays[name]) for name in ("document", "sample", "shuffle")
        )

    def __reduce__(self):
        return GPTDataset, self._made_of

    def __len__(self) -> int:
        return len(self._shuffle)

    def tokens(self, k: int) -> np.ndarray:
        """[T + 1] int64."""
        (first, begin), (last, end) = self._corners(k)
        out = np.empty(self.seq_length + 1, np.int64)
        filled = 0
        for position in range(first, last + 1):
            part = self.indexed.get(
                self._document[position], begin, end + 1 - begin if position == last else None
            )
            out[filled : filled + len(part)] = part
            filled, begin = filled + len(part), 0
        return out

    def locate(self, k: int, position: int) -> str:
        """File, document and offset in tokens of the id at `position` of sample k."""
        (place, offset), _ = self._corners(k)
        offset += position
        while offset >= (length := int(self.indexed.sequence_lengths[self._document[place]])):
            offset -= length
            place += 1
        document, before = self.indexed.document_of(int(self._document[place]))
        return f"{bin_path(self.indexed.prefix)}, document {document}, offset {before + offset}"

    def _corners(self, k: int) -> list[list[int]]:
        j = int(self._shuffle[k])
        return self._sample[j : j + 2].tolist()


class BlendedDataset:
    """Samples drawn in turn from several datasets in proportion to their weights.

    weights None: in proportion to their numbers of samples, each used up. size None: all of them.
    Raises DataError if the blend needs more samples of a dataset than there are.
    """

    def __init__(
        self,
        datasets: list[GPTDataset],
        weights: list[float] | None,
        size: int | None,
        cache: IndexCache,
    ):
        self._made_of = (datasets, weights, size, cache)
        self.datasets, self.seq_length = datasets, datasets[0].seq_length
        lengths = [len(dataset) for dataset in datasets]
        exhaustive = size is None
        size = sum(lengths) if size is None else size
        facts = {
            "datasets": [dataset.fingerprint for dataset in datasets],
            "weights": weights or lengths,
            "exhaustive": exhaustive,
        }
        self.fingerprint = order.fingerprint(facts)

        def build() -> dict[str, np.ndarray]:
            index = (
                order.exhaustive_blend_index(lengths)
                if exhaustive
                else order.blend_index(weights or lengths, size)
            )
            return dict(zip(("dataset", "sample"), index, strict=True))

        prefix = datasets[0].indexed.prefix
        arrays = cache.arrays(
            prefix,
            order.fingerprint(facts | {"size": size}),
            {"dataset": (size,), "sample": (size,)},
            build,
        )
        self._dataset, self._sample = np.asarray(arrays["dataset"]), np.asarray(arrays["sample"])
        self._check(lengths)

    def __reduce__(self):
        return BlendedDataset, self._made_of

    def __len__(self) -> int:
        return len(self._dataset)

    def tokens(self, k: int) -> np.ndarray:
        """[T + 1] int64."""
        return self.datasets[self._dataset[k]].tokens(int(self._sample[k]))

    def locate(self, k: int, position: int) -> str:
        return self.datasets[self._dataset[k]].locate(int(self._sample[k]), position)

    def _check(self, lengths: list[int]) -> None:
        needed = np.bincount(self._dataset, minlength=len(lengths))
        for dataset, need, there in zip(self.datasets, needed, lengths, strict=True):
            if need > there:
                raise DataFlagError(
                    f"--data-path: a blend of {len(self)} samples draws {need} from {dataset.indexed.prefix}, which is built for {there}; "
                    "ask for more samples, make its weight larger, or join small datasets with tools/merge_datasets.py"
                )


class MockDataset:
    """Made-up samples: walks of a constant step over a small alphabet, with one id in sixteen replaced. A function of (seed, k) alone."""

    def __init__(self, vocab_size: int, seq_length: int, seed: int, num_samples: int):
        if vocab_size < 2:
            raise DataFlagError(
                f"--mock-data needs a vocabulary of 2 or more; --vocab-size gives {vocab_size}"
            )
        self.vocab_size, self.seq_length, self.seed, self.num_samples = (
            vocab_size,
            seq_length,
            seed,
            num_samples,
        )
        self.fingerprint = order.fingerprint({"mock": [vocab_size, seq_length, seed]})

    def __len__(self) -> int:
        return self.num_samples

    def tokens(self, k: int) -> np.ndarray:
        """[T + 1] int64."""
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, k])))
        alphabet, length = min(self.vocab_size, MOCK_ALPHABET), self.seq_length + 1
        start, step = random.randint(alphabet), random.randint(1, 5)
        walk = (start + step * np.arange(length, dtype=np.int64)) % alphabet
        noise = random.randint(alphabet, size=length)
        return np.where(random.randint(16, size=length) == 0, noise, walk)

    def locate(self, k: int, position: int) -> str:
        return f"mock data, sample {k}, offset {position}"


@dataclass(frozen=True)
class Datasets:
    """The three splits, None where there is none. `fingerprint` is that of the training order, which a resume continues; empty without one."""

    train: Samples | None
    valid: Samples | None
    test: Samples | None

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint if self.train is not None else ""


def build_datasets(
    data_path: list[str] | tuple[str, ...] | None,
    split: str,
    seq_length: int,
    seed: int,
    num_samples: tuple[int | None, int | None, int | None],
    *,
    train_data_path: list[str] | tuple[str, ...] | None = None,
    valid_data_path: list[str] | tuple[str, ...] | None = None,
    test_data_path: list[str] | tuple[str, ...] | None = None,
    cache_path: str | None = None,
    mock: bool = False,
    vocab_size: int | None = None,
    may_run_dry: bool = False,
) -> Datasets:
    """The training, validation and test samples of a run. num_samples: of each split; 0 for none of it, None for one epoch.

    A share of zero in `split` gives None, and so does one that a single dataset is too small for, with a notice (training excepted).
    An unweighted blend that holds fewer training samples than asked is an error, unless `may_run_dry`; validation and test use what there is.
    Raises DataError on everything that would end or distort the run later.
    """
    if mock:
        sizes = [MOCK_SAMPLES if n is None else n for n in num_samples]
        # Any three seeds that differ; a sample's own seed is the pair (this, k).
        return Datasets(
            *(
                MockDataset(vocab_size, seq_length, 3 * seed + i, n) if n else None
                for i, n in enumerate(sizes)
            )
        )
    builder = _Builder(seq_length, seed, IndexCache(cache_path), may_run_dry)
    if not order.NATIVE:
        logs.get_logger().info(" no native module: the indices are built by numpy")
    if train_data_path or valid_data_path or test_data_path:
        paths = (train_data_path, valid_data_path, test_data_path)
        return Datasets(
            *(
                builder.whole(i, path, n) if path and n != 0 else None
                for i, (path, n) in enumerate(zip(paths, num_samples, strict=True))
            )
        )
    prefixes, weights = order.parse_data_path(data_path or ())
    sources = open_all(prefixes)
    bounds = [order.split_bounds(split, source.num_sequences) for source in sources]
    return Datasets(
        *(
            builder.split(i, sources, [of_source[i] for of_source in bounds], weights, n)
            if n != 0
            else None
            for i, n in enumerate(num_samples)
        )
    )


def open_all(prefixes: list[str]) -> list[IndexedDataset]:
    """Open and check datasets, several at a time: the wait for a disk is most of the work. Raises DataError above the 32,766 of a blend."""
    if len(prefixes) >= order.MAX_DATASETS:
        raise DataFlagError(
            f"--data-path names {len(prefixes)} datasets, a blend holds at most {order.MAX_DATASETS - 1}; use tools/merge_datasets.py"
        )
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(IndexedDataset, prefixes))


@dataclass(frozen=True)
class _Builder:
    """Makes one split; `kind` counts order.SPLITS."""

    seq_length: int
    seed: int
    cache: IndexCache
    may_run_dry: bool

    def whole(
        self, kind: int, data_path: list[str] | tuple[str, ...], num_samples: int | None
    ) -> Samples:
        """A split with a data path of its own; the weight of a single dataset means nothing."""
        prefixes, weights = order.parse_data_path(data_path)
        sources = open_all(prefixes)
        return self.split(
            kind,
            sources,
            [(0, source.num_sequences) for source in sources],
            weights if len(prefixes) > 1 else None,
            num_samples,
        )

    def split(
        self,
        kind: int,
        sources: list[IndexedDataset],
        bounds: list[tuple[int, int] | None],
        weights: list[float] | None,
        num_samples: int | None,
    ) -> Samples | None:
        name = order.SPLITS[kind]
        if bounds[0] is None:  # a share of zero, so of every dataset
            if kind == 0:
                raise DataFlagError(
                    "--split gives training no share; the first of its numbers must be above 0"
                )
            return None
        if len(sources) == 1 and weights is None:
            if kind > 0 and bounds[0][0] == bounds[0][1]:
                logs.get_logger().warning(
                    f"{sources[0].prefix}: {_too_small(name, sources[0], bounds[0])}; there is none"
                )
                return None
            return self._one(name, sources[0], bounds[0], num_samples)
        if weights is None:
            return self._unweighted(name, sources, bounds, num_samples)
        if num_samples is None:
            raise DataFlagError(
                f"--data-path: a blend with weights has no end; say how many {name} samples, or leave the weights out"
            )
        drawn, built = order.blend_sizes(weights, num_samples)
        datasets = [
            self._one(name, source, of_source, n)
            for source, of_source, n in zip(sources, bounds, built, strict=True)
        ]
        return BlendedDataset(datasets, order.normalized(weights), sum(drawn), self.cache)

    def _unweighted(
        self,
        name: str,
        sources: list[IndexedDataset],
        bounds: list[tuple[int, int]],
        num_samples: int | None,
    ) -> Samples:
        datasets = [
            self._one(name, source, of_source, None)
            for source, of_source in zip(sources, bounds, strict=True)
        ]
        total = sum(map(len, datasets))
        if num_samples is None:
            return BlendedDataset(datasets, None, None, self.cache)
        if num_samples > total:
            dry = f"{num_samples} {name} samples are asked of {len(sources)} datasets without weights, which hold {total} in their one epoch"
            if name == "train" and not self.may_run_dry:
                raise DataFlagError(
                    f"--data-path: {dry}; give weights to repeat them, or train for at most {total} samples"
                )
            logs.get_logger().warning(f"{dry}; those {total} are all there are")
        return BlendedDataset(datasets, None, min(num_samples, total), self.cache)

    def _one(
        self, name: str, source: IndexedDataset, bounds: tuple[int, int], num_samples: int | None
    ) -> GPTDataset:
        tokens = source.num_tokens(*bounds)
        remedy = "add documents, or give the split a larger share in --split" + (
            "" if name == "train" else " or none (--split 100,0,0)"
        )
        if bounds[0] == bounds[1]:
            raise DataError(f"{source.prefix}: {_too_small(name, source, bounds)}; {remedy}")
        if tokens == 0:
            raise DataError(
                f"{source.prefix}: the {bounds[1] - bounds[0]} sequences of its {name} split hold no token; {remedy}"
            )
        if num_samples is None and tokens < self.seq_length + 1:
            raise DataError(
                f"{source.prefix}: its {name} split holds {tokens} tokens, one sample needs {self.seq_length + 1}; {remedy}"
            )
        return GPTDataset(source, bounds, self.seq_length, self.seed, num_samples, self.cache)


def _too_small(name: str, source: IndexedDataset, bounds: tuple[int, int]) -> str:
    return f"{source.num_sequences} sequences are too few for its {name} split, [{bounds[0]}, {bounds[1]})"
