from __future__ import annotations

from random import Random

from hyperseaport.transport.dht import sockets as limits
from hyperseaport.transport.dht.sockets import Sockets
from hyperseaport.transport.dht.timers import Timers
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET
from hyperseaport.transport.udx.mux import Mux


class Fixture:
    def __init__(self) -> None:
        self.timers = Timers()
        self.sockets = Sockets(self.timers)
        self.mux = Mux(Random(1))
        self.now = 0.0

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while (when := self.timers.deadline()) is not None and when <= end:
            self.now = when
            self.timers.run(when)
        self.now = end


def test_the_shell_is_told_once() -> None:
    sockets = Fixture().sockets
    assert not sockets.changed
    first, second = sockets.open(), sockets.open()
    assert (first, second) == (2, 3)
    assert bool(sockets.changed)
    assert sockets.opened() == [2, 3]
    assert sockets.opened() == []
    sockets.close(2)
    sockets.close(2)
    assert sockets.closed() == [2]
    assert not sockets.changed
    assert len(sockets) == 1


def test_what_is_closed_before_it_was_opened_never_was() -> None:
    sockets = Fixture().sockets
    socket = sockets.open()
    assert socket is not None
    sockets.close(socket)
    assert not sockets.changed
    assert sockets.open() == socket + 1


def test_main_sockets_are_never_closed() -> None:
    fixture = Fixture()
    for socket in (SERVER_SOCKET, CLIENT_SOCKET):
        assert fixture.sockets.usable(socket)
        fixture.sockets.hold(socket, fixture.mux.create(), 0.0)
        fixture.sockets.close(socket)
    assert not fixture.sockets.changed
    assert fixture.timers.deadline() is None


def test_there_is_a_limit() -> None:
    sockets = Fixture().sockets
    opened = [sockets.open() for _ in range(limits.MAX_SOCKETS + 2)]
    assert opened[-2:] == [None, None]
    assert opened[-3] is not None
    sockets.close(opened[0] or 0)
    assert sockets.open() is not None


def test_a_socket_outlives_its_streams() -> None:
    fixture = Fixture()
    sockets = fixture.sockets
    socket = sockets.open()
    assert socket is not None
    sockets.opened()
    streams = [fixture.mux.create() for _ in range(3)]
    for stream in streams[:2]:
        sockets.hold(socket, stream, 0.0)
    sockets.close(socket)
    streams[0].destroy(0.0)
    fixture.wait(60)
    assert sockets.usable(socket)
    streams[1].destroy(fixture.now)
    fixture.wait(limits.LINGER)
    assert sockets.usable(socket)
    # Somebody connects over it again.
    sockets.hold(socket, streams[2], fixture.now)
    fixture.wait(60)
    assert sockets.usable(socket)
    streams[2].destroy(fixture.now)
    fixture.wait(limits.LINGER + 5)
    assert not sockets.usable(socket)
    assert sockets.closed() == [socket]
    assert fixture.timers.deadline() is None


def test_a_socket_that_could_not_be_opened() -> None:
    fixture = Fixture()
    socket = fixture.sockets.open()
    assert socket is not None
    fixture.sockets.opened()
    fixture.sockets.failed(socket)
    assert not fixture.sockets.usable(socket)
    assert len(fixture.sockets) == 0
    fixture.sockets.hold(socket, fixture.mux.create(), 0.0)
    assert fixture.timers.deadline() is None
