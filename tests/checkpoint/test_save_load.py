"""Checkpoints: what one layout wrote another reads bit for bit, and what is damaged, foreign or a
lie is refused by name."""

import pickle
from pathlib import Path

import cases
import pytest
import torch
from safetensors.torch import load_file, save_file

from trivium.checkpoint.load import NothingPublished, open_checkpoint, verify
from trivium.checkpoint.manifest import CheckpointError, Manifest
from trivium.checkpoint.save import save
from trivium.layout import Piece
from trivium.mesh import Axis, Mesh
from trivium.testing import run_ranks

SHARD = "shard_00000.safetensors"


def write_on_ranks(mesh: Mesh, save_dir: Path, iteration: int, seed: int) -> None:
    cases.write(save_dir, iteration, seed, mesh)


def read_on_ranks(mesh: Mesh, load_dir: Path, seed: int) -> tuple[int, dict, str, list[str]]:
    checkpoint = open_checkpoint(load_dir, world=mesh.world, device=cases.CPU)
    return (
        checkpoint.iteration,
        checkpoint.state,
        checkpoint.config_yaml,
        cases.differences(checkpoint, seed, mesh.tp),
    )


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (1, 2), (2, 1), (4, 2), (2, 4)])
def test_what_one_layout_wrote_another_reads(tmp_path, writers, readers):
    run_ranks(writers, write_on_ranks, tmp_path, 100, 5, tp=writers)
    assert (
        run_ranks(readers, read_on_ranks, tmp_path, 5, tp=readers)
        == [(100, cases.state(100, 5), "seed: 5\n", [])] * readers
    )


def test_the_manifest_does_not_depend_on_the_layout(tmp_path):
    run_ranks(1, write_on_ranks, tmp_path / "one", 1, 5)
    run_ranks(4, write_on_ranks, tmp_path / "four", 1, 5, tp=4)
    one, four = (
        Manifest.read(tmp_path / name / "iter_0000001" / "manifest.json").tensors
        for name in ("one", "four")
    )
    assert {name: (entry.shape, entry.dtype) for name, entry in one.items()} == {
        name: (entry.shape, entry.dtype) for name, entry in four.items()
    }
    assert [len(four[name].slices) for name in ("q", "o", "words", "norm", "steps")] == [
        4,
        4,
        4,
        1,
        1,
    ]


@pytest.mark.parametrize("boxes", [1, 3])
def test_flat_shards_of_an_optimizer_reshard(tmp_path, boxes):
    """A flat range of a matrix is at most three boxes: the end of a row, whole rows, the start of a
    row."""
    tensor = torch.arange(35.0).view(5, 7)
    cuts = (
        [((0, 5), (0, 7))]
        if boxes == 1
        else [
            ((0, 1), (0, 3)),
            ((0, 1), (3, 7)),
            ((1, 4), (0, 7)),
            ((4, 5), (0, 2)),
            ((4, 5), (2, 7)),
        ]
    )
    pieces = [Piece("m", (5, 7), box, tensor[slice(*box[0]), slice(*box[1])]) for box in cuts]
    save(
        tmp_path,
        1,
        pieces,
        state=cases.state(1, 5),
        config_yaml="",
        world=cases.ALONE,
        device=cases.CPU,
    )
    checkpoint = cases.read(tmp_path)
    assert torch.equal(checkpoint.read("m"), tensor)
    assert torch.equal(checkpoint.read("m", ((0, 3), (2, 5))), tensor[:3, 2:5])


def test_shards_split_at_the_limit(tmp_path):
    cases.write(tmp_path, 1, 5, max_shard_bytes=800)
    files = sorted(path.name for path in (tmp_path / "iter_0000001").glob("*.safetensors"))
    assert (
        files[:2] == ["shard_00000.safetensors", "shard_00000_0001.safetensors"] and len(files) > 2
    )
    assert all(
        sum(t.nbytes for t in load_file(tmp_path / "iter_0000001" / file).values()) <= 800
        for file in files
    )
    assert cases.differences(cases.read(tmp_path), 5) == []


