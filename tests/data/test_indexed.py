"""The .bin/.idx pair: bytes as specified, and one clear line for each way in which a pair can be
broken."""

import os
import pickle
import struct

import numpy as np
import pytest

from trivium.data import indexed
from trivium.data.errors import DataError
from trivium.data.indexed import HEADER, IndexedDataset, IndexedDatasetWriter, best_dtype

DOCUMENTS = [[5, 6, 7], [], [8], [9, 10, 11, 12]]


@pytest.fixture
def prefix(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    return tmp_path / "data"


def patch(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_the_bytes_are_those_of_the_format(prefix):
    index = (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 3, 5)
        + struct.pack("<3i3q5q", 3, 1, 4, 0, 6, 8, 0, 1, 1, 2, 3)
    )
    assert prefix.with_suffix(".idx").read_bytes() == index
    assert prefix.with_suffix(".bin").read_bytes() == struct.pack("<8H", 5, 6, 7, 8, 9, 10, 11, 12)


def test_reading_gives_what_was_written(prefix):
    data = IndexedDataset(prefix)
    assert (
        data.dtype == np.uint16
        and data.num_sequences == 3
        and data.num_documents == 4
        and data.num_tokens() == 8
    )
    assert [data.get(i).tolist() for i in range(3)] == [
        document for document in DOCUMENTS if document
    ]
    assert data.get(2, 1, 2).tolist() == [10, 11] and data.get(2, offset=3).tolist() == [12]


def test_an_unpickled_dataset_maps_the_files_again(prefix):
    data = pickle.dumps(IndexedDataset(prefix))
    assert len(data) < 500
    assert pickle.loads(data).get(2).tolist() == [9, 10, 11, 12]


def test_a_sequence_knows_its_document(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document([])
        writer.add_sequences([1, 2, 3, 4, 5], [2, 3])
        writer.add_document([])
        writer.add_document([6])
    data = IndexedDataset(tmp_path / "data")
    assert [data.document_of(i) for i in range(3)] == [(1, 0), (1, 2), (3, 0)]


def test_documents_added_together_are_documents_added_one_by_one(prefix, tmp_path):
    with IndexedDatasetWriter(tmp_path / "other", np.uint16) as writer:
        writer.add_documents([5, 6, 7], [3, 0])
        writer.add_documents([], [])
        writer.add_documents([8, 9, 10, 11, 12], [1, 4])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"other{suffix}").read_bytes() == prefix.with_suffix(suffix).read_bytes()


def test_a_merged_dataset_holds_all_documents_in_order(prefix, tmp_path):
    with IndexedDatasetWriter(tmp_path / "merged", np.uint16) as writer:
        writer.add_index(prefix)
        writer.add_document([1])
        writer.add_index(prefix)
    data = IndexedDataset(tmp_path / "merged")
    assert [data.get(i).tolist() for i in range(7)] == [
        *DOCUMENTS[:1],
        *DOCUMENTS[2:],
        [1],
        *DOCUMENTS[:1],
        *DOCUMENTS[2:],
    ]
    assert data.document_indices.tolist() == [0, 1, 1, 2, 3, 4, 5, 5, 6, 7]


def test_merging_another_dtype_is_an_error(prefix, tmp_path):
    message = r"data\.idx: its ids are uint16, those of .*merged int32"
    with (
        pytest.raises(DataError, match=message),
        IndexedDatasetWriter(tmp_path / "merged", np.int32) as writer,
    ):
        writer.add_index(prefix)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, np.uint16), (65499, np.uint16), (65500, np.int32), (200_000, np.int32)],
)
def test_the_dtype_follows_the_vocabulary(vocab_size, dtype):
    assert best_dtype(vocab_size) == dtype


@pytest.mark.parametrize(
    ("dtype", "token"), [(np.uint16, 65536), (np.uint16, -1), (np.int32, 2**31)]
)
def test_an_id_that_does_not_fit_is_an_error_and_nothing_is_left(dtype, token, tmp_path):
    with (
        pytest.raises(DataError, match=rf"token id {token} does not fit"),
        IndexedDatasetWriter(tmp_path / "data", dtype) as writer,
    ):
        writer.add_document([1, token])
    assert os.listdir(tmp_path) == []


