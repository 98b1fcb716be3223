from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.transport import noise
from hyperseaport.transport.errors import HandshakeError, InvalidInput, LocalError
from hyperseaport.transport.keys import NS_PEER_HANDSHAKE, KeyPair
from hyperseaport.transport.noise import Handshake, Initiator, Responder

VECTORS = load("noise")
HANDSHAKES = VECTORS["handshakes"]
PAYLOADS = VECTORS["holepunch"]["payloads"]
XX = b"Noise_XX_Ed25519_ChaChaPoly_BLAKE2b"
PROLOGUE = NS_PEER_HANDSHAKE
CLIENT = KeyPair.from_seed(b"\x01" * 32)
SERVER = KeyPair.from_seed(b"\x02" * 32)


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


def pair(row: dict[str, Any], side: str) -> KeyPair:
    return KeyPair.from_seed(unhex(row[side]["static_seed"]))


def ends(row: dict[str, Any]) -> tuple[Initiator, Responder]:
    prologue = unhex(row["prologue"])
    server = pair(row, "responder")
    return (
        Initiator(
            pair(row, "initiator"),
            server.public_key,
            prologue=prologue,
            ephemeral_seed=unhex(row["initiator"]["ephemeral_seed"]),
        ),
        Responder(
            server,
            prologue=prologue,
            ephemeral_seed=unhex(row["responder"]["ephemeral_seed"]),
        ),
    )


def fresh_ends(prologue: bytes = PROLOGUE) -> tuple[Initiator, Responder]:
    return (
        Initiator(CLIENT, SERVER.public_key, prologue=prologue, ephemeral_seed=b"\x03" * 32),
        Responder(SERVER, prologue=prologue, ephemeral_seed=b"\x04" * 32),
    )


def by_name(rows: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[row["name"] for row in rows])


# Diffie-Hellman


@pytest.mark.parametrize("row", VECTORS["key_pairs"], ids=lambda row: row["name"])
def test_scalar_of_a_seed(row: dict[str, str]) -> None:
    assert noise.scalar(unhex(row["seed"])).hex() == row["dh_scalar"]


@pytest.mark.parametrize("row", VECTORS["dh"], ids=lambda row: f"{row['a']}-{row['b']}")
def test_diffie_hellman(row: dict[str, str]) -> None:
    shared = noise.diffie_hellman(unhex(row["scalar_a"]), unhex(row["public_b"]))
    assert shared.hex() == row["shared"] == row["shared_reversed"]


@pytest.mark.parametrize("name", VECTORS["dh_must_fail"])
def test_points_that_must_fail(name: str) -> None:
    point = unhex(VECTORS["dh_must_fail"][name])
    with pytest.raises(HandshakeError, match="no point"):
        noise.diffie_hellman(noise.scalar(bytes(32)), point)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_numbers_and_points_of_another_size(size: int) -> None:
    """libsodium would read past a short one."""
    number, point = noise.scalar(bytes(32)), KeyPair.from_seed(bytes(32)).public_key
    assert noise.public_point(number) == point
    with pytest.raises(HandshakeError, match="no point"):
        noise.diffie_hellman(number, bytes(size))
    with pytest.raises(HandshakeError, match="no point"):
        noise.diffie_hellman(bytes(size), point)
    with pytest.raises(HandshakeError, match="no number"):
        noise.public_point(bytes(size))


@pytest.mark.parametrize("name", VECTORS["dh_must_fail"])
def test_connecting_to_such_a_point_is_the_callers_mistake(name: str) -> None:
    point = unhex(VECTORS["dh_must_fail"][name])
    initiator = Initiator(CLIENT, point, prologue=PROLOGUE, ephemeral_seed=bytes(32))
    with pytest.raises(InvalidInput, match=f"{point.hex()} is not a public key"):
        initiator.message(b"")


@pytest.mark.parametrize("name", VECTORS["dh_must_fail"])
def test_such_a_point_as_the_peers_ephemeral_key(name: str) -> None:
    point = unhex(VECTORS["dh_must_fail"][name])
    initiator, responder = fresh_ends()
    message = initiator.message(b"")
    with pytest.raises(HandshakeError):
        responder.read(point + message[32:])
    with pytest.raises(HandshakeError):
        initiator.read(point + bytes(16))


# The recorded handshakes


