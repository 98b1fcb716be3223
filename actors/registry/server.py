"""The registry's side of connections: one listener, one session a connection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from thespian.actors import ActorAddress

from ...supervisor import ChildRefused, ChildStarted, StartChild
from ...transport.channel import Channel
from ...transport.errors import InvalidInput
from ...transport.keys import KeyPair
from ...transport.rpc import RpcFailure, RpcRequest
from ..actor import Actor, Down, ExitReason, handles
from ..messages import (
    Accepted,
    Listen,
    ListenFailed,
    RegistryListening,
    TableAnswer,
    TableRefusal,
    TableRequest,
)
from .wire import RpcProtocol, StreamEnded, StreamLost

#: Connections at a time. A session is an actor, a channel and a few KiB of buffers.
MAX_SESSIONS = 10_000

#: Methods that the table answers.
TABLE_METHODS = frozenset({"register", "unregister", "query", "waitFor"})


@dataclass(frozen=True, slots=True)
class ServerArgs:
    """Who the registry is, and who may connect."""

    key_pair: KeyPair
    #: Answer to `getRegistryKey`: 32 bytes.
    log_key: bytes
    #: Client keys that may connect; None admits everybody.
    allow: frozenset[bytes] | None = None


@dataclass(frozen=True, slots=True)
class SessionArgs:
    channel: Channel
    log_key: bytes


class RegistryServer(Actor):
    """Listens under the registry's key. Args: `ServerArgs`. Context: ``endpoint``, ``sessions``,
    ``console`` if there is one. Ready when the DHT knows the key."""

    def on_start(self, args: ServerArgs) -> None:
        self._args = args
        self._sessions: set[ActorAddress] = set()
        # Handed to the supervisor, which has not answered yet.
        self._starting = 0
        self.run(self._listen())

    async def _listen(self) -> None:
        args = self._args
        listen = Listen(args.key_pair, self.myAddress, args.allow)
        answer = await self.call(self.context["endpoint"], listen)
        if isinstance(answer, ListenFailed):
            raise answer.error
        self.log.info("registry.listening", public_key=args.key_pair.public_key.hex())
        if "console" in self.context:
            self.send(self.context["console"], RegistryListening(args.key_pair.public_key))
        self.ready()

    @handles(Accepted)
    def _accepted(self, message: Accepted, _sender: ActorAddress) -> None:
        if len(self._sessions) + self._starting >= MAX_SESSIONS:
            self.log.warning("session.refused", sessions=len(self._sessions))
            message.channel.abort()
            return
        self._starting += 1
        session = SessionArgs(message.channel, self._args.log_key)
        self.send(self.context["sessions"], StartChild(session))

    @handles(ChildStarted)
    def _session_started(self, message: ChildStarted, _sender: ActorAddress) -> None:
        self._starting -= 1
        self._sessions.add(message.address)
        self.monitor(message.address)

    @handles(ChildRefused)
    def _session_refused(self, message: ChildRefused, _sender: ActorAddress) -> None:
        # Its channel has no protocol and is closed by the endpoint.
        self._starting -= 1
        self.log.warning("session.refused", reason=str(message.reason))

    @handles(Down)
    def _session_ended(self, message: Down, _sender: ActorAddress) -> None:
        self._sessions.discard(message.address)


class Session(Actor):
    """One client's connection. Args: `SessionArgs`. Context: ``table``.

    What the client registered lives in the table and goes when this actor does, so it ends as soon
    as the client has ended and has all its answers.
    """

    def on_start(self, args: SessionArgs) -> None:
        self._log_key = args.log_key
        self._remote_key = args.channel.remote_public_key
        self._asked: dict[int, RpcRequest] = {}
        self._tickets = 0
        self._ended = False
        self._wire = RpcProtocol(args.channel, lambda event: self.send(self.myAddress, event))
        self._channel = self.own(self._wire.abort)
        self._wire.start()
        self.ready()

    def on_exit(self, reason: ExitReason) -> None:
        if reason.normal:
            self._channel.release()
            self._wire.close()

    @handles(RpcRequest)
    def _request(self, request: RpcRequest, _sender: ActorAddress) -> None:
        if request.method in TABLE_METHODS:
            self._ask_table(request)
            return
        if request.method == "getRegistryKey":
            self._write(self._wire.peer.reply, request, self._log_key.hex())
        else:
            self._write(self._wire.peer.fail, request, "Unknown method")
        self._wire.settled()

    def _ask_table(self, request: RpcRequest) -> None:
        self._tickets += 1
        self._asked[self._tickets] = request
        question = TableRequest(self._tickets, request.method, request.params, self._remote_key)
        self.send(self.context["table"], question)
        # The table limits how many wait; they must not hold up what the client asks meanwhile.
        if request.method == "waitFor":
            self._wire.settled()

    @handles(TableAnswer)
    def _answered(self, message: TableAnswer, _sender: ActorAddress) -> None:
        request = self._asked.pop(message.ticket)
        self._write(self._wire.peer.reply, request, message.result)
        self._settle(request)

    @handles(TableRefusal)
    def _refused(self, message: TableRefusal, _sender: ActorAddress) -> None:
        request = self._asked.pop(message.ticket)
        self._write(self._wire.peer.fail, request, message.text)
        self._settle(request)

    def _write(
        self, line: Callable[[RpcRequest, Any], bytes], request: RpcRequest, content: Any
    ) -> None:
        try:
            self._wire.write(line(request, content))
        except InvalidInput as error:
            # Only an id of nearly a whole line, which is echoed, makes a line too long.
            self._break(error)

    def _settle(self, request: RpcRequest) -> None:
        if request.method != "waitFor":
            self._wire.settled()
        self._stop_if_done()

    @handles(RpcFailure)
    def _failed(self, message: RpcFailure, _sender: ActorAddress) -> None:
        self._break(message.error)

    @handles(StreamEnded)
    def _client_ended(self, _message: StreamEnded, _sender: ActorAddress) -> None:
        self._ended = True
        self._stop_if_done()

    @handles(StreamLost)
    def _client_lost(self, _message: StreamLost, _sender: ActorAddress) -> None:
        self.stop()

    def _break(self, error: Exception) -> None:
        self.log.info("session.broken", error=str(error))
        self._channel.close()
        self.stop()

    def _stop_if_done(self) -> None:
        if self._ended and not self._asked:
            self.stop()
