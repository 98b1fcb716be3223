"""Each captured exchange again, with a stream of ours in the place of either side.

The other side's packets are said as they were captured; what the application did is read off the
captured packets of the side replaced. Ours has to say the same packets in the same order, but for
the window, which is ours.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from vectors import load

from hyperseaport.transport.udx import packet as wire
from hyperseaport.transport.udx.mux import Mux
from hyperseaport.transport.udx.packet import Packet, decode

SCENARIOS = {each["name"]: each for each in load("udx")["scenarios"]}
#: The reference fills its first packet less than ours (spec: udx 3.1), so as sender these differ.
PACKED_OTHERWISE = {("write_64k", "a"), ("loss_third_data_packet", "a")}
#: One side is made by hand and sends what no implementation would.
HAND_MADE = {("multi_gap_sack", "b"), ("zero_window", "b")}
CASES = [
    (name, side)
    for name in SCENARIOS
    for side in "ab"
    if (name, side) not in PACKED_OTHERWISE | HAND_MADE
]
#: From the relay that captured to the side, seconds.
DELAYS = {"tail_loss_probe": 0.02, "simultaneous_end": 0.01}
#: When the side a set its keep-alive, seconds.
KEEP_ALIVES = {"heartbeat": 0.03, "heartbeat_before_any_data": 0.0}
#: Times are captured in whole milliseconds.
TOLERANCE = 0.003
CAUSED = wire.DATA | wire.END | wire.MESSAGE | wire.DESTROY


class Side:
    """One side of a scenario."""

    def __init__(self, hand: Any, name: str, side: str) -> None:
        scenario = SCENARIOS[name]
        self.mine, self.other = scenario[side], scenario["b" if side == "a" else "a"]
        wrapped = 0xFFFFFFFE if name == "sequence_wrap" else 0
        self.it = hand(connect=False)
        self.it.mux = Mux(self.it.mux._rng)
        self.stream = self.it.stream = self.it.mux.create(
            local_id=self.mine["local_id"],
            first_seq=wrapped if side == "a" else 0,
            first_ack=wrapped if side == "b" else 0,
        )
        self.said: list[Packet] = []
        self.written: set[int] = set()
        if name == "preconnect" and side == "b":
            self.stream.firewall = lambda *_: True
        else:
            self.connect()

    def connect(self) -> None:
        self.stream.connect(0, self.mine["remote_id"], ("10.0.0.2", 1), self.it.now)

    def pass_time(self, until: float) -> None:
        if until > self.it.now:
            self.said += [packet for _, packet in self.it.wait(until)]

    def hear(self, datagram: bytes) -> None:
        assert self.it.mux.receive(datagram, 0, ("10.0.0.2", 1), self.it.now)
        self.said += self.it.sent()

    def do(self, packet: Packet) -> None:
        """What the application did that made the captured packet leave."""
        now = self.it.now
        if packet.type & wire.MESSAGE:
            self.stream.send_message(packet.payload, now)
        elif packet.type & wire.DESTROY:
            self.stream.destroy(now)
        elif packet.type & CAUSED and packet.seq not in self.written:
            self.written.add(packet.seq)
            if packet.payload:
                self.stream.write(packet.payload, now)
            if packet.type & wire.END:
                self.stream.end(now)
        self.said += self.it.sent()


def timed(name: str, side: str) -> list[tuple[float, dict[str, Any]]]:
    """The packets, and when this side sent them or heard them, in that order."""
    delay = DELAYS.get(name, 0.0)
    return sorted(
        (
            (each["t_ms"] / 1000 + (0.0 if each["dir"].startswith(side) else delay), each)
            for each in SCENARIOS[name]["packets"]
        ),
        key=lambda entry: entry[0],
    )


@pytest.mark.parametrize(("name", "side"), CASES)
def test_says_what_the_reference_said(hand: Any, name: str, side: str) -> None:
    scenario, it = SCENARIOS[name], Side(hand, name, side)
    expected = []
    for when, captured in timed(name, side):
        packet = decode(bytes.fromhex(captured["hex"]))
        if side == "a" and name in KEEP_ALIVES and when > KEEP_ALIVES[name]:
            it.pass_time(KEEP_ALIVES[name])
            if it.stream.keep_alive is None:
                it.stream.keep_alive = 0.1
        if captured["dir"].startswith(side):
            expected.append(packet._replace(window=0))
            if name == "zero_window" and packet.type == wire.HEARTBEAT and not it.stream.unsent:
                it.pass_time(when)
                it.written.add(1)
                it.stream.write(b"x" * 300, when)
            if name == "preconnect" and side == "b":
                it.pass_time(when)
                it.connect()
            it.pass_time(when + (0 if packet.type & CAUSED else TOLERANCE))
            it.do(packet)
        elif not captured.get("dropped"):
            it.pass_time(when)
            it.hear(bytes.fromhex(captured["hex"]))
    if name == "zero_window":
        expected[-1] = expected[-1]._replace(payload=b"x" * 300)
    assert [packet._replace(window=0) for packet in it.said] == expected
    received = b"".join(it.stream.read())
    if f"received_by_{side}" in scenario:
        assert hashlib.sha256(received).hexdigest() == scenario[f"received_by_{side}"]["sha256"]
    closes = {"e": "close", "side": side}.items()
    assert it.stream.closed == any(closes <= event.items() for event in scenario.get("events", []))