def test_tensors_are_converted_to_the_readers_dtype(tmp_path):
    cases.write(tmp_path, 1, 5)
    narrow = torch.zeros(16, 12, dtype=torch.bfloat16, requires_grad=True)
    cases.read(tmp_path).read_into([Piece("q", (16, 12), ((0, 16), (0, 12)), narrow)])
    assert torch.equal(narrow, cases.whole("q", 5).bfloat16())


def test_views_of_one_storage_and_strided_views_are_saved(tmp_path):
    flat = torch.arange(24.0)
    pieces = [
        Piece("a", (2, 3), ((0, 2), (0, 3)), flat[:6].view(2, 3)),
        Piece("b", (3, 6), ((0, 3), (0, 6)), flat[6:].view(6, 3).t()),
    ]
    save(
        tmp_path,
        1,
        pieces,
        state=cases.state(1, 5),
        config_yaml="",
        world=cases.ALONE,
        device=cases.CPU,
    )
    checkpoint = cases.read(tmp_path)
    assert torch.equal(checkpoint.read("a"), flat[:6].view(2, 3)) and torch.equal(
        checkpoint.read("b"), flat[6:].view(6, 3).t()
    )
    assert (
        checkpoint.names() == ["a", "b"]
        and checkpoint.shape("b") == (3, 6)
        and checkpoint.dtype("b") == torch.float32
    )


def test_what_is_read_outlives_the_file(tmp_path):
    cases.write(tmp_path, 1, 5)
    tensor = cases.read(tmp_path).read("q")
    path = tmp_path / "iter_0000001" / SHARD
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(tensor, cases.whole("q", 5))


# --- damage: each is done to iteration 200 of a run that also published 100 ---


def truncate(folder: Path) -> None:
    with open(folder / SHARD, "r+b") as file:
        file.truncate(file.seek(0, 2) - 1)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[-1] ^= 1
    (folder / SHARD).write_bytes(data)


def replace_by_pickle(folder: Path) -> None:
    (folder / SHARD).write_bytes(pickle.dumps({"q": list(range(1000))}))


def replace_by_another(folder: Path) -> None:
    """A whole shard of another run, with every tensor where the manifest looks for it."""
    save_file(
        {key: tensor + 1 for key, tensor in load_file(folder / SHARD).items()}, folder / SHARD
    )


