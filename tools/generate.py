"""Continue a prompt with a trained model: a checkpoint of ours or a Hugging Face folder."""

import argparse
import sys
from collections.abc import Iterable

import torch
from _cli import BadArgument, Parser, count, positive, run
from _model import add_model_flags, load_model, load_tokenizer

from trivium.data.tokenizer import Tokenizer
from trivium.decode.generate import generate
from trivium.decode.sampling import Sampling
from trivium.model.gpt import GPT

EXAMPLE = (
    'python tools/generate.py --load RUN --prompt "def main" --max-new-tokens 100 '
    "--temperature 0.8 --top-k 50 --seed 1"
)
HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # how a tokenizer decodes it


def main(argv: list[str]) -> None:
    """Load the model and print its continuation."""
    options = parse(argv)
    pretrained = load_model(options)
    model = pretrained.model
    tokenizer = load_tokenizer(pretrained, options)
    ids = tokenizer.encode(options.prompt) or [tokenizer.eod]
    longest = min(options.max_new_tokens, room_for(model, ids))
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    prompt = torch.tensor([ids], device=model.embedding.weight.device)
    draw = torch.Generator().manual_seed(options.seed)
    sys.stdout.write(options.prompt)
    write(generate(model, prompt, longest, sampling, draw), tokenizer)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = Parser(__doc__, EXAMPLE)
    add_model_flags(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=100,
        help="tokens to add at most; the end of the document ends earlier",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="0 takes the likeliest token each time",
    )
    parser.add_argument(
        "--top-k",
        type=count,
        default=0,
        help="draw from the k likeliest tokens; 0 from all",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens that together have this probability",
    )
    parser.add_argument("--seed", type=int, default=1234, help="same seed, same text")
    options = parser.parse_args(argv)
    if not options.temperature >= 0:
        raise BadArgument(f"--temperature {options.temperature} must not be negative")
    if not 0 < options.top_p <= 1:
        raise BadArgument(f"--top-p {options.top_p} is not in (0, 1]")
    return options


def room_for(model: GPT, ids: list[int]) -> int:
    """Return how many tokens the model can add. Raises BadArgument if it cannot read the prompt."""
    if max(ids) >= model.vocab_size:
        raise BadArgument(
            f"--tokenizer-model gives id {max(ids)}, the model has a vocabulary of "
            f"{model.vocab_size}: it was trained with another"
        )
    if model.config.position_embedding_type != "learned_absolute":
        return sys.maxsize
    positions = model.config.max_position_embeddings
    if len(ids) >= positions:
        raise BadArgument(
            f"--prompt has {len(ids)} tokens, the model has {positions} positions; shorten it"
        )
    return positions - len(ids)


def write(tokens: Iterable[torch.Tensor], tokenizer: Tokenizer) -> None:
    """Print the text of tokens as they come, up to the end of the document."""
    new: list[int] = []
    shown = ""
    for chosen in tokens:
        if chosen.item() == tokenizer.eod:
            break
        new.append(chosen.item())
        text = tokenizer.decode(new)
        if not text.endswith(HALF_A_CHARACTER):  # else wait for the rest of it
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    rest = tokenizer.decode(new)[len(shown) :]
    sys.stdout.write(f"{rest}\n")


if __name__ == "__main__":
    run(main)
