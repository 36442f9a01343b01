"""Compute the loss of a trained model on a data set or on text.

Every token but the first is predicted once, from up to L tokens before it.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from _cli import BadArgument, Parser, positive, run
from _model import add_model_flags, load_model, load_tokenizer

from trivium.data.indexed import IndexedDataset
from trivium.data.text import PLAIN_KEY, list_files, read_documents
from trivium.data.tokenizer import Tokenizer
from trivium.model.gpt import GPT

EXAMPLE = (
    "python tools/evaluate.py --load RUN --data-path DATA_text_document --seq-length 256 --json"
)


def main(argv: list[str]) -> None:
    """Load model and data, and print the loss."""
    options = build_parser().parse_args(argv)
    pretrained = load_model(options)
    model = pretrained.model
    check_length(model, options.seq_length)
    if options.data_path:
        tokens = indexed_tokens(options.data_path)
    else:
        tokens = text_tokens(options.input, load_tokenizer(pretrained, options))
    check_tokens(model, tokens)
    predictions = len(tokens) - 1
    total = total_loss(model, tokens, options.seq_length, options.batch_size)
    report(total / predictions, predictions, options)


def build_parser() -> Parser:
    """Return the parser of this tool's arguments."""
    parser = Parser(__doc__, EXAMPLE)
    add_model_flags(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-path", help="prefix of a .bin/.idx pair")
    source.add_argument(
        "--input",
        type=Path,
        nargs="+",
        help="files or folders of text, tokenized here",
    )
    parser.add_argument(
        "--seq-length",
        type=positive,
        required=True,
        help="L: documents are concatenated and cut into windows of L predictions",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        help="windows of one forward pass",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='print one object {"lm_loss", "ppl", "tokens"}',
    )
    return parser


def check_length(model: GPT, length: int) -> None:
    """Raise BadArgument if the model has too few positions."""
    longest = model.config.max_position_embeddings
    if model.config.position_embedding_type == "learned_absolute" and length > longest:
        raise BadArgument(f"--seq-length {length} is longer than the model's {longest} positions")


def check_tokens(model: GPT, tokens: np.ndarray) -> None:
    """Raise BadArgument if the model cannot predict the tokens."""
    if len(tokens) < 2:
        raise BadArgument(f"there are {len(tokens)} tokens; a prediction needs 2")
    if int(tokens.max()) >= model.vocab_size:
        raise BadArgument(
            f"the data holds id {tokens.max()}, the model has a vocabulary of "
            f"{model.vocab_size}: another tokenizer's"
        )


def report(loss: float, predictions: int, options: argparse.Namespace) -> None:
    """Print the mean loss of so many predictions."""
    perplexity = math.exp(min(loss, 700))
    if options.json:
        print(json.dumps({"lm_loss": loss, "ppl": perplexity, "tokens": predictions}))
    else:
        print(f"lm loss: {loss:.6f} | ppl: {perplexity:.4f} | tokens: {predictions}")


def indexed_tokens(prefix: str) -> np.ndarray:
    """Return all documents of a .bin/.idx pair in file order, one after another."""
    dataset = IndexedDataset(prefix)
    return np.concatenate([dataset.get(i) for i in range(dataset.num_sequences)])


def text_tokens(paths: list[Path], tokenizer: Tokenizer) -> np.ndarray:
    """Tokenize documents of text as the model was trained.

    Each document that has tokens is ended by the end-of-document token.
    """
    files = list_files([str(path) for path in paths])
    ids: list[int] = []
    for (text,) in read_documents(files, [PLAIN_KEY]):
        if text:
            ids.extend(tokenizer.encode(text))
            ids.append(tokenizer.eod)
    return np.array(ids, dtype=np.int64)


@torch.no_grad()
def total_loss(model: GPT, tokens: np.ndarray, length: int, batch_size: int) -> float:
    """Return the sum of the losses of tokens[1:]; window k sees t[kL : kL + L + 1]."""
    device = model.embedding.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in windows(tokens, length, batch_size):
        ids = torch.from_numpy(batch).to(device)
        labels = ids[:, 1:]
        weights = torch.ones(labels.shape, device=device)
        _, losses = model(ids[:, :-1], targets=(labels, weights))
        total += losses.double().sum()
    return total.item()


def windows(tokens: np.ndarray, length: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yield batches int64 [B, L + 1] of whole windows, then the short one at the end alone."""
    whole = (len(tokens) - 1) // length
    for first in range(0, whole, batch_size):
        last = min(first + batch_size, whole)
        starts = range(first * length, last * length, length)
        batch = np.stack([tokens[start : start + length + 1] for start in starts])
        yield batch.astype(np.int64)
    rest = tokens[whole * length :]
    if len(rest) > 1:
        yield rest[None].astype(np.int64)


if __name__ == "__main__":
    run(main)
