"""Registries that do as a test says, and the client's side of registries, on a memory network.

`FakeRegistry` speaks the wire of ours, or that of the Node programs, without its actors: a test
sees each request, and can have it refused, answered late, falsely or not at all.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

from msgspec.structs import replace

from hyperseaport.actors.actor import Actor, ActorAddress, handles
from hyperseaport.actors.messages import Accepted, LinkDown, Listen, ServiceRecord
from hyperseaport.actors.registry import lease, matching, roles
from hyperseaport.actors.registry.directory import Directory, link_id
from hyperseaport.actors.registry.lease import Lease, Refused, Verifier
from hyperseaport.actors.registry.link import Link, LinkArgs
from hyperseaport.actors.registry.table import TableArgs
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import Backoff, ChildSpec, Supervisor, SupervisorSpec
from hyperseaport.testing.channels import MemoryChannel
from hyperseaport.transport.keys import KeyPair

from .endpoint import MemoryEndpoint, MemoryNetwork
from .registry import REGISTRY, Recorder, registry_spec

#: Unix time at which tests begin.
BEGIN = 1_800_000_000.0

Answer = Callable[[str, Any], Any]


class NoAnswer:
    """What an answering function returns for no answer at all."""


class FakeRegistry:
    """Keeps leases, entries and watches for as long as a test wants, over any number of sessions.

    Entries of a session go with it, leases stay until they are withdrawn or `forget` is called.
    """

    def __init__(self, key_pair: KeyPair = REGISTRY, *, modern: bool = True) -> None:
        self.key_pair = key_pair
        #: It knows hello, lease, watch, unwatch and ping; else what a Node program of 1.x knows.
        self.modern = modern
        self.clock = Clock()
        #: Time, method and params of each request.
        self.requests: list[tuple[float, str, Any]] = []
        #: Asked first: what it returns is the answer, unless it is None.
        self.script: Answer = lambda _method, _params: None
        #: Seconds until each answer.
        self.delay = 0.0
        #: Seconds granted of each lease; None for what is asked.
        self.granted: float | None = None
        self.leases: dict[bytes, Lease] = {}
        #: Items that are listed besides, whatever is asked for.
        self.extra: list[dict[str, Any]] = []
        self.sequences: dict[bytes, int] = {}
        self.sessions: list[_Session] = []

    def asked(self, *methods: str) -> list[Any]:
        """Params of all requests of these methods."""
        return [params for _, method, params in self.requests if method in methods]

    def times(self, method: str) -> list[float]:
        return [time for time, name, _ in self.requests if name == method]

    def forget(self) -> None:
        self.leases.clear()
        self.sequences.clear()

    def break_sessions(self) -> None:
        for session in tuple(self.sessions):
            session.channel.abort()

    def listed(self, wanted: Any) -> list[dict[str, Any]]:
        items = [item(each) for each in self.leases.values()]
        for session in self.sessions:
            items += session.entries.values()
        return [each for each in items if _matches(each, wanted)] + self.extra

    def changed(self) -> None:
        """Tell all watches."""
        for session in self.sessions:
            for number, wanted in session.watches.items():
                session.notify({"id": number, "services": self.listed(wanted)})
            for request, wanted in tuple(session.waiters.items()):
                found = self.listed(wanted)
                if found:
                    del session.waiters[request]
                    session.reply(request, _shape_a(found[0]))

    def notify(self, services: Any) -> None:
        """Tell all watches this."""
        for session in self.sessions:
            for number in session.watches:
                session.notify({"id": number, "services": services})

    def answer(self, session: _Session, request: Any) -> Any:
        method, params = request["method"], request.get("params")
        scripted = self.script(method, params)
        if scripted is not None:
            return scripted
        if method in ("hello", "ping", "lease", "watch", "unwatch") and not self.modern:
            return ValueError("Unknown method")
        match method:
            case "hello":
                now = int(self.clock() * 1000)
                return {"version": 1, "features": ["lease", "watch"], "time": now}
            case "ping":
                return {}
            case "lease":
                return self._lease(params)
            case "watch":
                session.watches[params["id"]] = params
                return {"services": self.listed(params)}
            case "unwatch":
                session.watches.pop(params["id"], None)
                return {}
            case "register":
                session.entries[params["servicePublicKey"]] = _details(
                    params["servicePublicKey"], params["meta"]
                )
                self.changed()
                return {"meta": params["meta"], "ok": True}
            case "unregister":
                if session.entries.pop(params["servicePublicKey"], None):
                    self.changed()
                return {}
            case "query":
                return self.listed(params)
            case "waitFor":
                found = self.listed(params)
                if found:
                    return _shape_a(found[0])
                session.waiters[request["id"]] = params
                asyncio.get_running_loop().call_later(15, session.give_up, request["id"])
                return NoAnswer
        return ValueError("Unknown method")

    def _lease(self, params: Any) -> Any:
        try:
            made = Verifier().verify(params["statement"], params["signature"])
            lease.check_time(made, self.clock())
        except Refused as refusal:
            return refusal
        last = self.sequences.get(made.key, 0)
        if made.sequence <= last:
            return ValueError(f"stale sequence, the last was {last}")
        self.sequences[made.key] = made.sequence
        before = self.leases.pop(made.key, None)
        if not made.withdrawal:
            self.leases[made.key] = made
        if made.withdrawal or before is None or before.meta != made.meta:
            self.changed()
        return {"ttl": 0 if made.withdrawal else self.granted or made.ttl}


class _Session(asyncio.Protocol):
    def __init__(self, registry: FakeRegistry, channel: MemoryChannel) -> None:
        self.registry = registry
        self.channel = channel
        self.entries: dict[str, dict[str, Any]] = {}
        self.watches: dict[int, Any] = {}
        self.waiters: dict[int, Any] = {}
        self._rest = b""
        registry.sessions.append(self)
        channel.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            now = asyncio.get_running_loop().time()
            self.registry.requests.append((now, request["method"], request.get("params")))
            answer = self.registry.answer(self, request)
            if answer is NoAnswer or not request["id"]:
                continue
            if self.registry.delay:
                loop = asyncio.get_running_loop()
                loop.call_later(self.registry.delay, self.reply, request["id"], answer)
            else:
                self.reply(request["id"], answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.registry.sessions.remove(self)
        if self.entries:
            self.registry.changed()

    def reply(self, number: Any, answer: Any) -> None:
        if isinstance(answer, Exception):
            self.send({"result": None, "error": str(answer), "id": number})
        else:
            self.send({"result": answer, "error": None, "id": number})

    def give_up(self, request: int) -> None:
        if self.waiters.pop(request, None) is not None:
            self.reply(request, ValueError("timeout waiting for service"))

    def notify(self, params: Any) -> None:
        self.send({"method": "services", "params": params, "id": 0})

    def send(self, message: Any) -> None:
        if not self.channel.is_closing():
            self.channel.write(json.dumps(message).encode() + b"\n")


class _Listener(Actor):
    def on_start(self, args: FakeRegistry) -> None:
        self._registry = args
        self.own(args.break_sessions)
        self.run(self._listen())

    async def _listen(self) -> None:
        listen = Listen(self._registry.key_pair, self.myAddress)
        await self.call(self.context["endpoint"], listen)
        self.ready()

    @handles(Accepted)
    def _accepted(self, message: Accepted, _sender: ActorAddress) -> None:
        _Session(self._registry, cast(MemoryChannel, message.channel))


@dataclass(slots=True)
class Clock:
    """Unix time, which goes with the loop's unless a test makes it jump."""

    ahead: float = 0.0

    def __call__(self) -> float:
        return BEGIN + self.ahead + asyncio.get_running_loop().time()


