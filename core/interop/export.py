"""Export: named tensors of ours as a Hugging Face folder. The layout that trained them does not matter."""

from collections.abc import Callable, Sequence
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
from .hf_names import hf_places
from .name_map import assemble, their_shapes

GENERATION_FILE = "generation_config.json"
TOKENIZER_FOLDER = "tokenizer"  # beside the checkpoints of a model that came from Hugging Face
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_hf(
    checkpoint: Checkpoint,
    folder: Path,
    eod: int | None,
    tokenizer_files: Sequence[Path],
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> None:
    """Write `folder` so that transformers loads it: weights, config, generation config and tokenizer.

    dtype: of the weights; if None the run's working dtype or, of a checkpoint without optimizer state, each as it is stored. config: in
    place of the one saved beside the checkpoint.
    Raises ConfigError where the model belongs to no family that can be exported.
    """
    config = config or read_config(checkpoint.config_yaml)
    generation = _generation_config(
        [*(path.parent for path in tokenizer_files), checkpoint.folder.parent / TOKENIZER_FOLDER]
    )
    trained = any(name.startswith("optim.") for name in checkpoint.names())
    dtype_of = (
        checkpoint.dtype
        if dtype is None and not trained
        else lambda name: dtype or working_dtype(config.precision)
    )
    generation = generation or {"bos_token_id": eod, "eos_token_id": eod}
    export_weights(
        config.model,
        checkpoint.state["vocab_size"],
        checkpoint.read,
        folder,
        dtype_of,
        tokenizer_files,
        generation,
    )


def export_weights(
    config: ModelConfig,
    vocab_size: int,
    read: Callable[[str], torch.Tensor],
    folder: Path,
    dtype_of: Callable[[str], torch.dtype],
    tokenizer_files: Sequence[Path],
    generation: dict,
) -> None:
    """As export_hf, with `read` giving whole tensors of ours by name and `dtype_of` what to write them in. generation: generation_config.json."""
    if problems := export_problems(config):
        raise ConfigError(problems)
    places = hf_places(config, vocab_size)
    dtypes = {place.name: dtype_of(part) for part, place in places.items()}
    tensors = [
        hf_folder.Outgoing(name, shape, dtypes[name], partial(assemble, name, places, read))
        for name, shape in their_shapes(places).items()
    ]
    special = {
        key: generation.get(key) for key in SPECIAL_IDS
    }  # all of them: some families have defaults outside of the vocabulary
    hf_folder.write_folder(
        folder,
        tensors,
        write_config(
            config,
            vocab_size,
            special | {"torch_dtype": str(tensors[0].dtype).removeprefix("torch.")},
        ),
        tokenizer_files=tokenizer_files,
        generation_config=generation,
    )


def _generation_config(folders: Sequence[Path]) -> dict | None:
    """The first there is: a tokenizer that came from Hugging Face has one beside it."""
    found = [folder / GENERATION_FILE for folder in folders if (folder / GENERATION_FILE).is_file()]
    return read_json(found[0]) if found else None
