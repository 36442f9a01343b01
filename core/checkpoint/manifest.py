"""The manifest of a checkpoint as a value: which slices, in which files, make up each tensor. Read with distrust, written as JSON."""

import json
import re
import stat
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # layout needs torch, and a process that only writes does not
    from ..layout import Box

FILE_NAME = "manifest.json"


class DType(NamedTuple):
    """A dtype's name in a safetensors file, and the bytes of one element."""

    stored_as: str
    item_size: int


DTYPES = {
    "float64": DType("F64", 8),
    "float32": DType("F32", 4),
    "float16": DType("F16", 2),
    "bfloat16": DType("BF16", 2),
    "int64": DType("I64", 8),
    "int32": DType("I32", 4),
    "uint8": DType("U8", 1),
    "bool": DType("BOOL", 1),
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_CHECKSUM = re.compile(r"crc32:[0-9a-f]{8}")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found, believed or applied: one line that says which file or tensor and why."""


@dataclass(frozen=True)
class Slice:
    """A box of a tensor and where its bytes lie: `key` in the safetensors file `file`. `checksum` is over the slice's bytes alone."""

    file: str
    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    checksum: str

    @property
    def box(self) -> "Box":
        return tuple(
            (start, start + size) for start, size in zip(self.offsets, self.shape, strict=True)
        )


@dataclass(frozen=True)
class Entry:
    """One tensor: its global shape, the name of its dtype, and the slices that cover it, each element once."""

    shape: tuple[int, ...]
    dtype: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Manifest:
    """Every tensor of a checkpoint, or those one rank wrote."""

    tensors: dict[str, Entry]

    def text(self) -> str:
        """As JSON, a line per tensor, so that a person can grep it."""
        lines = (
            f"{json.dumps(name)}: {json.dumps(_plain(entry))}"
            for name, entry in sorted(self.tensors.items())
        )
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @staticmethod
    def read(path: Path) -> "Manifest":
        """Read and check the form of every field. Raises CheckpointError; what the slices cover is asked with `check_cover`."""
        tree = read_json(path)
        return Manifest({name: _entry(fields, f"{path}: {name}") for name, fields in tree.items()})

    @staticmethod
    def merge(parts: Iterable["Manifest"]) -> "Manifest":
        """The union of what several ranks wrote. Raises CheckpointError where two disagree on a tensor's shape or dtype."""
        heads: dict[str, Entry] = {}
        slices: dict[str, list[Slice]] = defaultdict(list)
        for part in parts:
            for name, entry in part.tensors.items():
                head = heads.setdefault(name, entry)
                if (head.shape, head.dtype) != (entry.shape, entry.dtype):
                    raise CheckpointError(
                        f"{name} is {head.dtype} {list(head.shape)} on one rank and {entry.dtype} {list(entry.shape)} on another"
                    )
                slices[name] += entry.slices
        return Manifest(
            {
                name: Entry(head.shape, head.dtype, tuple(slices[name]))
                for name, head in heads.items()
            }
        )

    def check_cover(self, where: Path) -> None:
        """Raises CheckpointError, beginning with `where`, unless the slices of each tensor cover each of its elements exactly once."""
        for name, entry in self.tensors.items():
            stored, wanted = sum(prod(piece.shape) for piece in entry.slices), prod(entry.shape)
            if stored != wanted:
                raise CheckpointError(
                    f"{where}: the slices of {name} hold {stored} elements, its shape {list(entry.shape)} has {wanted}"
                )
            overlap = _first_overlap(entry.slices)
            if overlap:
                raise CheckpointError(
                    f"{where}: two slices of {name} overlap, at offsets {list(overlap[0].offsets)} and {list(overlap[1].offsets)}"
                )


def intersect(a: "Box", b: "Box") -> "Box | None":
    """The box common to both; None where there is none. A tensor without dims has the box ()."""
    common = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def read_text(path: Path) -> str:
    """The text in `path`. Raises CheckpointError if it is missing or unreadable."""
    try:
        return path.read_text()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text: {error}") from error


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises CheckpointError if the file is missing, unreadable, or holds anything else."""
    text = read_text(path)
    try:
        tree = json.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: also a number of thousands of digits
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, not an object")
    return tree


def check_file(path: Path) -> None:
    """Raises CheckpointError unless `path` is a file itself. A link could lead out of the folder, and a pipe is never read to its end."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            f"{path} is {'a symbolic link' if stat.S_ISLNK(mode) else 'no file'}; a checkpoint holds files of its own"
        )


