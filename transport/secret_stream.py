"""The encrypted stream of messages on top of a byte stream (spec: secure-stream-and-registry 4).

Each direction is a header frame, then one frame a message. A frame is 3 bytes little-endian length
and that many bytes of body. Bytes in, messages out and the reverse; ends and timers are the
business of whoever owns the byte stream.

    wait for header --56 bytes with the peer's stream id--> open --anything malformed--> failed
"""

from __future__ import annotations

from random import Random

from nacl import bindings
from nacl.exceptions import CryptoError

from .errors import InvalidInput, LocalError, ProtocolError
from .keys import NS_INITIATOR, NS_RESPONDER, NS_SEND, blake2b
from .noise import Handshake
from .stream_cipher import HEADER_BYTES, OVERHEAD_BYTES, Damaged, StreamCipher
from .transmit import Buffer

LENGTH_BYTES = 3
#: A message's body is this much longer than the message: one tag byte and 16 bytes of MAC.
MESSAGE_OVERHEAD = OVERHEAD_BYTES
#: The largest plain message that the 3-byte length can announce (spec 4.3).
MAX_MESSAGE = 2**24 - 1 - MESSAGE_OVERHEAD
#: How often a side that has nothing to say sends `SecretStream.keep_alive`, in seconds (spec 4.5).
KEEP_ALIVE_INTERVAL = 5.0

_ID_BYTES = 32
_HEADER_BYTES = _ID_BYTES + HEADER_BYTES

_COUNTER_BYTES = 8
_COUNTER_MASK = 2**64 - 1
_NONCE_REST = bytes(bindings.crypto_secretbox_NONCEBYTES - _COUNTER_BYTES)
_UNORDERED_MIN = _COUNTER_BYTES + bindings.crypto_secretbox_MACBYTES


class StreamError(ProtocolError):
    """The peer's bytes are no valid stream: destroy the byte stream."""

    def __init__(self, text: str, messages: list[bytes] | None = None) -> None:
        super().__init__(text)
        #: The messages that the same bytes completed before the defect: whole and authentic.
        self.messages = messages or []


