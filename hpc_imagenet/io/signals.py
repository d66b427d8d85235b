"""Signals that stop a process: SIGUSR2 or SIGTERM from Slurm, and SIGTERM when the parent process dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
_POLL_INTERVAL = 0.05  # s


class StopSignal:
    """Flag that is true once this process has got SIGUSR2 or SIGTERM within the `with` block.

    Slurm sends one of them before a time limit or a preemption. A signal handler can do little safely, so
    this one only sets the flag: training polls it between two steps, and a session waits for it. Within the
    block it replaces the handlers of these signals; at its end they are restored.

    Attributes:
        signal: the last stop signal, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopSignal:
        for number in _SIGNALS:
            self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def wait(self, seconds: float) -> signal.Signals | None:
        """Wait for a stop signal, at most `seconds`; return it, or None if there was none."""
        # Not by threading.Event: a handler that sets it deadlocks if it has interrupted Event.wait.
        deadline = time.monotonic() + seconds
        while not self and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_INTERVAL))
        return self.signal

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)


def exit_with_parent(descriptor: int) -> None:
    """Send this process SIGTERM when its parent dies, even if the parent was killed.

    Args:
        descriptor: read end of a pipe whose other end only the parent has open.
    """

    def wait() -> None:
        os.read(descriptor, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    os.set_inheritable(descriptor, False)  # not for kernels and terminals
    threading.Thread(target=wait, daemon=True).start()
