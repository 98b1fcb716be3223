from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from support.endpoint import MemoryNetwork
from support.registry import REGISTRY, Client, registry_spec, running_registry, virtual
from support.rows import EPOCH, INSTANCE
from vectors import load

from hyperseaport.actors.messages import (
    Describe,
    RegistryListening,
    ServiceGone,
    ServiceRegistered,
)
from hyperseaport.actors.registry import lease, replica, roles, server
from hyperseaport.actors.registry.rows import GRACE, MAX_ENTRIES_PER_SESSION, RESTART_GRACE
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.supervisor import Supervisor
from hyperseaport.transport.keys import KeyPair

KEY_A, KEY_B, KEY_C = (letter * 64 for letter in "abc")
RPC = load("rpc")


def service(role: Any, key: Any = KEY_A) -> Any:
    return {"meta": roles.parse(role), "servicePublicKey": key}


def transcript(generation: Any, name: Any) -> Any:
    return next(t for t in RPC[generation]["transcripts"] if t["name"] == name)["lines"]


def exchanges(lines: Any) -> Any:
    """Pairs of a line that a client sent and the line that it got."""
    return [
        (sent["text"], received["text"])
        for sent, received in itertools.pairwise(lines)
        if (sent["dir"], received["dir"]) == ("send", "recv")
    ]


def without_remote_key(line: Any) -> Any:
    """The reply, parsed, without the key of the connection: it differs from run to run."""
    reply = json.loads(line)
    result = reply.get("result")
    if isinstance(result, dict) and "info" in result:
        del result["info"]["remotePublicKey"]
    return reply


# The real programs


@pytest.mark.parametrize("program", ["v1_service", "v1_proxy", "v3_service", "v3_proxy"])
@virtual
async def test_the_real_programs_get_the_answers_that_they_expect(program: Any) -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        holder = await Client(network).connect()
        couchdb = json.loads(RPC["command_line_programs"]["v1_service"][0]["text"])["params"]
        if program.endswith("proxy"):
            await holder.ask("register", couchdb)
        client = await Client(network).connect()
        for sent, expected in exchanges(RPC["command_line_programs"][program]):
            got = await client.say(sent)
            if program == "v3_service":
                # It takes no notice of the result, and gets the one that 1.x needs.
                assert json.loads(got)["error"] is None
            elif "getRegistryKey" in sent:
                assert len(bytes.fromhex(json.loads(got)["result"])) == 32
            elif program == "v1_proxy":
                assert without_remote_key(got) == without_remote_key(expected)
                info = json.loads(got)["result"]["info"]
                assert info["remotePublicKey"] == holder.key_pair.public_key.hex()
            else:
                assert got == expected


@virtual
async def test_the_1x_transcript_of_registrations() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        client = await Client(network).connect()
        for sent, expected in exchanges(transcript("registry_v1", "register")):
            got = json.loads(await client.say(sent))
            request, expected = json.loads(sent), json.loads(expected)
            if request["method"] == "query":
                continue  # answered in the shape of 3.x
            if (request.get("params") or {}).get("servicePublicKey") == "any text":
                assert "64 hexadecimal digits" in got["error"]
            elif "params" not in request:
                assert got["error"]
            else:
                assert got == expected


@virtual
async def test_the_3x_transcript() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        client = await Client(network).connect()
        for sent, expected in exchanges(transcript("registry_v3", "register, query, unregister")):
            request = json.loads(sent)
            method, number = request["method"], request["id"]
            if method == "waitFor":
                continue  # unknown there
            got, expected = json.loads(await client.say(sent)), json.loads(expected)
            if number in {6, 7}:  # ^3.0.0 and 3 find what matches
                assert [item["version"] for item in got["result"]] == ["3.2.2"]
            elif number == 15:  # `*` matches no prerelease
                assert got["result"] == expected["result"][:1]
            elif number in {17, 22}:
                assert got["result"] == []
            elif number == 21:
                assert got["error"] == "info needs an id property"
            elif method == "register" and expected["error"] is None:
                assert got["result"] == {"meta": request["params"]["meta"], "ok": True}
            elif method == "getRegistryKey":
                assert got["result"] == replica.log_key(REGISTRY).hex()
            elif expected["error"]:
                assert got["error"]
            else:
                assert got == expected


