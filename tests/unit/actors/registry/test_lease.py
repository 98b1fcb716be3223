from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hyperseaport.actors.registry import lease, roles
from hyperseaport.actors.registry.lease import Lease, Refused, Verifier
from hyperseaport.transport.errors import InvalidInput
from hyperseaport.transport.keys import KeyPair, verify

KEYS = KeyPair.from_seed(b"\x01" * 32)
OTHER = KeyPair.from_seed(b"\x02" * 32)
INSTANCE = "0123456789abcdef" * 2
META = roles.parse("couchdb@3.2.2")
#: Unix seconds.
NOW = 1_790_000_000.0


def signed(meta: Any = META, **changes: Any) -> Lease:
    values: dict[str, Any] = {
        "instance": INSTANCE,
        "sequence": 7,
        "issued": int(NOW * 1000),
        "ttl": 30.0,
    }
    return lease.sign(KEYS, meta, **(values | changes))


def statement(**changes: Any) -> str:
    """The text of a statement with other members, or without those that are None."""
    members = json.loads(signed().text) | changes
    return json.dumps({name: value for name, value in members.items() if value is not None})


def signature(text: str, keys: KeyPair = KEYS) -> str:
    return keys.sign(lease.PREFIX + text.encode("utf-8", "surrogatepass")).hex()


def test_a_statement_is_what_the_protocol_says() -> None:
    made = signed()
    assert made.text == (
        '{"v":1,"key":"' + KEYS.public_key.hex() + '","meta":{"role":"couchdb","version":"3.2.2",'
        '"_tags":{},"tags":[],"hash":"couchdb|3.2.2|"},"instance":"' + INSTANCE + '","sequence":7,'
        '"issued":1790000000000,"ttl":30}'
    )
    message = b"hyperseaport lease 1\n" + made.text.encode()
    assert verify(made.signature, message, KEYS.public_key)
    assert made.expires == NOW + 30
    assert not made.withdrawal


def test_round_trip() -> None:
    meta = META | {"metadata": {"region": "eu-west", "snow": "\u2603", "half": 0.5}}
    made = signed(meta, ttl=2.5)
    got = Verifier().verify(made.text, made.signature.hex())
    assert got == made
    assert (got.key, got.meta, got.instance, got.sequence) == (KEYS.public_key, meta, INSTANCE, 7)
    assert (got.issued, got.ttl) == (int(NOW * 1000), 2.5)
    assert got.meta_size == len(lease.encode(meta).encode())


def test_any_spelling_of_the_json_is_verified_as_it_stands() -> None:
    text = json.dumps(json.loads(statement()) | {"more": 1}, indent=1, sort_keys=True)
    assert Verifier().verify(text, signature(text).upper()).sequence == 7


def test_a_ttl_of_nothing_withdraws() -> None:
    assert signed(ttl=0).withdrawal
    assert '"ttl":0}' in signed(ttl=0.0).text


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text, signature: (text.replace('"sequence":7', '"sequence":8'), signature),
        lambda text, signature: (text + " ", signature),
        lambda text, signature: (text.replace("couchdb", "redis"), signature),
        lambda text, signature: (
            text.replace(KEYS.public_key.hex(), OTHER.public_key.hex()),
            signature,
        ),
        lambda text, signature: (text, OTHER.sign(lease.PREFIX + text.encode()).hex()),
        lambda text, signature: (text, KEYS.sign(text.encode()).hex()),
        lambda text, signature: (text, "00" * 64),
        lambda text, signature: (text.replace(KEYS.public_key.hex(), "00" * 32), signature),
    ],
)
def test_forged(spoil: Any) -> None:
    made = signed()
    verifier = Verifier()
    verifier.verify(made.text, made.signature.hex())
    with pytest.raises(Refused, match="not signed by the key") as caught:
        verifier.verify(*spoil(made.text, made.signature.hex()))
    assert caught.value.kind == "forged"
    assert len(verifier) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "needs a statement"),
        ({}, "needs a statement"),
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not an object"),
        ('{"v":1,"sequence":NaN}', "not JSON"),
        ('{"v":1,"meta":{"x":1e999}}', "not JSON"),
        ('{"v":1,"meta":' + "[" * 5000, "not JSON"),
        ('{"v":1,"meta":"' + "9" * 10 + "\ud800" + '"}', "UTF-8"),
        (statement(v=2), "has version 2"),
        (statement(v="1"), "with a version"),
        (statement(v=True), "with a version"),
        (statement(meta=None), "needs a meta"),
        (statement(meta=[]), "needs a meta"),
        (statement(meta={"role": 5}), "needs a role"),
        (statement(meta={"role": "a"}), "valid semver"),
        (statement(meta={"role": "a", "version": "1.x"}), "valid semver"),
        (statement(key=None), "key must be"),
        (statement(key="ab"), "key must be"),
        (statement(key=KEYS.public_key.hex().upper()), "key must be"),
        (statement(key=KEYS.public_key.hex() + "\n"), "key must be"),
        (statement(instance=None), "instance must be"),
        (statement(instance="x" * 32), "instance must be"),
        (statement(instance=1), "instance must be"),
        (statement(sequence=None), "sequence must be"),
        (statement(sequence=-1), "sequence must be"),
        (statement(sequence=1.5), "sequence must be"),
        (statement(sequence=True), "sequence must be"),
        (statement(sequence=2**53), "sequence must be"),
        (statement(sequence="7"), "sequence must be"),
        (statement(issued=None), "issued must be"),
        (statement(issued=-1), "issued must be"),
        (statement(ttl=None), "ttl must be"),
        (statement(ttl=-1), "ttl must be"),
        (statement(ttl=True), "ttl must be"),
        (statement(ttl="30"), "ttl must be"),
        (statement(ttl=3600.5), "ttl must be"),
        (statement(ttl=10**400), "ttl must be"),
    ],
)
def test_malformed(text: Any, says: str) -> None:
    with pytest.raises(Refused, match=says) as caught:
        Verifier().verify(text, signature(text) if isinstance(text, str) else "00" * 64)
    assert caught.value.kind == "malformed"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [None, 1, "", "00" * 63, "00" * 65, "g" * 128, " " + "0" * 127])
