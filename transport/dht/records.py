"""What anybody can publish in the DHT and find there (spec: hyperdht 8).

Nothing refreshes what was stored: publishers repeat within its lifetime, 20 minutes for
announcements and 48 hours for values, of which two thirds are certain.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from .. import keys
from ..encoding import encode_uint
from ..errors import DecodeError, InvalidInput
from ..keys import KeyPair
from ..transmit import Address
from . import messages
from .messages import Announce, LookupReply, MutablePut, MutableValue, PeerRecord
from .node import Node
from .query import Commit, Continuation, Query
from .wire import Reply

#: Bytes of one value: with its signature and the datagram's fields it has to fit one packet.
MAX_VALUE_BYTES = 1000
#: A node that lists this many peers may hold more than it lists.
FULL_LIST = 20


class Stored(Struct, frozen=True):
    """What became of a put or an announcement."""

    #: Nodes that took it, and nodes that refused with SEQ_REUSED or SEQ_TOO_LOW.
    nodes: int
    refused: int = 0


class Found(Struct, frozen=True):
    """Everybody who announced a topic, with all relay addresses that were found."""

    peers: tuple[PeerRecord, ...]
    #: The newest bump, milliseconds since 1970; 0 for none.
    bump: int = 0


class Records:
    """The operations of one node. Each calls ``on_done(result, now)`` once, and returns the `Query`
    whose ``cancel`` makes sure that it is not."""

    __slots__ = ("_node",)

    def __init__(self, node: Node) -> None:
        self._node = node

    def lookup(self, topic: bytes, now: float, on_done: Callable[[Found, float], None]) -> Query:
        """Who announced the 32-byte topic."""
        peers: dict[bytes, list[Address]] = {}
        bump = 0

        def on_reply(reply: Reply, _now: float) -> None:
            nonlocal bump
            found = _lookup_reply(reply)
            bump = max(bump, found.bump)
            for peer in found.peers:
                peers.setdefault(peer.public_key, []).extend(peer.relay_addresses)

        def done(_query: Query, now: float) -> None:
            records = (PeerRecord(key, tuple(dict.fromkeys(at))) for key, at in peers.items())
            on_done(Found(tuple(records), bump), now)

        return self._query(topic, messages.LOOKUP, now, on_reply=on_reply, on_done=done)

    def announce(
        self,
        topic: bytes,
        key_pair: KeyPair,
        now: float,
        on_done: Callable[[Stored, float], None],
        *,
        relay_addresses: tuple[Address, ...] = (),
        bump: int = 0,
    ) -> Query:
        """Be found under the 32-byte topic. ``bump`` is in milliseconds since 1970."""
        peer = PeerRecord(key_pair.public_key, relay_addresses[:3])

        def value(reply: Reply) -> bytes:
            signature = _sign(keys.NS_ANNOUNCE, topic, key_pair, reply, peer)
            return Announce(peer, signature=signature, bump=bump).encode()

        return self._put(topic, messages.LOOKUP, None, messages.ANNOUNCE, value, now, on_done)

    def unannounce(
        self,
        topic: bytes,
        key_pair: KeyPair,
        now: float,
        on_done: Callable[[float], None],
    ) -> Query:
        """Be found no longer. ``on_done(now)`` is called when all who knew have answered."""
        peer = PeerRecord(key_pair.public_key)
        left = 1

        def one_less(now: float) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                on_done(now)

        def on_reply(reply: Reply, now: float) -> None:
            nonlocal left
            listed = _lookup_reply(reply).peers
            known = any(each.public_key == peer.public_key for each in listed)
            if reply.id is None or reply.token is None or not (known or len(listed) >= FULL_LIST):
                return
            left += 1
            signature = _sign(keys.NS_UNANNOUNCE, topic, key_pair, reply, peer)
            self._node.request(
                reply.source,
                messages.UNANNOUNCE,
                now,
                target=topic,
                token=reply.token,
                value=Announce(peer, signature=signature).encode(),
                on_done=lambda _reply, now: one_less(now),
            )

        return self._query(
            topic,
            messages.LOOKUP,
            now,
            on_reply=on_reply,
            on_done=lambda _query, now: one_less(now),
        )

    def immutable_put(
        self, value: bytes, now: float, on_done: Callable[[bytes, Stored, float], None]
    ) -> Query:
        """Store a value under its own hash; ``on_done(hash, stored, now)``. Raises `InvalidInput`
        for more than `MAX_VALUE_BYTES`."""
        _check(value)
        target = keys.blake2b(value)
        return self._put(
            target,
            messages.IMMUTABLE_GET,
            None,
            messages.IMMUTABLE_PUT,
            lambda _reply: value,
            now,
            lambda stored, now: on_done(target, stored, now),
        )

    def immutable_get(
        self, target: bytes, now: float, on_done: Callable[[bytes | None, float], None]
    ) -> Query:
        """The value with the 32-byte hash; None if nobody has it."""

        def on_reply(reply: Reply, now: float) -> None:
            if reply.value is not None and keys.blake2b(reply.value) == target:
                query.cancel()
                on_done(reply.value, now)

        query = self._query(
            target,
            messages.IMMUTABLE_GET,
            now,
            on_reply=on_reply,
            on_done=lambda _query, now: on_done(None, now),
        )
        return query

    def mutable_put(
        self,
        key_pair: KeyPair,
        value: bytes,
        now: float,
        on_done: Callable[[Stored, float], None],
        *,
        seq: int = 0,
    ) -> Query:
        """Store a value under a key. A node that has one refuses a lower ``seq``, and another
        value with the same. Raises `InvalidInput` for more than `MAX_VALUE_BYTES`."""
        _check(value)
        mutable = MutableValue.signed(key_pair, seq, value)
        put = MutablePut(key_pair.public_key, mutable).encode()
        return self._put(
            keys.target(key_pair.public_key),
            messages.MUTABLE_GET,
            encode_uint(0),
            messages.MUTABLE_PUT,
            lambda _reply: put,
            now,
            on_done,
        )

    def mutable_get(
        self,
        public_key: bytes,
        now: float,
        on_done: Callable[[MutableValue | None, float], None],
        *,
        seq: int = 0,
        latest: bool = True,
    ) -> Query:
        """The value under a 32-byte key with at least this ``seq``: the newest that anybody has,
        or without ``latest`` the first that comes. None if nobody has one."""
        best: MutableValue | None = None

        def on_reply(reply: Reply, now: float) -> None:
            nonlocal best
            if not reply.value:
                return
            try:
                found = MutableValue.decode(reply.value)
            except DecodeError:
                return
            if found.seq < seq or (best is not None and found.seq <= best.seq):
                return
            if not found.verify(public_key):
                return
            best = found
            if not latest:
                query.cancel()
                on_done(found, now)

        query = self._query(
            keys.target(public_key),
            messages.MUTABLE_GET,
            now,
            value=encode_uint(seq),
            on_reply=on_reply,
            on_done=lambda _query, now: on_done(best, now),
        )
        return query

    def _put(
        self,
        target: bytes,
        command: int,
        query_value: bytes | None,
        put_command: int,
        value: Callable[[Reply], bytes],
        now: float,
        on_done: Callable[[Stored, float], None],
    ) -> Query:
        """Query with ``command``, then ``put_command`` at each of the closest."""
        taken = refused = 0

        def commit(found: Reply, done: Continuation, now: float) -> None:
            if found.token is None:
                done(None, now)
                return

            def answered(reply: Reply | None, now: float) -> None:
                nonlocal taken, refused
                if reply is not None:
                    taken += reply.error == 0
                    refused += reply.error in (messages.SEQ_REUSED, messages.SEQ_TOO_LOW)
                done(reply, now)

            self._node.request(
                found.source,
                put_command,
                now,
                target=target,
                token=found.token,
                value=value(found),
                node_id=found.id,
                on_done=answered,
            )

        return self._query(
            target,
            command,
            now,
            value=query_value,
            commit=commit,
            on_done=lambda _query, now: on_done(Stored(taken, refused), now),
        )

    def _query(
        self,
        target: bytes,
        command: int,
        now: float,
        *,
        value: bytes | None = None,
        on_reply: Callable[[Reply, float], None] | None = None,
        on_done: Callable[[Query, float], None],
        commit: Commit | None = None,
    ) -> Query:
        if len(target) != 32:
            raise InvalidInput(f"a target has 32 bytes, not {len(target)}")
        return self._node.query(
            target, command, now, value=value, on_reply=on_reply, on_done=on_done, commit=commit
        )


def _lookup_reply(reply: Reply) -> LookupReply:
    if not reply.value:
        return LookupReply(())
    try:
        return LookupReply.decode(reply.value)
    except DecodeError:
        return LookupReply(())


def _sign(
    namespace: bytes, topic: bytes, key_pair: KeyPair, reply: Reply, peer: PeerRecord
) -> bytes:
    """For the node that replied alone (spec: hyperdht 3.5)."""
    return key_pair.sign(
        messages.announce_signable(
            namespace, topic, reply.id or b"", reply.token or b"", peer.encode()
        )
    )


def _check(value: bytes) -> None:
    if len(value) > MAX_VALUE_BYTES:
        raise InvalidInput(f"a value has at most {MAX_VALUE_BYTES} bytes, not {len(value)}")
