from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.dht_fakes import FakeNode, context, reply
from vectors import load

from hyperseaport.transport.dht import server_punch
from hyperseaport.transport.dht.context import Context
from hyperseaport.transport.dht.messages import (
    Firewall,
    HolepunchMessage,
    HolepunchPayload,
    Mode,
    PeerError,
)
from hyperseaport.transport.dht.router import IncomingPunch
from hyperseaport.transport.dht.server_punch import ServerPunch
from hyperseaport.transport.dht.wire import PING
from hyperseaport.transport.noise import host_token, seal, unseal
from hyperseaport.transport.transmit import CLIENT_SOCKET, Address

KEY = bytes([7]) * 32
SECRET = bytes([8]) * 32
CLIENT = ("6.0.0.1", 6000)
RELAY = ("9.0.0.1", 49737)
MINE = ("5.0.0.1", 100)


class Fixture:
    def __init__(self, *, consistent: bool = True) -> None:
        self.node = FakeNode()
        self.context: Context = context(self.node)
        self.started: list[bool] = []
        self.answers: list[tuple[HolepunchPayload, int]] = []
        self.punch = ServerPunch(
            self.context,
            KEY,
            SECRET,
            lambda: frozenset({RELAY}),
            lambda searching, _now: self.started.append(searching),
        )
        for index in range(3 if consistent else 0):
            seen = reply((f"9.0.0.{index}", 1))
            seen.to = MINE
            self.context.punches.survey.note(seen, 0.0)

    def send(
        self,
        payload: HolepunchPayload | bytes,
        *,
        client: Address = CLIENT,
        sender: Address = RELAY,
        secret: bytes = SECRET,
    ) -> bool:
        plain = payload if isinstance(payload, bytes) else payload.encode()
        message = HolepunchMessage(Mode.FROM_RELAY, 0, seal(plain, secret, bytes(24)), client)
        return self.punch.receive(
            IncomingPunch(message, client, sender), self.answer, self.node.now
        )

    def answer(self, sealed: bytes, socket: int, _now: float) -> None:
        plain = unseal(sealed, SECRET)
        assert plain is not None
        self.answers.append((HolepunchPayload.decode(plain), socket))

    def sent(self) -> list[tuple[Address, int]]:
        outbox, self.context.punches.outbox = self.context.punches.outbox, []
        return [(transmit.address, transmit.ttl) for transmit in outbox]

    def only(self) -> HolepunchPayload:
        ((payload, socket),) = self.answers
        assert socket == CLIENT_SOCKET
        self.answers.clear()
        return payload


def test_the_probe_is_answered_and_punched_at_once() -> None:
    """4.3, steps 7 and 10; checklist 47."""
    fixture = Fixture()
    assert fixture.send(HolepunchPayload(remote_address=MINE, token=bytes(32)))
    assert fixture.sent() == [(CLIENT, 0)]
    answer = fixture.only()
    assert answer == HolepunchPayload(
        firewall=Firewall.CONSISTENT,
        addresses=(MINE,),
        token=answer.token,
        remote_token=bytes(32),
    )
    assert answer.token is not None
    assert not fixture.started


def test_another_address_is_no_reason_to_punch() -> None:
    fixture = Fixture()
    fixture.send(HolepunchPayload(remote_address=(MINE[0], 101)))
    assert not fixture.sent()
    assert not fixture.only().punching


def test_only_own_relays_vouch_for_an_address() -> None:
    """Pitfall 10."""
    fixture = Fixture()
    fixture.send(HolepunchPayload(), sender=("9.9.9.9", 9))
    assert fixture.only().token is None
    fixture.send(HolepunchPayload(round=1))
    token = fixture.only().token
    asked = HolepunchPayload(
        round=2, punching=True, firewall=2, addresses=(CLIENT,), remote_token=token
    )
    search = HolepunchPayload(
        round=3, punching=True, firewall=3, addresses=((CLIENT[0], 0),), remote_token=token
    )
    # Through somebody else the echo proves nothing, so no host is searched.
    fixture.send(search, sender=("9.9.9.9", 9))
    assert fixture.only().error == PeerError.ABORTED
    assert not fixture.started
    other = Fixture()
    other.send(HolepunchPayload())
    token = other.only().token
    other.send(HolepunchPayload(**{**_fields(asked), "remote_token": token}))
    assert other.only().punching
    assert other.started == [False]


def _fields(payload: HolepunchPayload) -> dict[str, Any]:
    return {name: getattr(payload, name) for name in HolepunchPayload.__struct_fields__}


def test_punching_is_started_once() -> None:
    fixture = Fixture()
    fixture.send(HolepunchPayload())
    token = fixture.only().token
    assert token == host_token(CLIENT[0], fixture.punch._token_secret)
    asked = HolepunchPayload(
        round=1, punching=True, firewall=2, addresses=(CLIENT,), remote_token=token
    )
    for _ in range(3):
        fixture.send(asked)
        assert fixture.only().punching
    assert fixture.started == [False]
    assert fixture.sent() == [(CLIENT, 5)]


def test_a_round_that_is_over_changes_nothing() -> None:
    """Checklist 48."""
    fixture = Fixture()
    fixture.send(HolepunchPayload(round=5, firewall=2, addresses=(CLIENT,)))
    fixture.only()
    fixture.send(HolepunchPayload(round=4, punching=True, firewall=3, addresses=(("1.2.3.4", 5),)))
    answer = fixture.only()
    assert answer.round == 5
    assert not answer.punching
    assert not fixture.started


