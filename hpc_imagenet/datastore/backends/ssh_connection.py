"""How a host behind ssh is asked, by ssh and rsync, which `sh` calls: again while the connection breaks.

How to reach the host (port, keys, jump hosts, shared connections) stands in ~/.ssh/config, or RSYNC_RSH names
another command; nothing of it is a setting here, and no password is asked for. The other side needs a POSIX
shell and rsync.
Sources: rsync(1), "--info=progress2", "EXIT VALUES"; ssh(1), "EXIT STATUS".
"""

from __future__ import annotations

import logging
import os
import random
import re
import shlex
import time
from collections.abc import Callable
from typing import Any

from hpc_imagenet.errors import UserError

log = logging.getLogger(__name__)

PAUSE = 1.0  # s before the second try of a connection that broke, twice as long before each further one …
LONGEST = 20.0  # … up to this
TRIES = 7  # in a row without a byte more: about a minute in all
FIRST_TRIES = 3  # to reach a host that was not reached yet
TIMEOUT = 60  # s without a byte

_URL = re.compile(r"((?:[^@:/]+@)?[^@:/][^@:/]*):(?!:|[^/]*@)(.+)", re.DOTALL)
# Nobody is there to be asked, and a connection that is dead without a word ends within a minute.
_SSH = "ssh -o BatchMode=yes -o ConnectTimeout=60 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
_PROGRESS = re.compile(rb"^ *(\d+) +\d+%", re.MULTILINE)
_BROKEN = {10, 12, 30, 35, 255}  # rsync's and ssh's codes for a connection that failed or ended
_FOR_GOOD = ("Permission denied", "verification failed", "Could not resolve", "No space left", "quota")


class SshConnection:
    """A host, and a folder there.

    Args:
        url: user@host:/path or host:path.

    Attributes:
        root: the folder, as a shell over there takes it.

    Raises:
        UserError: the url has another form, or ssh or rsync is missing here.
    """

    def __init__(self, url: str) -> None:
        match = _URL.fullmatch(url)
        if match is None or match[1].startswith("-") or "\n" in url:
            raise UserError(
                "datastore.url is no user@host:/path: a password, a port and :: have no place in it"
            )
        self.url = url.rstrip("/")
        self._host = match[1]
        self.root = match[2].removeprefix("~/").rstrip("/") or ("/" if match[2].startswith("/") else ".")
        self._reached = False
        import sh

        self._errors: Any = sh.ErrorReturnCode
        shell = os.environ.get("RSYNC_RSH") or _SSH
        command, *words = shlex.split(shell)
        try:
            self._ssh: Any = sh.Command(command).bake(*words, self._host)
            # -s: names arrive as they are, whatever the shell over there makes of spaces.
            self._rsync: Any = sh.Command("rsync").bake(
                "-rtLs", "--no-h", f"--timeout={TIMEOUT}", "--info=progress2", "-e", shell
            )
        except sh.CommandNotFound as error:
            raise UserError(
                f"datastore.url={url} needs {error} here: install openssh-client and rsync"
            ) from None

    def at(self, path: str) -> str:
        """Return where `path` is over there."""
        return f"{self.root.rstrip('/')}/{path}"

    def there(self, path: str) -> str:
        """Return the same as rsync takes it."""
        return f"{self._host}:{self.at(path)}"

    def run(self, script: str, *words: str, data: bytes = b"") -> bytes:
        """Run a script over there; return what it prints.

        Args:
            script: for sh. A connection may break when it has ended, and then it is run once more.
            words: its $1, $2 …
            data: its standard input. It ends early where the connection breaks.
        """
        # The login shell over there may be no POSIX shell.
        command = shlex.join(["exec", "sh", "-c", script, "sh", *words])
        done = self._again("asking", lambda _: self._ssh(command, _in=data, _return_cmd=True))
        return bytes(done.stdout)

    def rsync(self, what: str, words: list[str], tell: Callable[[int], None] = lambda done: None) -> None:
        """Run rsync; `tell` gets the bytes that are done."""
        env = {**os.environ, "LC_ALL": "C"}
        self._again(what, lambda out: self._rsync(*words, _out=out, _out_bufsize=0, _env=env), tell)

    def _again(
        self, what: str, call: Callable[[Any], Any], tell: Callable[[int], None] = lambda done: None
    ) -> Any:
        """Call ssh or rsync, and call again while the connection breaks.

        Raises:
            UserError: it ended badly, with the line of what it said that tells why.
        """
        line, furthest, failures = b"", 0, 0

        def out(chunk: bytes | str) -> None:  # unbuffered, so that progress comes when there is some
            nonlocal line, furthest, failures
            line += chunk.encode() if isinstance(chunk, str) else chunk
            if (found := _PROGRESS.search(line)) and int(found[1]) > furthest:
                furthest, failures = int(found[1]), 0
                tell(furthest)
            line = re.split(rb"[\r\n]", line)[-1]

        while True:
            try:
                result = call(out)
                self._reached = True
                return result
            except self._errors as error:
                words = _telling(error.stderr) or f"exit code {error.exit_code}"
                failures += 1
                if error.exit_code not in _BROKEN or any(said in words for said in _FOR_GOOD):
                    raise UserError(f"datastore.url={self.url}: {what}: {words}") from None
                if failures >= (TRIES if self._reached else FIRST_TRIES):
                    raise UserError(
                        f"datastore.url={self.url}: {what}: {words}, {failures} tries in a row; "
                        "what is there stays: ask again to go on"
                    ) from None
                wait = min(LONGEST, PAUSE * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)
                log.warning("%s: %s: %s; again in %.1f s", self.url, what, words, wait)
                time.sleep(wait)


def _telling(said: bytes) -> str:
    """Return the line that says why: the last one, or the one before rsync's own summary."""
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    telling = [
        line for line in lines if not line.startswith(("rsync error:", "rsync: connection unexpectedly"))
    ]
    full = [line for line in lines if "No space left" in line or "quota" in line]
    return (full or telling or lines or [""])[-1]
