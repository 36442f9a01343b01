"""Run pretrain_gpt.py and the tools in tests: in this process, or on gloo ranks of the pool."""

import io
import json
import os
import runpy
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np

import pretrain_gpt
from trivium.data.indexed import IndexedDatasetWriter
from trivium.launch import Process
from trivium.mesh import Mesh
from trivium.testing import run_ranks

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32"
    " --micro-batch-size 2 --global-batch-size 8 --train-iters 20 --lr 5e-3"
    " --tokenizer-type NullTokenizer --vocab-size 96 --make-vocab-size-divisible-by 16"
    " --num-workers 0 --device cpu --log-interval 5 --lr-warmup-iters 3"
)
LLAMA = (
    " --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
    " --group-query-attention --num-query-groups 2 --untie-embeddings-and-output-weights"
)
TP = "--tensor-model-parallel-size"
PP = "--pipeline-model-parallel-size"
CP = "--context-parallel-size"
SP = "--sequence-parallel"
ZERO1 = "--use-distributed-optimizer"
STRATEGY = "--data-parallel-sharding-strategy"
INSTANCES = "--num-distributed-optimizer-instances"
SCHEDULE = "--pipeline-schedule"
CHUNKS = "--num-virtual-stages-per-pipeline-rank"
RECOMPUTE = "--recompute-granularity"
NO_DROPOUT = " --attention-dropout 0 --hidden-dropout 0"
EXACT = (
    "iteration",
    "consumed_samples",
    "consumed_tokens",
    "lm_loss",
    "grad_norm",
    "learning_rate",
    "skipped",
)


def write_data(prefix: Path, documents: int = 60, seed: int = 0, vocab_size: int = 96) -> Path:
    """Write documents of 1 to 90 learnable tokens: a walk with a stride, and then the end token.

    The end token is `vocab_size`. Returns the prefix.
    """
    random = np.random.RandomState(seed)
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        for _ in range(documents):
            length = random.randint(1, 90)
            start = random.randint(vocab_size)
            stride = random.randint(1, 4)
            walk = (start + stride * np.arange(length)) % vocab_size
            writer.add_document(np.append(walk, vocab_size))
    return prefix


def write_ends(prefix: Path) -> None:
    """Write documents of the end token alone: with --eod-mask-loss nothing is left to predict."""
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        for _ in range(50):
            writer.add_document(np.full(40, 96))


def train(arguments: str, ranks: int = 1) -> None:
    """Run pretrain_gpt.py on so many ranks; `arguments` give --eval-iters and data too."""
    if ranks == 1:
        pretrain_gpt.main(arguments.split(), Process())
    else:
        run_ranks(ranks, _train_on_rank, arguments)


def tool(name: str, *arguments) -> subprocess.CompletedProcess:
    """Run tools/NAME.py as a command, but in this process: torch takes seconds to import."""
    command = [f"{name}.py", *map(str, arguments)]
    out = io.StringIO()
    error = io.StringIO()
    status = 0
    with (
        mock.patch.object(sys, "path", [str(ROOT / "tools"), *sys.path]),
        mock.patch.object(sys, "argv", command),
        redirect_stdout(out),
        redirect_stderr(error),
    ):
        try:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(command, status, out.getvalue(), error.getvalue())


def free_port() -> str:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_step(arguments: str, stderr: int = subprocess.PIPE) -> list[subprocess.Popen]:
    """Start two processes as srun does, with its variables alone; their stdout is a pipe."""
    command = [sys.executable, ROOT / "pretrain_gpt.py", *arguments.split()]
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "1",
        "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": "1",
    }
    tasks = [os.environ | step | {"SLURM_PROCID": task, "SLURM_LOCALID": task} for task in "01"]
    return [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
        for environment in tasks
    ]


def _train_on_rank(mesh: Mesh, arguments: str) -> None:
    pretrain_gpt.main(arguments.split(), Process(mesh.rank, mesh.world_size, mesh.rank))


def rows_of(path: Path, split: str | None = None) -> list[dict]:
    """Read the rows of metrics.jsonl that belong to a split; training rows have none."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row.get("split") == split]


def exact(rows: list[dict]) -> list[tuple]:
    """Return the values that must be equal bit for bit after a resume."""
    return [tuple(row[key] for key in EXACT) for row in rows]
