"""Convert weights between Hugging Face folders and checkpoints of ours, or write a checkpoint smaller: without optimizer state, in 16 bits."""

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

EXAMPLE = (
    "python tools/convert_checkpoint.py --from hf --to trivium --load Llama-3.2-1B --save RUN\n  "
    "python tools/convert_checkpoint.py --from trivium --to hf --load RUN --save EXPORT --verify"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of the largest logit: fp32 over models of any depth
TOKENS = 64  # of each of two random sequences that --verify looks at


def main(argv: list[str]) -> None:
    parser = Parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--from",
        dest="source",
        choices=("hf", "trivium", "nanogpt", "megatron"),
        required=True,
        help="what --load holds",
    )
    parser.add_argument(
        "--to",
        dest="target",
        choices=("hf", "trivium"),
        required=True,
        help="what --save is to hold",
    )
    parser.add_argument(
        "--load",
        type=Path,
        required=True,
        help="a Hugging Face folder; SAVE or SAVE/iter_N; nanoGPT's out_dir",
    )
    parser.add_argument("--save", type=Path, required=True, help="a folder that holds nothing else")
    parser.add_argument(
        "--ckpt-step", type=int, help="the iteration to convert; the latest if not given"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="number format of the weights; as they are if not given (to hf: that of the run)",
    )
    parser.add_argument(
        "--no-optim",
        action="store_true",
        help="trivium to trivium: leave the optimizer's state out",
    )
    parser.add_argument(
        "--hf-model-type",
        choices=tuple(FAMILIES),
        help="to hf: the family; that it came from, or the first that fits, if not given",
    )
    parser.add_argument(
        "--vocab-size",
        type=positive,
        help="from megatron: the vocabulary without its padding; all rows if not given",
    )
    parser.add_argument(
        "--tokenizer-model", help="to hf: the tokenizer, if it is no longer where the run found it"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare logits with transformers, in fp32, and print the largest difference",
    )
    options = parser.parse_args(argv)
    _check(options)
    if options.target == "trivium":
        with new_folder(options.save):
            _to_trivium(options)
    else:
        _to_hf(options, _opened(options))
    print(f"{options.save}: written")
    if options.verify:
        hf, ours = (
            (options.load, options.save) if options.source == "hf" else (options.save, options.load)
        )
        _verify(hf, ours, options)


def _to_trivium(options: Namespace) -> None:
    if options.source == "hf":
        source = HFModel(options.load)
        data = copy_tokenizer(source.folder, options.save, source.vocab_size)
        write_checkpoint(
            options.save,
            source,
            Described(source.config, source.vocab_size, data),
            DTYPES.get(options.dtype),
        )
    elif options.source in ("nanogpt", "megatron"):
        source = (
            NanoGPT(options.load)
            if options.source == "nanogpt"
            else MegatronDist(options.load, options.vocab_size)
        )
        data = replace(
            DataConfig(), tokenizer_type="NullTokenizer", vocab_size=source.vocab_size - 1
        )
        write_checkpoint(
            options.save,
            source,
            Described(source.config, source.vocab_size, data),
            DTYPES.get(options.dtype),
        )
    else:
        rewrite_checkpoint(
            options.save,
            _opened(options),
            DTYPES.get(options.dtype),
            keeps_optimizer=not options.no_optim,
        )


def _check(options: Namespace) -> None:
    way = f"--from {options.source} --to {options.target}"
    if way == "--from hf --to hf":
        raise BadArgument(f"{way} has nothing to convert")
    if options.source in ("nanogpt", "megatron") and options.target == "hf":
        raise BadArgument(f"{way} takes two steps: first --to trivium, then --from trivium --to hf")
    if not options.load.is_dir():
        raise BadArgument(f"--load {options.load}: no such folder")
    if options.save.resolve() == options.load.resolve():
        raise BadArgument(f"--save {options.save} is --load; name another folder")
    only = {
        "--no-optim": (options.no_optim, "--from trivium --to trivium"),
        "--verify": (options.verify, "--from hf --to trivium", "--from trivium --to hf"),
        "--hf-model-type": (options.hf_model_type, "--from trivium --to hf"),
        "--vocab-size": (options.vocab_size, "--from megatron --to trivium"),
        "--tokenizer-model": (options.tokenizer_model, "--from trivium --to hf"),
        "--ckpt-step": (
            options.ckpt_step is not None,
            "--from trivium --to hf",
            "--from trivium --to trivium",
        ),
    }
    for flag, (given, *ways) in only.items():
        if given and way not in ways:
            raise BadArgument(f"{flag} is for {' or '.join(ways)}, not {way}")


def _opened(options: Namespace) -> Checkpoint:
    return open_checkpoint(
        options.load, ckpt_step=options.ckpt_step, world=Axis("world"), device=CPU
    )


def _to_hf(options: Namespace, checkpoint: Checkpoint) -> None:
    config = read_config(checkpoint.config_yaml)
    if options.hf_model_type:
        config = replace(config, model=replace(config.model, hf_model_type=options.hf_model_type))
    data = (
        config.data
        if options.tokenizer_model is None
        else replace(config.data, tokenizer_model=options.tokenizer_model)
    )
    eod, files = _tokenizer(data)
    try:
        export_hf(checkpoint, options.save, eod, files, DTYPES.get(options.dtype), config)
    except ConfigError as error:
        raise BadArgument("; ".join(error.problems)) from None


def _tokenizer(data: DataConfig) -> tuple[int | None, tuple[Path, ...]]:
    try:
        tokenizer = build_tokenizer(**data.tokenizer)
    except DataError as error:
        print(f"no tokenizer is exported: {error}")
        return None, ()
    return tokenizer.eod, tokenizer.files


@torch.no_grad()
def _verify(hf: Path, ours: Path, options: Namespace) -> None:
    """Raises ValueError where the logits differ by more than rounding. A tensor that one side stores in fewer bits is rounded on the other."""
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
    checkpoint, source = (
        open_checkpoint(ours, ckpt_step=step, world=Axis("world"), device=CPU),
        HFModel(hf),
    )
    names = {id(parameter): name for name, parameter in peer.named_parameters()}
    embedding, head = (
        names[id(layer.weight)]
        for layer in (peer.get_input_embeddings(), peer.get_output_embeddings())
    )
    for parameter in model.parameters():
        for part in layout_of(parameter).parts:
            view = part.within(parameter)
            view.copy_(view.to(source.dtype(part.name)))
            their = {"embedding.word.weight": embedding, "head.weight": head}.get(
                part.name, source.correspondences[part.name].name
            )
            weight = peer.get_parameter(their)
            weight.copy_(weight.to(checkpoint.dtype(part.name)))
    length = min(TOKENS, model.config.max_position_embeddings)
    tokens = torch.randint(
        0, model.vocab_size, (2, length), generator=torch.Generator().manual_seed(0)
    )
    expected, found = peer(tokens).logits, model(tokens)[..., : model.vocab_size]
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    print(f"largest difference of logits: {difference:.3e}; largest logit: {largest:.3e}")
    if not difference <= TOLERANCE * max(1.0, largest):
        raise ValueError(f"{ours} and {hf} differ by more than rounding")


if __name__ == "__main__":
    run(main)
