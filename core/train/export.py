"""Export: a published checkpoint as a Hugging Face folder. It reads named parts, so the layout that trained them does not matter."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..checkpoint import hf
from ..checkpoint.load import Checkpoint
from ..config import ConfigError
from ..flags import read_config
from ..model import families
from ..precision import working_dtype


def export_hf(checkpoint: Checkpoint, folder: Path, eod: int, tokenizer_files: Sequence[Path]) -> None:
    """Write `folder` so that transformers loads it: weights in the run's working dtype, config, generation config and tokenizer.

    Raises ConfigError where the model belongs to no family that can be exported.
    """
    config = read_config(checkpoint.config_yaml)
    if problems := families.export_problems(config.model):
        raise ConfigError(problems)
    tensors = [(theirs, partial(checkpoint.read, ours)) for ours, theirs in families.llama_names(config.model).items()]
    hf.write_folder(
        folder,
        tensors,
        families.llama_config(config.model, checkpoint.state["vocab_size"], eod),
        dtype=working_dtype(config.precision),
        tokenizer_files=tokenizer_files,
        generation_config={"bos_token_id": eod, "eos_token_id": eod},
    )
