"""MATLAB files, read by scipy in a process of its own: a damaged one can crash scipy or fill the memory.

`python -m hpc_imagenet.io.mat_file` reads a file from its standard input and writes its variables as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import resource
import signal
import subprocess
import sys
from typing import Any

from hpc_imagenet.errors import UserError
from hpc_imagenet.io.printable import error_line

_HDF5 = b"\x89HDF\r\n\x1a\n"
_MEMORY, _SECONDS = 4 << 30, 120  # bytes of address space, s of CPU time: a table of labels needs far less
_REFUSED = 3  # exit code: the message is on the standard output


def read_mat(data: bytes, name: str) -> dict[str, Any]:
    """Return the variables of a MATLAB file as plain values.

    Args:
        data: contents of the file.
        name: name of the file, for errors.

    Returns:
        Name → number, text or list. Of an array of structures: a list with a dict of each one's fields, in
        their order. An array with one element is that element.

    Raises:
        UserError: it is not a MATLAB file that scipy reads.
    """
    try:
        variables: dict[str, Any] = json.loads(_read(data))
    except ValueError as error:
        raise UserError(f"{name} is not a readable MATLAB file ({error_line(error)})") from None
    return variables


def flat(value: Any) -> list[Any]:
    """Return the elements of an array in the order of its rows; of one element, a list with it."""
    return [each for part in value for each in flat(part)] if isinstance(value, list) else [value]


@functools.lru_cache(maxsize=8)  # two or three parts of a job read the same file
def _read(data: bytes) -> bytes:
    """Return the variables as JSON.

    Raises:
        ValueError: the file cannot be read.
    """
    if data.startswith(_HDF5) or data.startswith(b"MATLAB 7.3"):
        raise ValueError("it is in the format of MATLAB 7.3: save it with -v7")
    done = subprocess.run([sys.executable, "-m", __name__], input=data, capture_output=True, check=False)
    if done.returncode == _REFUSED:
        raise ValueError(done.stdout.decode(errors="replace"))
    if done.returncode:
        how = f"exit code {done.returncode}"
        with contextlib.suppress(ValueError):
            how = signal.Signals(-done.returncode).name
        raise ValueError(f"damaged: reading it ended with {how}")
    return done.stdout


def _main() -> None:
    from scipy.io import loadmat  # importing it takes 0.2 s

    for limit, value in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CPU, _SECONDS)):
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of the address space
            resource.setrlimit(limit, (value, value))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        variables = loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)
        plain = {key: _plain(value) for key, value in variables.items() if not key.startswith("__")}
        text = json.dumps(plain, default=str)
    except Exception as error:  # scipy raises many kinds of errors for invalid files
        sys.stdout.write(" ".join(f"{type(error).__name__}: {error}".split()))
        sys.exit(_REFUSED)
    sys.stdout.write(text)


def _plain(value: Any) -> Any:
    """Return a value of scipy as JSON has it."""
    import numpy as np

    if isinstance(value, np.ndarray):
        if value.dtype.names:
            return [_plain(row) for row in np.atleast_1d(value).ravel()]
        if value.dtype == object:
            return _plain(value.item()) if value.ndim == 0 else [_plain(each) for each in value.ravel()]
        return value.tolist()
    if isinstance(value, np.void):
        return {key: _plain(value[key]) for key in value.dtype.names or ()}
    return value.item() if isinstance(value, np.generic) else value


if __name__ == "__main__":
    _main()
