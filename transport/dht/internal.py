"""Answers to dht-rpc's own commands (spec: hyperdht 2.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..encoding import decode_address
from ..transmit import Address
from .addresses import node_id
from .bookkeeping import Bookkeeping
from .wire import (
    DELAYED_PING,
    DOWN_HINT,
    ERROR_UNKNOWN_COMMAND,
    FIND_NODE,
    PING,
    PING_NAT,
    Request,
)

if TYPE_CHECKING:
    from .node import Node

#: Milliseconds; a DELAYED_PING that asks for more is not answered.
MAX_PING_DELAY = 10_000
#: Answers held back at once. Beyond it DELAYED_PINGs go unanswered and others are answered at once.
MAX_DELAYED = 512


class InternalCommands:
    """What every node answers, whatever the application does."""

    __slots__ = ("_delayed", "_keeper", "_node", "started")

    def __init__(self, node: Node, keeper: Bookkeeping) -> None:
        self._node = node
        self._keeper = keeper
        self._delayed = 0
        #: When the node was started, in seconds.
        self.started = 0.0

    def on_request(self, request: Request, now: float) -> None:
        """Answer, or ignore what is incomplete."""
        value = request.value or b""
        if request.command == PING:
            if request.id is not None or not self._recently_restarted(now):
                self._acknowledge(request, now)
        elif request.command == PING_NAT:
            port = int.from_bytes(value[:2], "little") if len(value) >= 2 else 0
            if port:
                self._acknowledge(request, now, (request.source[0], port))
        elif request.command == FIND_NODE:
            if request.target is not None:
                self._find_node(request, now)
        elif request.command == DOWN_HINT:
            if len(value) >= 6:
                self._keeper.hinted(node_id(decode_address(value)), now)
                self._acknowledge(request, now)
        elif request.command == DELAYED_PING:
            if len(value) >= 4:
                self._delayed_ping(request, int.from_bytes(value[:4], "little"), now)
        else:
            self._node.reply(request, now, error=ERROR_UNKNOWN_COMMAND, token=False)

    def _acknowledge(self, request: Request, now: float, to: Address | None = None) -> None:
        self._node.reply(request, now, token=False, closer_nodes=False, to=to)

    def _find_node(self, request: Request, now: float) -> None:
        delay = self._node.config.find_node_delay
        if request.id is not None or delay <= 0 or self._delayed >= MAX_DELAYED:
            self._node.reply(request, now, token=False)
            return

        def answer(now: float) -> None:
            self._delayed -= 1
            self._node.reply(request, now, token=False)

        self._delayed += 1
        self._node.timers.at(now + delay, answer)

    def _delayed_ping(self, request: Request, milliseconds: int, now: float) -> None:
        if milliseconds > MAX_PING_DELAY:
            return
        if self._delayed >= MAX_DELAYED:
            self._node.stats.dropped += 1
            return

        def answer(now: float) -> None:
            self._delayed -= 1
            self._acknowledge(request, now)

        self._delayed += 1
        self._node.timers.at(now + milliseconds / 1000, answer)

    def _recently_restarted(self, now: float) -> bool:
        config = self._node.config
        return config.public_address is not None and now < self.started + config.ignore_idless_pings
