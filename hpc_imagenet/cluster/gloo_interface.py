"""The network interface over which gloo, torch's backend for CPUs, connects the tasks of a job."""

from __future__ import annotations

import os
import socket

import psutil

from hpc_imagenet.cluster.dist_env import DistEnv


def set_gloo_interface(dist_env: DistEnv) -> None:
    """Set GLOO_SOCKET_IFNAME, if it can be found and is not set.

    By default gloo listens at the address of the host's own name. Other nodes may not reach it: Debian maps
    the name to 127.0.1.1.
    """
    interfaces = {interface for _, interface in socket.if_nameindex()}
    # NCCL_SOCKET_IFNAME may be a prefix, a list or an exclusion; gloo needs one full interface name.
    site = os.environ.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if dist_env.nodes == 1:
        name = "lo"
    elif site in interfaces:
        name = site
    else:  # the address of the first node's own name, from that node, may be loopback or unknown
        name = _interface_to(dist_env.peer) or _interface_to(dist_env.master)
    if name in interfaces:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _interface_to(host: str) -> str:
    """Return the interface on the way to a host; empty if its name is unknown, or has a loopback address."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return ""
    if own.startswith("127.") and not host.startswith("127."):
        return ""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if own in {each.address for each in found}), "")