@virtual
async def test_other_lines_of_the_1x_transcript() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        client = await Client(network).connect()
        assert await client.say('{"method":"nosuch","id":3}\n') == (
            '{"result":null,"error":"Unknown method","id":3}\n'
        )
        client.send('{"method":"query","params":{"role":"couchdb","version":"3.x"},"id":0}\n')
        client.send("\n")
        await asyncio.sleep(0.01)
        assert client.lost
        assert client.error is not None
        assert len(client.lines) == 1


# waitFor


@virtual
async def test_a_late_answer_has_the_shape_of_an_early_one() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        proxy, holder = await Client(network).connect(), await Client(network).connect()
        waiting = asyncio.create_task(proxy.ask("waitFor", roles.parse("late@^1.0.0")))
        await asyncio.sleep(14)
        assert not waiting.done()
        await holder.ask("register", service("late@1.4.0"))
        late = await waiting
        assert late == await proxy.ask("waitFor", roles.parse("late@^1.0.0"))
        assert late["info"] == {
            "id": KEY_A,
            "remotePublicKey": holder.key_pair.public_key.hex(),
            "meta": roles.parse("late@1.4.0"),
        }


@virtual
async def test_several_waiters_are_all_answered() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        clients = [await Client(network).connect() for _ in range(5)]
        waiting = [
            asyncio.create_task(client.ask("waitFor", roles.parse("a@1.x"))) for client in clients
        ]
        await asyncio.sleep(1)
        await clients[2].close()
        holder = await Client(network).connect()
        await holder.ask("register", service("a@1.2.3"))
        waiting.pop(2).cancel()
        answers = await asyncio.gather(*waiting)
        assert [answer["info"]["id"] for answer in answers] == [KEY_A] * 4


@virtual
async def test_waiting_ends_after_15_seconds_and_holds_nothing_up() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        client = await Client(network).connect()
        begin = asyncio.get_running_loop().time()
        line = json.dumps({"method": "waitFor", "params": roles.parse("never@1.x"), "id": 7})
        client.send(line + "\n")
        for _ in range(5):
            assert await client.ask("query", roles.parse("never@1.x")) == []
        await client.until(lambda: len(client.lines) == 6)
        took = asyncio.get_running_loop().time() - begin
        assert client.lines[-1] == '{"result":null,"error":"timeout waiting for service","id":7}\n'
        assert 15 <= took <= 16


# Lives of connections


@pytest.mark.parametrize("how", ["close", "abort", "fail"])
@virtual
async def test_a_dead_connection_takes_its_entries_and_the_newest_left_is_found(
    how: Any,
) -> None:
    network = MemoryNetwork()
    news: list[Any] = []
    async with running_registry(network, news) as runtime:
        one, two, asker = [await Client(network).connect() for _ in range(3)]
        await one.ask("register", service("a@3.9.1", KEY_A))
        await two.ask("register", service("a@3.10.0", KEY_B))
        await two.ask("register", service("b@1.0.0", KEY_B))

        async def found(role: Any) -> Any:
            items = await asker.ask("query", roles.parse(role))
            return [item["servicePublicKey"] for item in items]

        assert await found("a@3.x") == [KEY_B, KEY_A]
        if how == "fail":
            two.channel.peer.fail(TimeoutError("nothing heard"))
        else:
            getattr(two.channel, how)()
        if how != "close":  # it broke, and may come back
            await asyncio.sleep(GRACE - 0.1)
            assert await found("a@3.x") == [KEY_B, KEY_A]
            await asyncio.sleep(0.2)
        await asyncio.sleep(0.01)
        assert await found("a@3.x") == [KEY_A]
        assert await found("b") == []
        assert [message.info["id"] for message in news if isinstance(message, ServiceGone)] == [
            KEY_B,
            KEY_B,
        ]
        assert len([path for path in runtime.tree() if "/sessions/" in path]) == 2


@virtual
async def test_pending_answers_come_before_the_end() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        client, holder = await Client(network).connect(), await Client(network).connect()
        line = json.dumps({"method": "waitFor", "params": roles.parse("a@1.x"), "id": 1})
        client.send(line + "\n")
        client.channel.write_eof()
        await asyncio.sleep(1)
        assert not client.ended
        await holder.ask("register", service("a@1.0.0"))
        await asyncio.sleep(0.01)
        assert json.loads(client.lines[0])["result"]["info"]["id"] == KEY_A
        assert client.ended


@virtual
async def test_re_registration_replaces_at_once_and_the_old_connection_takes_nothing() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        old, new = await Client(network).connect(), await Client(network).connect()
        await old.ask("register", service("a@1.0.0"))
        await new.ask("register", service("a@1.0.0"))
        found = await new.ask("waitFor", roles.parse("a"))
        assert found["info"]["remotePublicKey"] == new.key_pair.public_key.hex()
        await old.close()
        assert len(await new.ask("query", roles.parse("a"))) == 1
        await new.ask("unregister", service("a@1.0.0"))
        assert await new.ask("query", roles.parse("a")) == []


@virtual
async def test_news_for_the_console() -> None:
    network = MemoryNetwork()
    news: list[Any] = []
    async with running_registry(network, news):
        client = await Client(network).connect()
        await client.ask("register", service("a@1.0.0"))
        await client.ask("unregister", service("a@1.0.0"))
        await asyncio.sleep(0.01)
        info = {
            "id": KEY_A,
            "remotePublicKey": client.key_pair.public_key.hex(),
            "meta": roles.parse("a@1.0.0"),
        }
        assert news == [
            RegistryListening(REGISTRY.public_key, anybody_registers=True, anybody_queries=True),
            ServiceRegistered(info),
            ServiceGone(info),
        ]


@virtual
async def test_only_allowed_keys_may_connect() -> None:
    network = MemoryNetwork()
    friend = KeyPair.from_seed(b"\x09" * 32)
    async with running_registry(network, allow=frozenset({friend.public_key})):
        await (await Client(network, friend).connect()).ask("query", roles.parse("a"))
        with pytest.raises(ConnectionError):
            await Client(network).connect()


# Hostile and greedy clients


@pytest.mark.parametrize(
    "line",
    [
        b'{"method":"register","params":{"meta":{"role":"__proto__","version":"x"}},"id":1}\n',
        b'{"method":"register","params":{"meta":{"role":"%s","version":"1.0.0"}},"id":1}\n'
        % (b"x" * 1_000_000),
        b'{"method":"register","params":{"meta":%s},"id":1}\n' % (b"[" * 90 + b"]" * 90),
        b'{"method":"query","params":{"role":"\\ud800"},"id":1}\n',
        b'{"method":"query","params":{"role":1e999},"id":1}\n',
        b'{"method":"waitFor","params":7,"id":1}\n',
        b'{"method":"unregister","params":[],"id":1}\n',
        b'{"method":"constructor","id":1}\n',
        b'{"method":{"a":1},"id":1}\n',
        b'{"method":"query","id":"%s"}\n' % (b"i" * 1_048_000),
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b"x" * 2_000_000,
    ],
    ids=lambda line: line[:40].decode("latin1"),
)
@virtual
async def test_the_registry_survives(line: Any) -> None:
    network = MemoryNetwork()
    async with running_registry(network) as runtime:
        actors = {path for path in runtime.tree() if "/sessions/" not in path}
        hostile, other = await Client(network).connect(), await Client(network).connect()
        await other.ask("register", service("a@1.0.0"))
        hostile.channel.write(line)
        await asyncio.sleep(1)
        assert hostile.lost or len(hostile.lines) == 1
        assert len(await other.ask("query", roles.parse("a"))) == 1
        assert actors <= set(runtime.tree())


@virtual
async def test_a_client_that_floods_waits_for_its_answers() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        client = await Client(network).connect()
        lines = b"".join(
            b'{"method":"query","params":{"role":"a"},"id":%d}\n' % number
            for number in range(1, 5001)
        )
        for start in range(0, len(lines), 1000):
            client.channel.write(lines[start : start + 1000])
        await asyncio.sleep(1)
        assert len(client.lines) == 5000


@virtual
async def test_a_client_that_does_not_read_its_answers_is_not_read_either() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        client = await Client(network).connect()
        await client.ask("register", service("a@1.0.0"))
        client.channel.pause_reading()
        for number in range(2000):
            client.send(f'{{"method":"query","params":{{"role":"a"}},"id":{number + 1}}}\n')
            await asyncio.sleep(0.001)
        queued = client.channel.peer.get_write_buffer_size()
        assert 65_536 < queued < 100_000
        client.channel.resume_reading()
        await asyncio.sleep(1)
        assert len(client.lines) == 2001


@virtual
async def test_connections_beyond_the_limit_are_refused(monkeypatch: Any) -> None:
    network = MemoryNetwork()
    monkeypatch.setattr(server, "MAX_SESSIONS", 2)
    async with running_registry(network):
        first, second, third = [await Client(network).connect() for _ in range(3)]
        await asyncio.sleep(0.01)
        assert third.lost
        assert not first.lost
        assert not second.lost
        await first.close()
        fourth = await Client(network).connect()
        assert await fourth.ask("query", roles.parse("a")) == []


# Our own programs


KEYS = KeyPair.from_seed(b"\x01" * 32)


def clock() -> float:
    """Unix seconds of a registry whose loop began at the epoch of the tests."""
    return EPOCH + asyncio.get_running_loop().time()


def leased(role: Any, sequence: int, *, keys: KeyPair = KEYS, ttl: float = 30.0) -> Any:
    made = lease.sign(
        keys,
        roles.parse(role),
        instance=INSTANCE,
        sequence=sequence,
        issued=int(clock() * 1000),
        ttl=ttl,
    )
    return {"statement": made.text, "signature": made.signature.hex()}


@virtual
async def test_hello_and_ping() -> None:
    network = MemoryNetwork()
    async with running_registry(network, clock=clock):
        client = await Client(network).connect()
        await asyncio.sleep(5)
        assert await client.ask("hello", {"version": 1}) == {
            "version": 1,
            "features": ["lease", "roles", "watch"],
            "time": int(clock() * 1000),
        }
        assert await client.say('{"method":"ping","params":{},"id":9}\n') == (
            '{"result":{},"error":null,"id":9}\n'
        )


@virtual
async def test_roles_are_listed_in_pieces() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        client = await Client(network).connect()
        assert await client.ask("roles", {}) == {"roles": [], "more": False}
        names = [f"role-{number:03}" for number in range(130)]
        for name in reversed(names):
            await client.ask("register", service(f"{name}@1.0.0"))
        first = await client.ask("roles", {})
        assert first == {"roles": names[:100], "more": True}
        rest = await client.ask("roles", {"after": first["roles"][-1]})
        assert rest == {"roles": names[100:], "more": False}
        with pytest.raises(RuntimeError, match="after must be a role"):
            await client.ask("roles", {"after": 1})


@virtual
async def test_leases_over_the_wire() -> None:
    network = MemoryNetwork()
    news: list[Any] = []
    async with running_registry(network, news, clock=clock):
        carrier, node = await Client(network).connect(), await Client(network).connect()
        assert await carrier.ask("lease", leased("a@1.0.0", 1)) == {"ttl": 30}
        (item,) = await node.ask("query", roles.parse("a@1.x"))
        key = KEYS.public_key.hex()
        assert item == {
            "servicePublicKey": key,
            "role": "a",
            "version": "1.0.0",
            "prerelease": [],
        }
        found = await node.ask("waitFor", roles.parse("a@1.x"))
        assert found["info"] == {
            "id": key,
            "remotePublicKey": carrier.key_pair.public_key.hex(),
            "meta": roles.parse("a@1.0.0"),
        }
        with pytest.raises(RuntimeError, match="only its own key"):
            await node.ask("register", service("a@1.0.0", key))
        with pytest.raises(RuntimeError, match="stale sequence"):
            await node.ask("lease", leased("a@1.0.0", 1))
        assert await node.ask("lease", leased("a@1.0.0", 2, ttl=0)) == {"ttl": 0}
        assert await node.ask("query", roles.parse("a@1.x")) == []
        await asyncio.sleep(0.01)
        assert [type(piece) for piece in news[1:]] == [ServiceRegistered, ServiceGone]


@virtual
async def test_watching_over_the_wire() -> None:
    network = MemoryNetwork()
    async with running_registry(network, clock=clock):
        one, two = await Client(network).connect(), await Client(network).connect()
        watch = roles.parse("a@1.x") | {"id": 3}
        assert await one.ask("watch", watch) == {"services": []}
        sent = leased("a@1.0.0", 1)
        await two.ask("lease", sent)
        await one.until(lambda: len(one.notices) == 1)
        assert one.lines[-1].endswith(',"id":0}\n')
        assert json.loads(one.lines[-1])["method"] == "services"
        (item,) = one.notices[0]["services"]
        assert one.notices[0]["id"] == 3
        assert (item["verified"], item["statement"]) == (True, sent["statement"])
        assert item["meta"] == roles.parse("a@1.0.0")
        await asyncio.sleep(1)
        await two.close()
        await one.until(lambda: len(one.notices) == 2)
        assert one.notices[1] == {"id": 3, "services": []}
        assert await one.ask("unwatch", {"id": 3}) == {}


@virtual
async def test_a_subscriber_that_is_too_slow_is_dropped() -> None:
    network = MemoryNetwork()
    async with running_registry(network, clock=clock) as runtime:
        slow, quick = await Client(network).connect(), await Client(network).connect()
        holder = await Client(network).connect()
        for client in (slow, quick):
            await client.ask("watch", {"id": 1, "role": "a"})
        slow.channel.pause_reading()
        meta = roles.parse("a@1.0.0") | {"metadata": "x" * 60_000}
        changes = 0
        while not slow.lost:
            changes += 1
            meta = meta | {"round": changes}
            await holder.ask("register", {"meta": meta, "servicePublicKey": KEY_A})
            await asyncio.sleep(0.1)
            assert slow.channel.peer.get_write_buffer_size() < server.MAX_UNWRITTEN + 70_000
            assert changes < 20
        assert changes > 4
        assert not quick.lost
        assert len(quick.notices) == changes
        table = runtime.find("/registry/table")
        assert table is not None
        fields = (await runtime.call(table, Describe())).fields
        assert fields["counters"]["dropped.slow"] == 1
        assert fields["watches"] == 1


@virtual
async def test_who_may_register_and_who_may_ask() -> None:
    network = MemoryNetwork()
    friend = KeyPair.from_seed(b"\x09" * 32)
    allowed = frozenset({friend.public_key, KEYS.public_key})
    options: dict[str, Any] = {
        "allow_register": allowed,
        "allow_query": frozenset({friend.public_key}),
    }
    async with running_registry(network, clock=clock, **options) as runtime:
        known, stranger = await Client(network, friend).connect(), await Client(network).connect()
        with pytest.raises(RuntimeError, match="may register services"):
            await stranger.ask("register", service("a@1.0.0"))
        other = KeyPair.from_seed(b"\x02" * 32)
        with pytest.raises(RuntimeError, match="may register services"):
            await stranger.ask("lease", leased("a@1.0.0", 1, keys=other))
        with pytest.raises(RuntimeError, match="128 hexadecimal digits"):
            await stranger.ask("lease", leased("a@1.0.0", 1) | {"signature": 1})
        forged = leased("a@1.0.0", 1) | {"signature": "00" * 64}
        with pytest.raises(RuntimeError, match="not signed by"):
            await stranger.ask("lease", forged)
        assert await stranger.ask("lease", leased("a@1.0.0", 1)) == {"ttl": 30}
        for method in ("query", "waitFor", "watch"):
            with pytest.raises(RuntimeError, match="may look for services"):
                await stranger.ask(method, roles.parse("a") | {"id": 1})
        await known.ask("register", service("a@1.1.0"))
        assert len(await known.ask("query", roles.parse("a"))) == 2
        assert (await stranger.ask("hello", {}))["version"] == 1
        table, listener = runtime.find("/registry/table"), runtime.find("/registry/server")
        assert table is not None
        assert listener is not None
        counters = (await runtime.call(table, Describe())).fields["counters"]
        assert counters["refused.policy"] == 5
        assert counters["refused.malformed"] == counters["refused.forged"] == 1
        assert (await runtime.call(listener, Describe())).fields == {
            "public_key": REGISTRY.public_key.hex(),
            "sessions": 2,
            "allowed": {"connect": None, "register": 2, "query": 1},
            "counters": {"accepted": 2},
        }


@virtual
async def test_a_session_is_told_that_it_has_reached_its_limit() -> None:
    network = MemoryNetwork()
    async with running_registry(network, clock=clock):
        client = await Client(network).connect()
        for number in range(MAX_ENTRIES_PER_SESSION):
            await client.ask("register", service(f"r{number}@1.0.0"))
        with pytest.raises(RuntimeError, match="registers at most 1000 services"):
            await client.ask("register", service("more@1.0.0"))
        with pytest.raises(RuntimeError, match="registers at most 1000 services"):
            await client.ask("lease", leased("more@1.0.0", 1))
        await client.ask("unregister", service("r7@1.0.0"))
        assert await client.ask("lease", leased("more@1.0.0", 1)) == {"ttl": 30}


