"""The TCP server that tests put behind a service, and its client.

One byte from the client chooses what a connection does:

- ``F`` frames: any number of requests, each an 8 byte big-endian length and that many bytes; each
  is answered by the SHA-256 of the bytes (32 bytes) and the same frame back.
- ``E`` end: the client sends bytes and then its EOF; only then come the SHA-256 and the EOF of the
  server.

In ``F`` the client reads the last answer before it closes, as Node ends need: they drop what is
queued as soon as their own TCP socket has closed in both directions (spec: registry 7.2).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import AsyncIterator

from .waiting import until

#: Bytes written at once.
CHUNK = 256 * 1024
DIGEST = 32


class Backend:
    """A listening socket of 127.0.0.1 that outlives event loops; `serving` answers its clients."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        #: Connections whose handler has not finished.
        self.open = 0
        #: Why connections failed, in order.
        self.errors: list[str] = []

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answer clients on the running loop until the block ends."""
        server = await asyncio.start_server(self._serve, sock=self._socket.dup())
        try:
            yield
        finally:
            server.close()
            await server.wait_closed()

    def close(self) -> None:
        self._socket.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            mode = await reader.read(1)
            if mode == b"F":
                await _serve_frames(reader, writer)
            elif mode == b"E":
                await _serve_end(reader, writer)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.errors.append(repr(error))
        finally:
            self.open -= 1
            await _closed(writer)


async def _serve_frames(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while head := await reader.read(1):
        head += await reader.readexactly(7)
        payload = await reader.readexactly(int.from_bytes(head, "big"))
        writer.write(hashlib.sha256(payload).digest() + head)
        await _write(writer, payload)


async def _serve_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(hashlib.sha256(await reader.read(-1)).digest())
    writer.write_eof()
    await writer.drain()


async def exchange(port: int, *payloads: bytes) -> None:
    """Send the payloads through one connection to 127.0.0.1:`port`, each after the last answer.

    AssertionError unless every one arrived whole there and came back whole here.
    """
    async with _connection(port) as (reader, writer):
        writer.write(b"F")
        for payload in payloads:
            sending = asyncio.create_task(_send_frame(writer, payload))
            try:
                digest = await _exactly(reader, DIGEST)
                assert digest == hashlib.sha256(payload).digest(), "the server got other bytes"
                length = int.from_bytes(await _exactly(reader, 8), "big")
                assert length == len(payload)
                assert await _exactly(reader, length) == payload, "other bytes came back"
            finally:
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await sending
        writer.write_eof()
        assert await reader.read(1) == b"", "bytes after the last answer"


async def half_close(port: int, payload: bytes) -> None:
    """Send `payload` and EOF; AssertionError unless the answer to all of it and an EOF return."""
    async with _connection(port) as (reader, writer):
        writer.write(b"E" + payload)
        writer.write_eof()
        answer = await reader.read(-1)
        assert answer == hashlib.sha256(payload).digest(), f"{len(answer)} bytes came back"


async def answering(port: int, *, deadline: float = 30.0) -> None:
    """Return once a small request through 127.0.0.1:`port` is answered.

    A proxy that knows no service yet closes connections at once; they are tried again.
    """

    async def answered() -> bool:
        try:
            async with asyncio.timeout(8):
                await exchange(port, b"ready?")
        except (OSError, AssertionError):  # TimeoutError is an OSError
            return False
        return True

    await until(answered, f"port {port} answers", deadline=deadline, every=0.1)


@contextlib.asynccontextmanager
async def _connection(
    port: int,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024 * 1024)
    try:
        yield reader, writer
    finally:
        await _closed(writer)


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _exactly(reader: asyncio.StreamReader, size: int) -> bytes:
    try:
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError as error:
        raise AssertionError(f"{len(error.partial)} of {size} bytes, then the end") from None


async def _send_frame(writer: asyncio.StreamWriter, payload: bytes) -> None:
    writer.write(len(payload).to_bytes(8, "big"))
    await _write(writer, payload)


async def _write(writer: asyncio.StreamWriter, payload: bytes) -> None:
    view = memoryview(payload)
    for start in range(0, len(view), CHUNK):
        writer.write(view[start : start + CHUNK])
        await writer.drain()
