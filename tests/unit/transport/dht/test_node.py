"""What a node answers, and what it makes of what it hears."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import load

from hyperseaport.transport.dht import wire
from hyperseaport.transport.dht.addresses import node_id
from hyperseaport.transport.dht.bookkeeping import HINTS_PER_TICK, TICK
from hyperseaport.transport.dht.internal import MAX_DELAYED
from hyperseaport.transport.dht.network_state import Health
from hyperseaport.transport.dht.node import Node, NodeConfig
from hyperseaport.transport.dht.table import Contact, K
from hyperseaport.transport.dht.wire import Reply, Request
from hyperseaport.transport.encoding import encode_address
from hyperseaport.transport.transmit import CLIENT_SOCKET, SERVER_SOCKET, Address, Transmit

VECTORS = load("hyperdht")
HERE = ("127.0.0.1", 40001)
ASKER = ("127.0.0.1", 40777)
TARGET = bytes.fromhex("c5e21ab1c9f6022d81c3b25e3436cb7f1df77f9652ae3e1310c28e621dd87b4c")


def started(rng: Random | None = None, **config: Any) -> Node:
    """A persistent node of a private network, by default past its reluctance to be pinged."""
    options: dict[str, Any] = {"public_address": HERE, "ignore_idless_pings": 0.0} | config
    node = Node(NodeConfig(**options), rng or Random(1))
    node.start(0.0, server_port=HERE[1], client_port=50001)
    node.on_deadline(0.0)
    return node


def ask(
    node: Node,
    command: int,
    now: float = 0.0,
    *,
    source: Address = ASKER,
    socket: int = SERVER_SOCKET,
    internal: bool = True,
    with_id: bool = False,
    **fields: Any,
) -> list[Transmit]:
    """Let a request arrive; what the node sends then."""
    datagram = wire.encode_request(
        77, HERE, command, internal=internal, id=node_id(source) if with_id else None, **fields
    )
    node.receive(datagram, socket, source, now)
    return node.transmits(now)


def parse(transmit: Transmit, source: Address = HERE) -> Reply:
    return wire.decode_response(b"".join(transmit.buffers), transmit.socket, source)


def requests(transmits: list[Transmit]) -> list[Request]:
    found = []
    for transmit in transmits:
        datagram = b"".join(transmit.buffers)
        if datagram[0] == wire.REQUEST:
            found.append(wire.decode_request(datagram, transmit.socket, HERE))
    return found


def advance(node: Node, now: float) -> list[Transmit]:
    """Let time pass; what the node sends meanwhile."""
    sent = []
    while (deadline := node.deadline()) is not None and deadline <= now:
        node.on_deadline(deadline)
        sent += node.transmits(deadline)
    return sent


def introduce(node: Node, *addresses: Address, now: float = 0.0) -> None:
    """Put nodes into the table, as their own requests would."""
    for address in addresses:
        ask(node, wire.PING, now, source=address, with_id=True)


class Constant(Random):
    """Randomness whose bytes are those of the vectors' current token secret."""

    def randbytes(self, n: int) -> bytes:
        return b"\x22" * n


def test_a_node_with_a_known_address_is_somebody_from_the_first_moment() -> None:
    node = started()
    assert node.ready
    assert (node.firewalled, node.ephemeral) == (False, False)
    assert node.current_socket == SERVER_SOCKET
    assert node.id == node_id(HERE)
    assert node.remote_address() == HERE


def test_port_zero_of_the_known_address_means_the_bound_one() -> None:
    assert started(public_address=("127.0.0.1", 0)).id == node_id(HERE)


def test_a_new_node_is_nobody() -> None:
    node = started(public_address=None)
    assert (node.firewalled, node.ephemeral) == (True, True)
    assert node.current_socket == CLIENT_SOCKET
    assert node.remote_address() is None


@pytest.mark.parametrize("vector", VECTORS["requests"], ids=lambda v: v["note"])
def test_requests_as_recorded(vector: dict[str, Any]) -> None:
    node = started(ephemeral=True if vector["senderEphemeral"] else None)
    node._engine._tid = vector["tid"]

    def data(name: str) -> bytes | None:
        return None if vector[name] is None else bytes.fromhex(vector[name])

    node.request(
        (vector["to"]["host"], vector["to"]["port"]),
        vector["command"],
        0.0,
        internal=vector["internal"],
        target=data("target"),
        token=data("token"),
        value=data("value"),
        socket={"server": SERVER_SOCKET, "client": CLIENT_SOCKET}[vector["senderSocket"]],
        on_done=lambda reply, now: None,
    )
    (transmit,) = node.transmits(0.0)
    assert b"".join(transmit.buffers).hex() == vector["hex"]


@pytest.mark.parametrize("vector", VECTORS["responses"], ids=lambda v: v["note"])
def test_responses_as_recorded(vector: dict[str, Any]) -> None:
    node = started(Constant(1), ephemeral=True if vector["responderEphemeral"] else None)
    for entry in vector["closerNodes"]:
        address = entry["host"], entry["port"]
        node.table.add(Contact(node_id(address), address, 1))
    target = vector["requestTarget"]
    socket = {"server": SERVER_SOCKET, "client": CLIENT_SOCKET}[vector["responderSocket"]]
    request = Request(
        vector["tid"], 0, True, target and bytes.fromhex(target), None, None, None, HERE,
        (vector["to"]["host"], vector["to"]["port"]), socket,
    )  # fmt: skip
    node.reply(
        request,
        0.0,
        value=None if vector["value"] is None else bytes.fromhex(vector["value"]),
        error=vector["error"],
        token=vector["tokenSent"] is not None,
        closer_nodes=vector["closerNodesWanted"],
    )
    (transmit,) = node.transmits(0.0)
    reply = parse(transmit)
    expected = bytes.fromhex(vector["hex"])
    listed = {(entry["host"], entry["port"]) for entry in vector["closerNodes"]}
    assert set(reply.closer_nodes) == listed
    # The order of the list is the table's; every other byte is as recorded.
    assert sorted(b"".join(transmit.buffers)) == sorted(expected)
    assert transmit.socket == socket


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"\x03",
        b"\x00\x00",
        b"\x23" * 40,
        b"\x03\x04\x01\x00\x7f\x00\x00\x01\x41",
        wire.encode_request(1, HERE, wire.FIND_NODE, internal=True, target=TARGET)[:-1],
        wire.encode_response(1, HERE, value=b"abc")[:-1],
    ],
)
def test_what_does_not_decode_is_counted_and_not_answered(datagram: bytes) -> None:
    node = started()
    node.receive(datagram, SERVER_SOCKET, ASKER, 0.0)
    assert node.transmits(0.0) == []
    assert node.stats.ignored + node.stats.malformed == 1


def test_nothing_is_answered_to_port_zero() -> None:
    node = started()
    assert ask(node, wire.PING, source=("127.0.0.1", 0)) == []
    assert node.stats.ignored == 1


@given(st.lists(st.binary(max_size=80), max_size=20), st.integers(0, 2))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_a_node_survives_any_datagrams(datagrams: list[bytes], socket: int) -> None:
    node = started()
    for datagram in datagrams:
        node.receive(datagram, socket, ASKER, 0.0)
        node.receive(b"\x03" + datagram, socket, ASKER, 0.0)
        node.receive(b"\x13" + datagram, socket, ASKER, 0.0)
    assert node.stats.received == 3 * len(datagrams)


def test_ping_is_answered_plainly_from_where_it_arrived() -> None:
    node = started()
    introduce(node, ("127.0.0.1", 40002))
    for socket in (SERVER_SOCKET, CLIENT_SOCKET, 7):
        (transmit,) = ask(node, wire.PING, socket=socket, target=TARGET, value=b"padding")
        reply = parse(transmit)
        assert transmit.address == reply.to == ASKER
        assert transmit.socket == socket
        assert (reply.tid, reply.error, reply.value, reply.token) == (77, 0, None, None)
        assert reply.closer_nodes == []
        assert reply.id == (node.id if socket == SERVER_SOCKET else None)


