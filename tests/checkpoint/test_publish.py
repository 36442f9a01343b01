"""Publishing: at whatever moment a run dies, what bears a published name is whole, and the next
start finds it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cases
import pytest

from trivium.checkpoint import publish
from trivium.checkpoint.load import NothingPublished
from trivium.checkpoint.manifest import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"


def names(save_dir: Path) -> list[str]:
    return sorted(path.name for path in save_dir.iterdir())


def make(save_dir: Path, *iterations: int, tracker: str | None = None) -> None:
    """Published folders with a manifest each, which is all that publish.py looks at."""
    for n in iterations:
        folder = save_dir / f"iter_{n:07d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    if tracker is not None:
        (save_dir / TRACKER).write_text(tracker)


def test_a_save_leaves_the_folders_of_the_contract(tmp_path):
    cases.write(tmp_path, 100, 1)
    cases.write(tmp_path, 12345678, 2)
    assert names(tmp_path) == ["iter_0000100", "iter_12345678", TRACKER]
    assert names(tmp_path / "iter_0000100") == [
        "config.yaml",
        "manifest.json",
        "shard_00000.safetensors",
        "state.json",
    ]
    assert (tmp_path / TRACKER).read_text() == "12345678"
    assert json.loads((tmp_path / "iter_0000100" / "state.json").read_text())["iteration"] == 100
    assert (
        publish.published_iterations(tmp_path) == [100, 12345678]
        and publish.tracked_iteration(tmp_path) == 12345678
    )


# --- which to load ---


def test_the_tracker_decides_then_the_older_ones(tmp_path):
    make(tmp_path, 100, 200, 300, tracker="200\n")
    assert publish.candidates(tmp_path) == [200, 100]


def test_without_a_tracker_the_newest_counts(tmp_path):
    make(tmp_path, 300, 100, 12345678)
    assert publish.candidates(tmp_path) == [12345678, 300, 100]


@pytest.mark.parametrize("text", ["250", "release", ""])
def test_a_tracker_that_names_nothing_there_is_warned_of(tmp_path, text):
    make(tmp_path, 100, 200, tracker=text)
    with cases.warnings() as lines:
        assert publish.candidates(tmp_path) == [200, 100]
    assert len(lines) == 1 and TRACKER in lines[0] and "iteration 200" in lines[0]


def test_a_tracker_without_any_folder_is_an_error_not_a_fresh_start(tmp_path):
    make(tmp_path, tracker="100")
    with pytest.raises(CheckpointError, match="100") as refusal:
        publish.candidates(tmp_path)
    assert not isinstance(refusal.value, NothingPublished)


def test_an_explicit_step_or_folder_stands_alone(tmp_path):
    make(tmp_path, 100, 200, 300, tracker="300")
    assert publish.candidates(tmp_path, 200) == [200]
    assert publish.candidates(tmp_path / "iter_0000100") == [100]
    assert publish.candidates(tmp_path / "iter_0000100", 100) == [100]
    for load_dir, step, reason in (
        (tmp_path, 150, "no iteration 150; published: 100, 200, 300"),
        (tmp_path / "iter_0000150", None, "does not exist"),
        (tmp_path / "iter_0000100", 200, "holds iteration 100, not the 200"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            publish.candidates(load_dir, step)


def test_nothing_else_is_taken_for_a_checkpoint(tmp_path):
    make(tmp_path, 100)
    for name in (
        "iter_0000200.tmp",
        "iter_300",
        "iter_0000400.bak",
        "xiter_0000500",
        "iter_0000600.removed.tmp",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "iter_0000700").write_text("a file")
    assert publish.published_iterations(tmp_path) == [100]


def test_the_tracker_edited_back_resumes_there(tmp_path):
    for iteration, seed in ((100, 1), (200, 2), (300, 3)):
        cases.write(tmp_path, iteration, seed)
    (tmp_path / TRACKER).write_text("200\n")
    checkpoint = cases.read(tmp_path)
    assert checkpoint.iteration == 200 and cases.differences(checkpoint, 2) == []
    (tmp_path / TRACKER).unlink()
    assert cases.read(tmp_path).iteration == 300


def test_a_run_that_went_back_publishes_over_its_old_iteration(tmp_path):
    for iteration, seed in ((100, 1), (200, 2), (100, 3)):
        cases.write(tmp_path, iteration, seed)
    checkpoint = cases.read(tmp_path)
    assert checkpoint.iteration == 100 and cases.differences(checkpoint, 3) == []
    assert names(tmp_path) == ["iter_0000100", "iter_0000200", TRACKER]


# --- what a kill leaves ---


def test_the_next_save_removes_what_killed_runs_left_and_nothing_else(tmp_path):
    make(tmp_path, 100, tracker="100")
    for name in ("iter_0000200.tmp", "iter_0000300.removed.tmp", "notes.tmp", "wandb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / (TRACKER + ".tmp")).write_text("1")
    folder = publish.begin(tmp_path, 200)
    assert folder == tmp_path / "iter_0000200.tmp" and names(folder) == []
    assert names(tmp_path) == ["iter_0000100", "iter_0000200.tmp", TRACKER, "notes.tmp", "wandb"]


def test_death_at_every_rename_and_removal_of_a_publication_loses_nothing(tmp_path):
    """Publishing over iteration 100, stopped at the first, second, ...

    step that changes the folder: old or new, never neither.
    """
    found = []
    for step in range(100):
        save_dir = tmp_path / str(step)
        cases.write(save_dir, 50, 0)
        cases.write(save_dir, 100, 1)
        steps = (
            (Path, "rename"),
            (Path, "mkdir"),
            (Path, "unlink"),
            (Path, "write_text"),
            (publish.shutil, "rmtree"),
            (os, "fsync"),
        )
        killed = cases.killed_at(step, steps, partial(cases.write, save_dir, 100, 2))
        checkpoint = cases.read(save_dir)
        assert (
            checkpoint.iteration == 100
            and cases.differences(checkpoint, checkpoint.state["seed"]) == []
        )
        found.append(checkpoint.state["seed"])
        cases.write(save_dir, 150, 3)
        assert names(save_dir) == ["iter_0000050", "iter_0000100", "iter_0000150", TRACKER]
        assert cases.differences(cases.read(save_dir, 100), found[-1]) == []
        if not killed:
            break
    assert (
        not killed
        and found[0] == 1
        and found[-1] == 2
        and found == sorted(found)
        and len(found) > 10
    )


SAVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
import cases
iteration = 0
while True:
    iteration += 1
    cases.write(Path(sys.argv[1]), iteration % 5 + 1, iteration, max_shard_bytes=400)
    print(iteration, flush=True)
"""


def kill_while_saving(save_dir: Path, times: int, chance: random.Random) -> None:
    """Start a process that saves without pause over iterations 1 to 5, kill -9 it at a random
    moment, look at what is there."""
    for _ in range(times):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(save_dir), str(Path(cases.__file__).parent)],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            first = saver.stdout.readline()
            assert first == "1\n", "the saver did not start"
            time.sleep(chance.uniform(0.0, 0.1))
        finally:
            saver.send_signal(signal.SIGKILL)
            saver.wait()
            saver.stdout.close()
        published = publish.published_iterations(save_dir)
        assert published
        for iteration in published:
            checkpoint = cases.read(save_dir, iteration)
            assert (
                checkpoint.state["iteration"] == iteration
                and cases.differences(checkpoint, checkpoint.state["seed"]) == []
            )
        tracked = publish.tracked_iteration(save_dir)
        assert cases.read(save_dir).iteration == tracked


def test_killed_at_any_moment_what_is_published_verifies(tmp_path):
    kill_while_saving(tmp_path, 3, random.Random(1))


@pytest.mark.soak
def test_killed_sixty_times_what_is_published_verifies(tmp_path):
    kill_while_saving(tmp_path, 60, random.Random(2))
