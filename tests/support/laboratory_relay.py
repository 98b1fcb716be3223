"""The internet of the laboratory: a program that carries packets between TUN devices.

`tc netem` is not in every kernel, so this delays and loses packets instead, seeded. It forwards by
the first three octets of the destination, takes HOPS off the time to live of each packet, as a long
way would, and drops what is addressed to nobody.

It reads commands on standard input, one a line, and answers each with one line:

    end A.B.C WEIGHT     the name of a new device for A.B.C.0/24, in this process' namespace
    guard INODE          done: the processes of a network namespace must not outlive the laboratory
    impose LOSS DELAY    done: from now on LOSS (0 to 1), and DELAY (seconds) one way between two
                         ends whose weights add up to 1

When standard input ends, however that came, it kills what still runs in the guarded namespaces.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import signal
import struct
import sys
import time

#: Routers that a packet passes between two ends. More than the time to live of the datagrams that
#: are only to open the sender's own NAT (spec: hyperdht 5.6).
HOPS = 8
#: Packets taken from a device before the others have their turn.
BATCH = 64
#: Packets that may be under way; more are lost, as in a full router.
UNDER_WAY = 100_000
MTU = 1500
IPV4 = 4
#: Looks for processes that are being born while others are killed.
LOOKS = 5

TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000


class Relay:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._loss = 0.0
        self._delay = 0.0
        self._guarded: set[int] = set()
        # The device of each end and its weight in the delay, by the first three octets.
        self._ends: dict[bytes, tuple[int, float]] = {}
        self._weights: dict[int, float] = {}
        # Packets that are due, by when; the number keeps those of one moment in order.
        self._under_way: list[tuple[float, int, int, bytes]] = []
        self._number = itertools.count()

    def run(self) -> None:
        now = time.monotonic
        commands = sys.stdin.fileno()
        pending = b""
        while True:
            wait = max(0.0, self._under_way[0][0] - now()) if self._under_way else None
            ready, _, _ = select.select([commands, *self._weights], [], [], wait)
            if commands in ready:
                given = os.read(commands, 4096)
                if not given:
                    return
                *lines, pending = (pending + given).split(b"\n")
                for line in lines:
                    sys.stdout.write(self._obey(line.decode().split()) + "\n")
                sys.stdout.flush()
                continue
            for device in ready:
                self._read(device, now())
            limit = now()
            while self._under_way and self._under_way[0][0] <= limit:
                _, _, device, packet = heapq.heappop(self._under_way)
                with contextlib.suppress(OSError):  # its queue is full, or it is down
                    os.write(device, packet)

    def close(self) -> None:
        """Kill what runs in the guarded namespaces."""
        for _ in range(LOOKS):
            found = [pid for pid in _processes() if _namespace(pid) in self._guarded]
            if not found:
                return
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _obey(self, words: list[str]) -> str:
        match words:
            case ["end", prefix, weight]:
                device, name = _tun()
                self._ends[bytes(map(int, prefix.split(".")))] = device, float(weight)
                self._weights[device] = float(weight)
                return name
            case ["guard", inode]:
                self._guarded.add(int(inode))
            case ["impose", loss, delay]:
                self._loss, self._delay = float(loss), float(delay)
        return "done"

    def _read(self, device: int, now: float) -> None:
        with contextlib.suppress(OSError):  # nothing more to read, or still down
            for _ in range(BATCH):
                packet = bytearray(os.read(device, MTU + 100))
                end = self._ends.get(bytes(packet[16:19]))
                if end is None or packet[0] >> 4 != IPV4 or packet[8] <= HOPS:
                    continue
                if len(self._under_way) >= UNDER_WAY or self._rng.random() < self._loss:
                    continue
                _age(packet)
                to, weight = end
                due = now + self._delay * (self._weights[device] + weight)
                heapq.heappush(self._under_way, (due, next(self._number), to, bytes(packet)))


def _age(packet: bytearray) -> None:
    """Take HOPS off the time to live, and mend the checksum of the header (RFC 1624)."""
    packet[8] -= HOPS
    checksum = int.from_bytes(packet[10:12], "big") + (HOPS << 8)
    checksum = (checksum & 0xFFFF) + (checksum >> 16)
    packet[10:12] = checksum.to_bytes(2, "big")


def _processes() -> list[int]:
    return [
        int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()
    ]


def _namespace(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None


def _tun() -> tuple[int, str]:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", b"end%d", IFF_TUN | IFF_NO_PI)
    name = fcntl.ioctl(device, TUNSETIFF, request)[:16].rstrip(b"\0").decode()
    return device, name


if __name__ == "__main__":
    relay = Relay(int(sys.argv[1]))
    try:
        relay.run()
    finally:
        relay.close()
