"""Channels over two real muxes and a wire of the test, on the virtual loop."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any, cast

import pytest

from hyperseaport.testing.clock import run_virtual
from hyperseaport.testing.network import datagrams
from hyperseaport.transport.channel import (
    LINGER,
    MAX_MESSAGE,
    MESSAGE,
    READ,
    WRITE_HIGH,
    WRITE_LOW,
    Channel,
)
from hyperseaport.transport.errors import ProtocolError, StreamReset, StreamTimeout
from hyperseaport.transport.noise import Handshake
from hyperseaport.transport.secret_stream import SecretStream
from hyperseaport.transport.transmit import Address
from hyperseaport.transport.udx.mux import Mux
from hyperseaport.transport.udx.receive import RECEIVE_WINDOW
from hyperseaport.transport.udx.stream import Stream

ADDRESSES: tuple[Address, Address] = (("10.0.0.1", 1), ("10.0.0.2", 2))
#: Seconds that a datagram takes.
DELAY = 0.001
#: Seconds after which a peer that answers nothing has certainly been given up.
GIVEN_UP = 300.0


def handshakes() -> tuple[Handshake, Handshake]:
    """Both ends of one handshake, the initiator's first."""
    one, two, secret = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 64
    a, b = bytes([4]) * 32, bytes([5]) * 32
    return Handshake(True, one, two, secret, a, b), Handshake(False, two, one, secret, b, a)


class Side:
    """One mux with one stream, which does what an endpoint does for its channels."""

    def __init__(self, number: int, rng: Random) -> None:
        self.loop = asyncio.get_running_loop()
        self.rng = rng
        self.mux = Mux(rng)
        self.address = ADDRESSES[number]
        self.stream: Stream = self.mux.create(local_id=number + 1)
        self.channel: Channel | None = None
        self.other: Side = self
        self.writes = 0
        self.closed = 0
        #: True for a datagram that is lost on its way out.
        self.drop: Callable[[bytes], bool] = lambda _datagram: False
        self._under_way: deque[bytes] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._pumping = False

    def join(self, other: Side) -> None:
        self.other = other
        self.stream.connect(0, other.stream.local_id, other.address, self.loop.time())

    def open(self, handshake: Handshake) -> Channel:
        self.channel = Channel(
            self.stream,
            handshake,
            self.rng,
            wake=self.wake,
            wrote=self._wrote,
            closed=self._closed,
        )
        return self.channel

    def wake(self) -> None:
        if not self._pumping:
            self._pumping = True
            self.loop.call_soon(self._pump)

    def _wrote(self, _channel: Channel) -> bool:
        self.writes += 1
        return False

    def _closed(self, _channel: Channel) -> None:
        self.closed += 1

    def _pump(self) -> None:
        self._pumping = False
        for stream in self.mux.poll():
            if stream is self.stream and self.channel is not None:
                self.channel.stream_changed()
        for transmit in self.mux.transmits(self.loop.time()):
            for datagram in datagrams(transmit):
                if not self.drop(datagram):
                    # Timers of the same time ring in any order: what is under way is a queue.
                    self.other._under_way.append(datagram)
                    self.loop.call_later(DELAY, self.other._arrive)
        if self._timer is not None:
            self._timer.cancel()
        deadline = self.mux.deadline()
        self._timer = None if deadline is None else self.loop.call_at(deadline, self._ring)

    def _arrive(self) -> None:
        datagram = self._under_way.popleft()
        self.mux.receive(datagram, 0, self.other.address, self.loop.time())
        self.wake()

    def _ring(self) -> None:
        self._timer = None
        self.mux.on_deadline(self.loop.time())
        self._pump()


def sides(seed: int = 1) -> tuple[Side, Side]:
    left, right = Side(0, Random(seed)), Side(1, Random(seed + 1))
    left.join(right)
    right.join(left)
    return left, right


def channels(seed: int = 1) -> tuple[Channel, Channel]:
    left, right = sides(seed)
    ours, theirs = handshakes()
    return left.open(ours), right.open(theirs)


