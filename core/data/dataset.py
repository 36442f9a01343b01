"""Read samples from files: the split of one dataset, and a blend of several."""

from typing import Any

import numpy as np

from . import order
from .cache import IndexCache
from .errors import DataError
from .indexed import IndexedDataset, bin_path
from .source import Positioned, Sample


class GPTDataset(Positioned):
    """The samples of the sequences [start, stop) of one dataset, in Megatron's order.

    The sequences are laid end to end, shuffled anew in each epoch, and cut every `seq_length`
    tokens. Three indices, built once and cached, say where a sample is (see order.py).

    num_samples: how many must be there, which decides the number of epochs; None for one epoch.
        There can be more.
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
        self.indexed = indexed
        self.seq_length = seq_length
        start, stop = bounds
        epochs = order.plan_epochs(indexed.num_tokens(start, stop), seq_length, num_samples)
        facts: dict[str, Any] = {
            "content": indexed.identity,
            "sequences": bounds,
            "epochs": [epochs.count, epochs.separate_final],
            "seq_length": seq_length,
            "seed": seed,
        }
        self.fingerprint = order.fingerprint(facts)

        def build() -> dict[str, np.ndarray]:
            lengths = indexed.sequence_lengths[start:stop]
            return order.build_indices(lengths, start, epochs, seq_length, seed)

        # The digest of large files covers blocks of them; the times of change guard the rest.
        key = order.fingerprint(facts | {"modified": indexed.modified()})
        shapes = order.index_shapes(stop - start, epochs)
        arrays = cache.arrays(indexed.prefix, key, shapes, build)
        # Plain arrays over the same mapping: an item of a memmap costs several times as much.
        self._document = np.asarray(arrays["document"])
        self._sample = np.asarray(arrays["sample"])
        self._shuffle = np.asarray(arrays["shuffle"])

    def __reduce__(self):
        # A worker opens the files and maps the cached indices itself instead of getting copies.
        return GPTDataset, self._made_of

    def __len__(self) -> int:
        return len(self._shuffle)

    def sample(self, k: int) -> Sample:
        """Return sample k. It holds one id more than `seq_length`: the last label."""
        (first, begin), (last, end) = self._corners(k)
        ids = np.empty(self.seq_length + 1, np.int64)
        filled = 0
        for position in range(first, last + 1):
            # The next sample begins with the last label of this one, so its token is included.
            length = end + 1 - begin if position == last else None
            part = self.indexed.get(self._document[position], begin, length)
            ids[filled : filled + len(part)] = part
            filled += len(part)
            begin = 0
        return Sample(ids, self.indexed.prefix)

    def locate(self, k: int, position: int) -> str:
        """Return file, document and offset in tokens of the id at `position` of sample k."""
        first, _ = self._corners(k)
        place, offset = first
        offset += position
        # Step over whole sequences until the offset lies inside one.
        while True:
            sequence = int(self._document[place])
            length = int(self.indexed.sequence_lengths[sequence])
            if offset < length:
                break
            offset -= length
            place += 1
        document, before = self.indexed.document_of(sequence)
        return f"{bin_path(self.indexed.prefix)}, document {document}, offset {before + offset}"

    def _corners(self, k: int) -> list[list[int]]:
        """Return (place in the document index, token offset) of the first id and of the last."""
        j = int(self._shuffle[k])
        return self._sample[j : j + 2].tolist()


class BlendedDataset(Positioned):
    """A blend: samples drawn from several datasets in proportion to their weights.

    weights: None for their numbers of samples, each used up.
    size: samples of the blend; None for all of them.
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
        self.datasets = datasets
        self.seq_length = datasets[0].seq_length
        lengths = [len(dataset) for dataset in datasets]
        exhaustive = size is None
        size = sum(lengths) if size is None else size
        facts: dict[str, Any] = {
            "datasets": [dataset.fingerprint for dataset in datasets],
            "weights": weights or lengths,
            "exhaustive": exhaustive,
        }
        self.fingerprint = order.fingerprint(facts)

        def build() -> dict[str, np.ndarray]:
            if exhaustive:
                dataset, sample = order.exhaustive_blend_index(lengths)
            else:
                dataset, sample = order.blend_index(weights or lengths, size)
            return {"dataset": dataset, "sample": sample}

        key = order.fingerprint(facts | {"size": size})
        shapes: dict[str, tuple[int, ...]] = {"dataset": (size,), "sample": (size,)}
        arrays = cache.arrays(datasets[0].indexed.prefix, key, shapes, build)
        self._dataset = np.asarray(arrays["dataset"])
        self._sample = np.asarray(arrays["sample"])
        self._check(lengths)

    def __reduce__(self):
        return BlendedDataset, self._made_of

    def __len__(self) -> int:
        return len(self._dataset)

    def sample(self, k: int) -> Sample:
        """Return sample k of the blend."""
        return self.datasets[self._dataset[k]].sample(int(self._sample[k]))

    def locate(self, k: int, position: int) -> str:
        """Return where the id at `position` of sample k comes from."""
        return self.datasets[self._dataset[k]].locate(int(self._sample[k]), position)

    def _check(self, lengths: list[int]) -> None:
        """Raise DataError if the blend draws more samples of a dataset than it was built for."""
        needed = np.bincount(self._dataset, minlength=len(lengths))
        for dataset, need, there in zip(self.datasets, needed, lengths, strict=True):
            if need > there:
                raise DataError(
                    f"--data-path: a blend of {len(self)} samples draws {need} from "
                    f"{dataset.indexed.prefix}, which is built for {there}; ask for more samples, "
                    "make its weight larger, or join small datasets with tools/merge_datasets.py"
                )
