"""A registry, and a client of it that says what a test wants said, on a memory network."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from hyperseaport.actors.actor import Actor, Address, handles
from hyperseaport.actors.messages import Accepted
from hyperseaport.actors.registry import replica
from hyperseaport.actors.registry.replica import Replica
from hyperseaport.actors.registry.server import RegistryServer, ServerArgs, Session
from hyperseaport.actors.registry.table import TableActor, TableArgs
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import Backoff, ChildSpec, Supervisor, SupervisorSpec
from hyperseaport.testing.channels import MemoryChannel
from hyperseaport.testing.clock import run_virtual
from hyperseaport.transport.channel import Channel
from hyperseaport.transport.keys import KeyPair

from .endpoint import MemoryEndpoint, MemoryNetwork

REGISTRY = KeyPair.from_seed(b"\x07" * 32)


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an ``async def`` test in virtual time."""

    @functools.wraps(test)
    def run(*args: Any, **names: Any) -> None:
        run_virtual(test(*args, **names))

    return run


class Recorder(Actor):
    """Appends every message that it gets to the list that is its args."""

    def on_start(self, args: list[Any]) -> None:
        self._messages = args

    @handles(object)
    def _record(self, message: object, _sender: object) -> None:
        self._messages.append(message)


def registry_spec(
    network: MemoryNetwork,
    news: list[Any],
    *,
    path: Path | None = None,
    clock: Callable[[], float] = time.time,
    **server: Any,
) -> SupervisorSpec:
    """Console, endpoint and the registry's actors, which restart without end. The clock tells Unix
    seconds."""
    session = SupervisorSpec(
        "simple_one_for_one", (ChildSpec("session", Session, restart="temporary"),)
    )
    args = ServerArgs(REGISTRY, replica.log_key(REGISTRY), clock=clock, **server)
    return SupervisorSpec(
        "rest_for_one",
        (
            ChildSpec("console", Recorder, news),
            ChildSpec("endpoint", MemoryEndpoint, network, wait_ready=10.0),
            ChildSpec("table", TableActor, TableArgs(path, clock), wait_ready=10.0),
            ChildSpec("sessions", Supervisor, session),
            ChildSpec("server", RegistryServer, args, wait_ready=10.0),
            ChildSpec("replica", Replica, REGISTRY),
        ),
        intensity=1000,
        backoff=Backoff(initial=0.01, maximum=0.1),
    )


@asynccontextmanager
async def running_registry(
    network: MemoryNetwork, news: list[Any] | None = None, **options: Any
) -> AsyncIterator[ActorRuntime]:
    """A registry under `REGISTRY`; its supervisor is ``/registry``. Options as of
    `registry_spec`."""
    async with ActorRuntime() as runtime:
        spec = registry_spec(network, [] if news is None else news, **options)
        await runtime.ready(runtime.spawn(Supervisor, spec, name="registry"))
        yield runtime


class Client(asyncio.Protocol):
    """One connection to the registry, speaking lines."""

    def __init__(self, network: MemoryNetwork, key_pair: KeyPair | None = None) -> None:
        self.key_pair = key_pair or KeyPair.generate()
        self.channel: MemoryChannel
        self.lines: list[str] = []
        self.ended = False
        self.lost = False
        self.error: Exception | None = None
        self._network = network
        self._rest = b""
        self._serial = 0
        self._changed = asyncio.Event()

    async def connect(self) -> Client:
        return self.visit(REGISTRY.public_key)

    def visit(self, public_key: bytes) -> Client:
        """Connect to whoever listens under the key."""
        self.channel, acceptor = self._network.connect(public_key, self.key_pair)
        accepted = Accepted(cast(Channel, self.channel.peer))
        target = cast(Address, acceptor).target
        assert target is not None
        target.receive(accepted, acceptor)
        self.channel.set_protocol(self)
        return self

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.lines += [line.decode() + "\n" for line in lines]
        self._changed.set()

    def eof_received(self) -> bool:
        self.ended = True
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost, self.error = True, exc

    def send(self, line: str) -> None:
        self.channel.write(line.encode())

    async def say(self, line: str) -> str:
        """Send a line; the next line that comes, within 30 s."""
        expected = len(self.lines)
        self.send(line)
        await self.until(lambda: len(self.lines) > expected)
        return self.lines[expected]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until lines have come that make the condition true, for at most 30 s."""
        async with asyncio.timeout(30):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def ask(self, method: str, params: Any = None) -> Any:
        """The result; None when there is none. Raises RuntimeError with the error's text."""
        self._serial += 1
        request = {"method": method, "params": params, "id": self._serial}
        reply = json.loads(await self.say(json.dumps(request) + "\n"))
        assert reply["id"] == self._serial
        if reply["error"]:
            raise RuntimeError(reply["error"])
        return reply.get("result")

    @property
    def notices(self) -> list[Any]:
        """Params of the notifications so far."""
        requests = (json.loads(line) for line in self.lines if line.startswith('{"method"'))
        return [request["params"] for request in requests]

    async def close(self) -> None:
        self.channel.close()
        await asyncio.sleep(0.01)
