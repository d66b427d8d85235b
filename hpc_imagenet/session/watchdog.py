"""Watch a session until its time limit, its idle limit, a shutdown or a signal."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from hpc_imagenet.errors import Preempted, UserError
from hpc_imagenet.io.signals import StopSignal
from hpc_imagenet.session.connection import end_warning
from hpc_imagenet.session.server import JupyterServer

_TIME_LIMIT_SIGNAL = 180.0  # s before the end; from then on SIGUSR2 means Slurm's time limit
_ACTIVITY_INTERVAL = 5.0  # s between two checks of activity
_TICK = 0.5  # s
# s within which a signal reaches all processes of a job. Slurm also signals Jupyter, which dies of SIGUSR2
# and may be gone before this process receives its own.
SIGNAL_DELAY = 5.0


def watch(
    server: JupyterServer,
    stop: StopSignal,
    ends: float,
    idle_minutes: float | None,
    progress: Callable[[float, float], None],
    warn: Callable[[str], None],
    signal_delay: float = SIGNAL_DELAY,
) -> str:
    """Wait for the end of a session and return the reason; the server may still be running.

    Args:
        server: running Jupyter server.
        stop: stop signal of this process.
        ends: end of the session, s since 1970.
        idle_minutes: idle time after which the session ends, min; None: no limit.
        progress: callback, called about twice per second with minutes left and idle minutes (0: busy).
        warn: callback, called once with a line of text when the end is near.
        signal_delay: s to wait for a signal once Jupyter has ended.

    Raises:
        Preempted: a signal was received that is not Slurm's time limit.
        UserError: Jupyter failed.
    """
    begin = last_active = time.time()
    last_check, warned = 0.0, False
    while True:
        code = server.exit_code()
        if code is not None and not stop.wait(signal_delay):
            if code:
                raise UserError(f"Jupyter failed with exit code {code}: see its last lines in the log")
            return "shut down from Jupyter"
        now = time.time()
        left = ends - now
        if stop.signal:
            if stop.signal == signal.SIGUSR2 and left < _TIME_LIMIT_SIGNAL:
                return "its time limit was reached"
            raise Preempted(f"stopped by {stop.signal.name}; its notebooks are kept")
        if left <= 0:
            return "its time limit was reached"
        if now - last_check > min(_ACTIVITY_INTERVAL, 6 * (idle_minutes or 1)):
            last_check = now
            try:
                activity = server.last_activity()
                last_active = now if activity is None else max(begin, activity)
            except OSError:  # a server that is too busy to respond is not idle
                last_active = now
            if idle_minutes is not None and now - last_active > 60 * idle_minutes:
                return f"{idle_minutes:g} minutes without activity"
        if not warned and (line := end_warning(ends)):
            warned = True
            warn(line)
        progress(left / 60, (now - last_active) / 60)
        stop.wait(_TICK)
