from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.transport.errors import Closed, InvalidInput, LocalError, ProtocolError
from hyperseaport.transport.rpc import (
    ABSENT,
    MAX_IN_FLIGHT,
    MAX_LINE,
    MAX_NESTING,
    RpcFailure,
    RpcPeer,
    RpcRequest,
    RpcResponse,
)

VECTORS = load("rpc")
UNKNOWN = "Unknown method"


def answer(peer: RpcPeer, request: RpcRequest) -> bytes:
    """What the recording's handlers answer."""
    match request.method:
        case "echo" | "slow":
            return peer.reply(request, request.params)
        case "undef":
            return peer.reply(request)
        case "nul":
            return peer.reply(request, None)
        case "boom":
            return peer.fail(request, "boom")
        case _:
            return peer.fail(request, UNKNOWN)


def only(events: list[Any]) -> Any:
    assert len(events) == 1
    return events[0]


def ask(line: bytes) -> RpcRequest:
    request = only(RpcPeer().receive(line))
    assert isinstance(request, RpcRequest)
    return request


def failure(events: list[Any]) -> ProtocolError:
    assert isinstance(events[-1], RpcFailure)
    assert not any(isinstance(event, RpcFailure) for event in events[:-1])
    return events[-1].error


# Recordings


def test_recorded_requests() -> None:
    peer = RpcPeer()
    calls: list[Any] = [
        ("query", {"role": "a", "version": "1.x"}),
        ("getRegistryKey", ABSENT),
        ("x", None),
        None,
        ("ü", {"a": "line\nbreak \u2028 \U0001f600"}),
    ]
    for call, row in zip(calls, VECTORS["requests"], strict=True):
        if call is None:
            assert peer.notify("hello", "world").decode() == row["bytes"]
            continue
        identifier, line = peer.request(*call)
        assert line.decode() == row["bytes"]
        assert identifier == json.loads(line)["id"]
    assert peer.in_flight == {1, 2, 3, 4}


#: Defects of the recorded program that are not copied: a thrown text is lost, and an error without
#: text is taken for success.
COPIED = [
    row
    for row in VECTORS["responses"]
    if json.loads(row["receive"])["method"] not in ("boomstr", "empty")
]


@pytest.mark.parametrize("row", COPIED, ids=[row["receive"].strip() for row in COPIED])
def test_recorded_response(row: dict[str, Any]) -> None:
    peer = RpcPeer()
    request = only(peer.receive(row["receive"].encode()))
    if row["handler_called_with"] is not None:
        method, params = row["handler_called_with"]
        assert request.method == method
        assert request.params == (ABSENT if params == "undefined" else params)
    assert answer(peer, request).decode() == row["send"]
    assert request.wants_reply == bool(row["send"])


@pytest.mark.parametrize("cut", [None, 1], ids=["as recorded", "byte by byte"])
@pytest.mark.parametrize("row", VECTORS["parsing"], ids=[row["name"] for row in VECTORS["parsing"]])
def test_recorded_parsing(row: dict[str, Any], cut: int | None) -> None:
    peer = RpcPeer()
    chunks = [bytes.fromhex(item) for item in row["receive_hex"] if item != "END"]
    if cut is not None:
        chunks = [bytes((byte,)) for chunk in chunks for byte in chunk]
    events = [event for chunk in chunks for event in peer.receive(chunk)]
    if row["stream_destroyed"]:
        assert str(failure(events)) == "line is not JSON"
        return
    replies = [answer(peer, event) for event in events if isinstance(event, RpcRequest)]
    assert sorted(replies) == sorted(row["send"].encode().splitlines(keepends=True))


