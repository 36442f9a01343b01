"""Measure time and memory of converting a model of a billion parameters, as a command."""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.table import Column, Row, Table, number
from trivium.config import Config, resolve
from trivium.config.presets import PRESETS, published_vocabulary
from trivium.interop.families import write_config
from trivium.interop.hf_folder import Outgoing, write_folder
from trivium.interop.hf_names import hf_correspondences
from trivium.interop.name_map import their_shapes

CONVERTED = "llama3.2-1b"
MAX_SHARD_BYTES = 1_000_000_000  # of the folder that is converted
TOOL = Path(__file__).resolve().parents[1] / "tools" / "convert_checkpoint.py"
# Run the tool and print the highest resident memory of this program alone, in kilobytes: what wait4
# and getrusage tell begins with that of the process it was started by.
TOOL_AND_PEAK = """
import runpy, sys
from pathlib import Path
sys.argv, sys.path[0] = sys.argv[1:], str(Path(sys.argv[1]).parent)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    if end.code:
        raise
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class Way:
    """One conversion: between which formats, from which folder, into which one."""

    source: str
    target: str
    load: Path
    save: Path

    @property
    def name(self) -> str:
        """Return how the table calls it."""
        return f"{self.source} to {self.target}"

    @property
    def command(self) -> list[str]:
        """Return the words of the command."""
        formats = ["--from", self.source, "--to", self.target]
        folders = ["--load", str(self.load), "--save", str(self.save)]
        return [sys.executable, "-c", TOOL_AND_PEAK, str(TOOL), *formats, *folders]


def conversion() -> dict[str, Row]:
    """Convert a random model in bf16 into a checkpoint of ours and back.

    Returns: by way, the seconds, the highest resident memory, and the limit that it should keep.
    """
    found: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        hf = Path(folder) / "hf"
        ours = Path(folder) / "ours"
        back = Path(folder) / "back"
        write_random(hf)
        table = table_of(largest_shard(hf))
        print(f"\n{table.header()}")
        for way in (Way("hf", "trivium", hf, ours), Way("trivium", "hf", ours, back)):
            found[way.name] = convert(way)
            print(table.line(way.name, found[way.name]))
    return found


def convert(way: Way) -> Row:
    """Run one conversion. Raises ValueError if it fails."""
    start = time.perf_counter()
    ended = subprocess.run(way.command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise ValueError(f"the conversion {way.name} failed; its own message is above")
    seconds = time.perf_counter() - start
    hf_folder = way.load if way.source == "hf" else way.save
    return {
        "seconds": seconds,
        "peak": int(ended.stdout.split()[-1]) * 1024,
        "limit": 1.5 * largest_shard(hf_folder) + 1e9,
    }


def largest_shard(folder: Path) -> int:
    """Return the bytes of the largest safetensors file."""
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def table_of(shard_bytes: int) -> Table:
    """Return the table, whose title names the size of the shards."""
    return Table(
        f"{CONVERTED}, shards of at most {shard_bytes / 1e9:.2f} GB",
        44,
        [
            Column("seconds", 8, number("seconds", 1)),
            Column("peak GB", 10, number("peak", 2, 1e-9)),
            Column("limit GB", 10, number("limit", 2, 1e-9)),
        ],
    )


def write_random(folder: Path) -> None:
    """Write a Hugging Face folder of the preset's shape.

    Its numbers are uniform: a billion normal ones would take longer than what is measured.
    """
    model = resolve(Config.of(PRESETS[CONVERTED] | {"seq_length": 1024}), 1).model
    vocab_size = published_vocabulary(CONVERTED)
    shapes = their_shapes(hf_correspondences(model, vocab_size))
    tensors = [random_tensor(name, shape) for name, shape in shapes.items()]
    ids = {"bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16"}
    description = write_config(model, vocab_size, ids)
    write_folder(folder, tensors, description, max_shard_bytes=MAX_SHARD_BYTES)


def random_tensor(name: str, shape: tuple[int, ...]) -> Outgoing:
    """Return a tensor that is made when it is written."""

    def make() -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)

    return Outgoing(name, shape, torch.bfloat16, make)