def test_ping_nat_is_answered_to_the_named_port() -> None:
    node = started()
    port = (4711).to_bytes(2, "little")
    (transmit,) = ask(node, wire.PING_NAT, value=port, socket=CLIENT_SOCKET)
    assert transmit.address == parse(transmit).to == ("127.0.0.1", 4711)
    assert transmit.socket == CLIENT_SOCKET


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        (wire.PING_NAT, {"value": b"\x00\x00"}),
        (wire.PING_NAT, {"value": b"\x01"}),
        (wire.PING_NAT, {}),
        (wire.FIND_NODE, {}),
        (wire.DOWN_HINT, {"value": b"12345"}),
        (wire.DOWN_HINT, {}),
        (wire.DELAYED_PING, {"value": b"123"}),
        (wire.DELAYED_PING, {"value": (10_001).to_bytes(4, "little")}),
    ],
)
def test_incomplete_commands_are_ignored(command: int, fields: dict[str, Any]) -> None:
    node = started()
    assert ask(node, command, **fields) == []
    assert advance(node, 4.9) == []


def test_find_node_gives_closer_nodes_and_no_token() -> None:
    node = started()
    introduce(node, ("127.0.0.1", 40002), ("127.0.0.1", 40003))
    (transmit,) = ask(node, wire.FIND_NODE, target=TARGET)
    reply = parse(transmit)
    assert sorted(reply.closer_nodes) == [("127.0.0.1", 40002), ("127.0.0.1", 40003)]
    assert reply.token is None


def test_find_node_of_strangers_can_be_answered_late() -> None:
    node = started(find_node_delay=0.02)
    assert ask(node, wire.FIND_NODE, 1.0, target=TARGET) == []
    assert ask(node, wire.FIND_NODE, 1.0, target=TARGET, with_id=True) != []
    assert node.deadline() == pytest.approx(1.02)
    assert len(advance(node, 1.02)) == 1


def test_delayed_ping_answers_after_the_delay() -> None:
    node = started()
    assert ask(node, wire.DELAYED_PING, 1.0, value=(1500).to_bytes(4, "little")) == []
    assert advance(node, 2.499) == []
    (transmit,) = advance(node, 2.5)
    assert parse(transmit).token is None


def test_delayed_pings_are_limited() -> None:
    node = started()
    for _ in range(MAX_DELAYED + 3):
        ask(node, wire.DELAYED_PING, value=(100).to_bytes(4, "little"))
    assert len(advance(node, 1.0)) == MAX_DELAYED
    assert node.stats.dropped == 3


@pytest.mark.parametrize("internal", [True, False])
def test_an_unknown_command_is_answered_with_closer_nodes(internal: bool) -> None:
    node = started()
    introduce(node, ("127.0.0.1", 40002))
    (transmit,) = ask(node, 99, internal=internal, target=TARGET)
    reply = parse(transmit)
    assert (reply.error, reply.token) == (wire.ERROR_UNKNOWN_COMMAND, None)
    assert reply.closer_nodes == [("127.0.0.1", 40002)]


def test_a_bad_token_is_answered_with_a_fresh_one_and_has_no_effect() -> None:
    node = started()
    seen: list[Request] = []
    node.on_request = lambda request, now: seen.append(request)
    introduce(node, ("127.0.0.1", 40002))
    (transmit,) = ask(node, 4, internal=False, target=TARGET, token=b"\x01" * 32)
    reply = parse(transmit)
    assert reply.error == wire.ERROR_INVALID_TOKEN
    assert reply.closer_nodes == [("127.0.0.1", 40002)]
    assert seen == []
    assert reply.token == node.issue_token(ASKER[0], 0.0)
    assert node.accepts_token(reply.token, ASKER[0], 0.0)
    assert ask(node, 4, internal=False, target=TARGET, token=reply.token) == []
    assert ask(node, 4, internal=False, target=TARGET) == []
    assert [request.token for request in seen] == [reply.token, None]


def test_an_answer_can_go_to_somebody_else_and_a_request_be_passed_on() -> None:
    node = started()
    client, server = ("9.9.9.9", 99), ("8.8.8.8", 88)
    seen: list[Request] = []
    node.on_request = lambda request, now: seen.append(request)
    ask(node, 0, internal=False, target=TARGET, value=b"in", with_id=True)
    node.reply(seen[0], 0.0, value=b"out", token=False, closer_nodes=False, to=client)
    node.forward(seen[0], server, b"on", 0.0)
    answer, passed = node.transmits(0.0)
    assert parse(answer).to == answer.address == client
    assert (parse(answer).tid, parse(answer).value) == (77, b"out")
    (request,) = requests([passed])
    assert passed.address == request.to == server
    assert (request.tid, request.command, request.internal) == (77, 0, False)
    assert (request.target, request.token, request.value) == (TARGET, None, b"on")
    assert request.id == node.id