@pytest.mark.parametrize(
    "send",
    [
        lambda f: f.send(HolepunchPayload(), secret=bytes(32)),
        lambda f: f.send(b""),
        lambda f: f.send(b"\xff"),
    ],
    ids=["another secret", "empty", "broken"],
)
def test_what_the_client_did_not_make_is_silent(send: Any) -> None:
    fixture = Fixture()
    assert not send(fixture)
    assert not fixture.answers
    assert len(fixture.context.punches) == 0


def test_a_client_that_gives_up_is_given_up() -> None:
    fixture = Fixture()
    fixture.send(HolepunchPayload())
    fixture.only()
    fixture.send(HolepunchPayload(error=1, round=1))
    assert fixture.only() == HolepunchPayload(error=PeerError.ABORTED)
    assert len(fixture.context.punches) == 0


def test_without_a_class_it_is_aborted() -> None:
    fixture = Fixture(consistent=False)
    fixture.send(HolepunchPayload())
    assert fixture.only().error == PeerError.ABORTED


class Contact:
    address = ("9.0.0.1", 1)


def test_the_answer_waits_for_the_class() -> None:
    """Copies that come meanwhile are bounded."""
    fixture = Fixture(consistent=False)
    fixture.node.table = [Contact()]
    for _ in range(server_punch.MAX_UNANSWERED + 3):
        assert fixture.send(HolepunchPayload())
    assert not fixture.answers
    (ping,) = fixture.node.asked(PING)
    for index in range(3):
        seen = reply((f"9.0.0.{index}", 1))
        seen.to = MINE
        sampling = fixture.context.punches.survey._sampling
        assert sampling is not None
        sampling.nat.add(MINE, seen.source)
    seen = reply(ping.to)
    seen.to = MINE
    fixture.node.answer(ping, seen)
    assert len(fixture.answers) == server_punch.MAX_UNANSWERED
    assert {payload.firewall for payload, _ in fixture.answers} == {Firewall.CONSISTENT}


def test_a_second_search_is_for_later() -> None:
    """Checklist 49."""
    fixture = Fixture()
    other = fixture.context.punches.create(bytes(32))
    assert other is not None
    assert other.reserve(0.0)
    fixture.send(HolepunchPayload())
    asked = HolepunchPayload(
        round=1,
        punching=True,
        firewall=Firewall.RANDOM,
        addresses=((CLIENT[0], 0),),
        remote_token=fixture.only().token,
    )
    fixture.send(asked)
    assert fixture.only() == HolepunchPayload(error=PeerError.TRY_LATER, round=1)
    assert len(fixture.context.punches) == 1


def test_with_a_relay_a_search_without_a_turn_goes_on_later() -> None:
    """4.3, step 8: the answer tells all, and what the client has proven still holds."""
    fixture = Fixture()
    fixture.punch.patient = True
    other = fixture.context.punches.create(bytes(32))
    assert other is not None
    assert other.reserve(0.0)
    fixture.send(HolepunchPayload())
    token = fixture.only().token
    asked = HolepunchPayload(
        round=1,
        punching=True,
        firewall=Firewall.RANDOM,
        addresses=((CLIENT[0], 0),),
        remote_token=token,
    )
    fixture.send(asked)
    answer = fixture.only()
    assert answer.error == PeerError.TRY_LATER
    assert (answer.firewall, answer.addresses) == (Firewall.CONSISTENT, (MINE,))
    assert not answer.punching
    assert fixture.started == [True]
    other.close(0.0)
    fixture.send(replace(asked, round=2, remote_token=None))
    assert fixture.only().punching
    assert fixture.started == [True, True]


def test_too_many_are_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = Fixture()
    monkeypatch.setattr(type(fixture.context.punches), "create", lambda *_args, **_options: None)
    fixture.send(HolepunchPayload())
    assert fixture.only().error == PeerError.TRY_LATER


def test_when_it_is_closed_nothing_is_taken() -> None:
    fixture = Fixture()
    fixture.send(HolepunchPayload())
    fixture.only()
    fixture.punch.close(0.0)
    assert not fixture.send(HolepunchPayload())
    assert len(fixture.context.punches) == 0


def test_the_recorded_envelope() -> None:
    """Checklist 37: what the reference sealed is opened, understood and made again."""
    vector = load("hyperdht")["securePayload"]
    secret, sealed, nonce = (bytes.fromhex(vector[name]) for name in ("secret", "hex", "nonce"))
    plain = unseal(sealed, secret)
    assert plain == bytes.fromhex(vector["plaintext"])
    payload = HolepunchPayload.decode(plain)
    assert payload.punching
    assert payload.firewall == Firewall.CONSISTENT
    assert seal(payload.encode(), secret, nonce) == sealed
    flipped = bytearray(sealed)
    flipped[-1] ^= 1
    assert unseal(bytes(flipped), secret) is None
    assert unseal(sealed[:40], secret) is None
    token = host_token(vector["tokenHost"], bytes.fromhex(vector["localSecret"]))
    assert token.hex() == vector["token"]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.binary(max_size=150), st.booleans())
def test_arbitrary_messages_are_survived(data: bytes, sealed: bool) -> None:
    fixture = Fixture()
    if sealed:
        fixture.send(data)
    else:
        message = HolepunchMessage(Mode.FROM_RELAY, 0, data, CLIENT)
        fixture.punch.receive(IncomingPunch(message, CLIENT, RELAY), fixture.answer, 0.0)
    assert len(fixture.answers) <= 1
    assert len(fixture.sent()) <= 5
