"""Samples by number: what they hold, where they come from, when an order counts as the same, and
which errors come before the run."""

import os
import pickle
import shutil

import numpy as np
import pytest

from trivium.data import order
from trivium.data.errors import DataError
from trivium.data.indexed import IndexedDatasetWriter
from trivium.data.source import MockDataset
from trivium.data.splits import build_datasets


def write(prefix, lengths, first=0):
    """Documents of these lengths; ids count on from `first`, so that an id tells where it is."""
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for length in lengths:
            writer.add_document(np.arange(first, first + length))
            first += length
    return str(prefix)


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "data", [5, 0, 7, 1, 12, 3, 9, 30, 2, 6] * 3)


def train(prefix, samples=None, split="1", seq_length=4, seed=7, **more):
    items = [prefix] if isinstance(prefix, str) else prefix
    return build_datasets(items, split, seq_length, seed, (samples, 0, 0), **more).train


def all_tokens(dataset):
    return [dataset.sample(k).ids.tolist() for k in range(len(dataset))]


def test_an_epoch_of_samples_holds_every_document_in_shuffled_order(prefix):
    dataset = train(prefix)
    assert len(dataset) == (225 - 1) // 4
    in_order = np.argsort(dataset._shuffle)
    stream = np.concatenate([dataset.sample(k).ids[:-1] for k in in_order])
    documents = np.concatenate([dataset.indexed.get(i) for i in dataset._document])
    np.testing.assert_array_equal(stream, documents[: len(stream)])
    assert sorted(documents) == list(range(225)) and not np.array_equal(documents, np.arange(225))


def test_neighbouring_samples_share_one_token(prefix):
    dataset = train(prefix)
    at = np.argsort(dataset._shuffle)
    assert all(
        dataset.sample(at[j]).ids[-1] == dataset.sample(at[j + 1]).ids[0]
        for j in range(len(dataset) - 1)
    )


def test_every_id_is_located_in_its_file(prefix):
    dataset = train(prefix, samples=120)
    for k in range(0, len(dataset), 7):
        for position, token in enumerate(dataset.sample(k).ids):
            file, document, offset = dataset.locate(k, position).split(", ")
            assert file == f"{prefix}.bin"
            document, offset = int(document.split()[1]), int(offset.split()[1])
            starts = np.cumsum([0, *[5, 0, 7, 1, 12, 3, 9, 30, 2, 6] * 3])
            assert starts[document] + offset == token


def test_splits_do_not_share_a_token(prefix):
    data = build_datasets([prefix], "6,2,2", 4, 7, (None, None, None))
    seen = [
        set(np.concatenate([dataset.sample(k).ids for k in range(len(dataset))]).tolist())
        for dataset in (data.train, data.valid, data.test)
    ]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_a_dataset_and_a_blend_pickle_as_what_they_are_made_of(prefix, tmp_path):
    blend = train(["1", prefix, "2", write(tmp_path / "other", [50] * 9)], 100)
    for dataset in (train(prefix), blend):
        data = pickle.dumps(dataset)
        assert len(data) < 2000 and all_tokens(pickle.loads(data)) == all_tokens(dataset)


def test_a_blend_draws_by_weight_and_locates_in_the_right_file(prefix, tmp_path):
    other = write(tmp_path / "other", [50] * 9, first=1000)
    dataset = train(["1", prefix, "3", other], 100)
    from_other = [k for k in range(len(dataset)) if dataset.sample(k).ids[0] >= 1000]
    assert len(dataset) == 100 and len(from_other) == 75
    assert dataset.locate(from_other[0], 0).startswith(f"{other}.bin, document")


def test_a_blend_without_weights_uses_every_sample_of_each(prefix, tmp_path):
    other = write(tmp_path / "other", [50] * 9, first=1000)
    dataset = train([prefix, other])
    parts = all_tokens(train(prefix)) + all_tokens(train(other))
    assert sorted(all_tokens(dataset)) == sorted(parts)
    assert (
        all_tokens(train([prefix, other], 50))
        == all_tokens(train([prefix, other], len(dataset)))[:50]
    )


def test_the_fingerprint_is_of_the_order_that_results(prefix, tmp_path):
    base = train(prefix, 40).fingerprint
    assert base == train(prefix, 50).fingerprint, (
        "56 samples are one epoch: the order of 40 is that of 50"
    )
    for other in (
        train(prefix, 100),
        train(prefix, 40, seed=8),
        train(prefix, 40, seq_length=5),
        train(prefix, 40, split="9,1"),
    ):
        assert other.fingerprint != base
    for suffix in (".bin", ".idx"):
        shutil.copyfile(prefix + suffix, tmp_path / f"copy{suffix}")
    assert train(str(tmp_path / "copy"), 40).fingerprint == base
    os.utime(prefix + ".bin", (1, 1))
    assert train(prefix, 40).fingerprint == base
    write(tmp_path / "copy", [5, 0, 7, 1, 12, 3, 9, 30, 2, 6] * 3, first=1)
    assert train(str(tmp_path / "copy"), 40).fingerprint != base


def test_the_fingerprint_of_a_blend_follows_the_weights_and_not_the_length(prefix, tmp_path):
    other = write(tmp_path / "other", [50] * 9)
    base = train(["1", prefix, "3", other], 30).fingerprint
    assert base == train(["2", prefix, "6", other], 40).fingerprint
    assert (
        len(
            {
                base,
                train(["1", prefix, "2", other], 30).fingerprint,
                train(["3", other, "1", prefix], 30).fingerprint,
            }
        )
        == 3
    )


