"""Build the three splits of a run: training, validation and test samples."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .. import logs
from . import order
from .cache import IndexCache
from .dataset import BlendedDataset, GPTDataset
from .errors import DataError, DataFlagError
from .indexed import IndexedDataset
from .source import MockDataset, Source

MOCK_SAMPLES = 1024  # of a mock split whose size is not given
NO_PATHS: tuple[Sequence[str], ...] = ((), (), ())


@dataclass(frozen=True)
class Datasets:
    """The three splits, None where there is none."""

    train: Source | None
    valid: Source | None
    test: Source | None

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the training order; empty without training samples."""
        return self.train.fingerprint if self.train is not None else ""


def build_datasets(
    data_path: Sequence[str] | None,
    split: str,
    seq_length: int,
    seed: int,
    num_samples: Sequence[int | None],
    *,
    own_paths: Sequence[Sequence[str]] = NO_PATHS,
    cache_path: str | None = None,
    mock: bool = False,
    vocab_size: int | None = None,
    may_run_dry: bool = False,
) -> Datasets:
    """Make the training, validation and test samples of a run.

    data_path: as in --data-path, for all three, cut by `split`.
    num_samples: of each split; 0 for none of it, None for one epoch.
    own_paths: a data path for each split instead, as in --train-data-path and its like.
    may_run_dry: accept an unweighted blend that holds fewer training samples than asked;
        validation and test always use what there is.

    A share of zero in `split` gives None, and so does one that a single dataset is too small for,
    with a notice (training excepted). Raises DataError on everything that would end or distort the
    run later.
    """
    if mock:
        return _mock(vocab_size, seq_length, seed, num_samples)
    builder = _Builder(seq_length, seed, IndexCache(cache_path), may_run_dry)
    if not order.NATIVE:
        logs.get_logger().info(" no native module: the indices are built by numpy")
    made: list[Source | None] = []
    if any(own_paths):
        for kind, (path, n) in enumerate(zip(own_paths, num_samples, strict=True)):
            own = None
            if path and n != 0:
                own = builder.whole(kind, path, n)
            made.append(own)
        return Datasets(*made)
    prefixes, weights = order.parse_data_path(data_path or ())
    files = open_all(prefixes)
    bounds = [order.split_bounds(split, file.num_sequences) for file in files]
    for kind, n in enumerate(num_samples):
        cut = None
        if n != 0:
            of_kind = [of_file[kind] for of_file in bounds]
            cut = builder.split(kind, files, of_kind, weights, n)
        made.append(cut)
    return Datasets(*made)


def open_all(prefixes: Sequence[str]) -> list[IndexedDataset]:
    """Open and check datasets, several at a time: the wait for a disk is most of the work.

    Raises DataError above the 32,766 of a blend.
    """
    if len(prefixes) >= order.MAX_DATASETS:
        raise DataFlagError(
            f"--data-path names {len(prefixes)} datasets, a blend holds at most "
            f"{order.MAX_DATASETS - 1}; use tools/merge_datasets.py"
        )
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(IndexedDataset, prefixes))


def _mock(
    vocab_size: int | None, seq_length: int, seed: int, num_samples: Sequence[int | None]
) -> Datasets:
    assert vocab_size is not None  # of the tokenizer
    made: list[Source | None] = []
    for kind, n in enumerate(num_samples):
        size = MOCK_SAMPLES if n is None else n
        # Any three seeds that differ; a sample's own seed is the pair (this, k).
        seed_of_split = 3 * seed + kind
        dataset = MockDataset(vocab_size, seq_length, seed_of_split, size) if size else None
        made.append(dataset)
    return Datasets(*made)


Bounds = tuple[int, int]  # sequences [start, stop) of a file


