"""Heartbeats and verdicts, by the clock of the test."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from random import Random

import pytest

from hyperseaport.transport.liveness import (
    EARLY,
    INTERVAL,
    MAX_PEERS,
    MISSED,
    REPEAT,
    Liveness,
)

DEATH = MISSED * INTERVAL


@dataclass(slots=True, eq=False)
class Pipe:
    """A channel, and whether its peer answers on it."""

    name: object = None
    answers: bool = True
    half_closed: bool = False
    heard_at: float = -inf


class World:
    """Runs liveness as a shell does."""

    def __init__(self) -> None:
        self.liveness: Liveness[Pipe] = Liveness()
        self.now = 0.0
        self.wakes = 0
        self.beats: list[tuple[float, Pipe]] = []
        self.deaths: list[tuple[float, Pipe, float]] = []

    def pipe(self, key: object, **options: bool) -> Pipe:
        pipe = Pipe(key, **options)
        self.liveness.add(pipe, key, self.now)
        return pipe

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while (deadline := self.liveness.deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.wakes += 1
            assert self.wakes < 100_000
            beating, dead = self.liveness.look(self.now)
            self.deaths += [(self.now, pipe, silence) for pipe, silence in dead]
            for pipe in beating:
                self.beat(pipe)
        self.now = end

    def beat(self, pipe: Pipe) -> None:
        self.beats.append((self.now, pipe))
        if pipe.answers:
            pipe.heard_at = self.now


def test_nobody_needs_no_timer() -> None:
    world = World()
    assert world.liveness.deadline() is None
    pipe = world.pipe("a")
    world.liveness.remove(pipe)
    world.liveness.remove(pipe)
    world.liveness.wrote(pipe, 1.0)
    world.run(60)
    assert world.liveness.deadline() is None
    assert len(world.liveness) == 0
    assert world.beats == []
    assert world.deaths == []


def test_the_channels_of_a_peer_take_turns() -> None:
    world = World()
    pipes = [world.pipe("a") for _ in range(4)]
    world.run(40)
    assert world.beats == [(INTERVAL * (n + 1), pipes[n % 4]) for n in range(8)]
    assert world.deaths == []


def test_what_was_written_is_a_heartbeat() -> None:
    world = World()
    pipe, other = world.pipe("a"), world.pipe("a")
    for _ in range(20):
        world.run(2.0)
        world.liveness.wrote(other, world.now)
        other.heard_at = world.now
    assert world.beats == []
    world.run(INTERVAL)
    assert world.beats == [(45.0, pipe)]


@pytest.mark.parametrize("peers", [1, 10_000])
def test_ten_thousand_idle_channels(peers: int) -> None:
    """One heartbeat for each peer in an interval, in a few wake-ups: here, as everything began
    within a second, in two or three."""
    world = World()
    rng = Random(1)
    for number in range(10_000):
        world.pipe(number % peers)
        if rng.random() < 0.01:
            world.run(0.01)
    world.run(60)
    world.beats.clear()
    world.wakes = 0
    world.run(10 * INTERVAL)
    assert 9.9 * peers <= len(world.beats) <= 11.5 * peers
    assert world.wakes <= 10 * (3 + peers / MAX_PEERS)
    assert world.deaths == []
    assert len(world.liveness) == peers


def test_a_silent_peer_is_dead_after_three_intervals() -> None:
    world = World()
    pipes = [world.pipe("a") for _ in range(3)]
    other = world.pipe("b")
    world.run(52.0)
    heard = max(pipe.heard_at for pipe in pipes)
    for pipe in pipes:
        pipe.answers = False
    world.run(20.0)
    assert {pipe for _, pipe, _ in world.deaths} == set(pipes)
    for when, _, silence in world.deaths:
        assert when - heard == silence
        assert DEATH <= silence <= DEATH + EARLY
    missed = [pipe for when, pipe in world.beats if pipe in pipes and heard < when <= heard + DEATH]
    assert len(missed) >= MISSED - 1
    assert len(world.liveness) == 1
    world.run(100)
    assert other.heard_at > 160
    assert len(world.deaths) == 3


def test_who_is_heard_on_one_channel_lives() -> None:
    world = World()
    silent = [world.pipe("a", answers=False) for _ in range(5)]
    heard = world.pipe("a")
    for _ in range(40):
        world.run(1.0)
        heard.heard_at = world.now
    assert world.deaths == []
    heard.answers = False
    world.run(DEATH + EARLY)
    assert len(world.deaths) == len(silent) + 1


def test_what_a_closed_channel_heard_counts() -> None:
    world = World()
    left, closing = world.pipe("a", answers=False), world.pipe("a", answers=False)
    world.run(12.0)
    closing.heard_at = world.now
    world.liveness.remove(closing)
    world.run(14.0)
    assert world.deaths == []
    world.run(2.0)
    assert [pipe for _, pipe, _ in world.deaths] == [left]


def test_a_new_channel_is_a_sign_of_life() -> None:
    """Its handshake was answered; its first packet may still be under way."""
    world = World()
    world.pipe("a", answers=False)
    world.run(DEATH - 0.1)
    new = world.pipe("a", answers=False)
    world.run(1.0)
    assert world.deaths == []
    world.run(DEATH)
    assert new in [pipe for _, pipe, _ in world.deaths]


def test_half_closed_channels_ask_until_they_are_answered() -> None:
    """What they send may get lost, and nobody repeats it."""
    world = World()
    pipe = world.pipe("a", half_closed=True, answers=False)
    world.run(8.5)
    assert [when for when, _ in world.beats] == [5.0, 5.0 + REPEAT, 5.0 + 2 * REPEAT, 8.0]
    pipe.heard_at = world.now
    pipe.answers = True
    world.beats.clear()
    world.run(20.0)
    # One in its turn each interval, and no more.
    assert 3 <= len(world.beats) <= 5
    assert world.deaths == []


def test_a_half_closed_channel_that_a_living_peer_forgot() -> None:
    world = World()
    forgotten = world.pipe("a", half_closed=True, answers=False)
    others = [world.pipe("a") for _ in range(2)]
    world.run(INTERVAL + DEATH + REPEAT)
    assert [(pipe, silence) for _, pipe, silence in world.deaths] == [(forgotten, DEATH)]
    world.run(60)
    assert all(other.heard_at > 70 for other in others)
    assert len(world.deaths) == 1


def test_one_that_timed_out_has_the_silent_ones_ask() -> None:
    world = World()
    first, *others = [world.pipe("a") for _ in range(50)]
    half_closed = world.pipe("a", half_closed=True, answers=False)
    talking = world.pipe("a")
    world.run(30)
    talking.heard_at = world.now
    asked = world.liveness.timed_out(first, world.now)
    # Those that were heard within the last interval have proven themselves.
    recent = [pipe for pipe in (*others, talking) if world.now - pipe.heard_at < INTERVAL]
    assert set(asked) == {*others, half_closed} - set(recent)
    assert talking in recent
    # When they time out too, all have been asked.
    for pipe in asked[:5]:
        assert world.liveness.timed_out(pipe, world.now + 13.0) == []
    for _ in range(20):
        world.run(1.0)
        talking.heard_at = world.now
    assert [pipe for _, pipe, _ in world.deaths] == [half_closed]


def test_a_time_out_of_a_silent_peer_tells_nothing_new() -> None:
    world = World()
    first, *_others = [world.pipe("a", answers=False) for _ in range(5)]
    world.run(13.0)
    assert world.liveness.timed_out(first, world.now) == []
    assert world.liveness.timed_out(first, world.now) == []


def test_after_a_sleep_everybody_has_three_intervals() -> None:
    world = World()
    pipes = [world.pipe(key) for key in "abc"]
    half_closed = world.pipe("a", half_closed=True)
    world.run(21.0)
    for pipe in (*pipes, half_closed):
        pipe.answers = False
    world.run(4.0)
    world.beats.clear()
    world.now += 3600
    world.liveness.woke(world.now)
    deadline = world.liveness.deadline()
    assert deadline is not None
    assert deadline <= world.now
    woke = world.now
    world.run(0.0)
    # At once, to each of the peers.
    assert len({pipe.name for _, pipe in world.beats}) == 3
    world.run(DEATH - 0.1)
    assert world.deaths == []
    pipes[1].heard_at = world.now
    world.run(EARLY + 0.1)
    assert {pipe for _, pipe, _ in world.deaths} == {pipes[0], pipes[2], half_closed}
    assert all(when - woke <= DEATH + EARLY for when, _, _ in world.deaths)


def test_another_interval() -> None:
    world = World()
    world.liveness = Liveness(interval=1.0)
    world.pipe("a", answers=False)
    world.run(3.5)
    assert [silence for _, _, silence in world.deaths] == [3.0]
    assert world.liveness.patience == 3.0


def test_a_peer_that_has_moved_is_known_by_its_new_name() -> None:
    world = World()
    pipe, other = world.pipe("old"), world.pipe("old", answers=False)
    world.run(INTERVAL * 2)
    world.liveness.regroup("old", "new", world.now)
    newcomer = world.pipe("new")
    assert len(world.liveness) == 1
    pipe.answers = newcomer.answers = False
    began = world.now
    world.run(DEATH + INTERVAL)
    assert {each for _, each, _ in world.deaths} == {pipe, other, newcomer}
    assert all(when - began >= DEATH - EARLY for when, _, _ in world.deaths)


def test_a_peer_that_moves_to_where_it_is_known_already_is_one() -> None:
    world = World()
    pipe, other = world.pipe("old"), world.pipe("new")
    other.answers = False
    world.liveness.regroup("old", "new", world.now)
    world.liveness.regroup("nobody", "new", world.now)
    world.run(DEATH * 2)
    assert not world.deaths
    assert len(world.liveness) == 1
    pipe.answers = False
    world.run(DEATH + INTERVAL)
    assert {each for _, each, _ in world.deaths} == {pipe, other}
