"""A trained model to use, from a checkpoint of ours or from a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

import torch

from .. import ops
from ..checkpoint.load import open_checkpoint
from ..checkpoint.manifest import CheckpointError
from ..config import DataConfig
from ..config.flags import read_config
from ..layout import Piece, layout_of
from ..mesh import Axis
from ..model.gpt import GPT
from .hf_model import HFModel, is_hf_folder, tokenizer_of


@dataclass(frozen=True)
class Pretrained:
    """A model in evaluation mode on its device.

    tokenizer: the flags of the tokenizer it was trained with, as far as its folder tells
    """

    model: GPT
    tokenizer: DataConfig


def load_pretrained(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernels: str = "auto",
    ckpt_step: int | None = None,
) -> Pretrained:
    """Load SAVE, SAVE/iter_N or a Hugging Face folder, with weights in `dtype`.

    Raises CheckpointError for a folder that is neither, or that does not verify.
    """
    if ckpt_step is not None and is_hf_folder(path):
        raise CheckpointError(
            f"{path} is a Hugging Face folder, which holds no iterations: leave --ckpt-step out"
        )
    run_ops = ops.select_ops(kernels, device, dtype)
    if is_hf_folder(path):
        model, tokenizer = _from_hf(path, run_ops)
    else:
        model, tokenizer = _from_checkpoint(path, run_ops, ckpt_step)
    return Pretrained(model.to_device(device, dtype).eval(), tokenizer)


def _from_checkpoint(path: Path, run_ops: ops.Ops, ckpt_step: int | None) -> tuple[GPT, DataConfig]:
    checkpoint = open_checkpoint(
        path, ckpt_step=ckpt_step, world=Axis("world"), device=torch.device("cpu")
    )
    config = read_config(checkpoint.config_yaml)
    model = GPT(config.model, checkpoint.state["vocab_size"], ops=run_ops, seed=None)
    checkpoint.read_into(_pieces(model))
    return model, config.data


def _from_hf(path: Path, run_ops: ops.Ops) -> tuple[GPT, DataConfig]:
    source = HFModel(path)
    model = GPT(source.config, source.vocab_size, ops=run_ops, seed=None)
    source.read_into(_pieces(model))
    return model, tokenizer_of(path, source.vocab_size)


def _pieces(model: GPT) -> list[Piece]:
    return [
        piece
        for parameter in model.parameters()
        for piece in layout_of(parameter).pieces(parameter.data)
    ]
