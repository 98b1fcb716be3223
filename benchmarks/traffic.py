"""The far ends of a measurement: a TCP backend behind a service, and the clients at a proxy.

Runs as a process of its own and imports nothing of the project. A client prints one line of JSON.

A connection begins with a byte that names its use and a length (8 bytes, big-endian); the backend
answers ``+`` once it is reached, so that making a connection is not counted as moving bytes.

- ``D`` download: after one byte from the client, that many bytes flow to it.
- ``U`` upload: that many bytes flow to the backend, which answers ``.`` for each `MARK` of them.
- ``E`` echo: what comes goes back. Idle connections are of this kind.
- ``H`` hold: the backend reads nothing more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

HEADER = struct.Struct("!cQ")
#: Bytes of the buffer that is sent again and again, and of one read.
BLOCK = 8 * 1024 * 1024
READ = 256 * 1024
#: Bytes of an upload that are confirmed with one byte.
MARK = 1024 * 1024
ENDLESS = 1 << 60


# The backend


def backend(host: str, port: int) -> None:
    """Serve until killed. Bytes move in threads that block, echoes on one selector."""
    listener = socket.create_server((host, port), backlog=4096)
    listener.setblocking(False)
    print(f"listening {listener.getsockname()[1]}", flush=True)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, None)
    payload = _payload()

    def accept() -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                client, _ = listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.setblocking(False)
                selector.register(client, selectors.EVENT_READ, bytearray())

    def head(client: socket.socket, got: bytearray) -> None:
        got += client.recv(HEADER.size - len(got)) or _gone()
        if len(got) < HEADER.size:
            return
        mode, length = HEADER.unpack(got)
        client.send(b"+")
        if mode == b"E":
            selector.modify(client, selectors.EVENT_READ, mode)
            return
        selector.unregister(client)
        client.setblocking(True)
        move = {b"D": _send, b"U": _take, b"H": _hold}[mode]
        threading.Thread(target=move, args=(client, length, payload), daemon=True).start()

    while True:
        for key, _ in selector.select():
            if key.data is None:
                accept()
                continue
            client = key.fileobj
            assert isinstance(client, socket.socket)
            try:
                if key.data == b"E":
                    client.send(client.recv(READ) or _gone())
                else:
                    head(client, key.data)
            except OSError:
                selector.unregister(client)
                client.close()


def _gone() -> bytes:
    raise ConnectionError("end of the stream")


def _payload() -> int:
    """A file in memory with `BLOCK` random bytes."""
    file = os.memfd_create("payload")
    os.write(file, os.urandom(BLOCK))
    return file


def _send(client: socket.socket, length: int, payload: int) -> None:
    with client, contextlib.suppress(OSError):
        client.recv(1) or _gone()
        while length:
            offset = -length % BLOCK
            length -= os.sendfile(client.fileno(), payload, offset, min(length, BLOCK - offset))
        client.recv(1)  # the client closes first


def _take(client: socket.socket, length: int, payload: int) -> None:
    buffer = bytearray(READ)
    with client, contextlib.suppress(OSError):
        taken = marks = 0
        while taken < length:
            taken += client.recv_into(buffer) or len(_gone())
            if taken // MARK > marks:
                client.send(b"." * (taken // MARK - marks))
                marks = taken // MARK
        client.recv(1)


def _hold(client: socket.socket, length: int, payload: int) -> None:
    with client:
        while True:
            time.sleep(3600)


# The clients


def opened(port: int, mode: bytes, length: int = 0, *, limit: float = 30.0) -> socket.socket:
    """A connection that has reached the backend. OSError when it does not within `limit` s."""
    client = socket.create_connection(("127.0.0.1", port), timeout=limit)
    try:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(HEADER.pack(mode, length))
        client.recv(1) or _gone()
    except OSError:
        client.close()
        raise
    return client


def _moved(
    port: int, mode: bytes, total: int, streams: int, limit: float,
    move: Callable[[socket.socket, int, float, list[int], int, int], None],
) -> dict[str, Any]:  # fmt: skip
    each = total // streams
    payload = _payload()
    clients = [opened(port, mode, each) for _ in range(streams)]
    counts = [0] * streams
    begin = time.perf_counter()
    end = begin + limit
    threads = [
        threading.Thread(target=move, args=(client, each, end, counts, index, payload))
        for index, client in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    for client in clients:
        client.close()
    return {
        "bytes": sum(counts),
        "seconds": seconds,
        "whole": sum(counts) >= each // MARK * MARK * streams,
        "least": min(counts),
    }


def _receive(
    client: socket.socket, total: int, end: float, counts: list[int], index: int, payload: int
) -> None:
    buffer = bytearray(READ)
    count = 0
    with contextlib.suppress(OSError):
        client.send(b"g")
        while count < total and (left := end - time.perf_counter()) > 0:
            client.settimeout(left)
            count += client.recv_into(buffer) or len(_gone())
            counts[index] = count


def _upload(
    client: socket.socket, total: int, end: float, counts: list[int], index: int, payload: int
) -> None:
    def write() -> None:
        left = total
        with contextlib.suppress(OSError):
            while left:
                offset = -left % BLOCK
                left -= os.sendfile(client.fileno(), payload, offset, min(left, BLOCK - offset))

    client.settimeout(None)
    writer = threading.Thread(target=write)
    writer.start()
    # A blocking socket whose reads time out: writes of the other thread must not.
    with contextlib.suppress(OSError):
        while counts[index] < total // MARK * MARK and (left := end - time.perf_counter()) > 0:
            interval = struct.pack("ll", int(left), int(left % 1 * 1e6) or 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
            counts[index] += MARK * len(client.recv(4096) or _gone())
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)
    writer.join()


def download(port: int, total: int, streams: int, limit: float) -> dict[str, Any]:
    """`total` bytes in `streams` connections, or what arrives within `limit` seconds."""
    return _moved(port, b"D", total, streams, limit, _receive)


def upload(port: int, total: int, streams: int, limit: float) -> dict[str, Any]:
    """As `download`; what counts is what the backend confirmed, in steps of `MARK`."""
    return _moved(port, b"U", total, streams, limit, _upload)


def connect(port: int, count: int, at_once: int) -> dict[str, Any]:
    """`count` connections, `at_once` at any time: each opened, its first byte awaited, closed."""
    selector = selectors.DefaultSelector()
    begin = time.perf_counter()
    started = 0
    times: list[float] = []
    open_now = 0

    def start() -> None:
        nonlocal started, open_now
        client = socket.socket()
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.connect_ex(("127.0.0.1", port))
        selector.register(client, selectors.EVENT_WRITE, time.perf_counter())
        started += 1
        open_now += 1

    while started < min(count, at_once):
        start()
    while open_now:
        events = selector.select(30)
        if not events:
            raise TimeoutError(f"{len(times)} of {count} connections, then none for 30 s")
        for key, event in events:
            client = key.fileobj
            assert isinstance(client, socket.socket)
            if event & selectors.EVENT_WRITE:
                client.send(HEADER.pack(b"E", 0))
                selector.modify(client, selectors.EVENT_READ, key.data)
                continue
            client.recv(1) or _gone()
            times.append(time.perf_counter() - key.data)
            selector.unregister(client)
            client.close()
            open_now -= 1
            if started < count:
                start()
    seconds = time.perf_counter() - begin
    return {"median": _median(times), "per_second": count / seconds}


def roundtrip(port: int, count: int, size: int) -> dict[str, Any]:
    """Messages of `size` bytes, one after the other, on one connection."""
    message = b"x" * size
    times = []
    with opened(port, b"E") as client:
        for _ in range(count):
            begin = time.perf_counter()
            client.sendall(message)
            left = size
            while left:
                left -= len(client.recv(left) or _gone())
            times.append(time.perf_counter() - begin)
    times = times[count // 10 :]
    return {"median": _median(times), "p99": sorted(times)[int(len(times) * 0.99)]}


def idle(port: int, count: int) -> None:
    """Hold `count` open connections until standard input ends."""
    limit = time.monotonic() + 120
    held: list[socket.socket] = []
    lock = threading.Lock()
    errors: list[str] = []
    left = count

    def work() -> None:
        nonlocal left
        while time.monotonic() < limit:
            with lock:
                if left == 0 or errors:
                    return
                left -= 1
            try:
                held.append(opened(port, b"E"))
            except OSError as error:
                errors.append(f"{len(held)} of {count} connections: {error}")

    workers = [threading.Thread(target=work) for _ in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors or len(held) < count:
        raise OSError(errors[0] if errors else f"{len(held)} of {count} connections in 120 s")
    print(json.dumps({"open": len(held)}), flush=True)
    sys.stdin.read()


def stall(port: int, direction: str, seconds: float) -> dict[str, Any]:
    """A writer that never ends and, at the other end, a reader that never reads."""
    mode = b"D" if direction == "down" else b"H"
    sent = 0
    with opened(port, mode, ENDLESS) as client:
        end = time.monotonic() + seconds
        client.send(b"g")
        block = bytes(READ)
        while (left := end - time.monotonic()) > 0:
            if direction == "down":
                time.sleep(left)
                continue
            client.settimeout(left)
            with contextlib.suppress(TimeoutError):
                sent += client.send(block)
    return {"sent": sent}


def share(port: int, seconds: float) -> dict[str, Any]:
    """Two endless downloads side by side: the smaller one's share."""
    result = download(port, 2 * ENDLESS, 2, seconds)
    return {"share": result["least"] / result["bytes"], "bytes": result["bytes"]}


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", type=int)
    modes = parser.add_subparsers(dest="mode", required=True)

    def mode(name: str, **arguments: type) -> None:
        sub = modes.add_parser(name)
        for argument, kind in arguments.items():
            sub.add_argument(argument, type=kind)

    mode("backend", host=str, port=int)
    mode("download", port=int, total=int, streams=int, limit=float)
    mode("upload", port=int, total=int, streams=int, limit=float)
    mode("connect", port=int, count=int, at_once=int)
    mode("roundtrip", port=int, count=int, size=int)
    mode("idle", port=int, count=int)
    mode("stall", port=int, direction=str, seconds=float)
    mode("share", port=int, seconds=float)
    arguments = vars(parser.parse_args())
    cpu = arguments.pop("cpu")
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        result = globals()[arguments.pop("mode")](**arguments)
    except OSError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if result is not None:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
