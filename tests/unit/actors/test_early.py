"""What a client's bytes go through until a service answers: a TCP transport that the test feeds,
and channels in memory."""

from __future__ import annotations

import asyncio
from collections import deque
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pipes import Peer, PipeChannel, pipe_channels
from support.registry import virtual

from hyperseaport.actors.early import REPLAY, Early
from hyperseaport.actors.splice import ChannelSide, TcpSide
from hyperseaport.testing.clock import run_virtual
from hyperseaport.transport.channel import Channel
from hyperseaport.transport.errors import StreamTimeout


class Tcp(asyncio.Transport):
    """A connection whose far end is the test."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: Any = None
        self.written = bytearray()
        self.wrote_eof = self.aborted = self.closed = False
        self._reading = True
        self._unread: deque[bytes | None] = deque()

    def made(self, protocol: asyncio.BaseProtocol) -> None:
        self.set_protocol(protocol)
        protocol.connection_made(self)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def feed(self, data: bytes | None) -> None:
        """The client sends, or ends its direction."""
        self._unread.append(data)
        self._read()

    def _read(self) -> None:
        while self._reading and self._unread:
            data = self._unread.popleft()
            if data is None:
                assert self.protocol.eof_received()
                continue
            buffer = self.protocol.get_buffer(-1)
            assert len(buffer) > 0
            size = min(len(buffer), len(data))
            if size < len(data):
                self._unread.appendleft(data[size:])
            buffer[:size] = data[:size]
            self.protocol.buffer_updated(size)

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        asyncio.get_running_loop().call_soon(self._read)

    @property
    def unread(self) -> int:
        return sum(len(data or b"") for data in self._unread)

    def write(self, data: Any) -> None:
        self.written += data

    def write_eof(self) -> None:
        self.wrote_eof = True

    def is_closing(self) -> bool:
        return self.aborted or self.closed

    def close(self) -> None:
        self.closed = True
        asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None:
        if not self.is_closing():
            self.aborted = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high


class Owner:
    def __init__(self) -> None:
        self.gone: list[Exception | None] = []
        self.broken: list[Exception | None] = []
        self.answers = 0
        self.closed: list[Exception | None] = []

    def client_gone(self, error: Exception | None) -> None:
        self.gone.append(error)

    def service_broke(self, error: Exception | None) -> None:
        self.broken.append(error)

    def service_answered(self) -> None:
        self.answers += 1

    def side_closed(self, error: Exception | None) -> None:
        self.closed.append(error)


class Stage:
    def __init__(self, *, made: bool = True) -> None:
        self.tcp, self.owner = Tcp(), Owner()
        self.early = Early(self.owner)
        if made:
            self.tcp.made(self.early.tcp)
        self.channel: PipeChannel
        self.peer: Peer

    def join(self) -> Peer:
        self.channel, far = pipe_channels()
        self.peer = Peer(far)
        self.early.join(cast(Channel, self.channel))
        return self.peer

    def kept(self) -> int | None:
        return self.early.kept

    @property
    def short_way(self) -> bool:
        """Nothing but a splice is between the bytes."""
        protocols = type(self.tcp.protocol), type(self.channel.get_protocol())
        return protocols == (TcpSide, ChannelSide)


async def turn() -> None:
    await asyncio.sleep(0.001)


@st.composite
def scripts(draw: st.DrawFn) -> list[tuple[str, int]]:
    sizes = st.one_of(st.integers(1, 100), st.integers(1, 40_000), st.just(REPLAY))
    steps = st.one_of(
        st.tuples(st.just("send"), sizes),
        st.tuples(st.sampled_from(["join", "break", "reset", "turn"]), st.just(0)),
    )
    return draw(st.lists(steps, max_size=25))


@settings(deadline=None, derandomize=True, max_examples=250)
@given(script=scripts(), ends=st.integers(0, 30), seed=st.integers(0, 2**16))
def test_who_answers_gets_all_the_clients_bytes_once(
    script: list[tuple[str, int]], ends: int, seed: int
) -> None:
    """However the client's writes, its end and the failures of services lie."""
    run_virtual(_replay(script, ends, Random(seed)))


async def _replay(script: list[tuple[str, int]], ends: int, rng: Random) -> None:
    stage = Stage()
    tcp, early, owner = stage.tcp, stage.early, stage.owner
    sent, ended = bytearray(), False
    joined = False
    for number, (step, size) in enumerate(script):
        if number == ends:
            tcp.feed(None)
            ended = True
        if step == "send" and not ended:
            data = rng.randbytes(size)
            tcp.feed(data)
            sent += data
        elif step == "join" and not joined:
            stage.join()
            joined = True
        elif step in ("break", "reset") and joined:
            if step == "reset":
                stage.peer.channel.abort()
            else:
                stage.channel.fail(StreamTimeout("nothing heard"))
            await turn()
            assert sent.startswith(stage.peer.received)
            if early.kept is None:
                # It had sent too much: it hears of the end, and nobody else gets its bytes.
                assert len(sent) > REPLAY
                assert tcp.aborted
                assert len(owner.closed) == 2
                return
            assert owner.broken
            owner.broken.clear()
            joined = False
        elif step == "turn":
            await turn()
        if not joined:
            assert (early.kept or 0) + tcp.unread == len(sent)
            assert (early.kept or 0) <= REPLAY
    if not joined:
        stage.join()
    await turn()
    assert stage.peer.received == sent
    assert stage.peer.ended == ended
    assert owner.answers == 0
    assert not owner.closed
    assert not tcp.is_closing()
    stage.peer.channel.write(b"answer")
    await turn()
    assert tcp.written == b"answer"
    assert owner.answers == 1
    assert stage.short_way
    assert early.kept is None
    if not ended:
        tcp.feed(b"the rest")
        tcp.feed(None)
        await turn()
        assert stage.peer.received == sent + b"the rest"
        assert stage.peer.ended
    stage.peer.channel.close()
    await turn()
    assert tcp.wrote_eof
    early.abort()
    await turn()


