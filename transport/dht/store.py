"""What a persistent node keeps for others, and the rules by which it does (spec: hyperdht 3.6)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from random import Random
from typing import Generic, Protocol, TypeVar

from msgspec import Struct, structs

from .. import keys
from ..encoding import Reader
from ..errors import DecodeError
from ..transmit import Address
from . import messages
from .messages import SEQ_REUSED, SEQ_TOO_LOW, Announce, MutablePut, MutableValue
from .wire import Request

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

#: Entries of one generation, of which there are two.
MAX_RECORDS = 65_536
MAX_VALUES = 32_768
#: Seconds; an entry really lives 0.67 to 1.33 times as long.
RECORD_AGE = 20 * 60.0
VALUE_AGE = 48 * 3600.0
#: Records in the answer to one LOOKUP.
MAX_LOOKUP = 20
#: Relay addresses kept of one record.
MAX_RELAYS = 3
#: Milliseconds that a bump may be ahead of our clock.
BUMP_DRIFT = 60_000
#: Bytes of one value. More does not fit into the receive buffer of a typical peer, and bounds the
#: memory that strangers can fill to 2 x 32,768 x 2 KiB.
MAX_VALUE_BYTES = 2048


class _Generations:
    """When fresh becomes old: decided when somebody looks, so that an idle store never ticks."""

    __slots__ = ("_max_size", "_period", "_since")

    def __init__(self, max_size: int, max_age: float) -> None:
        self._max_size = max_size
        self._period = max_age * 2 / 3
        self._since: float | None = None

    def turns(self, size: int, now: float) -> int:
        """How often (0, 1 or 2) fresh, which has ``size`` entries, is to become old."""
        if self._since is None:
            self._since = now
        periods = int((now - self._since) / self._period)
        if periods > 0:
            self._since += periods * self._period
            return min(periods, 2)
        if size >= self._max_size:
            self._since = now
            return 1
        return 0


class Cache(Generic[K, V]):
    """One value a key, in two generations. Reading an old entry makes it fresh, unless told not
    to: then a read shows what is there and keeps nobody alive."""

    __slots__ = ("_fresh", "_generations", "_old", "_renew")

    def __init__(self, max_size: int, max_age: float, *, renew: bool = True) -> None:
        self._generations = _Generations(max_size, max_age)
        self._renew = renew
        self._fresh: dict[K, V] = {}
        self._old: dict[K, V] = {}

    def __len__(self) -> int:
        return len(self._fresh) + len(self._old)

    def get(self, key: K, now: float) -> V | None:
        self._turn(now)
        value = self._fresh.get(key)
        if value is not None:
            return value
        value = self._old.get(key)
        if value is not None and self._renew:
            del self._old[key]
            self._fresh[key] = value
        return value

    def put(self, key: K, value: V, now: float) -> None:
        self._turn(now)
        self._old.pop(key, None)
        self._fresh[key] = value

    def pop(self, key: K, now: float) -> V | None:
        self._turn(now)
        fresh, old = self._fresh.pop(key, None), self._old.pop(key, None)
        return old if fresh is None else fresh

    def _turn(self, now: float) -> None:
        for _ in range(self._generations.turns(len(self._fresh), now)):
            self._old, self._fresh = self._fresh, {}


class RecordSet:
    """Many records a topic, by public key, in two generations. Reading keeps nothing alive."""

    __slots__ = ("_fresh", "_generations", "_old", "_size")

    def __init__(self, max_size: int = MAX_RECORDS, max_age: float = RECORD_AGE) -> None:
        self._generations = _Generations(max_size, max_age)
        self._fresh: dict[bytes, dict[bytes, bytes]] = {}
        self._old: dict[bytes, dict[bytes, bytes]] = {}
        #: Records in the fresh generation.
        self._size = 0

    def add(self, topic: bytes, public_key: bytes, record: bytes, now: float) -> None:
        """Without effect on a record that is fresh already."""
        self._turn(now)
        _remove(self._old, topic, public_key)
        records = self._fresh.setdefault(topic, {})
        if public_key not in records:
            records[public_key] = record
            self._size += 1

    def remove(self, topic: bytes, public_key: bytes, now: float) -> None:
        self._turn(now)
        _remove(self._old, topic, public_key)
        if _remove(self._fresh, topic, public_key):
            self._size -= 1

    def sample(self, topic: bytes, count: int, rng: Random, now: float) -> list[bytes]:
        """Up to ``count`` records of the topic, by chance when there are more."""
        self._turn(now)
        records = list(self._fresh.get(topic, {}).values())
        records += self._old.get(topic, {}).values()
        return records if len(records) <= count else rng.sample(records, count)

    def _turn(self, now: float) -> None:
        for _ in range(self._generations.turns(self._size, now)):
            self._old, self._fresh, self._size = self._fresh, {}, 0


def _remove(generation: dict[bytes, dict[bytes, bytes]], topic: bytes, public_key: bytes) -> bool:
    records = generation.get(topic)
    if records is None or records.pop(public_key, None) is None:
        return False
    if not records:
        del generation[topic]
    return True


class Forward(Struct, frozen=True):
    """How a node reaches a server that announced itself to it."""

    #: The encoded `PeerRecord`.
    record: bytes
    #: Where the announcement came from.
    address: Address


class Forwards:
    """The servers that a node answers for: those that announced to it, and its own."""

    __slots__ = ("_announced", "_own")

    def __init__(self) -> None:
        # Reads do not renew: else who is looked up often stays findable long after it died
        # (spec: hyperdht 9.1, pitfall 15).
        self._announced: Cache[bytes, Forward] = Cache(MAX_RECORDS, RECORD_AGE, renew=False)
        self._own: dict[bytes, Callable[[], bytes]] = {}

    def serve(self, target: bytes, record: Callable[[], bytes]) -> None:
        """Answer for a server of this node, which never expires and cannot be overwritten."""
        self._own[target] = record

    def unserve(self, target: bytes) -> None:
        self._own.pop(target, None)

    def get(self, target: bytes, now: float) -> Forward | None:
        """Where to forward to; nothing for a server of this node."""
        return None if target in self._own else self._announced.get(target, now)

    def put(self, target: bytes, forward: Forward, now: float) -> None:
        if target not in self._own:
            self._announced.put(target, forward, now)

    def remove(self, target: bytes, now: float) -> None:
        self._announced.pop(target, now)

    def record(self, target: bytes, now: float) -> bytes | None:
        """What FIND_PEER answers."""
        own = self._own.get(target)
        if own is not None:
            return own()
        forward = self._announced.get(target, now)
        return None if forward is None else forward.record


class _Refresh(Struct, frozen=True):
    """What a link of a hash chain renews."""

    target: bytes
    public_key: bytes
    record: bytes
    #: Whether it is a server's own announcement.
    own: bool


class Responder(Protocol):
    """What a store needs of a `Node`."""

    @property
    def id(self) -> bytes:
        """The node's 32-byte id."""

    def reply(
        self,
        request: Request,
        now: float,
        *,
        value: bytes | None = None,
        error: int = 0,
        token: bool = True,
        closer_nodes: bool = True,
    ) -> None:
        """Answer a request."""


