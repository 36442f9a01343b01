"""Reasons to end a run early: a signal, a time limit. Each rank has a wish; all of them agree through the step's own reduction."""

import signal
import time

from ..config import BatchConfig

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopWish:
    """Whether this rank wants to stop at the end of the step."""

    def __init__(self, batch: BatchConfig):
        self._signal: signal.Signals | None = None
        self._deadline = (
            None
            if batch.exit_duration_in_mins is None
            else time.monotonic() + 60 * batch.exit_duration_in_mins
        )
        if batch.exit_signal_handler:
            for number in SIGNALS:
                signal.signal(number, self._receive)

    def __bool__(self) -> bool:
        return self._signal is not None or (
            self._deadline is not None and time.monotonic() >= self._deadline
        )

    @property
    def reason(self) -> str:
        """Why, in a few words; on a rank without a wish, that another had one."""
        if self._signal is not None:
            return f"received {self._signal.name}"
        return "reached --exit-duration-in-mins" if self else "another rank asked to stop"

    def _receive(self, number: int, frame) -> None:
        self._signal = signal.Signals(number)
