"""How long a session lasts: until its time is over, nobody does anything, or somebody says so."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from hpc_imagenet.errors import Preempted, UserError
from hpc_imagenet.session.connection import end_warning
from hpc_imagenet.session.server import JupyterServer

_NEAR = 180.0  # s before its end, in which Slurm's signal of a time limit comes
_LOOK = 5.0  # s between two looks at what is done in it
_TICK = 0.5  # s
# s within which a signal reaches all processes of a job. Slurm sends it to Jupyter as well, which dies of
# SIGUSR2 and may be gone before this process has its own.
SPREADS = 5.0


class StopEvent:
    """Set by SIGTERM and SIGUSR2 while it is entered; `name` is that of the signal."""

    def __init__(self) -> None:
        self.name = ""
        self._event = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[StopEvent]:
        """Take the two signals over, and give them back."""
        before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGUSR2)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def wait(self, seconds: float) -> bool:
        """Return as soon as a signal has come, or after `seconds`; whether one has."""
        return self._event.wait(seconds)

    def _take(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._event.set()


@dataclass
class Watchdog:
    """Watches a server.

    Args:
        server: answers.
        ends: when its time is over, s since 1970.
        idle_minutes: without activity, until it ends; None: it does not.
        tell: called every second or so with minutes left and idle ones (0: busy).
        warn: called once, with a line, when its end is near.
    """

    server: JupyterServer
    ends: float
    idle_minutes: float | None
    tell: Callable[[float, float], None]
    warn: Callable[[str], None]

    def watch(self, asked: StopEvent) -> str:
        """Return why it has ended; the server may still run.

        Raises:
            Interrupted: a signal came that was not about its time.
            UserError: Jupyter broke down.
        """
        began = last = time.time()
        looked, warned = 0.0, False
        while True:
            code = self.server.ended()
            if code is not None and not asked.wait(SPREADS):
                if code:
                    raise UserError(f"Jupyter ended with exit code {code}: its last words are in the log")
                return "shut down from within"
            now = time.time()
            left = self.ends - now
            if asked.name:
                if asked.name == "SIGUSR2" and left < _NEAR:
                    return "its time was over"
                raise Preempted(f"stopped by {asked.name}; its folder stays")
            if left <= 0:
                return "its time was over"
            if now - looked > min(_LOOK, 6 * (self.idle_minutes or 1)):
                looked = now
                try:
                    active = self.server.active()
                    last = now if active is None else max(began, active)
                except OSError:  # a server that is too busy to answer is not idle
                    last = now
                if self.idle_minutes is not None and now - last > 60 * self.idle_minutes:
                    return f"{self.idle_minutes:g} minutes without activity"
            if not warned and (line := end_warning(self.ends)):
                warned = True
                self.warn(line)
            self.tell(left / 60, (now - last) / 60)
            asked.wait(_TICK)
