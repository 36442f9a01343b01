"""Train a tokenizer on text and write it as a Hugging Face folder that `transformers` loads."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from _cli import BadArgument, Parser, positive, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trivium import logs
from trivium.data.text import list_files, read_documents
from trivium.data.tokenizer import END_OF_TEXT

UNKNOWN = "<unk>"
BYTES = 256
Texts = Callable[[], Iterator[str]]  # a new reading of the input


def parse(argv: list[str]):
    """Return the arguments. Raises BadArgument on a vocabulary that is too small."""
    parser = Parser(
        __doc__,
        "python tools/train_tokenizer.py --input corpus.jsonl src/ --type bpe --vocab-size 32000 "
        "--output tokenizer",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="Files of text or JSON lines (.gz, .zst too), and folders of them.",
    )
    parser.add_argument(
        "--type",
        choices=("bpe", "wordpiece", "unigram", "char"),
        default="bpe",
        help="Kind of model. bpe works on bytes; unigram is the one whose last digits differ from "
        "run to run.",
    )
    parser.add_argument(
        "--vocab-size", type=positive, required=True, help="Ids at most, special tokens included."
    )
    parser.add_argument("--output", required=True, help="Folder to write.")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], help="Keys of the texts in JSON lines."
    )
    args = parser.parse_args(argv)
    if args.type == "bpe" and args.vocab_size < BYTES + 1:
        raise BadArgument(
            f"--vocab-size {args.vocab_size} is too small for bpe: {BYTES} bytes and {END_OF_TEXT} "
            f"need {BYTES + 1}"
        )
    if args.type != "bpe" and args.vocab_size < 3:
        raise BadArgument(
            f"--vocab-size {args.vocab_size} is too small for {args.type}: {END_OF_TEXT}, "
            f"{UNKNOWN} and a first token need 3"
        )
    return args


def main(argv: list[str]) -> None:
    """Train the tokenizer that the command line describes, and write its folder."""
    args = parse(argv)
    logs.setup()

    def texts() -> Iterator[str]:
        return (
            text
            for document in read_documents(list_files(args.input), args.json_keys)
            for text in document
            if text
        )

    if next(texts(), None) is None:
        raise ValueError("the input holds no text")
    trainers_by_type = {"bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram, "char": _char}
    tokenizer = trainers_by_type[args.type](args.vocab_size, texts)
    save(tokenizer, Path(args.output), unknown=args.type != "bpe")
    size = tokenizer.get_vocab_size()
    if size < args.vocab_size:
        logs.get_logger().info(f"the text has material for {size} of {args.vocab_size} ids")
    logs.get_logger().info(
        f"{args.output}: {args.type} tokenizer of {size} ids, end of document "
        f"{tokenizer.token_to_id(END_OF_TEXT)}"
    )


def save(tokenizer: Tokenizer, folder: Path, unknown: bool) -> None:
    """Write tokenizer.json and the files that transformers wants beside it.

    unknown: the model has a token for characters that it does not know.
    """
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    if unknown:
        special["unk_token"] = UNKNOWN
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": 10**30,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")
    _write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))


def _write(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that it is never half there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _bpe(vocab_size: int, texts: Texts) -> Tokenizer:
    """Train a byte-level BPE. All 256 bytes are in it, so every text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _wordpiece(vocab_size: int, texts: Texts) -> Tokenizer:
    """Train a WordPiece model; the same text gives the same ids every time."""
    splitter = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers continuations (##x) in the order of a hash table, which changes from run
    # to run. So they are found here, and given to it in sorted order as special tokens.
    inside: set[str] = set()
    for text in texts():
        for word, _ in splitter.pre_tokenize_str(text):
            inside.update(word[1:])
    special = [END_OF_TEXT, UNKNOWN]
    learner = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    learner.pre_tokenizer = splitter
    known = [*special, *(f"##{character}" for character in sorted(inside))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=known, show_progress=False
    )
    learner.train_from_iterator(texts(), trainer)
    # A new model with the vocabulary alone: in the trained one the continuations are still special.
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(special)
    return tokenizer


def _unigram(vocab_size: int, texts: Texts) -> Tokenizer:
    """Train a unigram language model (Kudo 2018)."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, UNKNOWN],
        unk_token=UNKNOWN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _char(vocab_size: int, texts: Texts) -> Tokenizer:
    """Make a model of one id per character: a BPE without merges.

    The rarest characters become unknown if there are too many.
    """
    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(text)
    by_count = sorted(counts, key=lambda character: (-counts[character], character))
    kept = sorted(by_count[: vocab_size - 2])
    vocabulary = {token: i for i, token in enumerate([END_OF_TEXT, UNKNOWN, *kept])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT, UNKNOWN])
    return tokenizer


if __name__ == "__main__":
    run(main)
