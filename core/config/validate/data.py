"""Checks of the data and of the tokenizer."""

import os
from collections.abc import Iterator

from ..fields import TOKENIZERS, Config, DataConfig, flag_of
from .words import positive


def check_data(config: Config, world_size: int) -> Iterator[str]:
    """Yield the problems of the data: what is not there, or is given twice."""
    given = config.data
    yield from _sources(given)
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        yield from _prefixes(name, getattr(given, name))
    yield from _split(given.split)
    if given.num_workers < 0:
        yield f"--num-workers {given.num_workers} must not be negative"
    yield from _tokenizer(given)


def has_validation(given: DataConfig) -> bool:
    """Return whether there is data for validation: a share of the split, or data of its own."""
    if given.valid_data_path:
        return True
    # A share that is no number is told of elsewhere: it is taken for one here.
    shares = [share.strip() for share in given.split.split(",")]
    if given.train_data_path or len(shares) < 2:
        return False
    return not _is_number(shares[1]) or float(shares[1]) > 0


def _sources(given: DataConfig) -> Iterator[str]:
    """Yield a problem unless data comes from exactly one place."""
    names = ("train_data_path", "valid_data_path", "test_data_path")
    per_split = [name for name in names if getattr(given, name)]
    sources = {
        "--data-path": given.data_path,
        "--mock-data": given.mock_data,
        "--train-data-path": per_split,
    }
    flags = [flag for flag, is_given in sources.items() if is_given]
    if not flags:
        yield "no data: give --data-path PREFIX (made by tools/preprocess_data.py), or --mock-data"
    if len(flags) > 1:
        yield f"{' and '.join(flags)} exclude each other; give one"
    if per_split and not given.train_data_path:
        yield f"{flag_of(per_split[0])} needs --train-data-path"


def _prefixes(name: str, items: tuple[str, ...]) -> Iterator[str]:
    """Yield a problem for each prefix without its two files. A number may be a weight."""
    for item in items:
        files = [item + suffix for suffix in (".idx", ".bin")]
        missing = [file for file in files if not os.path.exists(file)]
        if missing and not _is_number(item):
            absent = " and no file ".join(missing)
            flag = flag_of(name)
            yield f"{flag} {item}: no file {absent}; give the path without .bin or .idx"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _split(split: str) -> Iterator[str]:
    """Yield a problem unless --split is one to three shares that add up to more than nothing."""
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        yield f"--split {split!r} is not up to three shares such as 969,30,1"


def _tokenizer(given: DataConfig) -> Iterator[str]:
    """Yield what a kind of tokenizer needs and does not have."""
    kind = given.tokenizer_type
    if kind is None:
        yield (
            "--tokenizer-type is missing; give it with --tokenizer-model, "
            "or NullTokenizer with --vocab-size for data without text"
        )
    needed = TOKENIZERS.get(kind, ())
    for name in needed:
        if getattr(given, name) is None:
            yield f"--tokenizer-type {kind} needs {flag_of(name)}"
    yield from positive(given, "vocab_size")
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        path = getattr(given, name)
        if name in needed and path is not None and not os.path.exists(path):
            yield f"{flag_of(name)} {path}: no such file or folder"
