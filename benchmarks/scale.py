#!/usr/bin/env python3
"""DHT networks of many nodes on the virtual clock: hops and messages per lookup, as Markdown.

    benchmarks/scale.py [NODES ...]      100, 1,000 and 10,000 unless given

The nodes are those of the programs; only sockets and the clock are simulated. A network is not
grown by one join after the other, which would take the square of its size: each node starts as a
persistent node that knows who it is (the virtual network has no NAT to find out about), and its
table is filled from the list of all nodes, each row with up to 20 of the nodes that belong there,
chosen at random; that is what a table of a network that has run for long looks like. Then virtual
seconds pass in which the nodes' own bookkeeping is at work, and after these, lookups of random
targets from random nodes are counted, each until it is over.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from bisect import bisect_left
from dataclasses import dataclass
from random import Random

from hyperseaport.testing.network import Host, Link, Network
from hyperseaport.transport.dht import wire
from hyperseaport.transport.dht.addresses import node_id
from hyperseaport.transport.dht.node import Node, NodeConfig
from hyperseaport.transport.dht.query import Query
from hyperseaport.transport.dht.table import ROWS, Contact, K
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET, Address

SEED = 7
PORT = 49737
CLIENT_PORT = 50000
LINK = Link(delay=0.02, jitter=0.02)
#: Virtual seconds between the start and the first lookup, and in which a lookup has to end.
SETTLE = 5.0
PATIENCE = 60.0
LOOKUPS = 200
#: Virtual seconds between the beginnings of two lookups.
SPACING = 0.01
#: The tick at which the nodes learned of each other: the first ticks of a node are 51 to 100.
LONG_AGO = -400


@dataclass(slots=True)
class Lookup:
    """One lookup: hops to the last of the closest nodes, answers, its datagrams, virtual seconds,
    and the share of the 20 truly closest nodes that it found."""

    hops: int
    answers: int
    datagrams: int
    seconds: float
    found: float


class Search:
    """A lookup under way."""

    def __init__(self, node: Node, target: bytes, now: float) -> None:
        self.node = node
        self.target = target
        self.requests = 0
        self.query: Query | None = None
        self._answers = 0
        self._depth = {contact.address: 1 for contact in node.table.nearest(target)}
        self._begin = self._end = now
        node.query(
            target, wire.FIND_NODE, now, internal=True, on_reply=self._answered,
            on_done=self._ended,
        )  # fmt: skip

    def result(self, truth: list[Address]) -> Lookup:
        assert self.query is not None
        closest = [reply.source for reply in self.query.closest]
        return Lookup(
            hops=max(self._depth[address] for address in closest),
            answers=self._answers,
            datagrams=self.requests + self._answers,
            seconds=self._end - self._begin,
            found=len(set(truth).intersection(closest)) / len(truth),
        )

    def _answered(self, reply: wire.Reply, now: float) -> None:
        self._answers += 1
        hop = self._depth[reply.source] + 1
        for address in reply.closer_nodes:
            self._depth[address] = min(hop, self._depth.get(address, hop))

    def _ended(self, query: Query, now: float) -> None:
        self.query = query
        self._end = now


class World:
    """A network of `size` nodes that has just come to rest."""

    def __init__(self, size: int) -> None:
        self.rng = Random(SEED)
        self.network = Network(self.rng, LINK)
        addresses = [_address(number) for number in range(size)]
        self.everybody = sorted((node_id(address), address) for address in addresses)
        self.members = [self._start(address) for address in addresses]
        for node, _ in self.members:
            self._fill(node)
        self.network.run(until=SETTLE)
        assert all(node.ready for node, _ in self.members)

    def lookups(self, count: int) -> list[Lookup]:
        """Random targets, looked up by random nodes, one every `SPACING` seconds."""
        searches: dict[bytes, Search] = {}

        def counted(datagram: bytes, source: Address, destination: Address) -> bool:
            if datagram[0] == wire.REQUEST:
                request = wire.decode_request(datagram, SERVER_SOCKET, source)
                search = searches.get(request.target or b"")
                if search is not None:
                    search.requests += 1
            return False

        self.network.link.drop = counted
        for _ in range(count):
            target = self.rng.randbytes(32)
            node, host = self.rng.choice(self.members)
            searches[target] = Search(node, target, self.network.now)
            self.network.poke(host)
            self.network.run(until=self.network.now + SPACING)
        every = list(searches.values())
        limit = self.network.now + PATIENCE
        if not self.network.run(until=limit, done=lambda: all(each.query for each in every)):
            raise RuntimeError(f"a lookup did not end within {PATIENCE} s")
        return [each.result(self._closest(each.target, each.node)) for each in every]

    def chatter(self) -> float:
        """Requests of the nodes' own bookkeeping so far, per node and virtual second."""
        total = sum(node.stats.requests for node, _ in self.members)
        return total / len(self.members) / self.network.now

    def _start(self, address: Address) -> tuple[Node, Host]:
        node = Node(NodeConfig(public_address=address), Random(f"{SEED} {address[0]}"))
        node.start(self.network.now, server_port=PORT, client_port=CLIENT_PORT)
        sockets = {SERVER_SOCKET: address, CLIENT_SOCKET: (address[0], CLIENT_PORT)}
        return node, self.network.attach(node, sockets)

    def _fill(self, node: Node) -> None:
        # Ids are sorted, so the nodes of a row stand side by side: they share a prefix.
        own = int.from_bytes(node.id)
        for row in range(ROWS):
            width = ROWS - row - 1
            first = (own >> width ^ 1) << width
            low = self._place(first)
            high = self._place(first + (1 << width))
            members = range(low, high)
            for place in self.rng.sample(members, min(K, len(members))):
                found, address = self.everybody[place]
                contact = Contact(found, address, LONG_AGO)
                contact.seen = contact.pinged = self.rng.randint(1, 50)
                node.table.add(contact)
            own_side = own >> width << width
            if self._place(own_side + (1 << width)) - self._place(own_side) == 1:
                return

    def _place(self, id: int) -> int:  # noqa: A002
        if id >= 1 << ROWS:
            return len(self.everybody)
        return bisect_left(self.everybody, id.to_bytes(32), key=lambda entry: entry[0])

    def _closest(self, target: bytes, asker: Node) -> list[Address]:
        value = int.from_bytes(target)
        others = (entry for entry in self.everybody if entry[0] != asker.id)
        ranked = sorted(others, key=lambda entry: int.from_bytes(entry[0]) ^ value)
        return [address for _, address in ranked[:K]]


