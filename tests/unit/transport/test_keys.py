from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.transport import keys
from hyperseaport.transport.errors import InvalidInput

PAIRS = load("noise")["key_pairs"]


@pytest.mark.parametrize("row", PAIRS, ids=[row["name"] for row in PAIRS])
def test_pair_of_a_seed(row: dict[str, str]) -> None:
    pair = keys.KeyPair.from_seed(bytes.fromhex(row["seed"]))
    assert pair.public_key.hex() == row["public_key"] == str(pair)
    assert pair.secret_key.hex() == row["secret_key"]
    assert keys.target(pair.public_key).hex() == row["dht_target"]


@pytest.mark.parametrize("protocol", ["hyperswarm/dht", "hyperswarm/secret-stream"])
def test_namespaces(protocol: str) -> None:
    row = load("noise")["namespaces"][protocol]
    assert keys.blake2b(protocol.encode()).hex() == row["name_hash"]
    for name, value in row["values"].items():
        assert keys.namespace(protocol.encode(), value["id"]).hex() == value["value"]
        assert getattr(keys, f"NS_{name}").hex() == value["value"]


def test_blake2b_hashes_its_parts_in_a_row() -> None:
    assert keys.blake2b(b"ab", b"c", key=b"k") == keys.blake2b(b"abc", key=b"k")
    assert keys.blake2b(b"abc") != keys.blake2b(b"abc", key=b"k")


@pytest.mark.parametrize("row", load("hyperdht")["signatures"], ids=lambda row: row["kind"])
def test_recorded_signatures(row: dict[str, str]) -> None:
    server = load("hyperdht")["keys"]["server"]
    pair = keys.KeyPair.from_seed(bytes.fromhex(server["seed"]))
    signable = bytes.fromhex(row["signable"])
    assert pair.sign(signable).hex() == row["signature"]
    assert keys.verify(bytes.fromhex(row["signature"]), signable, pair.public_key)


def test_verify_says_no_to_everything_else() -> None:
    pair = keys.KeyPair.from_seed(bytes(32))
    other = keys.KeyPair.from_seed(b"\x01" * 32)
    signature = pair.sign(b"message")
    assert keys.verify(signature, b"message", pair.public_key)
    assert not keys.verify(signature, b"messagf", pair.public_key)
    assert not keys.verify(signature, b"message", other.public_key)
    assert not keys.verify(bytes(64), b"message", pair.public_key)
    assert not keys.verify(b"", b"", pair.public_key)
    assert not keys.verify(signature, b"message", b"short")


def test_generated_pairs_differ() -> None:
    assert keys.KeyPair.generate() != keys.KeyPair.generate()


def test_seed_is_not_in_the_repr() -> None:
    pair = keys.KeyPair.from_seed(b"\x5a" * 32)
    assert "5a5a" not in repr(pair)
    assert "ZZ" not in repr(pair)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_seed_of_a_wrong_size(size: int) -> None:
    with pytest.raises(InvalidInput, match=f"32 bytes, not {size}"):
        keys.KeyPair.from_seed(bytes(size))


def test_parse_key() -> None:
    assert keys.parse_key(" " + "Ab" * 32 + "\n") == b"\xab" * 32


@pytest.mark.parametrize("text", ["", "ab", "0" * 63, "0" * 65, "g" * 64, "é" * 64])
def test_parse_key_says_what_is_wrong(text: str) -> None:
    with pytest.raises(InvalidInput, match="hexadecimal digits"):
        keys.parse_key(text)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.binary(min_size=32, max_size=32), st.binary(max_size=200))
def test_sign_and_verify(seed: bytes, message: bytes) -> None:
    pair = keys.KeyPair.from_seed(seed)
    signature = pair.sign(message)
    assert len(signature) == 64
    assert keys.verify(signature, message, pair.public_key)
    assert not keys.verify(signature, message + b"x", pair.public_key)


def test_parse_key_counts_digits_not_characters() -> None:
    with pytest.raises(InvalidInput, match="hexadecimal digits"):
        keys.parse_key("ab" + " " * 30 + "cd" * 16)


def test_a_signature_has_exactly_64_bytes() -> None:
    pair = keys.KeyPair.from_seed(bytes(32))
    signature = pair.sign(b"prefixmessage")
    assert not keys.verify(signature + b"prefix", b"message", pair.public_key)
