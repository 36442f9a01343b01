"""Ranks for tests: a pool of processes that stays up, and `run_ranks`, which runs a function on n of them over gloo."""

import atexit
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from .mesh import Mesh

_GRACE_SECONDS = 2.0  # after the first failure, for the others to fail too before they are killed


class RankError(RuntimeError):
    """A rank died, hung, or raised an exception that cannot be sent."""


class Ranks:
    """Processes that run one case after another: starting one costs a second, a case on started ones 0.05 s."""

    def __init__(self):
        self.workers = []

    def run(self, n: int, function, args: tuple, timeout: float, axes: dict[str, int]) -> list:
        """function(mesh, *args) on n ranks; what each returned, in rank order. Raises the exception of the rank that failed first."""
        if any(not process.is_alive() for process, _ in self.workers):
            self.close()
        while len(self.workers) < n:
            self.workers.append(_start_worker())
        folder = Path(tempfile.mkdtemp(prefix="ranks_"))
        # Bytes rather than objects: torch sends tensors through multiprocessing as file descriptors, which leak.
        call = pickle.dumps((function, args))
        try:
            for rank, (_, pipe) in enumerate(self.workers[:n]):
                pipe.send((sys.path, rank, n, str(folder / "store"), timeout, axes, call))
            return self._collect(n, timeout)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _collect(self, n: int, timeout: float) -> list:
        results, waiting = {}, {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:n])}
        failure, deadline = None, time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise failure or RankError(
                    f"ranks {sorted(waiting.values())} did not answer within {timeout:.0f} s"
                )
            for pipe in sorted(ready, key=waiting.get):
                rank = waiting.pop(pipe)
                results[rank], error = _receive(pipe, rank)
                if error is not None and failure is None:
                    failure, deadline = error, time.monotonic() + _GRACE_SECONDS
        self._release(n)
        if failure is not None:
            raise failure
        return [results[rank] for rank in range(n)]

    def _release(self, n: int) -> None:
        """Tell the ranks that all have answered. A pool in which one has died is given up."""
        try:
            for _, pipe in self.workers[:n]:
                pipe.send(None)
        except BrokenPipeError:
            self.close()

    def close(self) -> None:
        """End all processes, whatever they do."""
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
            process.close()
        self.workers.clear()


def run_ranks(n: int, function, *args, timeout: float = 60.0, **axes: int) -> list:
    """Run the module-level `function(mesh, *args)` on n ranks with the sizes of axes given, as Mesh.plan takes them; its results by rank."""
    return _POOL.run(n, function, args, timeout, axes)


def _start_worker():
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed", "trivium.mesh", "trivium.testing"]
    )
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()
    return process, ours


def _receive(pipe: Connection, rank: int):
    try:
        value, error, text = pickle.loads(pipe.recv_bytes())
    except (
        EOFError,
        ConnectionError,
    ):  # its end of the pipe is closed, so `_release` will find it too
        return None, RankError(f"rank {rank} died")
    if text is None:
        return value, None
    error = error or RankError(text.strip().splitlines()[-1])
    error.add_note(f"on rank {rank}:\n{text}")
    return None, error


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            path, *case = pipe.recv()
            sys.path[:] = path
            failed, answer = _answer(*case)
            pipe.send_bytes(answer)
            # After a failure the group goes down at once, so that the others fail too instead of waiting; but after the
            # answer, so that their "connection closed" comes second. Without one it stays until all ranks have answered:
            # a rank may be done while another is still connecting.
            if not failed:
                pipe.recv()
            if dist.is_initialized():
                dist.destroy_process_group()
            if failed:
                pipe.recv()
        except EOFError:
            return


def _answer(
    rank: int, n: int, store: str, timeout: float, axes: dict[str, int], call: bytes
) -> tuple[bool, bytes]:
    """Whether the case failed on this rank, and (value, exception, traceback) for the parent."""
    try:
        function, args = pickle.loads(call)
        mesh = Mesh.plan(n, rank, **axes)
        if n > 1:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, n),
                rank=rank,
                world_size=n,
                timeout=timedelta(seconds=timeout),
            )
        return False, pickle.dumps(
            (function(mesh.connect("gloo", timeout / 60), *args), None, None)
        )
    except BaseException as error:
        return True, pickle.dumps((None, _sendable(error), traceback.format_exc()))


def _sendable(error: BaseException) -> BaseException | None:
    """The exception without what hangs on it, if it survives being pickled."""
    try:
        return pickle.loads(pickle.dumps(error)).with_traceback(None)
    except Exception:
        return None


_POOL = Ranks()
atexit.register(_POOL.close)
