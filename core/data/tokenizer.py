"""Give all kinds of tokenizers one interface.

It turns text into ids and back, and knows the real size of the vocabulary and the end-of-document
id.
"""

import base64
import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from ..config import TOKENIZERS
from .errors import DataError, DataFlagError

END_OF_TEXT = "<|endoftext|>"
# The files of a Hugging Face folder that belong to its tokenizer.
HF_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Megatron's TikTokenizer: ids 0 .. 999 are special tokens, the ranks of the file follow.
TIKTOKEN_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
TIKTOKEN_NUM_SPECIAL = 1000
TIKTOKEN_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class Tokenizer(Protocol):
    """The interface of a tokenizer.

    vocab_size: all ids are below it, `eod` included.
    eod: the end-of-document id.
    fingerprint: SHA-256 (hex) of the content.
    files: files to copy beside an export.
    """

    vocab_size: int
    eod: int
    fingerprint: str
    files: tuple[Path, ...]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without tokens around it."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text; faster than `encode` of one after the other."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    vocab_size: int | None = None,
) -> Tokenizer:
    """Return the tokenizer of --tokenizer-type, from the files of the other flags.

    Raises DataError on an unknown type, a flag that is missing or names no usable file, and a
    vocab_size below the real one.
    """
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None or vocab_size < 1:
            raise DataFlagError(
                "--tokenizer-type NullTokenizer needs --vocab-size, the number of ids without the "
                "end of document"
            )
        return NullTokenizer(vocab_size)
    tokenizer: Tokenizer
    if tokenizer_type == "HuggingFaceTokenizer":
        tokenizer = _hugging_face(_existing("--tokenizer-model", tokenizer_model, tokenizer_type))
    elif tokenizer_type == "GPT2BPETokenizer":
        vocab = _existing("--vocab-file", vocab_file, tokenizer_type)
        merges = _existing("--merge-file", merge_file, tokenizer_type)
        tokenizer = _gpt2(vocab, merges, "--vocab-file")
    elif tokenizer_type == "SentencePieceTokenizer":
        tokenizer = SentencePieceTokenizer(
            _existing("--tokenizer-model", tokenizer_model, tokenizer_type)
        )
    elif tokenizer_type == "TikTokenizer":
        tokenizer = TikTokenizer(_existing("--tokenizer-model", tokenizer_model, tokenizer_type))
    else:
        kinds = ", ".join(TOKENIZERS)
        raise DataFlagError(f"--tokenizer-type {tokenizer_type} is unknown; use one of {kinds}")
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise DataFlagError(
            f"--vocab-size {vocab_size} is below the {tokenizer.vocab_size} ids of the tokenizer; "
            "leave it out, or enlarge it"
        )
    tokenizer.vocab_size = vocab_size or tokenizer.vocab_size
    return tokenizer


class NullTokenizer:
    """A tokenizer of text that is ids already: integers between spaces.

    Ids run from 0 to size - 1, and `size` is the end of document.
    """

    def __init__(self, size: int):
        self.vocab_size = size + 1
        self.eod = size
        self.files: tuple[Path, ...] = ()
        self.fingerprint = _sha256(b"NullTokenizer", str(size).encode())

    def encode(self, text: str) -> list[int]:
        """Return the integers. Raises DataError on anything but an integer from 0 to `eod`."""
        words = text.split()
        for word in words:
            # isdigit alone accepts digits of other scripts.
            is_number = word.isascii() and word.isdigit()
            if not is_number or int(word) > self.eod:
                raise DataError(
                    f"NullTokenizer: {word[:40]!r} is no id from 0 to {self.eod}; "
                    "the text must be such ids between spaces"
                )
        return [int(word) for word in words]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, tokenizer: HFTokenizer, eod: int, files: tuple[Path, ...]):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.eod = eod
        self.files = files
        # Ids may have gaps: the largest decides, not their number.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = _sha256(tokenizer.to_str().encode(), str(eod).encode())
        # The fast one leaves out the character offsets, which nobody here asks for.
        self._encode_batch = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class SentencePieceTokenizer:
    """A .model file of the `sentencepiece` library."""

    def __init__(self, path: Path):
        library = _library("sentencepiece", "SentencePieceTokenizer")
        try:
            self._model = library.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise DataFlagError(f"--tokenizer-model {path}: not a model of sentencepiece") from None
        self.vocab_size = self._model.get_piece_size()
        self.files: tuple[Path, ...] = (path,)
        self.eod = self._model.piece_to_id(END_OF_TEXT)
        if self.eod == self._model.unk_id():
            self.eod = self._model.eos_id()
        if self.eod < 0:
            raise DataFlagError(
                f"--tokenizer-model {path}: neither {END_OF_TEXT} nor an end-of-sentence token; "
                "train it with one"
            )
        self.fingerprint = _sha256(path.read_bytes())

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(list(ids))


