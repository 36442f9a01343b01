"""The data tools as a user runs them: files out, one line per error, exit statuses."""

import gzip
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from trivium.data.indexed import IndexedDataset, IndexedDatasetWriter
from trivium.data.splits import build_datasets

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NULL = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "100")


def run(tool, *arguments, status=0, cwd=None):
    done = subprocess.run(
        [sys.executable, TOOLS / tool, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
    )
    assert done.returncode == status, done.stderr
    return done


def error(tool, *arguments, status=2):
    """The one line on stderr."""
    done = run(tool, *arguments, status=status)
    assert (
        done.stderr.startswith(f"{tool}: ")
        and done.stderr.count("\n") == 1
        and "Traceback" not in done.stderr
    ), done.stderr
    return done.stderr.removeprefix(f"{tool}: ").strip()


def preprocess(tmp_path, *arguments, **more):
    return run("preprocess_data.py", "--output-prefix", tmp_path / "out", *NULL, *arguments, **more)


def documents(prefix):
    data = IndexedDataset(prefix)
    starts = data.document_indices
    return [
        [token for s in range(starts[d], starts[d + 1]) for token in data.get(s).tolist()]
        for d in range(data.num_documents)
    ]


def digests(prefix):
    return [
        hashlib.sha256(Path(f"{prefix}{suffix}").read_bytes()).hexdigest()
        for suffix in (".bin", ".idx")
    ]


def write_lines(path, records, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Source files of the standard library and the tokenizer of 500 ids trained on them."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    for source in sources:
        (folder / source.name).write_bytes(source.read_bytes())
    run(
        "train_tokenizer.py",
        "--input",
        folder,
        "--vocab-size",
        500,
        "--output",
        folder.parent / "tok",
    )
    return folder, folder.parent / "tok"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "char"])
def test_a_trained_tokenizer_loads_in_transformers_and_is_the_same_each_time(
    kind, corpus, tmp_path
):
    transformers = pytest.importorskip("transformers")
    for name in ("one", "two"):
        run(
            "train_tokenizer.py",
            "--input",
            corpus[0],
            "--type",
            kind,
            "--vocab-size",
            300,
            "--output",
            tmp_path / name,
        )
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    for name in (
        names if kind != "unigram" else ()
    ):  # its trainer adds floats in the order of a hash table
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "one")
    assert (
        tokenizer.eos_token == "<|endoftext|>"
        and tokenizer.eos_token_id == 0
        and 50 < len(tokenizer) <= 300
    )
    text = "def loads(s):\n    return s"
    ids = tokenizer(text).input_ids
    assert len(ids) > 5 and 0 not in ids
    if kind in ("bpe", "char"):
        assert tokenizer.decode(ids) == text