def signed(key_pair: KeyPair, role: Any, *, sequence: int = 1, **more: Any) -> Lease:
    """A lease that was made now."""
    given: Any = {"instance": "ab" * 16, "issued": int(Clock()() * 1000), "ttl": 30.0} | more
    return lease.sign(key_pair, roles.parse(role), sequence=sequence, **given)


def item(made: Lease) -> dict[str, Any]:
    """As a registry lists it."""
    details = _details(made.key.hex(), made.meta)
    proof = {"statement": made.text, "signature": made.signature.hex()}
    return details | {"verified": True} | proof


def verified(made: Lease) -> ServiceRecord:
    """As a client should see it; meta, instance, sequence and end do not count in comparisons."""
    role, version = made.meta["role"], made.meta["version"]
    return ServiceRecord(made.key, role, version, made.meta, verified=True)


def record(role: Any, key: bytes) -> ServiceRecord:
    """An entry that nobody has proven, as a client should see it."""
    meta = roles.parse(role)
    return ServiceRecord(key, meta["role"], meta["version"], meta)


def _details(key: str, meta: Any) -> dict[str, Any]:
    short = {"servicePublicKey": key, "role": meta["role"], "version": meta["version"]}
    return short | {"remotePublicKey": "cc" * 32, "meta": meta}