@by_name([row for row in HANDSHAKES if row["pattern"] == "IK"])
def test_recorded_handshake(row: dict[str, Any]) -> None:
    initiator, responder = ends(row)
    first, second = row["messages"]

    message = initiator.message(unhex(first["payload"]))
    assert message.hex() == first["message"]
    assert len(message) == noise.MESSAGE_1_OVERHEAD + len(unhex(first["payload"]))
    assert responder.remote_public_key == b""
    assert responder.read(message).hex() == first["payload"]
    assert responder.remote_public_key.hex() == row["responder_sees_initiator_static"]

    message, there = responder.message(unhex(second["payload"]))
    assert message.hex() == second["message"]
    assert len(message) == noise.MESSAGE_2_OVERHEAD + len(unhex(second["payload"]))
    payload, here = initiator.read(message)
    assert payload.hex() == second["payload"]

    assert here.is_initiator
    assert not there.is_initiator
    assert here.hash == there.hash == unhex(row["handshake_hash"])
    assert here.tx == there.rx == unhex(row["initiator_tx"])
    assert here.rx == there.tx == unhex(row["initiator_rx"])
    assert here.public_key == there.remote_public_key == pair(row, "initiator").public_key
    assert there.public_key == here.remote_public_key == pair(row, "responder").public_key


@by_name([row for row in HANDSHAKES if "holepunch_secret" in row["derived"]])
def test_what_is_derived(row: dict[str, Any]) -> None:
    here, there = (
        Handshake(
            is_initiator=is_initiator,
            tx=bytes(32),
            rx=bytes(32),
            hash=unhex(row["handshake_hash"]),
            public_key=bytes(32),
            remote_public_key=bytes(32),
        )
        for is_initiator in (True, False)
    )
    derived = row["derived"]
    assert here.holepunch_secret == there.holepunch_secret == unhex(derived["holepunch_secret"])
    assert here.local_stream_id == there.remote_stream_id == unhex(derived["initiator_stream_id"])
    assert here.remote_stream_id == there.local_stream_id == unhex(derived["responder_stream_id"])


def test_recorded_handshake_of_hyperdht() -> None:
    row = load("hyperdht")["noise"]
    client, server = (
        KeyPair.from_seed(unhex(row[side]["static"]["seed"])) for side in ("initiator", "responder")
    )
    initiator = Initiator(
        client,
        server.public_key,
        prologue=unhex(row["prologue"]),
        ephemeral_seed=unhex(row["initiator"]["ephemeralSeed"]),
    )
    responder = Responder(
        server,
        prologue=unhex(row["prologue"]),
        ephemeral_seed=unhex(row["responder"]["ephemeralSeed"]),
    )
    message = initiator.message(unhex(row["message1"]["payload"]))
    assert message.hex() == row["message1"]["hex"]
    assert responder.read(message).hex() == row["message1"]["payload"]
    message, there = responder.message(unhex(row["message2"]["payload"]))
    assert message.hex() == row["message2"]["hex"]
    payload, here = initiator.read(message)
    assert payload.hex() == row["message2"]["payload"]
    assert here.hash.hex() == there.hash.hex() == row["handshakeHash"]
    assert (here.tx.hex(), here.rx.hex()) == (row["initiatorTx"], row["initiatorRx"])
    assert (there.tx.hex(), there.rx.hex()) == (row["responderTx"], row["responderRx"])
    assert here.holepunch_secret.hex() == row["holepunchSecret"]
    assert there.holepunch_secret.hex() == row["responderHolepunchSecret"]
    assert here.local_stream_id.hex() == row["initiatorStreamId"]
    assert here.remote_stream_id.hex() == row["responderStreamId"]


