"""Two network namespaces and one link between them that delays and loses packets.

The link sits below the programs, on the path of every packet, and they cannot tell. It is a pair of
TUN devices with a relay of ours in between, because `tc netem` is not in every kernel: seeded, so
that all contenders meet the same conditions. The namespaces have no other link and no name; they
end with the processes in them.

Run as a program, this file is the relay.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Sequence

#: Addresses of the two ends. A private range: peers do not take reserved ones for each other's.
NEAR = "10.77.0.1"
FAR = "10.77.0.2"
#: Packets that wait in a TUN device, as many as `tc netem` holds by default.
QUEUE = 1000
MTU = 1500
#: Packets taken from a device before the other one has its turn.
BATCH = 64

TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000

#: A process and what it starts end with the benchmark, however that ends.
LEASH = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []


class NotPermitted(Exception):
    """This machine or this user cannot make network namespaces and TUN devices."""


class LossyLink:
    """`near` and `far` are command prefixes that run a program at either end."""

    def __init__(self, seed: int) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        try:
            self.near, near = self._namespace()
            self.far, far = self._namespace()
            relay = [sys.executable, __file__, str(seed)]
            self._relay = self._start(relay)
            names = self._answer(self._relay).split()
            for pid, name, own, other in (
                (near, names[0], NEAR, FAR),
                (far, names[1], FAR, NEAR),
            ):
                _run("ip", "link", "set", name, "netns", str(pid))
                inside = ["nsenter", "-t", str(pid), "-n"]
                _run(*inside, "ip", "link", "set", "lo", "up")
                _run(*inside, "ip", "addr", "add", own, "peer", other, "dev", name)
                _run(*inside, "ip", "link", "set", name, "mtu", str(MTU), "txqueuelen", str(QUEUE))
                _run(*inside, "ip", "link", "set", name, "up")
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            self.close()
            reason = getattr(error, "stderr", None) or str(error)
            raise NotPermitted(f"no namespaces or TUN devices: {reason.strip()}") from None

    def impose(self, loss: float, delay: float) -> None:
        """From now on: `loss` (0 to 1) and `delay` (seconds), each way. Seeded anew."""
        assert self._relay.stdin is not None
        self._relay.stdin.write(f"{loss} {delay}\n")
        self._relay.stdin.flush()
        self._answer(self._relay)

    def close(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()

    def _namespace(self) -> tuple[list[str], int]:
        holder = self._start(["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"])
        self._answer(holder)
        return ["nsenter", "-t", str(holder.pid), "-n", "--"], holder.pid

    def _start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*LEASH, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def _answer(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        if not line:
            raise OSError(process.stderr.read().strip().rpartition("\n")[2])
        return line


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


# The relay


def relay(seed: int) -> None:
    """Carry packets between two TUN devices. Each line on standard input is "LOSS DELAY"."""
    ends = [_tun(), _tun()]
    print(ends[0][1], ends[1][1], flush=True)
    devices = [ends[0][0], ends[1][0]]
    queues: list[collections.deque[tuple[float, bytes]]] = [collections.deque() for _ in devices]
    rngs = [random.Random(seed), random.Random(seed + 1)]
    loss, delay = 0.0, 0.0
    now = time.monotonic
    while True:
        heads = [queue[0][0] for queue in queues if queue]
        wait = max(0.0, min(heads) - now()) if heads else None
        ready, _, _ = select.select([*devices, sys.stdin], [], [], wait)
        if sys.stdin in ready:
            line = sys.stdin.readline()
            if not line:
                return
            loss, delay = map(float, line.split())
            rngs = [random.Random(seed), random.Random(seed + 1)]
            print("done", flush=True)
        for device, queue, rng in zip(devices, queues, rngs, strict=True):
            if device in ready:
                due = now() + delay
                with contextlib.suppress(OSError):  # nothing more to read, or still down
                    for _ in range(BATCH):
                        packet = os.read(device, 2048)
                        if rng.random() >= loss:
                            queue.append((due, packet))
        for device, queue in zip(reversed(devices), queues, strict=True):
            limit = now()
            while queue and queue[0][0] <= limit:
                with contextlib.suppress(OSError):
                    os.write(device, queue[0][1])
                queue.popleft()


def _tun() -> tuple[int, str]:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", b"hsb%d", IFF_TUN | IFF_NO_PI)
    name = fcntl.ioctl(device, TUNSETIFF, request)[:16].rstrip(b"\0").decode()
    return device, name


if __name__ == "__main__":
    relay(int(sys.argv[1]))
