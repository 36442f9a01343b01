"""Megatron's own builder is the judge: its files, its sample order, its blends.

Cases are random, their seeds are not.
"""

import numpy as np
import pytest

from trivium.data import order
from trivium.data.errors import DataError
from trivium.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype
from trivium.data.splits import build_datasets

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")
builder = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_builder")
gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset")
indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
megatron_utils = pytest.importorskip("megatron.core.datasets.utils")
pytest.importorskip("megatron.core.datasets.helpers_cpp")

# It loops forever where a split of one dataset has no token.
pytestmark = pytest.mark.timeout(60)


class Vocabulary:
    """The part of a tokenizer that a GPTDatasetConfig uses."""

    vocab_size, eod, unique_identifiers = 1000, 999, ("none",)


def megatron(blend, split, seq_length, seed, sizes, per_split=None):
    """Its three splits, through its builder."""
    config = gpt_dataset.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=blend,
        blend_per_split=per_split,
        split=None if per_split else split,
        tokenizer=Vocabulary(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return builder.BlendedMegatronDatasetBuilder(
        gpt_dataset.GPTDataset, sizes, lambda: True, config
    ).build()


def write(prefix, random, num_documents, longest, vocab_size=1000):
    """A dataset of random documents, some of them empty."""
    with IndexedDatasetWriter(prefix, best_dtype(vocab_size)) as writer:
        for _ in range(num_documents):
            writer.add_document(
                random.integers(
                    0, vocab_size, random.integers(0 if random.random() < 0.2 else 1, longest)
                )
            )
    return str(prefix)


def assert_same(ours, theirs):
    """The same length and the same ids in every sample."""
    assert len(ours) == len(theirs)
    for k in range(len(theirs)):
        sample = theirs[k]
        ids = ours.sample(k).ids
        np.testing.assert_array_equal(ids[:-1], sample["tokens"].numpy())
        np.testing.assert_array_equal(ids[1:], sample["labels"].numpy())


@pytest.mark.parametrize("case", range(32))
def test_one_dataset_gives_the_samples_megatron_gives(case, tmp_path):
    random = np.random.default_rng(case)
    prefix = write(
        tmp_path / "data",
        random,
        int(random.integers(30, 120)),
        int(random.integers(3, 60)),
        int(random.choice([1000, 70000])),
    )
    split = str(random.choice(["8,1,1", "100,0,0", "90,10", "0.6,0.3,0.1", "1,1,1"]))
    seq_length, seed = int(random.integers(1, 40)), int(random.integers(0, 10000))
    sizes = [int(n) for n in random.integers(1, 200, 3)]
    if random.random() < 0.2:
        sizes[1] = None
    theirs = megatron(([prefix], None), split, seq_length, seed, sizes)
    ours = build_datasets(
        [prefix], split, seq_length, seed, tuple(sizes), cache_path=tmp_path / "cache"
    )
    for mine, reference in zip((ours.train, ours.valid, ours.test), theirs, strict=True):
        if reference is None:
            assert mine is None
        else:
            assert_same(mine, reference)


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize("case", range(24))
def test_blend_gives_the_samples_megatron_gives(case, weighted, tmp_path):
    random = np.random.default_rng(1000 + case)
    count = int(random.integers(1 if weighted else 2, 18))
    prefixes = [
        write(tmp_path / f"data{i}", random, int(random.integers(20, 50)), 30) for i in range(count)
    ]
    # Equal and small whole weights make ties, which the last bit decides; powers of ten make
    # extremes.
    kinds = [
        np.ones(count),
        random.integers(1, 10, count),
        10.0 ** random.integers(-4, 3, count) * random.integers(1, 9, count),
    ]
    weights = kinds[case % 3].tolist()
    seq_length, seed, sizes = (
        int(random.integers(1, 12)),
        int(random.integers(0, 10000)),
        [int(n) for n in random.integers(1, 300, 3)],
    )
    items = (
        [
            item
            for weight, prefix in zip(weights, prefixes, strict=True)
            for item in (repr(weight), prefix)
        ]
        if weighted
        else prefixes
    )
    theirs_or_error = _result_or(
        IndexError,
        megatron,
        megatron_utils.get_blend_from_list(items),
        "6,2,2",
        seq_length,
        seed,
        sizes,
    )
    ours_or_error = _result_or(
        DataError, build_datasets, items, "6,2,2", seq_length, seed, tuple(sizes), may_run_dry=True
    )
    if isinstance(theirs_or_error, IndexError):
        assert isinstance(ours_or_error, DataError) and "draws" in str(ours_or_error)
        return
    assert not isinstance(ours_or_error, DataError), ours_or_error
    for mine, reference in zip(
        (ours_or_error.train, ours_or_error.valid, ours_or_error.test), theirs_or_error, strict=True
    ):
        assert_same(mine, reference)


def _result_or(error, call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except error as raised:
        return raised


@pytest.mark.parametrize("case", range(8))
def test_each_split_from_its_own_path_gives_the_samples_megatron_gives(case, tmp_path):
    random = np.random.default_rng(2000 + case)
    prefixes = [write(tmp_path / f"data{i}", random, 30, 40) for i in range(4)]
    paths = [
        ["3", prefixes[0], "1", prefixes[1]],
        [prefixes[2], prefixes[3], prefixes[0]],
        ["1", prefixes[1]],
    ]
    seq_length, seed, sizes = (
        int(random.integers(2, 12)),
        int(random.integers(0, 10000)),
        [int(random.integers(50, 300)), None, 40],
    )
    theirs = megatron(
        None,
        None,
        seq_length,
        seed,
        sizes,
        per_split=[megatron_utils.get_blend_from_list(path) for path in paths],
    )
    ours = build_datasets(None, "1", seq_length, seed, tuple(sizes), own_paths=paths)
    for mine, reference in zip((ours.train, ours.valid, ours.test), theirs, strict=True):
        assert_same(mine, reference)


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500])
def test_megatron_reads_our_files(vocab_size, tmp_path):
    random = np.random.default_rng(vocab_size)
    prefix = write(tmp_path / "data", random, 50, 30, vocab_size)
    ours, theirs = IndexedDataset(prefix), indexed_dataset.IndexedDataset(prefix)
    assert ours.dtype == indexed_dataset.DType.optimal_dtype(vocab_size)
    np.testing.assert_array_equal(theirs.sequence_lengths, ours.sequence_lengths)
    np.testing.assert_array_equal(theirs.document_indices, ours.document_indices)
    for sequence in range(len(theirs)):
        np.testing.assert_array_equal(theirs[sequence], ours.get(sequence))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint16])