class Recorder:
    """Writes down what the package's symmetric state does, as the vectors' log has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from noise.state import SymmetricState

        self.steps: list[dict[str, str]] = []
        self._outer = True
        # Else the steps before the first message may have been done for another test.
        noise._start.cache_clear()
        mix_hash, mix_key = SymmetricState.mix_hash, SymmetricState.mix_key

        def recorded_mix_hash(state: Any, data: bytes) -> None:
            mix_hash(state, data)
            if self._outer:
                self.steps.append({"op": "mixHash", "data": data.hex(), "h": state.h.hex()})

        def recorded_mix_key(state: Any, shared: bytes) -> None:
            mix_key(state, shared)
            k = state.cipher_state.k.hex()
            self.steps.append({"op": "mixKey", "dh": shared.hex(), "ck": state.ck.hex(), "k": k})

        monkeypatch.setattr(SymmetricState, "mix_hash", recorded_mix_hash)
        monkeypatch.setattr(SymmetricState, "mix_key", recorded_mix_key)
        for name, op in (
            ("encrypt_and_hash", "encryptAndHash"),
            ("decrypt_and_hash", "decryptAndHash"),
        ):
            monkeypatch.setattr(
                SymmetricState, name, self._outermost(getattr(SymmetricState, name), op)
            )

    def _outermost(self, method: Any, op: str) -> Any:
        def recorded(state: Any, data: bytes) -> bytes:
            self._outer = False
            output: bytes = method(state, bytes(data))
            self._outer = True
            self.steps.append(
                {
                    "op": op,
                    "input": bytes(data).hex(),
                    "output": output.hex(),
                    "h": state.h.hex(),
                }
            )
            return output

        return recorded

    def take(self) -> list[dict[str, str]]:
        steps, self.steps = self.steps, []
        return steps


@by_name(HANDSHAKES)
def test_every_step_of_the_trace(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    is_ik = row["pattern"] == "IK"
    state = noise.handshake_state(
        row["protocol_name"].encode(),
        True,
        prologue=unhex(row["prologue"]),
        key_pair=pair(row, "initiator"),
        ephemeral_seed=unhex(row["initiator"]["ephemeral_seed"]),
        remote_public_key=pair(row, "responder").public_key if is_ik else None,
    )
    log = [recorder.take()]
    for message in row["messages"]:
        out = bytearray()
        if message["from"] == "initiator":
            state.write_message(unhex(message["payload"]), out)
            assert out.hex() == message["message"]
        else:
            state.read_message(unhex(message["message"]), out)
            assert out.hex() == message["payload"]
        log.append(recorder.take())
    assert log == [entry["steps"] for entry in row["initiator_log"]]
    assert state.noise_protocol.handshake_hash.hex() == row["handshake_hash"]
    assert state.noise_protocol.cipher_state_encrypt.k.hex() == row["initiator_tx"]


@by_name([row for row in HANDSHAKES if row["pattern"] == "XX"])
def test_responder_of_the_other_pattern(row: dict[str, Any]) -> None:
    state = noise.handshake_state(
        XX,
        False,
        prologue=unhex(row["prologue"]),
        key_pair=pair(row, "responder"),
        ephemeral_seed=unhex(row["responder"]["ephemeral_seed"]),
    )
    for message in row["messages"]:
        out = bytearray()
        if message["from"] == "responder":
            state.write_message(unhex(message["payload"]), out)
            assert out.hex() == message["message"]
        else:
            state.read_message(unhex(message["message"]), out)
            assert out.hex() == message["payload"]
    assert state.rs.public_bytes.hex() == row["responder_sees_initiator_static"]
    assert state.noise_protocol.cipher_state_decrypt.k.hex() == row["initiator_tx"]
    assert state.noise_protocol.handshake_hash.hex() == row["handshake_hash"]


def test_two_static_keys_are_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other pair is remembered: an ephemeral secret must not outlive its handshake."""
    multiplied: list[tuple[bytes, bytes]] = []
    real = noise.diffie_hellman

    def counted(number: bytes, public_key: bytes) -> bytes:
        multiplied.append((number, public_key))
        return real(number, public_key)

    monkeypatch.setattr(noise, "diffie_hellman", counted)
    noise._static_secret.cache_clear()
    counts = []
    for _ in range(3):
        initiator, responder = fresh_ends()
        multiplied.clear()
        responder.read(initiator.message(b""))
        payload, _ = responder.message(b"")
        initiator.read(payload)
        counts.append(len(multiplied))
    assert counts == [8, 6, 6]
    assert noise._static_secret.cache_info().currsize == 2
    assert noise._static_secret.cache_info().maxsize == noise.STATIC_SECRETS