def test_a_char_tokenizer_that_is_too_small_makes_the_rarest_unknown(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "text").write_text("aaabbbc")
    run(
        "train_tokenizer.py",
        "--input",
        tmp_path / "text",
        "--type",
        "char",
        "--vocab-size",
        4,
        "--output",
        tmp_path / "tok",
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert tokenizer("abc").input_ids == [2, 3, 1]


def test_preprocess_writes_the_ids_of_the_tokenizer(corpus, tmp_path):
    folder, tokenizer = corpus
    transformers = pytest.importorskip("transformers")
    flags = (
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        tokenizer,
        "--append-eod",
    )
    done = run("preprocess_data.py", "--input", folder, "--output-prefix", tmp_path / "out", *flags)
    reference = transformers.AutoTokenizer.from_pretrained(tokenizer)
    texts = [path.read_bytes().decode() for path in sorted(folder.glob("*.py"))]
    assert documents(tmp_path / "out_text_document") == [
        [*reference(text).input_ids, 0] for text in texts
    ]
    assert "MB/s" in done.stdout and "docs/s" in done.stdout and done.stderr == ""


def test_workers_and_partitions_do_not_change_a_byte(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(5):
        texts = [
            " ".join(map(str, random.integers(0, 100, random.integers(0, 400))))
            for _ in range(random.integers(1, 1500))
        ]
        write_lines(tmp_path / "in" / f"{i}.jsonl", [{"text": text} for text in texts])
    for name, *flags in (
        ("a",),
        ("b", "--workers", 3),
        ("c", "--partitions", 3),
        ("d", "--partitions", 2, "--workers", 4),
    ):
        (tmp_path / name).mkdir()
        preprocess(tmp_path / name, "--input", tmp_path / "in", "--append-eod", *flags)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "out_text_document.bin",
            "out_text_document.idx",
        ]
    assert len({tuple(digests(tmp_path / name / "out_text_document")) for name in "abcd"}) == 1


def test_every_kind_of_text_is_read_in_sorted_order(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub" / "__pycache__").mkdir(parents=True)
    write_lines(folder / "a.jsonl", [{"text": "1"}, {"text": "2 3"}])
    write_lines(folder / "b.jsonl.gz", [{"text": "4"}], gzip.open)
    write_lines(folder / "c.jsonl.zst", [{"text": "5"}], zstandard.open)
    (folder / "d.md").write_text("6\n7")
    write_lines(folder / "e.json", [{"text": "8"}])
    (folder / "e2.json").write_text("8\n")
    (folder / "f.bin").write_bytes(b"\xff\xfe\x00")
    (folder / "g.dat").write_bytes(b"9\0")
    (folder / "sub" / "h.py").write_text("10")
    (folder / ".hidden").write_text("11")
    (folder / "sub" / "__pycache__" / "i.txt").write_text("12")
    (folder / "z.txt").write_text("13")
    done = preprocess(tmp_path, "--input", folder / "z.txt", folder)
    expected = [[13], [1], [2, 3], [4], [5], [6, 7], [8], [8], [10], [13]]
    assert documents(tmp_path / "out_text_document") == expected
    assert "2 files that are not UTF-8 text are left out" in done.stdout


def test_an_empty_document_is_kept_without_tokens_and_gets_no_end(tmp_path):
    write_lines(tmp_path / "in.jsonl", [{"text": "1"}, {"text": ""}, {"text": "2"}])
    preprocess(tmp_path, "--input", tmp_path / "in.jsonl", "--append-eod")
    data = IndexedDataset(tmp_path / "out_text_document")
    assert documents(data.prefix) == [[1, 100], [], [2, 100]]
    assert data.document_indices.tolist() == [0, 1, 1, 2]


def test_each_json_key_becomes_a_dataset(tmp_path):
    write_lines(tmp_path / "in.jsonl", [{"q": "1", "a": "2 2", "x": 0}, {"q": "3", "a": "4"}])
    preprocess(tmp_path, "--input", tmp_path / "in.jsonl", "--json-keys", "q", "a")
    assert documents(tmp_path / "out_q_document") == [[1], [3]] and documents(
        tmp_path / "out_a_document"
    ) == [[2, 2], [4]]


def test_parquet_and_arrow_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": [str(i % 100) for i in range(1500)], "other": list(range(1500))})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    pytest.importorskip("pyarrow.feather").write_feather(table, tmp_path / "b.arrow")
    preprocess(tmp_path, "--input", tmp_path / "a.parquet", tmp_path / "b.arrow")
    assert documents(tmp_path / "out_text_document") == [[i % 100] for i in range(1500)] * 2


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65498, np.uint16), (65499, np.int32)])
def test_the_largest_id_always_fits(tmp_path, vocab_size, dtype):
    (tmp_path / "in.txt").write_text(f"{vocab_size - 1}")
    flags = ("--tokenizer-type", "NullTokenizer", "--vocab-size", vocab_size)
    run(
        "preprocess_data.py",
        "--input",
        tmp_path / "in.txt",
        "--output-prefix",
        tmp_path / "out",
        *flags,
        "--append-eod",
    )
    assert documents(tmp_path / "out_text_document") == [[vocab_size - 1, vocab_size]]
    assert IndexedDataset(tmp_path / "out_text_document").dtype == dtype


