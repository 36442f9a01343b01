"""Read documents from raw text.

The input is JSON lines (plain, .gz, .zst), columns of parquet and arrow files, any UTF-8 file, and
folders of all of them.
"""

import gzip
import importlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from .. import logs
from .errors import DataError, DataFlagError

LINES = (".jsonl", ".json", ".ndjson")
COMPRESSED = (".gz", ".zst")
COLUMNS = (".parquet", ".arrow", ".feather")
PLAIN_KEY = "text"  # under which a file that is one document appears
COLUMN_ROWS = 1024
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


@dataclass(frozen=True)
class TextFile:
    """A file to read.

    named: the user gave its name, so it must be readable; one found in a folder may be left out.
    """

    path: Path
    named: bool


def list_files(inputs: list[str]) -> list[TextFile]:
    """Return the files that are named, and those found in the folders that are named.

    Folders are read depth first in sorted order, so that a corpus has one order on every machine.
    Hidden files and __pycache__ in folders are left out.

    Raises DataError if a name does not exist or nothing was found.
    """
    files: list[TextFile] = []
    for name in inputs:
        path = Path(name)
        if not path.exists():
            raise DataFlagError(f"--input {name}: no such file or folder")
        if path.is_dir():
            files += [TextFile(found, named=False) for found in _walk(path)]
        else:
            files.append(TextFile(path, named=True))
    if not files:
        raise DataFlagError(f"--input {' '.join(inputs)}: no file in there")
    return files


def read_documents(files: list[TextFile], keys: list[str]) -> Iterator[tuple[str, ...]]:
    """Yield one tuple per document: its texts under `keys`.

    A file that does not hold records is one document, with the key "text" alone.

    Raises DataError naming file and line of a malformed record. A file in a folder that is not
    UTF-8 is left out, which is said at the end.
    """
    skipped: list[Path] = []
    for file in files:
        plain = _is_plain(file, keys)
        try:
            if plain:
                yield (_plain(file.path, keys),)
            else:
                yield from _records(file.path, keys)
        except UnicodeDecodeError as error:
            if file.named or not plain:
                raise DataError(f"{file.path}: not UTF-8 text: {error.reason}") from None
            skipped.append(file.path)
        except DAMAGE as error:
            raise DataError(f"{file.path}: cannot be decompressed: {error}") from None
    if skipped:
        logs.get_logger().warning(
            f"{len(skipped)} files that are not UTF-8 text are left out, such as {skipped[0]}"
        )


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of those in it."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith(".") or name == "__pycache__":
            continue
        if path.is_dir() and not path.is_symlink():  # a link may lead back up
            yield from _walk(path)
        elif path.is_file():
            yield path


def _is_plain(file: TextFile, keys: list[str]) -> bool:
    """Return whether a file is one document.

    A .json that was found in a folder (a settings file, say) is one document, unless its first line
    is a record with `keys`.
    """
    path = file.path
    kind = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return kind not in (*LINES, *COLUMNS) or (
        kind == ".json" and not file.named and not _has_records(path, keys)
    )


def _plain(path: Path, keys: list[str]) -> str:
    """Return the text of a file that is one document."""
    if keys != [PLAIN_KEY]:
        raise DataFlagError(
            f"--json-keys {' '.join(keys)}: {path} is plain text, which has no keys; "
            "name files of JSON lines"
        )
    with _open(path) as file:
        text = file.read()
    if "\0" in text:  # a binary that decodes by chance
        raise UnicodeDecodeError("utf-8", b"\0", 0, 1, "it holds NUL")
    return text


def _has_records(path: Path, keys: list[str]) -> bool:
    with _open(path) as file:
        try:
            record = json.loads(file.readline())
        except (ValueError, *DAMAGE):  # UnicodeDecodeError is a ValueError
            return False
    return isinstance(record, dict) and all(key in record for key in keys)


def _records(path: Path, keys: list[str]) -> Iterator[tuple[str, ...]]:
    """Yield the texts of each record of a file of JSON lines or columns."""
    if path.suffix in COLUMNS:
        yield from _columns(path, keys)
        return
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON: {error}") from None
            yield tuple(_value(record, key, f"{path}, line {number}") for key in keys)


def _columns(path: Path, keys: list[str]) -> Iterator[tuple[str, ...]]:
    """Yield the texts of each row of a parquet or arrow file."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        feather = importlib.import_module("pyarrow.feather")
    except ImportError:
        raise DataError(
            f"{path}: reading it needs the package pyarrow; install it with: pip install pyarrow"
        ) from None
    try:
        if path.suffix == ".parquet":
            batches = parquet.ParquetFile(path).iter_batches(batch_size=COLUMN_ROWS, columns=keys)
        else:
            batches = feather.read_table(path, columns=keys, memory_map=True).to_batches(
                max_chunksize=COLUMN_ROWS
            )
        row = 0
        for batch in batches:
            for record in batch.to_pylist():
                row += 1
                yield tuple(_value(record, key, f"{path}, row {row}") for key in keys)
    except (ValueError, KeyError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from None


def _value(record: object, key: str, where: str) -> str:
    """Return the text under a key. Raises DataError, with the place, if there is none."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON object is expected, such as {{{key!r}: ...}}")
    if not isinstance(text := record.get(key), str):
        what = (
            f"holds {type(text).__name__}"
            if key in record
            else f"is missing among {', '.join(map(str, list(record)[:8]))}"
        )
        raise DataError(f"{where}: key {key!r} {what}; name the keys of the texts with --json-keys")
    return text


def _open(path: Path) -> io.TextIOBase:
    """Open UTF-8 text, decompressed by the ending of the name; line ends stay as they are."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    if path.suffix == ".zst":
        return zstandard.open(path, "rt", encoding="utf-8", newline="\n")
    return open(path, encoding="utf-8", newline="\n")
