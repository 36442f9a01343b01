"""Micro-batches: the global order on any number of ranks and workers, from any position; clear
errors; no process left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from trivium.data.errors import DataError
from trivium.data.indexed import IndexedDatasetWriter
from trivium.data.loader import Batch, MicroBatches, Replica
from trivium.data.source import MockDataset, Positioned, Sample
from trivium.data.splits import build_datasets

VOCABULARY = {"vocab_size": 100, "eod": 99}
WORKERS = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture
def dataset():
    return MockDataset(100, 8, 1, 24)


def load(dataset, **more):
    return MicroBatches(dataset, **({"micro_batch_size": 2} | VOCABULARY | more))


def gather(batches):
    """Every field of all batches, joined: tokens, labels, loss_mask, samples."""
    return [
        torch.cat(field)
        for field in zip(
            *((b.tokens, b.labels, b.loss_mask, b.samples) for b in batches), strict=True
        )
    ]


def reading_workers():
    """Children of this process but for the ranks that other tests keep, which come from a fork
    server."""
    return [
        child
        for child in multiprocessing.active_children()
        if not child.name.startswith("ForkServer")
    ]


def wait_for_no_children():
    deadline = time.monotonic() + 10
    while reading_workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not reading_workers()


@WORKERS
def test_batches_hold_the_samples_in_order(dataset, workers):
    tokens, labels, mask, samples = gather(load(dataset, num_workers=workers))
    ids = np.stack([dataset.sample(k).ids for k in range(24)])
    assert (
        tokens.dtype == labels.dtype == samples.dtype == torch.int64 and mask.dtype == torch.float32
    )
    assert tokens.tolist() == ids[:, :-1].tolist() and labels.tolist() == ids[:, 1:].tolist()
    assert samples.tolist() == list(range(24)) and mask.min() == 1


@WORKERS
@pytest.mark.parametrize("start", [0, 4, 12, 24])
def test_a_loader_from_a_position_yields_what_one_from_zero_yields_after_it(
    dataset, workers, start
):
    tail = list(load(dataset))[start // 2 :]
    resumed = list(load(dataset, start=start, num_workers=workers))
    assert len(resumed) == len(tail) == (24 - start) // 2
    for one, other in zip(resumed, tail, strict=True):
        assert all(
            torch.equal(getattr(one, name), getattr(other, name))
            for name in ("tokens", "labels", "loss_mask", "samples")
        )


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (3, 2), (2, 4), (1, 8)])
def test_the_global_order_does_not_depend_on_the_ranks(dataset, micro_batch_size, dp_size):
    ranks = [
        load(dataset, micro_batch_size=micro_batch_size, replica=Replica(rank, dp_size))
        for rank in range(dp_size)
    ]
    steps = [gather(step) for step in zip(*ranks, strict=True)]
    samples = [step[3] for step in steps]
    assert torch.cat(samples).tolist() == list(range(24)) and {len(step) for step in samples} == {
        micro_batch_size * dp_size
    }
    assert torch.cat([step[0] for step in steps]).equal(gather(load(dataset))[0])


@WORKERS
@pytest.mark.parametrize("end", [1, 5, 7, 13])
def test_a_short_last_step_counts_every_sample_once_on_as_many_batches(dataset, workers, end):
    ranks = [
        list(load(dataset, end=end, replica=Replica(rank, 3), num_workers=workers))
        for rank in range(3)
    ]
    assert {len(batches) for batches in ranks} == {-(-end // 6)}
    _, _, mask, samples = gather([batch for batches in ranks for batch in batches])
    assert sorted(samples[mask.all(dim=1)].tolist()) == list(range(end))
    assert mask.sum() == end * 8


def test_an_end_beyond_the_data_is_its_end(dataset):
    assert gather(load(dataset, end=1000))[3].tolist() == list(range(24))


def test_predictions_made_from_the_end_of_document_count_nothing_if_asked(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        for _ in range(20):
            writer.add_document([1, 2, 3, 4, 99])
    data = build_datasets([str(tmp_path / "data")], "1", 8, 1, (None, 0, 0)).train
    tokens, _, mask, _ = gather(load(data, eod_mask_loss=True))
    assert mask.equal((tokens != 99).float()) and 0 < (mask == 0).sum() < mask.numel()
    assert gather(load(data))[2].min() == 1


@WORKERS
@pytest.mark.parametrize(("bad", "dtype"), [(100, np.uint16), (-1, np.int32)])
def test_an_id_outside_the_vocabulary_names_file_document_and_offset(tmp_path, workers, bad, dtype):
    with IndexedDatasetWriter(tmp_path / "data", dtype) as writer:
        for document in range(30):
            writer.add_document([7] * 9 if document != 12 else [7, 7, bad, 7, 7, 7, 7, 7, 7])
    data = build_datasets([str(tmp_path / "data")], "1", 4, 1, (60, 0, 0)).train
    with pytest.raises(DataError) as caught:
        list(load(data, num_workers=workers))
    expected = (
        f"{tmp_path}/data.bin, document 12, offset 2: token id {bad} is outside the vocabulary of "
        "100; use the tokenizer that made the data"
    )
    assert str(caught.value) == expected and caught.value.__cause__ is None
    assert wait_for_no_children()


def test_reading_draws_nothing_from_the_run_s_generator(dataset):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batches = [load(dataset, num_workers=workers) for workers in (0, 1)]
    for loader in batches:
        next(loader)
        loader.close()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("end_it", ["use_up", "close", "forget", "close_twice"])
def test_no_worker_outlives_its_loader(dataset, end_it):
    loader = load(dataset, num_workers=2)
    next(loader)
    workers = reading_workers()
    assert len(workers) == 2
    if end_it == "use_up":
        assert len(list(loader)) == 11
    elif end_it == "forget":
        del loader
    else:
        loader.close()
        if end_it == "close_twice":
            loader.close()
        assert list(loader) == []
    assert wait_for_no_children() and not any(worker.is_alive() for worker in workers)


def test_signals_of_the_scheduler_leave_the_workers_reading(dataset):
    loader = load(dataset, num_workers=2)
    batches = [next(loader)]
    for worker in reading_workers():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid, number)
    batches += list(loader)
    assert gather(batches)[3].tolist() == list(range(24))
    assert wait_for_no_children()


@pytest.mark.parametrize(
    "ending", ["", "raise SystemExit(3)", "os.kill(os.getpid(), signal.SIGTERM)"]
)
def test_a_run_that_ends_in_the_middle_leaves_no_process_and_no_noise(ending):
    script = f"""
        import multiprocessing, os, signal, sys
        from trivium.data.source import MockDataset, Positioned, Sample
        from trivium.data.loader import MicroBatches
        data = MockDataset(100, 8, 1, 10000)
        loader = MicroBatches(data, micro_batch_size=2, vocab_size=100, eod=99, num_workers=2)
        next(loader)
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
        {ending}
    """
    # The workers hold the pipes: `run` returns only when they are gone too.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (
        done.returncode == {"": 0, "r": 3, "o": -signal.SIGTERM}[ending[:1]] and done.stderr == ""
    )
    assert len(done.stdout.split()) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs a device")
@pytest.mark.gpu
def test_batches_are_pinned_for_the_device(dataset):
    assert next(load(dataset, pin_memory=True, num_workers=1)).tokens.is_pinned()


def test_a_batch_is_frozen(dataset):
    batch = next(load(dataset))
    assert isinstance(batch, Batch)
    with pytest.raises(AttributeError):
        batch.tokens = None


class Chat(Positioned):
    """A source whose samples say by themselves which predictions count and where documents end."""

    seq_length = 4
    fingerprint = "chat"

    def __len__(self):
        return 3

    def sample(self, k):
        mask = np.array([0, 0, 1, 1], np.float32)
        return Sample(np.arange(5) + k, "chat", mask, np.array([0, 0, 1, 1]))

    def locate(self, k, position):
        return f"chat {k}, token {position}"


def test_a_sample_says_what_counts_and_where_documents_end():
    """Rows beyond the end are masked; end-of-document ids are masked on top of the sample's own."""
    loader = MicroBatches(Chat(), micro_batch_size=2, vocab_size=9, eod=4, eod_mask_loss=True)
    first, last = loader
    assert first.documents.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert first.loss_mask.tolist() == [[0, 0, 1, 1], [0, 0, 1, 0]]
    assert last.documents.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert last.loss_mask.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]


def test_a_function_of_the_position_has_no_state():
    source = Chat()
    source.load_state(source.state())
    with pytest.raises(DataError, match="the state shard is of another kind of data"):
        source.load_state({"shard": 3})
