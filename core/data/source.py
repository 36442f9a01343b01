"""Define a sample, and the `Source` of samples that every kind of data offers."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from . import order
from .errors import DataError

# Number of ids that mock samples use. Few, so that a small model learns them within minutes.
MOCK_ALPHABET = 256


@dataclass(frozen=True)
class Sample:
    """One training sequence of T tokens.

    ids: [T + 1] int64; the first T are inputs, the last T labels.
    source: the data set it is from, for messages.
    loss_mask: [T] float32, 1 where the prediction counts; None if every one does.
    documents: [T] int64, how many documents of the sample end before each input; None if the
        end-of-document ids among the inputs say it.
    """

    ids: np.ndarray
    source: str
    loss_mask: np.ndarray | None = None
    documents: np.ndarray | None = None


class Source(Protocol):
    """Samples by number. Worker processes get a copy each, made by pickling.

    seq_length: T, the tokens of each sample.
    fingerprint: hex digits, equal if and only if the same samples come in the same order.
    """

    seq_length: int
    fingerprint: str

    def __len__(self) -> int: ...

    def sample(self, k: int) -> Sample:
        """Return sample k."""

    def locate(self, k: int, position: int) -> str:
        """Return where the id at `position` of sample k comes from, for an error message."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must know beside the number of the next sample, as JSON."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""


class Positioned:
    """A source whose samples are a function of their number: the position is all its state."""

    def state(self) -> dict[str, Any]:
        """Return nothing: the number of the next sample says all."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Accept the state of such a source. Raises DataError for the state of another kind."""
        if state:
            raise DataError(f"the state {', '.join(sorted(state))} is of another kind of data")


class MockDataset(Positioned):
    """Made-up samples, a function of (seed, k) alone.

    Each is a walk of a constant step over a small alphabet, with one id in sixteen replaced.
    """

    def __init__(self, vocab_size: int, seq_length: int, seed: int, num_samples: int):
        if vocab_size < 2:
            raise DataError(
                f"--mock-data needs a vocabulary of 2 or more; --vocab-size gives {vocab_size}"
            )
        self.vocab_size = vocab_size
        self.seq_length = seq_length
        self.seed = seed
        self.num_samples = num_samples
        self.fingerprint = order.fingerprint({"mock": [vocab_size, seq_length, seed]})

    def __len__(self) -> int:
        return self.num_samples

    def sample(self, k: int) -> Sample:
        """Return sample k."""
        seeds = np.random.SeedSequence([self.seed, k])
        random = np.random.RandomState(np.random.MT19937(seeds))
        alphabet = min(self.vocab_size, MOCK_ALPHABET)
        length = self.seq_length + 1
        start = random.randint(alphabet)
        step = random.randint(1, 5)
        walk = (start + step * np.arange(length, dtype=np.int64)) % alphabet
        noise = random.randint(alphabet, size=length)
        replaced = random.randint(16, size=length) == 0
        return Sample(np.where(replaced, noise, walk), "mock data")

    def locate(self, k: int, position: int) -> str:
        """Return where the id at `position` of sample k comes from."""
        return f"mock data, sample {k}, offset {position}"