class SecretStream:
    """Both directions of one encrypted stream, for either side of a finished handshake.

    ``max_message`` (bytes) bounds the messages both ways, and so what is buffered.
    """

    __slots__ = (
        "_body",
        "_counter",
        "_error",
        "_first_counter",
        "_handshake",
        "_length",
        "_max_message",
        "_prefix",
        "_receiver",
        "_rng",
        "_sender",
        "authentic",
    )

    def __init__(
        self, handshake: Handshake, rng: Random, *, max_message: int = MAX_MESSAGE
    ) -> None:
        self._handshake = handshake
        self._rng = rng
        self._max_message = min(max_message, MAX_MESSAGE)
        self._sender: StreamCipher | None = None
        self._receiver: StreamCipher | None = None
        self._error: str | None = None
        # The frame being received: its length once that is known, the bytes of the length until
        # then, and what has come of its body.
        self._length: int | None = None
        self._prefix = b""
        self._body = bytearray()
        self._first_counter: int | None = None
        self._counter = 0
        #: Messages that have come whole and from the peer itself, keep-alives too.
        self.authentic = 0

    # Sending

    def start(self) -> bytes:
        """The 59-byte header frame: the first bytes of this direction, sent at once (spec 4.2)."""
        if self._sender is not None:
            raise LocalError("a stream starts once")
        header = self._rng.randbytes(HEADER_BYTES)
        self._sender = StreamCipher(header, self._handshake.tx)
        return (
            _HEADER_BYTES.to_bytes(LENGTH_BYTES, "little")
            + self._handshake.local_stream_id
            + header
        )

    def encrypt(self, data: Buffer) -> list[Buffer]:
        """The frame of one message, in pieces: ``len(data) + 20`` bytes.

        The peer gets exactly this message, neither split nor joined. An empty one is a keep-alive.
        Raises `InvalidInput` above the stream's ``max_message``.
        """
        if self._sender is None:
            raise LocalError("start the stream before its first message")
        size = len(data)
        if size > self._max_message:
            raise InvalidInput(f"a message has at most {self._max_message} bytes, not {size}")
        body = self._sender.seal(data)
        return [(size + MESSAGE_OVERHEAD).to_bytes(LENGTH_BYTES, "little") + body[0], *body[1:]]

    def keep_alive(self) -> list[Buffer]:
        """The frame of an empty message: 20 bytes, due after 5 s without another (spec 4.5)."""
        return self.encrypt(b"")

    # Receiving

    @property
    def opened(self) -> bool:
        """Whether the peer's header has come and is right."""
        return self._receiver is not None

    @property
    def buffered(self) -> int:
        """Bytes held of a frame that is not complete."""
        length = len(self._prefix) if self._length is None else LENGTH_BYTES
        return length + len(self._body)

    @property
    def truncated(self) -> bool:
        """Whether an end of the byte stream now would be inside a frame (spec 4.4)."""
        return self.buffered > 0

    def receive_whole(self, data: Buffer) -> bytes | None:
        """The message whose frame these bytes are, if they are just that and it is authentic, as
        small ones mostly are: for half the time of `receive`. None: that finds out what they are.
        Empty for a keep-alive."""
        length = len(data) - LENGTH_BYTES
        receiver = self._receiver
        if (
            receiver is None
            or self._length is not None
            or self._prefix
            or not MESSAGE_OVERHEAD <= length <= self._max_message + MESSAGE_OVERHEAD
            or data[0] | data[1] << 8 | data[2] << 16 != length
            or self._error is not None
        ):
            return None
        try:
            message = receiver.open(data[LENGTH_BYTES:])
        except Damaged:
            return None
        self.authentic += 1
        return message

    def receive(self, data: Buffer) -> list[bytes]:
        """The messages that these bytes complete; empty ones are keep-alives and left out.

        Bytes may be cut anywhere. Raises `StreamError` on the first defect and at every call from
        then on; nothing after a defect is decrypted.
        """
        if self._error is not None:
            raise StreamError(self._error)
        messages: list[bytes] = []
        try:
            self._frames(memoryview(data), messages)
        except _DefectError as defect:
            self._error = str(defect)
            self._prefix = b""
            self._length = None
            self._body = bytearray()
            raise StreamError(self._error, messages) from defect.__cause__
        return messages

    def _frames(self, view: memoryview, messages: list[bytes]) -> None:
        position = 0
        end = len(view)
        while position < end:
            length = self._length
            if length is None:
                start = position
                position = min(start + LENGTH_BYTES - len(self._prefix), end)
                prefix = self._prefix + view[start:position]
                if len(prefix) < LENGTH_BYTES:
                    self._prefix = prefix
                    return
                self._prefix = b""
                length = self._checked(int.from_bytes(prefix, "little"))
            start = position
            position = start + length - len(self._body)
            if position > end:
                # Grows with what has come: an announced length alone costs no memory.
                self._body += view[start:]
                self._length = length
                return
            body: Buffer = view[start:position]
            if self._body:
                self._body += body
                body = self._body
                self._body = bytearray()
            self._length = None
            self._open(body, messages)

    def _checked(self, length: int) -> int:
        if self._receiver is None:
            if length != _HEADER_BYTES:
                raise _DefectError(f"stream header of {length} bytes, not {_HEADER_BYTES}")
        elif length < MESSAGE_OVERHEAD:
            raise _DefectError(f"message of {length} bytes, shorter than its own MAC")
        elif length > self._max_message + MESSAGE_OVERHEAD:
            raise _DefectError(f"message of {length} bytes, longer than is accepted here")
        return length

    def _open(self, body: Buffer, messages: list[bytes]) -> None:
        receiver = self._receiver
        if receiver is None:
            if body[:_ID_BYTES] != self._handshake.remote_stream_id:
                raise _DefectError("stream header of another connection")
            self._receiver = StreamCipher(bytes(body[_ID_BYTES:]), self._handshake.rx)
            return
        try:
            message = receiver.open(body)
        except Damaged as error:
            raise _DefectError("message is damaged, replayed or out of order") from error
        self.authentic += 1
        if message:
            messages.append(message)

    # Unordered messages

    def encode_message(self, message: Buffer) -> bytes:
        """The payload of a UDX MESSAGE: 8 bytes counter, 16 bytes tag, ciphertext (spec 4.7)."""
        if self._first_counter is None:
            first = int.from_bytes(self._rng.randbytes(_COUNTER_BYTES), "little")
            self._first_counter = self._counter = first
        counter = (self._counter + 1) & _COUNTER_MASK
        if counter == self._first_counter:
            raise LocalError("no nonce is left for unordered messages: open a new stream")
        self._counter = counter
        nonce = counter.to_bytes(_COUNTER_BYTES, "little")
        key = _unordered_key(self._handshake, self._handshake.is_initiator)
        return nonce + bindings.crypto_secretbox(bytes(message), nonce + _NONCE_REST, key)

    def decode_message(self, payload: Buffer) -> bytes | None:
        """The message in a UDX MESSAGE of the peer, or None to ignore it. Replays are not seen."""
        if len(payload) < _UNORDERED_MIN:
            return None
        nonce = bytes(payload[:_COUNTER_BYTES])
        key = _unordered_key(self._handshake, not self._handshake.is_initiator)
        try:
            return bindings.crypto_secretbox_open(
                bytes(payload[_COUNTER_BYTES:]), nonce + _NONCE_REST, key
            )
        except CryptoError:
            return None


class _DefectError(Exception):
    """What is wrong with the peer's bytes; never leaves this module."""


def _unordered_key(handshake: Handshake, from_initiator: bool) -> bytes:
    namespace = NS_INITIATOR if from_initiator else NS_RESPONDER
    return blake2b(namespace, NS_SEND, key=handshake.hash)
