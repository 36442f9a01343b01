"""Continue a prompt with a trained model: a checkpoint of ours or a Hugging Face folder."""

import sys

import torch
from _cli import BadArgument, Parser, count, positive, run
from _model import add_model_flags, load_model, load_tokenizer

from trivium.data.tokenizer import Tokenizer
from trivium.decode.generate import generate
from trivium.decode.sampling import Sampling
from trivium.model.gpt import GPT

EXAMPLE = 'python tools/generate.py --load RUN --prompt "def main" --max-new-tokens 100 --temperature 0.8 --top-k 50 --seed 1'


def main(argv: list[str]) -> None:
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
        "--temperature", type=float, default=1.0, help="0 takes the likeliest token each time"
    )
    parser.add_argument(
        "--top-k", type=count, default=0, help="draw from the k likeliest tokens; 0 from all"
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

    pretrained = load_model(options)
    tokenizer = load_tokenizer(pretrained, options)
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    write(
        pretrained.model, tokenizer, options.prompt, options.max_new_tokens, sampling, options.seed
    )


def write(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> None:
    """Print the prompt and what follows it, as it comes."""
    ids = tokenizer.encode(prompt) or [tokenizer.eod]
    if max(ids) >= model.vocab_size:
        raise BadArgument(
            f"--tokenizer-model gives id {max(ids)}, the model has a vocabulary of {model.vocab_size}: it was trained with another"
        )
    room = model.config.max_position_embeddings - len(ids)
    if model.config.position_embedding_type == "learned_absolute":
        if room <= 0:
            raise BadArgument(
                f"--prompt has {len(ids)} tokens, the model has {model.config.max_position_embeddings} positions; shorten it"
            )
        max_new_tokens = min(max_new_tokens, room)
    tokens = torch.tensor([ids], device=model.embedding.weight.device)
    new, shown = [], ""
    sys.stdout.write(prompt)
    for chosen in generate(
        model, tokens, max_new_tokens, sampling, torch.Generator().manual_seed(seed)
    ):
        if chosen.item() == tokenizer.eod:
            break
        new.append(chosen.item())
        text = tokenizer.decode(new)
        if not text.endswith("�"):  # half a character: wait for the rest
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    sys.stdout.write(tokenizer.decode(new)[len(shown) :] + "\n")


if __name__ == "__main__":
    run(main)
