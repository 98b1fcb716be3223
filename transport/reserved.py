"""Free ports, kept for whoever is going to listen on them."""

from __future__ import annotations

import socket
import weakref

from .errors import LocalError


class ReservedPort:
    """A free port of this machine. Nobody else gets it until it is taken; after that its number is
    known, so that one who is restarted can listen where others know him."""

    __slots__ = ("__weakref__", "_release", "_socket", "number")

    def __init__(self, kind: socket.SocketKind, host: str) -> None:
        """``kind`` is SOCK_STREAM or SOCK_DGRAM. Raises `LocalError` when the address cannot be
        had."""
        try:
            family, _, protocol, _, address = socket.getaddrinfo(
                host, 0, type=kind, flags=socket.AI_PASSIVE
            )[0]
            bound = socket.socket(family, kind, protocol)
        except OSError as error:
            raise _not_had(host, error) from error
        try:
            if kind == socket.SOCK_STREAM:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            bound.close()
            raise _not_had(host, error) from error
        self._socket = bound
        self._release = weakref.finalize(self, bound.close)
        self.number: int = bound.getsockname()[1]

    def take(self) -> socket.socket | None:
        """The bound socket, which is the caller's from now on; None if somebody had it before."""
        return self._socket if self._release.detach() else None


def _not_had(host: str, error: OSError) -> LocalError:
    reason = error.strerror or str(error)
    return LocalError(f"cannot listen on {host} ({reason}): choose another --host")
