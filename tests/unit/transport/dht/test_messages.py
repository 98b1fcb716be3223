from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.transport import keys, noise
from hyperseaport.transport.dht import messages
from hyperseaport.transport.dht.messages import (
    Announce,
    HandshakeMessage,
    HolepunchInfo,
    HolepunchMessage,
    HolepunchPayload,
    LookupReply,
    Mode,
    MutablePut,
    MutableValue,
    NoisePayload,
    PeerRecord,
    Relay,
    RelayThrough,
    UdxInfo,
)
from hyperseaport.transport.encoding import Reader
from hyperseaport.transport.errors import DecodeError, InvalidInput
from hyperseaport.transport.transmit import Address

VECTORS = load("hyperdht")


def addr(value: dict[str, Any] | None) -> Address | None:
    return None if value is None else (value["host"], value["port"])


def addrs(values: list[dict[str, Any]]) -> tuple[Address, ...]:
    return tuple((value["host"], value["port"]) for value in values)


def raw(value: str | None) -> bytes | None:
    return None if value is None else bytes.fromhex(value)


def handshake(v: dict[str, Any]) -> HandshakeMessage:
    noise = bytes.fromhex(v["noise"])
    return HandshakeMessage(Mode(v["mode"]), noise, addr(v["peerAddress"]), addr(v["relayAddress"]))


def holepunch(v: dict[str, Any]) -> HolepunchMessage:
    payload = bytes.fromhex(v["payload"])
    return HolepunchMessage(Mode(v["mode"]), v["id"], payload, addr(v["peerAddress"]))


def noise_payload(v: dict[str, Any]) -> NoisePayload:
    punch, udx, through = v["holepunch"], v["udx"], v["relayThrough"]
    return NoisePayload(
        v["version"],
        v["error"],
        v["firewall"],
        punch
        and HolepunchInfo(
            punch["id"],
            tuple(
                Relay(*addrs([relay["relayAddress"], relay["peerAddress"]]))
                for relay in punch["relays"]
            ),
        ),
        addrs(v["addresses4"]),
        tuple((str(a["host"]), a["port"]) for a in v["addresses6"]),
        udx and UdxInfo(udx["id"], udx["seq"], udx["reusableSocket"]),
        v["secretStream"] is not None,
        through
        and RelayThrough(bytes.fromhex(through["publicKey"]), bytes.fromhex(through["token"])),
        None if v["relayAddresses"] is None else addrs(v["relayAddresses"]),
    )


def holepunch_payload(v: dict[str, Any]) -> HolepunchPayload:
    return HolepunchPayload(
        v["error"],
        v["firewall"],
        v["round"],
        v["connected"],
        v["punching"],
        None if v["addresses"] is None else addrs(v["addresses"]),
        addr(v["remoteAddress"]),
        raw(v["token"]),
        raw(v["remoteToken"]),
    )


def peer(v: dict[str, Any]) -> PeerRecord:
    return PeerRecord(bytes.fromhex(v["publicKey"]), addrs(v["relayAddresses"]))


def announce(v: dict[str, Any]) -> Announce:
    return Announce(
        v["peer"] and peer(v["peer"]), raw(v["refresh"]), raw(v["signature"]), v["bump"]
    )


def mutable(v: dict[str, Any]) -> MutableValue:
    return MutableValue(v["seq"], bytes.fromhex(v["value"]), bytes.fromhex(v["signature"]))


def mutable_put(v: dict[str, Any]) -> MutablePut:
    return MutablePut(bytes.fromhex(v["publicKey"]), mutable(v))


LAYOUTS: dict[str, tuple[Callable[[dict[str, Any]], Any], Any]] = {
    "handshake": (handshake, HandshakeMessage),
    "holepunch": (holepunch, HolepunchMessage),
    "noisePayload": (noise_payload, NoisePayload),
    "holepunchPayload": (holepunch_payload, HolepunchPayload),
    "peer": (peer, PeerRecord),
    "announce": (announce, Announce),
    "mutablePutRequest": (mutable_put, MutablePut),
    "mutableGetResponse": (mutable, MutableValue),
}
FIXED = [vector for vector in VECTORS["messages"] if vector["type"] in LAYOUTS]


