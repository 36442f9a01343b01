"""Safetensors files written as a stream: what the format's own reader finds in them, and one line
where they cannot be written."""

import itertools
import json
import random
import resource
import subprocess
import sys
import weakref
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from trivium.checkpoint.manifest import DTYPES, CheckpointError
from trivium.checkpoint.serialize import Stored, write_shard
from trivium.checkpoint.shards import TORCH_DTYPES, host_bytes

WITHOUT_TORCH = ("manifest", "publish", "serialize", "state", "retention", "rank_files", "writer")


def stored(key: str, tensor: torch.Tensor) -> Stored:
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    return Stored(key, names[tensor.dtype], tuple(tensor.shape), partial(host_bytes, tensor))


def some_tensors() -> dict[str, torch.Tensor]:
    """Every dtype, in an order and of sizes that put all but the first at an odd byte if they were
    written as they come."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(3,), (), (5, 1, 7), (0, 4), (2, 3), (1,), (9,), (3, 3)]
    made = {}
    for (name, dtype), shape in zip(reversed(TORCH_DTYPES.items()), shapes, strict=True):
        made[name] = (torch.rand(shape, generator=generator) * 200).to(dtype)
    return made


def test_every_dtype_and_shape_comes_back_by_the_formats_own_reader(tmp_path):
    tensors = some_tensors()
    assert next(iter(tensors)) == "bool" and tensors["bool"].numel() == 3
    checksums = write_shard(
        tmp_path / "f", [stored(*item) for item in tensors.items()], {"format": "pt"}
    )
    with safe_open(tmp_path / "f", framework="pt") as file:
        assert sorted(file.keys()) == sorted(tensors) and file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    assert checksums == [
        f"crc32:{zlib.crc32(host_bytes(tensor)):08x}" for tensor in tensors.values()
    ]


@pytest.mark.parametrize("first", DTYPES)
def test_whatever_comes_first_each_tensor_lies_at_a_multiple_of_its_element(tmp_path, first):
    names = [first, *(name for name in DTYPES if name != first)]
    tensors = [
        Stored(name, name, (3,), partial(bytes, 3 * DTYPES[name].item_size)) for name in names
    ]
    write_shard(tmp_path / "f", tensors)
    data = (tmp_path / "f").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and all(
        header[name]["data_offsets"][0] % DTYPES[name].item_size == 0 for name in names
    )
    places = sorted(fields["data_offsets"] for fields in header.values())
    assert places[0][0] == 0 and places[-1][1] == len(data) - 8 - length, "no gap before or behind"
    assert all(a[1] == b[0] for a, b in itertools.pairwise(places)), "no gap between"


def test_one_tensor_at_a_time_is_held(tmp_path):
    """Each is asked for once, after the one before it was let go of."""
    made, asked = [], []

    def make(i: int) -> np.ndarray:
        assert all(array() is None for array in made), "the tensor before is still held"
        array = np.full(1000, i, np.uint8)
        made.append(weakref.ref(array))
        asked.append(i)
        return array

    write_shard(
        tmp_path / "f", [Stored(f"t{i}", "uint8", (1000,), partial(make, i)) for i in range(5)]
    )
    assert asked == list(range(5))


def test_large_tensors_are_summed_over_all_their_bytes(tmp_path):
    data = random.Random(1).randbytes(3_000_001)
    assert write_shard(tmp_path / "f", [Stored("t", "uint8", (3_000_001,), lambda: data)]) == [
        f"crc32:{zlib.crc32(data):08x}"
    ]


def test_no_tensor_at_all_is_a_file_too(tmp_path):
    assert write_shard(tmp_path / "f", []) == []
    with safe_open(tmp_path / "f", framework="pt") as file:
        assert list(file.keys()) == []


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (
            [Stored("t", "float32", (2,), lambda: bytes(7))],
            r"f: t gave 7 bytes, its shape \[2\] has 8",
        ),
        (
            [Stored("t", "uint8", (1,), lambda: b"a"), Stored("t", "uint8", (1,), lambda: b"b")],
            "two tensors are named t",
        ),
    ],
    ids=["bytes and shape differ", "one name twice"],
)
def test_tensors_that_make_no_sense_are_refused(tmp_path, tensors, reason):
    with pytest.raises(CheckpointError, match=reason):
        write_shard(tmp_path / "f", tensors)


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "f"


PLACES = {
    "full disk": (lambda folder: Path("/dev/full"), "No space left on device"),
    "read-only file system": (
        lambda folder: Path("/sys/kernel/f"),
        "Read-only file system|Operation not permitted|Permission denied",
    ),
    "below a file": (below_a_file, "Not a directory"),
    "no folder": (lambda folder: folder / "absent" / "f", "No such file or directory"),
}


@pytest.mark.parametrize(("place", "reason"), PLACES.values(), ids=PLACES)
def test_what_cannot_be_written_is_one_line_with_the_file(tmp_path, place, reason):
    path = place(tmp_path)
    with pytest.raises(CheckpointError, match=f"^{path} cannot be written: ({reason})$"):
        write_shard(path, [Stored("t", "uint8", (100_000,), lambda: bytes(100_000))])


def test_a_limit_of_the_file_size_is_one_line_too(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(CheckpointError, match="f cannot be written: File too large"):
            write_shard(tmp_path / "f", [Stored("t", "uint8", (100_000,), lambda: bytes(100_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_a_writer_needs_imports_no_torch():
    modules = ", ".join(f"trivium.checkpoint.{name}" for name in WITHOUT_TORCH)
    imported = "sorted({'torch', 'numpy', 'yaml', 'safetensors'} & set(sys.modules))"
    command = f"import sys, {modules}; print({imported})"
    assert (
        subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )
