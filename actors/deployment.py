"""The trees that the commands and the Python API boot, and the loop that runs one in the
foreground.

    root  rest_for_one
    |- console             shows news
    |- endpoint            the DHT node
    |- registry            table, sessions, server, replica       (registry)
    |- link                the session with the registry          (service, proxy)
    |- service:ROLE@VERSION  pipes, announcement                  (service)
    `- proxy:PORT          resolver, pipes, listener              (proxy)
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from ..supervisor import ChildSpec, Supervisor, SupervisorSpec
from ..transport.dht.endpoint import EndpointConfig
from ..transport.errors import HyperseaportError, InvalidInput, LocalError
from ..transport.keys import KeyPair
from .actor import Crashed, ExitReason
from .console import Console
from .endpoint import EndpointActor
from .pipe import DRAIN, Pipe
from .proxy import ProxyArgs, ProxyListener
from .registry import replica, roles
from .registry.link import Link, LinkArgs
from .registry.replica import Replica
from .registry.server import RegistryServer, ServerArgs, Session
from .registry.table import TableActor
from .resolver import Resolver
from .service import Announcement, ServiceArgs
from .system import ActorRuntime

Show = Callable[[object], None]

#: DHT nodes that a private network begins with: with fewer than three, peers that see themselves as
#: firewalled cannot reach each other (spec: hyperdht 2.13).
SEED_NODES = 4
#: Seconds by which the nodes of a private network but the first answer newcomers late, so that the
#: newcomers have time to find out that they are reachable (spec: hyperdht 2.13).
NEWCOMER_DELAY = 0.02
#: Seconds in which an endpoint must have bootstrapped. Without any network it takes about 6.
ENDPOINT_READY = 30.0
#: Seconds in which a first announcement must have succeeded, an unreachable network included.
LISTEN_READY = 60.0
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


def registry_tree(endpoint: EndpointConfig, key_pair: KeyPair, show: Show) -> SupervisorSpec:
    """A registry under the key pair."""
    log_key = replica.log_key(key_pair)
    registry = SupervisorSpec(
        "rest_for_one",
        (
            ChildSpec("table", TableActor),
            ChildSpec("sessions", Supervisor, _each(ChildSpec("session", Session))),
            ChildSpec(
                "server", RegistryServer, ServerArgs(key_pair, log_key), wait_ready=LISTEN_READY
            ),
            ChildSpec("replica", Replica, key_pair),
        ),
    )
    return _root(
        ChildSpec("console", Console, show),
        _endpoint(endpoint),
        _group("registry", registry),
    )


def service_tree(
    endpoint: EndpointConfig,
    registry_key: bytes,
    role: str,
    *,
    host: str,
    port: int,
    key_pair: KeyPair | None,
    allow: frozenset[bytes] | None,
    show: Show,
) -> SupervisorSpec:
    """The TCP service at ``host``:``port``, registered as ``role`` (``name@version``). Raises
    `InvalidInput` for a role that cannot be registered."""
    meta = roles.to_register(role)
    args = ServiceArgs(key_pair or KeyPair.generate(), meta, host, port, allow)
    service = SupervisorSpec(
        "rest_for_one",
        (
            _pipes(),
            ChildSpec("announcement", Announcement, args, wait_ready=LISTEN_READY),
        ),
    )
    return _root(
        ChildSpec("console", Console, show),
        _endpoint(endpoint),
        ChildSpec("link", Link, LinkArgs(registry_key)),
        _group(f"service:{role}", service),
    )


def proxy_tree(
    endpoint: EndpointConfig,
    registry_key: bytes,
    role: str,
    *,
    host: str,
    port: int,
    key_pair: KeyPair | None,
    show: Show,
) -> SupervisorSpec:
    """A local TCP port for whatever service matches ``role`` (``name@range``). Raises
    `InvalidInput` for a role that nothing can match."""
    meta = roles.to_find(role)
    chosen = port == 0
    if chosen:
        # Known before the listener runs, so that one that is restarted comes back where its
        # clients know it.
        port = _free_ports(socket.SOCK_STREAM, host, 1)[0]
    args = ProxyArgs(host, port, key_pair or KeyPair.generate(), chosen)
    proxy = SupervisorSpec(
        "rest_for_one",
        (
            ChildSpec("resolver", Resolver, meta),
            _pipes(),
            ChildSpec("listener", ProxyListener, args, wait_ready=LISTEN_READY),
        ),
    )
    return _root(
        ChildSpec("console", Console, show),
        _endpoint(endpoint),
        ChildSpec("link", Link, LinkArgs(registry_key)),
        _group(f"proxy:{port}", proxy),
    )


def client_tree(endpoint: EndpointConfig, registry_key: bytes, meta: roles.Meta) -> SupervisorSpec:
    """What one connection to a service needs: the way to find it."""
    return _root(
        _endpoint(endpoint),
        ChildSpec("link", Link, LinkArgs(registry_key)),
        ChildSpec("resolver", Resolver, meta),
    )


def dht_tree(
    bootstrap: tuple[str, ...], *, host: str | None, port: int, nodes: int, show: Show
) -> SupervisorSpec:
    """DHT nodes on following ports. Without ``bootstrap`` the first is the seed of a private
    network, which the others join; nodes with a ``host`` say that this is their address."""
    if not bootstrap and host is None:
        host = "127.0.0.1"
    if host is not None:
        _check_address(host)
    base = EndpointConfig(bootstrap=bootstrap, permanent=host is not None)
    if host is not None:
        base = replace(base, host=host)
    ports = _ports(base.host, port, nodes)
    configs = [replace(base, port=number) for number in ports]
    if not bootstrap:
        first = (f"{host}:{ports[0]}",)
        configs[1:] = [
            replace(config, bootstrap=first, find_node_delay=NEWCOMER_DELAY)
            for config in configs[1:]
        ]
    return _root(
        ChildSpec("console", Console, show),
        *(_endpoint(config, f"node-{number}") for number, config in enumerate(configs)),
    )


def run(tree: SupervisorSpec) -> str | None:
    """Run a tree until it is told to stop (SIGINT or SIGTERM; a second one ends the process at
    once) or until it dies, and then return why, in one line."""
    return asyncio.run(_run(tree))


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


def _root(*children: ChildSpec) -> SupervisorSpec:
    return SupervisorSpec("rest_for_one", children)


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
    return SupervisorSpec("simple_one_for_one", (replace(child, restart="temporary"),), limit=limit)


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


def _ports(host: str, port: int, nodes: int) -> list[int]:
    """The ports of the nodes, each free right now: known before the nodes run, so that one that is
    restarted comes back where others know it."""
    if port:
        if port + nodes - 1 > 65535:
            raise InvalidInput(
                f"{nodes} nodes from port {port} end above 65535: choose a lower --port"
            )
        return list(range(port, port + nodes))
    return _free_ports(socket.SOCK_DGRAM, host, nodes)


def _free_ports(kind: socket.SocketKind, host: str, count: int) -> list[int]:
    with ExitStack() as stack:
        found: list[int] = []
        for _ in range(count):
            try:
                family, _, protocol, _, address = socket.getaddrinfo(host, 0, type=kind)[0]
                probe = stack.enter_context(socket.socket(family, kind, protocol))
                probe.bind(address)
            except OSError as error:
                raise LocalError(
                    f"cannot listen on {host} ({error.strerror}): choose another --host"
                ) from error
            found.append(probe.getsockname()[1])
        return found
