"""The trees that the commands and the Python API boot, and the loop that runs one in the
foreground.

    root  one_for_one
    |- console             shows news
    |- control             the control socket
    `- node  rest_for_one
       |- endpoint         the DHT node
       |- registry         table, sessions, server, replica       (registry)
       |- relay            books, sessions, listener              (relay)
       |- pipes            one a connection                       (service, proxy)
       |- links            the session with each registry         (service, proxy)
       |- link             the directory: all registries as one   (service, proxy)
       |- service:ROLE@VERSION  listener, health, announcement    (service)
       `- proxy:PORT       resolver, listener                     (proxy)

Pipes need nothing but the endpoint, and are elder than all that may fail without harming them.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import secrets
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from msgspec import structs

from ..supervisor import ChildSpec, Supervisor, SupervisorSpec
from ..transport.dht.endpoint import EndpointConfig
from ..transport.errors import HyperseaportError, InvalidInput
from ..transport.keys import KeyPair
from ..transport.reserved import ReservedPort
from .actor import Crashed, ExitReason
from .console import Console
from .control import Control, ControlArgs
from .endpoint import EndpointActor
from .health import Health, HealthArgs
from .pipe import DRAIN, Pipe
from .proxy import ProxyArgs, ProxyListener
from .registry import roles
from .registry.directory import Directory, link_id
from .registry.link import Link, LinkArgs
from .resolver import Resolver, ResolverArgs
from .service import Announcement, AnnouncementArgs, ListenerArgs, ServiceListener
from .system import ActorRuntime

if TYPE_CHECKING:
    from ..transport.dht.relay_server import RelayLimits

Show = Callable[[object], None]

#: DHT nodes that a private network begins with: with fewer than three, peers that see themselves as
#: firewalled cannot reach each other (spec: hyperdht 2.13).
SEED_NODES = 4
#: Seconds by which the nodes of a private network but the first answer newcomers late, so that the
#: newcomers have time to find out that they are reachable (spec: hyperdht 2.13).
NEWCOMER_DELAY = 0.02
#: Seconds in which an endpoint must have bootstrapped. Without any network it takes about 6.
ENDPOINT_READY = 30.0
#: Seconds in which a control socket must have been made.
CONTROL_READY = 5.0
#: Seconds in which a registry's table must have been read: the largest takes a few.
TABLE_READY = 60.0
#: Seconds in which a relay must have got from its endpoint what it needs.
BOOKS_READY = 5.0
#: Seconds in which a first announcement must have succeeded, an unreachable network included.
LISTEN_READY = 60.0
#: Seconds in which all of a node's children must have come up for the first time.
NODE_READY = 2 * (ENDPOINT_READY + LISTEN_READY)
#: Seconds that all children of a tree may take to end, the drain of its pipes included.
SHUTDOWN = 15.0
#: The same for the pipes of one service or proxy.
PIPES_SHUTDOWN = DRAIN + 2.0
#: Objects more than before at which the collector looks at the young, and how many such looks come
#: before one at the older ones.
GC_THRESHOLDS = (20_000, 20, 20)
#: Pipes of one service or proxy at a time; each is an actor, a socket and a channel. More clients
#: than this are refused.
MAX_PIPES = 65_536


def registry_tree(
    endpoint: EndpointConfig,
    key_pair: KeyPair,
    show: Show,
    *,
    store: Path | None = None,
    allow_register: frozenset[bytes] | None = None,
    allow_query: frozenset[bytes] | None = None,
    control: ControlArgs | None = None,
) -> SupervisorSpec:
    """A registry under the key pair, which keeps its registrations in ``store`` if that is given,
    and takes them from everybody who is not kept out by ``allow_register``; likewise with
    queries."""
    # Only a registry needs SQLite, which takes a while to load.
    from .registry import replica
    from .registry.server import RegistryServer, ServerArgs, Session
    from .registry.table import TableActor, TableArgs

    server = ServerArgs(
        key_pair,
        replica.log_key(key_pair),
        allow_register=allow_register,
        allow_query=allow_query,
    )
    registry = SupervisorSpec(
        "rest_for_one",
        (
            ChildSpec("table", TableActor, TableArgs(store), wait_ready=TABLE_READY),
            ChildSpec("sessions", Supervisor, _each(ChildSpec("session", Session))),
            ChildSpec("server", RegistryServer, server, wait_ready=LISTEN_READY),
            ChildSpec("replica", replica.Replica, key_pair),
        ),
    )
    return _root(show, control, _endpoint(endpoint), _group("registry", registry))


def relay_tree(
    endpoint: EndpointConfig,
    key_pair: KeyPair,
    show: Show,
    *,
    limits: RelayLimits,
    allow: frozenset[bytes] | None = None,
    control: ControlArgs | None = None,
) -> SupervisorSpec:
    """A blind relay under the key pair, for everybody who is not kept out by ``allow``."""
    from ..transport.dht.relay_server import MAX_SESSIONS
    from .relay import BooksArgs, ListenerArgs, RelayBooks, RelayListener, RelaySessionActor

    sessions = _each(ChildSpec("session", RelaySessionActor), MAX_SESSIONS)
    relay = SupervisorSpec(
        "rest_for_one",
        (
            ChildSpec("books", RelayBooks, BooksArgs(limits, allow), wait_ready=BOOKS_READY),
            ChildSpec("sessions", Supervisor, sessions),
            ChildSpec(
                "listener", RelayListener, ListenerArgs(key_pair, allow), wait_ready=LISTEN_READY
            ),
        ),
    )
    return _root(show, control, _endpoint(endpoint), _group("relay", relay))


def service_tree(
    endpoint: EndpointConfig,
    registry_keys: Sequence[bytes],
    role: str,
    *,
    host: str,
    port: int,
    key_pair: KeyPair | None,
    allow: frozenset[bytes] | None,
    show: Show,
    relay_through: tuple[bytes, ...] = (),
    allow_relays: frozenset[bytes] | None = frozenset(),
    tags: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    health: HealthArgs | None = None,
    control: ControlArgs | None = None,
) -> SupervisorSpec:
    """The TCP service at ``host``:``port``, registered with each registry as ``role``
    (``name@version``), and only while it is healthy if its health is watched. Raises `InvalidInput`
    for a role that cannot be registered. The key is what clients and relays know it by."""
    meta = roles.to_register(role, tags)
    if metadata:
        meta["metadata"] = dict(metadata)
    pair = key_pair or KeyPair.generate()
    listener = ListenerArgs(pair, host, port, allow, relay_through, allow_relays)
    announcement = AnnouncementArgs(pair, meta, secrets.token_hex(16))
    service = [ChildSpec("listener", ServiceListener, listener, wait_ready=LISTEN_READY)]
    if health is not None:
        service.append(ChildSpec("health", Health, health))
    service.append(ChildSpec("announcement", Announcement, announcement))
    return _root(
        show,
        control,
        _endpoint(structs.replace(endpoint, key_pair=pair)),
        _pipes(),
        *_links(registry_keys),
        _group(f"service:{role}", SupervisorSpec("rest_for_one", tuple(service))),
    )


def proxy_tree(
    endpoint: EndpointConfig,
    registry_keys: Sequence[bytes],
    role: str,
    *,
    host: str,
    port: int,
    key_pair: KeyPair | None,
    show: Show,
    balance: str = "highest",
    connect_timeout: float = 10.0,
    wait: bool = True,
    verified_only: bool = False,
    relay_through: tuple[bytes, ...] = (),
    control: ControlArgs | None = None,
) -> SupervisorSpec:
    """A local TCP port for whatever service matches ``role`` (``name@range``). Raises
    `InvalidInput` for a role that nothing can match."""
    meta = roles.to_find(role)
    # Known before the listener runs, so that one that is restarted comes back where its clients
    # know it.
    reserved = None if port else ReservedPort(socket.SOCK_STREAM, host)
    if reserved is not None:
        port = reserved.number
    pair = key_pair or KeyPair.generate()
    resolver = ResolverArgs(
        meta, balance, verified_only, pair.public_key, patience=connect_timeout, wait=wait
    )
    args = ProxyArgs(host, port, pair, reserved, connect_timeout, relay_through)
    proxy = SupervisorSpec(
        "rest_for_one",
        (
            ChildSpec("resolver", Resolver, resolver),
            ChildSpec("listener", ProxyListener, args, wait_ready=LISTEN_READY),
        ),
    )
    return _root(
        show,
        control,
        _endpoint(structs.replace(endpoint, key_pair=pair)),
        _pipes(),
        *_links(registry_keys),
        _group(f"proxy:{port}", proxy),
    )


def client_tree(
    endpoint: EndpointConfig, registry_keys: Sequence[bytes], child: ChildSpec
) -> SupervisorSpec:
    """What it takes to find services, and the one who looks for them."""
    return _root(None, None, _endpoint(endpoint), *_links(registry_keys), child)


def dht_tree(
    bootstrap: tuple[str, ...],
    *,
    host: str | None,
    port: int,
    nodes: int,
    show: Show,
    control: ControlArgs | None = None,
) -> SupervisorSpec:
    """DHT nodes on following ports. Without ``bootstrap`` the first is the seed of a private
    network, which the others join; nodes with a ``host`` say that this is their address."""
    if not bootstrap and host is None:
        host = "127.0.0.1"
    if host is not None:
        _check_address(host)
    base = EndpointConfig(bootstrap=bootstrap, permanent=host is not None)
    if host is not None:
        base = structs.replace(base, host=host)
    configs = _on_ports(base, port, nodes)
    if not bootstrap:
        first = (f"{host}:{configs[0].port}",)
        configs[1:] = [
            structs.replace(config, bootstrap=first, find_node_delay=NEWCOMER_DELAY)
            for config in configs[1:]
        ]
    return _root(
        show,
        control,
        *(_endpoint(config, f"node-{number}") for number, config in enumerate(configs)),
    )


def run(tree: SupervisorSpec) -> str | None:
    """Run a tree until it is told to stop (SIGINT or SIGTERM; a second one ends the process at
    once) or until it dies, and then return why, in one line."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_run(tree))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed, which takes a tenth less CPU; else asyncio's own."""
    if os.environ.get("HYPERSEAPORT_LOOP") == "asyncio":
        return None
    try:
        from uvloop import new_event_loop
    except ImportError:
        return None
    return cast(Callable[[], asyncio.AbstractEventLoop], new_event_loop)


