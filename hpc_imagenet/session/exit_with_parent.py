"""Within the server's process: end with the one that started it, even if that was killed."""

from __future__ import annotations

import os
import signal
import threading


def exit_with_parent(descriptor: int) -> None:
    """Send this process SIGTERM when the other end of a pipe is closed, which its owner's death does."""

    def wait() -> None:
        os.read(descriptor, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    os.set_inheritable(descriptor, False)  # not for kernels and terminals
    threading.Thread(target=wait, daemon=True).start()
