"""Manage a SAVE folder: iterations are written aside, published by one rename, and tracked.

    iter_0000100.tmp             being written, or left by a run that was killed
    iter_0000100                 published: complete, synced
    iter_0000100.replaced.tmp    an older iter_0000100 while a new one takes its name
    iter_0000100.removed.tmp     retired, being deleted
    latest_checkpointed_iteration.txt    the tracker, Megatron's: where to resume; people edit it

The problem: a run can be killed at any moment, and a disk loses what was not synced. No moment
may leave half a checkpoint under a published name, or less published than before.

The idea: a rename is the only step that takes effect at once. What a crash leaves at each point:

    while files are written       iter_N.tmp; the next `begin` removes it
    before the rename             the same, complete or not: nobody looks inside
    after the rename              iter_N is published; the tracker names an older one, which the
                                  next run resumes from; the following save moves the tracker on
    while the tracker is written  TRACKER.tmp beside the old tracker, which still holds
    while iter_N is replaced      between the two renames the old one is found under its name
                                  aside (.replaced.tmp) and counts as published; `settle` gives
                                  it its name back, or deletes it if its successor is there
    while an old one is retired   iter_N.removed.tmp, half deleted; the next `clean` removes it

No torch in here.
"""

import os
import re
import shutil
from pathlib import Path

from ..logs import get_logger
from .manifest import CheckpointError, read_text

TRACKER = "latest_checkpointed_iteration.txt"
_PUBLISHED = re.compile(r"iter_(\d{7,})")
_REPLACED = re.compile(r"iter_(\d{7,})\.replaced\.tmp")
_STALE = re.compile(r"(iter_\d{7,}(\.removed|\.replaced)?|" + re.escape(TRACKER) + r")\.tmp")


def folder_name(iteration: int) -> str:
    """Return Megatron's name of an iteration: seven digits, more where needed."""
    return f"iter_{iteration:07d}"


def sync(path: Path) -> None:
    """Ask the disk to hold what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: a power cut leaves the old one or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    # The content first, then the name: in the other order a power cut leaves an empty new file.
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


def begin(save_dir: Path, iteration: int) -> Path:
    """Clear what killed runs left and make the folder to write `iteration` into."""
    save_dir.mkdir(parents=True, exist_ok=True)
    clean(save_dir)
    folder = begun(save_dir, iteration)
    folder.mkdir()
    return folder


def begun(save_dir: Path, iteration: int) -> Path:
    """Return the folder that `iteration` is written into until it is published."""
    return save_dir / f"{folder_name(iteration)}.tmp"


def clean(save_dir: Path) -> None:
    """Remove what killed runs left.

    A published folder that a kill caught aside gets its name back first.
    """
    for iteration in published_iterations(save_dir):
        settle(save_dir / folder_name(iteration))
    for path in save_dir.iterdir():
        if _STALE.fullmatch(path.name):
            remove(path)


def publish(save_dir: Path, iteration: int) -> Path:
    """Give the complete iter_N.tmp its name, then name it in the tracker.

    Its files are synced already. Killed between the two, a run leaves a tracker that names an older
    iteration, which is whole: never one that is not there.
    """
    final = save_dir / folder_name(iteration)
    swap_in(begun(save_dir, iteration), final)
    write_text(save_dir / TRACKER, f"{iteration}")
    return final


def swap_in(temporary: Path, final: Path) -> None:
    """Rename `temporary` to `final`.

    A folder of that name steps aside first and is deleted last, so that no half folder ever bears
    the name.
    """
    sync(temporary)
    settle(final)
    if final.exists():
        final.rename(_aside(final))
    temporary.rename(final)
    sync(final.parent)
    settle(final)


def settle(final: Path) -> None:
    """Finish or undo a `swap_in` that was killed.

    The folder aside is deleted if its successor is there, else it gets its name back.
    """
    aside = _aside(final)
    if not aside.exists():
        return
    if final.exists():
        remove(aside)
    else:
        aside.rename(final)


def remove(path: Path) -> None:
    """Delete a folder with all it holds, or a file, or a link but not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def published_folders(save_dir: Path) -> dict[int, Path]:
    """Return iteration -> folder, oldest first.

    One that a kill caught between stepping aside and being replaced is found under its name aside.
    """
    found: dict[int, Path] = {}
    if not save_dir.is_dir():
        return found
    for pattern in (_REPLACED, _PUBLISHED):  # a published name goes before one aside
        for path in save_dir.iterdir():
            match = pattern.fullmatch(path.name)
            if match and path.is_dir():
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def published_iterations(save_dir: Path) -> list[int]:
    """Return the iterations with a published folder, in ascending order."""
    return list(published_folders(save_dir))


def tracked_iteration(save_dir: Path) -> int | None:
    """Return the iteration that the tracker names; None without a tracker.

    Raises CheckpointError where it holds no number.
    """
    if not (save_dir / TRACKER).exists():
        return None
    text = read_text(save_dir / TRACKER).strip()
    if not re.fullmatch(r"[0-9]+", text):
        raise CheckpointError(f"{save_dir / TRACKER} holds {text[:40]!r} instead of an iteration")
    return int(text)


def named_iteration(load_dir: Path) -> int | None:
    """Return N if `load_dir` is itself a SAVE/iter_N, else None."""
    match = _PUBLISHED.fullmatch(load_dir.name)
    return int(match[1]) if match else None


def candidates(load_dir: Path, ckpt_step: int | None = None) -> list[int]:
    """Return the iterations to try, best first; [] where nothing was ever published.

    `load_dir` is SAVE or SAVE/iter_N. An explicit step or folder stands alone. Else the tracker
    decides if it names a published folder, otherwise the newest; then come the older ones. Raises
    CheckpointError where what is named is not there.
    """
    named = named_iteration(load_dir)
    if named is not None:
        if not load_dir.is_dir():
            raise CheckpointError(f"{load_dir} does not exist")
        if ckpt_step not in (None, named):
            raise CheckpointError(
                f"{load_dir} holds iteration {named}, not the {ckpt_step} asked for"
            )
        return [named]
    published = published_iterations(load_dir)
    if ckpt_step is not None:
        if ckpt_step not in published:
            raise CheckpointError(
                f"{load_dir} has no iteration {ckpt_step}; published: {_listed(published)}"
            )
        return [ckpt_step]
    newest = _newest(load_dir, published)
    return [n for n in reversed(published) if n <= newest]


def locate(load_dir: Path, iteration: int) -> Path:
    """Return the folder of a candidate."""
    if named_iteration(load_dir) is not None:
        return load_dir
    return published_folders(load_dir).get(iteration, load_dir / folder_name(iteration))


def _aside(final: Path) -> Path:
    return final.with_name(final.name + ".replaced.tmp")


def _newest(load_dir: Path, published: list[int]) -> int:
    """Return where to start: the tracker's word, or the newest folder if there is none.

    -1 where nothing was published.
    """
    newest = published[-1] if published else -1
    try:
        tracked = tracked_iteration(load_dir)
    except CheckpointError as error:
        if not published:
            raise
        get_logger().warning(f"{error}; taking the newest published, iteration {newest}")
        return newest
    if tracked is None or tracked in published:
        return newest if tracked is None else tracked
    if not published:
        raise CheckpointError(
            f"{load_dir / TRACKER} names iteration {tracked}, but no iteration is published there"
        )
    get_logger().warning(
        f"{load_dir / TRACKER} names iteration {tracked}, which is not there; "
        f"taking the newest published, iteration {newest}"
    )
    return newest


def _listed(iterations: list[int]) -> str:
    return ", ".join(map(str, iterations)) or "none"
