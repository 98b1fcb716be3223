"""A network on the virtual clock, with hosts that note what they get."""

from __future__ import annotations

import time
from random import Random

import pytest

from hyperseaport.testing.network import Bursts, Faults, Host, Link, Network, datagrams
from hyperseaport.transport.transmit import Address, Transmit


class Noter:
    """Sends what it is told to, and notes what arrives and when it is woken."""

    def __init__(self) -> None:
        self.got: list[tuple[float, bytes]] = []
        self.outbox: list[Transmit] = []
        self.wakes: list[float] = []
        self.alarm: float | None = None

    def receive(self, datagram: bytes, socket: int, source: Address, now: float) -> None:
        self.got.append((now, datagram))

    def transmits(self, now: float) -> list[Transmit]:
        outbox, self.outbox = self.outbox, []
        return outbox

    def deadline(self) -> float | None:
        return self.alarm

    def on_deadline(self, now: float) -> None:
        self.wakes.append(now)
        self.alarm = None


class Lan:
    """Some hosts at 10.0.0.1 and so on."""

    def __init__(self, count: int = 2, link: Link | None = None) -> None:
        self.network = Network(Random(1), link or Link(delay=0.5))
        self.cores = [Noter() for _ in range(count)]
        self.hosts: tuple[Host, ...] = tuple(
            self.network.attach(core, {0: address(number)})
            for number, core in enumerate(self.cores)
        )

    def send(self, source: int, destination: int, *pieces: bytes, segment: int = 0) -> None:
        transmit = Transmit(0, address(destination), pieces, segment)
        self.cores[source].outbox.append(transmit)
        self.network.poke(self.hosts[source])

    def got(self, number: int) -> list[bytes]:
        return [datagram for _, datagram in self.cores[number].got]


def address(number: int) -> Address:
    return ("10.0.0.1", 1 + number)


def test_a_datagram_takes_the_links_delay() -> None:
    lan = Lan()
    lan.send(0, 1, b"one ", b"piece")
    assert lan.network.run()
    assert lan.cores[1].got == [(0.5, b"one piece")]
    assert lan.network.delivered == 1


def test_a_run_arrives_as_datagrams() -> None:
    lan = Lan()
    lan.send(0, 1, b"abc", b"def", b"g", segment=3)
    lan.network.run()
    assert lan.got(1) == [b"abc", b"def", b"g"]
    assert datagrams(Transmit(0, address(1), ())) == [b""]


def test_deadlines_are_kept() -> None:
    lan = Lan()
    lan.cores[0].alarm = 3.25
    lan.network.poke(lan.hosts[0])
    lan.network.run()
    assert lan.cores[0].wakes == [3.25]


def test_one_direction_may_have_a_link_of_its_own() -> None:
    lan = Lan(3)
    slow = lan.network.path(lan.hosts[0], lan.hosts[1], Link(delay=2.0))
    for source, destination in ((0, 1), (1, 0), (0, 2)):
        lan.send(source, destination, b"x")
    lan.network.run()
    assert [core.got[0][0] for core in lan.cores] == [0.5, 2.0, 0.5]
    assert slow.stats.sent == 1
    assert lan.network.path(lan.hosts[0], lan.hosts[1]) is slow


def test_a_path_without_a_link_counts_apart() -> None:
    lan = Lan()
    lan.network.link.loss = 1.0
    there = lan.network.path(lan.hosts[0], lan.hosts[1])
    for _ in range(3):
        lan.send(0, 1, b"x")
    lan.send(1, 0, b"x")
    lan.network.run()
    assert (there.stats.sent, there.stats.lost) == (3, 3)
    assert lan.network.lost == 4


def test_each_direction_has_its_queue() -> None:
    link = Link(delay=0.0, bandwidth=128.0, queue=128, bursts=Bursts(begin=0.0))
    lan = Lan(3, link)
    for destination in (1, 2):
        for _ in range(2):
            lan.send(0, destination, bytes(100))
    lan.network.run()
    for number in (1, 2):
        assert [when for when, _ in lan.cores[number].got] == [1.0]
    assert lan.network.lost == 2


def test_directions_may_share_a_bottleneck() -> None:
    lan = Lan(3)
    bottleneck = Faults(Link(delay=0.0, bandwidth=128.0), Random(1))
    hub, *spokes = lan.hosts
    lan.network.share(bottleneck, [(hub, spoke) for spoke in spokes])
    for destination in (1, 2):
        lan.send(0, destination, bytes(100))
    lan.network.run()
    assert [core.got[0][0] for core in lan.cores[1:]] == [1.0, 2.0]
    assert bottleneck.stats.sent == 2


def test_a_partition_cuts_both_ways_until_it_is_healed() -> None:
    lan = Lan(3)
    lan.send(0, 1, b"before")
    lan.network.run(until=0.1)
    lan.network.partition(lan.hosts[:1], lan.hosts[1:])
    for source, destination in ((0, 1), (1, 0), (1, 2)):
        lan.send(source, destination, b"during")
    lan.network.run()
    assert [lan.got(number) for number in range(3)] == [[], [b"before"], [b"during"]]
    assert lan.network.lost == 2
    lan.network.heal()
    lan.send(0, 1, b"after")
    lan.network.run()
    assert lan.got(1)[-1] == b"after"


def test_who_is_taken_off_hears_and_says_nothing_more() -> None:
    lan = Lan(2)
    lan.network.path(lan.hosts[0], lan.hosts[1])
    lan.send(0, 1, b"under way")
    lan.network.run(until=0.1)
    lan.cores[1].alarm = 1.0
    lan.network.poke(lan.hosts[1])
    lan.network.run(until=0.2)
    lan.send(1, 0, b"never sent")
    lan.network.detach(lan.hosts[1])
    lan.network.run()
    assert lan.got(0) == lan.got(1) == []
    assert lan.cores[1].wakes == []
    assert lan.network.lost == 1
    again = Noter()
    lan.network.attach(again, {0: address(1)})
    lan.send(0, 1, b"to the next one there")
    lan.network.run()
    assert [datagram for _, datagram in again.got] == [b"to the next one there"]


def test_an_address_has_one_host() -> None:
    lan = Lan(1)
    with pytest.raises(ValueError, match="taken"):
        lan.network.attach(Noter(), {0: ("10.0.0.9", 9), 1: address(0)})
    lan.network.attach(Noter(), {0: ("10.0.0.9", 9)})


def test_what_has_no_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperseaport.testing.network.MAX_STEPS", 100)
    network = Network(Random(1))

    def again() -> None:
        network.at(network.now, again)

    again()
    with pytest.raises(RuntimeError, match="no end"):
        network.run()


def test_ten_thousand_hosts_come_and_go() -> None:
    """With a list of hosts this takes minutes."""
    began = time.perf_counter()
    network = Network(Random(1))
    hosts = [network.attach(Noter(), {0: (f"h{number}", 1)}) for number in range(10_000)]
    for host in hosts:
        noter = host.core
        assert isinstance(noter, Noter)
        noter.outbox.append(Transmit(0, ("h1", 1), (b"x",)))
        noter.alarm = 1.0
        network.poke(host)
    network.run(until=0.5)
    assert network.delivered == 10_000
    for host in hosts:
        network.detach(host)
    assert time.perf_counter() - began < 20