def _shape_a(details: dict[str, Any]) -> dict[str, Any]:
    meta = details["meta"]
    info = {"id": details["servicePublicKey"], "remotePublicKey": "cc" * 32, "meta": meta}
    return {"meta": meta, "info": info}


def _matches(details: dict[str, Any], wanted: Any) -> bool:
    meta = details["meta"]
    version = wanted.get("version")
    return meta["role"] == wanted["role"] and (
        version is None or matching.satisfies(meta["version"], version)
    )


@asynccontextmanager
async def serving(network: MemoryNetwork, registry: FakeRegistry) -> AsyncIterator[FakeRegistry]:
    """The registry can be reached; what it knows it keeps when it no longer can."""
    spec = SupervisorSpec(
        "rest_for_one",
        (
            ChildSpec("endpoint", MemoryEndpoint, network, wait_ready=10.0),
            ChildSpec("listener", _Listener, registry, wait_ready=10.0),
        ),
    )
    async with ActorRuntime() as runtime:
        await runtime.ready(runtime.spawn(Supervisor, spec, name="fake"))
        yield registry


@asynccontextmanager
async def our_registry(network: MemoryNetwork) -> AsyncIterator[ActorRuntime]:
    """The registry of this program, at the time of `Clock`; its supervisor is ``/registry``."""
    spec = registry_spec(network, [], clock=Clock())
    children = [
        replace(child, args=TableArgs(clock=Clock())) if child.id == "table" else child
        for child in spec.children
    ]
    async with ActorRuntime() as runtime:
        spec = replace(spec, children=tuple(children))
        await runtime.ready(runtime.spawn(Supervisor, spec, name="registry"))
        yield runtime


class Asker(Actor):
    """Sends what it is told to send to the link, again to each link that follows, and records what
    comes back."""

    def on_start(self, args: Any) -> None:
        self._messages, questions = args
        for question in questions:
            self.send(self.context["link"], question)

    @handles(object)
    def _record(self, message: Any, _sender: ActorAddress) -> None:
        if isinstance(message, tuple):
            self.send(self.context["link"], message[0])
        else:
            self._messages.append(message)


@dataclass(slots=True)
class ClientSide:
    runtime: ActorRuntime
    #: What the console was told.
    news: list[Any] = field(default_factory=list)
    #: What the asker got.
    got: list[Any] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)

    def say(self, message: Any) -> None:
        asker = self.runtime.find("/client/asker")
        assert asker is not None
        self.runtime.tell(asker, (message,))

    async def ask(self, message: Any, path: str = "/client/link") -> Any:
        actor = self.runtime.find(path)
        assert actor is not None
        return await self.runtime.call(actor, message, 30.0)

    def of(self, kind: type) -> list[Any]:
        return [each for each in self.got if isinstance(each, kind)]

    @property
    def downs(self) -> list[LinkDown]:
        return [each for each in self.news if isinstance(each, LinkDown)]


@asynccontextmanager
async def client_side(
    network: MemoryNetwork, *questions: Any, registries: Iterable[bytes] | None = None
) -> AsyncIterator[ClientSide]:
    """A link with its asker; with ``registries``, a directory in the link's place."""
    async with ActorRuntime() as runtime:
        side = ClientSide(runtime)
        keys = (REGISTRY.public_key,) if registries is None else tuple(registries)
        links = [
            LinkArgs(key, rng=Random(index + 1), clock=side.clock) for index, key in enumerate(keys)
        ]
        if registries is None:
            link = [ChildSpec("link", Link, links[0])]
        else:
            each = [ChildSpec(link_id(args.registry_key), Link, args) for args in links]
            backoff = Backoff(0.01, 0.1)
            spec = SupervisorSpec("one_for_one", tuple(each), intensity=1000, backoff=backoff)
            link = [
                ChildSpec("links", Supervisor, spec, wait_ready=10.0),
                ChildSpec("link", Directory, keys),
            ]
        spec = SupervisorSpec(
            "rest_for_one",
            (
                ChildSpec("console", Recorder, side.news),
                ChildSpec("endpoint", MemoryEndpoint, network, wait_ready=10.0),
                *link,
                ChildSpec("asker", Asker, (side.got, questions)),
            ),
            intensity=1000,
            backoff=Backoff(0.01, 0.1),
        )
        await runtime.ready(runtime.spawn(Supervisor, spec, name="client"))
        yield side


async def soon(condition: Callable[[], Any], within: float = 60.0) -> None:
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110 - the conditions have no event in common
            await asyncio.sleep(0.05)