def test_the_fingerprint_of_a_run_is_that_of_its_training_order(prefix):
    one, other = (build_datasets([prefix], "8,2", 4, 7, (40, n, 0)) for n in (3, 90))
    assert one.fingerprint == other.fingerprint == one.train.fingerprint


def test_no_share_or_no_samples_is_no_dataset(prefix):
    data = build_datasets([prefix], "1,0,0", 4, 7, (10, 5, 5))
    assert data.valid is None and data.test is None
    assert build_datasets([prefix], "8,1,1", 4, 7, (10, 0, 0)).valid is None


def test_a_dataset_too_small_for_validation_has_none_and_says_so(tmp_path, caplog):
    data = build_datasets([write(tmp_path / "data", [50] * 10)], "969,30,1", 4, 7, (10, 10, 10))
    assert data.valid is None and "too few for its valid split, [10, 10)" in caplog.text


@pytest.mark.parametrize(
    ("items", "split", "samples", "message"),
    [
        ([], "1", 1, "--data-path names no dataset"),
        (["{missing}"], "1", 1, r"missing\.idx|missing\.bin: no such file"),
        (["{big}"], "0,1", 1, "--split gives training no share"),
        (["1", "{big}", "1", "{tiny}"], "1,4", 5, "1 sequences are too few for its train split"),
        (["{big}", "{tiny}"], "1", 5, r"tiny: its train split holds 3 tokens, one sample needs 5"),
        (["{tiny}"], "1", None, "its train split holds 3 tokens, one sample needs 5"),
        (["{hollow}"], "1,2", 5, "the 1 sequences of its train split hold no token"),
        (["1", "{big}"], "1", None, "say how many train samples"),
        (
            ["{big}", "{big}"],
            "1",
            500,
            r"500 train samples are asked of 2 datasets without weights, which hold 248",
        ),
        (["{big}"] * 32767, "1", 5, "names 32767 datasets"),
    ],
)
def test_what_would_go_wrong_later_is_an_error_now(items, split, samples, message, tmp_path):
    write(tmp_path / "big", [50] * 10)
    write(tmp_path / "tiny", [3])
    with IndexedDatasetWriter(tmp_path / "hollow", np.int32) as writer:
        writer.add_sequences([], [0])
        writer.add_sequences([1, 2, 3], [1, 2])
    names = {name: tmp_path / name for name in ("big", "tiny", "hollow", "missing")}
    with pytest.raises(DataError, match=message) as caught:
        train([item.format(**names) for item in items], samples, split)
    assert "\n" not in str(caught.value)


def test_a_blend_that_oversamples_a_dataset_is_an_error(tmp_path):
    # 55 of 110 samples are to come from the first, built for 56; each of 50 others rounds 1.1 up to
    # 2: of 155 samples half are 78.
    items = ["50", write(tmp_path / "small", [56 * 4 + 1])] + [
        "1",
        write(tmp_path / "other", [50] * 10),
    ] * 50
    with pytest.raises(
        DataError,
        match=r"--data-path: a blend of 155 samples draws 7\d from .*small, which is built for 56",
    ):
        train(items, 110, seq_length=4)


def test_validation_that_runs_dry_uses_what_there_is(prefix, tmp_path, caplog):
    data = build_datasets(
        [prefix, write(tmp_path / "other", [50] * 9)], "8,2", 4, 7, (10, 10_000, 0)
    )
    assert 0 < len(data.valid) < 10_000 and "10000 valid samples are asked" in caplog.text


def test_mock_samples_follow_from_seed_and_number_alone():
    data = build_datasets(None, "1", 16, 3, (50, 20, 0), mock=True, vocab_size=40)
    assert (len(data.train), len(data.valid), data.test) == (50, 20, None)
    again = build_datasets(None, "1", 16, 3, (9, 9, 9), mock=True, vocab_size=40)
    assert (
        all_tokens(again.train) == all_tokens(data.train)[:9]
        and again.fingerprint == data.fingerprint
    )
    assert all_tokens(again.train) != all_tokens(again.valid) != all_tokens(again.test)
    ids = np.array(all_tokens(data.train))
    assert ids.shape == (50, 17) and ids.min() >= 0 and ids.max() < 40


def test_mock_samples_can_be_learnt():
    steps = np.diff([MockDataset(1000, 64, 1, 200).sample(k).ids for k in range(200)], axis=1) % 256
    # Both ids of a pair are walked, not replaced, with probability (15/16)^2 = 0.879; 12,800 pairs,
    # so 0.02 is 7 standard deviations.
    assert abs(np.mean((steps >= 1) & (steps <= 4)) - (0.879 + 0.121 * 4 / 256)) < 0.02


def test_numpy_and_native_index_builders_give_the_same_samples(prefix, monkeypatch, tmp_path):
    if not order.NATIVE:
        pytest.skip("no native module")
    native = all_tokens(train(prefix, 100, cache_path=tmp_path / "a"))
    monkeypatch.setattr(order, "_native", None)
    monkeypatch.setattr(order.sample_index, "__defaults__", (False,))
    assert all_tokens(train(prefix, 100, cache_path=tmp_path / "b")) == native
