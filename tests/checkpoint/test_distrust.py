"""Checkpoints made to do harm, or by nobody: each is refused in one line that names the file,
before anything is applied."""

import json
import os
import pickle
from pathlib import Path

import cases
import pytest
from safetensors.torch import load_file, save_file

from trivium.checkpoint.manifest import CheckpointError

SHARD = "shard_00000.safetensors"


class Exploit:
    """What unpickling this does is seen."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def refused(save_dir: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        cases.read(save_dir, 200)
    line = str(refusal.value)
    assert "\n" not in line and len(line) < 1000 and all(word in line for word in words), line


@pytest.fixture
def folder(save_dir) -> Path:
    return save_dir / "iter_0000200"


def test_a_pickle_in_place_of_a_shard_is_not_loaded(save_dir, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / SHARD).write_bytes(pickle.dumps({"q": Exploit()}))
    refused(save_dir, SHARD, "cannot be read")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("name", [SHARD, "manifest.json", "state.json", "config.yaml"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_what_is_no_file_of_the_folder_is_not_opened(save_dir, folder, tmp_path, name, kind):
    """A link out of the folder, even to the right bytes, tells of files elsewhere; a pipe without a
    writer would be read for ever."""
    (folder / name).rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(tmp_path / ("elsewhere" if kind == "link" else "absent"))
    refused(save_dir, f"{folder / name} is {'a symbolic link' if 'link' in kind else 'no file'}")


def edit_shard(path: Path, change) -> None:
    """Put another header before the bytes of a shard."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


HEADERS = {
    "a shape of more bytes than there are": lambda header: header["q@0,0"].update(
        shape=[1 << 40, 1 << 20]
    ),
    "a shape that overflows": lambda header: header["q@0,0"].update(shape=[1 << 63, 1 << 63]),
    "bytes behind the end": lambda header: header["q@0,0"].update(
        data_offsets=[1 << 40, (1 << 40) + 768]
    ),
    "negative bytes": lambda header: header["q@0,0"].update(data_offsets=[768, 0]),
    "a dtype of its own": lambda header: header["q@0,0"].update(dtype="OBJECT"),
    "another dtype of the same size": lambda header: header["q@0,0"].update(dtype="I32"),
    "the same bytes in another shape": lambda header: header["q@0,0"].update(shape=[12, 16]),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_shard_that_lies_about_a_tensor_is_refused(save_dir, folder, change):
    edit_shard(folder / SHARD, change)
    refused(save_dir, SHARD)


@pytest.mark.parametrize("length", [0, 1, (1 << 63) - 1, (1 << 64) - 1, 100_000_001])
def test_a_header_of_any_length_is_refused(save_dir, folder, length):
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(length.to_bytes(8, "little") + data[8:])
    refused(save_dir, SHARD)


def test_a_manifest_and_a_shard_that_agree_on_a_lie_are_refused_by_the_sum_of_the_bytes(
    save_dir, folder
):
    tensors = load_file(folder / SHARD)
    save_file({key: tensor * 0 for key, tensor in tensors.items()}, folder / SHARD)
    refused(save_dir, SHARD, "damaged")


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        "nan",
        "[" * 100_000,
        "1" * 5000,
        '{"iteration": ' + "9" * 5000 + "}",
        "\udcff",
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_json_object_is_refused(save_dir, folder, name, text):
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(save_dir, name)


ABSURD = {
    "iteration": [-200, 200.0, "200", None, True, [200], 10**30, 300],
    "consumed_samples": [-1, 1.5, None, 10**30, {}],
    "consumed_tokens": [-1, None, 2**53 + 1],
    "data_samples": [-1, 0.5, "1", 10**30],
    "optimizer_steps": [-1, None, 1e300, "many"],
    "vocab_size": [0, -1, None, 13.0, True],
    "loss_scale": [None, 1.0, [], {}, {"dynamic": 1}],
    "random": [None, {"seed": -1}, {"seed": "1234"}, {}],
    "fingerprints": [None, [], {"tokenizer": "t"}, {"tokenizer": 1, "data": "d"}],
    "validation_loss": ["2.5", float("nan"), float("inf"), True, []],
    "persistent": [0, 1, "false"],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in ABSURD.items() for value in values],
    ids=str,
)
def test_absurd_numbers_in_the_state_are_refused_by_name(save_dir, folder, field, value):
    (folder / "state.json").write_text(json.dumps(cases.state(200, 2) | {field: value}))
    refused(save_dir, "state.json", field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", 0),
        ("scale", -1.0),
        ("scale", float("inf")),
        ("good_updates", -1),
        ("bad_updates_left", 0.5),
    ],
)
def test_absurd_numbers_in_the_loss_scale_are_refused_by_name(save_dir, folder, field, value):
    state = cases.state(200, 2)
    state["loss_scale"][field] = value
    (folder / "state.json").write_text(json.dumps(state))
    refused(save_dir, "state.json", "loss_scale", field)


def test_a_state_of_an_earlier_version_is_read(save_dir, folder):
    state = cases.state(200, 2)
    for name in ("data_samples", "validation_loss", "persistent"):
        del state[name]
    (folder / "state.json").write_text(json.dumps(state))
    assert cases.read(save_dir, 200).state == state


def test_an_absurd_state_falls_back_to_the_older(save_dir, folder):
    (folder / "state.json").write_text(json.dumps(cases.state(200, 2, consumed_samples=-8)))
    with cases.warnings() as lines:
        assert cases.read(save_dir).iteration == 100
    assert len(lines) == 1 and "consumed_samples is -8" in lines[0]
