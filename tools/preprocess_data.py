"""Tokenize text into a dataset (.bin and .idx).

Documents keep the order of the input, and the files are the same bytes for any number of workers.
"""

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice

import numpy as np
from _cli import BadArgument, Parser, count, positive, run

from trivium import logs
from trivium.data.indexed import IndexedDatasetWriter, best_dtype, bin_path, idx_path
from trivium.data.text import TextFile, list_files, read_documents
from trivium.data.tokenizer import Tokenizer, build_tokenizer

BATCH_CHARACTERS = 1 << 20  # of text sent to a worker at a time
BATCH_DOCUMENTS = 1024
AHEAD = 3  # batches under way per worker: bounds the memory
Totals = tuple[int, int, int]  # bytes of text, documents, tokens


@dataclass(frozen=True)
class Job:
    """The work to do on each text, small enough to travel to a worker with every batch."""

    flags: tuple[str | int | None, ...]  # of build_tokenizer
    keys: tuple[str, ...]
    append_eod: bool
    log_interval: int

    def output(self, prefix: str) -> list[str]:
        """Return the prefixes of the datasets to write, one per key."""
        return [f"{prefix}_{key}_document" for key in self.keys]


@cache
def tokenizer_of(job: Job) -> Tokenizer:
    """Return the tokenizer of a job, built once per process."""
    return build_tokenizer(*job.flags)


def main(argv: list[str]) -> None:
    """Tokenize the input that the command line names, and log the totals and the rate."""
    args = parse(argv)
    logs.setup()
    # One thread per process: the processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    flags = (
        args.tokenizer_type,
        args.tokenizer_model,
        args.vocab_file,
        args.merge_file,
        args.vocab_size,
    )
    job = Job(flags, tuple(args.json_keys), args.append_eod, args.log_interval)
    tokenizer_of(job)  # a wrong flag ends it here
    started = time.monotonic()
    parts = partition(list_files(args.input), args.partitions)
    if len(parts) < args.partitions:
        logs.get_logger().info(
            f"--partitions {args.partitions}: the input has files for {len(parts)}"
        )
    if len(parts) == 1:
        totals = write(job, parts[0], job.output(args.output_prefix), args.workers)
    else:
        totals = write_parts(job, parts, args.output_prefix, args.workers)
    seconds = max(time.monotonic() - started, 1e-9)
    size, documents, tokens = totals
    megabytes = size / 1e6
    logs.get_logger().info(
        f"{documents} documents, {tokens} tokens, {megabytes:.1f} MB of text in {seconds:.1f} s: "
        f"{megabytes / seconds:.2f} MB/s, {documents / seconds:.0f} docs/s"
    )
    logs.get_logger().info(
        "\n".join(f"{prefix}.bin, .idx" for prefix in job.output(args.output_prefix))
    )


def parse(argv: list[str]):
    """Return the values of the command line."""
    parser = Parser(
        __doc__,
        "python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus "
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer "
        "--append-eod --workers 8",
    )
    _add_files(parser)
    _add_tokenizer(parser)
    parser.add_argument(
        "--append-eod",
        action="store_true",
        help="End every document that has tokens with the end of document.",
    )
    parser.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        help="Keys of the texts in JSON lines; one dataset each.",
    )
    parser.add_argument("--workers", type=positive, default=1, help="Processes that tokenize.")
    parser.add_argument(
        "--partitions",
        type=positive,
        default=1,
        help="Groups of input files read side by side; joined at the end.",
    )
    parser.add_argument(
        "--log-interval",
        type=count,
        default=0,
        help="Documents between progress lines; 0 for none.",
    )
    args = parser.parse_args(argv)
    if len(set(args.json_keys)) < len(args.json_keys):
        raise BadArgument(f"--json-keys {' '.join(args.json_keys)} names a key twice")
    return args


def _add_files(parser: Parser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="Files (jsonl, parquet, arrow, any UTF-8 text; .gz and .zst) and folders.",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        help="P of P_text_document.bin and .idx, one such pair per key.",
    )


def _add_tokenizer(parser: Parser) -> None:
    parser.add_argument(
        "--tokenizer-type",
        required=True,
        help="HuggingFaceTokenizer, GPT2BPETokenizer, NullTokenizer, ...",
    )
    parser.add_argument("--tokenizer-model", help="Folder or file of the tokenizer.")
    parser.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer.")
    parser.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer.")
    parser.add_argument(
        "--vocab-size", type=positive, help="Of NullTokenizer; of others only to enlarge."
    )


def partition(files: list[TextFile], num_parts: int) -> list[list[TextFile]]:
    """Cut a list of files into at most `num_parts` groups of about equal bytes.

    A group holds neighbours, so that the groups joined in order are the input again.
    """
    # A file goes to the group that its last byte falls into. The 1e-9 keeps a file that ends
    # exactly on a bound in the group before it.
    ends = np.cumsum([os.path.getsize(file.path) for file in files], dtype=np.float64)
    group = np.minimum(ends * num_parts / max(ends[-1], 1) - 1e-9, num_parts - 1).astype(int)
    parts = [
        [file for file, g in zip(files, group, strict=True) if g == wanted]
        for wanted in range(num_parts)
    ]
    return [part for part in parts if part]