def test_malformed_signatures(bad: Any) -> None:
    with pytest.raises(Refused, match="128 hexadecimal digits") as caught:
        Verifier().verify(signed().text, bad)
    assert caught.value.kind == "malformed"


def nested(depth: int) -> Any:
    return [] if depth == 1 else [nested(depth - 1)]


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        (META | {"metadata": "x" * lease.MAX_STATEMENT}, "at most 66560"),
        (META | {"metadata": ["\u2603" * 22_200]}, "at most 66560"),
        (META | {"role": "x" * 1025}, "at most 1024"),
        (META | {"metadata": nested(lease.MAX_NESTING)}, "at most 32 deep"),
        (META | {"metadata": "x" * (lease.MAX_META - 50)}, "at most 65536"),
        # Written short, meant long.
        (META | {"metadata": [1e9] * 10_000}, "at most 65536"),
    ],
)
def test_oversized(meta: Any, says: str) -> None:
    text = statement(meta=meta).replace("1000000000.0", "1e9").replace(": ", ":").replace(", ", ",")
    text = text.encode().decode("unicode_escape") if "\\u2603" in text else text
    with pytest.raises(Refused, match=says) as caught:
        Verifier().verify(text, signature(text))
    assert caught.value.kind == "oversized"
    with pytest.raises(InvalidInput, match="cannot be leased"):
        signed(meta)


def test_the_largest() -> None:
    room = lease.MAX_META - lease.json_size(META | {"metadata": ""})
    made = signed(META | {"metadata": "x" * room})
    assert made.meta_size == lease.MAX_META
    deep = signed(META | {"metadata": nested(lease.MAX_NESTING - 1)})
    assert Verifier().verify(deep.text, deep.signature.hex()) == deep


def test_the_size_is_that_in_a_line_of_json() -> None:
    meta = META | {"metadata": 'quote " backslash \\ newline \n tab \t nul \0 \u2603 \U0001f600'}
    made = signed(meta)
    assert made.size == len(lease.encode(made.text).encode()) - 2
    text = json.dumps(json.loads(made.text), indent="\t")
    assert lease.parse(text, signature(text)).size == len(lease.encode(text).encode()) - 2


@pytest.mark.parametrize(
    ("offset", "kind"),
    [(0, None), (600, None), (-600, None), (601, "expired"), (-601, "expired")],
)
def test_the_time_of_issue(offset: int, kind: str | None) -> None:
    made = signed()
    if kind is None:
        lease.check_time(made, NOW + offset)
        return
    with pytest.raises(Refused, match="601 s") as caught:
        lease.check_time(made, NOW + offset)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "bad",
    [
        {"instance": "short"},
        {"sequence": -1},
        {"issued": -5},
        {"ttl": 3601.0},
        {"meta": {"role": "a", "version": "1.x"}},
        {"meta": META | {"metadata": {1, 2}}},
        {"meta": META | {"metadata": float("nan")}},
    ],
)
def test_nobody_signs_what_is_not_taken(bad: Any) -> None:
    with pytest.raises(InvalidInput, match="cannot be leased"):
        signed(**bad)


def test_sequences_grow() -> None:
    assert lease.next_sequence(0, 5.5) == 5500
    assert lease.next_sequence(5500, 5.5) == 5501
    assert lease.next_sequence(9000, 5.5) == 9001


def test_a_verified_signature_is_remembered_and_the_memory_is_bounded(monkeypatch: Any) -> None:
    calls: list[bytes] = []

    def counting(signature: bytes, message: bytes, key: bytes) -> bool:
        calls.append(key)
        return verify(signature, message, key)

    monkeypatch.setattr(lease, "verify", counting)
    verifier = Verifier(capacity=2)
    made = [signed(sequence=number) for number in range(3)]
    for number in (0, 1, 0, 2, 0):
        assert verifier.verify(made[number].text, made[number].signature.hex()) == made[number]
    assert len(calls) == 3
    assert len(verifier) == 2
    verifier.verify(made[1].text, made[1].signature.hex())  # was the oldest, and is forgotten
    assert len(calls) == 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin1")) | JSON, JSON)
@example("{}", "0" * 128)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_survives_anything(text: Any, signature: Any) -> None:
    verifier = Verifier()
    for each in (signature, "0" * 128):
        with pytest.raises(Refused):
            verifier.verify(text, each)
    assert len(verifier) == 0


@given(
    st.sampled_from(["v", "key", "meta", "instance", "sequence", "issued", "ttl"]),
    JSON,
)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_signed_statement_with_anything_in_it_is_refused_or_sound(name: str, value: Any) -> None:
    text = json.dumps(json.loads(signed().text) | {name: value})
    try:
        got = Verifier().verify(text, signature(text))
    except Refused:
        return
    assert 0 <= got.ttl <= lease.MAX_TTL
    assert got.sequence >= 0
    assert got.issued >= 0
    lease.encode(got.meta)


@given(st.integers(0, 5000), st.integers(0, 7))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_every_flipped_bit_is_found(position: int, bit: int) -> None:
    made = signed()
    raw = bytearray(made.text.encode() + made.signature)
    position %= len(raw)
    raw[position] ^= 1 << bit
    text = raw[:-64].decode("latin1")
    with pytest.raises(Refused):
        Verifier().verify(text, raw[-64:].hex())
