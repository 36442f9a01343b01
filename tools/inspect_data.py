"""Show what a run would train on.

Prints counts of the datasets, and the exact token ids of samples in the shuffled, blended order.
"""

import json
import re

import numpy as np
from _cli import BadArgument, Parser, count, positive, run

from trivium import logs
from trivium.data import order
from trivium.data.indexed import IndexedDataset
from trivium.data.splits import Datasets, build_datasets, open_all


def main(argv: list[str]) -> None:
    """Print the counts and samples that the command line asks for."""
    args = parse(argv)
    shows = [show for text in args.show for show in text.split(",")]
    ranges = [parse_range(text) for text in shows]
    weighted = order.parse_data_path(args.data_path)[1] is not None
    given = (args.train_samples, args.valid_samples, args.test_samples)
    shown = {split for split, _, _ in ranges}
    # Only what is looked at is built; without a number, one epoch of it.
    num_samples = tuple(
        n if split in shown or (n and not args.json) else 0
        for split, n in zip(order.SPLITS, given, strict=True)
    )
    for split, n in zip(order.SPLITS, num_samples, strict=True):
        if weighted and n is None:
            raise BadArgument(
                f"--show {split}: a blend with weights has no end; "
                f"say how many with --{split}-samples N"
            )
    if not args.json:
        logs.setup()
        describe(args.data_path, args.split)
    datasets = build_datasets(
        args.data_path,
        args.split,
        args.seq_length,
        args.seed,
        num_samples,
        cache_path=args.data_cache_path,
        may_run_dry=True,
    )
    if not args.json:
        for split in order.SPLITS:
            if (samples := getattr(datasets, split)) is not None:
                print(
                    f"{split}: {len(samples)} samples of {args.seq_length} + 1 tokens, order "
                    f"{samples.fingerprint[:16]}"
                )
    for split, first, last in ranges:
        show(datasets, split, first, last, args.json)


def parse(argv: list[str]):
    """Return the values of the command line."""
    parser = Parser(
        __doc__,
        "python tools/inspect_data.py --data-path corpus_text_document --seq-length 1024 "
        "--train-samples 1000 --show train:0-7",
    )
    parser.add_argument(
        "--data-path",
        nargs="+",
        required=True,
        help="Prefixes of .bin/.idx files, or weight prefix pairs.",
    )
    parser.add_argument(
        "--split", default="969,30,1", help="Shares of training, validation and test."
    )
    parser.add_argument("--seq-length", type=positive, default=1024, help="Tokens of a sample.")
    parser.add_argument("--seed", type=count, default=1234, help="Seed of the run.")
    for split in order.SPLITS:
        parser.add_argument(
            f"--{split}-samples",
            type=count,
            help=f"Samples the run asks of the {split} split; one epoch if not given.",
        )
    parser.add_argument(
        "--show",
        nargs="+",
        default=[],
        metavar="SPLIT:A-B",
        help="Samples to print: train:0-7 is 0 to 7, valid:3 is one.",
    )
    parser.add_argument(
        "--data-cache-path", help="Folder of the index cache; beside the data if not given."
    )
    parser.add_argument(
        "--json", action="store_true", help="Print one JSON object per sample and nothing else."
    )
    return parser.parse_args(argv)


def parse_range(text: str) -> tuple[str, int, int]:
    """Return split, first and last sample of a text: ("train", 0, 7) of train:0-7."""
    match = re.fullmatch(r"(train|valid|test):(\d+)(?:-(\d+))?", text)
    if match is None:
        raise BadArgument(
            f"--show {text!r} is not of the form train:0-7 (train, valid or test; "
            "first and last sample)"
        )
    first = int(match[2])
    last = first if match[3] is None else int(match[3])
    if last < first:
        raise BadArgument(f"--show {text}: the last sample {last} comes before the first {first}")
    return match[1], first, last


def describe(data_path: list[str], split: str) -> None:
    """Print counts and lengths of every dataset, and the sequences of its splits."""
    prefixes, weights = order.parse_data_path(data_path)
    shares = order.normalized(weights) if weights else [None] * len(prefixes)
    for share, source in zip(shares, open_all(prefixes), strict=True):
        print(f"{source.prefix}" + (f", {share:.2%} of the blend" if share is not None else ""))
        print(
            f"  {source.num_documents} documents, {source.num_sequences} sequences, "
            f"{source.num_tokens()} tokens of {source.dtype}"
        )
        print(f"  tokens per sequence: {_statistics(source)}")
        cut = order.split_bounds(split, source.num_sequences)
        for name, bounds in zip(order.SPLITS, cut, strict=True):
            if bounds is not None:
                print(
                    f"  {name}: sequences {bounds[0]} to {bounds[1]} (exclusive), "
                    f"{source.num_tokens(*bounds)} tokens"
                )


def _statistics(source: IndexedDataset) -> str:
    """Return the spread of the lengths of sequences, as text."""
    lengths = source.sequence_lengths
    low, median, high, top = np.percentile(lengths, [0, 50, 95, 100])
    return (
        f"mean {lengths.mean():.1f}, shortest {low:.0f}, median {median:.0f}, "
        f"95% below {high:.0f}, longest {top:.0f}"
    )


def show(datasets: Datasets, split: str, first: int, last: int, as_json: bool) -> None:
    """Print samples `first` to `last` of a split. Raises BadArgument if it has fewer."""
    samples = getattr(datasets, split)
    if samples is None:
        raise BadArgument(
            f"--show {split}:{first}-{last}: there is no {split} split; "
            f"see --split and --{split}-samples"
        )
    if last >= len(samples):
        raise BadArgument(
            f"--show {split}:{first}-{last}: the {split} split has {len(samples)} samples, 0 to "
            f"{len(samples) - 1}"
        )
    for k in range(first, last + 1):
        tokens = samples.sample(k).ids.tolist()
        if as_json:
            print(json.dumps({"split": split, "sample": k, "tokens": tokens}))
        else:
            print(f"{split} {k} from {samples.locate(k, 0)}: {' '.join(map(str, tokens))}")


if __name__ == "__main__":
    run(main)