def one_line(error: Exception) -> str:
    """What a person is told of an error: ours says it all, another's needs its type."""
    return " ".join(
        (
            str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        ).split()
    )


def is_plain_name(name: object) -> bool:
    """True for a file name that cannot lead out of its folder: no separator, no leading dot."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


def _plain(entry: Entry) -> dict:
    """The JSON form, less the slices' box: `dataclasses.asdict` takes seconds on the 10^5 slices of a large run."""
    slices = [
        {
            "file": s.file,
            "key": s.key,
            "offsets": s.offsets,
            "shape": s.shape,
            "checksum": s.checksum,
        }
        for s in entry.slices
    ]
    return {"shape": entry.shape, "dtype": entry.dtype, "slices": slices}


def _entry(fields: object, where: str) -> Entry:
    _expect(
        isinstance(fields, dict) and fields.keys() == {"shape", "dtype", "slices"},
        where,
        "needs exactly shape, dtype and slices",
    )
    shape = _sizes(fields["shape"], where, "shape")
    dtype = fields["dtype"]
    _expect(isinstance(dtype, str) and dtype in DTYPES, where, f"has unknown dtype {dtype!r}")
    _expect(isinstance(fields["slices"], list), where, "has slices that are not a list")
    return Entry(shape, dtype, tuple(_slice(item, shape, where) for item in fields["slices"]))


def _slice(fields: object, whole: tuple[int, ...], where: str) -> Slice:
    wanted = {"file", "key", "offsets", "shape", "checksum"}
    _expect(
        isinstance(fields, dict) and fields.keys() == wanted,
        where,
        f"has a slice without exactly {', '.join(sorted(wanted))}",
    )
    file, key, checksum = fields["file"], fields["key"], fields["checksum"]
    _expect(is_plain_name(file), where, f"has a slice in {file!r}, which is not a plain file name")
    _expect(isinstance(key, str), where, f"has a slice with key {key!r}")
    _expect(
        isinstance(checksum, str) and _CHECKSUM.fullmatch(checksum) is not None,
        where,
        f"has a slice with checksum {checksum!r}",
    )
    offsets, shape = (
        _sizes(fields["offsets"], where, "slice offsets"),
        _sizes(fields["shape"], where, "slice shape"),
    )
    inside = len(offsets) == len(shape) == len(whole) and all(
        o + n <= w for o, n, w in zip(offsets, shape, whole, strict=True)
    )
    _expect(
        inside,
        where,
        f"has a slice at {list(offsets)} of shape {list(shape)}, outside its shape {list(whole)}",
    )
    return Slice(file, key, offsets, shape, checksum)


def _sizes(value: object, where: str, what: str) -> tuple[int, ...]:
    # type() rather than isinstance: True is an int, and indexes as 1.
    _expect(
        isinstance(value, list) and all(type(n) is int and n >= 0 for n in value),
        where,
        f"has {what} {value!r}, not non-negative integers",
    )
    return tuple(value)


def _expect(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise CheckpointError(f"{where} {what}")


def _first_overlap(slices: tuple[Slice, ...]) -> tuple[Slice, Slice] | None:
    """Two slices that share an element, if any do. A sweep along the first dim: near linear, since most slices are rows."""
    if slices and not slices[0].shape:
        return slices[:2] if len(slices) > 1 else None
    open_slices: list[Slice] = []
    for new in sorted((s for s in slices if prod(s.shape)), key=lambda s: s.offsets):
        open_slices = [old for old in open_slices if old.offsets[0] + old.shape[0] > new.offsets[0]]
        for old in open_slices:
            if intersect(old.box, new.box):
                return old, new
        open_slices.append(new)
    return None
