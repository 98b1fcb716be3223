from __future__ import annotations

from typing import Any

import pytest
from support.dht_fakes import FakeNode, FakeRequest, context, reply

from hyperseaport.transport.dht import client_punch, punch, punches
from hyperseaport.transport.dht.client_punch import ClientPunch
from hyperseaport.transport.dht.messages import (
    PEER_HOLEPUNCH,
    Firewall,
    HolepunchInfo,
    HolepunchMessage,
    HolepunchPayload,
    Mode,
    PeerError,
    Relay,
)
from hyperseaport.transport.dht.nat import Verdict
from hyperseaport.transport.noise import seal, unseal
from hyperseaport.transport.transmit import CLIENT_SOCKET, Address

KEY = bytes([7]) * 32
TARGET = bytes([9]) * 32
SECRET = bytes([8]) * 32
SERVER = ("6.0.0.1", 6000)
RELAYS = tuple(Relay((f"9.0.0.{n}", 49737), ("6.0.0.1", 7000 + n)) for n in range(3))
MINE = ("5.0.0.1", 100)
TOKEN = bytes([3]) * 32


class Fixture:
    def __init__(self, *samples: Address, relay: int = 1, patient: bool = False) -> None:
        self.node = FakeNode()
        self.context = context(self.node)
        self.paths: list[tuple[int, Address]] = []
        self.failed: list[str] = []
        self.busy: list[str] = []
        self.waits = False
        for index, to in enumerate(samples or (MINE,) * 3):
            seen = reply((f"9.9.9.{index}", 1))
            seen.to = to
            self.context.punches.survey.note(seen, 0.0)
        self.punch = ClientPunch(
            self.context,
            TARGET,
            SECRET,
            HolepunchInfo(12, RELAYS),
            relay=RELAYS[relay].relay_address,
            server=SERVER,
            patient=patient,
            on_path=lambda socket, address, _now: self.paths.append((socket, address)),
            on_fail=lambda reason, _now: self.failed.append(reason),
            on_busy=self._on_busy,
        )
        self.punch.start(KEY, 0.0)

    def _on_busy(self, reason: str, _now: float) -> bool:
        self.busy.append(reason)
        return self.waits

    @property
    def asked(self) -> list[FakeRequest]:
        return self.node.asked(PEER_HOLEPUNCH)

    def read(self, index: int = 0) -> tuple[FakeRequest, HolepunchMessage, HolepunchPayload]:
        request = self.asked[index]
        assert request.options["target"] == TARGET
        message = HolepunchMessage.decode(request.options["value"])
        assert (message.mode, message.id) == (Mode.FROM_CLIENT, 12)
        plain = unseal(message.payload, SECRET)
        assert plain is not None
        return request, message, HolepunchPayload.decode(plain)

    def answer(
        self,
        payload: HolepunchPayload,
        *,
        server: Address | None = SERVER,
        secret: bytes = SECRET,
        mode: Mode = Mode.REPLY,
    ) -> None:
        request = self.asked[0]
        sealed = seal(payload.encode(), secret, bytes(24))
        value = HolepunchMessage(mode, 0, sealed, server).encode()
        seen = reply(request.to, value, socket=request.options["socket"])
        seen.to = MINE
        self.node.answer(request, seen)

    def sent(self) -> list[tuple[Address, int]]:
        outbox, self.context.punches.outbox = self.context.punches.outbox, []
        return [(transmit.address, transmit.ttl) for transmit in outbox]


def known(**options: Any) -> HolepunchPayload:
    """What a server answers whose NAT is consistent."""
    usual: dict[str, Any] = {
        "firewall": Firewall.CONSISTENT,
        "addresses": (SERVER,),
        "token": TOKEN,
    }
    options = usual | options
    return HolepunchPayload(**options)


def test_the_probe() -> None:
    """5.4, steps 2 to 4; pitfall 9."""
    fixture = Fixture()
    assert fixture.sent() == [(SERVER, punch.LOW_TTL)]
    request, message, payload = fixture.read()
    assert request.to == RELAYS[1].relay_address
    assert request.options["socket"] == CLIENT_SOCKET
    assert message.peer_address == RELAYS[1].peer_address
    assert payload == HolepunchPayload(
        firewall=Firewall.CONSISTENT, addresses=(MINE,), remote_address=SERVER
    )


