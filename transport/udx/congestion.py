"""Congestion control: CUBIC (RFC 9438), counted in packets.

The reference runs BBR; nothing of either is visible to the peer but the timing (spec: udx 5). CUBIC
needs no pacing and no measured rate, which a process that reads and sends in bursts measures badly.
"""

from __future__ import annotations

INITIAL_WINDOW = 10.0
MIN_WINDOW = 4.0
#: Beyond this nothing is gained: the reference's receive window is 4 MiB.
MAX_WINDOW = 4096.0

_BETA = 0.7
_C = 0.4
_RENO_ALPHA = 3 * (1 - _BETA) / (1 + _BETA)


class Cubic:
    """How many packets may be in flight."""

    __slots__ = ("_epoch", "_k", "_reno", "_w_max", "ssthresh", "window")

    def __init__(self) -> None:
        self.window = INITIAL_WINDOW
        self.ssthresh = MAX_WINDOW
        self._w_max = 0.0
        self._k = 0.0
        self._reno = 0.0
        #: When growth began after the last loss; None until it does.
        self._epoch: float | None = None

    def on_ack(self, packets: int, srtt: float, now: float) -> None:
        """``packets`` were acknowledged while the window was what held sending back."""
        if self.window < self.ssthresh:
            self.window = min(self.window + packets, MAX_WINDOW)
            return
        if self._epoch is None:
            self._epoch = now
            self._w_max = max(self._w_max, self.window)
            self._k = ((self._w_max - self.window) / _C) ** (1 / 3)
            self._reno = self.window
        target = self._w_max + _C * (now - self._epoch + srtt - self._k) ** 3
        target = min(max(target, self.window), 1.5 * self.window)
        share = packets / self.window
        self._reno += _RENO_ALPHA * share
        self.window = min(max(self.window + (target - self.window) * share, self._reno), MAX_WINDOW)

    def on_loss(self) -> None:
        """Packets were lost; called once for all that were in flight at the time."""
        # Lost again before the old size was reached: somebody else joined the path (RFC 9438 4.7).
        fast = self.window < self._w_max
        self._w_max = self.window * (1 + _BETA) / 2 if fast else self.window
        self.window = self.ssthresh = max(self.window * _BETA, MIN_WINDOW)
        self._epoch = None

    def on_timeout(self, in_flight: int) -> None:
        """Nothing came back for a whole retransmission timeout."""
        self._w_max = max(self._w_max, self.window)
        self.ssthresh = max(self.window * _BETA, MIN_WINDOW)
        self.window = in_flight + 1.0
        self._epoch = None
