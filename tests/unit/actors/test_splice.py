"""The byte path: a TCP connection of the loopback on one side, a channel in memory on the other."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from support.pipes import Peer, descriptors, outcome, pipe_channels, reset_by_client, soon

from hyperseaport.actors import splice as splice_module
from hyperseaport.actors.splice import TCP_HIGH, Splice, reset
from hyperseaport.testing.channels import WRITE_HIGH
from hyperseaport.transport.channel import MESSAGE, Channel
from hyperseaport.transport.errors import StreamTimeout


class Stage:
    """A splice; `client` is the far end of its TCP connection, `peer` that of its channel."""

    def __init__(self) -> None:
        self.closed: list[Exception | None] = []
        self.channel, far = pipe_channels()
        self.splice = Splice(cast(Channel, self.channel), self.closed.append)
        self.peer = Peer(far)
        self.client: socket.socket

    async def connect(self, before: asyncio.BaseProtocol | None = None) -> asyncio.Transport:
        """Make the TCP connection, for another protocol than the splice's if one is given."""
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.client = socket.create_connection(server.getsockname())
            accepted, _ = server.accept()
        # The kernel's buffers would hide who waits for whom.
        for each in (self.client, accepted):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        self.client.setblocking(False)
        protocol = before or self.splice.tcp
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, accepted)
        return transport

    @property
    def transport(self) -> Any:
        return self.splice.transport

    async def read(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        received = b""
        while len(received) < size:
            data = await asyncio.wait_for(loop.sock_recv(self.client, size - len(received)), 20)
            assert data, "the connection ended early"
            received += data
        return received


@asynccontextmanager
async def spliced() -> AsyncIterator[Stage]:
    """Both sides must be closed when the test is done."""
    before = descriptors()
    stage = Stage()
    await stage.connect()
    yield stage
    stage.client.close()
    await soon(lambda: stage.channel.is_closing() and stage.transport.is_closing())
    await soon(lambda: descriptors() == before)


async def test_bytes_both_ways_and_an_end_in_order() -> None:
    async with spliced() as stage:
        loop = asyncio.get_running_loop()
        request, response = random.Random(1).randbytes(300_000), random.Random(2).randbytes(500_000)
        await loop.sock_sendall(stage.client, request)
        await soon(lambda: len(stage.peer.received) == len(request))
        assert stage.peer.received == request
        stage.peer.channel.write(response)
        assert await stage.read(len(response)) == response
        stage.client.shutdown(socket.SHUT_WR)
        await soon(lambda: stage.peer.ended)
        stage.peer.channel.write(b"the last word")
        stage.peer.channel.close()
        assert await outcome(stage.client) == b"the last word"
        await soon(lambda: len(stage.closed) == 2)
        assert stage.closed == [None, None]
        assert stage.peer.lost
        assert stage.peer.error is None


async def test_half_closed_from_the_channel_the_client_goes_on() -> None:
    async with spliced() as stage:
        loop = asyncio.get_running_loop()
        stage.peer.channel.write(b"all I have")
        stage.peer.channel.write_eof()
        assert await outcome(stage.client) == b"all I have"
        assert not stage.closed
        await loop.sock_sendall(stage.client, b"thanks")
        stage.client.shutdown(socket.SHUT_WR)
        await soon(lambda: stage.peer.ended)
        assert stage.peer.received == b"thanks"
        stage.peer.channel.close()
        await soon(lambda: len(stage.closed) == 2)
        assert stage.closed == [None, None]


async def test_it_takes_over_what_others_have_begun() -> None:
    before = descriptors()
    stage = Stage()
    transport = await stage.connect(asyncio.BufferedProtocol())
    stage.channel.set_protocol(asyncio.Protocol())
    stage.splice.transport = transport
    stage.splice.take_over()
    stage.client.send(b"question")
    await soon(lambda: stage.peer.received == b"question")
    stage.peer.channel.write(b"answer")
    stage.peer.channel.close()
    assert await outcome(stage.client) == b"answer"
    stage.client.close()
    await soon(lambda: len(stage.closed) == 2)
    assert stage.closed == [None, None]
    await soon(lambda: descriptors() == before)


async def test_a_reset_of_the_client_resets_the_channel() -> None:
    async with spliced() as stage:
        reset_by_client(stage.client)
        await soon(lambda: stage.peer.lost)
        assert isinstance(stage.peer.error, ConnectionResetError)
        await soon(lambda: len(stage.closed) == 2)
        assert isinstance(stage.closed[0], ConnectionResetError)


async def test_a_client_that_resets_after_its_end_resets_the_channel() -> None:
    async with spliced() as stage:
        stage.client.shutdown(socket.SHUT_WR)
        await soon(lambda: stage.peer.ended)
        reset_by_client(stage.client)
        stage.peer.channel.write(b"for nobody")
        stage.peer.channel.write(b"at all")
        await soon(lambda: stage.peer.lost)
        assert isinstance(stage.peer.error, ConnectionResetError)


@pytest.mark.parametrize("how", ["reset", "timeout"])
async def test_a_channel_that_breaks_shows_as_a_reset(how: str) -> None:
    async with spliced() as stage:
        stage.peer.channel.write(b"the beginning")
        assert await stage.read(13) == b"the beginning"
        if how == "reset":
            stage.peer.channel.abort()
        else:
            stage.channel.fail(StreamTimeout("nothing heard"))
        assert await outcome(stage.client) is ConnectionResetError
        await soon(lambda: len(stage.closed) == 2)
        assert isinstance(stage.closed[0], ConnectionError if how == "reset" else StreamTimeout)
        stage.peer.channel.abort()


async def test_the_channels_end_after_a_reset_that_nobody_has_read_yet() -> None:
    """The kernel then refuses to end our direction; the channel's owner must not hear of it."""
    async with spliced() as stage:
        stage.transport.pause_reading()
        reset_by_client(stage.client)
        errors: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: errors.append(context))
        stage.peer.channel.write_eof()
        await soon(lambda: stage.peer.lost)
        await soon(lambda: len(stage.closed) == 2)
        loop.set_exception_handler(None)
        assert errors == []
        assert isinstance(stage.peer.error, ConnectionResetError)


