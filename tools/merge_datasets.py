"""Join all datasets (.bin and .idx) of a folder into one, in the order of their names."""

import time
from pathlib import Path

from _cli import BadArgument, Parser, run

from trivium import logs
from trivium.data.indexed import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path


def main(argv: list[str]) -> None:
    """Join the datasets that the command line names, and log the totals."""
    parser = Parser(
        __doc__,
        "python tools/merge_datasets.py --input parts/ --output-prefix corpus_text_document",
    )
    parser.add_argument("--input", required=True, help="Folder of the datasets.")
    parser.add_argument(
        "--output-prefix", required=True, help="Path of the joined dataset, without .bin or .idx."
    )
    args = parser.parse_args(argv)
    logs.setup()
    prefixes = find_prefixes(Path(args.input), Path(args.output_prefix))
    started = time.monotonic()
    merge(prefixes, args.output_prefix)
    merged = IndexedDataset(args.output_prefix, allow_empty=True)
    logs.get_logger().info(
        f"{args.output_prefix}: {len(prefixes)} datasets, {merged.num_documents} documents, "
        f"{merged.num_tokens()} tokens in {time.monotonic() - started:.1f} s"
    )


def merge(prefixes: list[str], output_prefix: str) -> None:
    """Write `prefixes`, one after the other, as one dataset. They must be of one dtype."""
    dtype = IndexedDataset(prefixes[0], allow_empty=True).dtype
    with IndexedDatasetWriter(output_prefix, dtype) as writer:
        for prefix in prefixes:
            writer.add_index(prefix)


def find_prefixes(folder: Path, output: Path) -> list[str]:
    """Return the sorted prefixes of the pairs in `folder`, without that of the output.

    Raises BadArgument if a half is missing or nothing is there.
    """
    if not folder.is_dir():
        raise BadArgument(f"--input {folder}: no such folder")
    names = {path.stem for path in folder.iterdir() if path.suffix in (".bin", ".idx")}
    prefixes = [
        str(folder / name)
        for name in sorted(names)
        if (folder / name).resolve() != output.resolve()
    ]
    if not prefixes:
        raise BadArgument(f"--input {folder}: no .bin and .idx in this folder")
    for prefix in prefixes:
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.exists():
                raise BadArgument(f"--input {folder}: {path} is missing, its other half is there")
    return prefixes


if __name__ == "__main__":
    run(main)