class Recorder(asyncio.Protocol):
    """Writes down what it is told."""

    def __init__(self, *, half_open: bool = True) -> None:
        self.calls: list[Any] = []
        self.received = 0
        self.digest = hashlib.sha256()
        self.writing_paused = False
        self.half_open = half_open
        self.on_data: Callable[[bytes], None] = lambda _data: None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.calls.append("made")

    def data_received(self, data: bytes) -> None:
        self.calls.append(data)
        self.received += len(data)
        self.digest.update(data)
        self.on_data(data)

    def eof_received(self) -> bool:
        self.calls.append("eof")
        return self.half_open

    def pause_writing(self) -> None:
        assert not self.writing_paused
        self.writing_paused = True

    def resume_writing(self) -> None:
        assert self.writing_paused
        self.writing_paused = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(("lost", exc))

    def waits(self) -> bool:
        """Whether it was asked to write no more for now."""
        return self.writing_paused

    @property
    def lost(self) -> list[Exception | None]:
        """The argument of each `connection_lost`."""
        return [call[1] for call in self.calls if isinstance(call, tuple)]

    @property
    def messages(self) -> list[bytes]:
        return [call for call in self.calls if isinstance(call, bytes)]


def joined(seed: int = 1, *, half_open: bool = True) -> tuple[Channel, Recorder, Channel, Recorder]:
    left, right = channels(seed)
    ours, theirs = Recorder(half_open=half_open), Recorder(half_open=half_open)
    left.set_protocol(ours)
    right.set_protocol(theirs)
    return left, ours, right, theirs


def held(channel: Channel) -> int:
    """Bytes that have arrived and that the protocol has not got."""
    stream, secret = channel.stream, channel._secret
    return stream.readable + secret.buffered + sum(map(len, channel._pending))


# Bytes


def test_messages_arrive_as_they_were_written() -> None:
    async def scenario() -> None:
        left, ours, right, theirs = joined()
        left.write(b"one")
        left.write(bytearray(b"two"))
        left.write(memoryview(b"three"))
        left.write(b"")
        right.write(b"back")
        await asyncio.sleep(1)
        assert theirs.calls == ["made", b"one", b"two", b"three"]
        assert ours.calls == ["made", b"back"]
        assert (left.bytes_written, left.bytes_read) == (11, 4)
        assert (right.bytes_written, right.bytes_read) == (4, 11)
        assert left.bytes_moved == right.bytes_moved == 15

    run_virtual(scenario())


def test_what_is_written_may_be_changed_afterwards() -> None:
    async def scenario() -> None:
        left, _, _, theirs = joined()
        buffer = bytearray(b"before")
        left.write(buffer)
        buffer[:] = b"after!"
        await asyncio.sleep(1)
        assert theirs.messages == [b"before"]

    run_virtual(scenario())


@pytest.mark.parametrize("size", [MESSAGE - 1, MESSAGE, MESSAGE + 1, 3 * MESSAGE + 7])
def test_large_writes_are_split_at_the_message_limit(size: int) -> None:
    async def scenario() -> None:
        data = Random(size).randbytes(size)
        left, _, _, theirs = joined()
        left.write(data)
        await asyncio.sleep(5)
        full, rest = divmod(size, MESSAGE)
        assert list(map(len, theirs.messages)) == [MESSAGE] * full + [rest] * (rest > 0)
        assert b"".join(theirs.messages) == data

    run_virtual(scenario())


def test_megabytes_both_ways_at_once_over_a_wire_that_loses() -> None:
    async def scenario() -> None:
        left, right = sides()
        rng = Random(9)
        left.drop = right.drop = lambda _datagram: rng.random() < 0.02
        ours, theirs = handshakes()
        ends = left.open(ours), right.open(theirs)
        protocols = Recorder(), Recorder()
        payloads = [Random(number).randbytes(1_500_000) for number in range(2)]
        for channel, protocol, payload in zip(ends, protocols, payloads, strict=True):
            channel.set_protocol(protocol)
            channel.write(payload)
            channel.write_eof()
        await asyncio.sleep(120)
        for protocol, payload in zip(protocols, reversed(payloads), strict=True):
            assert protocol.digest.digest() == hashlib.sha256(payload).digest()
            assert protocol.calls[-2:] == ["eof", ("lost", None)]

    run_virtual(scenario())


