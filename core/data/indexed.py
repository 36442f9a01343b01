"""Read and write the `.bin/.idx` pair of a dataset, and say precisely what is wrong with one.

`.bin` holds token ids back to back, little-endian, without a header. `.idx` says where each
sequence lies in it, and which sequences make a document:

    bytes    0 - 8     magic, "MMIDIDX" and two zeros
             9 - 16    version, uint64: 1
             17        dtype code of the ids, uint8 (see DTYPES)
             18 - 25   S, uint64: number of sequences
             26 - 33   D, uint64: number of documents + 1
             then      S int32, the length of each sequence in tokens
             then      S int64, the place of each sequence in .bin, in bytes
             then      D int64, the document index: entry k = sequences before document k

Documents of 1, 0 and 2 sequences, say, have the document index [0, 1, 1, 3]. All numbers are
little-endian and unaligned (the header has 34 bytes), so they are read from views of bytes.

The format is Megatron's, byte for byte.
"""

import hashlib
import os
import shutil
import struct
from functools import cached_property
from pathlib import Path

import numpy as np

from .digest import content_digest
from .errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
# Magic, version, dtype code, number of sequences, length of the document index.
HEADER = struct.Struct("<9sQBQQ")
# The codes are Megatron's.
_NAMES = {
    1: "u1",
    2: "i1",
    3: "i2",
    4: "i4",
    5: "i8",
    6: "f8",
    7: "f4",
    8: "u2",
}
DTYPES = {code: np.dtype(name).newbyteorder("<") for code, name in _NAMES.items()}
LENGTH, POINTER = np.dtype("<i4"), np.dtype("<i8")
MAX_SEQUENCE = np.iinfo(LENGTH).max
REMEDY = "make it again with tools/preprocess_data.py, or copy it again"


