"""The conformance checklist (spec: udx 9), with a peer made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hyperseaport.transport.errors import Closed, InvalidInput, StreamReset, StreamTimeout
from hyperseaport.transport.transmit import Address
from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.bbr import INITIAL_WINDOW
from hyperseaport.transport.udx.exchange import MAX_MESSAGES, MAX_STALLS, STALL
from hyperseaport.transport.udx.stream import Stream
from hyperseaport.transport.udx.time_wait import AGAIN, TIME_WAIT

ACK, DATA, END, SACK = wire.ACK, wire.DATA, wire.END, wire.SACK
MESSAGE, DESTROY, HEARTBEAT = wire.MESSAGE, wire.DESTROY, wire.HEARTBEAT
FULL = 1152
ELSEWHERE: Address = ("10.0.0.9", 99)


class TestReceiving:
    def test_data_is_delivered_and_acknowledged(self, hand: Any) -> None:
        it = hand()
        (ack,) = it.give(DATA, 0, payload=b"hello")
        assert (ack.type, ack.id, ack.seq, ack.ack) == (ACK, 1234, 0, 1)
        assert it.mux.poll() == [it.stream]
        assert it.read() == b"hello"
        assert it.stream.has_received

    def test_duplicates_are_acknowledged_and_not_delivered_again(self, hand: Any) -> None:
        it = hand()
        it.give(DATA, 0, payload=b"a")
        (ack,) = it.give(DATA, 0, payload=b"a")
        assert ack.ack == 1
        assert it.read() == b"a"
        assert it.mux.stats.duplicates == 1

    def test_one_ack_answers_all_that_came_since_the_last(self, hand: Any) -> None:
        it = hand()
        for seq in range(3):
            packet = wire.Packet(DATA, 7, 0, seq, 0, b"x")
            it.mux.receive(wire.encode(packet), 0, ("10.0.0.2", 1234), 0.0)
        (ack,) = it.sent()
        assert ack.ack == 3
        assert it.sent() == []

    def test_sixty_gaps_give_the_lowest_fifty_blocks(self, hand: Any) -> None:
        it = hand()
        for seq in range(1, 121, 2):
            (ack,) = it.give(DATA, seq, payload=b"x")
        assert ack.type == SACK
        assert ack.sacks == tuple((seq, seq + 1) for seq in range(1, 101, 2))
        assert sum(len(each) for each in it.transmits[0].buffers) == 420

    def test_unknown_bits_are_ignored(self, hand: Any) -> None:
        it = hand()
        (ack,) = it.give(DATA | 0xC0, 0, payload=b"a")
        assert ack.ack == 1
        assert it.read() == b"a"

    def test_padding_is_skipped(self, hand: Any) -> None:
        it = hand()
        it.give(DATA, 0, payload=b"a", padding=200)
        assert it.read() == b"a"

    def test_an_extension_beyond_the_packet_drops_it(self, hand: Any) -> None:
        it = hand()
        datagram = bytearray(wire.encode(wire.Packet(DATA, 7, 0, 0, 0, b"abc")))
        datagram[3] = 4
        assert it.mux.receive(bytes(datagram), 0, ("10.0.0.2", 1234), 0.0)
        assert it.sent() == []
        assert it.mux.stats.malformed == 1

    def test_data_behind_sack_blocks(self, hand: Any) -> None:
        it = hand()
        it.stream.write(b"x" * 3 * FULL, 0.0)
        it.sent()
        it.give(DATA | SACK, 0, payload=b"data", sacks=((1, 3),))
        assert it.read() == b"data"
        assert it.stream._sender.flight.sacked == 2

    def test_heartbeat_is_answered_once_and_nothing_in_it_counts(self, hand: Any) -> None:
        it = hand()
        it.stream.write(b"x", 0.0)
        it.sent()
        (ack,) = it.give(HEARTBEAT | DATA | DESTROY, 0, 1, b"ignored", window=0)
        assert (ack.type, ack.ack, ack.seq) == (ACK, 0, 1)
        assert it.read() == b""
        assert it.stream.unacked == 1
        assert not it.stream.closed
        it.stream.write(b"y", 0.0)
        assert [each.type for each in it.sent()] == [DATA], "the window is not 0"

    @pytest.mark.parametrize("kind", [ACK, SACK, MESSAGE, DESTROY])
    def test_never_answered(self, hand: Any, kind: int) -> None:
        assert hand().give(kind) == []

    def test_messages_come_at_any_number(self, hand: Any) -> None:
        it = hand()
        it.give(DATA, 0, payload=b"a")
        it.mux.poll()
        for seq, payload in ((0, b"old"), (5, b"new"), (1, b"")):
            it.give(MESSAGE, seq, payload=payload)
        assert list(it.stream.messages) == [b"old", b"new", b""]
        assert it.mux.poll() == [it.stream]
        (ack,) = it.give(DATA, 1, payload=b"b")
        assert ack.ack == 2

    def test_only_the_newest_messages_are_kept(self, hand: Any) -> None:
        it = hand()
        for number in range(MAX_MESSAGES + 3):
            it.give(MESSAGE, payload=bytes([number]))
        assert len(it.stream.messages) == MAX_MESSAGES
        assert it.stream.messages[0] == b"\x03"
        it.give(MESSAGE, payload=bytes(3000))
        assert it.stream.messages[-1] == bytes([MAX_MESSAGES + 2])

    def test_the_window_is_the_truth(self, hand: Any) -> None:
        it = hand(receive_window=10_000)
        (ack,) = it.give(DATA, 0, payload=bytes(1000))
        assert ack.window == 9000
        (ack,) = it.give(DATA, 2, payload=bytes(1000))
        assert ack.window == 8000
        assert len(it.read()) == 1000
        (ack,) = it.give(DATA, 1, payload=bytes(1000))
        assert ack.window == 8000

    def test_a_closed_window_drops_and_says_when_it_reopens(self, hand: Any) -> None:
        it = hand(receive_window=4000)
        for seq in range(4):
            (ack,) = it.give(DATA, seq, payload=bytes(1000))
        assert (ack.ack, ack.window) == (4, 0)
        (ack,) = it.give(DATA, 4, payload=bytes(1000))
        assert (ack.ack, ack.window) == (4, 0)
        assert it.mux.stats.overruns == 1
        it.stream.read()
        it.stream.credit(900, it.now)
        assert it.sent() == [], "not for every byte"
        it.stream.credit(200, it.now)
        (ack,) = it.sent()
        assert (ack.type, ack.seq, ack.ack, ack.window) == (ACK, 0, 4, 1100)

    def test_a_wide_open_window_needs_no_word(self, hand: Any) -> None:
        it = hand()
        it.give(DATA, 0, payload=bytes(1000))
        it.read()
        assert it.sent() == []

    def test_sources_are_not_compared_on_the_own_socket(self, hand: Any) -> None:
        it = hand()
        it.give(DATA, 0, payload=b"a", source=ELSEWHERE)
        assert it.read() == b"a"
        assert it.transmits[0].address == ("10.0.0.2", 1234)


class TestConnecting:
    def test_connect_alone_says_nothing(self, hand: Any) -> None:
        it = hand()
        assert it.sent() == []
        assert it.mux.deadline() is None

    def test_without_a_hook_nothing_gets_in(self, hand: Any) -> None:
        it = hand(connect=False)
        assert it.give(DATA, 0, payload=b"a") == []
        assert it.stream.readable == 0
        assert it.mux.stats.blocked == 1
        assert not it.stream.has_received

    def test_the_hook_is_asked_about_every_packet(self, hand: Any) -> None:
        it, asked = hand(connect=False), []

        def hook(stream: Stream, socket: int, source: Address, now: float) -> bool:
            asked.append((socket, source))
            return len(asked) > 1

        it.stream.firewall = hook
        it.give(DATA, 0, payload=b"a", socket=3)
        it.give(DATA, 0, payload=b"b", source=ELSEWHERE)
        assert asked == [(3, ("10.0.0.2", 1234)), (0, ELSEWHERE)]
        assert it.read() == b"b"
        it.give(DATA, 1, payload=b"c", source=("10.0.0.2", 0))
        assert len(asked) == 2, "port 0 is refused"

    def test_what_comes_before_connect_is_kept_and_acknowledged_once(self, hand: Any) -> None:
        it = hand(connect=False)
        it.stream.firewall = lambda *_: True
        assert it.give(DATA, 0, payload=b"a") == []
        assert it.give(DATA, 2, payload=b"c") == []
        assert it.give(HEARTBEAT) == []
        assert it.read() == b"a"
        it.stream.connect(0, 1234, ELSEWHERE, it.now)
        (ack,) = it.sent()
        assert (ack.type, ack.ack, ack.sacks) == (SACK, 1, ((2, 3),))
        assert it.transmits[0].address == ELSEWHERE

    def test_the_end_is_reported_with_its_ack(self, hand: Any) -> None:
        it = hand(connect=False)
        it.stream.firewall = lambda *_: True
        it.give(DATA | END, 0, payload=b"a")
        assert not it.stream.remote_ended
        it.stream.connect(0, 1234, ELSEWHERE, it.now)
        assert it.stream.remote_ended
        assert [each.ack for each in it.sent()] == [1]

    def test_the_hook_may_connect(self, hand: Any) -> None:
        it = hand(connect=False)

        def hook(stream: Stream, socket: int, source: Address, now: float) -> bool:
            stream.connect(socket, 55, source, now)
            return True

        it.stream.firewall = hook
        (ack,) = it.give(DATA, 0, payload=b"a", socket=1, source=ELSEWHERE)
        assert (ack.id, ack.ack) == (55, 1)
        assert (it.transmits[0].socket, it.transmits[0].address) == (1, ELSEWHERE)

    def test_the_hook_may_destroy(self, hand: Any) -> None:
        it = hand(connect=False)

        def hook(stream: Stream, socket: int, source: Address, now: float) -> bool:
            stream.destroy(now)
            return True

        it.stream.firewall = hook
        assert it.give(DATA, 0, payload=b"a") == []
        assert it.stream.closed

    def test_writes_wait_for_connect(self, hand: Any) -> None:
        it = hand(connect=False)
        it.stream.write(b"early", 0.0)
        it.stream.send_message(b"m", 0.0)
        assert it.sent() == []
        it.stream.connect(0, 1234, ELSEWHERE, 0.0)
        assert [(each.type, each.payload) for each in it.sent()] == [
            (DATA, b"early"),
            (MESSAGE, b"m"),
        ]

    def test_misuse(self, hand: Any) -> None:
        it = hand()
        with pytest.raises(InvalidInput):
            it.stream.connect(0, 1, ELSEWHERE, 0.0)
        with pytest.raises(InvalidInput):
            it.stream.send_message(bytes(2029), 0.0)
        with pytest.raises(InvalidInput):
            it.stream.keep_alive = 0
        other = it.mux.create()
        with pytest.raises(InvalidInput):
            other.change_remote(0, 1, ELSEWHERE, 0.0)
        with pytest.raises(InvalidInput):
            other.connect(0, 1, ("10.0.0.2", 0), 0.0)
        with pytest.raises(InvalidInput):
            other.connect(0, 2**32, ELSEWHERE, 0.0)

    def test_change_remote_moves_what_is_new_and_what_is_repeated(self, hand: Any) -> None:
        """Pitfall 21 of spec: hyperdht 9.1."""
        it = hand()
        it.stream.write(b"old", 0.0)
        it.sent()
        it.stream.change_remote(1, 77, ELSEWHERE, 0.0)
        it.stream.write(b"new", 0.0)
        (packet,) = it.sent()
        assert (packet.id, packet.seq) == (77, 1)
        assert (it.transmits[0].socket, it.transmits[0].address) == (1, ELSEWHERE)
        again = [each for _, each in it.wait(1.0)]
        assert [(each.id, each.seq) for each in again] == [(77, 0)]
        assert (it.transmits[0].socket, it.transmits[0].address) == (1, ELSEWHERE)
        it.stream.firewall = lambda *_: True
        it.give(ACK, ack=2, socket=0)
        it.stream.write(b"last", it.now)
        assert [each.id for each in it.sent()] == [77]

    def test_migrate_sends_everything_again_and_slowly(self, hand: Any) -> None:
        it = hand()
        it.stream.write(bytes(2_000_000), 0.0)
        it.sent()
        for _ in range(4):
            it.now += 0.01
            it.give(ACK, ack=it.stream._sender.flight.next)
            it.wait(it.now + 0.01)
        una = it.stream.acknowledged
        outstanding = it.stream._sender.flight.outstanding
        assert outstanding > INITIAL_WINDOW
        it.stream.migrate(1, ELSEWHERE, it.now)
        packets = it.sent()
        data = [each.seq for each in packets if each.type == DATA]
        assert data == list(range(una, una + int(INITIAL_WINDOW)))
        # It tells what has arrived, so that the peer goes on, too.
        assert packets[-1].type == ACK
        assert {(each.socket, each.address) for each in it.transmits} == {(1, ELSEWHERE)}
        it.now += 0.05
        it.give(ACK, ack=una + outstanding, socket=1, source=ELSEWHERE)
        assert it.stream.acknowledged == una + outstanding
        with pytest.raises(InvalidInput):
            hand(connect=False).stream.migrate(1, ELSEWHERE, 0.0)

    def test_what_is_sent_aside_goes_elsewhere_and_nothing_else_does(self, hand: Any) -> None:
        it = hand()
        it.stream.send_aside(b"question", 2, ELSEWHERE)
        it.stream.acknowledge_aside(2, ELSEWHERE)
        assert [(each.type, each.payload) for each in it.sent()] == [
            (MESSAGE, b"question"),
            (ACK, b""),
        ]
        assert {(each.socket, each.address) for each in it.transmits} == {(2, ELSEWHERE)}
        it.stream.write(b"data", 0.0)
        it.sent()
        assert it.transmits[0].address == ("10.0.0.2", 1234)


class TestStalls:
    """The peer has more to send, and does not."""

    def test_it_is_asked_ever_less_often(self, hand: Any) -> None:
        it = hand()
        it.stream.expects = True
        it.give(DATA, 0, payload=b"half")
        times = [round(when, 3) for when, each in it.wait(100.0) if each.type == HEARTBEAT]
        assert times == [STALL * 2**n for n in range(MAX_STALLS)]

    def test_what_is_heard_begins_the_wait_anew(self, hand: Any) -> None:
        it = hand()
        it.stream.expects = True
        it.give(DATA, 0, payload=b"half")
        it.wait(0.9)
        it.give(ACK)
        assert not [each for _, each in it.wait(0.9 + STALL - 0.01) if each.type == HEARTBEAT]
        assert [each for _, each in it.wait(0.9 + STALL + 0.01) if each.type == HEARTBEAT]

    def test_nobody_is_asked_who_has_said_all(self, hand: Any) -> None:
        it = hand()
        it.give(DATA, 0, payload=b"whole")
        assert not [each for _, each in it.wait(100.0) if each.type == HEARTBEAT]


class TestStrays:
    """Packets of a connected stream from elsewhere."""

    def test_without_a_watcher_they_are_let_in(self, hand: Any) -> None:
        it = hand()
        it.give(DATA, 0, payload=b"home")
        it.give(DATA, 1, payload=b"away", source=ELSEWHERE)
        assert it.read() == b"homeaway"
        assert it.stream.address == ("10.0.0.2", 1234)

    @pytest.mark.parametrize("lets_in", [True, False])
    def test_a_watcher_decides(self, hand: Any, lets_in: bool) -> None:
        it = hand()
        watcher = it.stream.watcher = Watcher(lets_in)
        it.give(DATA, 0, payload=b"not yet settled", source=ELSEWHERE)
        it.give(DATA, 1, payload=b"home")
        assert it.read() == b"not yet settledhome"
        assert not watcher.strays
        it.give(DATA, 2, payload=b"away", source=ELSEWHERE)
        assert it.read() == (b"away" if lets_in else b"")
        assert watcher.strays == [b"away"]
        assert watcher.let == ([ELSEWHERE] if lets_in else [])
        assert it.mux.stats.strays == (not lets_in)
        it.stream.destroy(0.0)
        assert watcher.over == [it.stream]

    def test_runs_are_no_way_around_it(self, hand: Any) -> None:
        it = hand()
        watcher = it.stream.watcher = Watcher(False)
        it.give(ACK)
        packets = [wire.encode(wire.Packet(DATA, 7, 0, seq, 0, b"x" * 100)) for seq in range(5)]
        it.mux.receive_run(memoryview(b"".join(packets)), 120, 0, ELSEWHERE, 0.0)
        assert it.read() == b""
        assert len(watcher.strays) == 5

    def test_what_does_not_decode_is_counted(self, hand: Any) -> None:
        it = hand()
        watcher = it.stream.watcher = Watcher(True)
        it.give(ACK)
        broken = bytearray(wire.encode(wire.Packet(DATA, 7, 0, 0, 0, b"x")))
        broken[3] = 200
        assert it.mux.receive(bytes(broken), 0, ELSEWHERE, 0.0)
        assert it.mux.stats.malformed == 1
        assert not watcher.strays

    def test_it_hears_messages_first(self, hand: Any) -> None:
        it = hand()
        it.stream.watcher = Watcher(True)
        it.give(MESSAGE, payload=b"for it")
        it.give(MESSAGE, payload=b"for the reader")
        assert list(it.stream.messages) == [b"for the reader"]


class Watcher:
    """Notes what it is asked."""

    def __init__(self, lets_in: bool) -> None:
        self.lets_in = lets_in
        self.strays: list[bytes] = []
        self.let: list[Address] = []
        self.over: list[Stream] = []

    def stray(
        self, stream: Stream, packet: wire.Packet, socket: int, source: Address, now: float
    ) -> bool:
        self.strays.append(packet.payload)
        return self.lets_in

    def let_in(self, stream: Stream, socket: int, source: Address) -> None:
        self.let.append(source)

    def told(self, stream: Stream, payload: bytes, now: float) -> bool:
        return payload == b"for it"

    def closed(self, stream: Stream) -> None:
        self.over.append(stream)


class TestThroughARelay:
    """What a stream needs that may run through a relay (spec: hyperdht 5.8)."""

    def test_copies_change_no_account(self, hand: Any) -> None:
        it = hand()
        it.stream.write(b"header", 0.0)
        it.stream.write(bytes(5 * FULL), 0.0)
        first = [each.seq for each in it.sent()]
        in_flight = it.stream._sender.flight.in_flight
        it.stream.repeat(0.0)
        assert [(each.type, each.seq) for each in it.sent()] == [(DATA, seq) for seq in first[:3]]
        assert it.stream._sender.flight.in_flight == in_flight
        assert it.mux.stats.retransmissions == 3
        assert it.mux.stats.sent == len(first) + 3
        # The round trip is still known.
        it.now = 0.3
        it.give(ACK, ack=1)
        assert it.stream.round_trip == pytest.approx(0.3)

    def test_without_anything_to_repeat_an_answer_is_asked_for(self, hand: Any) -> None:
        it = hand()
        it.stream.repeat(0.0)
        assert [each.type for each in it.sent()] == [HEARTBEAT]
        it.stream.destroy(0.0)
        it.sent()
        it.stream.repeat(0.0)
        assert not it.sent()

    def test_counts_of_what_has_left_and_arrived(self, hand: Any) -> None:
        it = hand()
        it.stream.write(bytes(2 * FULL), 0.0)
        count = len(it.sent())
        assert (it.stream.acknowledged, it.stream.departed) == (0, count)
        it.give(ACK, ack=1)
        assert (it.stream.acknowledged, it.stream.departed) == (1, count)

    def test_packets_from_elsewhere_are_asked_about_on_the_same_socket(self, hand: Any) -> None:
        it = hand()
        asked: list[tuple[int, Address]] = []

        def firewall(_stream: Any, socket: int, source: Address, _now: float) -> bool:
            asked.append((socket, source))
            return source != ELSEWHERE

        home = it.stream.address
        it.stream.firewall = firewall
        it.stream.origin = home
        run = b"".join(wire.encode(wire.Packet(DATA, 7, 0, seq, 0, b"x")) for seq in range(3))
        for source in (ELSEWHERE, home):
            it.mux.receive(wire.encode(wire.Packet(ACK, 7, 0, 0, 0)), 0, source, 0.0)
            it.mux.receive_run(memoryview(run), len(run) // 3, 0, source, 0.0)
        assert asked == [(0, ELSEWHERE)] * 4
        assert it.mux.stats.blocked == 4
        assert it.read() == b"xxx"
        it.stream.origin = None
        it.give(DATA, 3, payload=b"y")
        assert len(asked) == 4

    def test_an_end_that_somebody_else_decides_on(self, hand: Any) -> None:
        it = hand()
        closed: list[bool] = []
        it.stream.on_close = lambda: closed.append(it.stream.closed)
        error = StreamReset("gone")
        it.stream.fail(error, 0.0)
        it.stream.fail(StreamReset("again"), 0.0)
        assert [each.type for each in it.sent()] == [DESTROY]
        assert it.stream.error is error
        assert closed == [True]


class TestSending:
    def test_small_writes_share_a_packet(self, hand: Any) -> None:
        it = hand()
        for part in (b"a", b"b", b"c"):
            it.stream.write(part, 0.0)
        (packet,) = it.sent()
        assert (packet.type, packet.payload, packet.seq) == (DATA, b"abc", 0)
        assert (it.stream.unsent, it.stream.unacked) == (0, 3)

    def test_a_burst_is_one_transmit(self, hand: Any) -> None:
        it = hand()
        it.stream.write(bytes(50_000), 0.0)
        packets = it.sent()
        assert len(packets) == 10, "the initial congestion window"
        assert [each.seq for each in packets] == list(range(10))
        assert {len(each.payload) for each in packets} == {FULL}
        (transmit,) = it.transmits
        assert transmit.segment == FULL + 20
        assert it.stream.unsent == 50_000 - 10 * FULL
        assert it.stream.unacked == 10 * FULL

    def test_bursts_fit_what_the_kernel_takes_at_once(self, hand: Any) -> None:
        it = hand()
        it.stream._sender.congestion.window = 500.0
        it.stream.write(bytes(400_000), 0.0)
        it.sent()
        for transmit in it.transmits:
            sizes = [len(each) for each in transmit.buffers]
            assert sum(sizes) <= 65_000
            assert len(sizes) <= 1024

    def test_nothing_above_1200_before_a_probe_came_through(self, hand: Any) -> None:
        it = hand()
        it.warm_up()
        seen = []
        while it.stream._sender.mtu.mtu < 1500:
            it.stream.write(bytes(5 * 1500), it.now)
            mtu = it.stream._sender.mtu.mtu
            packets = it.sent()
            probes = [each for each in packets if each.padding]
            assert all(len(each.payload) <= mtu - 48 for each in packets), (
                "payloads keep to what is proven"
            )
            seen += [len(each.payload) + each.padding + 48 for each in probes]
            it.now += 0.05
            it.give(ACK, ack=packets[-1].seq + 1)
        assert seen == [*range(1232, 1489, 32), 1500]

    def test_a_lost_probe_is_repeated_without_padding(self, hand: Any) -> None:
        it = hand()
        following = it.warm_up()
        it.stream.write(bytes(5 * FULL), it.now)
        probe = it.sent()[0]
        assert (probe.seq, probe.padding) == (following, 32)
        window = it.stream._sender.congestion.window
        it.now += 0.05
        again = it.give(SACK, ack=following, sacks=((following + 1, following + 5),))
        assert [(each.seq, each.padding, each.payload) for each in again] == [
            (following, 0, probe.payload)
        ]
        assert it.stream._sender.congestion.window >= window, "a lost probe is no congestion"
        assert it.stream._sender.mtu.mtu == 1200

    def test_the_peers_window_limits_what_is_in_flight(self, hand: Any) -> None:
        it = hand()
        it.stream.write(b"x", 0.0)
        it.sent()
        it.give(ACK, ack=1, window=3 * FULL + 100)
        it.stream.write(bytes(10 * FULL), 0.0)
        assert len(it.sent()) == 3

    def test_any_window_permits_one_packet(self, hand: Any) -> None:
        it = hand()
        it.stream.write(b"x", 0.0)
        it.sent()
        it.give(ACK, ack=1, window=1)
        it.stream.write(bytes(10 * FULL), 0.0)
        assert len(it.sent()) == 1

    def test_a_closed_window_is_probed_for_ever(self, hand: Any) -> None:
        it = hand()
        it.stream.write(b"x", 0.0)
        it.sent()
        it.give(ACK, ack=1, window=0)
        it.now = 0.02
        it.stream.write(b"more", it.now)
        said = it.wait(30.0)
        assert {packet.type for _, packet in said} == {HEARTBEAT}
        assert [when for when, _ in said][:4] == pytest.approx([0.02, 1.02, 3.02, 5.02])
        assert not it.stream.closed
        assert it.give(ACK, ack=1, window=0) == []
        assert [each.payload for each in it.give(ACK, ack=1, window=100)] == [b"more"]

    def test_an_old_packet_does_not_change_the_window(self, hand: Any) -> None:
        it = hand()
        it.give(DATA, 0, payload=b"a")
        it.give(ACK, 1, window=5000)
        it.give(DATA, 0, payload=b"a", window=0)
        assert it.stream._sender.window == 5000
        it.give(ACK, 1, window=0)
        assert it.stream._sender.window == 0

    def test_an_ack_of_what_was_never_sent_acknowledges_nothing(self, hand: Any) -> None:
        it = hand()
        it.stream.write(b"x", 0.0)
        it.sent()
        assert it.give(DATA, 0, 2, b"data", window=5) == []
        assert it.read() == b"data"
        assert it.stream.unacked == 1
        assert it.stream._sender.window == 4194304
        assert it.mux.stats.wrong_acks == 1

    def test_senseless_blocks_are_skipped(self, hand: Any) -> None:
        it = hand()
        it.stream.write(bytes(5 * FULL), 0.0)
        it.sent()
        it.now = 0.05
        it.give(ACK, ack=1)
        it.give(SACK, ack=1, sacks=((0, 3), (4, 4), (4, 3), (4, 6), (900, 901), (3, 4)))
        assert it.stream._sender.flight.sacked == 1
        assert it.stream.unacked == 4 * FULL

    def test_messages(self, hand: Any) -> None:
        it = hand()
        it.stream.send_message(b"one", 0.0)
        it.stream.send_message(b"", 0.0)
        assert [(each.type, each.seq, each.payload) for each in it.sent()] == [
            (MESSAGE, 0, b"one"),
            (MESSAGE, 0, b""),
        ]
        assert it.mux.deadline() is None

    def test_only_the_newest_messages_wait(self, hand: Any) -> None:
        it = hand(connect=False)
        for number in range(MAX_MESSAGES + 3):
            it.stream.send_message(bytes([number]), 0.0)
        it.stream.connect(0, 1234, ELSEWHERE, 0.0)
        assert [each.payload[0] for each in it.sent()] == list(range(3, MAX_MESSAGES + 3))

    def test_keep_alive(self, hand: Any) -> None:
        it = hand()
        it.stream.keep_alive = 0.1
        said = it.wait(0.55)
        assert [packet.type for _, packet in said] == [HEARTBEAT] * 5
        assert [when for when, _ in said] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
        it.stream.write(b"x", it.now)
        assert [packet.type for _, packet in it.wait(0.9)] == [DATA], "not while data is out"
        it.give(ACK, ack=1)
        assert [when for when, _ in it.wait(1.05)] == pytest.approx([1.0])
        it.stream.keep_alive = None
        assert it.wait(5.0) == []
        assert it.mux.deadline() is None


class TestLossRecovery:
    def test_three_sacked_packets_prove_a_loss(self, hand: Any) -> None:
        it = hand()
        it.stream.write(bytes(range(256)) * 18, 0.0)
        first = it.sent()
        assert len(first) == 4
        it.now = 0.05
        (again,) = it.give(SACK, ack=0, sacks=((1, 4),))
        assert (again.seq, again.payload) == (0, first[0].payload)
        assert it.mux.stats.retransmissions == 1
        assert it.give(SACK, ack=0, sacks=((1, 4),)) == [], "once"
        it.give(ACK, ack=4)
        assert it.stream.unacked == 0

    def test_a_retransmission_carries_what_is_known_now(self, hand: Any) -> None:
        it = hand()
        it.stream.write(bytes(4 * FULL), 0.0)
        it.sent()
        it.give(DATA, 0, payload=bytes(1000))
        it.now = 0.05
        (again,) = it.give(SACK, 1, sacks=((1, 4),))
        assert (again.ack, again.window) == (1, 262144 - 1000)

    def test_a_loss_by_itself_does_not_shrink_the_window(self, hand: Any) -> None:
        it = hand()
        it.stream.write(bytes(10 * FULL), 0.0)
        it.sent()
        it.now = 0.05
        it.give(SACK, ack=0, sacks=((3, 6),))
        it.give(SACK, ack=0, sacks=((3, 6), (8, 10)))
        assert it.mux.stats.retransmissions == 5
        assert it.stream._sender.congestion.window >= 10

    def test_lost_packets_leave_together(self, hand: Any) -> None:
        it = hand()
        it.stream.write(bytes(9 * FULL + 7), 0.0)
        first = it.sent()
        it.now = 0.05
        again = it.give(SACK, ack=0, sacks=((1, 2), (3, 4), (6, 9)))
        assert again == [first[seq] for seq in (0, 2, 4, 5)]
        (transmit,) = it.transmits
        assert transmit.segment == FULL + 20

    def test_two_sacked_packets_may_be_reordering(self, hand: Any) -> None:
        it = hand()
        it.stream.write(bytes(3 * FULL), 0.0)
        it.sent()
        it.now = 0.1
        assert it.give(SACK, ack=0, sacks=((1, 3),)) == []
        said = it.wait(0.2)
        assert [(packet.seq, when) for when, packet in said] == [(0, pytest.approx(0.125))]

    def test_a_lost_last_packet_is_probed(self, hand: Any) -> None:
        it = hand()
        it.warm_up(0.04)
        it.stream.write(b"last", it.now)
        said = it.wait(it.now + 0.2)
        assert [(packet.seq, packet.payload) for _, packet in said] == [(1, b"last")] * 2
        assert said[1][0] - said[0][0] == pytest.approx(0.082)

    def test_a_probe_is_something_new_if_there_is(self, hand: Any) -> None:
        it = hand()
        it.warm_up(0.04)
        it.stream.write(bytes(30 * FULL), it.now)
        newest = it.sent()[-1].seq
        room = int(it.stream._sender.congestion.window) - it.stream._sender.flight.in_flight
        *paced, (_, probe) = it.wait(it.now + 0.2)
        assert len(paced) == room
        assert probe.seq == newest + room + 1

    def test_beyond_a_gap_the_oldest_is_probed(self, hand: Any) -> None:
        it = hand()
        following = it.warm_up(0.04)
        it.stream.write(bytes(6 * FULL), it.now)
        it.sent()
        it.now += 0.04
        blocks = ((following + 1, following + 5),)
        (again,) = it.give(SACK, ack=following, sacks=blocks)
        assert again.seq == following
        ((when, probe),) = it.wait(it.now + 0.2)
        assert probe.seq == following, "the retransmission may be lost as well"
        assert when < 0.2, "long before the timeout"

    def test_a_black_hole(self, hand: Any) -> None:
        it = hand()
        it.stream.write(b"anyone?", 0.0)
        said = it.wait(20.0)
        assert [when for when, _ in said] == pytest.approx([0, 1, 3, 5, 7, 9, 11])
        assert {(packet.type, packet.payload) for _, packet in said} == {(DATA, b"anyone?")}
        assert it.stream.closed
        assert isinstance(it.stream.error, StreamTimeout)
        assert it.mux.stats.timeouts == 7
        assert (it.stream.unsent, it.stream.unacked) == (0, 0)

    def test_progress_starts_the_count_again(self, hand: Any) -> None:
        it = hand()
        it.stream.write(b"a", 0.0)
        it.wait(11.5)
        it.stream.write(b"b", it.now)
        it.give(ACK, ack=1)
        it.wait(it.now + 12.5)
        assert not it.stream.closed
        it.wait(it.now + 1.0)
        assert it.stream.closed

    def test_only_packets_sent_once_are_timed(self, hand: Any) -> None:
        it = hand()
        it.stream.write(b"a", 0.0)
        it.wait(1.5)
        it.give(ACK, ack=1)
        assert it.stream._sender.flight.srtt is None
        it.warm_up(0.3)
        assert it.stream._sender.flight.srtt == pytest.approx(0.3)

    def test_everything_is_sent_again_after_a_timeout(self, hand: Any) -> None:
        it = hand()
        it.stream.write(bytes(5 * FULL), 0.0)
        assert len(it.sent()) == 5
        ((_, first),) = it.wait(1.0)
        assert first.seq == 0
        it.now = 1.1
        assert [each.seq for each in it.give(ACK, ack=1)] == [1, 2, 3, 4]


class TestClosing:
    def test_data_and_end_share_a_packet(self, hand: Any) -> None:
        it = hand()
        it.stream.write(b"bye", 0.0)
        it.stream.end(0.0)
        (packet,) = it.sent()
        assert (packet.type, packet.seq, packet.payload) == (DATA | END, 0, b"bye")

    def test_the_end_of_an_idle_stream_has_a_number_of_its_own(self, hand: Any) -> None:
        it = hand()
        it.warm_up()
        it.stream.end(it.now)
        (packet,) = it.sent()
        assert (packet.type, packet.seq, packet.payload) == (END, 1, b"")
        it.stream.end(it.now)
        assert it.sent() == []

    def test_half_close(self, hand: Any) -> None:
        it = hand()
        it.stream.end(0.0)
        it.sent()
        (extra,) = it.give(ACK, ack=1)
        assert (extra.type, extra.seq) == (ACK, 1)
        assert it.stream.ended
        with pytest.raises(Closed):
            it.stream.write(b"x", 0.0)
        (ack,) = it.give(DATA, 0, 1, b"still open")
        assert ack.ack == 1
        assert it.read() == b"still open"
        it.stream.send_message(b"m", 0.0)
        assert [each.type for each in it.sent()] == [MESSAGE]
        (last,) = it.give(END, 1, 1)
        assert (last.type, last.seq, last.ack) == (ACK, 1, 2)
        assert it.stream.closed
        assert it.stream.remote_ended
        assert it.stream.error is None

    def test_the_peer_ends_first(self, hand: Any) -> None:
        it = hand()
        (ack,) = it.give(DATA | END, 0, payload=b"x")
        assert ack.ack == 1
        assert it.stream.remote_ended
        assert not it.stream.closed
        it.stream.end(0.0)
        it.sent()
        assert it.give(ACK, 1, 1) == []
        assert it.stream.closed
        assert it.read() == b"x", "what arrived stays readable"

    def test_both_at_once(self, hand: Any) -> None:
        it = hand()
        it.stream.end(0.0)
        it.sent()
        (ack,) = it.give(END, 0, 0)
        assert ack.ack == 1
        it.give(ACK, 1, 1)
        assert it.stream.closed
        assert it.stream.error is None

    def test_data_after_the_end_is_ignored_and_acknowledged(self, hand: Any) -> None:
        it = hand()
        it.give(END, 0)
        (ack,) = it.give(DATA, 1, payload=b"late")
        assert ack.ack == 1
        assert it.read() == b""

    def test_a_closed_stream_answers_for_a_while(self, hand: Any) -> None:
        it = hand()
        it.stream.end(0.0)
        it.sent()
        it.give(END, 0, 1)
        assert it.stream.closed
        for kind in (END, DATA, HEARTBEAT):
            (ack,) = it.give(kind, 0, 1)
            assert (ack.type, ack.id, ack.seq, ack.ack) == (ACK, 1234, 1, 1)
        assert it.give(ACK, 1, 1) == []
        assert it.wait(2 * TIME_WAIT + 0.1) == []
        assert it.mux.deadline() is None
        late = wire.encode(wire.Packet(END, 7, 0, 0, 1))
        assert not it.mux.receive(late, 0, ELSEWHERE, it.now)

    def test_destroy(self, hand: Any) -> None:
        it = hand()
        it.give(DATA, 0, payload=b"x")
        it.stream.write(bytes(50_000), 0.0)
        it.sent()
        it.stream.destroy(0.0)
        it.stream.destroy(0.0)
        (packet,) = it.sent()
        assert (packet.type, packet.seq, packet.ack) == (DESTROY, 10, 1)
        assert it.stream.closed
        assert it.stream.error is None
        again = it.wait(20.0)
        assert [each for _, each in again] == [packet] * len(AGAIN), "nobody acknowledges it"

    def test_who_missed_a_destroy_is_told_again(self, hand: Any) -> None:
        it = hand()
        it.stream.destroy(0.0)
        (packet,) = it.sent()
        for kind in (DATA, END, HEARTBEAT):
            assert it.give(kind, 0) == [packet]
        assert it.give(DESTROY, 0) == []

    def test_destroy_before_connect_says_nothing(self, hand: Any) -> None:
        it = hand(connect=False)
        it.stream.destroy(0.0)
        assert it.stream.closed
        assert it.sent() == []

    def test_a_received_destroy(self, hand: Any) -> None:
        it = hand()
        it.give(DATA, 0, payload=b"x")
        it.mux.poll()
        assert it.give(DESTROY, 0) == []
        assert not it.stream.closed, "an old one is ignored"
        assert it.give(DESTROY, 5, ack=99) == []
        assert isinstance(it.stream.error, StreamReset)
        assert it.mux.poll() == [it.stream]
        assert it.read() == b"x"

    def test_every_call_on_a_closed_stream(self, hand: Any) -> None:
        it = hand()
        it.stream.destroy(0.0)
        calls: tuple[Callable[[], object], ...] = (
            lambda: it.stream.write(b"x", 0.0),
            lambda: it.stream.end(0.0),
            lambda: it.stream.send_message(b"x", 0.0),
            lambda: it.stream.connect(0, 1, ELSEWHERE, 0.0),
            lambda: it.stream.change_remote(0, 1, ELSEWHERE, 0.0),
        )
        for call in calls:
            with pytest.raises(Closed):
                call()
        it.stream.keep_alive = 1.0
        it.sent()
        assert it.stream.deadline() is None

    def test_the_second_end_has_a_packet_of_its_own(self, hand: Any) -> None:
        it = hand()
        it.give(END, 0)
        it.stream.write(b"bye", 0.0)
        it.stream.end(0.0)
        assert [(each.type, each.seq, each.payload) for each in it.sent()] == [
            (DATA, 0, b"bye"),
            (END, 1, b""),
        ]
        it.give(ACK, 1, 1)
        it.wait(14.0)
        assert it.stream.closed
        assert it.stream.error is None, "the data arrived; only the ACK of END was lost"

    def test_an_unanswered_end_after_everything_else_is_a_clean_close(self, hand: Any) -> None:
        it = hand()
        it.give(END, 0)
        it.stream.end(0.0)
        it.wait(14.0)
        assert it.stream.closed
        assert it.stream.error is None

    def test_an_unanswered_end_with_data_is_a_timeout(self, hand: Any) -> None:
        it = hand()
        it.give(END, 0)
        it.stream.write(b"x", 0.0)
        it.stream.end(0.0)
        it.wait(14.0)
        assert isinstance(it.stream.error, StreamTimeout)
