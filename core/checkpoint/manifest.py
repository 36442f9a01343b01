"""Define the manifest of a checkpoint: the slices, and their files, that make up each tensor.

An entry of manifest.json, for a [8, 4] tensor that two ranks wrote by halves:

    "layers.0.mlp.up.weight": {"shape": [8, 4], "dtype": "float32", "slices": [
        {"file": "shard_00000.safetensors", "key": ..., "offsets": [0, 0], "shape": [4, 4], ...},
        {"file": "shard_00001.safetensors", "key": ..., "offsets": [4, 0], "shape": [4, 4], ...}]}

It is read with distrust, because a file may be damaged or made by anyone: every field is checked
for its form, file names cannot lead out of the folder, and the slices must cover each tensor once.
"""

import json
import re
import stat
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    """A checkpoint that cannot be written, found, believed or applied.

    The message is one line that says which file or tensor, and why.
    """


@dataclass(frozen=True)
class Slice:
    """A box of a tensor and where its bytes lie: `key` in the safetensors file `file`.

    checksum: over the slice's bytes alone.
    """

    file: str
    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    checksum: str

    @property
    def box(self) -> "Box":
        """Return (start, stop) along every dim."""
        sides = zip(self.offsets, self.shape, strict=True)
        return tuple((start, start + size) for start, size in sides)


@dataclass(frozen=True)
class Entry:
    """One tensor: its global shape, the name of its dtype, and the slices that cover it.

    Each element is in one slice.
    """

    shape: tuple[int, ...]
    dtype: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Manifest:
    """Every tensor of a checkpoint, or those one rank wrote."""

    tensors: dict[str, Entry]

    def text(self) -> str:
        """Return the manifest as JSON, a line per tensor, so that a person can grep it."""
        lines = []
        for name, entry in sorted(self.tensors.items()):
            key = json.dumps(name)
            value = json.dumps(_plain(entry))
            lines.append(f"{key}: {value}")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @staticmethod
    def read(path: Path) -> "Manifest":
        """Read a manifest and check the form of every field.

        Raises CheckpointError. What the slices cover is a question for `check_cover`.
        """
        tree = read_json(path)
        tensors = {}
        for name, fields in tree.items():
            tensors[name] = _entry(fields, f"{path}: {name}")
        return Manifest(tensors)

    @staticmethod
    def merge(parts: Iterable["Manifest"]) -> "Manifest":
        """Return the union of what several ranks wrote.

        Raises CheckpointError where two disagree on a tensor's shape or dtype.
        """
        heads: dict[str, Entry] = {}
        slices: dict[str, list[Slice]] = defaultdict(list)
        for part in parts:
            for name, entry in part.tensors.items():
                head = heads.setdefault(name, entry)
                if (head.shape, head.dtype) != (entry.shape, entry.dtype):
                    raise CheckpointError(
                        f"{name} is {head.dtype} {list(head.shape)} on one rank and "
                        f"{entry.dtype} {list(entry.shape)} on another"
                    )
                slices[name] += entry.slices
        merged = {}
        for name, head in heads.items():
            merged[name] = Entry(head.shape, head.dtype, tuple(slices[name]))
        return Manifest(merged)

    def check_cover(self, where: Path) -> None:
        """Check that the slices of each tensor cover each of its elements exactly once.

        Raises CheckpointError, which begins with `where`, if they do not.
        """
        # As many elements as the tensor has, none of them twice, all inside its shape (`_slice` saw
        # to that): so none is missing.
        for name, entry in self.tensors.items():
            stored = sum(prod(piece.shape) for piece in entry.slices)
            wanted = prod(entry.shape)
            if stored != wanted:
                raise CheckpointError(
                    f"{where}: the slices of {name} hold {stored} elements, "
                    f"its shape {list(entry.shape)} has {wanted}"
                )
            overlap = _first_overlap(entry.slices)
            if overlap:
                one, other = overlap
                raise CheckpointError(
                    f"{where}: two slices of {name} overlap, "
                    f"at offsets {list(one.offsets)} and {list(other.offsets)}"
                )


def intersect(a: "Box", b: "Box") -> "Box | None":
    """Return the box common to both, or None. A tensor without dims has the box ()."""
    common = []
    for (a_start, a_stop), (b_start, b_stop) in zip(a, b, strict=True):
        start = max(a_start, b_start)
        stop = min(a_stop, b_stop)
        if start >= stop:
            return None
        common.append((start, stop))
    return tuple(common)


def read_text(path: Path) -> str:
    """Return the text in `path`. Raises CheckpointError if it is missing or unreadable."""
    try:
        return path.read_text()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text: {error}") from error


