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
from dataclasses import dataclass
from functools import partial
from typing import cast

from thespian.actors import ActorAddress

from ..transport.channel import Channel
from ..transport.keys import KeyPair
from .actor import Actor, ExitReason, handles
from .messages import Connect, Connected, Resolve, Resolved, ServiceFailed, ServiceRecord
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
        else:
            self.own(partial(reset, args.socket))
            self.run(self._proxy(args))

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

    async def _proxy(self, args: ProxyPipe) -> None:
        loop = asyncio.get_running_loop()
        channel = await self._reach(args)
        if channel is None:
            reset(args.socket)
            self.stop()
            return
        self._channel = channel
        self.own(channel.abort)
        splice = Splice(self._side_closed)
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: splice.tcp, args.socket)
        except OSError:
            # The client is gone already.
            self.stop()
            return
        self._join(splice, transport, channel)

    async def _reach(self, args: ProxyPipe) -> Channel | None:
        """A channel to the first service that can be reached, the best match first."""
        answer = await self.call(args.resolver, Resolve())
        services = answer.services if isinstance(answer, Resolved) else ()
        for service in services:
            channel = await self._try(args, service)
            if channel is not None:
                return channel
        self.log.warning("no service reached", tried=len(services))
        return None

    async def _try(self, args: ProxyPipe, service: ServiceRecord) -> Channel | None:
        answer = await self.call(args.endpoint, Connect(service.public_key, args.key_pair))
        if isinstance(answer, Connected):
            return answer.channel
        self.log.info("service unreachable", key=service.public_key.hex(), reason=str(answer.error))
        self.send(args.resolver, ServiceFailed(service.public_key))
        return None

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
