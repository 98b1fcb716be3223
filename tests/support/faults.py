"""The real trees of registry, service and proxy in one process, on endpoints of 127.0.0.1, and the
means to hurt one actor in them and to see what that does.

Faults come by what the runtime and Python have: an actor is killed by its path; a handler that
raises is added to one living actor; a supervisor is told that the next incarnation of a child is of
a class that hangs. Nothing in the trees knows of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace

from hyperseaport.actors import deployment
from hyperseaport.actors.actor import Actor, ActorAddress, Address
from hyperseaport.actors.api import DHT
from hyperseaport.actors.cell import Cell
from hyperseaport.actors.control import ControlArgs
from hyperseaport.actors.endpoint import EndpointActor
from hyperseaport.actors.health import HealthArgs, TcpCheck
from hyperseaport.actors.messages import Connect, Describe
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import ChildSpec, Supervisor, SupervisorSpec, TerminateChild
from hyperseaport.transport.dht import endpoint as node
from hyperseaport.transport.dht.endpoint import EndpointConfig
from hyperseaport.transport.dht.relay_server import RelayLimits
from hyperseaport.transport.keys import KeyPair

from .endpoint import MemoryEndpoint, MemoryNetwork
from .faults_transfers import Transfers
from .pipes import PipeChannel, descriptors

#: Seconds in which what a fault has broken is whole again, on a busy machine. Without load it is
#: most often less than one.
HEALED = 30.0
#: Channels in memory at which those that are over are forgotten.
KEPT = 512
#: Seconds between two looks at what tells nobody of its change.
LOOK = 0.02
#: Seconds that a child has to get ready, or to stop, where a test has it hang.
HANGS = 0.5

ROLE = "echo@1.2.3"
REGISTRY = KeyPair.from_seed(b"\x05" * 32)
RELAY = KeyPair.from_seed(b"\x06" * 32)


class Watched(ActorRuntime):
    """Writes down who starts (+) and who dies (-)."""

    def __init__(self, changed: Callable[[], None]) -> None:
        super().__init__()
        self.journal: list[tuple[str, str]] = []
        #: Called once, when the actor at this path dies.
        self.at_death: dict[str, Callable[[], None]] = {}
        self._changed = changed

    def spawn_below(
        self,
        parent: Cell | None,
        actor_class: Any,
        args: object,
        name: str | None,
        context: Mapping[str, Any],
    ) -> Address:
        address = super().spawn_below(parent, actor_class, args, name, context)
        self.journal.append(("+", address.path))
        self._changed()
        return address

    def mark_ready(self, cell: Cell) -> None:
        super().mark_ready(cell)
        self._changed()

    def _bury(self, cell: Cell) -> None:
        path = cell.address.path
        super()._bury(cell)
        self.journal.append(("-", path))
        self.at_death.pop(path, _nothing)()
        self._changed()

    def cell(self, path: str) -> Cell:
        address = self.find(path)
        assert address is not None, f"nobody lives at {path}"
        assert isinstance(address.target, Cell)
        return address.target


def _nothing() -> None:
    pass


@dataclass(eq=False)
class Program:
    """What one command runs."""

    name: str
    runtime: Watched
    spec: SupervisorSpec
    root: Address
    news: list[object] = field(default_factory=list)

    def parts(self) -> dict[str, tuple[SupervisorSpec, ChildSpec]]:
        """Static children by path, each with its supervisor's specification."""
        return dict(_parts("/root", self.spec))

    async def ask(self, path: str) -> Mapping[str, Any] | None:
        """What an actor shows of itself; None if it does not live."""
        address = self.runtime.find(path)
        if address is None:
            return None
        with contextlib.suppress(Exception):
            described = await self.runtime.call(address, Describe(), 5.0)
            fields: Mapping[str, Any] = described.fields
            return fields
        return None

    def count(self, path: str) -> int:
        """How many children a supervisor has."""
        address = self.runtime.find(path)
        return 0 if address is None else len(self.runtime.cell(path).children or {})