def read_json(path: Path) -> dict:
    """Return the JSON object in `path`.

    Raises CheckpointError if the file is missing, unreadable, or holds anything else.
    """
    text = read_text(path)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        # ValueError: also a number of thousands of digits.
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, not an object")
    return tree


def check_file(path: Path) -> None:
    """Check that `path` is a file itself. Raises CheckpointError if it is not.

    A link could lead out of the folder, and a pipe is never read to its end.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no file"
        raise CheckpointError(f"{path} is {kind}; a checkpoint holds files of its own")


def one_line(error: Exception) -> str:
    """Return an error's message on one line: ours says it all, another's needs its type."""
    text = str(error)
    if not isinstance(error, CheckpointError):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.split())


def is_plain_name(name: object) -> bool:
    """Return whether this is a file name that cannot lead out of its folder.

    It has no separator and no leading dot.
    """
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


def _plain(entry: Entry) -> dict:
    """Return the JSON form of an entry.

    By hand: `dataclasses.asdict` takes seconds on the 10^5 slices of a large run.
    """
    slices = []
    for stored in entry.slices:
        fields = {
            "file": stored.file,
            "key": stored.key,
            "offsets": stored.offsets,
            "shape": stored.shape,
            "checksum": stored.checksum,
        }
        slices.append(fields)
    return {"shape": entry.shape, "dtype": entry.dtype, "slices": slices}


def _entry(fields: Any, where: str) -> Entry:
    """Check the JSON form of an entry and return it. `where` begins the error message."""
    complete = isinstance(fields, dict) and fields.keys() == {"shape", "dtype", "slices"}
    _expect(complete, where, "needs exactly shape, dtype and slices")
    shape = _sizes(fields["shape"], where, "shape")
    dtype = fields["dtype"]
    _expect(isinstance(dtype, str) and dtype in DTYPES, where, f"has unknown dtype {dtype!r}")
    _expect(isinstance(fields["slices"], list), where, "has slices that are not a list")
    slices = tuple(_slice(item, shape, where) for item in fields["slices"])
    return Entry(shape, dtype, slices)


def _slice(fields: Any, whole: tuple[int, ...], where: str) -> Slice:
    """Check the JSON form of a slice of a tensor of shape `whole` and return it."""
    wanted = {"file", "key", "offsets", "shape", "checksum"}
    complete = isinstance(fields, dict) and fields.keys() == wanted
    _expect(complete, where, f"has a slice without exactly {', '.join(sorted(wanted))}")
    file = fields["file"]
    key = fields["key"]
    checksum = fields["checksum"]
    _expect(is_plain_name(file), where, f"has a slice in {file!r}, which is not a plain file name")
    _expect(isinstance(key, str), where, f"has a slice with key {key!r}")
    known = isinstance(checksum, str) and _CHECKSUM.fullmatch(checksum) is not None
    _expect(known, where, f"has a slice with checksum {checksum!r}")
    offsets = _sizes(fields["offsets"], where, "slice offsets")
    shape = _sizes(fields["shape"], where, "slice shape")
    _expect(
        _inside(offsets, shape, whole),
        where,
        f"has a slice at {list(offsets)} of shape {list(shape)}, outside its shape {list(whole)}",
    )
    return Slice(file, key, offsets, shape, checksum)


def _inside(offsets: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    if not len(offsets) == len(shape) == len(whole):
        return False
    sides = zip(offsets, shape, whole, strict=True)
    return all(start + size <= limit for start, size, limit in sides)


def _sizes(value: Any, where: str, what: str) -> tuple[int, ...]:
    # type() rather than isinstance: True is an int, and indexes as 1.
    counts = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
    _expect(counts, where, f"has {what} {value!r}, not non-negative integers")
    return tuple(value)


def _expect(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise CheckpointError(f"{where} {what}")


def _first_overlap(slices: tuple[Slice, ...]) -> tuple[Slice, Slice] | None:
    """Return two slices that share an element; None if no two do.

    Comparing all pairs would take minutes for the slices of a large run. This sweeps along the
    first dim and compares a slice only with those that are open where it begins: near linear,
    since most slices are ranges of rows.
    """
    # A tensor without dims has one element, so two slices of it overlap.
    if slices and not slices[0].shape:
        return (slices[0], slices[1]) if len(slices) > 1 else None
    open_slices: list[Slice] = []
    filled = [stored for stored in slices if prod(stored.shape)]
    for new in sorted(filled, key=lambda stored: stored.offsets):
        here = new.offsets[0]
        open_slices = [old for old in open_slices if old.offsets[0] + old.shape[0] > here]
        for old in open_slices:
            if intersect(old.box, new.box):
                return old, new
        open_slices.append(new)
    return None