@pytest.mark.parametrize("row", VECTORS["client"], ids=[row["name"] for row in VECTORS["client"]])
def test_recorded_client(row: dict[str, Any]) -> None:
    peer = RpcPeer()
    if "request" in row:
        peer.close()
        with pytest.raises(Closed):
            peer.request("x")
        return
    identifier, _ = peer.request("x")
    outcome = row["request_1"]
    if "receive" not in row:
        assert peer.close() == {identifier}
        assert peer.in_flight == set()
        return
    events = peer.receive(row["receive"].encode())
    replies = [answer(peer, event) for event in events if isinstance(event, RpcRequest)]
    assert b"".join(replies).decode() == row["send"]
    responses = [event for event in events if isinstance(event, RpcResponse)]
    if outcome == "pending":
        assert responses == []
        assert peer.in_flight == {identifier}
        return
    response = only(responses)
    assert response.id == identifier
    assert peer.in_flight == set()
    if "resolved" in outcome:
        resolved = outcome["resolved"]
        assert response.error is None
        assert response.result == (ABSENT if resolved == "undefined" else resolved)
    elif row["name"] == "error object":
        assert response.error == '{"code":1,"message":"m"}'
    else:
        assert response.error == outcome["rejected"]


# Texts


def test_failure_without_text_gets_one() -> None:
    peer = RpcPeer()
    request = ask(b'{"method":"empty","id":13}\n')
    assert peer.fail(request, "") == b'{"result":null,"error":"request failed","id":13}\n'


@pytest.mark.parametrize("identifier", ["0", "-0", "0.0", '""', "null", "false"])
def test_false_ids_want_no_reply(identifier: str) -> None:
    request = ask(f'{{"method":"echo","params":1,"id":{identifier}}}\n'.encode())
    assert not request.wants_reply
    assert RpcPeer().reply(request, 1) == b""
    assert RpcPeer().fail(request, "no") == b""


@pytest.mark.parametrize(
    "identifier",
    ["1", "-1.5", '"x"', "[]", "{}", "[0]", "true", '{"b":1,"a":[null]}', '" "', '"\\u0001\\n"'],
)
def test_true_ids_are_echoed(identifier: str) -> None:
    request = ask(f'{{"method":"echo","id":{identifier}}}\n'.encode())
    assert RpcPeer().reply(request).decode() == f'{{"error":null,"id":{identifier}}}\n'


@pytest.mark.parametrize(
    ("written", "echoed"),
    [
        ("1.0", "1"),
        ("1e3", "1000"),
        ("-2.50", "-2.5"),
        ("9007199254740991", "9007199254740991"),
        ("9007199254740993", "9007199254740992"),
        ("12345678901234567890", "12345678901234567000"),
        ("1e20", "100000000000000000000"),
        ("1e21", "1e+21"),
        ("1.5e300", "1.5e+300"),
        ("-1" + "0" * 5000, "null"),
        ("1e999", "null"),
    ],
    ids=lambda text: text[:24],
)
def test_numbers_print_as_in_javascript(written: str, echoed: str) -> None:
    request = ask(f'{{"method":"echo","params":{written},"id":1}}\n'.encode())
    line = RpcPeer().reply(request, request.params)
    assert line.decode() == f'{{"result":{echoed},"error":null,"id":1}}\n'


def test_lone_surrogates_are_escaped() -> None:
    request = ask(b'{"method":"echo","params":"a\\ud800b","id":1}\n')
    line = RpcPeer().reply(request, request.params)
    assert line == b'{"result":"a\\ud800b","error":null,"id":1}\n'
    assert ask(b'{"method":"x","params":"\\ud83d\\ude00"}\n').params == "\U0001f600"


def test_invalid_utf8_is_replaced() -> None:
    assert ask(b'{"method":"x","params":"a\xff\xc3"}\n').params == "a\ufffd\ufffd"


def test_method_that_is_no_text_names_none() -> None:
    assert ask(b'{"method":["echo"],"id":1}\n').method == '["echo"]'
    assert ask(b'{"method":{},"id":1}\n').method == "{}"


@pytest.mark.parametrize("method", ["null", '""', "0", "false"])
def test_false_method_is_a_response(method: str) -> None:
    peer = RpcPeer()
    identifier, _ = peer.request("x")
    line = f'{{"method":{method},"result":5,"id":{identifier}}}\n'.encode()
    assert peer.receive(line) == [RpcResponse(identifier, 5, None)]


