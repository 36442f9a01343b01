"""Run a function on several ranks in a test, over a pool of processes that stays up.

    def sum_of_ranks(mesh):
        return comm.all_reduce(torch.tensor(mesh.rank), mesh.tp).item()

    assert run_ranks(4, sum_of_ranks, tp=2) == [1, 1, 5, 5]

The ranks talk over gloo. The function is a module's own, so that it can be pickled.
"""

import atexit
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .mesh import Mesh

_GRACE_SECONDS = 2.0  # after the first failure, for the others to fail too before they are killed


class RankError(RuntimeError):
    """A rank died, hung, or raised an exception that cannot be sent."""


class _Worker(NamedTuple):
    """One process of the pool, and our end of the pipe to it."""

    process: Any
    pipe: Connection


class _Case(NamedTuple):
    """The message that a worker gets: one function to run as one rank of n.

    path: sys.path of the caller, so that the worker finds the function's module.
    store: file where the ranks meet.
    call: the function and its arguments, pickled.
    """

    path: list[str]
    rank: int
    n: int
    store: str
    timeout: float
    axes: dict[str, int]
    call: bytes


class Ranks:
    """Processes that run one case after another.

    Starting one costs a second, a case on started ones 0.05 s.
    """

    def __init__(self) -> None:
        self.workers: list[_Worker] = []

    def run(
        self, n: int, function: Callable, args: tuple, timeout: float, axes: dict[str, int]
    ) -> list:
        """Run function(mesh, *args) on n ranks and return what each returned, in rank order.

        Raises the exception of the rank that failed first.
        """
        if any(not worker.process.is_alive() for worker in self.workers):
            self.close()
        while len(self.workers) < n:
            self.workers.append(_start_worker())
        folder = Path(tempfile.mkdtemp(prefix="ranks_"))
        # Bytes rather than objects: torch sends tensors through multiprocessing as file
        # descriptors, which leak.
        call = pickle.dumps((function, args))
        store = str(folder / "store")
        try:
            for rank, worker in enumerate(self.workers[:n]):
                case = _Case(sys.path, rank, n, store, timeout, axes, call)
                worker.pipe.send(tuple(case))
            return self._collect(n, timeout)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _collect(self, n: int, timeout: float) -> list:
        """Wait for the answers of n ranks."""
        results: dict[int, Any] = {}
        pipes = [worker.pipe for worker in self.workers[:n]]
        waiting = set(range(n))
        failure: BaseException | None = None
        deadline = time.monotonic() + timeout
        while waiting:
            left = max(0.0, deadline - time.monotonic())
            ready = wait([pipes[rank] for rank in sorted(waiting)], timeout=left)
            if not ready:
                self.close()
                silent = f"ranks {sorted(waiting)} did not answer within {timeout:.0f} s"
                raise failure or RankError(silent)
            for rank in sorted(waiting):
                if pipes[rank] not in ready:
                    continue
                waiting.remove(rank)
                results[rank], error = _receive(pipes[rank], rank)
                if error is not None and failure is None:
                    failure = error
                    deadline = time.monotonic() + _GRACE_SECONDS
        self._release(n)
        if failure is not None:
            raise failure
        return [results[rank] for rank in range(n)]

    def _release(self, n: int) -> None:
        """Tell the ranks that all have answered. A pool in which one has died is given up."""
        try:
            for worker in self.workers[:n]:
                worker.pipe.send(None)
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


def run_ranks(n: int, function: Callable, *args: Any, timeout: float = 60.0, **axes: int) -> list:
    """Run function(mesh, *args) on n ranks and return what each returned, in rank order.

    function: of a module, so that it can be pickled.
    axes: sizes of the mesh, as Mesh.plan takes them.
    timeout: seconds.
    """
    return _POOL.run(n, function, args, timeout, axes)


def _start_worker() -> _Worker:
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed", "trivium.mesh", "trivium.testing"]
    )
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _receive(pipe: Connection, rank: int) -> tuple[Any, BaseException | None]:
    """Return (value, None) or (None, error) of a rank that has answered or died."""
    try:
        value, error, text = pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        # Its end of the pipe is closed, so `_release` will find it too.
        return None, RankError(f"rank {rank} died")
    if text is None:
        return value, None
    error = error or RankError(text.strip().splitlines()[-1])
    error.add_note(f"on rank {rank}:\n{text}")
    return None, error


def _serve(pipe: Connection) -> None:
    """Run cases as they come, until the pipe closes: what a worker does."""
    torch.set_num_threads(1)
    while True:
        try:
            case = _Case(*pipe.recv())
            sys.path[:] = case.path
            failed, answer = _answer(case)
            pipe.send_bytes(answer)
            # After a failure the group goes down at once, so that the others fail too instead of
            # waiting; but after the answer, so that their "connection closed" comes second. Without
            # one it stays until all ranks have answered: a rank may be done while another is still
            # connecting.
            if not failed:
                pipe.recv()
            if dist.is_initialized():
                dist.destroy_process_group()
            if failed:
                pipe.recv()
        except EOFError:
            return


def _answer(case: _Case) -> tuple[bool, bytes]:
    """Run a case; return whether it failed, and (value, exception, traceback) for the parent."""
    try:
        function, args = pickle.loads(case.call)
        mesh = Mesh.plan(case.n, case.rank, **case.axes)
        if case.n > 1:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(case.store, case.n),
                rank=case.rank,
                world_size=case.n,
                timeout=timedelta(seconds=case.timeout),
            )
        connected = mesh.connect("gloo", case.timeout / 60)
        return False, pickle.dumps((function(connected, *args), None, None))
    except BaseException as error:
        return True, pickle.dumps((None, _sendable(error), traceback.format_exc()))


def _sendable(error: BaseException) -> BaseException | None:
    """Return the exception without what hangs on it, if it survives being pickled."""
    try:
        return pickle.loads(pickle.dumps(error)).with_traceback(None)
    except Exception:
        return None


_POOL = Ranks()
atexit.register(_POOL.close)