def test_a_relay_that_is_none_of_the_servers() -> None:
    fixture = Fixture()
    other = ClientPunch(
        fixture.context,
        TARGET,
        SECRET,
        HolepunchInfo(12, RELAYS),
        relay=("9.8.7.6", 1),
        server=SERVER,
        on_path=lambda *_: None,
        on_fail=lambda *_: None,
        on_busy=lambda *_: False,
    )
    other.start(KEY, 0.0)
    assert fixture.asked[1].to == RELAYS[0].relay_address


def test_a_punch_ends_it() -> None:
    fixture = Fixture()
    fixture.context.punches.receive(CLIENT_SOCKET, SERVER, 0.0)
    assert fixture.paths == [(CLIENT_SOCKET, SERVER)]
    assert fixture.punch.done
    assert not fixture.asked
    assert fixture.node.timers.deadline() is None


def test_the_punch_round() -> None:
    """5.5"""
    fixture = Fixture()
    fixture.sent()
    fixture.answer(known())
    # The server has punched, so its NAT is open.
    assert fixture.sent() == [(SERVER, 0)]
    request, message, payload = fixture.read()
    assert request.to == RELAYS[1].relay_address
    assert message.peer_address == SERVER
    assert payload.punching
    assert (payload.round, payload.firewall, payload.addresses) == (1, 2, (MINE,))
    assert payload.remote_token == TOKEN
    assert payload.token is not None
    fixture.answer(known(round=1, punching=True, remote_token=payload.token))
    fixture.node.wait(60)
    assert [address for address, _ in fixture.sent()] == [SERVER] * punch.ROUNDS
    assert "no packet gets through" in fixture.failed[0]


def test_a_server_that_answers_from_elsewhere() -> None:
    """5.4, step 8."""
    fixture = Fixture()
    fixture.sent()
    moved = ("6.0.0.1", 6666)
    fixture.answer(known(addresses=(moved,)), server=moved)
    assert fixture.sent() == [(moved, punch.LOW_TTL)]
    assert fixture.read()[1].peer_address == moved
    fixture.context.punches.receive(CLIENT_SOCKET, moved, 0.0)
    assert fixture.paths == [(CLIENT_SOCKET, moved)]


def test_a_server_that_does_not_know_itself_is_asked_again() -> None:
    fixture = Fixture()
    fixture.answer(HolepunchPayload())
    fixture.node.wait(client_punch.UNKNOWN_WAIT)
    assert fixture.read()[2].round == 1
    fixture.answer(HolepunchPayload(round=1))
    (reason,) = fixture.failed
    assert "does not know what its own NAT does" in reason


def test_both_random() -> None:
    fixture = Fixture()
    survey = fixture.context.punches.survey
    survey._verdict = Verdict(Firewall.RANDOM, ((MINE[0], 0),))
    survey._when, survey._samples = 0.0, {}
    fixture.answer(known(firewall=Firewall.RANDOM, addresses=((SERVER[0], 0),)))
    (reason,) = fixture.failed
    assert "both sides are behind NATs" in reason
    # The server was told, so that it need not wait.
    told = HolepunchMessage.decode(fixture.node.requests[-1].options["value"])
    plain = unseal(told.payload, SECRET)
    assert plain is not None
    assert HolepunchPayload.decode(plain).error == PeerError.ABORTED
    assert fixture.node.timers.deadline() is None


@pytest.mark.parametrize(
    ("error", "text"),
    [(PeerError.ABORTED, "given up"), (PeerError.TRY_LATER, "try again in 20 s"), (99, "given up")],
)
def test_a_server_that_refuses(error: int, text: str) -> None:
    for rounds in range(2):
        fixture = Fixture()
        if rounds:
            fixture.answer(known())
        fixture.answer(HolepunchPayload(error=error, round=rounds))
        (reason,) = fixture.failed
        assert text in reason
        assert len(fixture.context.punches) == 0
        assert fixture.node.timers.deadline() is None


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        ({"punching": False}, "does not punch"),
        ({"punching": True, "firewall": Firewall.RANDOM}, "did not prove"),
    ],
)
def test_a_server_that_does_not_do_its_part(payload: dict[str, Any], text: str) -> None:
    fixture = Fixture()
    fixture.answer(known())
    fixture.answer(known(round=1, **payload))
    assert text in fixture.failed[0]


