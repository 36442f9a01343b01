"""From what a step left on the device to rows on rank 0: read late, measured once, handed to every sink."""

import math
import resource
import time
from pathlib import Path

import torch

from ..config import Config
from ..estimate.flops import flops_per_token, peak_flops
from ..mesh import Mesh
from .metrics import Console, EvaluationRow, MetricsFile, Row, TensorBoard, draw_losses, read_rows
from .step import StepResult


class Reporter:
    """Turns StepResults into Rows, one step late on an accelerator so that the host runs ahead of it."""

    def __init__(
        self, config: Config, mesh: Mesh, device: torch.device, vocab_size: int, iteration: int
    ):
        self.config, self.mesh, self.device = config, mesh, device
        self._delay = 0 if device.type == "cpu" else 1
        self._waiting: list[StepResult] = []
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._peak = peak_flops(name)
        shape, length = config.model, config.batch.seq_length
        self._flops, self._causal_flops = (
            flops_per_token(shape, vocab_size, length, causal=causal) for causal in (False, True)
        )
        self._path = metrics_path(config)
        self._sinks = self._open_sinks(iteration) if mesh.rank == 0 else []
        self._started = time.perf_counter()

    def _open_sinks(self, iteration: int) -> list[MetricsFile | Console | TensorBoard]:
        sinks: list[MetricsFile | Console | TensorBoard] = [Console(self.config, iteration)]
        if self._path:
            sinks.append(MetricsFile(self._path, iteration))
        if self.config.logging.tensorboard_dir:
            sinks.append(TensorBoard(self.config.logging.tensorboard_dir, iteration))
        return sinks

    def restart_clock(self) -> None:
        """Leave out of the next iteration's time what was not training."""
        self._started = time.perf_counter()

    def add(self, result: StepResult) -> bool:
        """Take in a step; True if one of the steps read so far was asked to be the last."""
        self._waiting.append(result)
        return self._read(len(self._waiting) - self._delay)

    def drain(self) -> bool:
        """Read everything and put it on the disk; True if a step was asked to be the last."""
        stop = self._read(len(self._waiting))
        for sink in self._sinks:
            if isinstance(sink, MetricsFile):
                sink.flush()
        return stop

    def evaluation(self, iteration: int, split: str, loss: float) -> None:
        row = EvaluationRow(
            iteration, split, loss, math.exp(min(loss, 20))
        )  # not min(20, loss): of a nan that makes 20
        for sink in self._sinks:
            sink.evaluation(row)

    def close(self) -> Path | None:
        """Finish every sink and draw the curve; the picture's path, if there is one."""
        self.drain()
        for sink in self._sinks:
            sink.close()
        rows = (
            read_rows(self._path) if self._sinks and self._path else []
        )  # none where the path is a device
        if not rows:
            return None
        picture = self._path.with_name("loss.png")
        draw_losses(rows, picture)
        return picture

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
        rate = result.batch.tokens / seconds
        count = result.num_predictions.item()
        per_device = rate / self.mesh.world_size
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
            tflops_per_device=per_device * self._flops / 1e12,
            mfu=per_device * self._flops / self._peak if self._peak else None,
            mfu_causal=per_device * self._causal_flops / self._peak if self._peak else None,
            loss_scale=result.loss_scale.item(),
            skipped=int(result.skipped.item()),
            memory_bytes=_memory(self.device),
            no_predictions=count == 0,
        )


def metrics_path(config: Config) -> Path | None:
    """Where the rows go: --metrics-jsonl, else under --save, else nowhere."""
    if config.logging.metrics_jsonl:
        return Path(config.logging.metrics_jsonl)
    return Path(config.checkpoint.save) / "metrics.jsonl" if config.checkpoint.save else None


def _memory(device: torch.device) -> int:
    """Peak memory of this process: the device's allocator, or the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