def store_another_dtype(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    save_file(
        {key: t.view(torch.int32) if t.dtype == torch.float32 else t for key, t in tensors.items()},
        folder / SHARD,
    )


def store_another_shape(folder: Path) -> None:
    save_file(
        {key: tensor.reshape(-1) for key, tensor in load_file(folder / SHARD).items()},
        folder / SHARD,
    )


def drop_a_tensor(folder: Path) -> None:
    save_file(
        {key: tensor for key, tensor in load_file(folder / SHARD).items() if key != "q@0,0"},
        folder / SHARD,
    )


def remove(name: str):
    return lambda folder: (folder / name).unlink()


DAMAGES = {
    "truncated shard": (truncate, SHARD),
    "flipped bit": (flip_a_bit, "damaged"),
    "pickle": (replace_by_pickle, SHARD),
    "another run's shard": (replace_by_another, "damaged"),
    "another dtype": (store_another_dtype, "the manifest says"),
    "another shape": (store_another_shape, "the manifest says"),
    "absent tensor": (drop_a_tensor, "q@0,0"),
    "missing shard": (remove(SHARD), f"{SHARD} is missing"),
    "missing manifest": (remove("manifest.json"), "manifest.json is missing"),
    "missing state": (remove("state.json"), "state.json is missing"),
    "missing configuration": (remove("config.yaml"), "config.yaml is missing"),
    "half a manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"q": {"shape"'),
        "is not JSON",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_damage_falls_back_to_the_older_and_says_why(save_dir, damage, reason):
    damage(save_dir / "iter_0000200")
    with cases.warnings() as lines:
        checkpoint = cases.read(save_dir)
    assert checkpoint.iteration == 100 and cases.differences(checkpoint, 1) == []
    (line,) = lines
    assert (
        reason in line
        and "iter_0000200" in line
        and line.endswith("falling back to iteration 100")
        and "\n" not in line
    )


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_damage_of_what_was_asked_for_is_an_error(save_dir, damage, reason):
    damage(save_dir / "iter_0000200")
    for load_dir, step in ((save_dir, 200), (save_dir / "iter_0000200", None)):
        with pytest.raises(CheckpointError, match=reason.replace(".", r"\.")):
            cases.read(load_dir, step)


def test_all_damaged_is_an_error(save_dir):
    for name in ("iter_0000100", "iter_0000200"):
        flip_a_bit(save_dir / name)
    with pytest.raises(CheckpointError, match=r"iter_0000100.*damaged"):
        cases.read(save_dir)


def read_after_damage(mesh: Mesh, load_dir: Path) -> tuple[int, list[str]]:
    with cases.warnings() as lines:
        return open_checkpoint(load_dir, world=mesh.world, device=cases.CPU).iteration, lines


def test_every_slice_is_verified_by_some_rank_and_all_ranks_fall_back_together(tmp_path):
    """Damage in turn the shard of each writer: whichever rank finds it, all go back and one says
    so."""
    run_ranks(2, write_on_ranks, tmp_path, 100, 1, tp=2)
    run_ranks(2, write_on_ranks, tmp_path, 200, 2, tp=2)
    for name in ("shard_00000.safetensors", "shard_00001.safetensors"):
        path = tmp_path / "iter_0000200" / name
        sound = path.read_bytes()
        path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        results = run_ranks(3, read_after_damage, tmp_path)
        path.write_bytes(sound)
        assert [iteration for iteration, _ in results] == [100] * 3
        assert [len(lines) for _, lines in results] == [1, 0, 0] and name in results[0][1][0]


def test_each_slice_is_verified_once_over_all_ranks(save_dir, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "trivium.checkpoint.load._verify_slice",
        lambda shard, path, stored, dtype: seen.append(stored.key),
    )
    folder = save_dir / "iter_0000200"
    manifest = Manifest.read(folder / "manifest.json")
    for size in (1, 2, 3, 50):
        seen.clear()
        for rank in range(size):
            verify(folder, manifest, rank, size)
        assert sorted(seen) == sorted(
            piece.key for entry in manifest.tensors.values() for piece in entry.slices
        ), size
    seen.clear()
    verify(folder, manifest, 1, 2)
    assert 0 < len(seen) < len(manifest.tensors), "the second of two ranks has its share"


# --- a reader that asks for what is not there ---


def test_missing_tensors_and_other_shapes_are_named(tmp_path):
    cases.write(tmp_path, 1, 5)
    checkpoint = cases.read(tmp_path)
    with pytest.raises(CheckpointError, match="has no tensor nowhere"):
        checkpoint.read("nowhere")
    untouched = torch.zeros(16, 12)
    wrong = Piece("o", (12, 20), ((0, 12), (0, 20)), torch.zeros(12, 20))
    with pytest.raises(CheckpointError, match=r"o is \[12, 16\] in .*, \[12, 20\] in this run"):
        checkpoint.read_into([Piece("q", (16, 12), ((0, 16), (0, 12)), untouched), wrong])
    assert (untouched == 0).all(), "nothing is applied where something is wrong"
    with pytest.raises(CheckpointError, match=r"q: .*holds 0 of the 12"):
        checkpoint.read("q", ((16, 17), (0, 12)))


def test_nothing_published_is_its_own_error(tmp_path):
    for load_dir in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NothingPublished, match="no published checkpoint"):
            cases.read(load_dir)


def never_published(mesh: Mesh, load_dir: Path) -> str:
    try:
        open_checkpoint(load_dir, world=mesh.world, device=cases.CPU)
    except NothingPublished:
        return "nothing"
    return "something"


def test_nothing_published_is_known_to_all_ranks(tmp_path):
    assert run_ranks(2, never_published, tmp_path) == ["nothing"] * 2


def test_a_world_of_one_needs_no_process_group(tmp_path):
    cases.write(tmp_path, 1, 5)
    assert open_checkpoint(tmp_path, world=Axis("world"), device=cases.CPU).iteration == 1
    assert not torch.distributed.is_initialized()