def test_unreadable_answers_do_not_count() -> None:
    """Forged ones, and genuine ones of another round."""
    fixture = Fixture()
    fixture.answer(known(), secret=bytes(32))
    fixture.answer(known(), mode=Mode.FROM_SERVER)
    request = fixture.asked[0]
    fixture.node.answer(request, reply(request.to, b"\xff"))
    assert fixture.read()[2].remote_address == SERVER
    fixture.answer(known())
    assert fixture.read()[2].punching
    fixture.answer(known(punching=True))
    assert "its relay answers in its place" in fixture.failed[0]


def test_a_silent_relay_is_replaced_once() -> None:
    fixture = Fixture()
    fixture.node.answer(fixture.asked[0], None)
    request, message, _ = fixture.read()
    assert request.to == RELAYS[0].relay_address
    assert message.peer_address == RELAYS[0].peer_address
    fixture.node.answer(request, None)
    assert "did it stop?" in fixture.failed[0]


def test_one_search_at_a_time() -> None:
    def search(*, waits: bool) -> Fixture:
        fixture = Fixture()
        fixture.waits = waits
        other = fixture.context.punches.create(bytes(32))
        assert other is not None
        assert other.reserve(0.0)
        fixture.answer(known(firewall=Firewall.RANDOM, addresses=((SERVER[0], 0),)))
        assert "try again in 20 s" in fixture.busy[0]
        return fixture

    waiting = search(waits=True)
    assert not waiting.failed
    assert not waiting.punch.searching
    waiting.punch.cancel(0.0)
    assert search(waits=False).failed


def test_with_a_relay_a_search_waits_for_its_turn() -> None:
    """5.5, step 2: the server proves where it is at once, as only this relay lets it."""
    fixture = Fixture(patient=True)
    other = fixture.context.punches.create(bytes(32))
    assert other is not None
    assert other.reserve(0.0)
    random = {"firewall": Firewall.RANDOM, "addresses": ((SERVER[0], 0),)}
    fixture.answer(known(**random))
    assert not fixture.busy
    request, message, payload = fixture.read()
    assert (request.to, message.peer_address) == (RELAYS[1].relay_address, SERVER)
    assert not payload.punching
    assert payload.remote_token == TOKEN
    fixture.answer(known(round=1, remote_token=payload.token, **random))
    fixture.node.wait(client_punch.TURN_WAIT[0] - 0.1)
    assert not fixture.asked
    fixture.node.wait(client_punch.TURN_WAIT[1])
    assert not fixture.asked
    other.close(fixture.node.now)
    fixture.node.wait(client_punch.TURN_WAIT[1])
    request, message, payload = fixture.read()
    # Through the relay that keeps the server's mapping.
    assert message.peer_address == RELAYS[1].peer_address
    assert payload.punching
    assert payload.token is None
    fixture.answer(known(round=2, punching=True, **random))
    assert fixture.punch.searching
    assert not fixture.failed


def test_a_server_that_has_no_turn_is_asked_again() -> None:
    """5.5, step 4; meanwhile others of this node may search."""
    fixture = Fixture(patient=True)
    random = {"firewall": Firewall.RANDOM, "addresses": ((SERVER[0], 0),)}
    fixture.answer(known(**random))
    token = fixture.read()[2].token
    assert fixture.context.punches.random_pause(fixture.node.now)
    fixture.answer(known(round=1, error=PeerError.TRY_LATER, **random))
    assert not fixture.context.punches.random_pause(fixture.node.now)
    fixture.answer(known(round=2, remote_token=token, **random))
    fixture.node.wait(client_punch.TURN_WAIT[1] + 0.1)
    assert fixture.read()[2].punching
    fixture.answer(known(round=3, punching=True, **random))
    assert fixture.punch.searching
    assert not fixture.failed
    fixture.punch.cancel(fixture.node.now)
    assert fixture.node.timers.deadline() is None


def test_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punches, "MAX_PUNCHERS", 0)
    fixture = Fixture()
    assert "too many" in fixture.failed[0]
    assert not fixture.node.requests


def test_cancel_leaves_nothing_behind() -> None:
    for rounds in range(3):
        fixture = Fixture()
        if rounds:
            fixture.answer(known())
        if rounds == 2:
            token = fixture.read()[2].token
            fixture.answer(known(round=1, punching=True, remote_token=token))
        fixture.punch.cancel(0.0)
        fixture.punch.cancel(0.0)
        fixture.node.wait(60)
        assert not fixture.asked
        assert not fixture.failed
        assert len(fixture.context.punches) == 0
        assert fixture.node.timers.deadline() is None
