"""Peers whose address changes while they are connected: after their router has forgotten them, or
in another network. The stream goes on where they are now.

Nobody is told that an address has changed, and no packet of UDX proves who sent it. So a packet of
a connected stream that comes from elsewhere is not let in; it makes its source a candidate, and
raises doubts about the address that the stream has, its home:

    quiet --a stray--> in doubt --home is heard--> at rest --REST--> quiet
                          |------ a candidate gives proof, and home stays silent -----> moved
                          `------ nothing for PATIENCE ------> quiet (its stream times out)

While in doubt, home gets a HEARTBEAT, which every peer answers, and each candidate a challenge,
which only the true peer can answer, and only from there. Home's answer outweighs a proof: whoever
passes a challenge on to the true peer must not get into its way.

    challenge, answer: 1 byte 1 or 2 | 16 bytes token | 16 bytes MAC    (in a MESSAGE of UDX)

The MAC's keys are the stream's, one for each direction. Programs that do not know of this
ignore it, as they do all unordered messages (spec: secure-stream-and-registry 4.7). A peer of that
kind gets a trial when all else has failed: what comes from the candidate is let in, as the
reference always does, and acknowledged there. A message of the secret stream that is completed by
this proves that the peer is there.

A proof on one stream moves all streams of the peer that had the same home.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from ..keys import blake2b
from ..noise import Handshake
from ..transmit import Address
from ..udx import packet as wire
from ..udx.packet import Packet
from ..udx.stream import Stream
from .timers import Timer, Timers

CHALLENGE = 1
ANSWER = 2
TOKEN_BYTES = 16
MAC_BYTES = 16
_MESSAGE_BYTES = 1 + TOKEN_BYTES + MAC_BYTES
_DOMAIN = b"hyperseaport path"

#: Seconds in which home would have been heard, if it was there: two round trips, within limits.
MIN_SILENCE, MAX_SILENCE = 0.05, 1.0
#: Seconds that doubts may take to begin in earnest: home is heard all the time meanwhile.
HESITATION = 0.5
#: Seconds after home was heard in which strays raise no doubts: each costs a HEARTBEAT.
REST = 0.5
#: Seconds between two rounds of questions: the first, twice as long each time, and the last.
FIRST_WAIT, LAST_WAIT = 0.1, 2.0
#: Seconds without a proof after which nobody is asked any more: streams time out then (spec: udx
#: 4.6), and so do peers.
PATIENCE = 15.0
#: Sources of one peer's strays that are asked. Others get in when one of them was silent.
MAX_CANDIDATES = 4
CANDIDATE_AGE = 1.0
#: Doubts at once. Each takes a stray that names one of our streams.
MAX_DOUBTS = 1024
#: Seconds of questions without an answer after which a candidate is tried, and the packets that are
#: let in by that: enough for the longest messages of the Node programs.
TRIAL_AFTER = 0.8
TRIAL_PACKETS = 256
#: Numbers that a packet on trial may be away from what is expected.
TRIAL_REACH = 4096

#: A socket of ours, and an address that it reaches.
Path = tuple[int, Address]


@dataclass(slots=True, eq=False)
class _Candidate:
    path: Path
    #: One of the peer's streams that was seen there.
    stream: Stream
    token: bytes
    seen_at: float
    asked_at: float | None = None
    answered: bool = False
    #: Packets that were let in on trial, and what was authentic before the first.
    tried: int = 0
    authentic: int = 0


@dataclass(slots=True, eq=False)
class _Doubt:
    """About one home of one peer."""

    public_key: bytes
    home: Path
    began: float
    #: When home was first asked whether it is there.
    asked_at: float | None = None
    wait: float = FIRST_WAIT
    at_rest: bool = False
    timer: Timer | None = None
    candidates: dict[Path, _Candidate] = field(default_factory=dict)
    #: When something was last let in on trial, which is no word from home.
    tried_at: dict[Stream, float] = field(default_factory=dict)


class Moves:
    """Watches streams (`udx.exchange.Watcher`). ``on_moved(public key, home, new path, now)`` is
    called when a peer's streams have moved."""

    __slots__ = ("_doubts", "_handshakes", "_on_moved", "_rng", "_streams", "_timers", "moved")

    def __init__(
        self,
        timers: Timers,
        rng: Random,
        on_moved: Callable[[bytes, Path, Path, float], None],
    ) -> None:
        self._timers = timers
        self._rng = rng
        self._on_moved = on_moved
        self._handshakes: dict[Stream, Handshake] = {}
        self._streams: dict[bytes, dict[Stream, None]] = {}
        self._doubts: dict[tuple[bytes, Path], _Doubt] = {}
        #: Peers that were followed to another address.
        self.moved = 0

    def __len__(self) -> int:
        """Homes that are in doubt."""
        return len(self._doubts)

    def watch(self, stream: Stream, handshake: Handshake) -> None:
        """Follow this connected stream's peer from now on, until it closes."""
        stream.watcher = self
        self._handshakes[stream] = handshake
        self._streams.setdefault(handshake.remote_public_key, {})[stream] = None

    def streams(self, public_key: bytes) -> tuple[Stream, ...]:
        """Those of a peer that are watched."""
        return tuple(self._streams.get(public_key, ()))

    def consider(self, stream: Stream, path: Path, now: float) -> None:
        """The stream's peer may be there: ask, if it is not heard where it was."""
        doubt = self._doubt(stream, now)
        if doubt is not None and not doubt.at_rest:
            self._candidate(doubt, stream, path, now)

    # For the streams

    def closed(self, stream: Stream) -> None:
        """It is over."""
        handshake = self._handshakes.pop(stream, None)
        if handshake is None:
            return
        key = handshake.remote_public_key
        streams = self._streams[key]
        del streams[stream]
        if not streams:
            del self._streams[key]

    def told(self, stream: Stream, payload: bytes, now: float) -> bool:
        """A message from home: answer it if it is a challenge."""
        handshake = self._handshakes[stream]
        token = _open(CHALLENGE, payload, handshake)
        if token is None:
            return False
        stream.send_message(_seal(ANSWER, token, handshake), now)
        return True

    def stray(
        self, stream: Stream, packet: Packet, socket: int, source: Address, now: float
    ) -> bool:
        """A packet came from elsewhere. True lets it in."""
        doubt = self._doubt(stream, now)
        if doubt is None or doubt.at_rest or source[1] == 0:
            return False
        candidate = self._candidate(doubt, stream, (socket, source), now)
        if candidate is None:
            return False
        if packet.type == wire.MESSAGE:
            self._on_message(doubt, candidate, stream, packet.payload, now)
            return False
        return self._try(doubt, candidate, stream, packet, now)

    def let_in(self, stream: Stream, socket: int, source: Address) -> None:
        """What `stray` has let in was taken."""
        if not stream.closed:
            stream.acknowledge_aside(socket, source)

    # Doubts

    def _doubt(self, stream: Stream, now: float) -> _Doubt | None:
        key = self._handshakes[stream].remote_public_key
        home = stream.socket, stream.address
        doubt = self._doubts.get((key, home))
        if doubt is None and len(self._doubts) < MAX_DOUBTS:
            doubt = self._doubts[key, home] = _Doubt(key, home, now)
            # Once for all that arrives together.
            doubt.timer = self._timers.at(now, partial(self._look, doubt))
        return doubt

    def _candidate(
        self, doubt: _Doubt, stream: Stream, path: Path, now: float
    ) -> _Candidate | None:
        candidates = doubt.candidates
        candidate = candidates.get(path)
        if candidate is not None:
            candidate.seen_at = now
            if candidate.stream.closed:
                candidate.stream = stream
            return candidate
        if len(candidates) >= MAX_CANDIDATES:
            oldest = min(candidates.values(), key=lambda each: each.seen_at)
            if now - oldest.seen_at < CANDIDATE_AGE:
                return None
            del candidates[oldest.path]
        token = self._rng.randbytes(TOKEN_BYTES)
        candidate = candidates[path] = _Candidate(path, stream, token, now)
        if doubt.asked_at is not None:
            self._challenge(candidate, now)
        return candidate

    def _look(self, doubt: _Doubt, now: float) -> None:
        """Some time has passed."""
        doubt.timer = None
        streams = self._at_home(doubt)
        if doubt.at_rest or not streams or now - doubt.began >= PATIENCE:
            del self._doubts[doubt.public_key, doubt.home]
            return
        heard_at = self._heard_at(doubt, streams)
        silence = self._silence(streams[0])
        if doubt.asked_at is None:
            if heard_at + silence <= now:
                self._ask(doubt, streams[0], now)
            elif now - doubt.began >= HESITATION:
                self._rest(doubt, now)
            else:
                self._look_at(doubt, heard_at + silence)
            return
        if heard_at > doubt.asked_at:
            self._rest(doubt, now)
            return
        proven = [each for each in doubt.candidates.values() if each.answered or _vouched(each)]
        if proven and doubt.asked_at + silence <= now:
            self._move(doubt, max(proven, key=lambda each: each.seen_at), streams, now)
            return
        self._ask(doubt, streams[0], now)

    def _ask(self, doubt: _Doubt, stream: Stream, now: float) -> None:
        stream.heartbeat(now)
        for candidate in doubt.candidates.values():
            self._challenge(candidate, now)
        if doubt.asked_at is None:
            doubt.asked_at = now
            self._look_at(doubt, now + max(self._silence(stream), FIRST_WAIT))
            return
        doubt.wait = min(2 * doubt.wait, LAST_WAIT)
        self._look_at(doubt, now + doubt.wait)

    def _challenge(self, candidate: _Candidate, now: float) -> None:
        stream = candidate.stream
        if stream.closed or candidate.answered:
            return
        if candidate.asked_at is None:
            candidate.asked_at = now
        stream.send_aside(
            _seal(CHALLENGE, candidate.token, self._handshakes[stream]), *candidate.path
        )

    def _on_message(
        self, doubt: _Doubt, candidate: _Candidate, stream: Stream, payload: bytes, now: float
    ) -> None:
        token = _open(ANSWER, payload, self._handshakes[stream])
        if token is None or token != candidate.token or doubt.asked_at is None:
            return
        candidate.answered = True
        self._look_at(doubt, max(now, doubt.asked_at + self._silence(stream)))

    def _try(
        self, doubt: _Doubt, candidate: _Candidate, stream: Stream, packet: Packet, now: float
    ) -> bool:
        """Whether a packet is let in on trial."""
        asked_at = candidate.asked_at
        if asked_at is None or now < asked_at + TRIAL_AFTER or candidate.tried >= TRIAL_PACKETS:
            return False
        if packet.type & wire.DESTROY or not stream.expects_near(packet, TRIAL_REACH):
            return False
        if not candidate.tried:
            # What has arrived and was not read yet proves nothing.
            if stream.readable:
                return False
            candidate.stream = stream
            candidate.authentic = stream.authentic
        if stream is not candidate.stream:
            return False
        candidate.tried += 1
        doubt.tried_at[stream] = now
        return True

    def _move(
        self, doubt: _Doubt, candidate: _Candidate, streams: list[Stream], now: float
    ) -> None:
        del self._doubts[doubt.public_key, doubt.home]
        self.moved += 1
        for stream in streams:
            stream.migrate(*candidate.path, now)
        self._on_moved(doubt.public_key, doubt.home, candidate.path, now)

    def _rest(self, doubt: _Doubt, now: float) -> None:
        doubt.at_rest = True
        doubt.candidates.clear()
        self._look_at(doubt, now + REST)

    def _look_at(self, doubt: _Doubt, when: float) -> None:
        if doubt.timer is not None:
            doubt.timer.cancel()
        doubt.timer = self._timers.at(when, partial(self._look, doubt))

    def _at_home(self, doubt: _Doubt) -> list[Stream]:
        """The streams in doubt, those first that strays came for."""
        streams = [
            stream
            for stream in self._streams.get(doubt.public_key, ())
            if (stream.socket, stream.address) == doubt.home and not stream.closed
        ]
        seen = {candidate.stream for candidate in doubt.candidates.values()}
        return sorted(streams, key=lambda stream: stream not in seen)

    def _heard_at(self, doubt: _Doubt, streams: list[Stream]) -> float:
        """When home was last heard."""
        tried_at = doubt.tried_at
        heard = [each.heard_at for each in streams if each.heard_at != tried_at.get(each)]
        return max(heard, default=doubt.began)

    def _silence(self, stream: Stream) -> float:
        return min(max(2 * (stream.round_trip or 0.0), MIN_SILENCE), MAX_SILENCE)


def _vouched(candidate: _Candidate) -> bool:
    """Whether the trial has brought a message that only the peer can have written."""
    return candidate.tried > 0 and candidate.stream.authentic > candidate.authentic


def _seal(kind: int, token: bytes, handshake: Handshake) -> bytes:
    return bytes((kind,)) + token + _mac(kind, token, handshake, ours=True)


def _open(kind: int, payload: bytes, handshake: Handshake) -> bytes | None:
    """The token of a message of this kind that the peer has written, or None."""
    if len(payload) != _MESSAGE_BYTES or payload[0] != kind:
        return None
    token, mac = payload[1 : 1 + TOKEN_BYTES], payload[1 + TOKEN_BYTES :]
    right = hmac.compare_digest(mac, _mac(kind, token, handshake, ours=False))
    return token if right else None


def _mac(kind: int, token: bytes, handshake: Handshake, *, ours: bool) -> bytes:
    # The hash would not do: it is made of what everybody saw on the wire, and the server's key.
    key = handshake.tx if ours else handshake.rx
    return blake2b(_DOMAIN, bytes((kind,)), token, key=key)[:MAC_BYTES]
