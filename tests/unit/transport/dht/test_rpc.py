"""The request engine."""

from __future__ import annotations

from random import Random

import pytest

from hyperseaport.transport.dht.rpc import MAX_OUTBOX, MAX_PENDING, Engine, Pending
from hyperseaport.transport.dht.timers import Timers
from hyperseaport.transport.dht.window import MAX_WINDOW, SLOT
from hyperseaport.transport.dht.wire import Reply
from hyperseaport.transport.transmit import Address

THERE = ("10.0.0.1", 100)


class Bench:
    """An engine, and what came of it."""

    def __init__(self) -> None:
        self.timers = Timers()
        self.given_up: list[Pending] = []
        self.engine = Engine(
            self.timers, Random(1), lambda pending, _now: self.given_up.append(pending)
        )
        self.done: list[tuple[Reply | None, float]] = []

    def ask(
        self, now: float = 0.0, *, to: Address = THERE, retries: int = 3, force: bool = False
    ) -> Pending:
        tid = self.engine.next_tid()
        pending = Pending(
            self.engine,
            tid,
            to,
            0,
            b"request %d" % tid,
            lambda reply, now: self.done.append((reply, now)),
            retries=retries,
            force=force,
        )
        self.engine.start(pending, now)
        return pending

    def answer(self, pending: Pending, source: Address = THERE, now: float = 0.0) -> bool:
        reply = Reply(None, source, ("1.1.1.1", 1), None, [], 0, None, 1, pending.tid)
        found = self.engine.match(reply, now)
        if found is not None:
            found.on_done(reply, now)
        return found is not None

    def sent(self) -> list[bytes]:
        outbox, self.engine.outbox = self.engine.outbox, []
        return [bytes(transmit.buffers[0]) for transmit in outbox]

    def run(self, until: float) -> list[tuple[float, bytes]]:
        """Everything sent from now on, with its time."""
        trace = []
        now = 0.0
        while (deadline := self.timers.deadline()) is not None and deadline <= until:
            now = max(now, deadline)
            self.timers.run(now)
            trace += [(now, datagram) for datagram in self.sent()]
        return trace


def test_four_transmissions_a_second_apart_with_the_same_bytes_and_then_nothing() -> None:
    bench = Bench()
    pending = bench.ask()
    assert bench.sent() == [pending.datagram]
    assert bench.run(100.0) == [(seconds, pending.datagram) for seconds in (1.0, 2.0, 3.0)]
    assert bench.done == [(None, 4.0)]
    assert bench.given_up == [pending]
    assert len(bench.engine) == 0
    assert bench.engine.stats.timeouts == 1


def test_an_answer_ends_it_and_has_a_round_trip_time() -> None:
    bench = Bench()
    pending = bench.ask()
    bench.run(1.0)
    assert bench.answer(pending, now=1.25)
    assert bench.done[0][0] is not None
    assert bench.done[0][0].rtt == pytest.approx(0.25)
    # It was repeated once.
    assert bench.done[0][0].waited == pytest.approx(1.25)
    assert bench.run(100.0) == []
    assert len(bench.done) == 1


def test_an_answer_from_elsewhere_or_a_second_one_is_nothing() -> None:
    bench = Bench()
    pending = bench.ask()
    assert not bench.answer(pending, ("10.0.0.2", 100))
    assert not bench.answer(pending, ("10.0.0.1", 101))
    assert bench.answer(pending)
    assert not bench.answer(pending)
    assert bench.engine.stats.unmatched == 3


def test_cancelled_means_silent() -> None:
    bench = Bench()
    pending = bench.ask()
    bench.sent()
    pending.cancel()
    pending.cancel()
    assert bench.run(100.0) == []
    assert not bench.answer(pending)
    assert bench.done == []
    assert len(bench.engine) == 0


def test_slow_is_told_once_after_the_first_timeout() -> None:
    bench = Bench()
    told: list[float] = []
    bench.ask().on_slow = told.append
    bench.ask(retries=0).on_slow = told.append
    bench.run(100.0)
    assert told == [1.0]


def test_a_full_window_makes_requests_wait_without_a_timeout() -> None:
    bench = Bench()
    first = [bench.ask(retries=0) for _ in range(MAX_WINDOW)]
    assert len(bench.sent()) == MAX_WINDOW
    late = bench.ask(retries=0)
    forced = bench.ask(retries=0, force=True)
    assert bench.sent() == [forced.datagram]
    assert bench.run(SLOT + 0.01) == [(SLOT, late.datagram)]
    for pending in first:
        bench.answer(pending, now=0.8)
    bench.run(100.0)
    assert [now for reply, now in bench.done if reply is None] == [1.0, 1.0 + SLOT]


def test_a_request_cancelled_while_it_waits_is_never_sent() -> None:
    bench = Bench()
    for _ in range(MAX_WINDOW):
        bench.ask(retries=0)
    late = bench.ask(retries=0)
    bench.sent()
    late.cancel()
    assert bench.run(0.9) == []


def test_too_many_requests_fail_at_once_but_not_before_the_call_returns() -> None:
    bench = Bench()
    for _ in range(MAX_PENDING):
        bench.ask()
    tids = {pending.tid for pending in (bench.ask(), bench.ask())}
    assert bench.done == []
    assert bench.timers.deadline() == 0.0
    bench.timers.run(0.0)
    assert bench.done == [(None, 0.0), (None, 0.0)]
    assert len(bench.engine) == MAX_PENDING
    assert len(tids) == 2


def test_transaction_ids_wrap_and_skip_those_in_flight() -> None:
    bench = Bench()
    held = bench.ask(to=("10.9.9.9", 9))
    for _ in range(70_000):
        pending = bench.ask()
        assert pending.tid != held.tid
        assert 0 <= pending.tid <= 0xFFFF
        assert bench.answer(pending)
        bench.engine.outbox.clear()
    assert len(bench.engine) == 1


def test_the_outbox_is_bounded() -> None:
    bench = Bench()
    for _ in range(MAX_OUTBOX + 5):
        bench.engine.send(b"x", 0, THERE)
    assert len(bench.sent()) == MAX_OUTBOX
    assert bench.engine.stats.dropped == 5
