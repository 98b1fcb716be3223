"""Ports of 127.0.0.1 for programs that must be told theirs."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

#: Test processes that share the ports, each of which has some for itself: one that was found free
#: in one of them must stay so in the others.
_PROCESSES = 16
_PORTS = 12_000 // _PROCESSES
_process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PROCESSES
#: Below the range that the kernel takes the ports of outgoing connections from, so that no client
#: can take a port between this look and the program's bind. Runs one after another start apart:
#: what an earlier one has left behind may still be known.
_candidates = itertools.cycle(
    [20_000 + _process * _PORTS + (os.getpid() * 389 + offset) % _PORTS for offset in range(_PORTS)]
)


@contextmanager
def refusing_port() -> Iterator[int]:
    """A TCP port that refuses every connection: it is taken, and nobody listens on it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def free_port() -> int:
    """A TCP and UDP port nobody listens on; 750 calls later the same one may come again."""
    for port in _candidates:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        ):
            try:
                tcp.bind(("127.0.0.1", port))
                udp.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("unreachable: the candidates never end")
