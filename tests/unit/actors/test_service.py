"""The announcement of a service, in its tree, with a registry in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog
from support import endpoint as support_endpoint
from support.endpoint import MemoryEndpoint, MemoryNetwork
from support.pipes import in_memory, pipe_channels
from support.registry import REGISTRY, Client, Recorder, running_registry, virtual

from hyperseaport.actors import deployment, news
from hyperseaport.actors.actor import Actor, Crashed, handles
from hyperseaport.actors.messages import (
    LinkConnecting,
    LinkDown,
    Listen,
    ListenFailed,
    Listening,
    Register,
    Registered,
    RegistrationRefused,
    ServiceListening,
    Unlisten,
    Unlistened,
    Unregister,
)
from hyperseaport.actors.registry import roles
from hyperseaport.actors.service import (
    Announcement,
    AnnouncementArgs,
    ListenerArgs,
    ServiceListener,
)
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import ChildSpec, Supervisor, SupervisorSpec
from hyperseaport.transport.dht.endpoint import EndpointConfig
from hyperseaport.transport.errors import PeerUnreachable
from hyperseaport.transport.keys import KeyPair

PAIR = KeyPair.from_seed(b"\x05" * 32)
LISTENER = ListenerArgs(PAIR, "127.0.0.1", 9)
CLIENT = KeyPair.from_seed(b"\x06" * 32)
ROLE = "couchdb@3.2.2"
ANNOUNCEMENT = f"/root/node/service:{ROLE}/announcement"


@asynccontextmanager
async def serving(
    network: MemoryNetwork, shown: list[Any], **changes: Any
) -> AsyncIterator[ActorRuntime]:
    options: dict[str, Any] = {"host": "127.0.0.1", "port": 9, "key_pair": PAIR, "allow": None}
    options |= changes
    show: Any = options.pop("show", shown.append)
    tree = deployment.service_tree(
        EndpointConfig(bootstrap=()), (REGISTRY.public_key,), ROLE, show=show, **options
    )
    async with ActorRuntime() as runtime:
        root = runtime.spawn(Supervisor, in_memory(tree, network), name="root")
        await runtime.ready(root)
        yield runtime
        runtime.stop(root, 20)
        await runtime.stopped(root)


async def registered(network: MemoryNetwork) -> list[str]:
    client = await Client(network).connect()
    items = await client.ask("query", {**roles.parse("couchdb"), "details": True})
    await client.close()
    return [item["servicePublicKey"] for item in items]


@virtual
async def test_the_lines_come_in_the_order_that_people_know() -> None:
    network = MemoryNetwork(connect_delay=0.1)
    lines: list[str] = []
    async with running_registry(network), serving(network, [], show=news.service(lines.append)):
        await asyncio.sleep(2)
        text = "\n".join(lines)
        assert text == (
            f"started p2p service on {PAIR}\n"
            f"connecting to registry {REGISTRY}\n"
            "registered service {\n"
            "  role: 'couchdb',\n"
            "  version: '3.2.2',\n"
            "  _tags: {},\n"
            "  tags: [],\n"
            "  hash: 'couchdb|3.2.2|'\n"
            "}"
        )


@virtual
async def test_it_is_reachable_before_it_is_registered() -> None:
    network = MemoryNetwork()
    shown: list[Any] = []
    async with serving(network, shown):
        await asyncio.sleep(60)
        assert PAIR.public_key in network.listeners
        kinds = [type(each) for each in shown]
        assert kinds[:3] == [ServiceListening, LinkConnecting, LinkDown]
        assert Registered not in kinds
        async with running_registry(network):
            await asyncio.sleep(16)
            assert [type(each) for each in shown].count(Registered) == 1
            assert await registered(network) == [PAIR.public_key.hex()]


@virtual
async def test_stopped_it_leaves_the_registry_first_and_then_the_dht() -> None:
    done: list[Any] = []

    class Link(Actor):
        @handles(Register, Unregister)
        def _say(self, message: object, _sender: object) -> None:
            done.append(type(message))

    class Endpoint(Actor):
        @handles(Listen)
        def _listen(self, message: Listen, sender: Any) -> None:
            done.append(Listen)
            self.send(sender, Listening(message.key_pair.public_key))

        @handles(Unlisten)
        def _unlisten(self, message: Unlisten, sender: Any) -> None:
            assert message.public_key == PAIR.public_key
            done.append(Unlisten)
            self.send(sender, Unlistened())

    args = AnnouncementArgs(PAIR, roles.to_register(ROLE))
    spec = SupervisorSpec(
        "rest_for_one",
        (
            ChildSpec("endpoint", Endpoint),
            ChildSpec("pipes", Recorder, []),
            ChildSpec("link", Link),
            ChildSpec("listener", ServiceListener, LISTENER, wait_ready=5.0),
            ChildSpec("announcement", Announcement, args),
        ),
    )
    async with ActorRuntime() as runtime:
        root = runtime.spawn(Supervisor, spec, name="root")
        await runtime.ready(root)
        runtime.stop(root)
        await runtime.stopped(root)
        assert done[:4] == [Listen, Register, Unregister, Unlisten]


@virtual
async def test_stopped_nothing_of_it_is_left() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        async with serving(network, []) as runtime:
            await asyncio.sleep(1)
            assert await registered(network) == [PAIR.public_key.hex()]
        assert runtime.actor_count == 0
        assert PAIR.public_key not in network.listeners
        await asyncio.sleep(0.1)
        assert await registered(network) == []


@virtual
async def test_a_refusal_is_shown() -> None:
    network = MemoryNetwork()
    lines: list[str] = []
    async with serving(network, [], show=news.service(lines.append)) as runtime:
        await asyncio.sleep(1)
        announcement = runtime.find(ANNOUNCEMENT)
        assert announcement is not None
        runtime.tell(announcement, RegistrationRefused({}, PAIR.public_key, "it is full"))
        await asyncio.sleep(0.1)
        assert lines[-1] == "the registry refuses the service: it is full"


@virtual
async def test_a_key_that_cannot_be_listened_to_is_tried_again() -> None:
    """An unreachable network is no reason to end, in the first seconds."""
    failures = iter([ListenFailed(PeerUnreachable("no network"))] * 2)

    class Endpoint(MemoryEndpoint):
        @handles(Listen)
        def _listen(self, message: Listen, sender: Any) -> None:
            failure = next(failures, None)
            if failure is not None:
                self.send(sender, failure)
            else:
                MemoryEndpoint._listen(self, message, sender)

    network = MemoryNetwork()
    spec = SupervisorSpec(
        "rest_for_one",
        (
            ChildSpec("endpoint", Endpoint, network),
            ChildSpec("pipes", Recorder, []),
            ChildSpec("listener", ServiceListener, LISTENER, wait_ready=5.0),
        ),
    )
    async with ActorRuntime() as runtime:
        await runtime.ready(runtime.spawn(Supervisor, spec, name="root"))
        assert PAIR.public_key in network.listeners


@virtual
async def test_a_key_that_listens_already_ends_it_with_the_reason() -> None:
    network = MemoryNetwork()
    async with serving(network, []):
        tree = deployment.service_tree(
            EndpointConfig(bootstrap=()),
            (REGISTRY.public_key,),
            ROLE,
            host="127.0.0.1",
            port=9,
            key_pair=PAIR,
            allow=None,
            show=list[object]().append,
        )
        async with ActorRuntime() as other:
            root = other.spawn(Supervisor, in_memory(tree, network), name="root")
            reason = await other.stopped(root)
            assert isinstance(reason, Crashed)
            assert "listens already" in reason.text


@virtual
async def test_only_those_who_are_allowed_may_connect() -> None:
    network = MemoryNetwork()
    async with serving(network, [], allow=frozenset({CLIENT.public_key})):
        with pytest.raises(PeerUnreachable):
            network.connect(PAIR.public_key, KeyPair.generate())
        network.connect(PAIR.public_key, CLIENT)


@virtual
async def test_beyond_the_limit_a_channel_is_reset_and_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deployment, "MAX_PIPES", 0)
    monkeypatch.setattr(support_endpoint, "channel_pair", pipe_channels)
    network = MemoryNetwork()
    with structlog.testing.capture_logs() as logs:
        async with serving(network, []):
            client = Client(network, CLIENT).visit(PAIR.public_key)
            await asyncio.sleep(0.01)
            assert client.lost
            assert isinstance(client.error, ConnectionResetError)
    refusals = [entry for entry in logs if entry["event"] == "connection refused"]
    assert len(refusals) == 1


@pytest.mark.parametrize(
    "victim",
    [
        "console",
        "node",
        "node/endpoint",
        "node/pipes",
        "node/link",
        f"node/service:{ROLE}",
        f"node/service:{ROLE}/listener",
        ANNOUNCEMENT[6:],
    ],
)
@virtual
async def test_it_heals_when_an_actor_is_killed(victim: str) -> None:
    network = MemoryNetwork()
    async with running_registry(network), serving(network, []) as runtime:
        await asyncio.sleep(1)
        runtime.kill(f"/root/{victim}")
        await asyncio.sleep(20)
        assert PAIR.public_key in network.listeners
        assert await registered(network) == [PAIR.public_key.hex()]