async def _run(tree: SupervisorSpec) -> str | None:
    # What is loaded by now stays for good, and what a connection leaves behind is mostly freed
    # without the collector: looking it all over often cost 0.2 ms a connection.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    loop = asyncio.get_running_loop()
    async with ActorRuntime() as runtime:
        root = runtime.spawn(Supervisor, tree, name="root")

        def stop() -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, os._exit, 1)
            runtime.stop(root, SHUTDOWN + 5.0)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        reason = await runtime.stopped(root)
        return None if reason.normal else _one_line(reason)


def _one_line(reason: ExitReason) -> str:
    """An error of ours says by itself what to do; of others, the class is part of the news."""
    if isinstance(reason, Crashed) and isinstance(reason.exception, HyperseaportError):
        return str(reason.exception)
    return reason.text


def _root(show: Show | None, control: ControlArgs | None, *children: ChildSpec) -> SupervisorSpec:
    beside: list[ChildSpec] = []
    if show is not None:
        beside.append(ChildSpec("console", Console, show))
    if control is not None:
        beside.append(ChildSpec("control", Control, control, wait_ready=CONTROL_READY))
    node = SupervisorSpec("rest_for_one", children)
    main = ChildSpec("node", Supervisor, node, shutdown=SHUTDOWN, wait_ready=NODE_READY)
    return SupervisorSpec("one_for_one", (*beside, main))