def test_bytes_that_arrive_before_there_is_a_protocol_are_kept() -> None:
    async def scenario() -> None:
        left, right = channels()
        left.set_protocol(Recorder())
        left.write(b"early")
        left.write_eof()
        await asyncio.sleep(10)
        assert not right.has_protocol
        with pytest.raises(RuntimeError, match="no protocol yet"):
            right.get_protocol()
        late = Recorder()
        right.set_protocol(late)
        assert late.calls == ["made"]
        await asyncio.sleep(1)
        assert late.calls == ["made", b"early", "eof"]
        assert right.get_protocol() is late

    run_virtual(scenario())


def test_another_protocol_may_take_over() -> None:
    async def scenario() -> None:
        left, _, right, theirs = joined()
        left.write(b"to the first")
        await asyncio.sleep(1)
        second = Recorder()
        right.set_protocol(second)
        left.write(b"to the second")
        await asyncio.sleep(1)
        left.abort()
        await asyncio.sleep(1)
        assert theirs.calls == ["made", b"to the first"]
        assert second.calls[0] == b"to the second"
        assert len(second.lost) == 1

    run_virtual(scenario())


def test_keep_alives_are_swallowed() -> None:
    async def scenario() -> None:
        left, right = sides()
        ours, theirs = handshakes()
        channel, peer, protocol = left.open(ours), right.open(theirs), Recorder()
        peer.set_protocol(protocol)
        writes = left.writes
        for _ in range(3):
            received = right.mux.stats.received
            channel.keep_alive()
            await asyncio.sleep(1)
            assert right.mux.stats.received > received
        assert left.writes == writes
        channel.write(b"word")
        await asyncio.sleep(1)
        assert protocol.calls == ["made", b"word"]
        channel.write_eof()
        channel.keep_alive()
        channel.abort()
        channel.keep_alive()

    run_virtual(scenario())


def test_the_stream_is_told_what_is_authentic_and_whether_more_is_to_come() -> None:
    async def scenario() -> None:
        sender, receiver = sides()
        ours, theirs = handshakes()
        left, right, heard = sender.open(ours), receiver.open(theirs), Recorder()
        right.set_protocol(heard)
        left.write(b"whole")
        await asyncio.sleep(0.1)
        assert (right.stream.authentic, right.stream.expects) == (1, False)
        packets = 0

        def drop(datagram: bytes) -> bool:
            nonlocal packets
            packets += len(datagram) > 1000
            return packets > 3

        sender.drop = drop
        left.write(bytes(20_000))
        await asyncio.sleep(0.1)
        assert (right.stream.authentic, right.stream.expects) == (1, True)
        sender.drop = lambda _datagram: False
        await asyncio.sleep(5)
        assert heard.received == 20_005
        assert (right.stream.authentic, right.stream.expects) == (2, False)

    run_virtual(scenario())


def test_extra_info() -> None:
    async def scenario() -> None:
        left, right = channels()
        assert left.get_extra_info("public_key") == bytes([4]) * 32 == left.public_key
        assert left.get_extra_info("remote_public_key") == bytes([5]) * 32
        assert right.get_extra_info("remote_public_key") == left.public_key
        assert left.get_extra_info("peername") == ADDRESSES[1]
        assert left.get_extra_info("sslcontext") is None
        assert left.get_extra_info("socket", "none") == "none"

    run_virtual(scenario())


# Ends


def test_half_close_leaves_the_other_direction_open() -> None:
    async def scenario() -> None:
        left, ours, right, theirs = joined()
        reply = Random(1).randbytes(700_000)
        assert left.can_write_eof()
        left.write(b"request")
        left.write_eof()
        left.write_eof()
        await asyncio.sleep(10)
        assert theirs.calls == ["made", b"request", "eof"]
        assert [left.ended, right.ended, left.is_closing()] == [False] * 3
        right.write(reply)
        right.write_eof()
        await asyncio.sleep(10)
        assert b"".join(ours.messages) == reply
        assert ours.calls[-2:] == ["eof", ("lost", None)]
        assert theirs.calls[-1] == ("lost", None)
        assert left.ended
        assert right.ended

    run_virtual(scenario())


def test_a_protocol_that_keeps_nothing_open_closes_at_the_peers_end() -> None:
    async def scenario() -> None:
        left, ours, _, theirs = joined(half_open=False)
        left.write(b"bye")
        left.write_eof()
        await asyncio.sleep(1)
        assert theirs.calls == ["made", b"bye", "eof", ("lost", None)]
        assert ours.calls == ["made", "eof", ("lost", None)]

    run_virtual(scenario())


