"""Decide which published checkpoints stay, and remove the others.

Removing begins with one rename to a name that nobody reads, so that a killed process leaves either
a whole checkpoint or a folder to be cleaned up, never half a checkpoint under a published name.
"""

from dataclasses import dataclass
from pathlib import Path

from . import publish
from .manifest import FILE_NAME, CheckpointError
from .state import read_marks


@dataclass(frozen=True)
class Retention:
    """The rule that says which checkpoints stay.

    A checkpoint stays if any of the three keeps it; None switches one off. With all three None,
    every persistent checkpoint stays.

    keep_last: the number of newest ones that stay.
    interval: iterations that this number divides stay.
    keep_best: the number of those with the lowest validation loss that stay.
    """

    keep_last: int | None = None
    interval: int | None = None
    keep_best: int | None = None


KEEP_ALL = Retention()


def retain(save_dir: Path, rule: Retention) -> list[int]:
    """Retire published iterations and return them.

    The newest and the one that the tracker names always stay, so there is always one to resume
    from. Other checkpoints that are not persistent are retired, and do not count in any rule.
    Folders without a manifest are neither counted nor touched: they are not ours.

    Raises CheckpointError where one cannot be removed.
    """
    try:
        retired = _retired(save_dir, rule)
        for n in retired:
            folder = save_dir / publish.folder_name(n)
            removed = folder.with_name(folder.name + ".removed.tmp")
            folder.rename(removed)
            publish.remove(removed)
    except OSError as error:
        raise CheckpointError(
            f"{save_dir}: an old checkpoint cannot be removed: {error}"
        ) from error
    return retired


def _retired(save_dir: Path, rule: Retention) -> list[int]:
    """Return the published iterations that no rule keeps."""
    ours = {}
    for n, folder in publish.published_folders(save_dir).items():
        if (folder / FILE_NAME).is_file():
            ours[n] = folder
    marks = {n: read_marks(folder) for n, folder in ours.items()}
    persistent = [n for n in ours if marks[n].persistent]
    kept = {*list(ours)[-1:], publish.tracked_iteration(save_dir)}
    if rule == KEEP_ALL:
        kept.update(persistent)
    if rule.keep_last:
        kept.update(persistent[-rule.keep_last :])
    if rule.interval:
        kept.update(n for n in persistent if n % rule.interval == 0)
    if rule.keep_best:
        measured = [n for n in persistent if marks[n].validation_loss is not None]
        # Of equal losses the newer one is better.
        best_first = sorted(measured, key=lambda n: (marks[n].validation_loss, -n))
        kept.update(best_first[: rule.keep_best])
    return [n for n in ours if n not in kept]