def test_handshakes_that_begin_alike_share_nothing_that_changes() -> None:
    """Interleaved step by step, each comes to the same result at both of its ends."""
    noise._start.cache_clear()
    seeds = [bytes([number]) * 32 for number in range(8)]
    initiators = [
        Initiator(CLIENT, SERVER.public_key, prologue=PROLOGUE, ephemeral_seed=seed)
        for seed in seeds[:4]
    ]
    responders = [Responder(SERVER, prologue=PROLOGUE, ephemeral_seed=seed) for seed in seeds[4:]]
    assert noise._start.cache_info().currsize == 2
    assert noise._start.cache_info().maxsize == noise.STARTS
    requests = [initiator.message(b"request") for initiator in initiators]
    ends = list(zip(initiators, responders, requests, strict=True))
    for _, responder, request in ends:
        assert responder.read(request) == b"request"
    replies = [responder.message(b"reply") for _, responder, _ in ends]
    hashes = set()
    for initiator, (reply, there) in zip(initiators, replies, strict=True):
        payload, here = initiator.read(reply)
        assert (payload, here.hash, here.tx) == (b"reply", there.hash, there.rx)
        hashes.add(here.hash)
    assert len(hashes) == 4


def test_what_is_remembered_holds_no_ephemeral_key() -> None:
    noise._start.cache_clear()
    initiator, responder = fresh_ends()
    responder.read(initiator.message(b""))
    for is_initiator, key_pair, remote in (
        (True, CLIENT, SERVER.public_key),
        (False, SERVER, None),
    ):
        start = noise._start(noise.PROTOCOL, is_initiator, PROLOGUE, key_pair, remote)
        state = start.handshake_state
        for key in (state.e, state.re):
            assert not hasattr(key, "public_bytes")
        assert hasattr(state.rs, "public_bytes") == is_initiator
        assert not start.cipher_state_handshake.has_key()
    assert noise._start.cache_info().misses == 2


# Rules of use


def test_damaged_replies_do_not_spoil_the_attempt() -> None:
    initiator, responder = fresh_ends()
    responder.read(initiator.message(b"hello"))
    reply, there = responder.message(b"welcome")
    damaged = [
        b"",
        reply[:31],
        reply[:40],
        reply[:-1],
        reply + b"\x00",
        bytes(len(reply)),
        *(
            reply[:index] + bytes((reply[index] ^ 1,)) + reply[index + 1 :]
            for index in range(len(reply))
        ),
    ]
    for message in damaged:
        with pytest.raises(HandshakeError, match="does not verify"):
            initiator.read(message)
    payload, here = initiator.read(reply)
    assert payload == b"welcome"
    assert here.hash == there.hash


def test_a_true_reply_to_another_request_is_refused() -> None:
    initiator, _ = fresh_ends()
    initiator.message(b"one")
    other = Initiator(CLIENT, SERVER.public_key, prologue=PROLOGUE, ephemeral_seed=b"\x07" * 32)
    responder = Responder(SERVER, prologue=PROLOGUE, ephemeral_seed=b"\x08" * 32)
    responder.read(other.message(b"two"))
    with pytest.raises(HandshakeError):
        initiator.read(responder.message(b"")[0])


def test_damaged_requests_are_refused() -> None:
    initiator, _ = fresh_ends()
    message = initiator.message(b"hello")
    for index in range(0, len(message), 7):
        _, responder = fresh_ends()
        with pytest.raises(HandshakeError, match="does not verify"):
            responder.read(message[:index] + bytes((message[index] ^ 1,)) + message[index + 1 :])
        assert responder.remote_public_key == b""


def test_prologues_have_to_agree() -> None:
    initiator, _ = fresh_ends()
    _, responder = fresh_ends(b"other")
    with pytest.raises(HandshakeError):
        responder.read(initiator.message(b""))


def test_responder_with_another_key_refuses() -> None:
    initiator, _ = fresh_ends()
    responder = Responder(CLIENT, prologue=PROLOGUE, ephemeral_seed=bytes(32))
    with pytest.raises(HandshakeError):
        responder.read(initiator.message(b""))


def test_same_seeds_same_messages() -> None:
    assert fresh_ends()[0].message(b"x") == fresh_ends()[0].message(b"x")


