"""A node that sends nothing: tests see what it is asked for and say what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from hyperseaport.transport.dht.addresses import node_id
from hyperseaport.transport.dht.context import Context
from hyperseaport.transport.dht.router import Router
from hyperseaport.transport.dht.store import Forwards
from hyperseaport.transport.dht.timers import Timers
from hyperseaport.transport.dht.wire import PING, Reply
from hyperseaport.transport.transmit import CLIENT_SOCKET, Address
from hyperseaport.transport.udx.mux import Mux

#: Our address as everybody sees it.
MINE = ("7.0.0.1", 40000)


@dataclass(slots=True, eq=False)
class FakeRequest:
    to: Address
    command: int
    on_done: Callable[[Reply | None, float], None]
    options: dict[str, Any]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass(slots=True, eq=False)
class FakeQuery:
    target: bytes
    command: int
    options: dict[str, Any]
    closest: list[Reply] = field(default_factory=list)
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeNode:
    def __init__(self) -> None:
        self.timers = Timers()
        self.ready = True
        self.ephemeral = True
        self.silent = False
        self.current_socket = CLIENT_SOCKET
        self.server_port = 49737
        self.public: Address | None = None
        self.table: list[Any] = []
        self.bootstrap: tuple[Address, ...] = ()
        self.id = bytes(32)
        self.requests: list[FakeRequest] = []
        self.queries: list[FakeQuery] = []
        self.now = 0.0

    def remote_address(self) -> Address | None:
        return self.public

    def request(
        self,
        to: Address,
        command: int,
        now: float,
        *,
        on_done: Callable[[Reply | None, float], None],
        **options: Any,
    ) -> FakeRequest:
        request = FakeRequest(to, command, on_done, options)
        self.requests.append(request)
        return request

    def ping(
        self, to: Address, now: float, *, on_done: Callable[[Reply | None, float], None]
    ) -> FakeRequest:
        return self.request(to, PING, now, internal=True, on_done=on_done)

    def query(self, target: bytes, command: int, now: float, **options: Any) -> FakeQuery:
        query = FakeQuery(target, command, options)
        self.queries.append(query)
        return query

    # What the test does

    def asked(self, command: int) -> list[FakeRequest]:
        """The requests of a kind that wait for an answer."""
        return [r for r in self.requests if r.command == command and not r.cancelled]

    def answer(self, request: FakeRequest, reply: Reply | None) -> None:
        """None for a timeout."""
        assert not request.cancelled
        self.requests.remove(request)
        request.on_done(reply, self.now)

    def finish(self, query: FakeQuery, *closest: Reply) -> None:
        assert not query.cancelled
        query.closest = list(closest)
        query.options["on_done"](query, self.now)

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while (when := self.timers.deadline()) is not None and when <= end:
            self.now = max(self.now, when)
            self.timers.run(self.now)
        self.now = end


def reply(
    source: Address,
    value: bytes | None = None,
    *,
    error: int = 0,
    token: bytes | None = bytes([3]) * 32,
    socket: int = CLIENT_SOCKET,
) -> Reply:
    return Reply(node_id(source), source, MINE, token, [], error, value, socket, 0)


def context(node: FakeNode, seed: int = 1) -> Context:
    rng = Random(seed)
    forwards = Forwards()
    fake: Any = node
    return Context(fake, Mux(rng), rng, Router(fake, forwards), forwards, ("192.168.1.10",))
