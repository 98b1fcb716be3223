"""The Python API: the trees of the commands as async context managers, and `connect`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from ..supervisor import ChildSpec, Supervisor, SupervisorSpec
from ..transport.channel import Channel
from ..transport.dht.endpoint import PUBLIC_BOOTSTRAP, EndpointConfig
from ..transport.errors import Closed, ConnectError, PeerNotFound
from ..transport.keys import KeyPair, parse_key
from . import deployment
from .actor import ActorAddress, ActorGone, Crashed
from .health import HealthArgs
from .lister import Lister, ListerArgs
from .messages import (
    Connect,
    Connected,
    EndpointReady,
    Measure,
    Measured,
    ProxyListening,
    ProxyRouted,
    Registered,
    Resolve,
    ServiceRecord,
)
from .registry import roles
from .resolver import Resolver, ResolverArgs
from .system import ActorRuntime

#: A 32-byte key or seed, or its 64 hexadecimal digits.
Key = bytes | str


class Deployment:
    """A tree that runs while its context is entered. Leaving it stops the tree in order:
    unregister, unannounce, drain."""

    def __init__(self) -> None:
        #: Called with each piece of news, a message of `hyperseaport.actors.messages`.
        self.on_news: Callable[[object], None] | None = None
        self._runtime: ActorRuntime | None = None
        self._root: ActorAddress | None = None
        self._news: dict[type, Any] = {}
        self._waiters: dict[type, asyncio.Event] = {}

    def _tree(self) -> SupervisorSpec:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        if self._runtime is not None:
            raise RuntimeError("the deployment runs already: make another one")
        runtime = ActorRuntime()
        await runtime.__aenter__()
        self._runtime = runtime
        self._news.clear()
        try:
            self._root = runtime.spawn(Supervisor, self._tree(), name="root")
            await _ready(runtime, self._root)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        runtime, self._runtime = self._runtime, None
        root, self._root = self._root, None
        if runtime is None:
            return
        try:
            if root is not None:
                runtime.stop(root, deployment.SHUTDOWN)
                await runtime.stopped(root)
        finally:
            await runtime.__aexit__(None, None, None)

    @property
    def runtime(self) -> ActorRuntime:
        """The actor system, to look at its tree or to inject faults."""
        if self._runtime is None:
            raise RuntimeError("the deployment does not run: enter it with `async with`")
        return self._runtime

    async def metrics(self) -> Mapping[str, int]:
        """What its DHT node has counted since the start and holds now, by dotted names."""
        endpoint = self.runtime.find("/root/node/endpoint") or self.runtime.find(
            "/root/node/node-0"
        )
        if endpoint is None:
            raise Closed("the deployment has no node at the moment: ask again")
        measured: Measured = await self.runtime.call(endpoint, Measure())
        return measured.values

    def _show(self, news: object) -> None:
        self._news[type(news)] = news
        if type(news) in self._waiters:
            self._waiters.pop(type(news)).set()
        if self.on_news is not None:
            self.on_news(news)

    async def _first(self, kind: type) -> Any:
        """The news of this kind, waiting for the first. Raises `Closed` when the deployment ends
        before there is any, and what it died of if it did."""
        runtime, root = self.runtime, cast(ActorAddress, self._root)
        if kind not in self._news:
            loop = asyncio.get_running_loop()
            told = loop.create_task(self._waiters.setdefault(kind, asyncio.Event()).wait())
            ended = loop.create_task(runtime.stopped(root))
            try:
                await asyncio.wait((told, ended), return_when=asyncio.FIRST_COMPLETED)
            finally:
                told.cancel()
                ended.cancel()
            if kind not in self._news:
                reason = ended.result()
                if isinstance(reason, Crashed) and isinstance(reason.exception, Exception):
                    raise reason.exception
                raise Closed(f"the deployment has ended ({reason}): enter another one")
        return self._news[kind]


class DHT(Deployment):
    """DHT nodes: without ``bootstrap``, the seed of a private network on ``host``."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        nodes: int = deployment.SEED_NODES,
        bootstrap: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._addresses: list[str] = []
        self._build = (tuple(bootstrap), host, port, nodes)

    def _tree(self) -> SupervisorSpec:
        self._addresses.clear()
        bootstrap, host, port, nodes = self._build
        return deployment.dht_tree(bootstrap, host=host, port=port, nodes=nodes, show=self._show)

    def _show(self, news: object) -> None:
        if isinstance(news, EndpointReady):
            self._addresses.append(f"{news.address[0]}:{news.address[1]}")
        super()._show(news)

    @property
    def bootstrap(self) -> tuple[str, ...]:
        """``host:port`` of the first node: what others of this network are given."""
        return tuple(self._addresses[:1])


