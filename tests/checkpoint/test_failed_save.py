"""A save that fails on one rank: every rank says the same line, nothing is published, nothing is
left behind."""

import re
import resource
from pathlib import Path

import cases
import pytest
import torch

from trivium.checkpoint.manifest import CheckpointError
from trivium.checkpoint.publish import published_iterations
from trivium.checkpoint.save import save
from trivium.layout import Piece
from trivium.mesh import Mesh
from trivium.testing import run_ranks


def save_with_a_small_limit(mesh: Mesh, save_dir: Path, failing: int) -> str:
    """Rank `failing` may write files of 1 kB at most, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if mesh.rank == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        tensor = torch.zeros(1000)
        box = ((1000 * mesh.rank, 1000 * (mesh.rank + 1)),)
        pieces = [Piece("t", (2000,), box, tensor)]
        save(save_dir, 200, pieces, state={}, config_yaml="", world=mesh.world, device=cases.CPU)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "published"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_stops_all_and_publishes_nothing(tmp_path, failing):
    cases.write(tmp_path, 100, 1)
    results = run_ranks(2, save_with_a_small_limit, tmp_path, failing)
    assert results[0] == results[1] and "\n" not in results[0]
    assert (
        f"shard_{failing:05d}.safetensors cannot be written" in results[0]
        and "too large" in results[0].lower()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000100",
        "latest_checkpointed_iteration.txt",
    ]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "100"
    assert run_ranks(2, save_with_a_small_limit, tmp_path, 2) == ["published"] * 2


def save_in_two_minds(mesh: Mesh, save_dir: Path, what: str) -> str:
    """Two ranks that do not agree on what they own."""
    rows = {
        "both": (0, 4),
        "gap": (0, 1 + mesh.rank),
        "shape": (2 * mesh.rank, 2 * mesh.rank + 2),
        "dtype": (2 * mesh.rank, 2 * mesh.rank + 2),
    }[what]
    height = 4 + mesh.rank if what == "shape" else 4
    tensor = torch.zeros(
        rows[1] - rows[0], dtype=torch.float64 if what == "dtype" and mesh.rank else torch.float32
    )
    try:
        save(
            save_dir,
            1,
            [Piece("t", (height,), (rows,), tensor)],
            state={},
            config_yaml="",
            world=mesh.world,
            device=cases.CPU,
        )
    except CheckpointError as error:
        return str(error)
    return "published"


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("both", "hold 8 .* 4"),
        ("gap", "hold 3 .* 4"),
        ("shape", r"\[4\].*\[5\]"),
        ("dtype", "float32.*float64"),
    ],
)
def test_ranks_that_disagree_publish_nothing(tmp_path, what, reason):
    results = run_ranks(2, save_in_two_minds, tmp_path, what)
    assert results[0] == results[1] and re.search(reason, results[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        (
            Piece("t", (4,), ((0, 4),), torch.zeros(4, dtype=torch.complex64)),
            "t is torch.complex64",
        ),
        (Piece("t", (4,), ((0, 4),), torch.zeros(3)), r"t: a tensor of shape \[3\]"),
        (Piece("t", (4,), ((2, 6),), torch.zeros(4)), "outside its shape"),
    ],
    ids=["dtype", "box and tensor differ", "outside"],
)
def test_a_piece_that_makes_no_sense_is_refused(tmp_path, piece, reason):
    with pytest.raises(CheckpointError, match=reason):
        save(tmp_path, 1, [piece], state={}, config_yaml="", world=cases.ALONE, device=cases.CPU)
    assert published_iterations(tmp_path) == []


def test_state_that_is_not_json_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save(
            tmp_path,
            1,
            [],
            state={"generator": object()},
            config_yaml="",
            world=cases.ALONE,
            device=cases.CPU,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_save_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "save").write_text("")
    with pytest.raises(CheckpointError, match="save"):
        cases.write(tmp_path / "save", 1, 1)
