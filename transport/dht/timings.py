"""Where the time of a connect went."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

#: Which way a connection goes: straight to the peer; so, from a socket and to an address that an
#: earlier connection left; to an address on our own network; through NATs that were punched; or
#: through a blind relay.
How = Literal["direct", "remembered", "local", "punched", "relayed"]


class Timings(Struct, frozen=True):
    """Seconds, one part after the other."""

    #: Until the node was asked that brought the peer's answer: finding it, and others that did not
    #: answer.
    lookup: float
    #: Until that answer was there, repetitions included.
    handshake: float
    #: Until a way to the peer was there.
    path: float
    how: How

    @property
    def total(self) -> float:
        """From the beginning until the connection was open."""
        return self.lookup + self.handshake + self.path
