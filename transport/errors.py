"""The errors of this package: whose fault, and what state it leaves.

Whose fault decides the branch: `LocalError` (you used it wrongly) or `RemoteError` (the peer or the
network did something). What state it leaves decides the class: after `Closed` and `Broken` the
object is finished, after the others it can still be used.
"""

from __future__ import annotations


class HyperseaportError(Exception):
    """Base of every error here. Its text is one line that says what to do."""


class LocalError(HyperseaportError):
    """The caller's fault."""


class InvalidInput(LocalError, ValueError):
    """A value that can never work: a bad key, seed, role, version, range or port."""


class RemoteError(HyperseaportError):
    """The peer's or the network's fault."""


class ProtocolError(RemoteError):
    """The peer sent what the protocol does not allow. The stream it came on is finished."""


class DecodeError(ProtocolError, ValueError):
    """Bytes that do not decode."""


class HandshakeError(ProtocolError):
    """A Noise message that does not fit; the connection attempt goes on without it."""


class ConnectError(RemoteError, ConnectionError):
    """No connection came about. Nothing was opened."""


class PeerNotFound(ConnectError):
    """Nobody announces the key."""


class PeerUnreachable(ConnectError):
    """Somebody announces the key, but no handshake or no path to it succeeded."""


class Closed(LocalError):
    """You closed it."""


class Broken(RemoteError, ConnectionError):
    """The world broke it."""


class StreamReset(Broken, ConnectionResetError):
    """The peer destroyed the stream: what it had not delivered is lost."""


class StreamTimeout(Broken, TimeoutError):
    """The peer stopped answering."""


class PeerSilent(StreamTimeout):
    """Nothing was heard from the peer for ``seconds``, on any connection with it."""

    def __init__(self, seconds: float) -> None:
        text = f"the peer was silent for {seconds:.0f} s; check the network and connect again"
        super().__init__(text)
        self.seconds = seconds


class RpcError(RemoteError):
    """The peer answered a request with an error; the session goes on."""