def _links(registry_keys: Sequence[bytes]) -> tuple[ChildSpec, ChildSpec]:
    """The session with each registry, and the directory that makes one of them."""
    keys = tuple(dict.fromkeys(registry_keys))
    links = (ChildSpec(link_id(key), Link, LinkArgs(key)) for key in keys)
    return (
        ChildSpec("links", Supervisor, SupervisorSpec("one_for_one", tuple(links))),
        ChildSpec("link", Directory, keys),
    )


def _endpoint(config: EndpointConfig, name: str = "endpoint") -> ChildSpec:
    return ChildSpec(name, EndpointActor, config, shutdown=10.0, wait_ready=ENDPOINT_READY)


def _pipes() -> ChildSpec:
    each = _each(ChildSpec("pipe", Pipe), MAX_PIPES)
    return ChildSpec("pipes", Supervisor, each, shutdown=PIPES_SHUTDOWN)


def _group(name: str, spec: SupervisorSpec) -> ChildSpec:
    # A path has slashes between names only: `@scope/role` becomes `@scope|role`.
    name = name.replace("/", "|")
    return ChildSpec(name, Supervisor, spec, shutdown=SHUTDOWN, wait_ready=LISTEN_READY)


def _each(child: ChildSpec, limit: int | None = None) -> SupervisorSpec:
    return SupervisorSpec(
        "simple_one_for_one", (structs.replace(child, restart="temporary"),), limit=limit
    )


def _check_address(host: str) -> None:
    """A node's place in the network follows from its address, so it has to be the very one."""
    try:
        address = ipaddress.IPv4Address(host)
    except ValueError:
        address = None
    if address is None or address.is_unspecified:
        raise InvalidInput(
            f"--host {host} is not an IPv4 address under which others reach this machine"
        )


def _on_ports(base: EndpointConfig, port: int, nodes: int) -> list[EndpointConfig]:
    """One for each node, with a port that is known before the nodes run, so that one that is
    restarted comes back where others know it."""
    if port:
        if port + nodes - 1 > 65535:
            raise InvalidInput(
                f"{nodes} nodes from port {port} end above 65535: choose a lower --port"
            )
        return [structs.replace(base, port=port + number) for number in range(nodes)]
    ports = [ReservedPort(socket.SOCK_DGRAM, base.host) for _ in range(nodes)]
    return [structs.replace(base, port=each.number, reserved=each) for each in ports]
