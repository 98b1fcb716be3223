from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.registry import virtual
from support.rows import EPOCH, INSTANCE, Table

from hyperseaport.actors.actor import Actor, ExitReason, handles
from hyperseaport.actors.messages import (
    Describe,
    ServiceGone,
    ServiceRegistered,
    TableAnswer,
    TableRefusal,
    TableRequest,
)
from hyperseaport.actors.registry import lease, roles, rows, table
from hyperseaport.actors.registry.store import CommitFailed, Store, unpacked
from hyperseaport.actors.registry.table import Counted, TableActor, TableArgs, TableNotice
from hyperseaport.actors.system import ActorRuntime
from hyperseaport.transport.errors import LocalError
from hyperseaport.transport.keys import KeyPair
from hyperseaport.transport.rpc import ABSENT, MAX_LINE, RpcPeer, RpcRequest

KEY_A, KEY_B = (letter * 64 for letter in "ab")
#: Keys of connections.
ONE, TWO = (bytes([number]) * 32 for number in (1, 2))
KEYS = KeyPair.from_seed(b"\x01" * 32)
OTHER = KeyPair.from_seed(b"\x02" * 32)

BROKEN = ExitReason("broken", normal=True)


class Session(Actor):
    """Sends what it is told to send, and keeps what comes. Args: the table, and a list."""

    def on_start(self, args: Any) -> None:
        self._table, self._got = args

    @handles(TableRequest)
    def _ask(self, message: TableRequest, _sender: object) -> None:
        self.send(self._table, message)

    @handles(TableAnswer, TableRefusal, TableNotice)
    def _keep(self, message: object, _sender: object) -> None:
        self._got.append(message)


class Observer(Actor):
    def on_start(self, args: list[Any]) -> None:
        self._news = args

    @handles(object)
    def _keep(self, message: object, _sender: object) -> None:
        self._news.append(message)


class Asker:
    """A session of the table, as a test sees it."""

    def __init__(self, stage: Stage, key: bytes) -> None:
        self.got: list[Any] = []
        self.key = key
        self._stage = stage
        self._tickets = 0
        self.actor = stage.runtime.spawn(Session, (stage.table, self.got))

    def say(self, method: str, params: Any = ABSENT) -> int:
        self._tickets += 1
        request = TableRequest(self._tickets, method, params, self.key)
        self._stage.runtime.system.tell(self.actor, request)
        return self._tickets

    async def ask(self, method: str, params: Any = ABSENT) -> Any:
        """The result. Raises RuntimeError with the refusal's text."""
        ticket = self.say(method, params)
        await asyncio.sleep(0.001)
        (answer,) = [one for one in self.got if getattr(one, "ticket", None) == ticket]
        if isinstance(answer, TableRefusal):
            raise RuntimeError(answer.text)
        return answer.result

    @property
    def notices(self) -> list[TableNotice]:
        return [one for one in self.got if isinstance(one, TableNotice)]

    async def end(self, reason: ExitReason | None = None) -> None:
        """In order, unless there is a reason."""
        if reason is None:
            self._stage.runtime.kill(self.actor, ExitReason("normal", normal=True))
        else:
            self._stage.runtime.kill(self.actor, reason)
        await asyncio.sleep(0.001)


class Stage:
    """A table among sessions."""

    def __init__(self, runtime: ActorRuntime, path: Path | None) -> None:
        self.runtime = runtime
        self.news: list[Any] = []
        observer = runtime.spawn(Observer, self.news)
        args = TableArgs(path, self.unix)
        self.table = runtime.spawn(TableActor, args, "table", {"console": observer})

    @staticmethod
    def unix() -> float:
        return EPOCH + asyncio.get_running_loop().time()

    def session(self, key: bytes = ONE) -> Asker:
        return Asker(self, key)

    async def described(self) -> Any:
        return (await self.runtime.call(self.table, Describe())).fields

    async def counter(self, name: str) -> int:
        return int((await self.described())["counters"].get(name, 0))


@asynccontextmanager
async def running_table(path: Path | None = None) -> AsyncIterator[Stage]:
    async with ActorRuntime() as runtime:
        stage = Stage(runtime, path)
        await runtime.ready(stage.table)
        yield stage


def params(role: Any, key: Any = KEY_A) -> Any:
    return {"meta": roles.parse(role), "servicePublicKey": key}