def test_restarted_nodes_leave_strangers_pings_unanswered_for_a_while() -> None:
    node = started(ignore_idless_pings=9.0)
    assert ask(node, wire.PING, 8.9) == []
    assert len(ask(node, wire.PING, 8.9, with_id=True)) == 1
    assert len(ask(node, wire.FIND_NODE, 8.9, target=TARGET)) == 1
    assert len(ask(node, wire.PING, 9.0)) == 1


def test_only_valid_ids_get_into_the_table() -> None:
    node = started()
    ask(node, wire.PING)
    datagram = wire.encode_request(1, HERE, 0, internal=True, id=node_id(("5.5.5.5", 5)))
    node.receive(datagram, SERVER_SOCKET, ASKER, 0.0)
    introduce(node, ("150.136.142.116", 1000))
    assert len(node.table) == 0
    introduce(node, ASKER)
    assert node.closest(TARGET) == [ASKER]


def test_a_response_counts_on_any_socket_but_only_from_who_was_asked() -> None:
    node = started(public_address=None, quick_check=False)
    there = ("127.0.0.1", 40002)
    replies: list[Reply | None] = []
    node.request(there, 1, 0.0, internal=True, on_done=lambda reply, now: replies.append(reply))
    (request,) = requests(node.transmits(0.0))
    response = wire.encode_response(request.tid, HERE, id=node_id(there))
    node.receive(response, SERVER_SOCKET, ("127.0.0.1", 40003), 0.0)
    assert replies == []
    assert node.stats.unmatched == 1
    node.receive(response, SERVER_SOCKET, there, 0.0)
    assert [reply and reply.socket for reply in replies] == [SERVER_SOCKET]
    assert node.closest(TARGET) == [there]
    # What arrived on the socket that is not the current one says nothing of the current one.
    assert node.sampler.size == 0


def test_a_node_that_fails_a_request_leaves_the_table() -> None:
    node = started()
    there = ("127.0.0.1", 40002)
    introduce(node, there)
    node.ping(there, 0.0, on_done=lambda reply, now: None)
    advance(node, 4.5)
    assert node.closest(TARGET) == [there]
    node.ping(there, 4.5, node_id=node_id(there), on_done=lambda reply, now: None)
    advance(node, 9.0)
    assert node.closest(TARGET) == []


def test_a_down_hint_makes_a_node_look_for_itself() -> None:
    node = started()
    dead, unknown = ("127.0.0.1", 40002), ("127.0.0.1", 40003)
    introduce(node, dead)
    assert len(ask(node, wire.DOWN_HINT, value=encode_address(unknown))) == 1
    sent = ask(node, wire.DOWN_HINT, value=encode_address(dead))
    assert [(r.command, r.to) for r in requests(sent)] == [(wire.PING, dead)]
    assert [parse(t).token for t in sent if t.address == ASKER] == [None]
    # Probed in this tick already, and hinted at before: nothing more to find out.
    assert requests(ask(node, wire.DOWN_HINT, value=encode_address(dead))) == []
    advance(node, 4.5)
    assert node.closest(TARGET) == []


def test_a_hinted_node_that_answers_with_its_id_stays() -> None:
    node = started()
    there = ("127.0.0.1", 40002)
    introduce(node, there)
    (request,) = requests(ask(node, wire.DOWN_HINT, value=encode_address(there)))
    response = wire.encode_response(request.tid, HERE, id=node_id(there))
    node.receive(response, SERVER_SOCKET, there, 0.1)
    advance(node, 4.5)
    assert node.closest(TARGET) == [there]