def test_writing_after_the_end_is_refused_and_after_closing_or_loss_ignored() -> None:
    async def scenario() -> None:
        left, ours, right, theirs = joined()
        left.write_eof()
        with pytest.raises(RuntimeError, match="writing side has ended"):
            left.write(b"too late")
        right.close()
        right.write(b"ignored")
        await asyncio.sleep(1)
        assert ours.lost == theirs.lost == [None]
        left.write(b"ignored")
        right.write(b"ignored")
        right.write_eof()
        right.close()
        right.abort()
        left.resume_reading()
        left.pause_reading()
        left.resume_reading()
        await asyncio.sleep(1)
        assert ours.calls == ["made", "eof", ("lost", None)]
        assert theirs.calls == ["made", ("lost", None)]

    run_virtual(scenario())


def test_close_sends_what_was_written_and_waits_for_the_peers_end() -> None:
    async def scenario() -> None:
        left, ours, right, theirs = joined()
        data = Random(1).randbytes(500_000)
        left.write(data)
        left.close()
        assert left.is_closing()
        assert not left.is_reading()
        right.write(b"nobody listens")
        await asyncio.sleep(LINGER / 2)
        assert b"".join(theirs.messages) == data
        assert theirs.calls[-1] == "eof"
        assert ours.lost == []
        right.write_eof()
        await asyncio.sleep(1)
        assert ours.calls == ["made", ("lost", None)]
        assert theirs.lost == [None]

    run_virtual(scenario())


def test_close_lets_a_peer_finish_that_sends_more_than_a_window() -> None:
    """What arrives after `close` is dropped, and pausing keeps none of it."""

    async def scenario() -> None:
        left, ours, right, theirs = joined()
        left.close()
        left.pause_reading()
        right.write(bytes(3 * RECEIVE_WINDOW))
        right.write_eof()
        await asyncio.sleep(LINGER / 2)
        assert ours.calls == ["made", ("lost", None)]
        assert theirs.lost == [None]

    run_virtual(scenario())


def test_close_does_not_wait_for_ever() -> None:
    async def scenario() -> None:
        left, ours, _, theirs = joined()
        left.close()
        await asyncio.sleep(LINGER - 1)
        assert ours.lost == []
        await asyncio.sleep(2)
        assert ours.lost == [None]
        [error] = theirs.lost
        assert isinstance(error, StreamReset)

    run_virtual(scenario())


def test_close_before_there_is_a_protocol_is_a_close() -> None:
    async def scenario() -> None:
        left, right = sides()
        ours, theirs = handshakes()
        unclaimed, peer, protocol = left.open(ours), right.open(theirs), Recorder()
        peer.set_protocol(protocol)
        peer.write(bytes(2 * RECEIVE_WINDOW))
        unclaimed.close()
        peer.close()
        await asyncio.sleep(LINGER / 2)
        assert protocol.calls == ["made", ("lost", None)]
        assert left.closed == right.closed == 1

    run_virtual(scenario())


def test_abort_is_a_reset_after_everything_that_arrived_before() -> None:
    async def scenario() -> None:
        left, ours, right, theirs = joined()
        left.write(b"before")
        await asyncio.sleep(1)
        left.write(b"with the reset")
        left.abort()
        left.abort()
        assert right.is_closing() is False
        await asyncio.sleep(1)
        assert ours.calls == ["made", ("lost", None)]
        assert theirs.messages[0] == b"before"
        [error] = theirs.lost
        assert isinstance(error, StreamReset)
        assert right.is_closing()

    run_virtual(scenario())


@pytest.mark.parametrize("leave", [Channel.abort, Channel.close])
def test_nothing_is_delivered_to_a_protocol_that_has_left(
    leave: Callable[[Channel], None],
) -> None:
    """Not even what has arrived already, more than one read takes, and not the end."""

    async def scenario() -> None:
        left, _, right, theirs = joined()
        right.pause_reading()
        for number in range(200):
            left.write(bytes([number]) * 1000)
        left.write_eof()
        await asyncio.sleep(5)
        assert held(right) > 2 * READ
        theirs.on_data = lambda _data: leave(right)
        right.resume_reading()
        await asyncio.sleep(1)
        assert theirs.calls == ["made", bytes(1000), ("lost", None)]

    run_virtual(scenario())