def best_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest dtype of a `.bin` for ids below `vocab_size`.

    It is uint16 below 65,500 (Megatron's bound), else int32.
    """
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """Return the path of the token ids of a dataset."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the path of the index of a dataset."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """The sequences of one dataset, memory-mapped.

    Unpickling opens the files again, so a worker process gets a mapping of its own.

    sequence_lengths: [S] int32, tokens of each sequence.
    pointers: [S] int64, bytes before each sequence in `.bin`.
    document_indices: [D] int64; entry k is the number of sequences before document k.

    Raises DataError if a file is missing, foreign, truncated, of another pair, or empty (unless
    `allow_empty`).
    """

    def __init__(self, prefix: str | Path, allow_empty: bool = False):
        self.prefix = str(prefix)
        self.allow_empty = allow_empty
        bin_size = _size(bin_path(prefix))
        idx_size = _size(idx_path(prefix))
        if idx_size < HEADER.size:
            raise DataError(
                f"{idx_path(prefix)}: {idx_size} bytes are too few for the header of "
                f"{HEADER.size}; {REMEDY}"
            )
        index = np.memmap(idx_path(prefix), mode="r", dtype=np.uint8)
        header = index[: HEADER.size].tobytes()
        self.dtype, num_sequences, num_entries = self._header(header, idx_size)
        # The three arrays follow the header without gaps.
        lengths_at = HEADER.size
        pointers_at = lengths_at + num_sequences * LENGTH.itemsize
        documents_at = pointers_at + num_sequences * POINTER.itemsize
        self.sequence_lengths = np.frombuffer(index, LENGTH, num_sequences, lengths_at)
        self.pointers = np.frombuffer(index, POINTER, num_sequences, pointers_at)
        self.document_indices = np.frombuffer(index, POINTER, num_entries, documents_at)
        self._check_documents()
        self._check_bytes(bin_size)
        self._tokens = np.empty(0, np.uint8)
        if bin_size:  # an empty file cannot be mapped
            mapped = np.memmap(bin_path(prefix), mode="r", dtype=np.uint8)
            # A plain array over the mapping: a slice of a memmap costs several times as much.
            self._tokens = np.asarray(mapped)

    def __reduce__(self):
        return IndexedDataset, (self.prefix, self.allow_empty)

    @property
    def num_sequences(self) -> int:
        """Return S, the number of sequences."""
        return len(self.sequence_lengths)

    @property
    def num_documents(self) -> int:
        """Return the number of documents; each holds zero or more sequences."""
        return len(self.document_indices) - 1

    def num_tokens(self, start: int = 0, stop: int | None = None) -> int:
        """Return the number of tokens in sequences [start, stop)."""
        return int(self.sequence_lengths[start:stop].sum(dtype=np.int64))

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return tokens [offset, offset + length) of a sequence, to its end without `length`.

        They are a view of the file, in the file's dtype.
        """
        if length is None:
            length = int(self.sequence_lengths[sequence]) - offset
        begin = int(self.pointers[sequence]) + offset * self.dtype.itemsize
        return np.frombuffer(self._tokens, self.dtype, length, begin)

    def document_of(self, sequence: int) -> tuple[int, int]:
        """Return the document that holds a sequence, and the tokens of that document before it."""
        begun = np.searchsorted(self.document_indices, sequence, side="right")
        document = int(begun) - 1
        first = int(self.document_indices[document])
        return document, self.num_tokens(first, sequence)

    @cached_property
    def identity(self) -> str:
        """Return a digest (hex) of the content of both files, whatever their path and time.

        It is made of the `content_digest` of each.
        """
        of_idx = content_digest(idx_path(self.prefix))
        of_bin = content_digest(bin_path(self.prefix))
        both = of_idx + of_bin
        return hashlib.sha256(both.encode()).hexdigest()

    def modified(self) -> tuple[int, int]:
        """Return the times of last change of `.idx` and `.bin`, in nanoseconds."""
        index = os.stat(idx_path(self.prefix))
        tokens = os.stat(bin_path(self.prefix))
        return index.st_mtime_ns, tokens.st_mtime_ns

    def _header(self, header: bytes, idx_size: int) -> tuple[np.dtype, int, int]:
        """Check the header; return dtype, number of sequences, length of the document index.

        The counts are checked against the size of the file before anything is read by them.
        """
        path = idx_path(self.prefix)
        magic, version, code, num_sequences, num_entries = HEADER.unpack(header)
        if magic != MAGIC:
            raise DataError(
                f"{path}: not an index of a .bin (it begins with {magic!r} instead of {MAGIC!r}); "
                f"{REMEDY}"
            )
        if version != 1:
            raise DataError(f"{path}: version {version} at byte 9, only 1 is known; {REMEDY}")
        if code not in DTYPES or DTYPES[code].kind == "f":
            raise DataError(
                f"{path}: dtype code {code} at byte 17 is no integer type of token ids; {REMEDY}"
            )
        of_sequences = num_sequences * (LENGTH.itemsize + POINTER.itemsize)
        of_documents = num_entries * POINTER.itemsize
        expected = HEADER.size + of_sequences + of_documents
        if idx_size != expected:
            what = "truncated" if idx_size < expected else "too long"
            raise DataError(
                f"{path}: {what}: {idx_size} bytes, {expected} for the {num_sequences} sequences "
                f"its header names; {REMEDY}"
            )
        return DTYPES[code], num_sequences, num_entries

    # Checks of the index against itself and against the size of `.bin`: found here a fault has a
    # file and a number; found later it would be wrong tokens.

    def _check_documents(self) -> None:
        """Check that the document index rises from 0 to the number of sequences."""
        path = idx_path(self.prefix)
        documents = self.document_indices
        if len(documents) == 0 or documents[0] != 0 or documents[-1] != self.num_sequences:
            raise DataError(
                f"{path}: its document index does not run from 0 to its {self.num_sequences} "
                f"sequences; {REMEDY}"
            )
        falls = np.flatnonzero(documents[1:] < documents[:-1])
        if falls.size:
            raise DataError(f"{path}: its document index falls after document {falls[0]}; {REMEDY}")

    def _check_bytes(self, bin_size: int) -> None:
        """Check that the sequences lie in `.bin`, and that it has the size that they need."""
        path = idx_path(self.prefix)
        lengths = self.sequence_lengths
        negative = np.flatnonzero(lengths < 0)
        if negative.size:
            raise DataError(
                f"{path}: sequence {negative[0]} has length {lengths[negative[0]]}; {REMEDY}"
            )
        needed = self.num_tokens() * self.dtype.itemsize
        if bin_size != needed:
            what = "truncated" if bin_size < needed else "longer than its index"
            raise DataError(
                f"{bin_path(self.prefix)}: {what}: {bin_size} bytes, {needed} by {path.name}; "
                f"{REMEDY}"
            )
        ends = self.pointers + lengths * np.int64(self.dtype.itemsize)
        outside = np.flatnonzero((self.pointers < 0) | (ends > bin_size))
        if outside.size:
            raise DataError(
                f"{path}: sequence {outside[0]} lies outside the {bin_size} bytes of the .bin; "
                f"{REMEDY}"
            )
        if not needed and not self.allow_empty:
            raise DataError(
                f"{path}: an empty dataset: {self.num_documents} documents without a token; "
                "check the input of tools/preprocess_data.py"
            )


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path}: no such file; a dataset is a .bin and an .idx, named by their path without "
            "the ending"
        ) from None


class IndexedDatasetWriter:
    """A writer of a pair, under temporary names until `finish` renames both.

    `.bin` is renamed first, so that an `.idx` never describes a `.bin` that is not whole.

    As a context manager it finishes at the end of the block and leaves nothing behind if the block
    raised. Raises DataError if an id does not fit `dtype` or a sequence has 2^31 tokens or more.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        if not codes:
            raise DataError(
                f"{bin_path(prefix)}: dtype {self.dtype} has no code in the format; "
                f"use one of {[str(d) for d in DTYPES.values()]}"
            )
        self._code = codes[0]
        self._lengths: list[np.ndarray] = []
        self._documents: list[np.ndarray] = [np.zeros(1, POINTER)]
        self._num_sequences = 0
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        # `finish` renames in this order.
        self._temporary: dict[Path, Path] = {}
        for path in (bin_path(prefix), idx_path(prefix)):
            self._temporary[path] = Path(f"{path}.tmp{os.getpid()}")
        # `finish` or `abandon` closes it.
        self._bin = open(self._temporary[bin_path(prefix)], "wb")  # noqa: SIM115

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()

    def add_document(self, tokens: np.ndarray | list[int]) -> None:
        """Add one document of one sequence.

        An empty one adds no sequence, only an entry of the document index.
        """
        self.add_documents(tokens, [len(tokens)])

    def add_documents(
        self, tokens: np.ndarray | list[int], lengths: np.ndarray | list[int]
    ) -> None:
        """Add documents of one sequence each.

        tokens: ids of all the documents, back to back.
        lengths: tokens of each document.
        """
        lengths = self._checked_lengths(lengths, len(tokens))
        self._write(tokens)
        filled = lengths > 0
        self._extend(lengths[filled], np.cumsum(filled, dtype=POINTER))

    def add_sequences(
        self, tokens: np.ndarray | list[int], lengths: np.ndarray | list[int]
    ) -> None:
        """Add one document of several sequences.

        tokens: ids of all its sequences, back to back.
        lengths: tokens of each sequence.
        """
        lengths = self._checked_lengths(lengths, len(tokens))
        self._write(tokens)
        self._extend(lengths, np.array([len(lengths)], POINTER))

    def add_index(self, prefix: str | Path) -> None:
        """Append another dataset of the same dtype, its bytes copied as they are."""
        other = IndexedDataset(prefix, allow_empty=True)
        if other.dtype != self.dtype:
            raise DataError(
                f"{idx_path(prefix)}: its ids are {other.dtype}, those of {self.prefix} "
                f"{self.dtype}; merge datasets of one tokenizer"
            )
        back_to_back = _pointers(other.sequence_lengths, other.dtype.itemsize)
        if not np.array_equal(other.pointers, back_to_back):
            raise DataError(
                f"{idx_path(prefix)}: its sequences do not lie back to back in the .bin; {REMEDY}"
            )
        with open(bin_path(prefix), "rb") as source:
            shutil.copyfileobj(source, self._bin, 16 << 20)
        lengths = np.array(other.sequence_lengths)
        documents = np.array(other.document_indices[1:])
        self._extend(lengths, documents)

    def finish(self) -> None:
        """Write the index, force both files to disk, and publish them under their names."""
        try:
            _sync_and_close(self._bin)
            with open(self._temporary[idx_path(self.prefix)], "wb") as file:
                self._write_index(file)
                _sync_and_close(file)
            # An older index must not describe the new .bin, not even for a moment.
            idx_path(self.prefix).unlink(missing_ok=True)
            for path, temporary in self._temporary.items():
                os.replace(temporary, path)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Drop what was written."""
        self._bin.close()
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)

    def _checked_lengths(self, lengths: np.ndarray | list[int], total: int) -> np.ndarray:
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.sum() != total or (lengths.size and lengths.min() < 0):
            raise DataError(
                f"{bin_path(self.prefix)}: {total} tokens do not have the lengths "
                f"{lengths.tolist()[:8]}"
            )
        if lengths.size and lengths.max() > MAX_SEQUENCE:
            raise DataError(
                f"{bin_path(self.prefix)}: a document of {lengths.max()} tokens; "
                f"the format holds {MAX_SEQUENCE} at most; split it"
            )
        return lengths

    def _write(self, tokens: np.ndarray | list[int]) -> None:
        # numpy would make an empty list float64, which has no place in a .bin.
        kind = np.int64 if len(tokens) == 0 else None
        tokens = np.asarray(tokens, dtype=kind)
        limits = np.iinfo(self.dtype)
        if tokens.size:
            low, high = tokens.min(), tokens.max()
            if not limits.min <= low <= high <= limits.max:
                worst = high if high > limits.max else low
                raise DataError(
                    f"{bin_path(self.prefix)}: token id {worst} does not fit {self.dtype}; "
                    "use the dtype of the vocabulary (best_dtype)"
                )
        self._bin.write(np.ascontiguousarray(tokens, self.dtype).data)

    def _extend(self, lengths: np.ndarray, documents: np.ndarray) -> None:
        """Add sequences and documents to the index.

        documents: ends of the new documents, counted in the new sequences.
        """
        self._documents.append(documents.astype(POINTER) + self._num_sequences)
        self._lengths.append(lengths.astype(LENGTH))
        self._num_sequences += len(lengths)

    def _write_index(self, file) -> None:
        """Write the header and the three arrays, in the order that the module describes."""
        lengths = np.concatenate(self._lengths or [np.empty(0, LENGTH)])
        documents = np.concatenate(self._documents)
        file.write(HEADER.pack(MAGIC, 1, self._code, len(lengths), len(documents)))
        for array in (lengths, _pointers(lengths, self.dtype.itemsize), documents):
            file.write(array.data)


def _pointers(lengths: np.ndarray, itemsize: int) -> np.ndarray:
    """Return the byte offset of each sequence, in int64 throughout."""
    pointers = np.zeros(len(lengths), POINTER)
    np.cumsum(lengths[:-1], out=pointers[1:], dtype=POINTER)
    return pointers * itemsize


def _sync_and_close(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
