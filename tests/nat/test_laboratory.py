"""The laboratory itself: its routers do what their names say, and it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.laboratory import ROUND_TRIP, Host, Kind, Laboratory, NotPermitted, Site

#: Seconds in which a datagram has come, or never will.
PATIENCE = 0.5
PORT = 4000


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    laboratory = Laboratory()
    yield laboratory
    laboratory.close()


@pytest.fixture(scope="module")
def servers(laboratory: Laboratory) -> Iterator[list[socket.socket]]:
    """Two public hosts, which are asked in this order."""
    with udp(laboratory.host()) as one, udp(laboratory.host()) as other:
        yield [one, other]


@pytest.fixture
def site(request: pytest.FixtureRequest, laboratory: Laboratory) -> Site:
    return laboratory.site(request.param)


def udp(host: Host, port: int = PORT, ttl: int = 64) -> socket.socket:
    with host.entered():
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((host.address, port))
    made.settimeout(PATIENCE)
    made.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
    return made


def arrives(sender: socket.socket, to: tuple[str, int], receiver: socket.socket) -> tuple[str, int]:
    """Where a datagram seems to come from; TimeoutError if it does not come."""
    sender.sendto(b"ask", to)
    data, source = receiver.recvfrom(100)
    assert data == b"ask"
    return source[0], source[1]


def mapping(client: socket.socket, server: socket.socket) -> tuple[str, int]:
    """The client's address as the server sees it, to which an answer comes back."""
    source = arrives(client, server.getsockname(), server)
    assert arrives(server, source, client) == server.getsockname()
    return source


def of(*kinds: Kind) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("site", kinds, indirect=True)


def test_a_round_trip_takes_what_it_should(
    laboratory: Laboratory, servers: list[socket.socket]
) -> None:
    with udp(laboratory.host()) as client:
        took = []
        for _ in range(5):
            begin = time.perf_counter()
            mapping(client, servers[0])
            took.append(time.perf_counter() - begin)
    assert ROUND_TRIP <= min(took) < ROUND_TRIP * 1.5, took


@of("open", "consistent", "cgnat", "lan")
def test_a_consistent_router_keeps_the_port(site: Site, servers: list[socket.socket]) -> None:
    with udp(site.hosts[0]) as client:
        assert [mapping(client, each) for each in servers] == [(site.public, PORT)] * 2


@of("random")
def test_a_random_router_takes_a_port_for_each_destination(
    site: Site, servers: list[socket.socket]
) -> None:
    with udp(site.hosts[0]) as client:
        seen = [mapping(client, each) for each in servers]
        again = mapping(client, servers[0])
    assert {host for host, _ in seen} == {site.public}
    assert len({PORT, *(port for _, port in seen)}) == 3
    assert again == seen[0]


@of("consistent", "random", "cgnat", "lan")
def test_what_was_not_asked_for_is_dropped_without_a_trace(
    site: Site, servers: list[socket.socket]
) -> None:
    asked, stranger = servers
    with udp(site.hosts[0], port=PORT + 1) as client:
        # Before there is any mapping: the port must still be free for one afterwards.
        with pytest.raises(TimeoutError):
            arrives(stranger, (site.public, PORT + 1), client)
        source = mapping(client, asked)
        assert source[1] == PORT + 1 or site.kind == "random"
        with pytest.raises(TimeoutError):
            arrives(stranger, source, client)


@of("udp-blocked")
def test_nothing_passes_where_udp_is_blocked(site: Site, servers: list[socket.socket]) -> None:
    with udp(site.hosts[0]) as client, pytest.raises(TimeoutError):
        arrives(client, servers[0].getsockname(), servers[0])


@of("consistent", "cgnat")
def test_a_datagram_of_few_hops_opens_the_own_router_only(
    site: Site, servers: list[socket.socket]
) -> None:
    with udp(site.hosts[0], port=PORT + 2, ttl=5) as client:
        with pytest.raises(TimeoutError):
            arrives(client, servers[0].getsockname(), servers[0])
        arrives(servers[0], (site.public, PORT + 2), client)


@of("random")
def test_a_reboot_forgets_mappings(site: Site, servers: list[socket.socket]) -> None:
    with udp(site.hosts[0], port=PORT + 3) as client:
        before = mapping(client, servers[0])
        site.reboot()
        with pytest.raises(TimeoutError):
            arrives(servers[0], before, client)
        assert mapping(client, servers[0]) != before


@of("consistent")
def test_a_mapping_is_forgotten_in_time(site: Site, servers: list[socket.socket]) -> None:
    site.mapping_timeout(1)
    with udp(site.hosts[0], port=PORT + 4) as client:
        before = mapping(client, servers[0])
        time.sleep(2.5)  # the kernel looks once a second
        with pytest.raises(TimeoutError):
            arrives(servers[0], before, client)


@of("lan", "lan-hairpin")
def test_hosts_of_one_lan_see_each_other(site: Site, servers: list[socket.socket]) -> None:
    with udp(site.hosts[0], port=PORT + 5) as one, udp(site.hosts[1], port=PORT + 6) as other:
        assert arrives(one, other.getsockname(), other) == one.getsockname()
        for each in (one, other):
            mapping(each, servers[0])
        public = (site.public, PORT + 6)
        if site.kind == "lan-hairpin":
            assert arrives(one, public, other) == (site.public, PORT + 5)
            assert arrives(other, (site.public, PORT + 5), one) == public
        else:
            with pytest.raises(TimeoutError):
                arrives(one, public, other)


def test_loss_is_imposed(servers: list[socket.socket], laboratory: Laboratory) -> None:
    laboratory.impose(loss=1.0, round_trip=ROUND_TRIP)
    try:
        with pytest.raises(TimeoutError):
            arrives(servers[0], servers[1].getsockname(), servers[1])
    finally:
        laboratory.impose(loss=0.0, round_trip=ROUND_TRIP)
    arrives(servers[0], servers[1].getsockname(), servers[1])


def test_it_is_cut_off_from_this_machine(laboratory: Laboratory) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
        here.bind(("127.0.0.1", 0))
        here.settimeout(PATIENCE)
        with laboratory.host().entered():
            inside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with inside:
            inside.sendto(b"out", here.getsockname())
            with pytest.raises(TimeoutError):
                here.recv(100)


SLEEPER = """
import subprocess, sys
sys.path.insert(0, sys.argv[1])
from support.laboratory import Laboratory
laboratory = Laboratory()
with laboratory.site("cgnat").hosts[0].entered():
    sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(sleeper.pid, flush=True)
input()
"""


def test_nothing_is_left_when_its_owner_is_killed() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(Path(__file__).parents[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        assert owner.stdout is not None
        sleeper = int(owner.stdout.readline())
        assert Path(f"/proc/{sleeper}").exists()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    end = time.monotonic() + 5
    while _runs(sleeper) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(sleeper)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_laboratories_do_not_meet(laboratory: Laboratory) -> None:
    other = Laboratory()
    try:
        one, two = laboratory.host(), other.host()
        with (
            udp(one, port=PORT + 7) as ours,
            udp(two, port=PORT + 7) as theirs,
            pytest.raises(TimeoutError),
        ):
            arrives(ours, theirs.getsockname(), theirs)
    finally:
        other.close()


def test_whoever_may_not_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotPermitted, match="needs root"):
        Laboratory()
