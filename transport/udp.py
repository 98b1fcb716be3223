"""The one place that touches a UDP socket.

A socket reads many datagrams for each wake-up, a bounded number so that other work gets its turn,
and then says once that the batch is over: the owner answers the batch as a whole. Datagrams of one
size from one source that arrive in a row are handed over as one run, whether the kernel has put
them together (UDP_GRO) or they were read one by one; runs leave in one call where the kernel cuts
them up (UDP_SEGMENT), else one by one. What the kernel has is found out by trying.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import LocalError
from .transmit import Address, Buffer, Transmit

#: What one wake-up may take: more would keep timers and TCP sockets waiting. Reads, and bytes.
MAX_READS = 64
_MAX_BATCH = 192 * 1024
#: What the kernel may hand over at once: one datagram, or a run of them.
_MAX_READ = 65_536
#: A socket on which datagrams come one by one reads one a wake-up, without asking whether there
#: are more; every so many wake-ups it asks.
_CALM = 8
#: Fewer datagrams a wake-up are read one by one; and so are longer ones, which are several that the
#: kernel has put together. No more than `recvmmsg.MAX_EXPECTED`.
FEW = 4
MAX_SINGLE = 2048
#: Bytes kept for a kernel that takes no more. Above it datagrams are dropped, as the network does.
MAX_UNSENT = 1 << 20
#: The kernel's buffers (bytes): bursts of a whole window survive.
SEND_BUFFER = 1 << 21
RECEIVE_BUFFER = 1 << 22

if TYPE_CHECKING:
    from .recvmmsg import Batch

# Linux: send with "don't fragment" and leave path MTU discovery to UDX (spec: udx 8.1).
_IP_MTU_DISCOVER = 10
_IP_PMTUDISC_PROBE = 3
_IP_PMTUDISC_DONT = 0
# Linux: runs of datagrams in one call. The segment size is two bytes when sent, four when read.
_SOL_UDP = 17
_UDP_SEGMENT = 103
_UDP_GRO = 104
_U16 = struct.Struct("=H")
_INT = struct.Struct("=i")
_ANCILLARY = socket.CMSG_SPACE(_INT.size)
#: What kernels and devices answer that cannot segment, at all or for this path.
_CANNOT_SEGMENT = frozenset({errno.EINVAL, errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP})

#: A run of datagrams, the size of each but the last, and where they came from. The memory is the
#: socket's own and is used again: whoever keeps bytes copies them.
OnRun = Callable[[memoryview, int, Address], None]


class UdpSocket:
    """A bound, non-blocking UDP socket on the running event loop.

    ``on_run(data, segment, source)`` is called for each run of datagrams (often of one), and
    ``on_batch()`` once after the last one of a wake-up.
    """

    def __init__(
        self,
        host: str,
        port: int,
        on_run: OnRun,
        on_batch: Callable[[], None],
        *,
        bound: socket.socket | None = None,
        segmenting: bool = True,
    ) -> None:
        """Binds; port 0 takes a free one, and ``bound`` has its port already. Without
        ``segmenting`` the kernel gets and gives single datagrams. Raises `LocalError` when the
        address cannot be had."""
        self._on_run = on_run
        self._on_batch = on_batch
        self._unsent: deque[tuple[tuple[Buffer, ...], Address]] = deque()
        self._unsent_bytes = 0
        #: Datagrams that were dropped because the kernel took no more, or refused.
        self.dropped = 0
        self._socket = _bound(host, port, bound)
        self._segments_sent = segmenting and _takes(self._socket, _UDP_SEGMENT, 0)
        self._segments_read = segmenting and _takes(self._socket, _UDP_GRO, 1)
        self._batch = memoryview(bytearray(_MAX_BATCH + _MAX_READ))
        # Wake-ups until it is asked again whether more than one datagram has come.
        self._calm = 0
        # Reads datagrams that come singly, if they do; and how often there were only a few.
        self._many: Batch | None = None
        self._singly = False
        self._few = 0
        self.address: Address = self._socket.getsockname()[:2]
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._readable)

    def send(self, transmit: Transmit) -> None:
        """Hand a transmit to the kernel, or keep it while the kernel is full. Errors of the network
        are counted and otherwise ignored: loss recovery deals with them (spec: udx 2.6)."""
        if transmit.may_fragment and sys.platform == "linux":
            self._send_fragmentable(transmit)
        elif transmit.ttl:
            self._send_briefly(transmit)
        elif not transmit.segment:
            self._send(transmit.buffers, transmit.address)
        elif not self._send_run(transmit):
            self._send_singly(transmit)

    def close(self) -> None:
        """Forget the socket; what the kernel had not taken is lost. Harmless twice."""
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._unsent.clear()
        self._unsent_bytes = 0

    # Sending

    def _send_fragmentable(self, transmit: Transmit) -> None:
        """Send without "don't fragment". That is rare, and said for the socket as a whole: what
        the kernel does not take at once is dropped, and repeated by loss recovery."""
        set_option = self._socket.setsockopt
        set_option(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)
        try:
            self._socket.sendmsg(transmit.buffers, (), 0, transmit.address)
        except OSError:
            self.dropped += 1
        finally:
            set_option(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)

    def _send_briefly(self, transmit: Transmit) -> None:
        """Send with another time to live, which holds for this datagram alone (spec: hyperdht 9.1,
        pitfall 19). It is worth nothing later: what the kernel does not take at once is dropped."""
        udp = self._socket
        usual = udp.getsockopt(socket.IPPROTO_IP, socket.IP_TTL)
        try:
            udp.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, transmit.ttl)
            udp.sendmsg(transmit.buffers, (), 0, transmit.address)
        except OSError:
            self.dropped += 1
        finally:
            udp.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, usual)

    def _send_run(self, transmit: Transmit) -> bool:
        """Whether the kernel took the run as one, or it was dropped."""
        if not self._segments_sent or self._unsent:
            return False
        size = _U16.pack(transmit.segment)
        try:
            self._socket.sendmsg(
                transmit.buffers, ((_SOL_UDP, _UDP_SEGMENT, size),), 0, transmit.address
            )
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EIO:
                # The device computes no checksums for segments, and never will.
                self._segments_sent = False
            if error.errno in _CANNOT_SEGMENT:
                return False
            self.dropped += 1
        return True

    def _send_singly(self, transmit: Transmit) -> None:
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

    # Receiving

    def _readable(self) -> None:
        """Read what there is, and put together what belongs together: each read lands right behind
        the one before it."""
        if self._singly and self._many is not None:
            self._read_many(self._many)
            return
        batch, on_run, receive = self._batch, self._on_run, self._socket.recvmsg_into
        ancillary = _ANCILLARY if self._segments_read else 0
        start = end = reads = 0
        segment = 0
        source: Address | None = None
        while reads < MAX_READS:
            try:
                size, about, _flags, sender = receive((batch[end : end + _MAX_READ],), ancillary)
            except BlockingIOError:
                self._calm = _CALM if reads == 1 else 0
                break
            except OSError:
                # An ICMP error of some earlier datagram; it says nothing about this socket.
                reads += 1
                continue
            reads += 1
            if not size:
                continue
            length = _INT.unpack(about[0][2])[0] if about else size
            # A run's datagrams have one size, but for the last: a shorter one ends it.
            fits = length == segment or (size <= length and size < segment)
            if not fits or sender != source or (end - start) % segment:
                if source is not None:
                    on_run(batch[start:end], segment, source)
                    if self._socket.fileno() < 0:
                        return
                start, segment, source = end, length, sender
            end += size
            if end > _MAX_BATCH:
                break
            if self._calm and size <= length:
                self._calm -= 1
                break
        if source is not None:
            on_run(batch[start:end], segment, source)
        if reads == MAX_READS and end <= reads * segment:
            self._expect_singles(segment)
        self._on_batch()

    def _expect_singles(self, size: int) -> None:
        """Datagrams come one by one, and many of them, as from a peer that sends an ACK for each
        packet: from now on one call reads them."""
        if self._many is None and self._segments_read:
            # Imported here for the sake of programs that are never that busy.
            from .recvmmsg import Batch

            try:
                self._many = Batch(self._socket.fileno())
            except (OSError, AttributeError):
                return
        if self._many is not None and size <= MAX_SINGLE:
            self._many.expect(size)
            self._singly = True
            self._few = 0

    def _read_many(self, many: Batch) -> None:
        lengths = many.read(self._on_run)
        if self._socket.fileno() < 0:
            return
        most = max(lengths, default=0)
        if most > MAX_SINGLE:
            # The kernel puts them together now.
            self._singly = False
        elif len(lengths) < FEW:
            self._few += 1
            self._singly = self._few < _CALM
        else:
            self._few = 0
            if 2 * lengths.count(many.expected) < len(lengths):
                many.expect(lengths[-1] or most)
        self._on_batch()


def _takes(udp: socket.socket, option: int, value: int) -> bool:
    """Whether the kernel knows an option of runs."""
    if sys.platform != "linux":
        return False
    try:
        udp.setsockopt(_SOL_UDP, option, value)
    except OSError:
        return False
    return True


def _bound(host: str, port: int, bound: socket.socket | None) -> socket.socket:
    result = socket.socket(socket.AF_INET, socket.SOCK_DGRAM) if bound is None else bound
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
        if bound is None:
            result.bind((host, port))
    except OSError as error:
        result.close()
        reason = error.strerror or str(error)
        raise LocalError(
            f"cannot listen on UDP {host}:{port} ({reason}): choose another --port or --host"
        ) from error
    return result