def test_steps_out_of_order_are_the_callers_mistake() -> None:
    initiator, responder = fresh_ends()
    with pytest.raises(LocalError):
        initiator.read(bytes(48))
    with pytest.raises(LocalError):
        responder.message(b"")
    message = initiator.message(b"")
    with pytest.raises(LocalError):
        initiator.message(b"")
    responder.read(message)
    with pytest.raises(LocalError):
        responder.read(message)
    reply, _ = responder.message(b"")
    with pytest.raises(LocalError):
        responder.message(b"")
    initiator.read(reply)
    with pytest.raises(LocalError):
        initiator.read(reply)


def test_sizes_of_keys_and_seeds() -> None:
    with pytest.raises(InvalidInput, match="32 bytes, not 31"):
        Initiator(CLIENT, bytes(31), prologue=b"", ephemeral_seed=bytes(32))
    with pytest.raises(InvalidInput, match="32 bytes, not 33"):
        Initiator(CLIENT, SERVER.public_key, prologue=b"", ephemeral_seed=bytes(33))
    with pytest.raises(InvalidInput, match="32 bytes, not 0"):
        Responder(SERVER, prologue=b"", ephemeral_seed=b"")


def test_no_warning_and_no_secret_escapes() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        initiator, responder = fresh_ends()
        responder.read(initiator.message(b""))
        _, there = responder.message(b"")
    assert caught == []
    for secret in (there.tx, there.rx, there.hash):
        assert repr(secret)[2:-1] not in repr(there)


# Hole punching payloads


@by_name(PAYLOADS)
def test_recorded_sealed_payload(row: dict[str, Any]) -> None:
    secret = unhex(VECTORS["holepunch"]["secret"])
    sealed = noise.seal(unhex(row["plain"]), secret, unhex(row["nonce"]))
    assert sealed.hex() == row["encrypted"]
    assert noise.unseal(sealed, secret) == unhex(row["plain"])


def test_recorded_sealed_payload_of_hyperdht() -> None:
    row = load("hyperdht")["securePayload"]
    sealed = noise.seal(unhex(row["plaintext"]), unhex(row["secret"]), unhex(row["nonce"]))
    assert sealed.hex() == row["hex"]
    assert noise.unseal(sealed, unhex(row["secret"])) == unhex(row["plaintext"])


def test_what_was_not_sealed_is_ignored() -> None:
    secret, nonce = b"\x09" * 32, bytes(24)
    sealed = noise.seal(b"payload", secret, nonce)
    assert noise.unseal(sealed, bytes(32)) is None
    assert len(noise.seal(b"", secret, nonce)) == 40
    assert noise.unseal(noise.seal(b"", secret, nonce), secret) is None
    assert noise.unseal(b"", secret) is None
    for index in range(len(sealed)):
        tampered = sealed[:index] + bytes((sealed[index] ^ 128,)) + sealed[index + 1 :]
        assert noise.unseal(tampered, secret) is None


def test_recorded_host_tokens() -> None:
    row = VECTORS["holepunch"]
    token = noise.host_token(row["token"]["host"], unhex(row["local_secret"]))
    assert token.hex() == row["token"]["token"]
    row = load("hyperdht")["securePayload"]
    token = noise.host_token(row["tokenHost"], unhex(row["localSecret"]))
    assert token.hex() == row["token"]


# Arbitrary input


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.binary(max_size=300))
def test_arbitrary_requests(data: bytes) -> None:
    _, responder = fresh_ends()
    with pytest.raises(HandshakeError):
        responder.read(data)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.binary(max_size=300), st.booleans())
def test_arbitrary_replies(data: bytes, keep_ephemeral: bool) -> None:
    initiator, responder = fresh_ends()
    responder.read(initiator.message(b""))
    reply, _ = responder.message(b"")
    with pytest.raises(HandshakeError):
        initiator.read(reply[:32] + data if keep_ephemeral else data)
    assert initiator.read(reply)[0] == b""


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.binary(max_size=1200), st.binary(max_size=1200), st.binary(max_size=40))
def test_payloads_arrive(first: bytes, second: bytes, prologue: bytes) -> None:
    initiator, responder = fresh_ends(prologue)
    assert responder.read(initiator.message(first)) == first
    reply, there = responder.message(second)
    payload, here = initiator.read(reply)
    assert payload == second
    assert (here.tx, here.rx, here.hash) == (there.rx, there.tx, there.hash)


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=100))
def test_arbitrary_sealed_payloads(data: bytes) -> None:
    assert noise.unseal(data, bytes(32)) is None
