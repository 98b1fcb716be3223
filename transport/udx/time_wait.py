"""What closed streams still have to say.

A peer that missed the last ACK repeats its END, and is answered. A DESTROY is the end of the stream
without any answer, so one that gets lost leaves a peer which has nothing to send none the wiser: it
is said again, twice, and whenever that peer sends something.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..transmit import Transmit
from . import packet as wire

#: Seconds for which a closed stream still answers its peer: as long as a peer repeats its END that
#: got no answer (spec: udx 2.4, which has 5 s, and 4.6).
TIME_WAIT = 13.0
#: Closed streams remembered at most; the oldest are forgotten first. About 400 bytes each.
MAX_TIME_WAIT = 16384
#: Seconds after which a DESTROY is said again: once the burst that it got lost in has passed, and
#: for longer troubles.
AGAIN = (0.5, 2.0)
#: Seconds by which that may be late, so that one wake-up does for many.
LATE = 0.25

#: What a peer sends that has not heard that the stream is over.
_WANTS_ANSWER = wire.DATA | wire.END | wire.HEARTBEAT
#: Where a packet's type is.
_TYPE = 2


class TimeWait:
    """Closed streams by their ids, oldest first. Times are seconds."""

    __slots__ = ("_again", "_again_at", "_answers", "_forget_at", "_news", "_over")

    def __init__(self) -> None:
        # When closed (None: not yet noted), and the answer.
        self._over: dict[int, tuple[float | None, Transmit | None]] = {}
        self._answers: dict[int, Transmit] = {}
        # Some of them are not noted.
        self._news = False
        self._forget_at: float | None = None
        # When a DESTROY is due, and whose, by how often it was repeated; each in order of time.
        self._again: tuple[deque[tuple[float, int]], ...] = tuple(deque() for _ in AGAIN)
        self._again_at: float | None = None

    def __len__(self) -> int:
        return len(self._over)

    def __contains__(self, identifier: int) -> bool:
        return identifier in self._over

    def add(self, identifier: int, farewell: Transmit | None) -> None:
        """The stream has closed; ``farewell`` answers a peer that missed its last packet."""
        self._over[identifier] = (None, farewell)
        self._news = True
        if len(self._over) > MAX_TIME_WAIT:
            del self._over[next(iter(self._over))]

    def discard(self, identifier: int) -> None:
        """The id names another stream from now on."""
        self._over.pop(identifier, None)

    def receive(self, identifier: int, kind: int) -> bool:
        """A packet of that type came for a stream that is not there. Returns whether it was."""
        found = self._over.get(identifier)
        if found is None:
            return False
        farewell = found[1]
        if farewell is not None and kind & _WANTS_ANSWER:
            self._answers[identifier] = farewell
        return True

    def transmits(self, now: float) -> Iterable[Transmit]:
        """What is to be sent now."""
        if self._news:
            self._note(now)
        if not self._answers:
            return ()
        answers, self._answers = self._answers, {}
        return answers.values()

    def deadline(self) -> float | None:
        """When to call `on_deadline`; None for never."""
        if self._again_at is None or self._forget_at is None:
            return self._forget_at
        return min(self._again_at, self._forget_at)

    def on_deadline(self, now: float) -> None:
        if self._again_at is not None and self._again_at <= now:
            self._say_again(now)
        if self._forget_at is not None and self._forget_at <= now:
            self._forget(now)

    def _note(self, now: float) -> None:
        """Note the time of streams closed since the last call. They are the newest."""
        over, destroyed = self._over, False
        for identifier in reversed(over):
            closed_at, farewell = over[identifier]
            if closed_at is not None:
                break
            over[identifier] = (now, farewell)
            if farewell is not None and farewell.buffers[0][_TYPE] == wire.DESTROY:
                destroyed = True
                for delay, again in zip(AGAIN, self._again, strict=True):
                    again.append((now + delay, identifier))
        self._news = False
        if destroyed and self._again_at is None:
            self._again_at = now + AGAIN[0]
        if over and self._forget_at is None:
            self._forget_at = now + TIME_WAIT

    def _say_again(self, now: float) -> None:
        for again in self._again:
            while again and again[0][0] <= now:
                _, identifier = again.popleft()
                farewell = self._over.get(identifier, (None, None))[1]
                if farewell is not None:
                    self._answers[identifier] = farewell
        following = [again[0][0] for again in self._again if again]
        self._again_at = max(min(following), now + LATE) if following else None

    def _forget(self, now: float) -> None:
        over = self._over
        for identifier, (closed_at, _) in list(over.items()):
            if closed_at is None or closed_at + TIME_WAIT > now:
                break
            del over[identifier]
        # One wake-up for all that closed in the meantime, not one for each.
        self._forget_at = now + TIME_WAIT if over else None
