"""Commands on a host behind ssh: ssh and rsync, called through `sh` and retried on connection errors.

Port, keys, jump hosts and shared connections are set in ~/.ssh/config, or RSYNC_RSH names another command.
This package has no settings for them and never prompts for a password. The host needs a POSIX shell and
rsync.
Sources: rsync(1), "--info=progress2", "EXIT VALUES"; ssh(1), "EXIT STATUS".
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import time
from collections.abc import Callable
from typing import Any

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.child_environment import environment_without_secrets
from hpc_imagenet.io.retry import Retry

log = logging.getLogger(__name__)

# Lines of rsync after the one with the reason.
_SUMMARIES = (
    "rsync error:",
    "rsync: connection unexpectedly",
    "(see the rsync manpage",
    "ERROR: ResolutionImpossible",
)
_REPLY = "reply-of-hpc_imagenet:"  # printed before the output of a script
FIRST_WAIT = 1.0  # s before the first retry; doubled before each further one …
LONGEST_WAIT = 20.0  # … up to this
MAX_FAILURES = 7  # in a row without progress: about a minute in total
TIMEOUT = 60  # s without a byte

_URL = re.compile(r"((?:[^@:/]+@)?[^@:/][^@:/]*):(?!:|[^/]*@)(.+)", re.DOTALL)
# Never prompt for a password, and detect a dead connection within a minute.
_SSH = "ssh -o BatchMode=yes -o ConnectTimeout=60 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
_PROGRESS = re.compile(rb"^ *(\d+) +\d+%", re.MULTILINE)
_VANISHED = 24  # exit code of rsync: all but files that were removed meanwhile is sent
_CONNECTION_ERRORS = {10, 12, 30, 35, 255}  # exit codes of rsync and ssh for a failed or lost connection
_PERMANENT = ("Permission denied", "verification failed", "Could not resolve", "No space left", "quota")


class SshConnection:
    """A host and a root folder on it.

    Args:
        url: user@host:/path or host:path.
        setting: the setting that names the host, for messages.
        shell: ssh with its options; None: RSYNC_RSH, or ssh without prompts.

    Attributes:
        root: the root folder, as the remote shell takes it.

    Raises:
        UserError: the URL has another form, or ssh or rsync is missing on this machine.
    """

    def __init__(self, url: str, setting: str = "datastore.url", shell: str | None = None) -> None:
        match = _URL.fullmatch(url)
        if match is None or match[1].startswith("-") or "\n" in url:
            raise UserError(f"{setting} must be user@host:/path, without a password, a port or ::")
        self.url = url.rstrip("/")
        self._named = f"{setting}={self.url}"
        self._host = match[1]
        self.root = match[2].removeprefix("~/").rstrip("/") or ("/" if match[2].startswith("/") else ".")
        self._reached = False
        import sh

        self._errors: Any = sh.ErrorReturnCode
        shell = shell or os.environ.get("RSYNC_RSH") or _SSH
        command, *options = shlex.split(shell)
        try:
            self._ssh: Any = sh.Command(command).bake(
                *options, self._host, _env=environment_without_secrets()
            )
            # -s: file names are not interpreted by the remote shell.
            self._rsync: Any = sh.Command("rsync").bake(
                "-rts", "--no-h", f"--timeout={TIMEOUT}", "--info=progress2", "-e", shell
            )
        except sh.CommandNotFound as error:
            raise UserError(
                f"{self._named}: {error} is missing on this machine: install openssh-client and rsync"
            ) from None

    def remote_path(self, path: str) -> str:
        """Return the path of `path` on the host."""
        return f"{self.root.rstrip('/')}/{path}"

    def rsync_path(self, path: str) -> str:
        """Return `host:path` of `path` for rsync."""
        return f"{self._host}:{self.remote_path(path)}"

    def run(self, script: str, *arguments: str, data: bytes = b"") -> bytes:
        """Run a script on the host and return its standard output.

        Args:
            script: for sh. It must be safe to run twice: the connection may break after it has ended, and
                then it is run again.
            arguments: its $1, $2 …
            data: its standard input. It is truncated if the connection breaks.
        """
        # The user's login shell may not be a POSIX shell.
        command = shlex.join(["exec", "sh", "-c", f"printf %s {_REPLY}\n{script}", "sh", *arguments])
        done = self._retry("ssh", lambda _: self._ssh(command, _in=data, _return_cmd=True))
        # Start-up files of the login shell may print before: such a banner must not be read as a reply.
        _, begun, reply = bytes(done.stdout).partition(_REPLY.encode())
        if not begun:
            raise UserError(
                f"{self._named}: the host did not run sh: let its login shell start commands that ssh passes"
            )
        return reply

    def rsync(
        self,
        step: str,
        arguments: list[str],
        progress: Callable[[int], None] = lambda done: None,
        changing: bool = False,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Run rsync.

        Args:
            step: name of the transfer for messages, such as "sending".
            arguments: of rsync.
            progress: called with the number of bytes done.
            changing: whether this is a folder that a running job writes: symbolic links are left out, else
                what they lead to is sent; and a file that vanishes meanwhile is no error.
            before: called before each attempt; an exception from it ends them.
        """
        if not changing:
            arguments = ["-L", *arguments]
        options = {"_out_bufsize": 0, "_env": {**environment_without_secrets(), "LC_ALL": "C"}}
        options["_ok_code"] = [0, _VANISHED] if changing else [0]

        def attempt(out: Any) -> None:
            before()
            self._rsync(*arguments, _out=out, **options)

        self._retry(step, attempt, progress)

    def _retry(
        self, step: str, call: Callable[[Any], Any], progress: Callable[[int], None] = lambda done: None
    ) -> Any:
        """Call ssh or rsync, retrying on connection errors.

        Raises:
            UserError: the command failed; with the line of its standard error that gives the reason.
        """
        line, furthest = b"", 0
        retry = Retry(FIRST_WAIT, LONGEST_WAIT, MAX_FAILURES)

        def out(chunk: bytes | str) -> None:  # unbuffered, so that progress is reported at once
            nonlocal line, furthest
            line += chunk.encode() if isinstance(chunk, str) else chunk
            if (match := _PROGRESS.search(line)) and int(match[1]) > furthest:
                furthest, retry.failures = int(match[1]), 0
                progress(furthest)
            line = re.split(rb"[\r\n]", line)[-1]

        while True:
            try:
                result = call(out)
                self._reached = True
                return result
            except self._errors as error:
                reason = _reason(error.stderr) or f"exit code {error.exit_code}"
                if error.exit_code not in _CONNECTION_ERRORS or any(text in reason for text in _PERMANENT):
                    raise UserError(f"{self._named}: {step}: {reason}") from None
                wait = retry.failed(self._reached)
                if wait is None:
                    raise UserError(
                        f"{self._named}: {step} failed {retry.failures} times in a row: {reason}; "
                        "transferred data is kept: run it again to resume"
                    ) from None
                log.warning("%s: %s: %s; retry in %.1f s", self.url, step, reason, wait)
                time.sleep(wait)


def _reason(stderr: bytes) -> str:
    """Return the line that gives the reason: the last one, or the one before the summary of rsync or pip."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    specific = [line for line in lines if not line.startswith(_SUMMARIES)]
    full = [line for line in lines if "No space left" in line or "quota" in line]
    return (full or specific or lines or [""])[-1]
