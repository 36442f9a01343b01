"""The loss of a trained model on a data set or on text: every token predicted once, from up to L tokens before it."""

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
    parser = Parser(__doc__, EXAMPLE)
    add_model_flags(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-path", help="prefix of a .bin/.idx pair")
    source.add_argument(
        "--input", type=Path, nargs="+", help="files or folders of text, tokenized here"
    )
    parser.add_argument(
        "--seq-length",
        type=positive,
        required=True,
        help="L: documents are concatenated and cut into windows of L predictions",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="windows of one forward pass"
    )
    parser.add_argument(
        "--json", action="store_true", help='print one object {"lm_loss", "ppl", "tokens"}'
    )
    options = parser.parse_args(argv)

    pretrained = load_model(options)
    model = pretrained.model
    longest = model.config.max_position_embeddings
    if model.config.position_embedding_type == "learned_absolute" and options.seq_length > longest:
        raise BadArgument(
            f"--seq-length {options.seq_length} is longer than the model's {longest} positions"
        )
    tokens = (
        indexed_tokens(options.data_path)
        if options.data_path
        else text_tokens(options.input, load_tokenizer(pretrained, options))
    )
    if len(tokens) < 2:
        raise BadArgument(f"there are {len(tokens)} tokens; a prediction needs 2")
    if int(tokens.max()) >= model.vocab_size:
        raise BadArgument(
            f"the data holds id {tokens.max()}, the model has a vocabulary of {model.vocab_size}: another tokenizer's"
        )
    loss = total_loss(model, tokens, options.seq_length, options.batch_size) / (len(tokens) - 1)
    result = {"lm_loss": loss, "ppl": math.exp(min(loss, 700)), "tokens": len(tokens) - 1}
    print(
        json.dumps(result)
        if options.json
        else f"lm loss: {loss:.6f} | ppl: {result['ppl']:.4f} | tokens: {result['tokens']}"
    )


def indexed_tokens(prefix: str) -> np.ndarray:
    """All documents of a .bin/.idx pair in file order, one after another."""
    dataset = IndexedDataset(prefix)
    return np.concatenate([dataset.get(i) for i in range(dataset.num_sequences)])


def text_tokens(paths: list[Path], tokenizer: Tokenizer) -> np.ndarray:
    """Documents of text, tokenized as the model was trained, each that has tokens ended by the end-of-document token."""
    documents = read_documents(list_files([str(path) for path in paths]), [PLAIN_KEY])
    ids = [
        token for (text,) in documents if text for token in (*tokenizer.encode(text), tokenizer.eod)
    ]
    return np.array(ids, dtype=np.int64)


@torch.no_grad()
def total_loss(model: GPT, tokens: np.ndarray, length: int, batch_size: int) -> float:
    """Sum of the losses of tokens[1:], window k seeing t[kL : kL + L + 1]."""
    total = torch.zeros((), dtype=torch.float64, device=model.embedding.weight.device)
    for batch in windows(tokens, length, batch_size):
        batch = torch.from_numpy(batch).to(total.device)
        tokens, labels = batch[:, :-1], batch[:, 1:]
        total += (
            model(tokens, targets=(labels, torch.ones(labels.shape, device=labels.device)))[1]
            .double()
            .sum()
        )
    return total.item()


def windows(tokens: np.ndarray, length: int, batch_size: int) -> Iterator[np.ndarray]:
    """Batches int64 [B, L + 1] of whole windows, then the short one at the end alone."""
    whole = (len(tokens) - 1) // length
    for first in range(0, whole, batch_size):
        starts = range(first * length, min(first + batch_size, whole) * length, length)
        yield np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
    rest = tokens[whole * length :]
    if len(rest) > 1:
        yield rest[None].astype(np.int64)


if __name__ == "__main__":
    run(main)
