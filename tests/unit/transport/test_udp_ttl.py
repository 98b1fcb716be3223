"""A datagram with a time to live of its own, and those after it."""

from __future__ import annotations

import socket

from hyperseaport.transport.transmit import Transmit
from hyperseaport.transport.udp import UdpSocket

from .test_udp_fragments import HOST, watched

#: Linux: tell of each datagram how many routers it could still have passed.
IP_RECVTTL = 12


async def test_the_time_to_live_holds_for_one_datagram() -> None:
    """Checklist 53; pitfall 19."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind((HOST, 0))
        receiver.settimeout(5)
        receiver.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        udp = UdpSocket(HOST, 0, lambda *_: None, lambda: None)
        for ttl in (0, 5, 0):
            udp.send(Transmit(0, receiver.getsockname(), (b"\x00",), ttl=ttl))
        seen = []
        for _ in range(3):
            data, about, _, _ = receiver.recvmsg(100, 100)
            assert data == b"\x00"
            seen.append(int.from_bytes(about[0][2][:4], "little"))
        usual = seen[0]
        assert usual > 5
        assert seen == [usual, 5, usual]
        assert udp.dropped == 0
        udp.close()


async def test_it_is_the_usual_one_after_a_send_that_failed() -> None:
    udp = UdpSocket(HOST, 0, lambda *_: None, lambda: None)
    usual = udp._socket.getsockopt(socket.IPPROTO_IP, socket.IP_TTL)
    watch = watched(udp, BlockingIOError())
    udp.send(Transmit(0, udp.address, (b"\x00",), ttl=5))
    assert watch.real.getsockopt(socket.IPPROTO_IP, socket.IP_TTL) == usual
    assert udp.dropped == 1
    udp.close()