def _parts(
    path: str, spec: SupervisorSpec
) -> Iterator[tuple[str, tuple[SupervisorSpec, ChildSpec]]]:
    if spec.strategy == "simple_one_for_one":
        return
    for child in spec.children:
        yield f"{path}/{child.id}", (spec, child)
        if isinstance(child.args, SupervisorSpec):
            yield from _parts(f"{path}/{child.id}", child.args)


def port_of(proxy: Program) -> int:
    """Where a proxy listens."""
    group = next(path for path in proxy.parts() if path.startswith("/root/node/proxy:"))
    return int(group.split(":")[1].split("/")[0])


Orders = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Restart:
    """Who ends and who starts again, by supervisor and in order, as specifications say."""

    #: The supervisor's path.
    where: str
    #: Ids of its children, in the order of their restart.
    what: tuple[str, ...]
    ends: Orders
    starts: Orders


def restart_after(spec: SupervisorSpec, victim: str) -> Restart:
    """What the death of one actor should lead to. The path of one of the children that a supervisor
    starts on demand leads to nothing."""
    above, _, name = victim.rpartition("/")
    parts = dict(_parts("/root", spec))
    if victim not in parts:
        return Restart(above, (), {above: [name]}, {})
    supervisor, child = parts[victim]
    affected = [child]
    if supervisor.strategy == "rest_for_one":
        affected = list(supervisor.children[supervisor.children.index(child) :])
    assert supervisor.strategy in ("rest_for_one", "one_for_one")
    ids = [each.id for each in affected]
    starts, ends = {above: ids}, {above: [ids[0], *reversed(ids[1:])]}
    for path, (parent, each) in parts.items():
        inside = path.rpartition("/")[0]
        if any(f"{path}/".startswith(f"{above}/{top}/") for top in ids) and inside != above:
            assert each in parent.children
            starts.setdefault(inside, []).append(each.id)
    for inside, children in starts.items():
        if inside != above:
            ends[inside] = children[::-1]
    return Restart(above, tuple(ids), ends, starts)


def observed(program: Program, since: int, sign: str) -> Orders:
    """From the journal: ids by supervisor, in order, those on demand left out."""
    static = program.parts().keys()
    found: Orders = {}
    for what, path in program.runtime.journal[since:]:
        above, _, name = path.rpartition("/")
        if what == sign and path in static:
            found.setdefault(above, []).append(name)
    return found


class Remembering(PipeChannel):
    """Tells also a protocol that it gets after its loss, as real channels do."""

    _error: Exception | None = None

    def _lose(self, error: Exception | None) -> None:
        if not self._lost:
            self._error = error
        super()._lose(error)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        lost = self._lost and not self.has_protocol
        super().set_protocol(protocol)
        if lost:
            self._loop.call_soon(protocol.connection_lost, self._error)


def channels(
    left_key: bytes, right_key: bytes, *, delay: float = 0.0
) -> tuple[Remembering, Remembering]:
    """As `testing.channels.channel_pair`."""
    left, right = Remembering(left_key, right_key, delay), Remembering(right_key, left_key, delay)
    left.peer, right.peer = right, left
    return left, right


class Endpoint(MemoryEndpoint):
    """Its channels count as pipes want it; those that are over it forgets, as a test makes
    thousands."""

    def _watch(self) -> None:
        network = self._network
        if len(self._channels) > KEPT:
            self._channels = [each for each in self._channels if not each._lost]
            network.connections[:] = [
                each for each in network.connections if not (each[0]._lost and each[1]._lost)
            ]

    async def _connect_for(self, message: Connect, sender: ActorAddress) -> None:
        await super()._connect_for(message, sender)
        self._watch()


class Memory:
    """A network in memory for all programs of a world."""

    def __init__(self) -> None:
        self._network = MemoryNetwork()

    def adapt(self, spec: SupervisorSpec) -> SupervisorSpec:
        def adapted(child: ChildSpec) -> ChildSpec:
            if child.actor is EndpointActor:
                return replace(child, actor=Endpoint, args=self._network)
            if isinstance(child.args, SupervisorSpec):
                return replace(child, args=self.adapt(child.args))
            return child

        return replace(spec, children=tuple(map(adapted, spec.children)))


def _has(program: Program, pipes: int) -> bool:
    return program.count("/root/node/pipes") == pipes