def test_hints_are_limited_for_each_tick() -> None:
    node = started()
    for number in range(HINTS_PER_TICK + 5):
        node.hint_down(("10.0.0.1", 1 + number), ("10.0.0.2", 2), 0.0)
    sent = requests(node.transmits(0.0))
    assert len(sent) == HINTS_PER_TICK
    assert {r.command for r in sent} == {wire.DOWN_HINT}
    assert {r.value for r in sent} == {encode_address(("10.0.0.2", 2))}
    advance(node, TICK)
    node.hint_down(("10.0.0.1", 1), ("10.0.0.2", 2), TICK)
    assert len(requests(node.transmits(TICK))) == 1


def row_mates(node: Node, count: int) -> list[Address]:
    """Addresses whose ids all belong into the table's first row."""
    found: list[Address] = []
    number = 0
    while len(found) < count:
        number += 1
        address = (f"10.0.{number // 250}.{number % 250 + 1}", 49737)
        if node.table.row(node_id(address)) == 0:
            found.append(address)
    return found


@pytest.mark.parametrize("alive", [True, False])
def test_a_full_row_probes_its_stalest_before_it_takes_a_newcomer(alive: bool) -> None:
    node = started()
    *mates, newcomer = row_mates(node, K + 1)
    stalest = mates[0]
    introduce(node, *mates)
    contact = node.table.find(node_id(stalest))
    assert contact is not None
    contact.pinged = contact.added = 1
    sent = ask(node, wire.PING, source=newcomer, with_id=True)
    (probe,) = requests(sent)
    assert (probe.command, probe.to) == (wire.PING, stalest)
    assert len(node.table) == K
    if alive:
        response = wire.encode_response(probe.tid, HERE, id=node_id(stalest))
        node.receive(response, SERVER_SOCKET, stalest, 0.1)
    advance(node, 4.5)
    assert (node_id(newcomer) in node.table) is not alive
    assert (node_id(stalest) in node.table) is alive


def test_a_full_row_of_old_friends_heard_lately_is_left_alone() -> None:
    node = started()
    *mates, newcomer = row_mates(node, K + 1)
    introduce(node, *mates)
    for contact in node.table:
        contact.added -= 400
        contact.pinged -= 1
    assert requests(ask(node, wire.PING, source=newcomer, with_id=True)) == []


def test_every_eighth_tick_the_oldest_nodes_are_pinged() -> None:
    node = started()
    mates = row_mates(node, 8)
    introduce(node, *mates)
    for contact in node.table:
        contact.pinged -= 20
    pinged = [r.to for r in requests(advance(node, 8 * TICK)) if r.command == wire.PING]
    assert set(list(dict.fromkeys(pinged))[:5]) == set(mates[:5])


def test_an_idle_node_has_one_deadline_a_tick() -> None:
    node = started()
    introduce(node, ("127.0.0.1", 40002))
    assert node.deadline() == TICK
    node.on_deadline(TICK)
    assert node.deadline() in (2 * TICK, TICK + 1.0)


def test_after_a_sleep_it_starts_over() -> None:
    node = Node(NodeConfig(firewalled=False, quick_check=False), Random(1))
    changes: list[float] = []
    node.on_network_change = changes.append
    node.start(0.0, server_port=1000, client_port=1001)
    advance(node, 20.0)
    node.ephemeral = False
    introduce(node, ("127.0.0.1", 40002), now=20.0)
    node.on_deadline(5000.0)
    assert changes == [5000.0]
    assert node.ephemeral
    assert wire.FIND_NODE in [r.command for r in requests(node.transmits(5000.0))]


def test_health_follows_the_answers() -> None:
    health = Health()
    totals = [0, 0]

    def tick(answered: int, lost: int) -> bool:
        totals[0] += answered
        totals[1] += lost
        return health.update(*totals)

    def states(*ticks: tuple[int, int]) -> list[tuple[bool, bool, bool]]:
        return [(tick(*one), health.online, health.degraded) for one in ticks]

    fine = (False, True, False)
    assert states(*[(10, 0)] * 6) == [fine] * 6
    # Two intervals without an answer are offline; one in which nothing was asked says nothing.
    offline = (False, False, False)
    assert states((0, 10), (0, 10), (0, 0)) == [fine, offline, offline]
    assert states((10, 0)) == [(True, True, False)]
    assert states(*[(4, 6)] * 4)[-1] == (False, True, True)
    assert states(*[(6, 4)] * 4)[-1] == fine