@pytest.mark.parametrize("vector", FIXED, ids=lambda v: f"{v['type']}-{v['note']}")
def test_layout(vector: dict[str, Any]) -> None:
    build, kind = LAYOUTS[vector["type"]]
    data = bytes.fromhex(vector["hex"])
    if vector["note"] == "ipv6" or vector["note"] == "every field":
        # The recorded text form of an IPv6 address is not the shortest one.
        assert kind.decode(data).encode() == data
        return
    value = build(vector["value"])
    assert value.encode() == data
    assert kind.decode(data) == value
    assert kind.decode(data + b"\x01\x02") == value


@pytest.mark.parametrize("vector", FIXED, ids=lambda v: f"{v['type']}-{v['note']}")
def test_every_truncation_is_a_decode_error(vector: dict[str, Any]) -> None:
    _, kind = LAYOUTS[vector["type"]]
    data = bytes.fromhex(vector["hex"])
    for size in range(len(data)):
        with pytest.raises(DecodeError):
            kind.decode(data[:size])


def test_all_recorded_layouts_are_covered() -> None:
    others = {v["type"] for v in VECTORS["messages"]} - set(LAYOUTS)
    assert others == {"peers", "lookupRawReply", "mutableSignable", "pluginRequest"}


def test_ipv6_addresses() -> None:
    vector = next(v for v in VECTORS["messages"] if v["note"] == "ipv6")
    assert NoisePayload.decode(bytes.fromhex(vector["hex"])).addresses6 == (("2001:db8::1", 4000),)


def test_lookup_reply() -> None:
    for vector in VECTORS["messages"]:
        if vector["type"] != "lookupRawReply":
            continue
        data = bytes.fromhex(vector["hex"])
        reply = LookupReply.decode(data)
        if vector["value"] is None:
            assert (len(reply.peers), reply.bump) == (1, 0)
            continue
        records = [bytes.fromhex(record) for record in vector["value"]["peers"]]
        assert messages.encode_lookup_reply(records, vector["value"]["bump"]) == data
        assert [record.encode() for record in reply.peers] == records
        assert reply.bump == vector["value"]["bump"]


def test_newer_version_decodes_to_version_only() -> None:
    vector = VECTORS["noisePayloadNewerVersion"]
    assert NoisePayload.decode(bytes.fromhex(vector["hex"])) == NoisePayload(version=2)


@pytest.mark.parametrize("vector", VECTORS["signatures"], ids=lambda v: v["kind"])
def test_signatures(vector: dict[str, Any]) -> None:
    pair = keys.KeyPair.from_seed(bytes([1]) * 32)
    if vector["kind"] == "mutable":
        value = bytes.fromhex(vector["value"])
        signable = messages.mutable_signable(vector["seq"], value)
        signed = MutableValue.signed(pair, vector["seq"], value)
        assert signed.signature.hex() == vector["signature"]
        assert signed.verify(pair.public_key)
        assert not MutableValue(signed.seq + 1, value, signed.signature).verify(pair.public_key)
    else:
        signable = messages.announce_signable(
            keys.NS_ANNOUNCE if vector["kind"] == "announce" else keys.NS_UNANNOUNCE,
            bytes.fromhex(vector["target"]),
            bytes.fromhex(vector["nodeId"]),
            bytes.fromhex(vector["token"]),
            peer(vector["peer"]).encode(),
            raw(vector["refresh"]) or b"",
        )
        assert pair.sign(signable).hex() == vector["signature"]
    assert signable.hex() == vector["signable"]


def test_sealed_holepunch_payload() -> None:
    vector = VECTORS["securePayload"]
    secret, sealed = bytes.fromhex(vector["secret"]), bytes.fromhex(vector["hex"])
    plain = noise.unseal(sealed, secret)
    assert plain is not None
    payload = HolepunchPayload.decode(plain)
    assert payload == holepunch_payload(vector["decoded"])
    assert noise.seal(payload.encode(), secret, bytes.fromhex(vector["nonce"])) == sealed
    assert noise.unseal(sealed[:-1] + bytes([sealed[-1] ^ 1]), secret) is None
    assert noise.unseal(sealed[:40], secret) is None