def test_a_writer_that_dies_leaves_the_older_pair(prefix, tmp_path):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document([1, 2, 3])
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(indexed, "_sync_and_close", full)
    with (
        pytest.raises(OSError, match="No space"),
        IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer,
    ):
        writer.add_document([1])
    assert os.listdir(tmp_path) == []


def test_a_writer_that_dies_between_the_two_files_leaves_no_index_of_another_bin(
    prefix, monkeypatch
):
    def die(source, target, replace=os.replace):
        if str(target).endswith(".idx"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(indexed.os, "replace", die)
    with pytest.raises(OSError, match="Input"), IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document([0] * 8)
    with pytest.raises(DataError, match=r"data\.idx: no such file"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: os.remove(p.with_suffix(".bin")), r"data\.bin: no such file"),
        (lambda p: os.remove(p.with_suffix(".idx")), r"data\.idx: no such file"),
        (
            lambda p: os.truncate(p.with_suffix(".bin"), 14),
            r"data\.bin: truncated: 14 bytes, 16 by data\.idx",
        ),
        (
            lambda p: patch(p.with_suffix(".bin"), 16, b"\0\0"),
            r"data\.bin: longer than its index: 18 bytes, 16",
        ),
        (
            lambda p: os.truncate(p.with_suffix(".idx"), 20),
            r"data\.idx: 20 bytes are too few for the header of 34",
        ),
        (
            lambda p: os.truncate(p.with_suffix(".idx"), 109),
            r"data\.idx: truncated: 109 bytes, 110 for the 3 sequences",
        ),
        (
            lambda p: patch(p.with_suffix(".idx"), 110, b"\0"),
            r"data\.idx: too long: 111 bytes, 110",
        ),
        (lambda p: patch(p.with_suffix(".idx"), 0, b"PK"), r"data\.idx: not an index of a \.bin"),
        (lambda p: patch(p.with_suffix(".idx"), 9, b"\2"), r"data\.idx: version 2 at byte 9"),
        (lambda p: patch(p.with_suffix(".idx"), 17, b"\7"), r"data\.idx: dtype code 7 at byte 17"),
        (
            lambda p: patch(p.with_suffix(".idx"), 17, b"\x09"),
            r"data\.idx: dtype code 9 at byte 17",
        ),
        (
            lambda p: patch(p.with_suffix(".idx"), HEADER.size, struct.pack("<i", -3)),
            r"data\.idx: sequence 0 has length -3",
        ),
        (
            lambda p: patch(p.with_suffix(".idx"), HEADER.size + 12, struct.pack("<q", 12)),
            r"data\.idx: sequence 0 lies outside the 16 bytes",
        ),
        (
            lambda p: patch(p.with_suffix(".idx"), HEADER.size + 36 + 8, struct.pack("<q", 2)),
            r"data\.idx: its document index falls after document 1",
        ),
        (
            lambda p: patch(p.with_suffix(".idx"), HEADER.size + 36 + 32, struct.pack("<q", 4)),
            r"does not run from 0 to its 3 sequences",
        ),
    ],
)
def test_a_damaged_pair_is_named_in_one_line(damage, message, prefix):
    damage(prefix)
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(prefix)
    assert "\n" not in str(caught.value)


def test_an_empty_dataset_is_an_error_unless_allowed(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document([])
    with pytest.raises(DataError, match="an empty dataset: 1 documents without a token"):
        IndexedDataset(tmp_path / "data")
    assert IndexedDataset(tmp_path / "data", allow_empty=True).num_documents == 1


def test_offsets_beyond_4_gigabytes_are_read_and_written(tmp_path):
    lengths = np.full(3, 2**30, np.int32)
    assert indexed._pointers(lengths, 4).tolist() == [0, 2**32, 2**33]
    assert indexed._pointers(np.empty(0, np.int32), 4).tolist() == []


def test_the_identity_is_of_the_content_alone(prefix, tmp_path):
    before = IndexedDataset(prefix).identity
    for suffix in (".bin", ".idx"):
        prefix.with_suffix(suffix).rename(tmp_path / f"moved{suffix}")
        os.utime(tmp_path / f"moved{suffix}", (1, 1))
    assert IndexedDataset(tmp_path / "moved").identity == before
    patch(tmp_path / "moved.bin", 4, b"\xff")
    assert IndexedDataset(tmp_path / "moved").identity != before