def _address(number: int) -> Address:
    return f"20.{number >> 16}.{number >> 8 & 255}.{number & 255}", PORT


def section(sizes: list[int]) -> str:
    """The table, as a section of docs/performance.md."""
    head = ["nodes", "hops", "most hops", "requests answered", "datagrams", "virtual ms",
            "of the 20 closest found", "known to a node", "chatter, requests/s per node",
            "real s"]  # fmt: skip
    rows = [head, ["---:"] * len(head)]
    for size in sizes:
        begin = time.perf_counter()
        gc.disable()  # millions of objects that all stay
        world = World(size)
        chatter = world.chatter()
        lookups = world.lookups(LOOKUPS)
        seconds = time.perf_counter() - begin
        rows.append([
            f"{size:,}",
            f"{statistics.mean(each.hops for each in lookups):.2f}",
            f"{max(each.hops for each in lookups)}",
            f"{statistics.mean(each.answers for each in lookups):.1f}",
            f"{statistics.mean(each.datagrams for each in lookups):.1f}",
            f"{statistics.median(each.seconds for each in lookups) * 1e3:.0f}",
            f"{statistics.mean(each.found for each in lookups):.1%}",
            f"{statistics.mean(len(node.table) for node, _ in world.members):.0f}",
            f"{chatter:.2f}",
            f"{seconds:.0f}",
        ])  # fmt: skip
        del world
        gc.enable()
        gc.collect()
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"## Networks on the virtual clock\n\n{TEXT}\n\n{table}"


TEXT = f"""\
{LOOKUPS} lookups of random targets from random nodes, links of {LINK.delay * 1e3:.0f} to
{(LINK.delay + LINK.jitter) * 1e3:.0f} ms without loss, seed {SEED}. Hops: how many nodes had to be
asked, each named by the one before, to hear of the last of the closest, and to hear from it.
Datagrams are requests and responses of one lookup; chatter is what the nodes ask on their own.
Tables are filled from the list of all nodes as a long-lived network's are, not by one join after
the other (benchmarks/scale.py)."""


if __name__ == "__main__":
    print(section([int(size) for size in sys.argv[1:]] or [100, 1000, 10_000]))