class Counts(NamedTuple):
    actors: int
    tasks: int
    descriptors: int


class World:
    """A DHT, a registry, a service and a proxy, and what runs through them."""

    def __init__(self) -> None:
        self._change = asyncio.Event()
        self.transfers = Transfers(self.changed)
        self.programs: list[Program] = []
        self.relay: Program | None = None
        self.registry: Program
        self.service: Program
        self.proxy: Program
        #: Where clients connect.
        self.port = 0

    def changed(self) -> None:
        self._change.set()

    async def until(self, condition: Callable[[], Any], what: str, within: float = HEALED) -> None:
        """Look again at each change. A change in a kernel or in another actor's memory tells
        nobody, hence also every `LOOK` seconds."""
        try:
            async with asyncio.timeout(within):
                while True:
                    self._change.clear()
                    holds = condition()
                    if asyncio.iscoroutine(holds):
                        holds = await holds
                    if holds:
                        return
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._change.wait(), LOOK)
        except TimeoutError:
            raise AssertionError(f"{what}: not so within {within:g} s") from None

    async def boot(
        self,
        stack: AsyncExitStack,
        home: Path,
        memory: Memory | None = None,
        *,
        relay: bool = False,
    ) -> None:
        """Start the three programs, on real nodes or in memory, and a blind relay beside them."""
        self._memory = memory
        self._home = home
        (home / "run").mkdir(parents=True, mode=0o700)
        await self.transfers.start()
        stack.callback(self.transfers.close)
        bootstrap: tuple[str, ...] = ()
        if memory is None:
            bootstrap = (await stack.enter_async_context(DHT())).bootstrap
        self._config = EndpointConfig(bootstrap=bootstrap, host="127.0.0.1")
        tree = partial(deployment.registry_tree, self._config, REGISTRY, store=home / "table.db")
        self.registry = await self._run(stack, "registry", tree)
        target = self.transfers.port
        health = HealthArgs("127.0.0.1", target, TcpCheck())
        self.service = await self.run_service(stack, "service", ROLE, target, health=health)
        self.proxy = await self.run_proxy(stack, "proxy", "echo@1.x")
        self.port = port_of(self.proxy)
        if relay:
            relays = partial(deployment.relay_tree, self._config, RELAY, limits=RelayLimits())
            self.relay = await self._run(stack, "relay", relays)
            self._visitor = await node.Endpoint.open(self._config)
            stack.push_async_callback(self._visitor.close)
        await self.healed()

    async def run_service(
        self, stack: AsyncExitStack, name: str, role: str, port: int, **options: Any
    ) -> Program:
        tree = partial(
            deployment.service_tree,
            self._config,
            (REGISTRY.public_key,),
            role,
            host="127.0.0.1",
            port=port,
            key_pair=None,
            allow=None,
            **options,
        )
        return await self._run(stack, name, tree)

    async def run_proxy(
        self, stack: AsyncExitStack, name: str, role: str, **options: Any
    ) -> Program:
        tree = partial(
            deployment.proxy_tree,
            self._config,
            (REGISTRY.public_key,),
            role,
            host="127.0.0.1",
            port=0,
            key_pair=None,
            **options,
        )
        return await self._run(stack, name, tree)

    async def _run(
        self, stack: AsyncExitStack, name: str, tree: Callable[..., SupervisorSpec]
    ) -> Program:
        news: list[object] = []

        def show(piece: object) -> None:
            news.append(piece)
            self.changed()

        socket_path = self._home / "run" / f"{name}.sock"
        spec = tree(show=show, control=ControlArgs(socket_path, name, {}))
        if self._memory is not None:
            spec = self._memory.adapt(spec)
        runtime = await stack.enter_async_context(Watched(self.changed))
        root = runtime.spawn(Supervisor, spec, name="root")
        await runtime.ready(root)
        program = Program(name, runtime, spec, root, news)
        self.programs.append(program)
        return program

    async def healed(self) -> None:
        """Every actor of the trees lives and serves, the service is registered, the proxy knows
        it, and there is a pipe for each open transfer and a session for each client."""
        await self.until(self._whole, "the trees are whole")
        await self.until(self._known, "the service is registered and known")
        count = len(self.transfers.open)
        for program in (self.service, self.proxy):
            await self.until(partial(_has, program, count), f"the {program.name} has {count} pipes")
        clients = [each for each in self.programs if each not in (self.registry, self.relay)]
        await self.until(
            lambda: self.registry.count("/root/node/registry/sessions") == len(clients),
            "the registry has a session for each client",
        )
        await self._visited()

    async def _visited(self) -> None:
        """There is somebody at the relay."""
        sessions = "/root/node/relay/sessions"
        while self.relay is not None and not self.relay.count(sessions):
            channel = await self._visitor.connect(RELAY.public_key)
            channel.set_protocol(asyncio.Protocol())
            await self.until(partial(self.relay.count, sessions), "the relay has a session")

    def _whole(self) -> bool:
        for program in self.programs:
            for path, (_, child) in program.parts().items():
                address = program.runtime.find(path)
                if address is None or not isinstance(address.target, Cell):
                    return False
                if child.wait_ready is not None and not address.target.ready:
                    return False
        return True

    async def _known(self) -> bool:
        group = next(path for path in self.service.parts() if path.endswith("/announcement"))
        resolver = next(path for path in self.proxy.parts() if path.endswith("/resolver"))
        asked = await asyncio.gather(
            self.registry.ask("/root/node/registry/table"),
            self.service.ask("/root/node/link"),
            self.service.ask(group),
            self.proxy.ask("/root/node/link"),
            self.proxy.ask(resolver),
        )
        if None in asked:
            return False
        table, our_link, announcement, their_link, found = (dict(each or {}) for each in asked)
        answers = announcement["registries"].values()
        return (
            table["instances"] >= 1
            and our_link["live"]
            and bool(answers)
            and all(each["registered"] for each in answers)
            and their_link["live"]
            and found["registry"]
            and found["usable"] == 1
        )

    def counts(self) -> Counts:
        actors = sum(program.runtime.actor_count for program in self.programs)
        return Counts(actors, len(asyncio.all_tasks()), descriptors())

    async def baseline(self, counts: Counts) -> None:
        """Until there is no more than there was."""
        try:
            await self.until(lambda: self.counts() == counts, "the baseline")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.counts()}, not {counts}") from None

    def calm(self) -> None:
        """As after a quiet time: what has failed up to now counts no more."""
        for program in self.programs:
            for path in program.runtime.tree():
                actor = program.runtime.cell(path).actor
                if isinstance(actor, Supervisor):
                    actor._restarts.clear()
                    for child in actor._children.values():
                        child.failures = 0

    # Transfers

    async def open(self, count: int, size: int) -> None:
        """Until so many transfers run, and have moved so many bytes each way."""
        new = [
            await self.transfers.connect(self.port) for _ in range(count - len(self.transfers.open))
        ]
        await self.until(lambda: all(each.server for each in new), "the service was reached")
        for each in new:
            each.push(size)
        await self.until(lambda: all(each.level for each in new), "the bytes of new transfers")
        self.transfers.open += new

    async def finish(self, keep: int = 0) -> None:
        """End all that run but so many, in order: both ends have got the whole."""
        ending = self.transfers.open[keep:]
        del self.transfers.open[keep:]
        for each in ending:
            each.judge()
            assert each.level
            each.client.end()
        await self.until(
            lambda: all(each.servers[-1].ended for each in ending), "the clients' ends"
        )
        for each in ending:
            each.servers[-1].end()
        await self.until(lambda: all(each.client.ended for each in ending), "the services' ends")
        for each in ending:
            for end in (each.client, each.servers[-1]):
                end.transport.close()
        await self.until(lambda: all(each.dead for each in ending), "the ends are closed")
        for each in ending:
            assert each.level
            assert (each.client.error, each.servers[-1].error) == (None, None)
            self.transfers.forget(each)


