from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hyperseaport.transport.udx.receive import RECEIVE_WINDOW, Receiver
from hyperseaport.transport.udx.window import MAX_RECEIVE_WINDOW, Window


class Transfer:
    """A peer who sends all that it may as soon as it hears of it, ``time`` seconds later, and an
    application that consumes ``share`` of what has arrived."""

    def __init__(self, rtt: float | None, time: float, share: float = 1.0) -> None:
        self.window = Window(RECEIVE_WINDOW)
        self.rtt, self.time, self.share = rtt, time, share
        self.now = 1.0
        self.known = [0, 0, 0, self.window.edge]

    def rounds(self, count: int) -> int:
        """Round trips, in four parts each; returns the capacity then."""
        window = self.window
        for _ in range(4 * count):
            self.now += self.time / 4
            arrived = min(self.known.pop(0), window.edge)
            limit = window.credited + int(window.capacity * self.share / 4)
            window.credit(min(arrived, limit) - window.credited)
            window.follow(arrived - window.credited, arrived, self.rtt, self.now)
            self.known.append(window.edge)
        return window.capacity


def test_it_doubles_while_the_application_takes_most_of_it_each_round_trip() -> None:
    transfer = Transfer(0.02, 0.02, share=4.0)
    assert transfer.rounds(4) >= 2 * RECEIVE_WINDOW
    assert transfer.rounds(20) == MAX_RECEIVE_WINDOW
    assert transfer.window.room <= MAX_RECEIVE_WINDOW


def test_it_does_not_grow_for_an_application_that_takes_less() -> None:
    assert Transfer(0.02, 0.02, share=0.4).rounds(50) == RECEIVE_WINDOW


def test_it_does_not_grow_on_a_short_path_or_one_that_is_not_known() -> None:
    assert Transfer(0.0005, 0.002, share=4.0).rounds(50) == RECEIVE_WINDOW
    assert Transfer(None, 0.02, share=4.0).rounds(50) == RECEIVE_WINDOW


def test_a_round_trip_that_was_long_once_does_not_count_when_the_window_fills_faster() -> None:
    assert Transfer(0.05, 0.002, share=4.0).rounds(50) == RECEIVE_WINDOW


def test_one_burst_behind_a_gap_is_enough_to_grow() -> None:
    transfer = Transfer(0.02, 0.02, share=0.4)
    transfer.rounds(10)
    window, now = transfer.window, transfer.now + 0.03
    window.follow(0, window.credited, 0.02, now)
    window.credit(RECEIVE_WINDOW * 3 // 4)
    window.follow(0, window.credited, 0.02, now + 0.01)
    assert window.capacity == 2 * RECEIVE_WINDOW


def test_a_reader_that_falls_behind_gets_the_base_again() -> None:
    transfer = Transfer(0.02, 0.02, share=4.0)
    transfer.rounds(30)
    window, now = transfer.window, transfer.now + 1.0
    edge = window.edge
    held = edge - window.credited
    window.follow(held, edge, 0.02, now)
    assert window.capacity == MAX_RECEIVE_WINDOW, "for a moment it may"
    window.follow(held, edge, 0.02, now + 0.02)
    assert window.capacity == RECEIVE_WINDOW
    assert window.edge == edge, "what was offered stays"
    while held > RECEIVE_WINDOW:
        window.credit(min(50_000, held - RECEIVE_WINDOW))
        held = edge - window.credited
        assert window.edge == edge
    window.credit(1000)
    assert window.edge == edge + 1000


def test_it_grows_again_after_a_stall() -> None:
    transfer = Transfer(0.02, 0.02, share=4.0)
    transfer.rounds(5)
    transfer.share = 0.0
    assert transfer.rounds(50) == RECEIVE_WINDOW
    transfer.share = 4.0
    assert transfer.rounds(20) == MAX_RECEIVE_WINDOW


def test_it_grows_when_the_path_becomes_longer() -> None:
    transfer = Transfer(0.0005, 0.0005, share=4.0)
    transfer.rounds(50)
    transfer.rtt = transfer.time = 0.05
    assert transfer.rounds(20) == MAX_RECEIVE_WINDOW


def test_a_receiver_takes_what_it_offered_and_nothing_more() -> None:
    receiver = Receiver(capacity=1000)
    receiver.offer.capacity = 4000
    receiver.accept(0, bytes(1000), end=False)
    receiver.take()
    receiver.credit(1000)
    assert receiver.window == 4000
    assert receiver.accept(1, bytes(3000), end=False)
    receiver.follow(0.02, 1.0)
    receiver.follow(0.02, 2.0)
    assert receiver.offer.capacity == 1000
    assert receiver.window == 1000
    assert receiver.accept(2, bytes(1000), end=False)
    assert receiver.window == 0
    assert not receiver.accept(3, b"x", end=False)
    receiver.take()
    receiver.credit(3500)
    assert receiver.window == 500


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.lists(
        st.tuples(st.floats(0, 0.05), st.integers(0, 400_000), st.integers(0, 400_000)),
        max_size=60,
    ),
    st.sampled_from([None, 0.001, 0.02, 0.2]),
)
def test_the_right_edge_never_moves_back(
    steps: list[tuple[float, int, int]], rtt: float | None
) -> None:
    window, now, arrived = Window(10_000), 0.0, 0
    edge = window.edge
    for pause, more, consumed in steps:
        now += pause
        arrived = min(arrived + more, window.edge)
        window.credit(min(consumed, arrived - window.credited))
        window.follow(arrived - window.credited, arrived, rtt, now)
        assert window.edge >= edge
        assert window.room <= MAX_RECEIVE_WINDOW
        edge = window.edge
