"""Reasons to end a run early: a signal, a time limit.

Each rank may have a request of its own. It travels with the step's one reduction, so that all
ranks end after the same update.
"""

import signal
import time
from types import FrameType

from ..config import BatchConfig

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """This rank's request to end the run after the step: true once there is a reason to."""

    def __init__(self, batch: BatchConfig):
        self._signal: signal.Signals | None = None
        self._deadline: float | None = None
        if batch.exit_duration_in_mins is not None:
            self._deadline = time.monotonic() + 60 * batch.exit_duration_in_mins
        if batch.exit_signal_handler:
            for number in SIGNALS:
                signal.signal(number, self._receive)

    def __bool__(self) -> bool:
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return late or self._signal is not None

    @property
    def reason(self) -> str:
        """Return why, in a few words; on a rank without a request, that another one asked."""
        if self._signal is not None:
            return f"received {self._signal.name}"
        return "reached --exit-duration-in-mins" if self else "another rank asked to stop"

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
