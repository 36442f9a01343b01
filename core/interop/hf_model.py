"""A Hugging Face folder as a source of our tensors, read slice by slice, and its configuration as ours."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint.manifest import CheckpointError
from ..config import DataConfig
from ..config.validate import model_problems
from ..layout import Box, Piece
from .families import read_config
from .hf_folder import HFFolder
from .hf_names import hf_places
from .name_map import read_piece, their_shapes

# What old folders hold beside weights: tables that are made anew.
_TABLES = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    "rotary_emb.inv_freq",
)
_COMPARED = 1 << 24  # elements at a time
_HEADS = ("lm_head.weight", "embed_out.weight")


class HFModel:
    """A model in a folder that transformers wrote, `config` and `vocab_size` in our terms.

    Raises CheckpointError for a folder that is broken, of a family that is not built here, or that holds other tensors than its
    config.json says: none is left out without a word.
    """

    def __init__(self, path: Path):
        self.folder = HFFolder(path)
        try:
            self.config, self.vocab_size = read_config(self.folder.config)
            if problems := model_problems(self.config):
                raise ValueError("; ".join(problems))
            self.places = hf_places(self.config, self.vocab_size)
        except ValueError as error:
            raise CheckpointError(f"{self.folder.path / 'config.json'}: {error}") from error
        held = set(self.folder.names())
        self._names = {name: self._found(name, held) for name in their_shapes(self.places)}
        for name, shape in their_shapes(self.places).items():
            stored = self._names[name]
            if stored not in held:
                raise CheckpointError(f"{self.folder.path} has no tensor {name}")
            if self.folder.shape(stored) != shape:
                raise CheckpointError(
                    f"{self.folder.path}: {name} is {list(self.folder.shape(stored))}, config.json makes it {list(shape)}"
                )
            dtype = self.folder.dtype(stored)
            if dtype is None or not dtype.is_floating_point:
                held_as = "another dtype" if dtype is None else dtype
                raise CheckpointError(
                    f"{self.folder.path}: {name} is stored as {held_as}; weights are float64, float32, float16 or bfloat16"
                )
        ignored = {
            name for name in held if name.endswith(_TABLES) or (self.config.tied and name in _HEADS)
        }
        for head in held & set(_HEADS) if self.config.tied else ():
            self._check_tied(head)
        if unknown := sorted(held - set(self._names.values()) - ignored):
            raise CheckpointError(
                f"{self.folder.path} holds {unknown[0]}, which a {self.config.hf_model_type} of its config.json does not have"
            )

    def _check_tied(self, head: str) -> None:
        """A head stored beside an embedding that it is tied to must be the same, or one of them would be lost."""
        words = self._names[self.places["embedding.word.weight"].name]
        rows, columns = self.folder.shape(words)
        step = max(1, _COMPARED // columns)
        same = self.folder.shape(head) == (rows, columns) and all(
            torch.equal(
                *(
                    self.folder.read(name, ((start, min(start + step, rows)), (0, columns)))
                    for name in (words, head)
                )
            )
            for start in range(0, rows, step)
        )
        if not same:
            raise CheckpointError(
                f"{self.folder.path}: tie_word_embeddings, but {head} is not {words}; save it untied, or without {head}"
            )

    def names(self) -> list[str]:
        """Our names, in the order of the model."""
        return list(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of our tensor `name`."""
        if name not in self.places:
            raise CheckpointError(
                f"{self.folder.path} has no tensor {name}: its model is another than the flags say; give --hf-config"
            )
        place = self.places[name]
        columns = place.shape[:-1] if place.transposed else place.shape[1:]
        return (sum(run.count for run in place.runs), *columns)

    def dtype(self, name: str) -> torch.dtype:
        """What the folder stores our tensor `name` in."""
        return self.folder.dtype(self._names[self.places[name].name])

    def read_into(self, pieces: Iterable[Piece]) -> None:
        """Fill each piece, converted to its dtype. Raises CheckpointError, before anything is filled, for one that has another shape."""
        pieces = list(pieces)
        for piece in pieces:
            there = self.shape(piece.name)
            if there != tuple(piece.shape):
                remedy = ""
                if there[0] == self.vocab_size:
                    remedy = f"; give --vocab-size {there[0]} in place of the tokenizer's {piece.shape[0]} ({there[0] - 1} with NullTokenizer)"
                raise CheckpointError(
                    f"{piece.name} is {list(there)} in {self.folder.path}, {list(piece.shape)} in this run{remedy}"
                )
        with torch.no_grad():
            for piece in pieces:
                read_piece(piece, self.places[piece.name], self._read_into)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor of ours on the CPU, in the dtype it is stored in."""
        shape = self.shape(name)
        tensor = torch.empty(shape, dtype=self.dtype(name))
        read_piece(
            Piece(name, shape, tuple((0, size) for size in shape), tensor),
            self.places[name],
            self._read_into,
        )
        return tensor

    def _read_into(self, name: str, box: Box, tensor: torch.Tensor) -> None:
        self.folder.read_into(self._names[name], box, tensor)

    @staticmethod
    def _found(name: str, held: set[str]) -> str:
        """The name as this folder has it: the oldest have no prefix, and the head has had two names."""
        candidates = [name, name.partition(".")[2], *(_HEADS if name in _HEADS else ())]
        return next((candidate for candidate in candidates if candidate in held), name)


def is_hf_folder(path: Path) -> bool:
    """Whether `path` is a model of Hugging Face's rather than a checkpoint of ours."""
    return (path / "config.json").is_file()


def tokenizer_of(folder: Path, vocab_size: int) -> DataConfig:
    """The flags of the tokenizer in a Hugging Face folder; without one, a NullTokenizer of the model's vocabulary."""
    if (folder / "tokenizer.json").exists() or (
        (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
    ):
        return replace(
            DataConfig(),
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(folder.resolve()),
            vocab_size=vocab_size,
        )
    if (folder / "tokenizer.model").exists():
        path = (folder / "tokenizer.model").resolve()
        return replace(
            DataConfig(),
            tokenizer_type="SentencePieceTokenizer",
            tokenizer_model=str(path),
            vocab_size=vocab_size,
        )
    return replace(DataConfig(), tokenizer_type="NullTokenizer", vocab_size=vocab_size - 1)