def write_parts(job: Job, parts: list[list[TextFile]], output_prefix: str, workers: int) -> Totals:
    """Tokenize every part in a process of its own, then join the results in order.

    The parts are written beside the output and removed at the end, whatever happens.
    """
    outputs = [job.output(f"{output_prefix}_part{i:05d}") for i in range(len(parts))]
    share = max(1, workers // len(parts))
    try:
        with ProcessPoolExecutor(len(parts)) as pool:
            futures = []
            for part, prefixes in zip(parts, outputs, strict=True):
                futures.append(pool.submit(write, job, part, prefixes, share, False))
            done = [_result(future) for future in futures]
            totals = tuple(map(sum, zip(*done, strict=True)))
        _refuse_empty(totals)
        for k, output in enumerate(job.output(output_prefix)):
            with IndexedDatasetWriter(output, best_dtype(tokenizer_of(job).vocab_size)) as writer:
                for prefixes in outputs:
                    writer.add_index(prefixes[k])
    finally:
        for prefix in (prefix for prefixes in outputs for prefix in prefixes):
            bin_path(prefix).unlink(missing_ok=True)
            idx_path(prefix).unlink(missing_ok=True)
    return totals


def write(
    job: Job, files: list[TextFile], prefixes: list[str], workers: int, refuse_empty: bool = True
) -> Totals:
    """Tokenize files into one dataset per key.

    Raises ValueError if there is not one token, unless told not to.
    """
    dtype = best_dtype(tokenizer_of(job).vocab_size)
    totals = (0, 0, 0)
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(prefix, dtype)) for prefix in prefixes]
        batches = _batches(read_documents(files, list(job.keys)))
        for size, encoded in _in_order(job, batches, workers, stack):
            for writer, (ids, lengths) in zip(writers, encoded, strict=True):
                writer.add_documents(ids, lengths)
            before = totals[1]
            documents = before + len(encoded[0][1])
            tokens = totals[2] + sum(len(ids) for ids, _ in encoded)
            totals = (totals[0] + size, documents, tokens)
            if job.log_interval and before // job.log_interval < totals[1] // job.log_interval:
                logs.get_logger().info(f"{totals[1]} documents, {totals[2]} tokens")
        if refuse_empty:
            _refuse_empty(totals)
    return totals


def encode(
    job: Job, batch: list[tuple[str, ...]]
) -> tuple[int, list[tuple[np.ndarray, np.ndarray]]]:
    """Tokenize a batch of documents.

    Returns the bytes of its text and, for each key, the ids of its documents back to back and the
    length of each document.
    """
    tokenizer = tokenizer_of(job)
    end = [tokenizer.eod] if job.append_eod else []
    size = 0
    encoded = []
    for texts in zip(*batch, strict=True):
        size += sum(len(text.encode()) for text in texts)
        documents = [ids + end if ids else ids for ids in tokenizer.encode_batch(list(texts))]
        lengths = np.array([len(ids) for ids in documents], np.int64)
        # int32 halves what travels back to the parent; no vocabulary needs more.
        all_ids = np.fromiter(chain.from_iterable(documents), np.int32, lengths.sum())
        encoded.append((all_ids, lengths))
    return size, encoded


def _batches(documents: Iterator[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    """Cut documents into batches: large enough to be worth sending to a worker."""
    batch: list[tuple[str, ...]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(map(len, document))
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _in_order(job: Job, batches: Iterator, workers: int, stack: ExitStack) -> Iterator:
    """Yield `encode` of every batch, in the order of the input, from so many processes.

    No more than a few batches per worker are in memory: a new one is read when the oldest is done.
    """
    if workers == 1:
        yield from (encode(job, batch) for batch in batches)
        return
    pool = stack.enter_context(ProcessPoolExecutor(workers))
    stack.callback(pool.shutdown, cancel_futures=True)
    running = deque(pool.submit(encode, job, batch) for batch in islice(batches, workers * AHEAD))
    while running:
        result = _result(running.popleft())
        running.extend(pool.submit(encode, job, batch) for batch in islice(batches, 1))
        yield result


def _refuse_empty(totals: Totals) -> None:
    """Raise ValueError if there is not one token."""
    if totals[2] == 0:
        raise ValueError(
            f"the input holds {totals[1]} documents without a token; nothing is written"
        )


def _result(future: Future):
    """Return the result of a worker, or raise ValueError if the worker was killed."""
    try:
        return future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed, most likely for want of memory; use fewer --workers"
        ) from None


if __name__ == "__main__":
    run(main)