def statement(
    role: Any, sequence: int, *, keys: KeyPair = KEYS, ttl: float = 30.0, issued: float = 0.0
) -> Any:
    """Params of `lease`; issued so many seconds after the epoch of the test's clock."""
    made = lease.sign(
        keys,
        roles.parse(role),
        instance=INSTANCE,
        sequence=sequence,
        issued=int((EPOCH + issued) * 1000),
        ttl=ttl,
    )
    return {"statement": made.text, "signature": made.signature.hex()}


# What Node clients send


@virtual
async def test_answers_to_node_clients() -> None:
    async with running_table() as stage:
        service, proxy = stage.session(), stage.session(TWO)
        meta = roles.parse("a@1.0.0")
        assert await service.ask("register", params("a@1.0.0")) == {"meta": meta, "ok": True}
        info = {"id": KEY_A, "remotePublicKey": ONE.hex(), "meta": meta}
        assert await proxy.ask("waitFor", roles.parse("a@1.x")) == {"meta": meta, "info": info}
        (item,) = await proxy.ask("query", roles.parse("a@1.x"))
        shape_c = {"servicePublicKey": KEY_A, "role": "a", "version": "1.0.0", "prerelease": []}
        assert item == shape_c
        (item,) = await proxy.ask("query", roles.parse("a@1.x") | {"details": True})
        assert item == shape_c | {"remotePublicKey": ONE.hex(), "meta": meta}
        with pytest.raises(RuntimeError, match="another connection"):
            await proxy.ask("unregister", params("a@1.0.0"))
        assert await service.ask("unregister", params("a@1.0.0")) is ABSENT
        assert await service.ask("unregister", params("a@1.0.0")) is ABSENT
        assert await proxy.ask("query", roles.parse("a")) == []
        assert stage.news == [ServiceRegistered(info), ServiceGone(info)]
        with pytest.raises(RuntimeError, match="Unknown method"):
            await proxy.ask("nosuch")


BAD_META: list[tuple[Any, str]] = [
    (None, "needs params"),
    ([], "needs params"),
    ("text", "needs params"),
    ({}, "needs a meta object"),
    ({"meta": [1]}, "needs a meta object"),
    ({"meta": {}}, "needs a role"),
    ({"meta": {"role": 5, "version": "1.0.0"}}, "needs a role"),
    ({"meta": {"role": "", "version": "1.0.0"}}, "needs a role"),
    ({"meta": {"role": "x" * 1025, "version": "1.0.0"}}, "at most 1024"),
    ({"meta": {"role": "a", "version": "1.0.0", "more": "x" * 66_000}}, "at most 65536"),
    ({"meta": {"role": "a"}, "servicePublicKey": KEY_A}, "^needs to be valid semver$"),
    ({"meta": {"role": "a", "version": 1}, "servicePublicKey": KEY_A}, "valid semver"),
    ({"meta": {"role": "a", "version": "1.x"}, "servicePublicKey": KEY_A}, "valid semver"),
    ({"meta": {"role": "a", "version": "1.0.0"}}, "^info needs an id property$"),
    ({"meta": {"role": "a", "version": "1.0.0"}, "servicePublicKey": "any text"}, "64 hex"),
    ({"meta": {"role": "a", "version": "1.0.0"}, "servicePublicKey": "g" * 64}, "hexadecimal"),
    ({"meta": {"role": "a", "version": "1.0.0"}, "servicePublicKey": [1]}, "64 hex"),
]


@virtual
async def test_refused_registrations() -> None:
    async with running_table() as stage:
        session = stage.session()
        for method in ("register", "unregister"):
            for bad, says in BAD_META:
                with pytest.raises(RuntimeError, match=says):
                    await session.ask(method, bad)
        described = await stage.described()
        assert described["instances"] == 0
        assert described["counters"] == {
            "refused.malformed": 2 * len(BAD_META) - 4,
            "refused.oversized": 4,
        }


@virtual
async def test_refused_questions() -> None:
    async with running_table() as stage:
        session = stage.session()
        bads: list[Any] = [None, [], "a", {}, {"role": 1}, {"role": "a", "version": 3}]
        for bad in bads:
            for method in ("query", "waitFor", "watch"):
                with pytest.raises(RuntimeError):
                    await session.ask(method, bad if method != "watch" else {"id": 1, "x": bad})
        for method in ("waitFor", "watch"):
            with pytest.raises(RuntimeError, match="not a version range"):
                await session.ask(method, roles.parse("a@latest") | {"id": 1})
        assert await session.ask("query", roles.parse("a@latest")) == []
        assert (await stage.described())["watches"] == 0


