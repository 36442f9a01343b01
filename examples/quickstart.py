"""Do the main job on real input in a few minutes on two CPU cores.

Text, tokenizer, data, training, resume, sample, export:

    make quickstart                 Python's own standard library
    make quickstart INPUT=path      any folder or file of text

Every step is one command of the project, printed before it runs. A step whose result is there is
skipped.
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
from dataclasses import dataclass
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
# Threads that wait asleep: beside other busy processes, spinning ones make a run several times
# slower.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "true"} | os.environ
VOCABULARY = 4096
LENGTH = 256  # tokens of a sample
BATCH = 16  # samples of an update
FIRST_LEG = 140  # iterations before the resume
LAST = 180  # iterations in all


@dataclass(frozen=True)
class Paths:
    """The paths of everything that the quickstart makes."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        """Return the folder of the tokenizer."""
        return self.folder / "tokenizer"

    @property
    def data(self) -> Path:
        """Return the prefix that preprocess_data is given."""
        return self.folder / "data"

    @property
    def prefix(self) -> str:
        """Return the prefix of the .bin/.idx pair."""
        return f"{self.data}_text_document"

    @property
    def run(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def export(self) -> Path:
        """Return the Hugging Face folder."""
        return self.folder / "hf"


def main() -> None:
    """Run all steps and print where everything is."""
    start = time.monotonic()
    options = parse()
    paths = Paths(options.output / name_of(options.input))
    paths.folder.mkdir(parents=True, exist_ok=True)
    text = options.input or standard_library(paths.folder / "source")
    prepare(text, paths)
    train(paths)
    print("\n5/6 sample", flush=True)
    prompt = "    def __init__(self"
    drawn = ["--max-new-tokens", 120, "--temperature", 0.7, "--top-k", 50, "--seed", 1]
    run_command(tool("generate", "--load", paths.run, "--prompt", prompt, *drawn))
    print("\n6/6 export", flush=True)
    difference = compare_with_transformers(paths.export)
    print(f"""
done in {time.monotonic() - start:.0f} s
  validation loss    {validation_loss(paths)}
  transformers loads the export; largest difference of logits: {difference:.1e}
  tokenizer          {paths.tokenizer}
  data               {paths.prefix}.bin, .idx
  checkpoints        {paths.run}
  loss curve         {paths.run / "loss.png"}
  metrics            {paths.run / "metrics.jsonl"}
  Hugging Face       {paths.export}""")


def parse() -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--input",
        type=Path,
        help="file or folder of text; Python's standard library if not given",
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
    return options


def prepare(text: Path, paths: Paths) -> None:
    """Train a tokenizer and tokenize the text."""
    step(
        "1/6 tokenizer",
        paths.tokenizer / "tokenizer.json",
        tool(
            "train_tokenizer",
            *("--input", text),
            *("--vocab-size", VOCABULARY),
            *("--output", paths.tokenizer),
        ),
    )
    step(
        "2/6 data",
        f"{paths.prefix}.idx",
        tool(
            "preprocess_data",
            *("--input", text),
            *("--output-prefix", paths.data),
            *("--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", paths.tokenizer),
            *("--append-eod", "--workers", 2),
        ),
    )


def train(paths: Paths) -> None:
    """Train on one process, then resume on two tensor-parallel processes."""
    script = ROOT / "pretrain_gpt.py"
    flags = training_flags(paths)
    step(
        "3/6 training",
        paths.run / f"iter_{FIRST_LEG:07d}",
        [sys.executable, script, *flags, "--exit-interval", FIRST_LEG],
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    layout = ["--tensor-model-parallel-size", 2, "--sequence-parallel"]
    step(
        "4/6 resumed under another layout: 2 tensor-parallel processes",
        paths.run / f"iter_{LAST:07d}",
        [sys.executable, *torchrun, script, *flags, *layout, "--save-hf", paths.export],
    )


def validation_loss(paths: Paths) -> str:
    """Describe the last validation loss beside the unigram entropy of the text."""
    rows = read_rows(paths.run / "metrics.jsonl")
    losses = [row["lm_loss"] for row in rows if row.get("split") == "valid"]
    if losses:
        found = f"{losses[-1]:.3f} nats per token"
    else:
        found = "none: the text has too few documents to keep some for validation"
    return f"{found}; unigram entropy of the corpus: {unigram_entropy(paths.prefix):.3f}"


def name_of(source: Path | None) -> str:
    """Return a folder name for what is made from a text.

    A text of another place, size or date gets another name.
    """
    if source is None:
        return "python"
    files = [source, *sorted(source.rglob("*"))] if source.is_dir() else [source]
    facts = []
    for path in files:
        if path.is_file():
            facts.append((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns))
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    return f"{source.resolve().stem}-{digest[:8]}"


def standard_library(folder: Path) -> Path:
    """Copy Python's own modules and packages, without their tests, into `folder`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not LEFT_OUT & set(inside.parts):
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / inside)
    return folder


def training_flags(paths: Paths) -> list:
    """Return the flags of a small Llama, the same for both legs of the run.

    bf16 only if the processor multiplies it natively.
    """
    return [
        *("--config", ROOT / "examples" / "tiny_cpu.yaml"),
        *("--data-path", paths.prefix),
        *("--tokenizer-model", paths.tokenizer),
        *("--train-iters", LAST),
        *("--seq-length", LENGTH),
        *("--global-batch-size", BATCH),
        *("--save", paths.run),
        *("--load", paths.run),
        "--bf16" if native_bf16() else "--no-bf16",
    ]


def native_bf16() -> bool:
    """Return whether this processor has bf16 matrix products; others emulate them, slowly."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def tool(name: str, *arguments) -> list:
    """Return the command of one of tools/."""
    return [sys.executable, ROOT / "tools" / f"{name}.py", *arguments]


def step(title: str, product: Path | str, command: list) -> None:
    """Run a command unless what it makes is there."""
    print(f"\n{title}", flush=True)
    if Path(product).exists():
        print(f"  {product} is there: skipped", flush=True)
    else:
        run_command(command)


def run_command(command: list) -> None:
    """Print a command and run it; end the quickstart if it fails."""
    words = [str(word) for word in command]
    print("  $ " + shlex.join(words), flush=True)
    status = subprocess.run(words, env=ENVIRONMENT).returncode
    if status:
        sys.exit(f"quickstart: the command above ended with status {status}")


def unigram_entropy(prefix: str) -> float:
    """Return the entropy of the corpus' token frequencies, in nats.

    This is the loss of the best model without context.
    """
    dataset = IndexedDataset(prefix)
    counts = np.zeros(VOCABULARY + 1, dtype=np.int64)
    for number in range(dataset.num_sequences):
        counts += np.bincount(dataset.get(number), minlength=VOCABULARY + 1)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def compare_with_transformers(export: Path) -> float:
    """Load the export with transformers and with Trivium, and give both the same text.

    Returns the largest difference of their logits.
    """
    transformers.utils.logging.disable_progress_bar()
    peer = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(export)
    text = "def main(argv=None):\n    import sys\n"
    tokens = tokenizer(text, return_tensors="pt").input_ids
    ours = load_pretrained(export, device=torch.device("cpu"), dtype=torch.float32).model
    with torch.no_grad():
        expected = peer(tokens).logits
        found = ours(tokens)[..., : expected.shape[-1]]
    return (found - expected).abs().max().item()


if __name__ == "__main__":
    main()
