"""Load a trained model by the flags that generate and evaluate share."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from _cli import BadArgument, Parser

from trivium.data.tokenizer import Tokenizer, build_tokenizer
from trivium.interop.pretrained import Pretrained, load_pretrained
from trivium.launch import choose_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_model_flags(parser: Parser) -> None:
    """Add --load and how to load: iteration, tokenizer, device, number format, kernels."""
    parser.add_argument(
        "--load", type=Path, required=True, help="SAVE, SAVE/iter_N or a Hugging Face folder"
    )
    parser.add_argument(
        "--ckpt-step", type=int, help="the iteration to load; the latest if not given"
    )
    parser.add_argument(
        "--tokenizer-model", help="the tokenizer, if it is no longer where the run found it"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="number format of the weights"
    )
    parser.add_argument(
        "--kernels",
        default="auto",
        help="auto, torch, triton or native; after commas OP=ONE for single operations",
    )


def load_model(options: argparse.Namespace) -> Pretrained:
    """Return the model that the flags name, on its device."""
    if not options.load.is_dir():
        raise BadArgument(f"--load {options.load}: no such folder")
    device = choose_device(options.device, local_rank=0)
    return load_pretrained(
        options.load,
        device=device,
        dtype=DTYPES[options.dtype],
        kernels=options.kernels,
        ckpt_step=options.ckpt_step,
    )


def load_tokenizer(pretrained: Pretrained, options: argparse.Namespace) -> Tokenizer:
    """Return the tokenizer of the model's training, or the one that the flags name instead."""
    described = pretrained.tokenizer
    if options.tokenizer_model:
        described = replace(described, tokenizer_model=options.tokenizer_model)
    return build_tokenizer(**described.tokenizer)