@pytest.mark.parametrize(
    ("content", "flags", "status", "message"),
    [
        (b'{"text": "1"}\n{"text": \n', (), 1, r"in.jsonl, line 2: not JSON"),
        (b'{"text": "1"}\n[1]\n', (), 1, r"in.jsonl, line 2: a JSON object is expected"),
        (b'{"body": "1"}\n', (), 1, "in.jsonl, line 1: key 'text' is missing among body"),
        (b'{"text": 5}\n', (), 1, "in.jsonl, line 1: key 'text' holds int"),
        (b'{"text": "\xff"}\n', (), 1, "in.jsonl: not UTF-8 text"),
        (b'{"text": ""}\n', (), 1, "the input holds 1 documents without a token"),
        (b"", (), 1, "the input holds 0 documents without a token"),
        (b'{"text": "x"}\n', ("--workers", 2), 1, "NullTokenizer: 'x' is no id from 0 to 100"),
        (b'{"text": "1"}\n', ("--workers", 0), 2, "--workers: 0 must be a whole number above 0"),
        (b'{"text": "1"}\n', ("--json-keys", "a", "a"), 2, "--json-keys a a names a key twice"),
        (
            b'{"text": "1"}\n',
            ("--tokenizer-type", "HuggingFaceTokenizer"),
            2,
            "--tokenizer-model is missing",
        ),
        (b'{"text": "1"}\n', ("--nonsense",), 2, "unrecognized arguments: --nonsense"),
    ],
)
def test_preprocess_says_what_is_wrong_and_leaves_nothing(
    content, flags, status, message, tmp_path
):
    (tmp_path / "in.jsonl").write_bytes(content)
    arguments = (
        "--input",
        tmp_path / "in.jsonl",
        "--output-prefix",
        tmp_path / "out",
        *NULL,
        *flags,
    )
    assert message in error("preprocess_data.py", *arguments, status=status)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_damaged_archive_is_named(tmp_path):
    write_lines(tmp_path / "in.jsonl.gz", [{"text": str(i)} for i in range(100)], gzip.open)
    (tmp_path / "in.jsonl.gz").write_bytes((tmp_path / "in.jsonl.gz").read_bytes()[:60])
    assert "in.jsonl.gz: cannot be decompressed" in error(
        "preprocess_data.py",
        "--input",
        tmp_path / "in.jsonl.gz",
        "--output-prefix",
        tmp_path / "out",
        *NULL,
        status=1,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--input", "{tmp}/none", "--vocab-size", "300", "--output", "{tmp}/o"),
            "--input .*none: no such file",
        ),
        (("--input", "{tmp}", "--vocab-size", "300", "--output", "{tmp}/o"), "no file in there"),
        (
            ("--input", "{tmp}", "--vocab-size", "256", "--output", "{tmp}/o"),
            "--vocab-size 256 is too small for bpe",
        ),
        (
            ("--input", "{tmp}", "--vocab-size", "256", "--type", "x", "--output", "{tmp}/o"),
            "--type: invalid choice: 'x'",
        ),
        (("--vocab-size", "300"), "required: --input, --output"),
    ],
)
def test_train_tokenizer_says_what_is_wrong(arguments, message, tmp_path):
    line = error("train_tokenizer.py", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert re.search(message, line), line


def test_merge_joins_a_folder_in_the_order_of_names(tmp_path):
    (tmp_path / "parts").mkdir()
    for name, ids in (("b", [3]), ("a", [1, 2]), ("c", [4])):
        with IndexedDatasetWriter(tmp_path / "parts" / name, np.uint16) as writer:
            writer.add_document(ids)
            writer.add_document([])
    for _ in range(2):  # its own output in the folder is not an input
        run(
            "merge_datasets.py",
            "--input",
            tmp_path / "parts",
            "--output-prefix",
            tmp_path / "parts" / "all",
        )
        assert documents(tmp_path / "parts" / "all") == [[1, 2], [], [3], [], [4], []]
    (tmp_path / "parts" / "b.idx").unlink()
    assert "b.idx is missing" in error(
        "merge_datasets.py", "--input", tmp_path / "parts", "--output-prefix", tmp_path / "out"
    )
    assert "no such folder" in error(
        "merge_datasets.py", "--input", tmp_path / "none", "--output-prefix", tmp_path / "out"
    )


@pytest.fixture
def datasets(tmp_path):
    random = np.random.default_rng(3)
    for name in ("one", "two"):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            for length in random.integers(1, 40, 60):
                writer.add_document(random.integers(0, 100, length))
    return str(tmp_path / "one"), str(tmp_path / "two")


def test_inspect_shows_the_samples_a_run_would_get(datasets):
    items = ["0.3", datasets[0], "0.7", datasets[1]]
    order = (
        "--split",
        "8,1,1",
        "--seq-length",
        8,
        "--seed",
        5,
        "--train-samples",
        90,
        "--valid-samples",
        20,
    )
    done = run(
        "inspect_data.py", "--data-path", *items, *order, "--show", "train:0-7", "valid:3", "--json"
    )
    data = build_datasets(items, "8,1,1", 8, 5, (90, 20, 0))
    expected = [
        {"split": "train", "sample": k, "tokens": data.train.sample(k).ids.tolist()}
        for k in range(8)
    ]
    expected.append({"split": "valid", "sample": 3, "tokens": data.valid.sample(3).ids.tolist()})
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected and done.stderr == ""


def test_inspect_counts_documents_and_tokens(datasets):
    done = run(
        "inspect_data.py",
        "--data-path",
        datasets[0],
        "--split",
        "8,1,1",
        "--seq-length",
        8,
        "--train-samples",
        9,
        "--show",
        "train:0",
    )
    source = IndexedDataset(datasets[0])
    assert f"60 documents, 60 sequences, {source.num_tokens()} tokens of uint16" in done.stdout
    assert f"train: sequences 0 to 48 (exclusive), {source.num_tokens(0, 48)} tokens" in done.stdout
    assert "train 0 from " in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--show", "train:7-0"), "--show train:7-0: the last sample 0 comes before the first 7"),
        (("--show", "dev:0"), "--show 'dev:0' is not of the form train:0-7"),
        (("--show", "valid:0", "--split", "1"), "--show valid:0-0: there is no valid split"),
        (("--show", "train:0-9999"), "--show train:0-9999: the train split has"),
        (("--seq-length", "0"), "--seq-length: 0 must be a whole number above 0"),
        (("--split", "a"), "--split 'a' is not up to three shares"),
        (("--data-path", "1", "{one}", "--show", "train:0"), "say how many with --train-samples"),
    ],
)
def test_inspect_refuses_what_cannot_be_shown(flags, message, datasets):
    flags = [flag.format(one=datasets[0]) for flag in flags]
    assert message in error("inspect_data.py", "--data-path", datasets[0], *flags)


def test_inspect_names_a_broken_dataset(datasets):
    Path(f"{datasets[0]}.bin").write_bytes(b"\0")
    assert "one.bin: truncated: 1 bytes" in error(
        "inspect_data.py", "--data-path", datasets[0], status=1
    )


@pytest.mark.parametrize(
    "tool", ["train_tokenizer.py", "preprocess_data.py", "merge_datasets.py", "inspect_data.py"]
)
def test_help_shows_an_example(tool):
    assert f"example:\n  python tools/{tool} --" in run(tool, "--help").stdout
