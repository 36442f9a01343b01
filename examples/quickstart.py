"""The main job on real input in a few minutes on two CPU cores: text, tokenizer, data, training, resume, sample, export.

    make quickstart                 Python's own standard library
    make quickstart INPUT=path      any folder or file of text

Every step is one command of the project, printed before it runs; steps whose results are there are skipped.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from trivium.data.indexed import IndexedDataset
from trivium.interop.pretrained import load_pretrained
from trivium.train.sinks.jsonl import read_rows

ROOT = Path(__file__).resolve().parents[1]
# Tests, other people's packages, and files that are tables rather than programs.
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "encodings",
    "pydoc_data",
}
# Threads that wait asleep: beside other busy processes, spinning ones make a run several times slower.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "true"} | os.environ
VOCABULARY, LENGTH, BATCH, FIRST_LEG, LAST = 4096, 256, 16, 140, 180


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--input", type=Path, help="file or folder of text; Python's standard library if not given"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "quickstart",
        help="folder for everything that is made",
    )
    options = parser.parse_args()
    if options.input is not None and not options.input.exists():
        sys.exit(f"quickstart: --input {options.input}: no such file or folder")
    start, out = time.monotonic(), options.output / name_of(options.input)
    out.mkdir(parents=True, exist_ok=True)
    text = options.input or standard_library(out / "source")
    tokenizer, data, run, export = out / "tokenizer", out / "data", out / "checkpoints", out / "hf"
    prefix = f"{data}_text_document"
    step(
        "1/6 tokenizer",
        tokenizer / "tokenizer.json",
        tool("train_tokenizer", "--input", text, "--vocab-size", VOCABULARY, "--output", tokenizer),
    )
    tokenize = [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        tokenizer,
        "--append-eod",
        "--workers",
        2,
    ]
    step(
        "2/6 data",
        f"{prefix}.idx",
        tool("preprocess_data", "--input", text, "--output-prefix", data, *tokenize),
    )
    train = training_flags(prefix, tokenizer, run)
    step(
        "3/6 training",
        run / f"iter_{FIRST_LEG:07d}",
        [sys.executable, ROOT / "pretrain_gpt.py", *train, "--exit-interval", FIRST_LEG],
    )
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    layout = ["--tensor-model-parallel-size", 2, "--sequence-parallel"]
    second = [*two, ROOT / "pretrain_gpt.py", *train, *layout, "--save-hf", export]
    step(
        "4/6 resumed under another layout: 2 tensor-parallel processes",
        run / f"iter_{LAST:07d}",
        second,
    )
    print("\n5/6 sample", flush=True)
    run_command(
        tool(
            "generate",
            "--load",
            run,
            "--prompt",
            "    def __init__(self",
            "--max-new-tokens",
            120,
            "--temperature",
            0.7,
            "--top-k",
            50,
            "--seed",
            1,
        )
    )
    print("\n6/6 export", flush=True)
    difference = compare_with_transformers(run, export)
    losses = [
        row["lm_loss"] for row in read_rows(run / "metrics.jsonl") if row.get("split") == "valid"
    ]
    loss = (
        f"{losses[-1]:.3f} nats per token"
        if losses
        else "none: the text has too few documents to keep some for validation"
    )
    print(f"""
done in {time.monotonic() - start:.0f} s
  validation loss    {loss}; unigram entropy of the corpus: {unigram_entropy(prefix):.3f}
  transformers loads the export; largest difference of logits: {difference:.1e}
  tokenizer          {tokenizer}
  data               {prefix}.bin, .idx
  checkpoints        {run}
  loss curve         {run / "loss.png"}
  metrics            {run / "metrics.jsonl"}
  Hugging Face       {export}""")


def name_of(source: Path | None) -> str:
    """A folder name for what is made from a text: another place, size or date of it gives another one."""
    if source is None:
        return "python"
    files = [source, *sorted(source.rglob("*"))] if source.is_dir() else [source]
    facts = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
        if path.is_file()
    ]
    return f"{source.resolve().stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}"


def standard_library(folder: Path) -> Path:
    """Python's own modules and packages, without their tests, copied into `folder`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not LEFT_OUT & set(inside.parts):
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / inside)
    return folder


def training_flags(prefix: str, tokenizer: Path, run: Path) -> list:
    """A small Llama, the same flags for both legs; bf16 where the processor multiplies it natively."""
    flags = [
        "--config",
        ROOT / "examples" / "tiny_cpu.yaml",
        "--data-path",
        prefix,
        "--tokenizer-model",
        tokenizer,
    ]
    flags += [
        "--train-iters",
        LAST,
        "--seq-length",
        LENGTH,
        "--global-batch-size",
        BATCH,
        "--save",
        run,
        "--load",
        run,
    ]
    return [*flags, "--bf16" if native_bf16() else "--no-bf16"]


def native_bf16() -> bool:
    """Whether this processor has bf16 matrix products; elsewhere they are emulated and slow."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def tool(name: str, *arguments) -> list:
    return [sys.executable, ROOT / "tools" / f"{name}.py", *arguments]


def step(title: str, product: Path | str, command: list) -> None:
    """Run a command unless what it makes is there."""
    print(f"\n{title}", flush=True)
    if Path(product).exists():
        print(f"  {product} is there: skipped", flush=True)
    else:
        run_command(command)


def run_command(command: list) -> None:
    words = [str(word) for word in command]
    print("  $ " + shlex.join(words), flush=True)
    status = subprocess.run(words, env=ENVIRONMENT).returncode
    if status:
        sys.exit(f"quickstart: the command above ended with status {status}")


def unigram_entropy(prefix: str) -> float:
    """Entropy of the corpus' token frequencies, nats: the loss of the best model without context."""
    dataset = IndexedDataset(prefix)
    counts = sum(
        np.bincount(dataset.get(i), minlength=VOCABULARY + 1) for i in range(dataset.num_sequences)
    )
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def compare_with_transformers(run: Path, export: Path) -> float:
    """Load the export with transformers and give both models the same text; the largest difference of the logits."""
    transformers.utils.logging.disable_progress_bar()
    peer, tokenizer = (
        AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32),
        AutoTokenizer.from_pretrained(export),
    )
    tokens = tokenizer("def main(argv=None):\n    import sys\n", return_tensors="pt").input_ids
    ours = load_pretrained(export, device=torch.device("cpu"), dtype=torch.float32).model
    with torch.no_grad():
        expected = peer(tokens).logits
        return (ours(tokens)[..., : expected.shape[-1]] - expected).abs().max().item()


if __name__ == "__main__":
    main()
