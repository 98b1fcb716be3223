"""Several channels on one stream of messages (spec: hyperdht 5.8).

Each message is one frame. A frame is a channel's own or, beginning with 0, about channels:

    channel | type | payload              for the sender's channel of that number, 1 and up
    0 | 1 | channel | protocol | key      open: the sender's number, a name, an optional key
    0 | 2 | channel                       reject: the receiver's number
    0 | 3 | channel                       close: the sender's number
    0 | 0 | channel | (size | frame)...   batch: frames without their channel; size 0 and a number
                                          say that others follow, of that channel

Both ends number their channels by themselves. A channel works once both have opened the same
protocol and key; who opens may send at once. Messages in, events and messages out; what the peer
opens and this end has not opened before is rejected, so nothing waits here for anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from msgspec import Struct

from .encoding import Reader, Writer
from .errors import Closed, InvalidInput, LocalError, ProtocolError
from .transmit import Buffer

#: Bytes of one frame, either way: a batch of the small messages that this is for stays far below.
MAX_FRAME = 64 * 1024
#: Frames in one batch: each makes an event and perhaps an answer.
MAX_BATCH = 1024
#: Channels of each end at once, those that wait for the other end included.
MAX_CHANNELS = 64

_CONTROL = 0
_BATCH = 0
_OPEN = 1
_REJECT = 2
_CLOSE = 3


class ChannelOpened(Struct, frozen=True):
    """The peer has opened this channel as well."""

    channel: int


class ChannelMessage(Struct, frozen=True):
    """A message of the peer on a channel that both have opened."""

    channel: int
    type: int
    payload: bytes


class ChannelClosed(Struct, frozen=True):
    """The peer has closed the channel, or rejected it: its number means nothing any more."""

    channel: int
    rejected: bool


class ProtomuxFailure(Struct, frozen=True):
    """The last event of a peer that broke the protocol: destroy the stream."""

    error: ProtocolError


ProtomuxEvent: TypeAlias = ChannelOpened | ChannelMessage | ChannelClosed | ProtomuxFailure

#: What a channel is for: protocol and key.
_Purpose: TypeAlias = tuple[str, bytes | None]


@dataclass(slots=True)
class _Channel:
    """One that this end has opened. Without ``remote``, the peer's number, it waits for the peer,
    and that even when it was closed: the peer may open it before it hears of that."""

    purpose: _Purpose
    remote: int = 0
    closed: bool = False


class Protomux:
    """One end of one stream. Channels are named by their numbers, this end's."""

    __slots__ = ("_channels", "_failed", "_messages", "_remotes")

    def __init__(self) -> None:
        self._channels: dict[int, _Channel] = {}
        # The peer's numbers, which it counts up and uses again: the channel here, or 0.
        self._remotes: list[int] = []
        self._messages: list[bytes] = []
        self._failed = False

    def open(self, protocol: str, key: bytes | None = None) -> int:
        """Open a channel, for which the peer must open one of the same protocol and key. Raises
        `LocalError` if this end has it open already or has `MAX_CHANNELS`."""
        purpose = protocol, key or None
        if any(one.purpose == purpose and not one.closed for one in self._channels.values()):
            raise LocalError(f"a channel for {protocol} is open: use that one")
        if len(self._channels) >= MAX_CHANNELS:
            raise LocalError(f"{MAX_CHANNELS} channels are open: close some first")
        channel = next(n for n in range(1, MAX_CHANNELS + 1) if n not in self._channels)
        self._channels[channel] = _Channel(purpose)
        writer = Writer().uint(_CONTROL).uint(_OPEN).uint(channel)
        self._say(writer.string(protocol).buffer(key))
        return channel

    def is_open(self, channel: int) -> bool:
        """Whether both ends have opened it and none has closed it."""
        own = self._channels.get(channel)
        return own is not None and own.remote > 0

    def send(self, channel: int, kind: int, payload: Buffer) -> None:
        """Send a message of type ``kind``, at once after `open` if need be. Raises `Closed` for a
        channel that is closed, and `InvalidInput` for more than `MAX_FRAME` bytes."""
        own = self._channels.get(channel)
        if own is None or own.closed:
            raise Closed("the channel is closed: open another")
        self._say(Writer().uint(channel).uint(kind).raw(payload))

    def close(self, channel: int) -> None:
        """Close a channel. Harmless when it is closed."""
        own = self._channels.get(channel)
        if own is None or own.closed:
            return
        own.closed = True
        if own.remote:
            self._forget(channel, own)
        self._say(Writer().uint(_CONTROL).uint(_CLOSE).uint(channel))

    def messages(self) -> list[bytes]:
        """The messages to send now, in order; each is returned once."""
        messages, self._messages = self._messages, []
        return messages

    def receive(self, message: bytes) -> list[ProtomuxEvent]:
        """What one message says. Never raises; after a `ProtomuxFailure` all are ignored."""
        events: list[ProtomuxEvent] = []
        if self._failed or not message:
            return events
        try:
            if len(message) > MAX_FRAME:
                raise ProtocolError(f"frame of {len(message)} bytes")
            reader = Reader(message)
            self._frame(reader.uint(), reader, events)
        except ProtocolError as error:
            self._failed = True
            self._channels.clear()
            self._messages.clear()
            events.append(ProtomuxFailure(error))
        return events

    def _batch(self, reader: Reader, events: list[ProtomuxEvent]) -> None:
        channel = reader.uint()
        for _ in range(MAX_BATCH):
            if not reader.remaining:
                return
            frame = reader.buffer()
            if frame:
                self._frame(channel, Reader(frame), events, batched=True)
            else:
                channel = reader.uint()
        if reader.remaining:
            raise ProtocolError(f"batch of more than {MAX_BATCH} frames")

    def _frame(
        self, remote: int, reader: Reader, events: list[ProtomuxEvent], *, batched: bool = False
    ) -> None:
        kind = reader.uint()
        if remote != _CONTROL:
            # One that is closed here may have been under way.
            if channel := self._local(remote):
                events.append(ChannelMessage(channel, kind, reader.raw()))
        elif kind == _OPEN:
            self._on_open(reader, events)
        elif kind == _REJECT:
            self._on_reject(reader.uint(), events)
        elif kind == _CLOSE:
            self._on_close(reader.uint(), events)
        elif kind == _BATCH:
            if batched:
                raise ProtocolError("batch inside a batch")
            self._batch(reader, events)

    def _on_open(self, reader: Reader, events: list[ProtomuxEvent]) -> None:
        remote = reader.uint()
        purpose = reader.string(), reader.optional_buffer()
        if remote > 0:
            self._admit(remote)
            for channel, own in self._channels.items():
                if own.purpose == purpose and not own.remote:
                    self._match(channel, own, remote, events)
                    return
        self._say(Writer().uint(_CONTROL).uint(_REJECT).uint(remote))

    def _admit(self, remote: int) -> None:
        if remote == len(self._remotes) + 1 and remote <= MAX_CHANNELS:
            self._remotes.append(0)
        if remote > len(self._remotes) or self._remotes[remote - 1]:
            raise ProtocolError(f"channel {remote} opened twice or out of turn")

    def _match(self, channel: int, own: _Channel, remote: int, events: list[ProtomuxEvent]) -> None:
        if own.closed:
            # The close that is under way answers this.
            del self._channels[channel]
            return
        own.remote = remote
        self._remotes[remote - 1] = channel
        events.append(ChannelOpened(channel))

    def _on_reject(self, channel: int, events: list[ProtomuxEvent]) -> None:
        own = self._channels.get(channel)
        if own is None or own.remote:
            raise ProtocolError(f"channel {channel} rejected, which does not wait")
        del self._channels[channel]
        if not own.closed:
            events.append(ChannelClosed(channel, True))

    def _on_close(self, remote: int, events: list[ProtomuxEvent]) -> None:
        if channel := self._local(remote):
            self._forget(channel, self._channels[channel])
            events.append(ChannelClosed(channel, False))

    def _local(self, remote: int) -> int:
        return self._remotes[remote - 1] if 0 < remote <= len(self._remotes) else 0

    def _forget(self, channel: int, own: _Channel) -> None:
        self._remotes[own.remote - 1] = 0
        del self._channels[channel]

    def _say(self, frame: Writer) -> None:
        message = bytes(frame)
        if len(message) > MAX_FRAME:
            raise InvalidInput(f"a frame has at most {MAX_FRAME} bytes, not {len(message)}")
        self._messages.append(message)
