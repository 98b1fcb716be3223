"""The listener of a proxy: accepts local TCP connections and turns each into a pipe."""

from __future__ import annotations

import asyncio
import socket
from typing import cast

from msgspec import Struct
from thespian.actors import ActorAddress

from ..supervisor import ChildRefused, ChildStarted, StartChild
from ..transport.errors import LocalError
from ..transport.keys import KeyPair
from ..transport.reserved import ReservedPort
from .actor import Actor, Address, ExitReason, handles
from .attempts import CONNECT_TIMEOUT, ProxyPipe
from .console import tell
from .messages import (
    Describe,
    Described,
    Follow,
    ProxyListening,
    ProxyRouted,
    ProxyUnrouted,
    Resolved,
)
from .splice import reset

#: Connections accepted in one wake-up.
MAX_ACCEPTS = 64
#: Connections that the kernel keeps for us.
BACKLOG = 1024
#: Seconds without accepting after the process ran out of descriptors.
PAUSE = 1.0


class ProxyArgs(Struct, frozen=True):
    """Where local clients connect, and who the proxy is towards services."""

    host: str
    port: int
    key_pair: KeyPair
    #: Nobody asked for this port: it was free, and has been kept.
    reserved: ReservedPort | None = None
    #: Seconds that a client may be without a service, all in all, before it is reset.
    connect_timeout: float = CONNECT_TIMEOUT
    #: Blind relays where connections may begin.
    relay_through: tuple[bytes, ...] = ()


class _Resume(Struct, frozen=True):
    pass


class ProxyListener(Actor):
    """Args: `ProxyArgs`. Context: ``endpoint``, ``pipes``, ``resolver``. Ready when it listens.
    Dies with a `LocalError` when the address cannot be had. What it has accepted goes on without
    it."""

    def on_start(self, args: ProxyArgs) -> None:
        self._args = args
        # Where new connections go, and whether people know that there is nowhere.
        self._routed: bytes | None = None
        self._unrouted = False
        self._accepted = self._refused = 0
        self._socket = _listening(args)
        self.own(self._close)
        self._port: int = self._socket.getsockname()[1]
        self._accepting(True)
        self.log.info("proxy listening", host=args.host, port=self._port)
        tell(self, ProxyListening(args.host, self._port, args.reserved is not None))
        self.send(self.context["resolver"], Follow())
        self.ready()

    @handles(Resolved)
    def _route(self, message: Resolved, _sender: ActorAddress) -> None:
        if message.services:
            self._routed, self._unrouted = message.services[0].public_key, False
            tell(self, ProxyRouted(self._port, message.services[0]))
        elif not self._unrouted:
            self._routed, self._unrouted = None, True
            tell(self, ProxyUnrouted(self._port))

    @handles(ChildStarted)
    def _pipe_started(self, _message: ChildStarted, _sender: ActorAddress) -> None:
        pass

    @handles(ChildRefused)
    def _pipe_refused(self, message: ChildRefused, _sender: ActorAddress) -> None:
        self._refused += 1
        self.log.warning("connection refused", reason=message.reason)
        if message.args is not None:
            reset(cast(ProxyPipe, message.args).socket)

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        routed = self._routed
        fields = {
            "address": self._args.host,
            "port": self._port,
            "accepted": self._accepted,
            "refused": self._refused,
            "routed_to": None if routed is None else routed.hex(),
            "connect_timeout": self._args.connect_timeout,
        }
        self.send(sender, Described(fields))

    @handles(_Resume)
    def _resume(self, _message: _Resume, _sender: ActorAddress) -> None:
        self._accepting(True)

    def _accepting(self, on: bool) -> None:
        loop = asyncio.get_running_loop()
        if on:
            loop.add_reader(self._socket.fileno(), self._acceptable)
        else:
            loop.remove_reader(self._socket.fileno())

    def _acceptable(self, most: int = MAX_ACCEPTS) -> None:
        context, args = self.context, self._args
        for _ in range(most):
            try:
                client, _address = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of descriptors or memory: the kernel would wake us at once, for ever.
                self.log.error("cannot accept", reason=str(error), pause=PAUSE)
                self._accepting(False)
                self.after(PAUSE, _Resume())
                return
            if not cast(Address, context["pipes"]).alive:
                # We are restarted soon; until then nobody would take it.
                reset(client)
                continue
            client.setblocking(False)
            self._accepted += 1
            pipe = ProxyPipe(
                client,
                context["resolver"],
                context["endpoint"],
                args.key_pair,
                args.connect_timeout,
                args.relay_through,
            )
            self.send(context["pipes"], StartChild(pipe))

    def on_stop(self, reason: ExitReason) -> None:
        """Clients that have connected are not reset with the socket: pipes are elder than we are,
        and find the resolver that follows ours."""
        self._acceptable(BACKLOG)
        self.stop(reason)

    def _close(self) -> None:
        if self._socket.fileno() >= 0:
            self._accepting(False)
            self._socket.close()


def _listening(args: ProxyArgs) -> socket.socket:
    kept = args.reserved.take() if args.reserved is not None else None
    result = _bound(args.host, args.port) if kept is None else kept
    result.setblocking(False)
    try:
        result.listen(BACKLOG)
    except OSError as error:
        result.close()
        raise _not_had(args.host, args.port, error) from error
    return result


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        result = socket.socket(family, kind, protocol)
    except OSError as error:
        raise LocalError(
            f"cannot listen on {host}:{port} ({error}): choose another --host"
        ) from error
    try:
        result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        result.bind(address)
    except OSError as error:
        result.close()
        raise _not_had(host, port, error) from error
    return result


def _not_had(host: str, port: int, error: OSError) -> LocalError:
    reason = error.strerror or str(error)
    return LocalError(
        f"cannot listen on {host}:{port} ({reason}): choose another port with -p, or -p 0"
    )
