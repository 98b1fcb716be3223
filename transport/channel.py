"""The byte stream that a pipe sees: a secret stream on a UDX stream, as an asyncio transport.

It speaks asyncio's vocabulary on both sides (`asyncio.Transport`, `asyncio.Protocol`), so whatever
runs on a TCP connection runs on a channel. A message of the peer arrives as one ``data_received``.

What a process holds for one direction of one channel is bounded: received bytes count against the
stream's receive window until the protocol has taken them and is not pausing, and `pause_writing` is
called at `WRITE_HIGH` bytes that are not in flight yet.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from math import inf
from random import Random
from typing import Any, cast

from .errors import Broken, ProtocolError
from .noise import Handshake
from .secret_stream import SecretStream, StreamError
from .transmit import Buffer
from .udx.stream import Stream

#: Plain bytes in one message: with its frame they fill 44 packets of a 1500-byte path, which the
#: kernel takes in one call; and a multiple of 16 keeps the cipher on whole blocks.
MESSAGE = 63_856
#: A longer message than this from a peer ends the channel: more than a receive window has room for.
MAX_MESSAGE = 256 * 1024
#: Bytes read from the stream before the protocol is asked whether it wants more.
READ = 65_536
#: Bytes read before the stream's window gets them back: small messages would spend a tenth of
#: their time on that.
CREDIT = 4096
#: Bytes written and not yet in flight at which the protocol is asked to pause, and to go on.
WRITE_HIGH = 65_536
WRITE_LOW = 16_384
#: Seconds that an ended channel waits for the peer's end before it is destroyed.
LINGER = 30.0


class Channel(asyncio.Transport):
    """One encrypted, ordered, reliable connection with a peer.

    ``wake()`` asks the owner to move bytes soon; ``wrote(channel)`` tells it that something was
    written, which is what keep-alives are timed by, and returns True if it sees to that itself.
    """

    def __init__(
        self,
        stream: Stream,
        handshake: Handshake,
        rng: Random,
        *,
        wake: Callable[[], None],
        wrote: Callable[[Channel], bool],
        closed: Callable[[Channel], None],
    ) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._handshake = handshake
        self._secret = SecretStream(handshake, rng, max_message=MAX_MESSAGE)
        self._wake = wake
        self._wrote = wrote
        self._on_closed = closed
        self._protocol: asyncio.BaseProtocol | None = None
        # Decrypted messages that came in one read with the one at which the protocol paused.
        self._pending: deque[bytes] = deque()
        # Bytes taken out of the stream that its window has not got back yet.
        self._uncredited = 0
        self._paused = False
        self._writing_paused = False
        self._high, self._low = WRITE_HIGH, WRITE_LOW
        self._eof_written = False
        self._eof_delivered = False
        self._closing = False
        self._lost = False
        self._error: Exception | None = None
        #: Plain bytes delivered to the protocol, and taken from whoever writes.
        self.bytes_read = 0
        self.bytes_written = 0
        #: When that last happened, in seconds on the loop's clock; -inf for never.
        self.moved_at = -inf
        #: Whether somebody else's bytes go through it, as whoever takes it knows.
        self.piped = False
        self._linger: asyncio.TimerHandle | None = None
        stream.wants_room = False
        stream.write(self._secret.start(), self._loop.time())
        # In this order: what is written first leaves in the same packet.
        wake()
        wrote(self)

    @property
    def public_key(self) -> bytes:
        """Our own 32 bytes in this connection."""
        return self._handshake.public_key

    @property
    def remote_public_key(self) -> bytes:
        """The peer's 32 bytes, proven by the handshake."""
        return self._handshake.remote_public_key

    @property
    def bytes_moved(self) -> int:
        """Plain bytes in both directions."""
        return self.bytes_read + self.bytes_written

    @property
    def stream(self) -> Stream:
        """The UDX stream underneath."""
        return self._stream

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """``public_key``, ``remote_public_key`` (32 bytes), ``peername`` (host, port)."""
        if name == "peername":
            return self._stream.address
        if name in {"public_key", "remote_public_key"}:
            return getattr(self, name)
        return default

    # Protocol

    @property
    def has_protocol(self) -> bool:
        """Whether anybody has taken the channel over."""
        return self._protocol is not None

    @property
    def heard_at(self) -> float:
        """When the peer last sent anything on it; -inf for never."""
        return self._stream.heard_at

    @property
    def relayed(self) -> bool:
        """Whether what is sent passes a blind relay, at least until a direct path is found."""
        return self._stream.relayed

    @property
    def half_closed(self) -> bool:
        """Whether our direction has ended: only the peer writes."""
        return self._eof_written

    @property
    def ended(self) -> bool:
        """Whether both directions have ended: nothing more will come or go."""
        return self._eof_written and self._eof_delivered

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Who gets what arrives. Before there is a protocol, nothing is read from the stream: the
        window holds the peer."""
        first = self._protocol is None
        self._protocol = protocol
        if first:
            protocol.connection_made(self)
            if self._lost:
                # It broke while it was under way to whoever has it now.
                self._loop.call_soon(protocol.connection_lost, self._error)
            else:
                self._loop.call_soon(self.stream_changed)

    def get_protocol(self) -> asyncio.BaseProtocol:
        if self._protocol is None:
            raise RuntimeError("the channel has no protocol yet: call set_protocol first")
        return self._protocol

    # Reading

    def is_reading(self) -> bool:
        return not (self._paused or self.is_closing())

    def pause_reading(self) -> None:
        """Deliver nothing more; the window closes as the peer fills it. A channel that closes goes
        on to drop what arrives, or the peer could never end."""
        self._paused = not self.is_closing()

    def resume_reading(self) -> None:
        if not self._paused:
            return
        self._paused = False
        self._loop.call_soon(self.stream_changed)

    def stream_changed(self) -> None:
        """Deliver what the stream has. The owner calls it when the stream has changed."""
        if self._lost:
            return
        stream = self._stream
        try:
            self._deliver()
            if self._writing_paused:
                self._control_writing()
        except ProtocolError as error:
            self.fail(error)
        except Exception as error:
            # The protocol's own. It must not disturb the owner, who serves other channels too.
            self._loop.call_exception_handler(
                {
                    "message": "a channel's protocol raised",
                    "exception": error,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )
            self.fail(error)
        if stream.closed:
            self._finish_if_closed()

    def _deliver(self) -> None:
        if self._protocol is None and not self._closing:
            return
        stream, secret, pending = self._stream, self._secret, self._pending
        before = self.bytes_read
        while True:
            while pending and not self._paused:
                self._data_received(pending.popleft())
                if self._lost:
                    # The protocol has aborted: what is left is nobody's.
                    return
            if self._paused or not stream.readable:
                break
            for chunk in stream.read(READ):
                self._uncredited += len(chunk)
                whole = None if pending or self._paused else secret.receive_whole(chunk)
                if whole is not None:
                    if whole:
                        self._data_received(whole)
                    if self._lost:
                        return
                    continue
                try:
                    messages = secret.receive(chunk)
                except StreamError as error:
                    # What came whole before the damage is the peer's word, and is delivered.
                    for message in (*pending, *error.messages):
                        self._data_received(message)
                    raise
                pending.extend(messages)
        if self.bytes_read != before:
            self.moved_at = self._loop.time()
        if self._uncredited:
            stream.authentic = secret.authentic
            stream.expects = secret.buffered > 0
            if self._uncredited >= CREDIT:
                self._credit()
        if stream.remote_ended and not (stream.readable or pending or self._paused):
            self._end_reading()

    def _data_received(self, data: bytes) -> None:
        if not (self._closing or self._lost):
            self.bytes_read += len(data)
            self._protocol.data_received(data)  # type: ignore[union-attr]

    def _credit(self) -> None:
        # While the protocol pauses, the last read stays on the window's account. An incomplete
        # message must not close the window on its own rest.
        if not self._paused or self._secret.buffered > READ:
            self._stream.credit(self._uncredited, self._loop.time())
            self._uncredited = 0
            if self._stream.dirty:
                self._wake()

    def _end_reading(self) -> None:
        if self._eof_delivered:
            return
        self._eof_delivered = True
        if self._secret.buffered:
            raise ProtocolError("the peer's stream ended inside a message")
        if self._closing:
            return
        keep_open = cast(asyncio.Protocol, self._protocol).eof_received()
        if not keep_open:
            self.close()

    # Writing

    def write(self, data: Buffer) -> None:
        """Encrypt and queue; messages of at most `MESSAGE` bytes each. Ignored once the channel
        closes or is lost, as asyncio's transports do; RuntimeError after `write_eof`."""
        stream = self._stream
        if self._closing or self._lost or stream.closed:
            return
        if self._eof_written:
            raise RuntimeError("the channel's writing side has ended")
        if not data:
            return
        now = self._loop.time()
        size = len(data)
        if size <= MESSAGE:
            for frame in self._secret.encrypt(data):
                stream.write(frame, now)
        else:
            view = memoryview(data)
            for start in range(0, size, MESSAGE):
                for frame in self._secret.encrypt(view[start : start + MESSAGE]):
                    stream.write(frame, now)
        self.bytes_written += size
        self.moved_at = now
        if not self._wrote(self):
            self._wake()
        if stream.unsent > self._high:
            self._control_writing()

    def keep_alive(self) -> None:
        """Write the empty message that keeps NATs open and that the peer must acknowledge (spec:
        secure-stream-and-registry 4.5). After our end, and behind what waits for the peer's window,
        a packet asks for an ACK instead; it may get lost (spec: udx 2.7)."""
        stream = self._stream
        if self._lost or stream.closed:
            return
        now = self._loop.time()
        if self._eof_written or stream.unsent:
            stream.heartbeat(now)
        else:
            for frame in self._secret.keep_alive():
                stream.write(frame, now)
        self._wake()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """End our direction behind everything written; the other stays open."""
        if self._eof_written or self._lost:
            return
        self._eof_written = True
        if not self._stream.closed:
            self._stream.end(self._loop.time())
            self._wake()

    def get_write_buffer_size(self) -> int:
        """Bytes written that are not in flight yet."""
        return self._stream.unsent

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = WRITE_HIGH if high is None else high
        self._low = self._high // 4 if low is None else low
        self._control_writing()

    def _control_writing(self) -> None:
        if self._protocol is None or self._lost:
            return
        unsent = self._stream.unsent
        if not self._writing_paused and unsent > self._high:
            self._writing_paused = self._stream.wants_room = True
            self._protocol.pause_writing()
        elif self._writing_paused and unsent <= self._low:
            self._writing_paused = self._stream.wants_room = False
            self._protocol.resume_writing()

    # Closing

    def is_closing(self) -> bool:
        return self._closing or self._lost

    def close(self) -> None:
        """End our direction, drop what still arrives, and be closed when the peer has everything
        and has ended too, or after `LINGER` seconds."""
        if self._closing or self._lost:
            return
        self._closing = True
        self._paused = False
        self.write_eof()
        self._linger = self._loop.call_later(LINGER, self.abort)
        self._loop.call_soon(self.stream_changed)

    def abort(self) -> None:
        """Destroy the stream at once; the peer sees a reset."""
        if not self._stream.closed:
            self._stream.destroy(self._loop.time())
            self._wake()
        self._lose(None)

    def fail(self, error: Exception) -> None:
        """Destroy the stream at once, and tell the protocol why; nothing, if both directions have
        ended and all has come."""
        if self.ended and isinstance(error, Broken):
            # Everything arrived; only the acknowledgement of the end was lost (spec: udx 8.10).
            self.abort()
            return
        if not self._stream.closed:
            self._stream.destroy(self._loop.time())
            self._wake()
        self._lose(error)

    def _finish_if_closed(self) -> None:
        stream = self._stream
        if not stream.closed or self._lost:
            return
        error = stream.error
        if error is None:
            # A clean close: what has not been delivered yet is delivered first.
            if self._eof_delivered or self._closing:
                self._lose(None)
            return
        self.fail(error)

    def _lose(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        self._error = error
        self._pending.clear()
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        self._on_closed(self)
        if self._protocol is not None:
            self._loop.call_soon(self._protocol.connection_lost, error)