def test_a_peer_that_answers_no_more_is_a_timeout() -> None:
    async def scenario() -> None:
        left, right = sides()
        ours, theirs = handshakes()
        channel, protocol = left.open(ours), Recorder()
        channel.set_protocol(protocol)
        right.open(theirs)
        await asyncio.sleep(1)
        left.drop = right.drop = lambda _datagram: True
        channel.write(b"anybody?")
        await asyncio.sleep(GIVEN_UP)
        [error] = protocol.lost
        assert isinstance(error, StreamTimeout)
        assert left.closed == 1

    run_virtual(scenario())


def test_a_lost_last_acknowledgement_is_no_error() -> None:
    async def scenario() -> None:
        left, right = sides()
        ours, theirs = handshakes()
        ends = left.open(ours), right.open(theirs)
        protocols = Recorder(), Recorder()
        for channel, protocol in zip(ends, protocols, strict=True):
            channel.set_protocol(protocol)
        ends[1].write_eof()
        await asyncio.sleep(1)
        # Our end arrives, and every answer to it is lost.
        right.drop = lambda _datagram: True
        ends[0].write_eof()
        await asyncio.sleep(GIVEN_UP)
        assert protocols[0].lost == protocols[1].lost == [None]

    run_virtual(scenario())


def test_a_channel_that_was_lost_before_it_had_a_protocol_says_so_once() -> None:
    async def scenario() -> None:
        left, right = channels()
        left.abort()
        await asyncio.sleep(1)
        late = Recorder()
        right.set_protocol(late)
        assert late.calls == ["made"]
        await asyncio.sleep(1)
        [error] = late.lost
        assert isinstance(error, StreamReset)
        aborted = Recorder()
        left.set_protocol(aborted)
        await asyncio.sleep(1)
        assert aborted.calls == ["made", ("lost", None)]

    run_virtual(scenario())


# Damage


class Forger:
    """A peer without a channel: writes whatever bytes it likes into its stream."""

    def __init__(self) -> None:
        left, right = sides()
        ours, theirs = handshakes()
        self.side = left
        self.secret = SecretStream(ours, left.rng)
        self.channel, self.protocol = right.open(theirs), Recorder()
        self.channel.set_protocol(self.protocol)
        self.say(self.secret.start())

    def say(self, *parts: Any) -> None:
        for part in parts:
            self.side.stream.write(part, self.side.loop.time())
        self.side.wake()

    def message(self, data: bytes) -> bytes:
        return b"".join(self.secret.encrypt(data))


def test_a_damaged_frame_ends_the_channel_after_what_was_whole() -> None:
    async def scenario() -> None:
        forger = Forger()
        forger.say(forger.message(b"whole"), forger.message(b"as well"))
        damaged = bytearray(forger.message(b"damaged"))
        damaged[-1] ^= 1
        forger.say(bytes(damaged), forger.message(b"never seen"))
        await asyncio.sleep(1)
        assert forger.protocol.calls[:3] == ["made", b"whole", b"as well"]
        [error] = forger.protocol.lost
        assert isinstance(error, ProtocolError)
        assert len(forger.protocol.calls) == 4
        assert isinstance(forger.side.stream.error, StreamReset)

    run_virtual(scenario())


@pytest.mark.parametrize("cut", [1, 3, 20])
def test_an_end_inside_a_frame_is_an_error(cut: int) -> None:
    async def scenario() -> None:
        forger = Forger()
        forger.say(forger.message(b"whole"), forger.message(b"half of it")[:cut])
        forger.side.stream.end(forger.side.loop.time())
        forger.side.wake()
        await asyncio.sleep(1)
        assert forger.protocol.calls[:2] == ["made", b"whole"]
        assert "eof" not in forger.protocol.calls
        [error] = forger.protocol.lost
        assert isinstance(error, ProtocolError)
        assert "inside a message" in str(error)

    run_virtual(scenario())