class Registry(Deployment):
    """A registry under the key of ``seed``, or under a new one. With a ``store``, a file that is
    made if there is none, its registrations survive it. ``allow_register`` and ``allow_query`` are
    the keys that may do so; everybody may without."""

    def __init__(
        self,
        *,
        seed: Key | None = None,
        store: Path | str | None = None,
        allow_register: Sequence[Key] | None = None,
        allow_query: Sequence[Key] | None = None,
        bootstrap: Sequence[str] = PUBLIC_BOOTSTRAP,
    ) -> None:
        super().__init__()
        self.key_pair = _key_pair(seed) or KeyPair.generate()
        self._spec = deployment.registry_tree(
            EndpointConfig(bootstrap=tuple(bootstrap)),
            self.key_pair,
            self._show,
            store=None if store is None else Path(store),
            allow_register=_clients(allow_register),
            allow_query=_clients(allow_query),
        )

    @property
    def public_key(self) -> bytes:
        """The 32 bytes that services and proxies need."""
        return self.key_pair.public_key

    def _tree(self) -> SupervisorSpec:
        return self._spec


class Service(Deployment):
    """The TCP service on ``host``:``port``, registered as ``role`` (``name@version``). Entered when
    the DHT knows its key; `registered` waits for the registry. ``relay_through`` are keys of blind
    relays at which connections may begin, ``allow_relays`` those of relays that only clients name;
    None stands for all. Raises `InvalidInput`."""

    def __init__(
        self,
        role: str,
        *,
        registry: Key | Sequence[Key],
        port: int,
        host: str = "127.0.0.1",
        seed: Key | None = None,
        allow: Sequence[Key] | None = None,
        relay_through: Sequence[Key] = (),
        allow_relays: Sequence[Key] | None = (),
        tags: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
        health: HealthArgs | None = None,
        bootstrap: Sequence[str] = PUBLIC_BOOTSTRAP,
    ) -> None:
        super().__init__()
        self.key_pair = _key_pair(seed) or KeyPair.generate()
        self._spec = deployment.service_tree(
            EndpointConfig(bootstrap=tuple(bootstrap)),
            _keys(registry),
            role,
            host=host,
            port=port,
            key_pair=self.key_pair,
            allow=_clients(allow),
            relay_through=_relays(relay_through),
            allow_relays=None if allow_relays is None else frozenset(_relays(allow_relays)),
            show=self._show,
            tags=tags,
            metadata=metadata,
            health=health,
        )

    def _tree(self) -> SupervisorSpec:
        return self._spec

    @property
    def public_key(self) -> bytes:
        """The 32 bytes under which the service is reached."""
        return self.key_pair.public_key

    async def registered(self) -> None:
        """Wait until the registry has the service."""
        await self._first(Registered)


