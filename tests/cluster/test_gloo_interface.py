"""The network interface over which gloo connects the tasks of several nodes."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace, TracebackType

import psutil
import pytest

from hpc_imagenet.cluster.dist_env import DistEnv
from hpc_imagenet.cluster.gloo_interface import set_gloo_interface

# The address from which this node reaches a host.
OWN = {"n1": "127.0.0.1", "n2": "10.77.0.11", "10.77.0.11": "10.77.0.11"}
INTERFACES = {"lo": "127.0.0.1", "eth0": "192.168.0.5", "ib0": "10.77.0.11"}


class Probe:
    """A socket on the first node, n1, whose own name has a loopback address."""

    def __init__(self, *_: int) -> None:
        self._own = ""

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def connect(self, address: tuple[str, int]) -> None:
        if address[0] not in OWN:
            raise socket.gaierror
        self._own = OWN[address[0]]

    def getsockname(self) -> tuple[str, int]:
        return self._own, 40_000


@pytest.mark.parametrize(
    ("master", "peer", "expected"),
    [
        ("n1", "n2", "ib0"),
        ("n1", "unknown", None),
        ("10.77.0.11", "unknown", "ib0"),  # names are unknown, and Slurm has set the address of n1
    ],
)
def test_interface_is_the_one_to_another_node(
    monkeypatch: pytest.MonkeyPatch, master: str, peer: str, expected: str | None
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what is set below is removed again
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "socket", Probe)
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(INTERFACES, 1)))
    addresses = {name: [SimpleNamespace(address=own)] for name, own in INTERFACES.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    set_gloo_interface(DistEnv(size=2, master=master, peer=peer))
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected
