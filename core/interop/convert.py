"""Write the weights of any source as a checkpoint of ours, tensor by tensor."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from ..checkpoint import publish
from ..checkpoint.load import Checkpoint
from ..checkpoint.manifest import CheckpointError
from ..checkpoint.rank_files import TensorBox, complete, write_rank_files
from ..checkpoint.retention import Retention
from ..checkpoint.shards import DTYPE_NAMES, host_bytes
from ..config import Config, DataConfig, ModelConfig, PrecisionConfig
from ..config.flags import write_config
from ..data.tokenizer import HF_FILES, build_tokenizer
from ..precision import LossScaler
from .export import GENERATION_FILE, SPECIAL_IDS, TOKENIZER_FOLDER
from .hf_folder import HFFolder
from .hf_model import tokenizer_of

MAX_SHARD_BYTES = 1 << 30


class Weights(Protocol):
    """Named tensors of ours, whatever holds them."""

    def names(self) -> list[str]:
        """Return all names, in the order of the model."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Return what a tensor is stored in."""

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor on the CPU."""


@dataclass(frozen=True)
class Described:
    """A model without its weights: what else a checkpoint needs.

    data: the flags of its tokenizer
    """

    model: ModelConfig
    vocab_size: int
    data: DataConfig


def write_checkpoint(
    save_dir: Path, weights: Weights, described: Described, dtype: torch.dtype | None
) -> None:
    """Publish weights as iteration 0, without optimizer state. One tensor is held at a time.

    dtype: what to write them in; None for what each is stored in
    Raises CheckpointError where the folder cannot be written.
    """
    # The first tensor stands for all: a folder of mixed dtypes keeps them, tensor by tensor.
    precision = _precision(dtype or weights.dtype(weights.names()[0]))
    config = replace(Config(), model=described.model, data=described.data, precision=precision)
    state = {
        "iteration": 0,
        "consumed_samples": 0,
        "consumed_tokens": 0,
        "optimizer_steps": 0,
        "loss_scale": LossScaler(precision, torch.device("cpu")).state(),
        "random": {"seed": config.batch.seed},
        "vocab_size": described.vocab_size,
        "fingerprints": {
            "tokenizer": build_tokenizer(**described.data.tokenizer).fingerprint,
            "data": "",
        },
        "persistent": True,
    }
    _publish(save_dir, 0, _blocks(weights, weights.names(), dtype), state, write_config(config))


def rewrite_checkpoint(
    save_dir: Path, checkpoint: Checkpoint, dtype: torch.dtype | None, *, keeps_optimizer: bool
) -> None:
    """Publish a checkpoint again, smaller.

    dtype: what to write its weights in; None for what each is stored in
    keeps_optimizer: whether the optimizer's state, which stays fp32, is written too
    """
    names = checkpoint.names()
    weights = [name for name in names if not name.startswith("optim.")]
    moments = [name for name in names if name.startswith("optim.")]
    blocks = list(_blocks(checkpoint, weights, dtype))
    if keeps_optimizer:
        blocks += _blocks(checkpoint, moments, None)
    _publish(save_dir, checkpoint.iteration, blocks, checkpoint.state, checkpoint.config_yaml)


@contextmanager
def new_folder(save_dir: Path) -> Iterator[None]:
    """Enter a context that fills `save_dir`. If that fails, nothing of it is left.

    Raises CheckpointError where the folder holds anything already.
    """
    found = sorted(save_dir.iterdir()) if save_dir.is_dir() else []
    if found:
        raise CheckpointError(
            f"{save_dir} holds {found[0].name} already; name another folder, or remove it"
        )
    is_new = not save_dir.exists()
    save_dir.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in save_dir.iterdir():
            publish.remove(path)
        if is_new:
            save_dir.rmdir()
        raise


def copy_tokenizer(source: HFFolder, save_dir: Path, vocab_size: int) -> DataConfig:
    """Copy tokenizer and generation config of a Hugging Face folder to SAVE/tokenizer.

    Returns the flags of the copied tokenizer. A folder without one gives a NullTokenizer of the
    model's vocabulary.
    """
    folder = save_dir / TOKENIZER_FOLDER
    folder.mkdir()
    for name in (*HF_FILES, GENERATION_FILE):
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    if not (folder / GENERATION_FILE).exists():
        ids = {key: source.config[key] for key in SPECIAL_IDS if source.config.get(key) is not None}
        (folder / GENERATION_FILE).write_text(json.dumps(ids, indent=2) + "\n")
    return tokenizer_of(folder, vocab_size)


def _blocks(weights: Weights, names: list[str], dtype: torch.dtype | None) -> Iterator[TensorBox]:
    for name in names:
        shape = weights.shape(name)
        stored_as = dtype or weights.dtype(name)
        origin = (0,) * len(shape)
        # Read when it is written, so that one tensor is held at a time.
        read = partial(_bytes, weights.read, name, stored_as)
        yield TensorBox(name, shape, origin, DTYPE_NAMES[stored_as], shape, read)


def _bytes(read: Callable[[str], torch.Tensor], name: str, dtype: torch.dtype) -> memoryview:
    return host_bytes(read(name).to(dtype))


def _publish(
    save_dir: Path, iteration: int, blocks: Iterable[TensorBox], state: dict, config_yaml: str
) -> None:
    folder = publish.begin(save_dir, iteration)
    try:
        write_rank_files(folder, 0, blocks, MAX_SHARD_BYTES)
        complete(save_dir, iteration, 1, state, config_yaml, Retention())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _precision(dtype: torch.dtype) -> PrecisionConfig:
    return PrecisionConfig(bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
