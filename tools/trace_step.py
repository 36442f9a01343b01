"""Trace one training step: the files of core/ that it enters, and the calls down to a product.

Trains a small Llama for three updates in this process and watches the last one, from the first
micro-batch to the updated weights. Prints the files in the order in which they are entered, and
the longest chain of our own functions between the training loop and a matrix product.
"""

import io
import os
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # pretrain_gpt stands there

import numpy as np

import pretrain_gpt
from trivium import launch
from trivium.data.indexed import IndexedDatasetWriter

CORE = Path(__file__).resolve().parents[1] / "core"
# A step without dropout, on the native kernels, as most runs of today are.
RUN = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention"
    " --num-query-groups 2 --position-embedding-type rope --normalization RMSNorm --swiglu"
    " --disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0"
    " --attention-dropout 0 --seq-length 64 --micro-batch-size 2 --global-batch-size 4"
    " --train-iters 3 --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 255 --num-workers 0"
    " --eval-iters 0 --log-interval 1000 --device cpu"
)
DOCUMENTS = 200
# Functions of PyTorch that multiply matrices, as a profiler sees them.
PRODUCTS = {"linear", "mm", "addmm", "addmm_", "bmm", "matmul"}
LOOP = ("train/loop.py", "run")
STEP = ("train/step.py", "step")


@dataclass
class Trace:
    """The trace of one step. files: of core/, in the order of entry. chain: calls to a product."""

    files: list[str] = field(default_factory=list)
    chain: list[str] = field(default_factory=list)


class Tracer:
    """Watch the calls of this thread while a step runs; an argument of `sys.setprofile`."""

    def __init__(self):
        self.traces: list[Trace] = []
        self._step: FrameType | None = None  # the step that is being watched

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Take note of an event: a call, a return, or a call of a built-in function."""
        if event == "call":
            place = place_of(frame)
            if place == STEP and self._step is None:
                self._step = frame
                self.traces.append(Trace())
            if place is not None and self._step is not None:
                self._enter(place[0])
        elif event == "return" and frame is self._step:
            self._step = None
        elif event == "c_call" and self._step is not None and argument.__name__ in PRODUCTS:
            self._multiply(frame)

    def _enter(self, file: str) -> None:
        files = self.traces[-1].files
        if file not in files:
            files.append(file)

    def _multiply(self, frame: FrameType) -> None:
        chain = chain_to(frame)
        if len(chain) > len(self.traces[-1].chain):
            self.traces[-1].chain = chain


def place_of(frame: FrameType) -> tuple[str, str] | None:
    """Return file (below core/) and name of a frame's function; None if it is not ours."""
    file = frame.f_code.co_filename
    if not file.startswith(str(CORE)):
        return None
    return str(Path(file).relative_to(CORE)), frame.f_code.co_name


def chain_to(frame: FrameType) -> list[str]:
    """Return our functions from the training loop down to `frame`, as `file:function`."""
    chain: list[str] = []
    current: FrameType | None = frame
    while current is not None:
        place = place_of(current)
        if place is not None:
            chain.append(f"{place[0]}:{current.f_code.co_qualname}")
        if place == LOOP:
            break
        current = current.f_back
    return chain[::-1]


def write_documents(prefix: Path) -> None:
    """Write documents of 20 to 120 ids below 255 as .bin and .idx, each ended by the id 255."""
    random = np.random.RandomState(0)
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        for _ in range(DOCUMENTS):
            ids = random.randint(0, 255, size=random.randint(20, 121))
            writer.add_document(np.append(ids, 255))


def trace_step(more_flags: str = "") -> Trace:
    """Train on documents in a temporary folder; return the trace of the last step.

    more_flags: added to those of `RUN`, in the form of a command line.
    """
    tracer = Tracer()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        prefix = Path(folder) / "documents"
        write_documents(prefix)
        arguments = f"{RUN} {more_flags} --data-path {prefix}".split()
        sys.setprofile(tracer)
        try:
            pretrain_gpt.main(arguments, launch.read_environment({}))
        finally:
            sys.setprofile(None)
    return tracer.traces[-1]


def main() -> None:
    """Print the files of a step and the longest chain of calls to a matrix product."""
    trace = trace_step()
    lines = [f"{len(trace.files)} files from the loader to the update:"]
    lines += [f"  core/{file}" for file in trace.files]
    lines += [f"{len(trace.chain)} of our functions from the loop to a matrix product:"]
    lines += [f"  {call}" for call in trace.chain]
    print("\n".join(lines))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