def test_the_longest_message_and_one_that_is_longer() -> None:
    async def scenario() -> None:
        forger = Forger()
        longest = Random(1).randbytes(MAX_MESSAGE)
        for _ in range(3):
            forger.say(forger.message(longest))
            await asyncio.sleep(10)
        assert forger.protocol.messages == [longest] * 3
        forger.say((MAX_MESSAGE + 18).to_bytes(3, "little"))
        await asyncio.sleep(1)
        [error] = forger.protocol.lost
        assert isinstance(error, ProtocolError)

    run_virtual(scenario())


def test_the_longest_messages_get_through_to_a_reader_that_pauses_at_each() -> None:
    async def scenario() -> None:
        forger = Forger()
        channel, protocol = forger.channel, forger.protocol
        loop = asyncio.get_running_loop()

        def pause(_data: bytes) -> None:
            channel.pause_reading()
            loop.call_later(5, channel.resume_reading)

        protocol.on_data = pause
        for size in (MAX_MESSAGE, 1, MAX_MESSAGE, MAX_MESSAGE):
            forger.say(forger.message(bytes(size)))
        await asyncio.sleep(100)
        assert list(map(len, protocol.messages)) == [MAX_MESSAGE, 1, MAX_MESSAGE, MAX_MESSAGE]

    run_virtual(scenario())


@pytest.mark.parametrize("first", [b"", bytes(59), b"GET / HTTP/1.1\r\n\r\n" * 10])
def test_a_peer_that_does_not_speak_the_protocol(first: bytes) -> None:
    async def scenario() -> None:
        left, right = sides()
        _, theirs = handshakes()
        channel, protocol = right.open(theirs), Recorder()
        channel.set_protocol(protocol)
        if first:
            left.stream.write(first, 0.0)
        left.stream.end(0.0)
        left.wake()
        await asyncio.sleep(1)
        assert protocol.messages == []
        if first:
            [error] = protocol.lost
            assert isinstance(error, ProtocolError)
        else:
            assert protocol.calls == ["made", "eof"]

    run_virtual(scenario())


def test_a_protocol_that_raises_ends_its_channel_alone() -> None:
    """As with asyncio's own transports: the loop's handler is told, the owner is not disturbed."""

    async def scenario() -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: told.append(context)
        )
        left, ours, right, theirs = joined()

        def explode(_data: bytes) -> None:
            raise ValueError("a bug of the protocol")

        theirs.on_data = explode
        left.write(b"boom")
        await asyncio.sleep(1)
        [error] = theirs.lost
        assert isinstance(error, ValueError)
        assert isinstance(ours.lost[0], StreamReset)
        assert [type(context["exception"]) for context in told] == [ValueError]
        assert right.is_closing()

    run_virtual(scenario())


# Flow


async def push(channel: Channel, recorder: Recorder, size: int, chunk: int) -> int:
    """Write until told to pause, chunk after chunk, at most `size` bytes. How many were written."""
    written = 0
    for _ in range(10_000):
        if written >= size:
            break
        if recorder.writing_paused:
            await asyncio.sleep(0.5)
            if recorder.writing_paused:
                break
        channel.write(bytes(chunk))
        written += chunk
        assert channel.get_write_buffer_size() <= WRITE_HIGH + chunk + 4 * 20
    return written


def test_a_reader_that_pauses_stops_the_writer_with_bounded_memory() -> None:
    async def scenario() -> None:
        left, ours, right, theirs = joined()
        assert left.get_write_buffer_limits() == (WRITE_LOW, WRITE_HIGH)
        assert right.is_reading()
        right.pause_reading()
        right.pause_reading()
        assert not right.is_reading()
        written = await push(left, ours, 1 << 30, MESSAGE)
        assert ours.waits()
        assert held(right) <= RECEIVE_WINDOW + READ
        assert written <= RECEIVE_WINDOW + WRITE_HIGH + 2 * MESSAGE
        assert theirs.messages == []
        right.resume_reading()
        right.resume_reading()
        await asyncio.sleep(5)
        assert theirs.received == written
        assert not ours.waits()
        assert held(right) == 0

    run_virtual(scenario())


