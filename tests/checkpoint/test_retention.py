"""Retention: what was asked to stay stays, the newest and what the tracker names always, whenever
the run is killed."""

import json
import os
from pathlib import Path

import cases
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.checkpoint import publish, retention
from trivium.checkpoint.manifest import CheckpointError
from trivium.checkpoint.retention import Retention, retain

TRACKER = "latest_checkpointed_iteration.txt"


def make(
    save_dir: Path,
    *iterations: int,
    tracker: int | None = None,
    losses: dict | None = None,
    transient: tuple[int, ...] = (),
) -> Path:
    """Published folders with a manifest and a state, which is all that retention looks at."""
    for n in iterations:
        folder = save_dir / publish.folder_name(n)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "state.json").write_text(
            json.dumps({"validation_loss": (losses or {}).get(n), "persistent": n not in transient})
        )
    if tracker is not None:
        (save_dir / TRACKER).write_text(str(tracker))
    return save_dir


def left(save_dir: Path) -> list[int]:
    return publish.published_iterations(save_dir)


def test_it_keeps_the_newest_the_multiples_and_what_the_tracker_names(tmp_path):
    make(tmp_path, 100, 200, 300, 400, 500, 600, tracker=200)
    assert retain(tmp_path, Retention()) == []
    assert retain(tmp_path, Retention(keep_last=2, interval=300)) == [100, 400]
    assert left(tmp_path) == [200, 300, 500, 600]
    assert retain(tmp_path, Retention(keep_last=1)) == [300, 500]


def test_the_best_stay_and_those_without_a_loss_do_not_compete(tmp_path):
    losses = {100: 3.5, 200: 2.5, 300: None, 400: 2.25, 500: 2.75, 600: 9.0}
    make(tmp_path, *losses, 700, tracker=700, losses=losses)
    assert retain(tmp_path, Retention(keep_best=2)) == [100, 300, 500, 600]
    assert left(tmp_path) == [200, 400, 700]
    make(tmp_path, 800, tracker=800, losses={800: 2.4})
    assert retain(tmp_path, Retention(keep_best=2)) == [200, 700]


def test_of_equal_losses_the_newer_is_better(tmp_path):
    make(tmp_path, 100, 200, 300, tracker=300, losses={100: 2.0, 200: 2.0})
    assert retain(tmp_path, Retention(keep_best=1)) == [100]


@pytest.mark.parametrize("loss", ["NaN", "Infinity", '"1.0"', "true", "[]", "1e999"])
def test_a_loss_that_is_no_number_does_not_compete(tmp_path, loss):
    make(tmp_path, 100, 200, 300, tracker=300, losses={100: 5.0})
    (tmp_path / "iter_0000200/state.json").write_text(f'{{"validation_loss": {loss}}}')
    assert retain(tmp_path, Retention(keep_best=1)) == [200]


def test_a_state_that_cannot_be_read_is_neither_best_nor_transient(tmp_path):
    make(tmp_path, 100, 200, 300, tracker=300)
    (tmp_path / "iter_0000100/state.json").write_text("{")
    assert retain(tmp_path, Retention()) == []
    assert retain(tmp_path, Retention(keep_last=3)) == []


def test_one_that_is_not_persistent_goes_when_a_newer_one_is_there_and_counts_for_nothing(tmp_path):
    make(
        tmp_path,
        100,
        110,
        120,
        200,
        210,
        tracker=210,
        transient=(110, 120, 210),
        losses={120: 0.1, 210: 0.1},
    )
    assert retain(tmp_path, Retention()) == [110, 120]
    assert left(tmp_path) == [100, 200, 210]
    assert retain(tmp_path, Retention(keep_last=2, keep_best=1, interval=10)) == []
    make(tmp_path, 220, tracker=220, transient=(220,))
    assert retain(tmp_path, Retention(keep_last=1)) == [100, 210]
    assert left(tmp_path) == [200, 220], (
        "the last persistent one stays behind a newer one that is not"
    )


def test_it_neither_counts_nor_touches_what_is_not_published(tmp_path):
    make(tmp_path, 100, 200, 300, tracker=300)
    (tmp_path / "iter_0000400").mkdir()
    (tmp_path / "iter_0000500.tmp").mkdir()
    assert retain(tmp_path, Retention(keep_last=2)) == [100]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["iter_0000200", "iter_0000300", "iter_0000400", "iter_0000500.tmp", TRACKER]


@pytest.mark.parametrize("keep_last", [None, 0])
def test_the_newest_is_never_retired(tmp_path, keep_last):
    make(tmp_path, 100, 200, 250)
    assert retain(tmp_path, Retention(keep_last, interval=200)) == [100]


def test_a_linked_folder_is_retired_without_touching_its_target(tmp_path):
    make(tmp_path / "elsewhere", 100)
    make(tmp_path / "save", 200)
    (tmp_path / "save" / "iter_0000100").symlink_to(tmp_path / "elsewhere" / "iter_0000100")
    assert retain(tmp_path / "save", Retention(keep_last=1)) == [100]
    assert left(tmp_path / "save") == [200] and left(tmp_path / "elsewhere") == [100]


def test_one_that_cannot_be_removed_is_one_line(tmp_path, monkeypatch):
    make(tmp_path, 100, 200, tracker=200)

    def refuse(path):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(retention.publish, "remove", refuse)
    with pytest.raises(
        CheckpointError, match=r"an old checkpoint cannot be removed: .*not permitted.*iter_0000100"
    ):
        retain(tmp_path, Retention(keep_last=1))


def test_killed_at_every_step_of_it_a_published_one_is_whole_and_the_next_save_cleans_up(tmp_path):
    rule, all_there = Retention(keep_last=1, keep_best=1), ["manifest.json", "state.json"]
    for step in range(50):
        save_dir = make(
            tmp_path / str(step), 100, 200, 300, 400, tracker=400, losses={200: 1.0, 300: 2.0}
        )
        killed = cases.killed_at(
            step,
            ((Path, "rename"), (os, "unlink"), (os, "rmdir")),
            lambda folder=save_dir: retain(folder, rule),
        )
        assert {200, 400} <= set(left(save_dir))
        for folder in publish.published_folders(save_dir).values():
            assert sorted(path.name for path in folder.iterdir()) == all_there, (
                f"step {step}: {folder.name} is published and not whole"
            )
        publish.begin(save_dir, 500)
        assert not list(save_dir.glob("*.removed.tmp"))
        retain(save_dir, rule)
        assert left(save_dir) == [200, 400]
        if not killed:
            break
    assert not killed and step >= 4, "two renames and two removals at least"


counts = st.none() | st.integers(1, 4)
published = st.dictionaries(
    st.integers(1, 30), st.tuples(st.none() | st.floats(0, 9), st.booleans()), min_size=1
)


@given(published=published, rule=st.builds(Retention, counts, counts, counts), data=st.data())
def test_whatever_is_there_the_newest_and_the_tracked_stay_and_it_is_done_at_once(
    tmp_path_factory, published, rule, data
):
    tracked = data.draw(st.sampled_from(sorted(published)))
    losses, transient = (
        {n: loss for n, (loss, _) in published.items()},
        tuple(n for n, (_, persistent) in published.items() if not persistent),
    )
    save_dir = make(
        tmp_path_factory.mktemp("save"),
        *published,
        tracker=tracked,
        losses=losses,
        transient=transient,
    )
    retired = retain(save_dir, rule)
    assert set(retired) | set(left(save_dir)) == set(published) and not set(retired) & set(
        left(save_dir)
    )
    assert {max(published), tracked} <= set(left(save_dir)) and retain(save_dir, rule) == []