@pytest.mark.parametrize("value", [object(), math.nan, math.inf, {1, 2}, b"bytes"])
def test_values_without_json_text(value: object) -> None:
    peer = RpcPeer()
    with pytest.raises(InvalidInput, match="no JSON text"):
        peer.request("x", {"value": value})
    assert peer.in_flight == set()
    assert peer.request("x")[0] == 1


# Responses


def test_ids_count_up_and_responses_come_in_any_order() -> None:
    peer = RpcPeer()
    assert [peer.request("x")[0] for _ in range(3)] == [1, 2, 3]
    lines = b'{"result":"b","error":null,"id":2}\n{"result":"a","error":null,"id":1}\n'
    assert peer.receive(lines) == [RpcResponse(2, "b", None), RpcResponse(1, "a", None)]
    assert peer.in_flight == {3}


def test_response_counts_once() -> None:
    peer = RpcPeer()
    peer.request("x")
    line = b'{"result":1,"error":null,"id":1}\n'
    assert len(peer.receive(line)) == 1
    assert peer.receive(line) == []


@pytest.mark.parametrize("identifier", ['"1"', "true", "1.5", "[1]", "{}", "null", "2"])
def test_ids_that_match_nothing(identifier: str) -> None:
    peer = RpcPeer()
    peer.request("x")
    assert peer.receive(f'{{"result":1,"id":{identifier}}}\n{{"result":1}}\n'.encode()) == []
    assert peer.in_flight == {1}


def test_number_forms_of_an_id_are_one() -> None:
    peer = RpcPeer()
    peer.request("x")
    assert only(peer.receive(b'{"id":1.0}\n')) == RpcResponse(1, ABSENT, None)


def test_forgotten_request() -> None:
    peer = RpcPeer()
    identifier, _ = peer.request("x")
    peer.forget(identifier)
    assert peer.receive(b'{"result":1,"error":null,"id":1}\n') == []
    peer.forget(identifier)
    assert peer.request("x")[0] == 2


def test_requests_in_flight_are_bounded() -> None:
    peer = RpcPeer()
    for _ in range(MAX_IN_FLIGHT):
        peer.request("x")
    with pytest.raises(LocalError, match="await responses"):
        peer.request("x")
    assert len(peer.in_flight) == MAX_IN_FLIGHT
    peer.forget(7)
    assert peer.request("x")[0] == MAX_IN_FLIGHT + 1


def test_after_the_close() -> None:
    peer = RpcPeer()
    peer.request("x")
    assert peer.close() == {1}
    assert peer.close() == set()
    with pytest.raises(Closed):
        peer.notify("x")
    assert peer.receive(b'{"result":1,"error":null,"id":1}\n') == []


# Lines


def test_last_line_without_an_end_stays() -> None:
    peer = RpcPeer()
    assert peer.receive(b'{"method":"x"}\r') == []
    assert only(peer.receive(b"\n")) == RpcRequest("x", ABSENT, None)


def test_events_before_a_failure_come_first() -> None:
    peer = RpcPeer()
    events = peer.receive(b'{"method":"x"}\nbad\n{"method":"y"}\n')
    assert events[0] == RpcRequest("x", ABSENT, None)
    assert isinstance(failure(events), ProtocolError)
    assert len(events) == 2
    assert peer.receive(b'{"method":"z"}\n') == []