class TikTokenizer:
    """A vocabulary file for the `tiktoken` library, as Megatron reads it.

    The file is a JSON list of {rank, token_bytes, token_str}. Special tokens have the first 1,000
    ids; the ranks of the file follow.
    """

    def __init__(self, path: Path):
        library = _library("tiktoken", "TikTokenizer")
        fillers = [f"<SPECIAL_{i}>" for i in range(len(TIKTOKEN_SPECIAL), TIKTOKEN_NUM_SPECIAL)]
        special = {token: i for i, token in enumerate([*TIKTOKEN_SPECIAL, *fillers])}
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            ranks = {
                base64.b64decode(entry["token_bytes"]): entry["rank"] + TIKTOKEN_NUM_SPECIAL
                for entry in entries
            }
            self._encoding = library.Encoding(
                path.stem, pat_str=TIKTOKEN_PATTERN, mergeable_ranks=ranks, special_tokens=special
            )
        except (ValueError, TypeError, KeyError, IsADirectoryError):
            raise DataFlagError(
                f"--tokenizer-model {path}: not a JSON list of rank, token_bytes, token_str"
            ) from None
        self.vocab_size = self._encoding.n_vocab
        self.eod = special["</s>"]
        self.files: tuple[Path, ...] = (path,)
        self.fingerprint = _sha256(path.read_bytes())

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(list(ids))


def _hugging_face(path: Path) -> HuggingFaceTokenizer:
    folder = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists() and (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _gpt2(folder / "vocab.json", folder / "merges.txt", "--tokenizer-model")
    if not file.exists():
        raise DataFlagError(
            f"--tokenizer-model {path}: no tokenizer.json in this folder; "
            "make one with tools/train_tokenizer.py"
        )
    tokenizer = _load("--tokenizer-model", file, HFTokenizer.from_file)
    files = tuple(folder / name for name in HF_FILES if (folder / name).exists())
    return HuggingFaceTokenizer(
        tokenizer, _eod(tokenizer, folder, path), files if file in files else (file,)
    )


def _eod(tokenizer: HFTokenizer, folder: Path, path: Path) -> int:
    """Return the end-of-document id.

    It is <|endoftext|> if the vocabulary has that, else the eos_token of tokenizer_config.json.
    """
    if (eod := tokenizer.token_to_id(END_OF_TEXT)) is not None:
        return eod
    config = folder / "tokenizer_config.json"
    settings: dict = {}
    if config.exists():
        settings = _load("--tokenizer-model", config, _read_json)
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    eod = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if eod is None:
        raise DataFlagError(
            f"--tokenizer-model {path}: no end of document: neither {END_OF_TEXT} nor an eos_token "
            "of tokenizer_config.json is in it"
        )
    return eod


def _read_json(name: str) -> dict:
    return json.loads(Path(name).read_text(encoding="utf-8"))


def _gpt2(vocab: Path, merges: Path, flag: str) -> HuggingFaceTokenizer:
    """Return GPT-2's byte-level BPE from vocab.json and merges.txt."""
    tokenizer = HFTokenizer(
        _load(flag, vocab, lambda name: models.BPE.from_file(name, str(merges)))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    eod = tokenizer.token_to_id(END_OF_TEXT)
    if eod is None:
        raise DataFlagError(f"{flag} {vocab}: no {END_OF_TEXT} in it")
    # Known before it is declared: the declaration keeps its id, and keeps the text from being cut.
    tokenizer.add_special_tokens([END_OF_TEXT])
    return HuggingFaceTokenizer(tokenizer, eod, (vocab, merges))


def _load(flag: str, path: Path, load: Callable[[str], Any]) -> Any:
    """Return what `load` makes of a file, or raise a DataFlagError that names flag and file."""
    try:
        return load(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataFlagError(f"{flag} {path}: cannot be read as a tokenizer: {reason}") from None


def _existing(flag: str, path: str | None, tokenizer_type: str) -> Path:
    if path is None:
        raise DataFlagError(f"{flag} is missing; --tokenizer-type {tokenizer_type} needs it")
    if not Path(path).exists():
        raise DataFlagError(f"{flag} {path}: no such file or folder")
    return Path(path)


def _library(name: str, tokenizer_type: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataFlagError(
            f"--tokenizer-type {tokenizer_type} needs the package {name}; "
            f"install it with: pip install {name}"
        ) from None


def _sha256(*parts: bytes) -> str:
    """Return the SHA-256 (hex) of several byte strings."""
    digest = hashlib.sha256()
    for part in parts:
        # With the lengths, so that ("ab", "c") and ("a", "bc") differ.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