@virtual
async def test_waiting() -> None:
    async with running_table() as stage:
        proxy, service = stage.session(), stage.session(TWO)
        first = proxy.say("waitFor", roles.parse("a@^1.0.0"))
        second = proxy.say("waitFor", roles.parse("a@2.x"))
        await asyncio.sleep(14.0)
        await service.ask("lease", statement("a@1.4.0", 1, issued=14.0))
        (answer,) = proxy.got
        assert (answer.ticket, answer.result["info"]["id"]) == (first, KEYS.public_key.hex())
        await asyncio.sleep(1.1)
        assert proxy.got[1:] == [TableRefusal(second, "timeout waiting for service")]
        assert (await stage.described())["waiting"] == 0


@pytest.mark.parametrize("details", [False, True])
@virtual
async def test_the_longest_answer_fits_a_line(details: Any) -> None:
    rows_ = Table()
    for number in range(300):
        meta = {"role": "ü" * 1024, "version": "1.0.0", "more": "\u2028" * 1500}
        keys = KeyPair.from_seed(number.to_bytes(32, "big"))
        if number % 2:
            rows_.lease("s", meta, keys, 1)
        else:
            rows_.register("s", meta, keys.public_key, ONE)
    question = {"role": "ü" * 1024, "details": details}
    found = rows_.rows.query("ü" * 1024, None, TWO)
    assert len(found) == rows.MAX_RESULTS
    items = table.answer(question, found)
    line = RpcPeer().reply(RpcRequest("query", question, 1), items)
    assert 10 < len(items) < 256
    assert len(line) < MAX_LINE


# Leases


@virtual
async def test_a_leases_life() -> None:
    async with running_table() as stage:
        service, proxy = stage.session(), stage.session(TWO)
        sent = statement("a@1.0.0", 1)
        assert await service.ask("lease", sent) == {"ttl": 30}
        (item,) = await proxy.ask("query", roles.parse("a") | {"details": True})
        assert item["verified"] is True
        assert (item["statement"], item["signature"]) == (sent["statement"], sent["signature"])
        assert item["servicePublicKey"] == KEYS.public_key.hex()
        await asyncio.sleep(20)
        assert await service.ask("lease", statement("a@1.0.0", 2, issued=20, ttl=2.5)) == {
            "ttl": 2.5
        }
        await asyncio.sleep(2.6)
        assert await proxy.ask("query", roles.parse("a")) == []
        assert await service.ask("lease", statement("a@1.0.0", 3, issued=20)) == {"ttl": 30}
        assert await service.ask("lease", statement("a@1.0.0", 4, issued=20, ttl=0)) == {"ttl": 0}
        assert await proxy.ask("query", roles.parse("a")) == []
        counters = (await stage.described())["counters"]
        assert counters == {"leased": 2, "renewed": 1, "expired": 1, "withdrawn": 1}
        kinds = [type(piece) for piece in stage.news]
        assert kinds == [ServiceRegistered, ServiceGone] * 2


@virtual
async def test_bad_leases_are_refused_counted_and_never_stored(tmp_path: Any) -> None:
    path = tmp_path / "table"
    async with running_table(path) as stage:
        session = stage.session()
        await session.ask("lease", statement("a@1.0.0", 5))
        before = await session.ask("query", {"role": "a", "details": True})
        forged = statement("a@1.0.0", 6) | {"signature": "00" * 64}
        big = roles.parse("a@1.0.0") | {"metadata": "x" * 70_000}
        for bad, says, kind in [
            (forged, "not signed", "forged"),
            (statement("a@1.0.0", 6, issued=-601.0), "601 s ago", "expired"),
            (statement("a@1.0.0", 6, issued=700.0), "700 s from now", "expired"),
            (statement("a@1.0.0", 5), "stale sequence, the last was 5", "replayed"),
            (statement("a@1.0.0", 4), "stale sequence, the last was 5", "replayed"),
            (statement("a@1.0.0", 6) | {"statement": json.dumps(big)}, "at most", "oversized"),
            (statement("a@1.0.0", 6) | {"signature": "no"}, "128 hex", "malformed"),
            (None, "needs params", "malformed"),
        ]:
            count = await stage.counter(f"refused.{kind}")
            with pytest.raises(RuntimeError, match=says):
                await session.ask("lease", bad)
            assert await stage.counter(f"refused.{kind}") == count + 1
        assert await session.ask("query", {"role": "a", "details": True}) == before
        with pytest.raises(RuntimeError, match="only its own key"):
            await session.ask("register", params("a@1.0.0", KEYS.public_key.hex()))
        assert await stage.counter("refused.leased") == 1
    store = Store(path)
    assert [unpacked(record).sequence for record in store.records()] == [5]
    store.close()