@pytest.mark.parametrize("chunk", [1000, 16_384, MESSAGE])
def test_a_reader_that_pauses_again_and_again_holds_little_and_loses_nothing(chunk: int) -> None:
    async def scenario() -> None:
        left, ours, right, theirs = joined()
        loop = asyncio.get_running_loop()
        total = 3_000_000
        data = Random(chunk).randbytes(total)
        largest = 0
        next_pause = 100_000

        def pause(_data: bytes) -> None:
            nonlocal next_pause
            if theirs.received >= next_pause:
                next_pause += 100_000
                right.pause_reading()
                loop.call_later(0.7, right.resume_reading)

        theirs.on_data = pause
        written = 0
        while written < total:
            largest = max(largest, held(right))
            if ours.writing_paused:
                await asyncio.sleep(0.01)
                continue
            left.write(data[written : written + chunk])
            written += chunk
            assert left.get_write_buffer_size() <= WRITE_HIGH + chunk + 4 * 20
            await asyncio.sleep(0)
        left.write_eof()
        await asyncio.sleep(60)
        assert RECEIVE_WINDOW // 2 < largest <= RECEIVE_WINDOW + READ
        assert theirs.digest.digest() == hashlib.sha256(data).digest()
        assert theirs.calls[-1] == "eof"

    run_virtual(scenario())


def test_the_peers_end_waits_behind_a_pause() -> None:
    async def scenario() -> None:
        left, ours, right, theirs = joined()
        right.write_eof()
        left.write(b"x" * 10)
        right.pause_reading()
        left.write_eof()
        await asyncio.sleep(10)
        assert theirs.calls == ["made"]
        right.resume_reading()
        await asyncio.sleep(1)
        assert theirs.calls == ["made", b"x" * 10, "eof", ("lost", None)]
        assert ours.lost == [None]

    run_virtual(scenario())


def test_a_paused_writer_goes_on_as_soon_as_the_wire_has_taken_enough() -> None:
    async def scenario() -> None:
        left, ours, _, theirs = joined()
        left.write(bytes(WRITE_HIGH))
        assert ours.waits()
        await asyncio.sleep(1)
        assert not ours.waits()
        assert theirs.received == WRITE_HIGH

    run_virtual(scenario())


def test_other_limits_for_the_writer() -> None:
    async def scenario() -> None:
        left, ours, right, _ = joined()
        right.pause_reading()
        left.set_write_buffer_limits(high=1000)
        assert left.get_write_buffer_limits() == (250, 1000)
        left.write(bytes(900))
        assert not ours.waits()
        left.write(bytes(200))
        assert ours.waits()
        left.set_write_buffer_limits()
        assert left.get_write_buffer_limits() == (WRITE_LOW, WRITE_HIGH)
        await asyncio.sleep(1)
        assert not ours.waits()
        left.set_write_buffer_limits(high=0)
        left.write(b"x")
        assert ours.waits()
        await asyncio.sleep(1)
        assert not ours.waits()

    run_virtual(scenario())


# asyncio's streams


def streams(channel: Channel) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=4096, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    channel.set_protocol(protocol)
    return reader, asyncio.StreamWriter(channel, protocol, reader, loop)


def test_asyncio_streams_run_on_channels() -> None:
    async def scenario() -> None:
        left, right = channels()
        (reader, writer), (far_reader, far_writer) = streams(left), streams(right)
        data = Random(1).randbytes(1_000_000)

        async def send() -> None:
            for start in range(0, len(data), 50_000):
                writer.write(data[start : start + 50_000])
                await writer.drain()
            writer.write_eof()

        sending = asyncio.create_task(send())
        digest = hashlib.sha256()
        while chunk := await far_reader.read(3000):
            digest.update(chunk)
        await sending
        assert digest.digest() == hashlib.sha256(data).digest()
        far_writer.write(b"line\nrest")
        far_writer.close()
        assert await reader.readline() == b"line\n"
        assert await reader.read() == b"rest"
        writer.close()
        writer.write(b"ignored")
        await writer.wait_closed()
        await far_writer.wait_closed()

    run_virtual(scenario())


def test_asyncio_streams_see_a_reset() -> None:
    async def scenario() -> None:
        left, right = channels()
        reader, writer = streams(left)
        right.set_protocol(Recorder())
        await asyncio.sleep(1)
        right.abort()
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.write(b"ignored")
        with pytest.raises(ConnectionResetError):
            await writer.drain()
        writer.close()

    run_virtual(scenario())


# Any order of operations


