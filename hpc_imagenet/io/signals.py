"""Being asked to stop: SIGUSR2 or SIGTERM raises a flag, which training looks at between two steps.

Slurm sends one of them before a time limit or a preemption. A handler may do next to nothing, so this one
only notes it; all ranks then agree on the step, save one checkpoint and raise `Interrupted`.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from hpc_imagenet.errors import Preempted

__all__ = ["SIGNALS", "Preempted", "StopSignal"]

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class StopSignal:
    """Whether this process was asked to stop, since the `with` block began.

    Within the block no other handler of these signals is called; behind it they are what they were.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