@pytest.mark.parametrize("how", ["register", "lease"])
@virtual
async def test_sessions_that_end_and_sessions_that_break(how: Any) -> None:
    async with running_table() as stage:
        proxy = stage.session(TWO)

        async def registered() -> Asker:
            session = stage.session()
            key = KEYS.public_key.hex()
            number = int(asyncio.get_running_loop().time() * 1000) + 1
            issued = asyncio.get_running_loop().time()
            given = params("a@1.0.0", key)
            if how == "lease":
                given = statement("a@1.0.0", number, issued=issued)
            await session.ask(how, given)
            return session

        async def found() -> int:
            return len(await proxy.ask("query", roles.parse("a")))

        await (await registered()).end()
        assert await found() == 0
        await (await registered()).end(BROKEN)
        await asyncio.sleep(4.9)
        assert await found() == 1
        await asyncio.sleep(0.2)
        assert await found() == 0
        await (await registered()).end(BROKEN)
        await asyncio.sleep(4.9)
        again = await registered()
        await asyncio.sleep(10)
        assert await found() == 1
        await again.end(ExitReason("killed"))
        assert await found() == 1


# Watching


def shown(notice: TableNotice) -> list[str]:
    return sorted(item["version"] for item in notice.services)


@virtual
async def test_a_watch_is_told_the_whole_list_at_each_change() -> None:
    async with running_table() as stage:
        service, proxy = stage.session(), stage.session(TWO)
        await service.ask("lease", statement("a@1.0.0", 1))
        watch = roles.parse("a@1.x") | {"id": 7}
        answer = await proxy.ask("watch", watch)
        (item,) = answer["services"]
        assert item["verified"] is True
        assert "statement" in item
        await service.ask("register", params("a@2.0.0"))
        await service.ask("register", params("b@1.0.0"))
        await service.ask("lease", statement("a@1.0.0", 2))
        await asyncio.sleep(1)
        assert proxy.notices == []
        await service.ask("register", params("a@1.5.0"))
        (notice,) = proxy.notices
        assert (notice.watch, shown(notice)) == (7, ["1.0.0", "1.5.0"])
        assert "verified" not in notice.services[0]
        await asyncio.sleep(1)
        await service.ask("unregister", params("a@1.5.0"))
        assert shown(proxy.notices[-1]) == ["1.0.0"]
        await asyncio.sleep(1)
        await service.end(BROKEN)
        await asyncio.sleep(5.1)
        assert shown(proxy.notices[-1]) == []
        assert len(proxy.notices) == 3
        assert await proxy.ask("unwatch", {"id": 7}) == {}
        assert await proxy.ask("unwatch", {"id": 7}) == {}
        await stage.session().ask("register", params("a@1.5.0"))
        assert len(proxy.notices) == 3


@virtual
async def test_changes_are_coalesced_and_the_last_one_is_told() -> None:
    async with running_table() as stage:
        service, proxy = stage.session(), stage.session(TWO)
        await proxy.ask("watch", roles.parse("a") | {"id": 1})
        for number in range(20):
            await service.ask("register", params(f"a@1.{number}.0"))
        await asyncio.sleep(1)
        assert [len(notice.services) for notice in proxy.notices] == [1, 20]


@virtual
async def test_all_watchers_of_a_role_get_one_list_and_parts_of_one_that_is_too_long() -> None:
    async with running_table() as stage:
        service = stage.session()
        askers = [stage.session(bytes([number * 16]) * 32) for number in range(16)]
        askers.append(stage.session(b"\x01" * 32))
        for asker in askers:
            assert await asker.ask("watch", {"id": 1, "role": "a"}) == {"services": []}
        await service.ask("register", params("a@1.0.0"))
        lists = [asker.notices[0].services for asker in askers]
        assert all(one is lists[0] for one in lists)
        for number in range(600):
            key = KeyPair.from_seed(number.to_bytes(32, "big")).public_key.hex()
            service.say("register", params("a@1.0.0", key))
        await asyncio.sleep(2)
        lists = [asker.notices[-1].services for asker in askers]
        assert {len(one) for one in lists} == {rows.MAX_RESULTS}
        assert lists[0] is lists[-1]
        assert len({item["servicePublicKey"] for one in lists for item in one}) > 500
        late = stage.session(b"\x31" * 32)
        answer = await late.ask("watch", {"id": 1, "role": "a"})
        assert answer["services"] == lists[3]


