"""Which datagrams the kernel may cut: those that say so, and no others."""

from __future__ import annotations

import socket
from typing import Any

from hyperseaport.transport.transmit import Address, Buffer, Transmit
from hyperseaport.transport.udp import UdpSocket

HOST = "127.0.0.1"
#: Linux: IP_MTU_DISCOVER, and its values that clear and set "don't fragment".
DISCOVER, DONT, PROBE = 10, 0, 3


class Watched:
    """A real socket that notes the option's value at each send, as the kernel tells it."""

    def __init__(self, real: socket.socket, error: OSError | None = None) -> None:
        self.real = real
        self.error = error
        self.values: list[int] = []

    def sendmsg(self, buffers: tuple[Buffer, ...], about: Any, flags: int, to: Address) -> int:
        self.values.append(self.value)
        if self.error is not None:
            raise self.error
        return self.real.sendmsg(buffers, about, flags, to)

    @property
    def value(self) -> int:
        return self.real.getsockopt(socket.IPPROTO_IP, DISCOVER)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def watched(udp: UdpSocket, error: OSError | None = None) -> Watched:
    watch = Watched(udp._socket, error)
    udp._socket = watch  # type: ignore[assignment]
    return watch


async def test_only_what_may_be_fragmented_leaves_without_the_flag() -> None:
    udp = UdpSocket(HOST, 0, lambda *_: None, lambda: None)
    watch = watched(udp)
    for may_fragment in (False, True, False):
        udp.send(Transmit(0, udp.address, (bytes(1472),), 0, may_fragment))
    udp.send(Transmit(0, udp.address, (bytes(100), bytes(100)), 100))
    assert watch.values == [PROBE, DONT, PROBE, PROBE]
    assert watch.value == PROBE
    assert udp.dropped == 0
    udp.close()


async def test_the_flag_is_back_after_a_send_that_failed() -> None:
    udp = UdpSocket(HOST, 0, lambda *_: None, lambda: None)
    watch = watched(udp, BlockingIOError())
    udp.send(Transmit(0, udp.address, (bytes(1472),), 0, True))
    assert (watch.values, watch.value, udp.dropped) == ([DONT], PROBE, 1)
    udp.close()