# Faults


class Sabotage(Exception):
    """What a handler or a task was made to raise."""


class _InHandler:
    pass


class _InTask:
    pass


class _Stuck:
    pass


def _raise(_actor: Actor, _message: object, _sender: object) -> None:
    raise Sabotage("in a handler")


def _raise_later(actor: Actor, _message: object, _sender: object) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise Sabotage("in a task")

    actor.run(fail())


def _get_stuck(actor: Actor, _message: object, _sender: object) -> None:
    actor.run(asyncio.Event().wait())


_SABOTAGE = {_InHandler: _raise, _InTask: _raise_later, _Stuck: _get_stuck}


def _say(program: Program, path: str, kind: type) -> None:
    """Give one living actor handlers that it does not have, and send it what they are for."""
    cell = program.runtime.cell(path)
    actor: Any = cell.actor
    vars(actor)["_handlers"] = {**actor._handlers, **_SABOTAGE}
    program.runtime.tell(cell.address, kind())


def kill(program: Program, path: str) -> None:
    program.runtime.kill(path)


def crash_in_handler(program: Program, path: str) -> None:
    _say(program, path, _InHandler)


def crash_in_task(program: Program, path: str) -> None:
    _say(program, path, _InTask)


def get_stuck(program: Program, path: str) -> None:
    """Start work that never ends."""
    _say(program, path, _Stuck)