@pytest.mark.parametrize("bad", [None, 0, -1, 1.5, True, "1", 2**53])
@virtual
async def test_a_watch_needs_a_number(bad: Any) -> None:
    async with running_table() as stage:
        session = stage.session()
        with pytest.raises(RuntimeError, match="positive integer"):
            await session.ask("watch", {"id": bad, "role": "a"})
        await session.ask("watch", {"id": 1, "role": "a"})
        with pytest.raises(RuntimeError, match="there already"):
            await session.ask("watch", {"id": 1, "role": "a"})


@virtual
async def test_watches_of_a_dead_session_are_forgotten() -> None:
    async with running_table() as stage:
        session = stage.session()
        await session.ask("watch", {"id": 1, "role": "a"})
        session.say("waitFor", {"role": "a"})
        await asyncio.sleep(0.01)
        await session.end()
        described = await stage.described()
        assert (described["watches"], described["waiting"]) == (0, 0)


# The store


@virtual
async def test_what_was_answered_is_there_after_a_kill(tmp_path: Any) -> None:
    path = tmp_path / "table"
    async with running_table(path) as stage:
        session = stage.session()
        await session.ask("register", params("a@1.0.0"))
        await session.ask("register", params("a@1.1.0"))
        await session.ask("unregister", params("a@1.1.0"))
        await session.ask("lease", statement("a@2.0.0", 5))
        await session.ask("lease", statement("a@2.0.0", 5, keys=OTHER))
        await session.ask("lease", statement("a@2.0.0", 6, keys=OTHER, ttl=0))
        stage.runtime.kill("/table")
    async with running_table(path) as stage:
        session = stage.session()
        items = await session.ask("query", {"role": "a", "details": True})
        assert [(item["version"], item.get("verified")) for item in items] == [
            ("2.0.0", True),
            ("1.0.0", None),
        ]
        for keys in (KEYS, OTHER):
            with pytest.raises(RuntimeError, match="stale sequence"):
                await session.ask("lease", statement("a@2.0.0", 5, keys=keys))
        await asyncio.sleep(29)
        await session.ask("lease", statement("a@2.0.0", 6, issued=29))
        await asyncio.sleep(1.1)
        items = await session.ask("query", {"role": "a", "details": True})
        assert [item["version"] for item in items] == ["2.0.0"]


@virtual
async def test_the_end_of_the_registry_is_not_that_of_its_services(tmp_path: Any) -> None:
    path = tmp_path / "table"
    async with running_table(path) as stage:
        session = stage.session()
        await session.ask("lease", statement("a@1.0.0", 5))
        await session.ask("lease", statement("a@1.0.0", 6))
        await session.end(ExitReason("shutdown", normal=True))
    store = Store(path)
    assert [unpacked(record).sequence for record in store.records()] == [6]
    store.close()


class CountingStore(Store):
    commits: int
    fail: bool

    def commit(self) -> None:
        type(self).commits += bool(self._changes or self._graves)
        if type(self).fail:
            raise CommitFailed("the disk is full: make room there")
        super().commit()


@pytest.fixture
def counting(monkeypatch: Any) -> type[CountingStore]:
    monkeypatch.setattr(table, "Store", CountingStore)
    CountingStore.commits, CountingStore.fail = 0, False
    return CountingStore


@virtual
async def test_one_commit_for_all_that_wait_and_answers_after_it(
    tmp_path: Any, counting: Any
) -> None:
    async with running_table(tmp_path / "table") as stage:
        sessions = [stage.session() for _ in range(20)]
        for number, session in enumerate(sessions):
            session.say("register", params(f"a@1.{number}.0"))
            session.say("query", {"role": "a"})
        await asyncio.sleep(0.01)
        assert counting.commits <= 2
        for session in sessions:
            assert [answer.ticket for answer in session.got] == [1, 2]


@virtual
async def test_renewals_are_written_together_and_late(tmp_path: Any, counting: Any) -> None:
    async with running_table(tmp_path / "table") as stage:
        session = stage.session()
        await session.ask("lease", statement("a@1.0.0", 1))
        await session.ask("lease", statement("a@1.0.0", 1, keys=OTHER))
        before = counting.commits
        for second in range(9):
            for keys in (KEYS, OTHER):
                await session.ask("lease", statement("a@1.0.0", 2 + second, keys=keys))
            await asyncio.sleep(1)
        assert counting.commits - before == 1
        await asyncio.sleep(10)
        assert counting.commits - before == 2


