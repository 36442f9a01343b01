"""Manifests: one that lies about files, shapes or cover is refused by name, and none leads out of
its folder."""

import json
from pathlib import Path

import cases
import pytest

from trivium.checkpoint.manifest import CheckpointError, Entry, Manifest, Slice

SHARD = "shard_00000.safetensors"


def edit(path: Path, tensor: str, **changes) -> None:
    """Change fields of one tensor, or of its first slice where the name begins with slice_."""
    tree = json.loads(path.read_text())
    for field, value in changes.items():
        target = tree[tensor]["slices"][0] if field.startswith("slice_") else tree[tensor]
        target[field.removeprefix("slice_")] = value
    path.write_text(json.dumps(tree))


LIES = [
    {"slice_file": "../iter_0000100/" + SHARD},
    {"slice_file": "/etc/passwd"},
    {"slice_file": ".."},
    {"slice_file": ""},
    {"slice_file": "a\\b"},
    {"slice_file": 3},
    {"slice_offsets": [-1, 0]},
    {"slice_offsets": [1, 0]},
    {"slice_offsets": [0]},
    {"slice_offsets": [0.0, 0]},
    {"slice_offsets": [False, 0]},
    {"slice_shape": [17, 12]},
    {"slice_shape": [15, 12]},
    {"slice_shape": "16"},
    {"slice_checksum": "md5:0"},
    {"slice_checksum": None},
    {"slice_key": None},
    {"shape": [16, 13]},
    {"shape": [16, -12]},
    {"shape": [16, 12, 1]},
    {"shape": None},
    {"dtype": "float8"},
    {"dtype": ["float32"]},
    {"slices": []},
    {"slices": {}},
    {"slices": [None]},
    {"extra": 1},
]


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_lying_manifest_is_refused_by_name(save_dir, lie):
    path = save_dir / "iter_0000200" / "manifest.json"
    edit(path, "q", **lie)
    with pytest.raises(CheckpointError, match=r"manifest\.json.* q") as refusal:
        cases.read(save_dir, 200)
    assert "\n" not in str(refusal.value)


def of_slices(*boxes: tuple[tuple[int, ...], tuple[int, ...]], shape=(4, 6)) -> Manifest:
    return Manifest(
        {
            "t": Entry(
                shape,
                "float32",
                tuple(
                    Slice("f", str(i), at, size, "crc32:00000000")
                    for i, (at, size) in enumerate(boxes)
                ),
            )
        }
    )


def test_cover_is_exact_not_only_by_count():
    where = Path("manifest.json")
    of_slices(((0, 0), (2, 6)), ((2, 0), (2, 3)), ((2, 3), (2, 3))).check_cover(where)
    of_slices(((), ()), shape=()).check_cover(where)
    with pytest.raises(CheckpointError, match="overlap"):
        of_slices(((0, 0), (2, 6)), ((1, 0), (2, 6))).check_cover(where)
    with pytest.raises(CheckpointError, match="overlap"):
        of_slices(
            ((0, 0), (4, 2)),
            ((0, 3), (4, 2)),
            ((1, 4), (2, 2)),
            ((3, 5), (1, 1)),
            ((0, 5), (1, 1)),
            ((0, 2), (2, 1)),
        ).check_cover(where)
    with pytest.raises(CheckpointError, match=r"18 elements.* 24"):
        of_slices(((0, 0), (3, 6))).check_cover(where)


def test_the_manifest_comes_back_as_it_was_written(tmp_path):
    cases.write(tmp_path, 100, 1)
    path = tmp_path / "iter_0000100" / "manifest.json"
    manifest = Manifest.read(path)
    (tmp_path / "again.json").write_text(manifest.text())
    assert (
        Manifest.read(tmp_path / "again.json") == manifest
        and (tmp_path / "again.json").read_text() == path.read_text()
    )