@pytest.mark.parametrize(
    "line",
    [
        b"NaN",
        b"Infinity",
        b'{"id":-Infinity}',
        b"{'a':1}",
        b"[1,]",
        b'"a\x01b"',
        b"\xef\xbb\xbf{}",
        b"1 2",
        b"\xff",
        b"\xc2\xa0",
        b"[" * 50_000,
        b'{"a":' * 50_000,
    ],
    ids=lambda line: repr(line[:20]),
)
def test_lines_that_are_not_json(line: bytes) -> None:
    assert str(failure(RpcPeer().receive(line + b"\n"))) == "line is not JSON"


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_nesting_is_bounded(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"
    inner = MAX_NESTING - 1

    def line(depth: int) -> bytes:
        return b'{"method":"x","params":' + opening * depth + b"1" + closing * depth + b"}\n"

    request = ask(line(inner))
    assert request.method == "x"
    events = RpcPeer().receive(line(inner + 1))
    assert str(failure(events)) == f"line nests deeper than {MAX_NESTING}"


def test_many_flat_values_are_no_nesting() -> None:
    many: list[dict[str, list[int]]] = [{"a": []} for _ in range(1000)]
    line = json.dumps({"method": "x", "params": many}).encode() + b"\n"
    assert ask(line).params == many


def test_longest_line() -> None:
    frame = len('{"method":"x","params":""}')
    line = b'{"method":"x","params":"' + b"a" * (MAX_LINE - frame) + b'"}\n'
    assert len(line) == MAX_LINE + 1
    assert len(ask(line).params) == MAX_LINE - frame  # type: ignore[arg-type]
    longer = b" " + line
    assert str(failure(RpcPeer().receive(longer))) == (
        f"line of {MAX_LINE + 1} bytes, more than {MAX_LINE}"
    )


def test_line_without_end_is_bounded() -> None:
    peer = RpcPeer()
    assert peer.receive(b"a" * MAX_LINE) == []
    assert str(failure(peer.receive(b"a"))) == f"line of more than {MAX_LINE} bytes"
    assert not peer._line


def test_own_lines_are_bounded() -> None:
    peer = RpcPeer()
    with pytest.raises(InvalidInput, match=f"at most {MAX_LINE} bytes"):
        peer.request("x", "a" * MAX_LINE)
    assert peer.in_flight == set()
    request = ask(b'{"method":"x","id":1}\n')
    with pytest.raises(InvalidInput, match=f"at most {MAX_LINE} bytes"):
        peer.reply(request, "a" * MAX_LINE)


def test_absent_has_a_readable_repr() -> None:
    assert repr(RpcResponse(1, ABSENT, None)) == "RpcResponse(id=1, result=ABSENT, error=None)"


# Arbitrary input

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: not x.is_integer())
    | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
examples = settings(deadline=None, derandomize=True)


@examples
@given(st.lists(st.binary(max_size=60), max_size=5))
def test_arbitrary_bytes(chunks: list[bytes]) -> None:
    peer = RpcPeer()
    peer.request("x")
    events = [event for chunk in chunks for event in peer.receive(chunk)]
    assert not any(isinstance(event, RpcFailure) for event in events[:-1])


@examples
@given(
    st.dictionaries(
        st.sampled_from(["method", "params", "id", "result", "error", "other"]),
        json_values | st.sampled_from([0, 1, "1", "x", 1.0, True]),
    )
    | json_values
)
def test_arbitrary_json(value: object) -> None:
    peer = RpcPeer()
    peer.request("x")
    for event in peer.receive(json.dumps(value).encode() + b"\n"):
        assert isinstance(event, (RpcRequest, RpcResponse))
        if isinstance(event, RpcRequest):
            reply = peer.reply(event, event.params)
            assert bool(reply) == event.wants_reply


@examples
@given(json_values, st.integers(1, 40))
def test_both_ends_agree_in_any_fragmentation(params: object, size: int) -> None:
    here, there = RpcPeer(), RpcPeer()
    identifier, line = here.request("echo", params)
    pieces = [line[at : at + size] for at in range(0, len(line), size)]
    request = only([event for piece in pieces for event in there.receive(piece)])
    assert request == RpcRequest("echo", params, identifier)
    reply = there.reply(request, request.params)
    pieces = [reply[at : at + size] for at in range(0, len(reply), size)]
    response = only([event for piece in pieces for event in here.receive(piece)])
    assert response == RpcResponse(identifier, params, None)
