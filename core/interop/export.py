"""Export a checkpoint as a Hugging Face folder. The layout that trained it does not matter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..checkpoint.load import Checkpoint
from ..checkpoint.manifest import read_json
from ..config import Config, ConfigError, ModelConfig
from ..config.flags import read_config
from ..precision import working_dtype
from . import hf_folder
from .families import export_problems, write_config
from .hf_names import hf_correspondences
from .name_map import assemble, their_shapes

GENERATION_FILE = "generation_config.json"
TOKENIZER_FOLDER = "tokenizer"  # beside the checkpoints of a model that came from Hugging Face
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Beside:
    """The contents of an exported folder beside config.json and weights.

    tokenizer_files: files to copy
    generation: what generation_config.json says
    """

    tokenizer_files: Sequence[Path]
    generation: dict


def export_hf(
    checkpoint: Checkpoint,
    folder: Path,
    eod: int | None,
    tokenizer_files: Sequence[Path],
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> None:
    """Write `folder` so that transformers loads it: weights, configuration and tokenizer.

    eod: the end of document, which becomes the special ids where no generation config says them
    dtype: of the weights. None: the run's working dtype or, for a checkpoint without optimizer
        state, the dtype each is stored in
    config: used in place of the one saved beside the checkpoint
    Raises ConfigError where the model belongs to no family that can be exported.
    """
    config = config or read_config(checkpoint.config_yaml)
    working = dtype or working_dtype(config.precision)
    is_trained = any(name.startswith("optim.") for name in checkpoint.names())
    # A trained checkpoint holds fp32 masters; the model ran in their rounded copies.
    as_stored = dtype is None and not is_trained
    folders = [path.parent for path in tokenizer_files]
    folders.append(checkpoint.folder.parent / TOKENIZER_FOLDER)
    generation = _generation_config(folders) or {"bos_token_id": eod, "eos_token_id": eod}
    export_weights(
        config.model,
        checkpoint.state["vocab_size"],
        checkpoint.read,
        folder,
        checkpoint.dtype if as_stored else lambda name: working,
        Beside(tokenizer_files, generation),
    )


def export_weights(
    config: ModelConfig,
    vocab_size: int,
    read: Callable[[str], torch.Tensor],
    folder: Path,
    dtype_of: Callable[[str], torch.dtype],
    beside: Beside,
) -> None:
    """Write a folder as export_hf does, from weights that may come from anywhere.

    read: gives a whole tensor of ours by name
    dtype_of: gives what to write our tensor in
    """
    if problems := export_problems(config):
        raise ConfigError(problems)
    correspondences = hf_correspondences(config, vocab_size)
    dtypes = {found.name: dtype_of(part) for part, found in correspondences.items()}
    tensors = [
        hf_folder.Outgoing(
            name, shape, dtypes[name], partial(assemble, name, correspondences, read)
        )
        for name, shape in their_shapes(correspondences).items()
    ]
    # All three ids: some families have defaults outside of the vocabulary.
    more = {key: beside.generation.get(key) for key in SPECIAL_IDS}
    more["torch_dtype"] = str(tensors[0].dtype).removeprefix("torch.")
    hf_folder.write_folder(
        folder,
        tensors,
        write_config(config, vocab_size, more),
        tokenizer_files=beside.tokenizer_files,
        generation_config=beside.generation,
    )


def _generation_config(folders: Sequence[Path]) -> dict | None:
    """Return the first there is: a tokenizer of Hugging Face's has one beside it."""
    for folder in folders:
        if (folder / GENERATION_FILE).is_file():
            return read_json(folder / GENERATION_FILE)
    return None
