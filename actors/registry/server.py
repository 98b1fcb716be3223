"""The registry's side of connections: one listener, one session a connection."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec import Struct
from thespian.actors import ActorAddress

from ...supervisor import ChildRefused, ChildStarted, StartChild
from ...transport.channel import Channel
from ...transport.errors import InvalidInput
from ...transport.keys import KeyPair
from ...transport.rpc import RpcFailure, RpcRequest
from ..actor import NORMAL, Actor, Down, ExitReason, handles
from ..console import tell
from ..messages import (
    Accepted,
    Describe,
    Described,
    Listen,
    ListenFailed,
    RegistryListening,
    TableAnswer,
    TableRefusal,
    TableRequest,
)
from .lease import Refused
from .policy import Policy
from .table import Counted, TableNotice
from .wire import RpcProtocol, StreamEnded, StreamLost

#: Connections at a time. A session is an actor, a channel and a few KiB of buffers.
MAX_SESSIONS = 10_000
#: Bytes that a client has not taken when a notification is due, above which it is too slow: it
#: would get old lists for a long time yet.
MAX_UNWRITTEN = 256 * 1024

#: Methods that the table answers.
TABLE_METHODS = frozenset(
    {"register", "unregister", "query", "waitFor", "lease", "watch", "unwatch", "roles"}
)
#: What `hello` tells: the version of our extensions, and which there are.
HELLO_VERSION = 1
FEATURES = ("lease", "roles", "watch")

#: How a session exits whose client did not end it: the table keeps for a while what it brought.
BROKEN = ExitReason("the connection broke", normal=True)


class ServerArgs(Struct, frozen=True):
    """Who the registry is, and who may do what."""

    key_pair: KeyPair
    #: Answer to `getRegistryKey`: 32 bytes.
    log_key: bytes
    #: Client keys that may connect; None admits everybody.
    allow: frozenset[bytes] | None = None
    #: Keys that may register services and ask for them, as in `Policy`; None is for everybody.
    allow_register: frozenset[bytes] | None = None
    allow_query: frozenset[bytes] | None = None
    #: Unix seconds.
    clock: Callable[[], float] = time.time


@dataclass(frozen=True, slots=True)
class SessionArgs:
    channel: Channel
    log_key: bytes
    policy: Policy
    #: Unix seconds.
    clock: Callable[[], float]


class RegistryServer(Actor):
    """Listens under the registry's key. Args: `ServerArgs`. Context: ``endpoint``, ``sessions``,
    ``console`` if there is one. Ready when the DHT knows the key."""

    def on_start(self, args: ServerArgs) -> None:
        self._args = args
        self._policy = Policy(args.allow_register, args.allow_query)
        self._counters: Counter[str] = Counter()
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
        tell(
            self,
            RegistryListening(
                args.key_pair.public_key,
                anybody_registers=args.allow_register is None,
                anybody_queries=args.allow_query is None,
            ),
        )
        self.ready()

    @handles(Accepted)
    def _accepted(self, message: Accepted, _sender: ActorAddress) -> None:
        if len(self._sessions) + self._starting >= MAX_SESSIONS:
            self._counters["refused"] += 1
            self.log.warning("session.refused", sessions=len(self._sessions))
            message.channel.abort()
            return
        self._starting += 1
        args = self._args
        session = SessionArgs(message.channel, args.log_key, self._policy, args.clock)
        self.send(self.context["sessions"], StartChild(session))

    @handles(ChildStarted)
    def _session_started(self, message: ChildStarted, _sender: ActorAddress) -> None:
        self._starting -= 1
        self._counters["accepted"] += 1
        self._sessions.add(message.address)
        self.monitor(message.address)

    @handles(ChildRefused)
    def _session_refused(self, message: ChildRefused, _sender: ActorAddress) -> None:
        # Its channel has no protocol and is closed by the endpoint.
        self._starting -= 1
        self._counters["refused"] += 1
        self.log.warning("session.refused", reason=str(message.reason))

    @handles(Down)
    def _session_ended(self, message: Down, _sender: ActorAddress) -> None:
        self._sessions.discard(message.address)
        self._counters["ended" if message.reason.normal else "failed"] += 1

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        args = self._args
        allowed = {
            "connect": args.allow,
            "register": args.allow_register,
            "query": args.allow_query,
        }
        fields = {
            "public_key": args.key_pair.public_key.hex(),
            "sessions": len(self._sessions),
            # None where everybody may.
            "allowed": {what: keys and len(keys) for what, keys in allowed.items()},
            "counters": dict(sorted(self._counters.items())),
        }
        self.send(sender, Described(fields))


class Session(Actor):
    """One client's connection. Args: `SessionArgs`. Context: ``table``.

    What the client registered lives in the table, which goes by how this actor exits: normally as
    soon as the client has ended and has all its answers, else for another reason.
    """

    def on_start(self, args: SessionArgs) -> None:
        self._args = args
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
            try:
                self._args.policy.check(request.method, request.params, self._remote_key)
            except Refused as refusal:
                self.send(self.context["table"], Counted(f"refused.{refusal.kind}"))
                self._write(self._wire.peer.fail, request, str(refusal))
            else:
                self._ask_table(request)
                return
        else:
            self._answer(request)
        self._wire.settled()

    def _answer(self, request: RpcRequest) -> None:
        reply = self._wire.peer.reply
        match request.method:
            case "getRegistryKey":
                self._write(reply, request, self._args.log_key.hex())
            case "hello":
                now = int(self._args.clock() * 1000)
                hello = {"version": HELLO_VERSION, "features": [*FEATURES], "time": now}
                self._write(reply, request, hello)
            case "ping":
                self._write(reply, request, {})
            case _:
                self._write(self._wire.peer.fail, request, "Unknown method")

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

    @handles(TableNotice)
    def _notice(self, message: TableNotice, _sender: ActorAddress) -> None:
        unwritten = self._wire.unwritten
        if unwritten > MAX_UNWRITTEN:
            self.log.info("session.slow", unwritten=unwritten)
            self.send(self.context["table"], Counted("dropped.slow"))
            self._destroy()
            return
        params = {"id": message.watch, "services": message.services}
        self._wire.write(self._wire.peer.notify("services", params))

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
    def _client_lost(self, message: StreamLost, _sender: ActorAddress) -> None:
        self.stop(NORMAL if message.error is None else BROKEN)

    def _break(self, error: Exception) -> None:
        self.log.info("session.broken", error=str(error))
        self._destroy()

    def _destroy(self) -> None:
        self._channel.close()
        self.stop(BROKEN)

    def _stop_if_done(self) -> None:
        if self._ended and not self._asked:
            self.stop()