class Wild(Recorder):
    """Does something at random, also from inside its calls, and keeps the rules written down."""

    def __init__(self, rng: Random) -> None:
        super().__init__(half_open=rng.random() < 0.7)
        self.rng = rng
        self.channel: Channel | None = None
        self.sent = hashlib.sha256()
        self.sent_bytes = bytearray()
        self.got = bytearray()
        self.gave_up = False

    def act(self) -> None:
        channel, rng = cast(Channel, self.channel), self.rng
        operation = rng.choices(
            ("write", "big", "eof", "close", "abort", "pause", "resume", "alive", "limits"),
            (30, 8, 3, 2, 1, 10, 20, 3, 2),
        )[0]
        if operation in {"write", "big"}:
            if channel._eof_written or (self.writing_paused and rng.random() < 0.9):
                return
            size = rng.randrange(1, 3000) if operation == "write" else rng.randrange(200_000)
            data = rng.randbytes(size)
            if not channel.is_closing():
                self.sent_bytes += data
            channel.write(data)
        elif operation == "eof":
            channel.write_eof()
        elif operation == "close":
            self.gave_up = True
            channel.close()
        elif operation == "abort":
            self.gave_up = True
            channel.abort()
        elif operation == "pause":
            channel.pause_reading()
        elif operation == "resume":
            channel.resume_reading()
        elif operation == "alive":
            channel.keep_alive()
        else:
            channel.set_write_buffer_limits(high=rng.choice((0, 1000, WRITE_HIGH)))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert self.calls == []
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        channel = cast(Channel, self.channel)
        assert data
        assert channel.is_reading()
        assert "eof" not in self.calls
        assert not self.lost
        assert not self.gave_up
        self.got += data
        self.calls.append("data")
        if self.rng.random() < 0.2:
            self.act()

    def eof_received(self) -> bool:
        assert "eof" not in self.calls
        assert not self.lost
        assert not self.gave_up
        self.calls.append("eof")
        if self.rng.random() < 0.3:
            self.act()
        if not self.half_open:
            self.gave_up = True
        return self.half_open

    def pause_writing(self) -> None:
        assert not self.lost
        super().pause_writing()

    def resume_writing(self) -> None:
        assert not self.lost
        super().resume_writing()
        if self.rng.random() < 0.5:
            self.act()


@pytest.mark.parametrize("seed", range(150))
def test_any_order_of_operations(seed: int) -> None:
    """No exception escapes, both sides end with exactly one `connection_lost`, and what arrived is
    the beginning of what was sent; all of it, where the end came."""

    async def scenario() -> None:
        rng = Random(seed)
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: complaints.append(context)
        )
        ends = sides(seed)
        loss = rng.choice((0.0, 0.0, 0.02, 0.2))
        ends[0].drop = ends[1].drop = lambda _datagram: rng.random() < loss
        wild: list[Wild] = []
        late: list[int] = []
        for number, (side, handshake) in enumerate(zip(ends, handshakes(), strict=True)):
            protocol = Wild(rng)
            protocol.channel = side.open(handshake)
            wild.append(protocol)
            if rng.random() < 0.7:
                protocol.channel.set_protocol(protocol)
            else:
                late.append(number)
        for _ in range(rng.randrange(5, 80)):
            rng.choice(wild).act()
            if rng.random() < 0.5:
                await asyncio.sleep(rng.choice((0.0, 0.0005, 0.003, 0.3)))
            if late and rng.random() < 0.2:
                number = late.pop()
                cast(Channel, wild[number].channel).set_protocol(wild[number])
        if rng.random() < 0.2:
            ends[0].drop = ends[1].drop = lambda _datagram: True
        for number in late:
            cast(Channel, wild[number].channel).set_protocol(wild[number])
        for each in wild:
            channel = cast(Channel, each.channel)
            channel.resume_reading()
            each.gave_up = True
            channel.close()
        await asyncio.sleep(GIVEN_UP)
        assert complaints == []
        for each, peer, side in zip(wild, reversed(wild), ends, strict=True):
            assert len(each.lost) == 1
            assert each.calls[0] == "made"
            assert isinstance(each.calls[-1], tuple)
            assert side.closed == 1
            assert len(side.mux) == 0
            assert peer.sent_bytes.startswith(each.got)
            if "eof" in each.calls:
                assert each.got == peer.sent_bytes

    run_virtual(scenario())
