"""The trees of the commands have the shape that docs/architecture.md draws."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from msgspec.structs import replace
from support.endpoint import MemoryNetwork
from support.pipes import in_memory
from support.registry import REGISTRY, virtual

from hyperseaport.actors import deployment
from hyperseaport.actors.actor import Actor
from hyperseaport.actors.deployment import (
    MAX_PIPES,
    NEWCOMER_DELAY,
    client_tree,
    dht_tree,
    proxy_tree,
    registry_tree,
    relay_tree,
    service_tree,
)
from hyperseaport.actors.pipe import DRAIN
from hyperseaport.actors.proxy import ProxyArgs
from hyperseaport.actors.registry import roles
from hyperseaport.actors.registry.directory import link_id
from hyperseaport.actors.resolver import Resolver, ResolverArgs
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import ChildSpec, Supervisor, SupervisorSpec
from hyperseaport.transport.dht.endpoint import ANY_HOST, EndpointConfig
from hyperseaport.transport.dht.relay_server import RelayLimits
from hyperseaport.transport.errors import InvalidInput, LocalError
from hyperseaport.transport.keys import KeyPair

CONFIG = EndpointConfig(bootstrap=("127.0.0.1:1",))
PAIR = KeyPair.from_seed(b"\x03" * 32)
KEY = REGISTRY.public_key


def show(_news: object) -> None:
    """Nobody looks."""


def service(role: str = "couchdb@3.2.2", **options: Any) -> SupervisorSpec:
    options = {"key_pair": None, "allow": None, "port": 5984} | options
    return service_tree(CONFIG, (KEY,), role, host="127.0.0.1", show=show, **options)


def proxy(role: str = "couchdb@3.x", **options: Any) -> SupervisorSpec:
    options = {"key_pair": None, "port": 5985} | options
    return proxy_tree(CONFIG, (KEY,), role, host="127.0.0.1", show=show, **options)


def dht(**options: Any) -> SupervisorSpec:
    options = {"bootstrap": (), "host": None, "port": 0, "nodes": 4} | options
    return dht_tree(options.pop("bootstrap"), show=show, **options)


def shape(spec: SupervisorSpec) -> list[Any]:
    """Ids, with strategy and children below those that are supervisors."""
    return [spec.strategy, *map(_shape, spec.children)]


def _shape(child: ChildSpec) -> Any:
    if isinstance(child.args, SupervisorSpec):
        return {child.id: shape(child.args)}
    return child.id


def below_node(spec: SupervisorSpec) -> tuple[ChildSpec, ...]:
    node = spec.children[-1]
    assert node.id == "node"
    assert isinstance(node.args, SupervisorSpec)
    return node.args.children


def each(child: str) -> list[Any]:
    return ["simple_one_for_one", child]


def root(*below: Any, console: bool = True) -> list[Any]:
    return ["one_for_one", *["console"][: int(console)], {"node": ["rest_for_one", *below]}]


SHAPES = {
    "registry": (
        registry_tree(CONFIG, PAIR, show),
        root(
            "endpoint",
            {
                "registry": [
                    "rest_for_one",
                    "table",
                    {"sessions": each("session")},
                    "server",
                    "replica",
                ]
            },
        ),
    ),
    "relay": (
        relay_tree(CONFIG, PAIR, show, limits=RelayLimits()),
        root(
            "endpoint",
            {"relay": ["rest_for_one", "books", {"sessions": each("session")}, "listener"]},
        ),
    ),
    "service": (
        service(),
        root(
            "endpoint",
            {"pipes": each("pipe")},
            {"links": ["one_for_one", link_id(KEY)]},
            "link",
            {"service:couchdb@3.2.2": ["rest_for_one", "listener", "announcement"]},
        ),
    ),
    "proxy": (
        proxy(),
        root(
            "endpoint",
            {"pipes": each("pipe")},
            {"links": ["one_for_one", link_id(KEY)]},
            "link",
            {"proxy:5985": ["rest_for_one", "resolver", "listener"]},
        ),
    ),
    "client": (
        client_tree(
            CONFIG, (KEY,), ChildSpec("resolver", Resolver, ResolverArgs(roles.to_find("a")))
        ),
        root(
            "endpoint", {"links": ["one_for_one", link_id(KEY)]}, "link", "resolver", console=False
        ),
    ),
    "dht": (dht(nodes=3), root("node-0", "node-1", "node-2")),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    spec, expected = SHAPES[name]
    assert shape(spec) == expected


def descendants(spec: SupervisorSpec) -> list[tuple[ChildSpec, SupervisorSpec]]:
    """Every child with its supervisor's specification."""
    found = []
    for child in spec.children:
        found.append((child, spec))
        if isinstance(child.args, SupervisorSpec):
            found += descendants(child.args)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_what_serves_connections_is_temporary_and_all_else_permanent(name: str) -> None:
    for child, parent in descendants(SHAPES[name][0]):
        dynamic = parent.strategy == "simple_one_for_one"
        assert child.restart == ("temporary" if dynamic else "permanent")


@pytest.mark.parametrize("name", ["service", "proxy"])
def test_pipes_are_bounded_and_have_time_to_drain(name: str) -> None:
    children = {child.id: child for child, _ in descendants(SHAPES[name][0])}
    pipes = children["pipes"]
    assert isinstance(pipes.args, SupervisorSpec)
    assert pipes.args.limit == MAX_PIPES
    assert pipes.args.children[0].shutdown > DRAIN
    group = next(child for child in children.values() if child.id.startswith(f"{name}:"))
    assert children["node"].shutdown >= pipes.shutdown >= pipes.args.children[0].shutdown
    # Else whoever depends on them would be started too early, and a bad port found out too late.
    assert group.wait_ready is not None
    assert children["endpoint"].wait_ready is not None