class Proxy(Deployment):
    """A local TCP port for whatever matches ``role`` (``name@range``). Entered when it listens;
    `routed` waits for a service. ``relay_through`` are keys of blind relays at which connections
    may begin. Raises `InvalidInput`, and `LocalError` for a port in use."""

    def __init__(
        self,
        role: str,
        *,
        registry: Key | Sequence[Key],
        port: int = 0,
        host: str = "127.0.0.1",
        seed: Key | None = None,
        balance: str = "highest",
        connect_timeout: float = 10.0,
        wait: bool = True,
        verified_only: bool = False,
        relay_through: Sequence[Key] = (),
        bootstrap: Sequence[str] = PUBLIC_BOOTSTRAP,
    ) -> None:
        super().__init__()
        self._spec = deployment.proxy_tree(
            EndpointConfig(bootstrap=tuple(bootstrap)),
            _keys(registry),
            role,
            host=host,
            port=port,
            key_pair=_key_pair(seed),
            show=self._show,
            balance=balance,
            connect_timeout=connect_timeout,
            wait=wait,
            verified_only=verified_only,
            relay_through=_relays(relay_through),
        )

    def _tree(self) -> SupervisorSpec:
        return self._spec

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        return cast(ProxyListening, self._news[ProxyListening]).port

    async def routed(self) -> ServiceRecord:
        """Wait until a service matches; the one that new connections go to."""
        return cast(ProxyRouted, await self._first(ProxyRouted)).service


async def connect(
    role: str,
    *,
    registry: Key | Sequence[Key],
    seed: Key | None = None,
    relay_through: Sequence[Key] = (),
    bootstrap: Sequence[str] = PUBLIC_BOOTSTRAP,
    timeout: float | None = 30.0,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream to a service that matches ``role`` (``name@range``), waiting at most ``timeout``
    seconds for one (None: for ever); it may begin at one of the blind relays ``relay_through``. The
    node behind it lives as long as the connection; ``await writer.wait_closed()`` after
    ``writer.close()`` waits for both.

    Raises `InvalidInput`, `PeerNotFound` when nobody matches in time, and `ConnectError` when none
    of those who match can be reached.
    """
    meta = roles.to_find(role)
    resolver = ChildSpec("resolver", Resolver, ResolverArgs(meta))
    tree = deployment.client_tree(
        EndpointConfig(bootstrap=tuple(bootstrap)), _keys(registry), resolver
    )
    runtime = ActorRuntime()
    await runtime.__aenter__()
    try:
        async with asyncio.timeout(timeout):
            relays = _relays(relay_through)
            channel = await _reach(runtime, tree, _key_pair(seed), relays)
    except TimeoutError as error:
        await runtime.__aexit__(None, None, None)
        raise PeerNotFound(
            f"no service matches {role} within {timeout:g} s: is it running?"
        ) from error
    except BaseException:
        await runtime.__aexit__(None, None, None)
        raise
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = _StreamProtocol(reader, loop, lambda: runtime.__aexit__(None, None, None))
    channel.set_protocol(protocol)
    return reader, _Writer(channel, protocol, reader, loop)


async def services(
    role: str | None = None,
    *,
    registry: Key | Sequence[Key],
    watch: bool = False,
    bootstrap: Sequence[str] = PUBLIC_BOOTSTRAP,
) -> AsyncIterator[tuple[ServiceRecord, ...]]:
    """The services that match ``role`` (``name@range``), or all, as one list; with ``watch``, such
    a list again at each change.

    Raises `InvalidInput`, and `ConnectError` when no registry can tell.
    """
    lists: asyncio.Queue[tuple[ServiceRecord, ...]] = asyncio.Queue()
    args = ListerArgs(None if role is None else roles.to_find(role), lists.put_nowait, watch)
    tree = deployment.client_tree(
        EndpointConfig(bootstrap=tuple(bootstrap)),
        _keys(registry),
        ChildSpec("lister", Lister, args, restart="temporary"),
    )
    async with ActorRuntime() as runtime:
        root = runtime.spawn(Supervisor, tree, name="root")
        await _ready(runtime, root)
        lister = runtime.find("/root/node/lister")
        before: tuple[ServiceRecord, ...] | None = None
        while True:
            if lister is None:
                raise ConnectError("the node stopped while it started: try again")
            records = await _next(runtime, lister, lists)
            if records != before:
                yield records
            before = records
            if not watch:
                return


async def _next(
    runtime: ActorRuntime,
    lister: ActorAddress,
    lists: asyncio.Queue[tuple[ServiceRecord, ...]],
) -> tuple[ServiceRecord, ...]:
    """The next list. Raises what the lister died of."""
    told = asyncio.ensure_future(lists.get())
    ended = asyncio.ensure_future(runtime.stopped(lister))
    try:
        await asyncio.wait((told, ended), return_when=asyncio.FIRST_COMPLETED)
        if told.done():
            return told.result()
        reason = ended.result()
        if isinstance(reason, Crashed) and isinstance(reason.exception, Exception):
            raise reason.exception
        raise ConnectError(f"the node stopped ({reason}): try again")
    finally:
        told.cancel()
        ended.cancel()


async def _reach(
    runtime: ActorRuntime,
    tree: SupervisorSpec,
    pair: KeyPair | None,
    relay_through: tuple[bytes, ...],
) -> Channel:
    root = runtime.spawn(Supervisor, tree, name="root")
    await _ready(runtime, root)
    resolver = runtime.find("/root/node/resolver")
    endpoint = runtime.find("/root/node/endpoint")
    if resolver is None or endpoint is None:
        raise ConnectError("the node stopped while it started: try again")
    services: tuple[ServiceRecord, ...] = ()
    while not services:
        services = (await runtime.call(resolver, Resolve())).services
    error: Exception | None = None
    for service in services:
        answer = await runtime.call(endpoint, Connect(service.public_key, pair, relay_through))
        if isinstance(answer, Connected):
            return answer.channel
        error = answer.error
    raise ConnectError(f"no service that matches can be reached ({error})") from error


class _StreamProtocol(asyncio.StreamReaderProtocol):
    """Stops the node when the connection is gone."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        loop: asyncio.AbstractEventLoop,
        stop: Callable[[], Any],
    ) -> None:
        super().__init__(reader, loop=loop)
        self._node_loop = loop
        self._stop = stop
        self.stopped: asyncio.Task[None] | None = None

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.stopped = self._node_loop.create_task(self._stop())


