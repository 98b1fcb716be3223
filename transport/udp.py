"""The one place that touches a UDP socket.

A socket reads many datagrams for each wake-up, a bounded number so that other work gets its turn,
and then says once that the batch is over: the owner answers the batch as a whole.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections import deque
from collections.abc import Callable

from .errors import LocalError
from .transmit import Address, Buffer, Transmit

#: Datagrams taken in one wake-up. More would keep timers and TCP sockets waiting.
MAX_READS = 64
#: No datagram of any protocol here is longer; what is longer is cut, and then fails to decode.
MAX_DATAGRAM = 2048
#: Bytes kept for a kernel that takes no more. Above it datagrams are dropped, as the network does.
MAX_UNSENT = 1 << 20
#: The kernel's buffers (bytes): as the peers set them, so bursts of a whole window survive.
SEND_BUFFER = 212_992
RECEIVE_BUFFER = 1 << 21

# Linux: send with "don't fragment" and leave path MTU discovery to UDX (spec: udx 8.1).
_IP_MTU_DISCOVER = 10
_IP_PMTUDISC_PROBE = 3


class UdpSocket:
    """A bound, non-blocking UDP socket on the running event loop.

    ``on_datagram(datagram, source)`` is called for each datagram of 0..2048 bytes, and
    ``on_batch()`` once after the last one of a wake-up.
    """

    def __init__(
        self,
        host: str,
        port: int,
        on_datagram: Callable[[bytes, Address], None],
        on_batch: Callable[[], None],
    ) -> None:
        """Binds; port 0 takes a free one. Raises `LocalError` when the address cannot be had."""
        self._on_datagram = on_datagram
        self._on_batch = on_batch
        self._unsent: deque[tuple[tuple[Buffer, ...], Address]] = deque()
        self._unsent_bytes = 0
        #: Datagrams that were dropped because the kernel took no more, or refused.
        self.dropped = 0
        self._socket = _bound(host, port)
        self.address: Address = self._socket.getsockname()[:2]
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._readable)

    def send(self, transmit: Transmit) -> None:
        """Hand a transmit to the kernel, or keep it while the kernel is full. Errors of the network
        are counted and otherwise ignored: loss recovery deals with them (spec: udx 2.6)."""
        if not transmit.segment:
            self._send(transmit.buffers, transmit.address)
            return
        datagram: list[Buffer] = []
        size = 0
        for buffer in transmit.buffers:
            datagram.append(buffer)
            size += len(buffer)
            if size == transmit.segment:
                self._send(tuple(datagram), transmit.address)
                datagram.clear()
                size = 0
        if datagram:
            self._send(tuple(datagram), transmit.address)

    def close(self) -> None:
        """Forget the socket; what the kernel had not taken is lost. Harmless twice."""
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._unsent.clear()
        self._unsent_bytes = 0

    def _send(self, buffers: tuple[Buffer, ...], address: Address) -> None:
        if self._unsent:
            self._keep(buffers, address)
            return
        try:
            self._socket.sendmsg(buffers, (), 0, address)
        except BlockingIOError:
            self._keep(buffers, address)
            self._loop.add_writer(self._socket.fileno(), self._writable)
        except OSError:
            self.dropped += 1

    def _keep(self, buffers: tuple[Buffer, ...], address: Address) -> None:
        size = sum(map(len, buffers))
        if self._unsent_bytes + size > MAX_UNSENT:
            self.dropped += 1
            return
        self._unsent_bytes += size
        self._unsent.append((buffers, address))

    def _writable(self) -> None:
        while self._unsent:
            buffers, address = self._unsent[0]
            try:
                self._socket.sendmsg(buffers, (), 0, address)
            except BlockingIOError:
                return
            except OSError:
                self.dropped += 1
            self._unsent.popleft()
            self._unsent_bytes -= sum(map(len, buffers))
        self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        receive = self._socket.recvfrom
        on_datagram = self._on_datagram
        for _ in range(MAX_READS):
            try:
                datagram, source = receive(MAX_DATAGRAM)
            except BlockingIOError:
                break
            except OSError:
                # An ICMP error of some earlier datagram; it says nothing about this socket.
                continue
            on_datagram(datagram, source)
            if self._socket.fileno() < 0:
                return
        self._on_batch()


def _bound(host: str, port: int) -> socket.socket:
    result = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        result.setblocking(False)
        for option, size in ((socket.SO_SNDBUF, SEND_BUFFER), (socket.SO_RCVBUF, RECEIVE_BUFFER)):
            try:
                result.setsockopt(socket.SOL_SOCKET, option, size)
            except OSError:
                # Smaller buffers lose more in bursts; nothing breaks.
                continue
        if sys.platform == "linux":
            result.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
        result.bind((host, port))
    except OSError as error:
        result.close()
        reason = error.strerror or str(error)
        raise LocalError(
            f"cannot listen on UDP {host}:{port} ({reason}): choose another --port or --host"
        ) from error
    return result