@dataclass(frozen=True)
class _Builder:
    """A builder of one split at a time; `kind` is its index in order.SPLITS."""

    seq_length: int
    seed: int
    cache: IndexCache
    may_run_dry: bool

    def whole(self, kind: int, data_path: Sequence[str], num_samples: int | None) -> Source | None:
        """Make a split with a data path of its own; a single dataset's weight means nothing."""
        prefixes, weights = order.parse_data_path(data_path)
        files = open_all(prefixes)
        bounds = [(0, file.num_sequences) for file in files]
        weights = weights if len(prefixes) > 1 else None
        return self.split(kind, files, bounds, weights, num_samples)

    def split(
        self,
        kind: int,
        files: list[IndexedDataset],
        bounds: Sequence[Bounds | None],
        weights: list[float] | None,
        num_samples: int | None,
    ) -> Source | None:
        """Make a split of the given sequences of each file; None where there is none."""
        name = order.SPLITS[kind]
        given = [of_file for of_file in bounds if of_file is not None]
        if not given:  # a share of zero, so of every file
            if kind == 0:
                raise DataFlagError(
                    "--split gives training no share; the first of its numbers must be above 0"
                )
            return None
        if len(files) == 1 and weights is None:
            return self._single(kind, files[0], given[0], num_samples)
        if weights is None:
            return self._unweighted(name, files, given, num_samples)
        if num_samples is None:
            raise DataFlagError(
                f"--data-path: a blend with weights has no end; say how many {name} samples, "
                "or leave the weights out"
            )
        drawn, built = order.blend_sizes(weights, num_samples)
        datasets = []
        for file, of_file, n in zip(files, given, built, strict=True):
            datasets.append(self._one(name, file, of_file, n))
        return BlendedDataset(datasets, order.normalized(weights), sum(drawn), self.cache)

    def _single(
        self, kind: int, file: IndexedDataset, bounds: Bounds, num_samples: int | None
    ) -> GPTDataset | None:
        name = order.SPLITS[kind]
        if kind > 0 and bounds[0] == bounds[1]:
            too_small = _too_small(name, file, bounds)
            logs.get_logger().warning(f"{file.prefix}: {too_small}; there is none")
            return None
        return self._one(name, file, bounds, num_samples)

    def _unweighted(
        self,
        name: str,
        files: list[IndexedDataset],
        bounds: Sequence[Bounds],
        num_samples: int | None,
    ) -> BlendedDataset:
        """Blend one epoch of each file, each sample once."""
        datasets = []
        for file, of_file in zip(files, bounds, strict=True):
            datasets.append(self._one(name, file, of_file, None))
        total = sum(len(dataset) for dataset in datasets)
        if num_samples is None:
            return BlendedDataset(datasets, None, None, self.cache)
        if num_samples > total:
            dry = (
                f"{num_samples} {name} samples are asked of {len(files)} datasets without "
                f"weights, which hold {total} in their one epoch"
            )
            if name == "train" and not self.may_run_dry:
                raise DataFlagError(
                    f"--data-path: {dry}; give weights to repeat them, or train for at most "
                    f"{total} samples"
                )
            logs.get_logger().warning(f"{dry}; those {total} are all there are")
        return BlendedDataset(datasets, None, min(num_samples, total), self.cache)

    def _one(
        self, name: str, file: IndexedDataset, bounds: Bounds, num_samples: int | None
    ) -> GPTDataset:
        """Make the samples of one file. Raises DataError if there is not even one."""
        start, stop = bounds
        tokens = file.num_tokens(start, stop)
        remedy = "add documents, or give the split a larger share in --split"
        if name != "train":
            remedy += " or none (--split 100,0,0)"
        if start == stop:
            raise DataError(f"{file.prefix}: {_too_small(name, file, bounds)}; {remedy}")
        if tokens == 0:
            raise DataError(
                f"{file.prefix}: the {stop - start} sequences of its {name} split hold no token; "
                f"{remedy}"
            )
        if num_samples is None and tokens < self.seq_length + 1:
            raise DataError(
                f"{file.prefix}: its {name} split holds {tokens} tokens, one sample needs "
                f"{self.seq_length + 1}; {remedy}"
            )
        return GPTDataset(file, bounds, self.seq_length, self.seed, num_samples, self.cache)


def _too_small(name: str, file: IndexedDataset, bounds: Bounds) -> str:
    return (
        f"{file.num_sequences} sequences are too few for its {name} split, "
        f"[{bounds[0]}, {bounds[1]})"
    )
