"""Turn the results of a step into rows on rank 0: read late, measured once, for all sinks.

Reading a number of a step waits until the device has finished it. On an accelerator the rows are
therefore one step late: the host reads step n when it has already sent off step n + 1.
"""

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch

from ..config import Config
from ..estimate.flops import flops_per_token, peak_flops
from ..mesh import Mesh
from .step import StepResult


@dataclass(frozen=True)
class Row:
    """One iteration, as metrics.jsonl holds it."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    lm_loss: float
    grad_norm: float
    learning_rate: float
    global_batch_size: int
    iteration_ms: float
    tokens_per_second: float
    tflops_per_device: float
    mfu: float | None
    mfu_causal: float | None
    loss_scale: float
    skipped: int
    memory_bytes: int
    no_predictions: bool = False  # said on the console alone


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluation of a split."""

    iteration: int
    split: str
    lm_loss: float
    ppl: float


class ReportSink(Protocol):
    """A place that rows go to."""

    def write(self, row: Row) -> None:
        """Take the row of one iteration."""

    def evaluation(self, row: EvaluationRow) -> None:
        """Take the row of one evaluation."""

    def flush(self) -> None:
        """Put what was taken where a crash cannot lose it; a checkpoint follows."""

    def close(self) -> None:
        """Finish; nothing is taken after this."""


class _Flops(NamedTuple):
    """Floating-point operations of one token of training."""

    full: float  # attention counted over the whole square of scores
    causal: float  # attention counted over the visible half


class Reporter:
    """Turn StepResults into Rows and hand them to every sink.

    sinks: empty on all ranks but the first, which read their steps all the same.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        device: torch.device,
        vocab_size: int,
        sinks: Sequence[ReportSink],
    ):
        self.device = device
        self._world_size = mesh.world_size
        self._sinks = sinks
        # A CPU has finished the step when it returns: there is nothing to run ahead of.
        self._delay = 0 if device.type == "cpu" else 1
        self._waiting: list[StepResult] = []
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._peak = peak_flops(name)
        self._flops_per_token = partial(flops_per_token, config.model, vocab_size)
        self._flops: dict[int, _Flops] = {}  # by the length of the samples
        self._started = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave out of the next iteration's time what was not training."""
        self._started = time.perf_counter()

    def add(self, result: StepResult) -> bool:
        """Take in a step. Returns whether one of the steps read now was asked to be the last."""
        self._waiting.append(result)
        return self._read(len(self._waiting) - self._delay)

    def drain(self) -> bool:
        """Read all steps and flush the sinks. Returns whether one was asked to be the last."""
        stop = self._read(len(self._waiting))
        for sink in self._sinks:
            sink.flush()
        return stop

    def evaluation(self, iteration: int, split: str, loss: float) -> None:
        """Report the loss of a split in nats, with its perplexity."""
        perplexity = math.exp(min(loss, 20))  # not min(20, loss), which makes 20 of a NaN
        row = EvaluationRow(iteration, split, loss, perplexity)
        for sink in self._sinks:
            sink.evaluation(row)

    def close(self) -> None:
        """Read all steps and finish every sink."""
        self.drain()
        for sink in self._sinks:
            sink.close()

    def _read(self, count: int) -> bool:
        stop = False
        for _ in range(count):
            result = self._waiting.pop(0)
            stop |= result.stop.item() > 0  # waits for the step's end
            now = time.perf_counter()
            row = self._row(result, now - self._started)
            self._started = now
            for sink in self._sinks:
                sink.write(row)
        return stop

    def _row(self, result: StepResult, seconds: float) -> Row:
        # The step's end has been waited for: these reads cost nothing more.
        count = result.num_predictions.item()
        rate = result.batch.tokens / seconds
        per_device = rate / self._world_size
        flops = self._flops_at(result.batch.seq_length)
        return Row(
            iteration=result.progress.iteration,
            consumed_samples=result.progress.consumed_samples,
            consumed_tokens=result.progress.consumed_tokens,
            lm_loss=result.loss_sum.item() / count if count else math.nan,
            grad_norm=result.grad_norm.item(),
            learning_rate=result.learning_rate,
            global_batch_size=result.batch.samples,
            iteration_ms=seconds * 1000,
            tokens_per_second=rate,
            tflops_per_device=per_device * flops.full / 1e12,
            mfu=per_device * flops.full / self._peak if self._peak else None,
            mfu_causal=per_device * flops.causal / self._peak if self._peak else None,
            loss_scale=result.loss_scale.item(),
            skipped=int(result.skipped.item()),
            memory_bytes=_memory(self.device),
            no_predictions=count == 0,
        )

    def _flops_at(self, seq_length: int) -> _Flops:
        if seq_length not in self._flops:
            full = self._flops_per_token(seq_length, causal=False)
            causal = self._flops_per_token(seq_length, causal=True)
            self._flops[seq_length] = _Flops(full, causal)
        return self._flops[seq_length]


def _memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