def test_we_read_and_write_the_bytes_megatron_writes(dtype, tmp_path):
    random = np.random.default_rng(1)
    theirs = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    with IndexedDatasetWriter(tmp_path / "ours", dtype) as ours:
        for _ in range(40):
            lengths = random.integers(1, 20, random.integers(0, 4)).tolist()
            ids = random.integers(0, 100, sum(lengths))
            theirs.add_document(torch.from_numpy(ids), lengths)
            ours.add_sequences(ids, lengths)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (
            tmp_path / f"theirs{suffix}"
        ).read_bytes()
    IndexedDataset(tmp_path / "theirs")


def test_merged_files_are_those_megatron_merges(tmp_path):
    random = np.random.default_rng(2)
    prefixes = [write(tmp_path / f"part{i}", random, 20, 30) for i in range(3)]
    theirs = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    with IndexedDatasetWriter(tmp_path / "ours", np.uint16) as ours:
        for prefix in prefixes:
            ours.add_index(prefix)
            theirs.add_index(prefix)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (
            tmp_path / f"theirs{suffix}"
        ).read_bytes()


@pytest.mark.parametrize(
    "items",
    [
        ["a"],
        ["a", "b"],
        ["1", "a"],
        ["0.3", " a ", "0.7", "b"],
        ["1", "2", "3"],
        ["a", "1", "b", "2"],
    ],
)
def test_data_path_is_parsed_as_megatron_parses_it(items):
    prefixes, weights = megatron_utils.get_blend_from_list(items)
    assert order.parse_data_path(items) == (list(prefixes), weights)
