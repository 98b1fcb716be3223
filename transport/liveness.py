"""Which peers live: one heartbeat for each peer, however many channels lead to it.

Channels to one peer are a group. A group on which nothing was written for `INTERVAL` gets a
heartbeat, by its channels in turn, so that each one is proven some time; a group of which nothing
was heard for `MISSED` intervals is dead. Nothing here costs anything for each channel but a look at
when it was last heard, once an interval: a group has one entry in one heap.

    written --INTERVAL without a write--> heartbeat --heard--> written
                                              `--MISSED x INTERVAL of silence--> dead
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from math import inf
from typing import Generic, Protocol, TypeVar

#: Seconds of write silence after which a peer gets a heartbeat: what the Node programs do for each
#: connection, and short enough for the NATs on the way (spec: secure-stream-and-registry 4.5).
INTERVAL = 5.0
#: Heartbeats that may go unanswered.
MISSED = 3
#: Seconds by which heartbeats may be early, so that many leave in one go: however many peers are
#: idle, they cost ten wake-ups in an interval.
EARLY = 0.5
#: Seconds between heartbeats that nobody repeats when they get lost, once one is unanswered.
REPEAT = 1.0
#: Peers in one look: with more, those who wait for the loop would wait too long. The next look is
#: due at once then.
MAX_PEERS = 256
#: Seconds until a look that rounding has made due already.
_SOON = 0.01


class Member(Protocol):
    """What liveness needs to see of a channel."""

    @property
    def heard_at(self) -> float:
        """When anything valid last came on it; -inf for never."""

    @property
    def half_closed(self) -> bool:
        """Its heartbeats are not repeated until they are answered."""


M = TypeVar("M", bound=Member)


@dataclass(slots=True, eq=False)
class _Group(Generic[M]):
    """Channels to one peer, those first whose turn for a heartbeat comes first."""

    key: Hashable
    #: Silence counts from here at the earliest: from the last new channel, as the peer took part
    #: in its handshake, from the last waking up, or from what channels that are gone had heard.
    heard_at: float
    written_at: float
    members: dict[M, None] = field(default_factory=dict)
    #: Half-closed channels with an unanswered heartbeat, and since when: nothing else would find
    #: one dead while others of the group are heard.
    asked: dict[M, float] = field(default_factory=dict)
    #: When all that were silent had to send a heartbeat.
    swept_at: float = -inf
    #: Its entry in the heap; others are outdated.
    looks_at: float = inf


class Liveness(Generic[M]):
    """Times are seconds. Call `look` at `deadline`, send the heartbeats it asks for (`Channel` has
    `keep_alive`), and end the dead."""

    __slots__ = ("_agenda", "_groups", "_of", "_order", "interval")

    def __init__(self, interval: float = INTERVAL) -> None:
        self.interval = interval
        self._groups: dict[Hashable, _Group[M]] = {}
        self._of: dict[M, _Group[M]] = {}
        self._agenda: list[tuple[float, int, _Group[M]]] = []
        self._order = 0

    def __len__(self) -> int:
        """Groups that are known; an empty one is forgotten within an interval."""
        return len(self._groups)

    @property
    def patience(self) -> float:
        """Seconds of silence after which a peer is dead."""
        return MISSED * self.interval

    def add(self, member: M, key: Hashable, now: float) -> None:
        """A new channel to the peer that ``key`` names; that peer has just proven that it lives."""
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(key, now, now)
            self._look_at(group, now + self.interval)
        group.heard_at = now
        group.members[member] = None
        self._of[member] = group

    def wrote(self, member: M, now: float) -> None:
        """Something was written that the peer must acknowledge. Nothing, once it was removed."""
        group = self._of.get(member)
        if group is not None:
            group.written_at = now

    def remove(self, member: M) -> None:
        """The channel is over. Harmless twice."""
        group = self._of.pop(member, None)
        if group is None:
            return
        group.heard_at = max(group.heard_at, member.heard_at)
        group.members.pop(member, None)
        group.asked.pop(member, None)

    def regroup(self, old: Hashable, new: Hashable, now: float) -> None:
        """The peer that ``old`` named is named ``new`` from now on, and has just been heard."""
        group = self._groups.get(old)
        if group is None:
            return
        other = self._groups.get(new)
        if other is None:
            group.key = new
            self._groups[new] = self._groups.pop(old)
            group.heard_at = now
            return
        other.heard_at = now
        for member in list(group.members):
            other.members[member] = None
            self._of[member] = other
        other.asked.update(group.asked)
        # It is forgotten at its next look.
        group.members.clear()
        group.asked.clear()

    def silence(self, member: M, now: float) -> float:
        """Seconds for which nothing was heard of the member's peer."""
        group = self._of.get(member)
        return 0.0 if group is None else now - self._heard(group)

    def timed_out(self, member: M, now: float) -> list[M]:
        """The channel is over because the peer did not answer on it. If it answers on others, it
        has forgotten this one, as after a restart, and maybe more of them: returns those that are
        to send a heartbeat now."""
        group = self._of.get(member)
        self.remove(member)
        if group is None or now - group.swept_at < self.patience:
            return []
        if now - self._heard(group) >= 2 * self.interval:
            return []
        group.swept_at = now
        silent = [other for other in group.members if now - other.heard_at >= self.interval]
        self._ask(group, silent, now)
        return silent

    def woke(self, now: float) -> None:
        """Time has passed in which nobody here could hear: silence counts from now on, and every
        group is due for a heartbeat."""
        for group in self._groups.values():
            group.heard_at = now
            group.written_at = -inf
            group.asked = dict.fromkeys(group.asked, now)
            self._look_at(group, now)

    def deadline(self) -> float | None:
        """When to `look`; None for never."""
        return self._agenda[0][0] if self._agenda else None

    def look(self, now: float) -> tuple[list[M], list[tuple[M, float]]]:
        """Who is to send a heartbeat now, and who is dead, after how many seconds of silence. The
        dead are to be ended; they are removed here."""
        beating: list[M] = []
        dead: list[tuple[M, float]] = []
        agenda = self._agenda
        due: list[_Group[M]] = []
        while agenda and agenda[0][0] <= now + EARLY and len(due) < MAX_PEERS:
            when, _, group = heapq.heappop(agenda)
            if when == group.looks_at:
                group.looks_at = inf
                due.append(group)
        for group in due:
            self._look(group, now, beating, dead)
        return beating, dead

    def _look(
        self, group: _Group[M], now: float, beating: list[M], dead: list[tuple[M, float]]
    ) -> None:
        silence = now - self._heard(group)
        if group.members and silence >= self.patience:
            for member in list(group.members):
                dead.append((member, silence))
                self.remove(member)
        if not group.members:
            del self._groups[group.key]
            return
        asked = len(beating)
        self._go_on_asking(group, now, beating, dead)
        if group.members and now - group.written_at > self.interval - EARLY:
            chosen = next(iter(group.members))
            # The next time it is another one's turn.
            group.members[chosen] = group.members.pop(chosen)
            if chosen not in beating[asked:]:
                beating.append(chosen)
            self._ask(group, [chosen], now)
        following = min(group.written_at + self.interval, now - silence + self.patience)
        self._look_at(group, max(following, now + _SOON))

    def _go_on_asking(
        self, group: _Group[M], now: float, beating: list[M], dead: list[tuple[M, float]]
    ) -> None:
        """Repeat the heartbeats of half-closed channels that have not answered."""
        for member, since in list(group.asked.items()):
            if member.heard_at >= since:
                del group.asked[member]
            elif now - since >= self.patience:
                dead.append((member, now - since))
                self.remove(member)
            else:
                beating.append(member)
        if group.asked:
            self._look_at(group, now + REPEAT)

    def _ask(self, group: _Group[M], members: list[M], now: float) -> None:
        """These send a heartbeat."""
        group.written_at = now
        for member in members:
            if member.half_closed:
                group.asked.setdefault(member, now)
        if group.asked:
            self._look_at(group, now + REPEAT)

    def _heard(self, group: _Group[M]) -> float:
        heard = group.heard_at
        for member in group.members:
            if member.heard_at > heard:
                heard = member.heard_at
        return heard

    def _look_at(self, group: _Group[M], when: float) -> None:
        if when < group.looks_at:
            group.looks_at = when
            self._order += 1
            heapq.heappush(self._agenda, (when, self._order, group))
