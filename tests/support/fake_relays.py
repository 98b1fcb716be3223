"""Relays that are asked for pairs: tests see what for, and say what comes of it."""

from __future__ import annotations

from typing import Any

from hyperseaport.transport.dht.context import Context
from hyperseaport.transport.dht.relay_client import Relays
from hyperseaport.transport.transmit import CLIENT_SOCKET, Address

#: Where the relay is, and its number for our stream.
RELAY: Address = ("4.0.0.1", 4000)
RELAY_ID = 4444


class FakePair:
    def __init__(self, key: bytes, token: bytes, options: dict[str, Any]) -> None:
        self.key = key
        self.token = token
        self.options = options
        self.on_lost = options["on_lost"]
        self.paired = self.released = False

    @property
    def initiator(self) -> bool:
        return bool(self.options["initiator"])

    def carries(self, socket: int, source: Address) -> bool:
        return (socket, source) == (CLIENT_SOCKET, RELAY)

    def release(self, _now: float) -> None:
        self.released = True

    def come_about(self, now: float) -> None:
        assert not self.released
        self.paired = True
        self.options["on_paired"](CLIENT_SOCKET, RELAY, RELAY_ID, now)

    def lose(self, now: float) -> None:
        assert not self.released
        self.on_lost("does not come to the relay", now)


class FakeRelays(Relays):
    __slots__ = ("asked", "holding", "refusing")

    def __init__(self, context: Context) -> None:
        super().__init__(context.node.timers, context.rng)
        context.blind = self
        self.asked: list[FakePair] = []
        self.holding: list[bytes] = []
        self.refusing = False

    def pair(self, key: bytes, token: bytes, now: float, **options: Any) -> Any:
        if self.refusing:
            return None
        self.asked.append(FakePair(key, token, options))
        return self.asked[-1]

    def hold(self, key: bytes, now: float) -> None:
        self.holding.append(key)

    def let_go(self, key: bytes) -> None:
        self.holding.remove(key)
