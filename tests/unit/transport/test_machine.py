"""What a program learns of its machine; the machine's own answers are replaced, but where said."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from hyperseaport.transport import machine as module
from hyperseaport.transport.machine import Machine, calendar_of, clock_of, local_hosts


def test_local_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_hosts("192.168.7.7") == ("192.168.7.7",)
    monkeypatch.setattr(module, "_interface_hosts", lambda: ["10.1.1.1", "10.2.2.2", "10.1.1.1"])
    assert local_hosts("0.0.0.0") == ("10.1.1.1", "10.2.2.2")
    monkeypatch.setattr(module, "_interface_hosts", list)
    assert local_hosts("0.0.0.0") == ("127.0.0.1",)


def test_local_hosts_of_this_machine() -> None:
    for host in local_hosts("0.0.0.0"):
        socket.inet_aton(host)


@pytest.mark.parametrize(
    ("hosts", "found"), [(["127.0.1.1", "10.3.3.3"], ["10.3.3.3"]), (None, [])]
)
def test_local_hosts_of_other_systems(
    monkeypatch: pytest.MonkeyPatch, hosts: list[str] | None, found: list[str]
) -> None:
    def lookup(_name: str) -> tuple[str, list[str], list[str]]:
        if hosts is None:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return "name", [], hosts

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("socket.gethostbyname_ex", lookup)
    assert list(module._interface_hosts()) == found


async def test_the_clock_of_a_loop() -> None:
    """Where the loop's own is coarse, a finer one of the same hours."""
    own = asyncio.get_running_loop()
    assert clock_of(own) is time.monotonic

    class Coarse(asyncio.AbstractEventLoop):
        def time(self) -> float:
            return round(own.time(), 3)

    coarse = Coarse()  # type: ignore[abstract]
    assert clock_of(coarse) is time.monotonic
    assert abs(clock_of(coarse)() - coarse.time()) < 0.1

    class Virtual(asyncio.SelectorEventLoop):
        def time(self) -> float:
            return 42.0

    virtual = Virtual()
    assert clock_of(virtual)() == 42.0
    virtual.close()


def test_the_calendar_of_a_clock() -> None:
    before = time.monotonic()
    assert calendar_of(time.monotonic)() >= before
    virtual = lambda: 42.0  # noqa: E731
    assert calendar_of(virtual) is virtual


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_calendars_of_systems(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("time.time", lambda: 1e9)
    monkeypatch.setattr("time.clock_gettime", lambda clock: {time.CLOCK_BOOTTIME: 7.0}[clock])
    assert calendar_of(time.monotonic)() == (7.0 if platform == "linux" else 1e9)


def test_sleep_is_what_the_clock_did_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calendar = 10.0, 500.0
    monkeypatch.setattr(module, "calendar_of", lambda _clock: lambda: calendar)
    machine = Machine("127.0.0.1", lambda: clock)
    clock, calendar = 15.0, 505.0
    assert machine.slept(clock) == 0.0
    clock, calendar = 20.0, 4110.0
    assert machine.slept(clock) == 3600.0
    clock, calendar = 25.0, 4115.0
    assert machine.slept(clock) == 0.0
    # A wall clock that is set back.
    clock, calendar = 30.0, 1000.0
    assert machine.slept(clock) == 0.0
    clock, calendar = 35.0, 1005.0
    assert machine.slept(clock) == 0.0


class Interfaces:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hosts = ["10.0.0.1"]
        self.route: str | None = "10.0.0.1"
        monkeypatch.setattr(module, "_interface_hosts", lambda: list(self.hosts))
        monkeypatch.setattr(module, "_route", lambda: self.route)


def test_another_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    interfaces = Interfaces(monkeypatch)
    machine = Machine("0.0.0.0", time.monotonic)
    assert machine.look() is None
    interfaces.hosts.append("172.17.0.1")  # a bridge for containers, say
    assert machine.look() is False
    assert machine.hosts == ("10.0.0.1", "172.17.0.1")
    interfaces.hosts, interfaces.route = ["192.168.7.7", "172.17.0.1"], "192.168.7.7"
    assert machine.look() is True
    assert machine.hosts == ("192.168.7.7", "172.17.0.1")
    assert machine.look() is None
    interfaces.hosts, interfaces.route = [], None
    assert machine.look() is True
    assert machine.look() is None
    # A LAN without a way out of it.
    interfaces.hosts = ["10.0.0.1"]
    assert machine.look() is True
    interfaces.hosts = ["10.0.0.1", "10.0.0.2"]
    assert machine.look() is False
    interfaces.hosts = ["10.0.0.2"]
    assert machine.look() is True


def test_where_listing_addresses_is_slow_the_route_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interfaces = Interfaces(monkeypatch)
    machine = Machine("0.0.0.0", time.monotonic)
    monkeypatch.setattr("sys.platform", "darwin")
    interfaces.hosts = ["10.0.0.2"]
    assert machine.look() is None
    interfaces.route = "10.0.0.2"
    assert machine.look() is True


def test_a_node_at_one_address_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces = Interfaces(monkeypatch)
    machine = Machine("127.0.0.1", time.monotonic)
    interfaces.hosts, interfaces.route = [], None
    assert machine.look() is None
    assert machine.hosts == ("127.0.0.1",)


def test_this_machine() -> None:
    machine = Machine("0.0.0.0", time.monotonic)
    assert machine.look() is None
    assert machine.slept(time.monotonic()) < 1.0
    route = module._route()
    assert route is None or socket.inet_aton(route)