@virtual
async def test_many_renewals_are_written_in_pieces(
    tmp_path: Any, counting: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(table, "MAX_RENEWALS", 2)
    async with running_table(tmp_path / "table") as stage:
        session = stage.session()
        signers = [KeyPair.from_seed(bytes([number]) * 32) for number in range(5)]
        for sequence in (1, 2):
            for keys in signers:
                await session.ask("lease", statement("a@1.0.0", sequence, keys=keys))
        before = counting.commits
        await asyncio.sleep(table.LAZY + 3 * table.RENEWALS_PAUSE)
        assert counting.commits - before == 3
        stage.runtime.kill("/table")
    store = Store(tmp_path / "table")
    assert [unpacked(record).sequence for record in store.records()] == [2] * 5
    store.close()


@virtual
async def test_what_cannot_be_written_is_refused_and_tried_again(
    tmp_path: Any, counting: Any
) -> None:
    async with running_table(tmp_path / "table") as stage:
        session = stage.session()
        counting.fail = True
        with pytest.raises(RuntimeError, match="the disk is full"):
            await session.ask("register", params("a@1.0.0"))
        assert len(await session.ask("query", {"role": "a"})) == 1
        counting.fail = False
        await asyncio.sleep(table.LAZY + 0.1)
        assert await stage.counter("store.failed") == 1
        stage.runtime.kill("/table")
    store = Store(tmp_path / "table")
    assert len([*store.records()]) == 1
    store.close()


@virtual
async def test_a_store_that_is_none_ends_it_before_it_serves(tmp_path: Any) -> None:
    path = tmp_path / "table"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE mine (a)")
    other.close()
    async with ActorRuntime() as runtime:
        address = runtime.spawn(TableActor, TableArgs(path))
        reason = await runtime.stopped(address)
        assert isinstance(reason.exception, LocalError)  # type: ignore[attr-defined]
        assert "another application's" in reason.text


# Looking in


@virtual
async def test_description() -> None:
    async with running_table() as stage:
        one, two = stage.session(), stage.session(TWO)
        await one.ask("register", params("a@1.0.0"))
        await two.ask("lease", statement("a@2.0.0", 1))
        await two.ask("watch", {"id": 1, "role": "b"})
        stage.runtime.system.tell(stage.table, Counted("dropped.slow"))
        await asyncio.sleep(10)
        described = await stage.described()
        assert json.loads(json.dumps(described)) == described
        plain, leased = described.pop("services")
        assert described == {
            "roles": 1,
            "instances": 2,
            "buried": 0,
            "waiting": 0,
            "watches": 1,
            "counters": {"dropped.slow": 1, "leased": 1, "registered": 1},
        }
        assert (plain["key"], plain["verified"], plain["remaining"]) == (KEY_A, False, None)
        assert (plain["role"], plain["version"], plain["instance"]) == ("a", "1.0.0", None)
        assert leased["key"] == KEYS.public_key.hex()
        assert (leased["verified"], leased["instance"]) == (True, INSTANCE)
        assert leased["remaining"] == pytest.approx(20, abs=0.1)
        assert leased["age"] == leased["renewed"] == pytest.approx(10, abs=0.1)
        assert leased["connection"] == TWO.hex()


@virtual
async def test_a_description_has_a_limit(monkeypatch: Any) -> None:
    monkeypatch.setattr(table, "MAX_DESCRIBED", 3)
    async with running_table() as stage:
        session = stage.session()
        for number in range(5):
            await session.ask("register", params(f"a@1.{number}.0"))
        described = await stage.described()
        assert (described["instances"], len(described["services"])) == (5, 3)


@virtual
async def test_one_timer_for_everything() -> None:
    async with running_table() as stage:
        session = stage.session()
        for number in range(50):
            keys = KeyPair.from_seed(number.to_bytes(32, "big"))
            await session.ask("lease", statement("a@1.0.0", 1, keys=keys, ttl=30 + number))
            session.say("waitFor", {"role": f"r{number}"})
        cell = stage.table.target
        timers = [owned for owned in cell.owned if type(owned).__name__ == "Timer"]  # type: ignore[union-attr]
        assert len(timers) == 1