async def test_a_client_that_takes_no_more_pauses_the_channel() -> None:
    async with spliced() as stage:
        sent = random.Random(3).randbytes(4 * 1024 * 1024)
        for start in range(0, len(sent), 65_536):
            stage.peer.channel.write(sent[start : start + 65_536])
        await soon(lambda: not stage.channel.is_reading())
        # One delivery beyond the limit, at most.
        assert TCP_HIGH < stage.transport.get_write_buffer_size() <= TCP_HIGH + 65_536
        assert stage.peer.paused
        assert await stage.read(len(sent)) == sent
        await soon(lambda: not stage.peer.paused)
        assert stage.channel.is_reading()
        stage.peer.channel.abort()


async def test_a_peer_that_takes_no_more_pauses_the_client() -> None:
    async with spliced() as stage:
        loop = asyncio.get_running_loop()
        sent = random.Random(4).randbytes(4 * 1024 * 1024)
        stage.peer.channel.pause_reading()
        sending = loop.create_task(loop.sock_sendall(stage.client, sent))
        await soon(lambda: not stage.transport.is_reading())
        assert WRITE_HIGH < stage.channel.get_write_buffer_size() <= WRITE_HIGH + 65_536
        assert not sending.done()
        stage.peer.channel.resume_reading()
        await sending
        await soon(lambda: len(stage.peer.received) == len(sent))
        assert stage.peer.received == sent
        assert stage.transport.is_reading()
        stage.peer.channel.abort()


async def test_pauses_on_both_sides_at_once_are_no_deadlock() -> None:
    async with spliced() as stage:
        loop = asyncio.get_running_loop()
        sent = bytes(2 * 1024 * 1024)
        stage.peer.channel.pause_reading()
        sending = loop.create_task(loop.sock_sendall(stage.client, sent))
        for _ in range(32):
            stage.peer.channel.write(bytes(65_536))
        await soon(lambda: not stage.transport.is_reading() and not stage.channel.is_reading())
        stage.peer.channel.resume_reading()
        await sending
        assert len(await stage.read(len(sent))) == len(sent)
        stage.client.shutdown(socket.SHUT_WR)
        await soon(lambda: stage.peer.ended)
        assert len(stage.peer.received) == len(sent)
        stage.peer.channel.close()
        await soon(lambda: len(stage.closed) == 2)


async def test_an_abort_resets_both_sides_and_is_silent() -> None:
    async with spliced() as stage:
        stage.splice.abort()
        stage.splice.abort()
        assert await outcome(stage.client) is ConnectionResetError
        await soon(lambda: stage.peer.lost)
        assert isinstance(stage.peer.error, ConnectionResetError)
        assert stage.closed == []


async def test_an_abort_before_there_is_a_tcp_connection() -> None:
    stage = Stage()
    stage.splice.abort()
    await soon(lambda: stage.peer.lost)
    assert isinstance(stage.peer.error, ConnectionResetError)
    assert stage.closed == []


def test_reset_of_a_plain_socket_shows_as_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        reset(accepted)
        reset(accepted)
        with client, pytest.raises(ConnectionResetError):
            client.recv(1)


def test_one_read_is_one_message() -> None:
    assert len(splice_module.reading_buffer) == splice_module.READ == MESSAGE


async def test_small_messages_wait_in_order_for_a_client_that_does_not_read() -> None:
    async with spliced() as stage:
        messages = [bytes([number % 256]) * (1 + number % 4096) for number in range(800)]
        for message in messages:
            stage.peer.channel.write(message)
        await soon(lambda: stage.transport.get_write_buffer_size() > 0)
        assert await stage.read(sum(map(len, messages))) == b"".join(messages)
        stage.peer.channel.write(b"and on")
        assert await stage.read(6) == b"and on"
        stage.client.shutdown(socket.SHUT_WR)
        await soon(lambda: stage.peer.ended)
        stage.peer.channel.close()
        await soon(lambda: len(stage.closed) == 2)


async def test_a_small_message_for_a_client_that_has_gone_resets_the_channel() -> None:
    async with spliced() as stage:
        reset_by_client(stage.client)
        stage.splice.channel_side.data_received(b"too late")
        await soon(lambda: stage.peer.lost)
        await soon(lambda: len(stage.closed) == 2)
        # Its number may be another file's by now.
        assert stage.splice.descriptor == -1