@pytest.mark.parametrize("how", ["stopped", "killed"])
@virtual
async def test_a_registry_with_a_store_knows_its_services_after_a_restart(
    tmp_path: Any, how: Any
) -> None:
    network = MemoryNetwork()
    options: dict[str, Any] = {"clock": clock, "path": tmp_path / "table"}
    async with running_registry(network, **options) as runtime:
        client = await Client(network).connect()
        await client.ask("register", service("a@1.0.0"))
        await client.ask("lease", leased("a@2.0.0", 5))
        if how == "killed":
            runtime.kill("/registry")
    async with running_registry(network, **options):
        client = await Client(network).connect()
        assert len(await client.ask("query", roles.parse("a"))) == 2
        with pytest.raises(RuntimeError, match="stale sequence, the last was 5"):
            await client.ask("lease", leased("a@2.0.0", 5))
        await client.ask("lease", leased("a@2.0.0", 6))
        await asyncio.sleep(RESTART_GRACE - 1)
        await client.ask("lease", leased("a@2.0.0", 7))
        await asyncio.sleep(1.1)
        (item,) = await client.ask("query", roles.parse("a"))
        assert item["version"] == "2.0.0"


@virtual
async def test_a_registry_whose_store_cannot_be_used_ends_with_its_reason(tmp_path: Any) -> None:
    path = tmp_path / "table"
    path.write_text("no database, and longer than the header of one: " + "x" * 100)
    async with ActorRuntime() as runtime:
        spec = registry_spec(MemoryNetwork(), [], path=path)
        root = runtime.spawn(Supervisor, spec, name="registry")
        reason = await asyncio.wait_for(runtime.stopped(root), 5)
        assert "is no SQLite database: choose another file" in reason.text
    assert path.read_text().startswith("no database")


# Deaths inside


@pytest.mark.parametrize("actor", ["table", "sessions", "server", "replica", "endpoint"])
@virtual
async def test_it_heals_when_an_actor_is_killed(actor: Any) -> None:
    network = MemoryNetwork()
    async with running_registry(network) as runtime:
        before = await Client(network).connect()
        await before.ask("register", service("a@1.0.0"))
        runtime.kill(f"/registry/{actor}")
        await asyncio.sleep(1)
        assert (before.lost or before.ended) is not (actor in {"server", "replica"})
        after = await Client(network).connect()
        # The table keeps for a while what a broken session has registered.
        known = actor in {"server", "replica", "sessions"}
        assert len(await after.ask("query", roles.parse("a"))) == known
        await after.ask("register", service("a@1.0.0"))
        assert len(await after.ask("query", roles.parse("a"))) == 1


@virtual
async def test_a_killed_session_takes_its_connection_and_after_a_while_its_entries() -> None:
    network = MemoryNetwork()
    async with running_registry(network) as runtime:
        one, two = await Client(network).connect(), await Client(network).connect()
        await one.ask("register", service("a@1.0.0"))
        runtime.kill("/registry/sessions/1")
        await asyncio.sleep(0.01)
        assert one.lost
        assert not two.lost
        assert len(await two.ask("query", roles.parse("a"))) == 1
        await asyncio.sleep(GRACE)
        assert await two.ask("query", roles.parse("a")) == []


@virtual
async def test_a_stopped_registry_ends_its_connections_in_order() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        client = await Client(network).connect()
        await client.ask("query", roles.parse("a"))
    await asyncio.sleep(0.01)
    assert client.ended


# The log that there is not


@virtual
async def test_the_replica_is_found_under_its_topic_and_ends_visits() -> None:
    network = MemoryNetwork()
    async with running_registry(network):
        await asyncio.sleep(0.01)
        client = await Client(network).connect()
        key = bytes.fromhex(await client.ask("getRegistryKey"))
        key_pair = network.topics[replica.topic(key)]
        assert key_pair.public_key != REGISTRY.public_key
        visitor = Client(network)
        visitor.visit(key_pair.public_key)
        visitor.channel.write(b"\x00hello")
        await asyncio.sleep(0.29)
        early = visitor.ended
        await asyncio.sleep(0.02)
        assert (early, visitor.ended) == (False, True)
        assert visitor.lines == []