def _child_of(program: Program, path: str) -> Any:
    above, _, name = path.rpartition("/")
    supervisor: Any = program.runtime.cell(above).actor
    return supervisor._children[name]


def kill_and_hang(program: Program, path: str) -> None:
    """Kill it. Its first successor never gets ready, though it does all else; a supervisor's
    does nothing at all. It has `HANGS` seconds for that."""
    child = _child_of(program, path)
    spec: ChildSpec = child.spec
    silent: dict[str, Any] = {"ready": lambda _self: None}
    if issubclass(spec.actor, Supervisor):
        silent["on_start"] = lambda _self, _args: None
    hanging: Any = type(f"Hanging{spec.actor.__name__}", (spec.actor,), silent)
    child.spec = replace(spec, actor=hanging, wait_ready=HANGS)

    def heal() -> None:
        if child.spec is not spec:
            program.runtime.at_death[path] = lambda: setattr(child, "spec", spec)

    # The first death is that of the one that lives now.
    program.runtime.at_death[path] = chain(program.runtime.at_death.pop(path, _nothing), heal)
    kill(program, path)


def chain(*calls: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        for each in calls:
            each()

    return call


def refuse_to_stop(program: Program, path: str) -> None:
    """From now on it does nothing when it is asked to stop, for which it has `HANGS` seconds."""
    actor: Any = program.runtime.cell(path).actor
    vars(actor)["on_stop"] = lambda _reason: None
    child = _child_of(program, path)
    spec: ChildSpec = child.spec
    child.spec = replace(spec, shutdown=HANGS)
    program.runtime.at_death[path] = lambda: setattr(child, "spec", spec)


def terminate(program: Program, path: str) -> None:
    """Have its supervisor stop it."""
    above, _, name = path.rpartition("/")
    program.runtime.tell(program.runtime.cell(above).address, TerminateChild(name))


def elder_of(program: Program, path: str) -> str:
    """Whose failure makes a supervisor stop this actor: its next elder sibling, or that of the
    supervisor above."""
    above = path.rpartition("/")[0]
    parts = program.parts()
    supervisor, child = parts[path]
    index = supervisor.children.index(child)
    if supervisor.strategy == "rest_for_one" and index:
        return f"{above}/{supervisor.children[index - 1].id}"
    return elder_of(program, above)


# What a client sees that connects in the very moment


def probe(port: int) -> socket.socket | None:
    """A TCP connection to the port, begun now; None if it was refused."""
    client = socket.socket()
    client.setblocking(False)
    error = client.connect_ex(("127.0.0.1", port))
    if error == errno.ECONNREFUSED:
        client.close()
        return None
    assert error in (0, errno.EINPROGRESS), errno.errorcode[error]
    return client


def ours() -> Counter[str]:
    """Living objects of this program's classes, by class."""
    gc.collect()
    return Counter(
        f"{type(each).__module__}.{type(each).__qualname__}"
        for each in gc.get_objects()
        if type(each).__module__.startswith("hyperseaport.")
    )


def resident() -> int:
    """Bytes of memory that the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
