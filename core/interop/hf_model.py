"""A Hugging Face folder as a source of our tensors, read slice by slice."""

from collections.abc import Iterable
from pathlib import Path

import torch

from ..checkpoint.manifest import CheckpointError
from ..config import DataConfig
from ..config.validate import model_problems
from ..layout import Box, Piece
from .families import read_config
from .hf_folder import HFFolder
from .hf_names import hf_correspondences
from .name_map import read_piece, their_shapes, whole_box

# What old folders hold beside weights: tables that are made anew.
_TABLES = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    "rotary_emb.inv_freq",
)
_COMPARED = 1 << 24  # elements at a time, where two tensors are compared
_HEADS = ("lm_head.weight", "embed_out.weight")  # the two names that the head has had


class HFModel:
    """A model in a folder that transformers wrote, with its configuration in our terms.

    config: our configuration of it
    vocab_size: rows of its embedding
    correspondences: our name -> where that tensor lies in the folder

    Raises CheckpointError for a folder that is broken, of a family that is not built here, or that
    holds other tensors than its config.json says: no tensor is left out silently.
    """

    def __init__(self, path: Path):
        self.folder = HFFolder(path)
        try:
            self.config, self.vocab_size = read_config(self.folder.config)
            if problems := model_problems(self.config):
                raise ValueError("; ".join(problems))
            self.correspondences = hf_correspondences(self.config, self.vocab_size)
        except ValueError as error:
            raise CheckpointError(f"{self.folder.path / 'config.json'}: {error}") from error
        held = set(self.folder.names())
        shapes = their_shapes(self.correspondences)
        # The name by transformers' classes -> the name in this folder.
        self._names = {name: _name_in(held, name) for name in shapes}
        for name, shape in shapes.items():
            self._check_tensor(name, shape, held)
        self._check_others(held)

    def _check_tensor(self, name: str, shape: tuple[int, ...], held: set[str]) -> None:
        """Raise CheckpointError unless a tensor of the model is there, in its shape, as floats."""
        stored = self._names[name]
        folder = self.folder
        if stored not in held:
            raise CheckpointError(f"{folder.path} has no tensor {name}")
        found = folder.shape(stored)
        if found != shape:
            raise CheckpointError(
                f"{folder.path}: {name} is {list(found)}, config.json makes it {list(shape)}"
            )
        dtype = folder.dtype(stored)
        if dtype is None or not dtype.is_floating_point:
            held_as = "another dtype" if dtype is None else dtype
            raise CheckpointError(
                f"{folder.path}: {name} is stored as {held_as}; "
                "weights are float64, float32, float16 or bfloat16"
            )

    def _check_others(self, held: set[str]) -> None:
        """Raise CheckpointError for a tensor that would be left out and that says something."""
        ignored = {name for name in held if name.endswith(_TABLES)}
        # Some folders hold a head beside the embedding that it is tied to.
        if self.config.tied:
            heads = held.intersection(_HEADS)
            for head in heads:
                self._check_tied(head)
            ignored |= heads
        unknown = sorted(held - set(self._names.values()) - ignored)
        if unknown:
            raise CheckpointError(
                f"{self.folder.path} holds {unknown[0]}, "
                f"which a {self.config.hf_model_type} of its config.json does not have"
            )

    def _check_tied(self, head: str) -> None:
        """Raise CheckpointError unless a head beside the embedding it is tied to is the same."""
        words = self._names[self.correspondences["embedding.word.weight"].name]
        if not self._are_equal(words, head):
            raise CheckpointError(
                f"{self.folder.path}: tie_word_embeddings, but {head} is not {words}; "
                f"save it untied, or without {head}"
            )

    def _are_equal(self, first: str, second: str) -> bool:
        """Return whether two stored matrices are the same. A few rows are held at a time."""
        rows, columns = self.folder.shape(first)
        if self.folder.shape(second) != (rows, columns):
            return False
        step = max(1, _COMPARED // columns)
        for start in range(0, rows, step):
            box = ((start, min(start + step, rows)), (0, columns))
            if not torch.equal(self.folder.read(first, box), self.folder.read(second, box)):
                return False
        return True

    def names(self) -> list[str]:
        """Return our names, in the order of the model."""
        return list(self.correspondences)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of our tensor `name`."""
        if name not in self.correspondences:
            raise CheckpointError(
                f"{self.folder.path} has no tensor {name}: "
                "its model is another than the flags say; give --hf-config"
            )
        found = self.correspondences[name]
        columns = found.shape[:-1] if found.transposed else found.shape[1:]
        return (sum(run.num_rows for run in found.runs), *columns)

    def dtype(self, name: str) -> torch.dtype:
        """Return what the folder stores our tensor `name` in."""
        dtype = self.folder.dtype(self._names[self.correspondences[name].name])
        assert dtype is not None  # checked when the folder was opened
        return dtype

    def read_into(self, pieces: Iterable[Piece]) -> None:
        """Fill each piece, converted to its dtype.

        Raises CheckpointError, before anything is filled, for one that has another shape.
        """
        pieces = list(pieces)
        for piece in pieces:
            self._check_piece(piece)
        with torch.no_grad():
            for piece in pieces:
                read_piece(piece, self.correspondences[piece.name], self._read_into)

    def _check_piece(self, piece: Piece) -> None:
        there = self.shape(piece.name)
        if there == tuple(piece.shape):
            return
        remedy = ""
        # Rows of the embedding: the tokenizer has fewer ids than the model has rows.
        if there[0] == self.vocab_size:
            remedy = (
                f"; give --vocab-size {there[0]} in place of the tokenizer's {piece.shape[0]} "
                f"({there[0] - 1} with NullTokenizer)"
            )
        raise CheckpointError(
            f"{piece.name} is {list(there)} in {self.folder.path}, "
            f"{list(piece.shape)} in this run{remedy}"
        )

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor of ours on the CPU, in the dtype it is stored in."""
        shape = self.shape(name)
        tensor = torch.empty(shape, dtype=self.dtype(name))
        piece = Piece(name, shape, whole_box(shape), tensor)
        read_piece(piece, self.correspondences[name], self._read_into)
        return tensor

    def _read_into(self, name: str, box: Box, tensor: torch.Tensor) -> None:
        self.folder.read_into(self._names[name], box, tensor)


def _name_in(held: set[str], name: str) -> str:
    """Return the name that a folder has for a tensor; `name` itself where it has none.

    The oldest folders have no prefix before the first dot, and the head has had two names.
    """
    candidates = [name, name.partition(".")[2]]
    if name in _HEADS:
        candidates += _HEADS
    return next((candidate for candidate in candidates if candidate in held), name)


def is_hf_folder(path: Path) -> bool:
    """Return whether `path` is a model of Hugging Face's rather than a checkpoint of ours."""
    return (path / "config.json").is_file()


def tokenizer_of(folder: Path, vocab_size: int) -> DataConfig:
    """Return the flags of the tokenizer in a Hugging Face folder.

    A folder without one gets a NullTokenizer of the model's vocabulary.
    """
    has_parts = (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
    if has_parts or (folder / "tokenizer.json").exists():
        kind, path = "HuggingFaceTokenizer", folder
    elif (folder / "tokenizer.model").exists():
        kind, path = "SentencePieceTokenizer", folder / "tokenizer.model"
    else:
        return DataConfig(tokenizer_type="NullTokenizer", vocab_size=vocab_size - 1)
    model = str(path.resolve())
    return DataConfig(tokenizer_type=kind, tokenizer_model=model, vocab_size=vocab_size)