@pytest.mark.parametrize("vector", VECTORS["addressKey"], ids=lambda v: v["hex"][64:])
def test_binary_peer_address(vector: dict[str, Any]) -> None:
    decoded = vector["decoded"]
    nodes = addrs(decoded["nodes"] or [])
    data = bytes.fromhex(vector["hex"])
    assert messages.parse_address(data) == (bytes.fromhex(decoded["key"]), nodes)


@pytest.mark.parametrize("name", ["server", "client", "relay"])
def test_peer_address_text(name: str) -> None:
    key = VECTORS["keys"][name]
    expected = (bytes.fromhex(key["publicKey"]), ())
    assert messages.parse_address(key["publicKey"]) == expected
    assert messages.parse_address(key["z32"].upper()) == expected


@pytest.mark.parametrize("value", ["", "ab" * 31, "zz" * 32, "l" * 52, b"", bytes(31)])
def test_what_is_no_peer_address(value: str | bytes) -> None:
    with pytest.raises(InvalidInput):
        messages.parse_address(value)


COMMANDS: dict[str, Any] = {
    "PEER_HANDSHAKE": HandshakeMessage,
    "PEER_HOLEPUNCH": HolepunchMessage,
    "ANNOUNCE": Announce,
    "UNANNOUNCE": Announce,
    "MUTABLE_PUT": MutablePut,
}
REPLIES: dict[str, Any] = {
    "PEER_HANDSHAKE": HandshakeMessage,
    "PEER_HOLEPUNCH": HolepunchMessage,
    "FIND_PEER": PeerRecord,
    "MUTABLE_GET": MutableValue,
}


def captured_value(datagram: bytes) -> bytes:
    """The value of a request or response (spec: hyperdht 2.3, 2.4)."""
    reader = Reader(datagram)
    kind, flags = reader.u8(), reader.u8()
    reader.u16()
    reader.address()
    for flag in (1, 2):
        if flags & flag:
            reader.fixed(32)
    if kind == 0x03:
        reader.uint()
        if flags & 8:
            reader.fixed(32)
    else:
        if flags & 4:
            reader.array(Reader.address)
        if flags & 8:
            reader.uint()
    return reader.buffer() if flags & 16 else b""


def captured() -> list[tuple[Any, bytes, str]]:
    found = []
    for capture in VECTORS["captures"]:
        for datagram in capture["datagrams"]:
            decoded = datagram["decoded"]
            kinds = {"request": COMMANDS, "response": REPLIES}.get(decoded.get("kind"), {})
            kind = kinds.get(decoded.get("name"))
            value = captured_value(bytes.fromhex(datagram["hex"])) if kind else b""
            if value:
                found.append((kind, value, capture["name"]))
    return found


def test_captured_values_survive_a_round_trip() -> None:
    values = captured()
    assert len(values) > 100
    for kind, value, name in values:
        assert kind.decode(value).encode() == value, name


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.binary(max_size=300))
def test_every_decoder_survives_arbitrary_bytes(data: bytes) -> None:
    for _, kind in LAYOUTS.values():
        try:
            value = kind.decode(data)
        except DecodeError:
            continue
        assert kind.decode(value.encode()) == value
    for parse in (LookupReply.decode, messages.parse_address):
        try:
            parse(data)
        except (DecodeError, InvalidInput):
            continue


ADDRESSES = st.tuples(
    st.integers(0, 2**32 - 1).map(lambda n: ".".join(str(b) for b in n.to_bytes(4, "big"))),
    st.integers(0, 65535),
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.builds(
        NoisePayload,
        error=st.integers(0, 300),
        firewall=st.integers(0, 3),
        holepunch=st.none()
        | st.builds(
            HolepunchInfo,
            st.integers(0, 2**53 - 1),
            st.lists(st.builds(Relay, ADDRESSES, ADDRESSES), max_size=4).map(tuple),
        ),
        addresses4=st.lists(ADDRESSES, max_size=4).map(tuple),
        udx=st.none() | st.builds(UdxInfo, st.integers(0, 2**32 - 1), st.just(0), st.booleans()),
        secret_stream=st.booleans(),
        relay_addresses=st.none() | st.lists(ADDRESSES, max_size=3).map(tuple),
    )
)
def test_noise_payload_round_trip(payload: NoisePayload) -> None:
    assert NoisePayload.decode(payload.encode()) == payload