def test_a_scoped_role_is_a_name_without_slashes() -> None:
    tree = service("@scope/name@1.0.0")
    assert [child.id for child in below_node(tree)][-1] == "service:@scope|name@1.0.0"


@virtual
async def test_a_scoped_service_runs() -> None:
    async with ActorRuntime() as runtime:
        tree = in_memory(service("@scope/name@1.0.0"), MemoryNetwork())
        await runtime.ready(runtime.spawn(Supervisor, tree, name="root"))
        assert runtime.find("/root/node/service:@scope|name@1.0.0/announcement") is not None


@pytest.mark.parametrize("role", ["", "@", "couchdb", "couchdb@3.x", "couchdb@three", "@1.0.0"])
def test_a_role_that_cannot_be_registered(role: str) -> None:
    with pytest.raises(InvalidInput):
        service(role)


@pytest.mark.parametrize("role", ["", "couchdb@three to four"])
def test_a_role_that_nothing_can_match(role: str) -> None:
    with pytest.raises(InvalidInput):
        proxy(role)


def test_identities_are_random_unless_given() -> None:
    def keys(spec: SupervisorSpec) -> set[bytes]:
        args: list[Any] = [child.args for child, _ in descendants(spec)]
        # Also what relays know it by.
        assert any(isinstance(arg, EndpointConfig) and arg.key_pair for arg in args)
        return {arg.key_pair.public_key for arg in args if getattr(arg, "key_pair", None)}

    assert len(keys(service())) == len(keys(proxy())) == 1
    assert keys(service()) != keys(service())
    assert keys(proxy()) != keys(proxy())
    assert keys(service(key_pair=PAIR)) == keys(proxy(key_pair=PAIR)) == {PAIR.public_key}


# DHT nodes


def configs(spec: SupervisorSpec) -> list[EndpointConfig]:
    found = [child.args for child in below_node(spec) if child.id.startswith("node-")]
    assert all(isinstance(each, EndpointConfig) for each in found)
    return found  # type: ignore[return-value]


def test_a_private_network_has_a_first_node_that_the_others_join() -> None:
    first, *others = configs(dht(port=40_000, nodes=3))
    assert first == EndpointConfig((), "127.0.0.1", 40_000, permanent=True)
    assert others == [
        EndpointConfig(
            ("127.0.0.1:40000",), "127.0.0.1", port, permanent=True, find_node_delay=NEWCOMER_DELAY
        )
        for port in (40_001, 40_002)
    ]


def test_nodes_of_an_existing_network_all_join_it() -> None:
    first, second = configs(dht(bootstrap=("192.0.2.1:49737",), port=40_000, nodes=2))
    assert first == EndpointConfig(("192.0.2.1:49737",), ANY_HOST, 40_000)
    assert second == replace(first, port=40_001)
    (known,) = configs(dht(bootstrap=("192.0.2.1:1",), host="192.0.2.7", port=1, nodes=1))
    assert (known.host, known.permanent) == ("192.0.2.7", True)


def test_free_ports_are_kept_until_the_nodes_run() -> None:
    nodes = configs(dht(nodes=8))
    assert len({node.port for node in nodes}) == 8
    for node in nodes:
        assert node.reserved is not None
        assert node.reserved.number == node.port
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
            pytest.raises(OSError, match="in use"),
        ):
            other.bind(("127.0.0.1", node.port))


def test_ports_end_at_65535() -> None:
    assert [config.port for config in configs(dht(port=65_534, nodes=2))] == [65_534, 65_535]
    with pytest.raises(InvalidInput, match="choose a lower --port"):
        dht(port=65_534, nodes=3)


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost", "::1", "", "300.1.1.1"])
def test_a_node_has_an_address_that_others_reach(host: str) -> None:
    with pytest.raises(InvalidInput, match="is not an IPv4 address under which others"):
        dht(host=host)


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(LocalError, match=r"cannot listen on 192\.0\.2\.1"):
        dht(host="192.0.2.1")


# In the foreground


class Dies(Actor):
    def on_start(self, args: Exception) -> None:
        self.run(self._die(args))

    async def _die(self, error: Exception) -> None:
        await asyncio.sleep(0)
        raise error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (LocalError("port 1 is in use: take another"), "port 1 is in use: take another"),
        (OSError("no space left"), "/a failed: OSError: no space left"),
    ],
)
def test_a_tree_that_dies_says_why_in_one_line(error: Exception, line: str) -> None:
    tree = SupervisorSpec(
        "rest_for_one", (ChildSpec("a", Dies, error, wait_ready=5.0),), intensity=0
    )
    assert deployment.run(tree) == line


def test_a_free_port_is_kept_until_the_listener_runs() -> None:
    tree = deployment.proxy_tree(
        CONFIG,
        (KEY,),
        "couchdb@3.x",
        host="127.0.0.1",
        port=0,
        key_pair=None,
        show=show,
    )
    group = below_node(tree)[-1]
    assert isinstance(group.args, SupervisorSpec)
    listener = group.args.children[-1].args
    assert isinstance(listener, ProxyArgs)
    assert listener.reserved is not None
    assert group.id == f"proxy:{listener.port}"
    assert listener.port > 0
