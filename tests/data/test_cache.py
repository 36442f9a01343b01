"""The index cache: hits only what has the same content, survives damage, races and folders that
cannot be written."""

import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from trivium.data import cache as cache_module
from trivium.data import order
from trivium.data.cache import IndexCache
from trivium.data.digest import content_digest
from trivium.data.errors import DataError
from trivium.data.indexed import IndexedDatasetWriter
from trivium.data.splits import build_datasets

SHAPES = {"a": (1000,), "b": (3, 2)}


def build():
    return {"a": np.arange(1000, dtype=np.int32), "b": np.arange(6).reshape(3, 2)}


def never():
    raise AssertionError("built again")


def arrays_equal(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name]) for name in one
    )


def test_what_was_built_once_is_mapped_afterwards(tmp_path):
    cache = IndexCache(tmp_path / "cache")
    cache.arrays("data", "key", SHAPES, build)
    again = IndexCache(tmp_path / "cache").arrays("data", "key", SHAPES, never)
    assert arrays_equal(again, build()) and all(
        isinstance(array, np.memmap) for array in again.values()
    )
    assert sorted(os.listdir(tmp_path / "cache")) == ["key-a-v1.npy", "key-b-v1.npy"], (
        "no temporary file is left"
    )


@pytest.mark.parametrize("other", [{"key": "another"}, {"shapes": {"a": (999,), "b": (3, 2)}}])
def test_another_key_or_shape_is_built(other, tmp_path):
    cache = IndexCache(tmp_path)
    cache.arrays("data", "key", SHAPES, build)
    with pytest.raises(AssertionError, match="built again"):
        cache.arrays(**({"prefix": "data", "key": "key", "shapes": SHAPES, "build": never} | other))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "zeroed", "empty", "foreign"])
def test_a_damaged_file_is_built_anew(damage, tmp_path, caplog):
    cache = IndexCache(tmp_path)
    cache.arrays("data", "key", SHAPES, build)
    path = tmp_path / "key-a-v1.npy"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    damaged = {
        "truncated": bytes(content[:-700]),
        "flipped": bytes(content),
        "zeroed": bytes(len(content)),
        "empty": b"",
        "foreign": b"x" * 5000,
    }
    path.write_bytes(damaged[damage])
    assert arrays_equal(cache.arrays("data", "key", SHAPES, build), build())
    assert "key-a-v1.npy: the cached index is damaged" in caplog.text
    assert arrays_equal(cache.arrays("data", "key", SHAPES, never), build())


def test_without_a_path_it_lies_beside_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    IndexCache().arrays(str(tmp_path / "data"), "key", SHAPES, build)
    assert (tmp_path / "cache" / "key-a-v1.npy").exists() and not (tmp_path / "home").exists()


def test_beside_data_that_cannot_be_written_it_lies_in_the_user_s_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "cache").write_text("a file where the folder would be")
    IndexCache().arrays(str(tmp_path / "data"), "key", SHAPES, build)
    assert arrays_equal(IndexCache().arrays(str(tmp_path / "data"), "key", SHAPES, never), build())
    assert (tmp_path / "home" / "trivium" / "index" / "key-a-v1.npy").exists()


def test_where_nothing_can_be_written_the_arrays_stay_in_memory(tmp_path, monkeypatch, caplog):
    def full(path, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_publish", full)
    assert arrays_equal(
        IndexCache(tmp_path / "cache").arrays("data", "key", SHAPES, build), build()
    )
    assert "no folder for the index cache can be written" in caplog.text


def test_a_path_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--data-cache-path .*file: file exists"):
        IndexCache(tmp_path / "file")


def race(folder):
    data = build_datasets([os.path.join(folder, "data")], "1", 8, 1, (500, 0, 0))
    return [data.train.sample(k).ids.tolist() for k in range(20)]


def test_processes_that_race_read_the_same(tmp_path):
    write(tmp_path, 0)
    with ProcessPoolExecutor(4) as pool:
        results = list(pool.map(race, [str(tmp_path)] * 8))
    assert all(result == results[0] for result in results)
    assert sorted(path.name.split("-")[1] for path in (tmp_path / "cache").iterdir()) == [
        "document",
        "sample",
        "shuffle",
    ]


def write(folder, seed, count=30):
    random = np.random.default_rng(seed)
    with IndexedDatasetWriter(folder / "data", np.uint16) as writer:
        for length in random.integers(1, 40, count):
            writer.add_document(random.integers(0, 100, length))


def test_data_made_again_under_the_same_name_is_never_served_from_the_old_cache(tmp_path):
    orders = []
    for seed in (1, 2):
        write(tmp_path, seed)
        orders.append(race(str(tmp_path)))
    lengths = build_datasets(
        [str(tmp_path / "data")], "1", 8, 1, (500, 0, 0)
    ).train.indexed.sequence_lengths
    fresh = order.build_indices(lengths, 0, order.plan_epochs(int(lengths.sum()), 8, 500), 8, 1)
    cached = build_datasets([str(tmp_path / "data")], "1", 8, 1, (500, 0, 0)).train
    np.testing.assert_array_equal(cached._sample, fresh["sample"])
    assert orders[0] != orders[1]


def test_a_change_that_a_digest_of_blocks_misses_is_told_by_the_time_of_the_file(tmp_path):
    samples = []
    for swapped in (False, True):
        lengths = np.tile([3, 5], 60_000)
        if swapped:
            lengths[30_000:30_002] = 5, 3
        with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
            writer.add_documents(np.zeros(lengths.sum(), np.uint16), lengths)
        dataset = build_datasets([str(tmp_path / "data")], "1", 64, 1, (10, 0, 0)).train
        samples.append((dataset.indexed.identity, np.array(dataset._sample)))
    assert samples[0][0] == samples[1][0], (
        "the swap must lie between two blocks for this test to say anything"
    )
    assert not np.array_equal(samples[0][1], samples[1][1])


def test_a_digest_of_a_large_file_sees_its_size_both_ends_and_blocks_between(tmp_path):
    path, size = tmp_path / "file", 5 << 20
    path.write_bytes(bytes(size))
    plain = content_digest(path)
    for position in (0, size - 1, (size - 65536) // 15):
        content = bytearray(size)
        content[position] = 1
        path.write_bytes(content)
        assert content_digest(path) != plain
    path.write_bytes(bytes(size + 1))
    assert content_digest(path) != plain
