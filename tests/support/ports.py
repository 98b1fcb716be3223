"""Ports of 127.0.0.1 for programs that must be told theirs."""

from __future__ import annotations

import itertools
import os
import socket

#: Below the range that the kernel takes the ports of outgoing connections from, so that no client
#: can take a port between this look and the program's bind. Parallel runs start apart.
_candidates = itertools.cycle(
    [20_000 + (os.getpid() * 3989 + offset) % 12_000 for offset in range(12_000)]
)


def free_port() -> int:
    """A TCP and UDP port nobody listens on; 12,000 calls later the same one may come again."""
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