class Store:
    """Answers FIND_PEER to IMMUTABLE_GET. A rule that says "drop" sends nothing.

    ``epoch`` is what added to ``now`` gives the time since 1970 in seconds.
    """

    __slots__ = (
        "_bumps",
        "_commands",
        "_epoch",
        "_forwards",
        "_immutables",
        "_mutables",
        "_node",
        "_records",
        "_refreshes",
        "_rng",
        "dropped",
    )

    def __init__(self, node: Responder, forwards: Forwards, rng: Random, epoch: float) -> None:
        self._node = node
        self._forwards = forwards
        self._rng = rng
        self._epoch = epoch
        self._records = RecordSet()
        self._bumps: Cache[bytes, int] = Cache(MAX_RECORDS, RECORD_AGE)
        self._refreshes: Cache[bytes, _Refresh] = Cache(MAX_RECORDS, RECORD_AGE)
        self._mutables: Cache[bytes, MutableValue] = Cache(MAX_VALUES, VALUE_AGE)
        self._immutables: Cache[bytes, bytes] = Cache(MAX_VALUES, VALUE_AGE)
        self._commands: dict[int, Callable[[Request, bytes, float], bool]] = {
            messages.FIND_PEER: self._find_peer,
            messages.LOOKUP: self._lookup,
            messages.ANNOUNCE: self._announce,
            messages.UNANNOUNCE: self._unannounce,
            messages.MUTABLE_PUT: self._mutable_put,
            messages.MUTABLE_GET: self._mutable_get,
            messages.IMMUTABLE_PUT: self._immutable_put,
            messages.IMMUTABLE_GET: self._immutable_get,
        }
        #: Requests that got no answer.
        self.dropped = 0

    def on_request(self, request: Request, now: float) -> bool:
        """Answer or drop a request. False if the command is none of a store's."""
        command = self._commands.get(request.command)
        if command is None:
            return False
        try:
            handled = request.target is not None and command(request, request.target, now)
        except DecodeError:
            handled = False
        if not handled:
            self.dropped += 1
        return True

    def _find_peer(self, request: Request, target: bytes, now: float) -> bool:
        self._node.reply(request, now, value=self._forwards.record(target, now))
        return True

    def _lookup(self, request: Request, target: bytes, now: float) -> bool:
        records = self._records.sample(target, MAX_LOOKUP, self._rng, now)
        forward = self._forwards.record(target, now)
        if forward is not None and len(records) < MAX_LOOKUP:
            records.append(forward)
        value = None
        if records:
            value = messages.encode_lookup_reply(records, self._bumps.get(target, now) or 0)
        self._node.reply(request, now, value=value)
        return True

    def _announce(self, request: Request, target: bytes, now: float) -> bool:
        if request.token is None or request.value is None:
            return False
        announce = Announce.decode(request.value)
        if announce.peer is None:
            return announce.refresh is not None and self._refresh(request, announce.refresh, now)
        if not self._signed(request, target, announce, keys.NS_ANNOUNCE):
            return False
        peer = structs.replace(
            announce.peer, relay_addresses=announce.peer.relay_addresses[:MAX_RELAYS]
        )
        entry = _Refresh(
            target, peer.public_key, peer.encode(), keys.target(peer.public_key) == target
        )
        if entry.own:
            self._records.remove(target, peer.public_key, now)
        elif (self._bumps.get(target, now) or 0) < announce.bump <= self._bump_limit(now):
            self._bumps.put(target, announce.bump, now)
        self._renew(entry, request.source, now)
        if announce.refresh is not None:
            self._refreshes.put(announce.refresh, entry, now)
        self._acknowledge(request, now)
        return True

    def _refresh(self, request: Request, link: bytes, now: float) -> bool:
        entry = self._refreshes.pop(keys.blake2b(link), now)
        if entry is None:
            return False
        self._renew(entry, request.source, now)
        self._refreshes.put(link, entry, now)
        self._acknowledge(request, now)
        return True

    def _renew(self, entry: _Refresh, source: Address, now: float) -> None:
        if entry.own:
            self._forwards.put(entry.target, Forward(entry.record, source), now)
        else:
            self._records.add(entry.target, entry.public_key, entry.record, now)

    def _unannounce(self, request: Request, target: bytes, now: float) -> bool:
        if request.token is None or request.value is None:
            return False
        announce = Announce.decode(request.value)
        if announce.peer is None or not self._signed(request, target, announce, keys.NS_UNANNOUNCE):
            return False
        self._records.remove(target, announce.peer.public_key, now)
        if keys.target(announce.peer.public_key) == target:
            self._forwards.remove(target, now)
        self._acknowledge(request, now)
        return True

    def _signed(
        self, request: Request, target: bytes, announce: Announce, namespace: bytes
    ) -> bool:
        if announce.signature is None or announce.peer is None or request.token is None:
            return False
        signable = messages.announce_signable(
            namespace,
            target,
            self._node.id,
            request.token,
            announce.peer.encode(),
            announce.refresh or b"",
        )
        return keys.verify(announce.signature, signable, announce.peer.public_key)

    def _acknowledge(self, request: Request, now: float) -> None:
        self._node.reply(request, now, token=False, closer_nodes=False)

    def _bump_limit(self, now: float) -> float:
        return (now + self._epoch) * 1000 + BUMP_DRIFT

    def _mutable_get(self, request: Request, target: bytes, now: float) -> bool:
        if request.value is None:
            return False
        seq = Reader(request.value).uint()
        stored = self._mutables.get(target, now)
        found = stored is not None and stored.seq >= seq
        self._node.reply(request, now, value=stored.encode() if stored and found else None)
        return True

    def _mutable_put(self, request: Request, target: bytes, now: float) -> bool:
        if not self._may_store(request) or request.value is None:
            return False
        put = MutablePut.decode(request.value)
        mutable = put.mutable
        if keys.target(put.public_key) != target or not mutable.verify(put.public_key):
            return False
        stored = self._mutables.get(target, now)
        error = 0
        if stored is not None and stored.seq == mutable.seq and stored.value != mutable.value:
            error = SEQ_REUSED
        elif stored is not None and stored.seq > mutable.seq:
            error = SEQ_TOO_LOW
        else:
            self._mutables.put(target, mutable, now)
        self._node.reply(request, now, error=error, token=not error)
        return True

    def _immutable_get(self, request: Request, target: bytes, now: float) -> bool:
        self._node.reply(request, now, value=self._immutables.get(target, now))
        return True

    def _immutable_put(self, request: Request, target: bytes, now: float) -> bool:
        if not self._may_store(request) or request.value is None:
            return False
        if keys.blake2b(request.value) != target:
            return False
        self._immutables.put(target, request.value, now)
        self._node.reply(request, now)
        return True

    def _may_store(self, request: Request) -> bool:
        """Whether the sender receives at its address, and the value is not too long."""
        return (
            request.token is not None
            and request.value is not None
            and len(request.value) <= MAX_VALUE_BYTES
        )
