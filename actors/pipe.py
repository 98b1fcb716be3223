"""A pipe: one TCP connection on one side, one encrypted channel on the other.

Bytes go from one protocol straight into the other transport; the actor only watches their life.

    TCP                      channel
    data        ->           data
    FIN         ->           end of our direction          (and the same the other way round)
    RST, error  ->           destroy
    cannot take more  ->     not read, so its window closes

The pipe ends when both sides are closed. If it is killed, both are reset.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import cast

from thespian.actors import ActorAddress

from ..transport.channel import Channel
from ..transport.keys import KeyPair
from .actor import Actor, ActorGone, Down, ExitReason, handles
from .messages import (
    Connect,
    Connected,
    ConnectFailed,
    Resolve,
    Resolved,
    ServiceFailed,
    ServiceRecord,
)
from .splice import Splice, reset

#: Seconds that a pipe may still run when it is asked to stop, and how long nothing must have moved
#: for it to count as quiet and be closed in order.
DRAIN = 3.0
QUIET = 0.2
#: Seconds that connecting to the TCP service may take.
CONNECT_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class ServicePipe:
    """A channel that a client opened, for the TCP service at ``host``:``port``."""

    channel: Channel
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class ProxyPipe:
    """A TCP connection that a local client opened, for a service that ``resolver`` knows."""

    socket: socket.socket
    resolver: ActorAddress
    endpoint: ActorAddress
    key_pair: KeyPair


@dataclass(frozen=True, slots=True)
class _SideClosed:
    error: Exception | None


class Pipe(Actor):
    """Args: a `ServicePipe` or a `ProxyPipe`."""

    def on_start(self, args: ServicePipe | ProxyPipe) -> None:
        self._tcp: asyncio.Transport | None = None
        self._channel: Channel | None = None
        self._open_sides = 0
        if isinstance(args, ServicePipe):
            self._channel = args.channel
            self.own(args.channel.abort)
            self.run(self._serve(args))
            return
        self._proxied: ProxyPipe | None = args
        # The services to try, the best match first.
        self._services: deque[ServiceRecord] = deque()
        self._tried = 0
        self.own(partial(reset, args.socket))
        self._ask(args.resolver, Resolve())

    async def _serve(self, args: ServicePipe) -> None:
        loop = asyncio.get_running_loop()
        splice = Splice(self._side_closed)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                transport, _ = await loop.create_connection(
                    lambda: splice.tcp, args.host, args.port
                )
        except (OSError, TimeoutError) as error:
            self.log.warning(
                "service refused",
                host=args.host,
                port=args.port,
                reason=str(error) or "timed out",
                client=args.channel.remote_public_key.hex(),
            )
            self.stop()
            return
        self._join(splice, transport, args.channel)

    # A proxy's way to a service: messages only, so that it is gone in as few turns as can be.

    def _ask(self, actor: ActorAddress, question: Resolve | Connect) -> None:
        """The answer comes as a message, or `Down` if the actor dies."""
        self.monitor(actor)
        self.send(actor, question)

    @handles(Down)
    def _nobody_answers(self, message: Down, _sender: ActorAddress) -> None:
        raise ActorGone(message.address, message.reason)

    @handles(Resolved)
    def _resolved(self, message: Resolved, sender: ActorAddress) -> None:
        self.demonitor(sender)
        self._services.extend(message.services)
        self._try_next()

    def _try_next(self) -> None:
        proxied = cast(ProxyPipe, self._proxied)
        if not self._services:
            self.log.warning("no service reached", tried=self._tried)
            reset(proxied.socket)
            self.stop()
            return
        self._ask(proxied.endpoint, Connect(self._services[0].public_key, proxied.key_pair))

    @handles(ConnectFailed)
    def _connect_failed(self, message: ConnectFailed, sender: ActorAddress) -> None:
        self.demonitor(sender)
        key = self._services.popleft().public_key
        self._tried += 1
        self.log.info("service unreachable", key=key.hex(), reason=str(message.error))
        self.send(cast(ProxyPipe, self._proxied).resolver, ServiceFailed(key))
        self._try_next()

    @handles(Connected)
    def _connected(self, message: Connected, sender: ActorAddress) -> None:
        self.demonitor(sender)
        proxied = cast(ProxyPipe, self._proxied)
        self._proxied = None
        self._services.clear()
        self._channel = message.channel
        self.own(message.channel.abort)
        self.run(self._proxy(proxied.socket, message.channel))

    async def _proxy(self, client: socket.socket, channel: Channel) -> None:
        loop = asyncio.get_running_loop()
        splice = Splice(self._side_closed)
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: splice.tcp, client)
        except OSError:
            # The client is gone already.
            self.stop()
            return
        self._join(splice, transport, channel)

    # Both sides

    def _join(self, splice: Splice, transport: asyncio.BaseTransport, channel: Channel) -> None:
        self._tcp = cast(asyncio.Transport, transport)
        self._open_sides = 2
        splice.join(channel)
        self.own(splice.abort)

    def _side_closed(self, error: Exception | None) -> None:
        self.send(self.myAddress, _SideClosed(error))

    @handles(_SideClosed)
    def _on_side_closed(self, message: _SideClosed, _sender: ActorAddress) -> None:
        self._open_sides -= 1
        if message.error is not None:
            self.log.debug("pipe reset", reason=str(message.error) or repr(message.error))
        if self._open_sides == 0:
            self.stop()

    def on_stop(self, reason: ExitReason) -> None:
        self.run(self._drain(reason))

    async def _drain(self, reason: ExitReason) -> None:
        """Let the bytes under way arrive. A pipe that has gone quiet is closed in order; one that
        is still busy after `DRAIN` seconds is reset, so that nobody takes a part for the whole."""
        tcp, channel = self._tcp, self._channel
        if tcp is None or channel is None:
            self.stop(reason)
            return
        loop = asyncio.get_running_loop()
        end = loop.time() + DRAIN
        moved = -1
        while self._open_sides and loop.time() < end:
            before, moved = moved, channel.bytes_moved
            pending = tcp.get_write_buffer_size() + channel.get_write_buffer_size()
            if moved == before and not pending and not channel.stream.unacked:
                tcp.close()
                channel.close()
            await asyncio.sleep(QUIET)
        self.stop(reason)
