"""Convert weights between Hugging Face folders and checkpoints of ours.

Also from nanoGPT and Megatron-LM, and from a checkpoint of ours to a smaller one: without optimizer
state, in 16 bits.
"""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from _cli import BadArgument, Parser, positive, run

from trivium.checkpoint.load import Checkpoint, open_checkpoint
from trivium.config import ConfigError, DataConfig
from trivium.config.flags import read_config
from trivium.data.errors import DataError
from trivium.data.tokenizer import build_tokenizer
from trivium.interop.convert import (
    Described,
    copy_tokenizer,
    new_folder,
    rewrite_checkpoint,
    write_checkpoint,
)
from trivium.interop.export import export_hf
from trivium.interop.families import FAMILIES
from trivium.interop.hf_model import HFModel
from trivium.interop.megatron import MegatronDist
from trivium.interop.nanogpt import NanoGPT
from trivium.interop.pretrained import load_pretrained
from trivium.layout import layout_of
from trivium.mesh import Axis
from trivium.model.gpt import GPT

DESCRIPTION = (
    "Convert weights between Hugging Face folders and checkpoints of ours, "
    "or write a checkpoint smaller: without optimizer state, in 16 bits."
)
EXAMPLE = (
    "python tools/convert_checkpoint.py --from hf --to trivium --load Llama-3.2-1B --save RUN\n  "
    "python tools/convert_checkpoint.py --from trivium --to hf --load RUN --save EXPORT --verify"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of the largest logit: fp32 over models of any depth
TOKENS = 64  # of each of two random sequences that --verify looks at


def main(argv: list[str]) -> None:
    """Convert as the flags say, and compare logits if asked to."""
    options = _parser().parse_args(argv)
    _check(options)
    if options.target == "trivium":
        with new_folder(options.save):
            _to_trivium(options)
    else:
        _to_hf(options, _opened(options))
    print(f"{options.save}: written")
    if options.verify and options.source == "hf":
        _verify(options.load, options.save, options)
    elif options.verify:
        _verify(options.save, options.load, options)


def _parser() -> Parser:
    parser = Parser(DESCRIPTION, EXAMPLE)
    add = parser.add_argument
    add(
        "--from",
        dest="source",
        choices=("hf", "trivium", "nanogpt", "megatron"),
        required=True,
        help="what --load holds",
    )
    add(
        "--to",
        dest="target",
        choices=("hf", "trivium"),
        required=True,
        help="what --save is to hold",
    )
    add(
        "--load",
        type=Path,
        required=True,
        help="a Hugging Face folder; SAVE or SAVE/iter_N; nanoGPT's out_dir",
    )
    add("--save", type=Path, required=True, help="a folder that holds nothing else")
    add("--ckpt-step", type=int, help="the iteration to convert; the latest if not given")
    _add_options(parser)
    return parser


def _add_options(parser: Parser) -> None:
    """Add the flags that only some conversions have."""
    add = parser.add_argument
    add(
        "--dtype",
        choices=tuple(DTYPES),
        help="number format of the weights; as they are if not given (to hf: that of the run)",
    )
    add(
        "--no-optim",
        action="store_true",
        help="trivium to trivium: leave the optimizer's state out",
    )
    add(
        "--hf-model-type",
        choices=tuple(FAMILIES),
        help="to hf: the family; that it came from, or the first that fits, if not given",
    )
    add(
        "--vocab-size",
        type=positive,
        help="from megatron: the vocabulary without its padding; all rows if not given",
    )
    add(
        "--tokenizer-model",
        help="to hf: the tokenizer, if it is no longer where the run found it",
    )
    add(
        "--verify",
        action="store_true",
        help="compare logits with transformers, in fp32, and print the largest difference",
    )


def _check(options: Namespace) -> None:
    """Raise BadArgument for flags that cannot be had together."""
    way = f"--from {options.source} --to {options.target}"
    if way == "--from hf --to hf":
        raise BadArgument(f"{way} has nothing to convert")
    if options.source in ("nanogpt", "megatron") and options.target == "hf":
        raise BadArgument(f"{way} takes two steps: first --to trivium, then --from trivium --to hf")
    if not options.load.is_dir():
        raise BadArgument(f"--load {options.load}: no such folder")
    if options.save.resolve() == options.load.resolve():
        raise BadArgument(f"--save {options.save} is --load; name another folder")
    # Flag -> whether it is given, and the conversions that have it.
    to_hf, smaller = "--from trivium --to hf", "--from trivium --to trivium"
    only = {
        "--no-optim": (options.no_optim, smaller),
        "--verify": (options.verify, "--from hf --to trivium", to_hf),
        "--hf-model-type": (options.hf_model_type, to_hf),
        "--vocab-size": (options.vocab_size, "--from megatron --to trivium"),
        "--tokenizer-model": (options.tokenizer_model, to_hf),
        "--ckpt-step": (options.ckpt_step is not None, to_hf, smaller),
    }
    for flag, (given, *ways) in only.items():
        if given and way not in ways:
            raise BadArgument(f"{flag} is for {' or '.join(ways)}, not {way}")


def _to_trivium(options: Namespace) -> None:
    dtype = DTYPES.get(options.dtype)
    if options.source == "trivium":
        keeps_optimizer = not options.no_optim
        rewrite_checkpoint(options.save, _opened(options), dtype, keeps_optimizer=keeps_optimizer)
        return
    if options.source == "hf":
        source = HFModel(options.load)
        data = copy_tokenizer(source.folder, options.save, source.vocab_size)
    else:
        source = (
            NanoGPT(options.load)
            if options.source == "nanogpt"
            else MegatronDist(options.load, options.vocab_size)
        )
        data = DataConfig(tokenizer_type="NullTokenizer", vocab_size=source.vocab_size - 1)
    described = Described(source.config, source.vocab_size, data)
    write_checkpoint(options.save, source, described, dtype)


def _opened(options: Namespace) -> Checkpoint:
    return open_checkpoint(
        options.load, ckpt_step=options.ckpt_step, world=Axis("world"), device=CPU
    )


def _to_hf(options: Namespace, checkpoint: Checkpoint) -> None:
    config = read_config(checkpoint.config_yaml)
    if options.hf_model_type:
        model = replace(config.model, hf_model_type=options.hf_model_type)
        config = replace(config, model=model)
    data = config.data
    if options.tokenizer_model is not None:
        data = replace(data, tokenizer_model=options.tokenizer_model)
    eod, files = _tokenizer(data)
    try:
        export_hf(checkpoint, options.save, eod, files, DTYPES.get(options.dtype), config)
    except ConfigError as error:
        raise BadArgument("; ".join(error.problems)) from None


def _tokenizer(data: DataConfig) -> tuple[int | None, tuple[Path, ...]]:
    """Return the end of document and the files of a tokenizer; none where it cannot be had."""
    try:
        tokenizer = build_tokenizer(**data.tokenizer)
    except DataError as error:
        print(f"no tokenizer is exported: {error}")
        return None, ()
    return tokenizer.eod, tokenizer.files


@torch.no_grad()
def _verify(hf: Path, ours: Path, options: Namespace) -> None:
    """Compare the logits of a folder in transformers with those of ours, on random tokens.

    Raises ValueError where they differ by more than rounding.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise BadArgument(
            "--verify needs the package transformers; install it with: pip install transformers"
        ) from None
    step = options.ckpt_step if options.source == "trivium" else None
    peer = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = load_pretrained(
        ours, device=CPU, dtype=torch.float32, kernels="torch", ckpt_step=step
    ).model
    checkpoint = open_checkpoint(ours, ckpt_step=step, world=Axis("world"), device=CPU)
    _round_alike(model, checkpoint, peer, HFModel(hf))
    length = min(TOKENS, model.config.max_position_embeddings)
    seeded = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (2, length), generator=seeded)
    expected = peer(tokens).logits
    found = model(tokens)[..., : model.vocab_size]
    difference = (found - expected).abs().max().item()
    largest = expected.abs().max().item()
    print(f"largest difference of logits: {difference:.3e}; largest logit: {largest:.3e}")
    if not difference <= TOLERANCE * max(1.0, largest):
        raise ValueError(f"{ours} and {hf} differ by more than rounding")


def _round_alike(
    model: GPT, checkpoint: Checkpoint, peer: torch.nn.Module, source: HFModel
) -> None:
    """Round each weight to the dtype of the other side: one may store it in fewer bits."""
    names = {id(parameter): name for name, parameter in peer.named_parameters()}
    theirs = {name: found.name for name, found in source.correspondences.items()}
    # The two that a folder may name in another way than the model in memory.
    theirs["embedding.word.weight"] = names[id(peer.get_input_embeddings().weight)]
    theirs["head.weight"] = names[id(peer.get_output_embeddings().weight)]
    for parameter in model.parameters():
        for part in layout_of(parameter).parts:
            view = part.within(parameter)
            view.copy_(view.to(source.dtype(part.name)))
            weight = peer.get_parameter(theirs[part.name])
            weight.copy_(weight.to(checkpoint.dtype(part.name)))


if __name__ == "__main__":
    run(main)
