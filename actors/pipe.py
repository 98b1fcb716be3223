"""A pipe: one TCP connection on one side, one encrypted channel on the other.

Bytes go from one protocol straight into the other transport; the actor only watches their life.

    TCP                      channel
    data        ->           data
    FIN         ->           end of our direction          (and the same the other way round)
    RST, error  ->           destroy
    cannot take more  ->     not read, so its window closes

The pipe ends when both sides are closed. If it is killed, both are reset. How a proxy's pipe gets
to its channel is in `attempts`.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from msgspec import Struct
from thespian.actors import ActorAddress

from ..transport.channel import Channel
from ..transport.errors import HyperseaportError
from .actor import ExitReason, handles
from .attempts import ProxyPipe, Seeker, SideClosed
from .early import Early
from .messages import Describe, Described
from .splice import Splice

#: Seconds that a pipe may still run when it is asked to stop, and how long nothing must have moved
#: for it to count as quiet and be closed in order.
DRAIN = 3.0
QUIET = 0.2
#: Seconds that connecting to the TCP service may take.
CONNECT_TIMEOUT = 10.0


class ServicePipe(Struct, frozen=True):
    """A channel that a client opened, for the TCP service at ``host``:``port``."""

    channel: Channel
    host: str
    port: int


class Pipe(Seeker):
    """Args: a `ServicePipe` or a `ProxyPipe`."""

    def on_start(self, args: ServicePipe | ProxyPipe) -> None:
        self._began = self.now
        self._tcp: asyncio.Transport | None = None
        self._channel: Channel | None = None
        self._open_sides = 0
        self._draining = False
        self._target = ""
        self._early: Early | None = None
        if isinstance(args, ServicePipe):
            self._channel = args.channel
            self._target = f"{args.host}:{args.port}"
            self.own(args.channel.abort)
            self.run(self._serve(args))
        else:
            self.reach(args)

    # A service's pipe

    async def _serve(self, args: ServicePipe) -> None:
        loop = asyncio.get_running_loop()
        splice = Splice(args.channel, self.side_closed)
        self._open_sides = 2
        self.own(splice.abort)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await loop.create_connection(lambda: splice.tcp, args.host, args.port)
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
        self._tcp = splice.transport

    # Both kinds

    @handles(SideClosed)
    def _on_side_closed(self, message: SideClosed, _sender: ActorAddress) -> None:
        self._open_sides -= 1
        if message.error is not None:
            self._log_reset(message.error)
        if self._open_sides == 0:
            self.stop()

    def _log_reset(self, error: Exception) -> None:
        reason = str(error) or repr(error)
        by_channel = isinstance(error, HyperseaportError)
        if self._early is None or not by_channel:
            self.log.debug("pipe reset", by="channel" if by_channel else "tcp", reason=reason)
            return
        # The client sees a reset: by what it has sent or got, it could not be moved.
        self.log.info(
            "connection lost",
            key=cast(bytes, self._key).hex(),
            reason=reason,
            answered=self._answered,
        )
        if not self._answered:
            self._failed(cast(bytes, self._key), reason)

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        channel = self._channel
        fields: dict[str, Any] = {
            "kind": "service" if self._early is None else "proxy",
            "state": self._state(),
            "age": round(self.now - self._began, 3),
            "bytes_read": 0 if channel is None else channel.bytes_read,
            "bytes_written": 0 if channel is None else channel.bytes_written,
        }
        if self._early is None:
            fields["target"] = self._target
        else:
            fields["attempts"] = self._attempts.made
        if channel is not None:
            ours, theirs = channel.public_key.hex(), channel.remote_public_key.hex()
            fields["peer_key"] = theirs
            fields["service_key"] = ours if self._early is None else theirs
            fields["path"] = "relayed" if channel.relayed else "direct"
        self.send(sender, Described(fields))

    def _state(self) -> str:
        if self._draining:
            return "draining"
        if self._early is None:
            return "connecting" if self._tcp is None else "open"
        if self._key is None:
            return "connecting"
        return "open" if self._answered else "unanswered"

    def on_stop(self, reason: ExitReason) -> None:
        self._draining = True
        self.run(self._drain(reason))

    async def _drain(self, reason: ExitReason) -> None:
        """Let the bytes under way arrive. A pipe that has gone quiet is closed in order; one that
        is still busy after `DRAIN` seconds is reset, so that nobody takes a part for the whole."""
        if self._early is not None:
            self._early.settle()
            self._tcp = self._early.transport
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