@virtual
async def test_a_service_may_speak_first() -> None:
    stage = Stage()
    stage.join()
    stage.peer.channel.abort()
    await turn()
    assert (stage.kept(), len(stage.owner.broken)) == (0, 1)
    stage.join()
    stage.peer.channel.write(b"220 hello")
    await turn()
    assert stage.tcp.written == b"220 hello"
    assert stage.short_way
    # From here on, what breaks the channel resets the client.
    stage.peer.channel.abort()
    await turn()
    assert stage.tcp.aborted
    assert len(stage.owner.broken) == 1
    assert len(stage.owner.closed) == 2
    assert isinstance(stage.owner.closed[0], ConnectionResetError)


@pytest.mark.parametrize("client_ended", [True, False])
def test_an_end_in_order_is_an_answer(client_ended: bool) -> None:
    async def test() -> None:
        stage = Stage()
        stage.tcp.feed(b"question")
        if client_ended:
            stage.tcp.feed(None)
        stage.join()
        stage.peer.channel.close()
        await turn()
        assert stage.owner.answers == 1
        assert stage.owner.broken == []
        assert stage.tcp.wrote_eof
        assert stage.short_way
        stage.early.abort()
        await turn()

    run_virtual(test())


@virtual
async def test_more_than_is_kept_is_not_read_before_there_is_a_service() -> None:
    stage = Stage()
    sent = Random(1).randbytes(3 * REPLAY)
    stage.tcp.feed(sent)
    assert stage.kept() == REPLAY
    assert stage.tcp.unread == 2 * REPLAY
    stage.join()
    await turn()
    assert stage.peer.received == sent
    assert stage.kept() is None
    # The channel's first byte still counts.
    assert stage.owner.answers == 0
    stage.peer.channel.write(b"answer")
    await turn()
    assert stage.owner.answers == 1
    assert stage.short_way
    stage.early.abort()
    await turn()


@virtual
async def test_just_as_much_as_is_kept_can_be_moved() -> None:
    stage = Stage()
    stage.join()
    stage.tcp.feed(bytes(REPLAY))
    await turn()
    stage.channel.fail(StreamTimeout("nothing heard"))
    await turn()
    assert stage.kept() == REPLAY
    stage.tcp.feed(b"more")
    await turn()
    assert stage.tcp.unread == 4
    stage.join()
    await turn()
    assert len(stage.peer.received) == REPLAY + 4
    stage.early.abort()
    await turn()


@virtual
async def test_a_channel_that_takes_no_more_pauses_the_client_until_it_breaks() -> None:
    stage = Stage()
    stage.channel, far = pipe_channels()  # nobody reads its far end
    stage.early.join(cast(Channel, stage.channel))
    stage.channel.pause_reading()
    stage.tcp.feed(bytes(60_000))
    await turn()
    stage.channel.get_protocol().pause_writing()
    stage.tcp.feed(b"after the pause")
    assert stage.tcp.unread == 15
    far.abort()
    await turn()
    assert stage.tcp.unread == 0
    stage.join()
    await turn()
    assert len(stage.peer.received) == 60_015
    stage.early.abort()
    await turn()


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("error", [None, ConnectionResetError("reset")])
def test_a_client_that_is_gone_is_told_at_once(joined: bool, error: Exception | None) -> None:
    async def test() -> None:
        stage = Stage()
        if joined:
            stage.join()
        stage.tcp.protocol.connection_lost(error)
        assert stage.owner.gone == [error]
        stage.early.abort()
        await turn()
        assert stage.owner.broken == []
        if joined:
            assert isinstance(stage.peer.error, ConnectionResetError)

    run_virtual(test())


@virtual
async def test_a_channel_that_is_there_before_the_tcp_connection() -> None:
    stage = Stage(made=False)
    stage.join()
    await turn()
    assert not stage.channel.has_protocol
    stage.tcp.made(stage.early.tcp)
    stage.tcp.feed(b"question")
    await turn()
    assert stage.peer.received == b"question"
    stage.early.abort()
    await turn()
    assert stage.tcp.aborted
    assert isinstance(stage.peer.error, ConnectionResetError)


@virtual
async def test_an_abort_at_any_time_is_silent() -> None:
    for made in (True, False):
        for join in (True, False):
            stage = Stage(made=made)
            if join:
                stage.join()
            stage.early.abort()
            stage.early.abort()
            await turn()
            assert stage.tcp.aborted == made
            if join:
                assert isinstance(stage.peer.error, ConnectionResetError)
            owner = stage.owner
            assert (owner.gone, owner.broken, owner.answers, owner.closed) == ([], [], 0, [])


@virtual
async def test_settled_early_the_client_stays() -> None:
    stage = Stage()
    stage.early.settle()
    assert stage.kept() == 0
    stage.join()
    stage.early.settle()
    assert stage.short_way
    stage.peer.channel.abort()
    await turn()
    assert stage.tcp.aborted
    assert stage.owner.broken == []