class _Writer(asyncio.StreamWriter):
    async def wait_closed(self) -> None:
        protocol = cast(_StreamProtocol, self.transport.get_protocol())
        try:
            await super().wait_closed()
        finally:
            if protocol.stopped is not None:
                await asyncio.shield(protocol.stopped)


async def _ready(runtime: ActorRuntime, root: ActorAddress) -> None:
    """Until the tree serves. Raises what kept it from that."""
    try:
        await runtime.ready(root)
    except ActorGone as gone:
        if isinstance(gone.reason, Crashed) and isinstance(gone.reason.exception, Exception):
            raise gone.reason.exception from gone
        raise ConnectError(f"the tree did not start: {gone.reason}") from gone


def _bytes(key: Key, what: str) -> bytes:
    return parse_key(key if isinstance(key, str) else key.hex(), what)


def _keys(registry: Key | Sequence[Key]) -> tuple[bytes, ...]:
    """The keys of one registry or of several."""
    several = (registry,) if isinstance(registry, bytes | str) else registry
    return tuple(_bytes(key, "registry key") for key in several)


def _clients(keys: Sequence[Key] | None) -> frozenset[bytes] | None:
    return None if keys is None else frozenset(_bytes(key, "client key") for key in keys)


def _relays(keys: Sequence[Key]) -> tuple[bytes, ...]:
    return tuple(_bytes(key, "relay key") for key in keys)


def _key_pair(seed: Key | None) -> KeyPair | None:
    return None if seed is None else KeyPair.from_seed(_bytes(seed, "seed"))
