"""Turn the samples of a source into micro-batches of one data-parallel rank.

Worker processes read ahead, so that a step does not wait for the disk. A loader can begin at any
sample: the number of that sample and the state of the source are all that a resume needs.

The samples of a step lie over the data-parallel ranks in blocks. With 2 ranks and micro-batches of
3 samples, starting at sample s:

    micro-batch 0    rank 0: s .. s+2     rank 1: s+3 .. s+5
    micro-batch 1    rank 0: s+6 .. s+8   rank 1: s+9 .. s+11

So the samples of an update depend on the global batch alone, and another layout continues where
this one stopped.
"""

import atexit
import multiprocessing
import os
import signal
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .errors import DataError
from .source import Source

# Signals that a worker ignores; for SIGTERM see _Worker.
IGNORED = {signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    tokens: torch.Tensor  # [B, T] int64, inputs
    labels: torch.Tensor  # [B, T] int64, the id that follows each input
    loss_mask: torch.Tensor  # [B, T] float32, 1 where the prediction counts
    samples: torch.Tensor  # [B] int64, global positions in the order of the run
    # [B, T] int64, the document of each input within its sample; None if `tokens` say it.
    documents: torch.Tensor | None = None

    def pin_memory(self) -> "Batch":
        """Return a copy in memory that a device copies from without waiting."""
        return Batch(
            self.tokens.pin_memory(),
            self.labels.pin_memory(),
            self.loss_mask.pin_memory(),
            self.samples.pin_memory(),
            None if self.documents is None else self.documents.pin_memory(),
        )


@dataclass(frozen=True)
class Replica:
    """One of the data-parallel replicas among which the samples of a step are divided.

    rank: its number, from 0.
    count: number of replicas.
    """

    rank: int = 0
    count: int = 1


ONLY_REPLICA = Replica()


class MicroBatches:
    """An iterator over the micro-batches of one rank.

    source: the samples to read.
    micro_batch_size: samples of a micro-batch on each rank.
    vocab_size: all ids must lie below it.
    eod: the end-of-document id.
    start: number of the first sample.
    end: number after the last sample, all of the source if None. If the last step is short, rows
        beyond `end` hold zeros under a mask of zeros: every rank gets the same number of
        micro-batches, and every sample counts once.
    replica: this one of those that share the samples.
    eod_mask_loss: predictions made from `eod` count nothing.
    num_workers: processes that read ahead; 0 reads in this one. `close` ends them; so does the end
        of the data or of this process.
    pin_memory: put batches in memory that a device copies from without waiting.

    Raises DataError from `next` at the first id outside the vocabulary, naming its file, document
    and offset.
    """

    def __init__(
        self,
        source: Source,
        *,
        micro_batch_size: int,
        vocab_size: int,
        eod: int,
        start: int = 0,
        end: int | None = None,
        replica: Replica = ONLY_REPLICA,
        eod_mask_loss: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        end = len(source) if end is None else min(end, len(source))
        masked_id = eod if eod_mask_loss else None
        reader = _Reader(source, micro_batch_size, vocab_size, masked_id, end)
        own = replica.rank * micro_batch_size
        firsts = range(start + own, end + own, micro_batch_size * replica.count)
        self._closing = multiprocessing.Event() if num_workers else None
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=firsts,
            num_workers=num_workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            worker_init_fn=_Worker(self._closing) if num_workers else None,
            # The loader draws a seed for its workers: not from the generator of the run.
            generator=torch.Generator(),
        )
        # A worker starts with these signals held back, and lets them through once it knows what to
        # do with them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED | {signal.SIGTERM})
        try:
            self._batches: Iterator[Batch | str] | None = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # torch does not end its workers once the interpreter is going down: do so before, without
        # keeping this object alive.
        self._at_exit = _CloseAtExit(self)
        atexit.register(self._at_exit)

    def __iter__(self) -> "MicroBatches":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        try:
            batch = next(self._batches)
        except BaseException:
            self.close()
            raise
        if isinstance(batch, str):
            self.close()
            raise DataError(batch)
        return batch

    def close(self) -> None:
        """End the worker processes. Safe to call again."""
        if self._batches is not None:
            if self._closing is not None:
                self._closing.set()
            self._batches = None  # torch ends the workers of an iterator that is gone
            atexit.unregister(self._at_exit)

    def __del__(self) -> None:
        if getattr(self, "_at_exit", None) is not None:
            self.close()


class _CloseAtExit:
    """A call to `close` that does not keep the iterator alive."""

    def __init__(self, batches: MicroBatches):
        self._batches = weakref.ref(batches)

    def __call__(self) -> None:
        if (batches := self._batches()) is not None:
            batches.close()


class _Worker:
    """The first call in a worker process: it leaves the job's signals to the parent.

    The parent may want to save before it ends, and a worker that took SIGTERM from the scheduler
    would take the run down with it. A worker ends when the loader closes or the parent is gone.
    """

    def __init__(self, closing):
        self.closing = closing

    def __call__(self, worker: int) -> None:
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED | {signal.SIGTERM})

    def _on_term(self, number, frame) -> None:
        if self.closing.is_set():
            os._exit(0)


class _Reader(Dataset):
    """The micro-batches of a rank, by the number of their first sample.

    A problem travels as its message, so that no worker's traceback surrounds it.
    """

    def __init__(
        self,
        source: Source,
        micro_batch_size: int,
        vocab_size: int,
        masked_id: int | None,
        end: int,
    ):
        self.source = source
        self.micro_batch_size = micro_batch_size
        self.vocab_size = vocab_size
        self.masked_id = masked_id
        self.end = end

    def __getitem__(self, first: int) -> Batch | str:
        size = self.micro_batch_size
        length = self.source.seq_length
        # Zeros, because rows beyond the end of the data stay as they are.
        ids = torch.zeros(size, length + 1, dtype=torch.int64)
        mask = torch.zeros(size, length)
        documents = None
        try:
            for row, k in enumerate(range(first, min(first + size, self.end))):
                sample = self.source.sample(k)
                ids[row] = torch.from_numpy(sample.ids)
                mask[row] = 1
                if sample.loss_mask is not None:
                    mask[row] = torch.from_numpy(sample.loss_mask)
                if sample.documents is not None:
                    if documents is None:
                        documents = torch.zeros(size, length, dtype=torch.int64)
                    documents[row] = torch.from_numpy(sample.documents)
        except DataError as error:
            return str(error)
        # Checked here, because an embedding on a device fails without naming the place.
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            return self._outside(ids, first)
        tokens = ids[:, :-1].contiguous()
        labels = ids[:, 1:].contiguous()
        if self.masked_id is not None:
            mask[tokens == self.masked_id] = 0
        return Batch(tokens, labels, mask, torch.arange(first, first + size), documents)

    def _outside(self, ids: torch.Tensor, first: int) -> str:
        """Return the message for an id outside the vocabulary: the first one's place and value."""
        row, position = ((ids < 0) | (ids >= self.vocab_size)).nonzero()[0].tolist()
        where = self.source.locate(first + row, position)
        return (
            f"{where}: token id {ids[row, position]} is outside the vocabulary of "
            f"{self.vocab_size}; use the tokenizer that made the data"
        )


def _as_is(batch: Any) -> Any:
    """Return a batch unchanged: it is complete already."""
    return batch
