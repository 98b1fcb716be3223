"""What `status` shows of each program, to the letter, from what such programs answer."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyperseaport.commands import looking

NOW = 1_700_000_000.0
KEY = "5b64a8956d8f2404" * 4
OTHER = "ab" * 32
REGISTRY = "67ccd1f727165d17" * 4
AWAY = "0123456789abcdef" * 4
EVIL = "\x1b[31mred\r\n\x07\x9b\u202e\u2028"
#: As it is shown.
TAMED = r"\x1b[31mred\x0d\x0a\x07\x9b\u202e\u2028"


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


def program(command: str, actors: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "command": command,
        "pid": 7,
        "uptime": 7400.0,
        "summary": {},
        "actors": actors,
        "choices": [],
        "restarts": 0,
        "failures": [],
    } | more


def endpoint(received: int, sent: int, traffic: float | None = None) -> dict[str, Any]:
    metrics = {"channels": 1, "bytes.received": received, "bytes.sent": sent, "udx.dropped": 0}
    return {
        "address": "127.0.0.1:5000",
        "firewalled": True,
        "nodes": 4,
        "traffic_age_s": traffic,
        "metrics": metrics,
    }


def link(key: str, *, connected: bool = True, **more: Any) -> dict[str, Any]:
    return {
        "registry": key,
        "connected": connected,
        "since": NOW - 7200,
        "age": 1.5,
        "error": None,
        "registrations": [],
    } | more


def row(key: str = KEY, **more: Any) -> dict[str, Any]:
    return {
        "key": key,
        "role": "web",
        "version": "1.2.3",
        "state": "taken",
        "reason": "newest version",
        "connections": 0,
    } | more


def proxy() -> dict[str, Any]:
    actors = {
        "/node/endpoint": endpoint(1_300_000, 4_200, 3.04),
        "/node/link": {"live": True},
        "/node/links/67ccd1f7": link(REGISTRY),
        "/node/proxy:1/resolver": {
            "role": "web",
            "range": "1.x",
            "balance": "highest",
            "registry": True,
            "age": 1.426,
        },
        "/node/proxy:1/listener": {
            "address": "127.0.0.1",
            "port": 51521,
            "accepted": 17,
            "refused": 0,
        },
        "/node/pipes": {"children": 2},
    }
    choice = {
        "path": "/node/proxy:1/resolver",
        "states": {"taken": 1},
        "used": [row(connections=2)],
        "more": 0,
    }
    return program("proxy", actors, choices=[choice], summary={"role": "web@1.x", "port": 0})


def service() -> dict[str, Any]:
    held = {"role": "web@1.2.3", "service": KEY, "state": "leased", "lease": 21.0, "refusal": None}
    actors = {
        "/node/endpoint": endpoint(0, 0),
        "/node/links/67ccd1f7": link(REGISTRY, registrations=[held]),
        "/node/service:web@1.2.3/listener": {
            "key": KEY,
            "target": "127.0.0.1:18080",
            "allowed": None,
            "accepted": 1,
            "refused": 0,
        },
        "/node/service:web@1.2.3/health": {
            "check": "http:/",
            "healthy": True,
            "since": NOW - 300,
            "last_probe_age": 4.6,
            "last_reason": "answered 200",
            "failures": 0,
        },
        "/node/service:web@1.2.3/announcement": {
            "role": "web",
            "version": "1.2.3",
            "key": KEY,
            "registries": {REGISTRY: {"registered": True, "verified": True, "age": 9.0}},
        },
        "/node/pipes": {"children": 0},
    }
    return program("service", actors, summary={"role": "web@1.2.3", "port": 18080})


def entry(**more: Any) -> dict[str, Any]:
    return {
        "role": "web",
        "version": "1.2.3",
        "key": KEY,
        "verified": True,
        "instance": "55ad53ba56079502" * 2,
        "age": 300.0,
        "remaining": 21.0,
    } | more


def registry(*services: Any, instances: int = 0) -> dict[str, Any]:
    actors = {
        "/node/endpoint": endpoint(758, 1_100),
        "/node/registry/table": {
            "roles": 1,
            "instances": instances or len(services),
            "counters": {"leased": 1},
            "services": list(services),
        },
        "/node/registry/server": {
            "public_key": REGISTRY,
            "sessions": 2,
            "allowed": {"connect": None, "register": None, "query": None},
            "counters": {"accepted": 5},
        },
        "/node/registry/sessions": {"children": 2},
    }
    return program("registry", actors, summary={"key": REGISTRY})


def relay() -> dict[str, Any]:
    counted = {"accepted": 12, "refused": 0, "paired": 4, "ignored": 0}
    counted |= {"expired": 1, "cancelled": 0, "silent": 0}
    actors = {
        "/node/endpoint": endpoint(758, 1100),
        "/node/relay/books": {
            "sessions": 5,
            "keys": 3,
            "waiting": 1,
            "pairs": 2,
            "bytes": 2 * 1024 * 1024,
            "dropped": 0,
            "strangers": 0,
            "counters": counted,
        },
        "/node/relay/sessions": {"children": 5},
        "/node/relay/listener": {
            "public_key": REGISTRY,
            "allowed": None,
            "accepted": 12,
            "refused": 0,
        },
    }
    summary = {"key": REGISTRY, "max_sessions": 64, "max_rate": 16 * 1024 * 1024}
    return program("relay", actors, summary=summary)


def dht() -> dict[str, Any]:
    metrics = {
        "dht.received": 60,
        "dht.ignored": 1,
        "dht.malformed": 2,
        "dht.unmatched": 3,
        "dht.responses": 4,
        "dht.requests": 5,
    }
    nodes = {"address": "127.0.0.1:49737", "firewalled": False, "nodes": 3, "metrics": metrics}
    return program("dht", {"/node/node-0": nodes, "/node/node-1": {"metrics": {}}})


class Screen:
    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def lines(self, answer: Any, **options: Any) -> list[str]:
        # As it comes through the socket.
        answer = json.loads(json.dumps(answer))
        self._monkeypatch.setattr(looking, "_ask", lambda *_: answer)
        self._capsys.readouterr()
        self.code = looking.status(target="/somewhere", **options)
        return self._capsys.readouterr().out.split("\n")[:-1]

    def fact(self, answer: Any, name: str) -> list[str]:
        """What is said under this name, and below it."""
        found: list[str] = []
        current = ""
        for line in self.lines(answer)[1:]:
            if not line.startswith("  "):
                break
            label, _, value = line[2:].partition("  ")
            current = label.strip() or current
            if current == name:
                found.append(value.strip())
        return found


@pytest.fixture
def screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Screen:
    return Screen(capsys, monkeypatch)


# The proxy


def test_a_proxy(screen: Screen) -> None:
    assert screen.lines(proxy()) == [
        "proxy web@1.x (process 7), up 2 h",
        "  listening    127.0.0.1:51521, balance highest",
        "  instances    1 known, 1 usable, 0 set aside",
        "  uses         web@1.2.3 5b64a895: newest version, 2 connections",
        "  connections  2 now, 17 since start",
        "  traffic      last 3.0 s ago",
        "  bytes        1.2 MiB received, 4.1 KiB sent",
        "  registry     67ccd1f7 connected for 2 h, heard 1.5 s ago",
        "  restarts     none",
    ]


def test_a_proxy_in_trouble(screen: Screen) -> None:
    answer = proxy()
    answer["choices"][0] |= {
        "states": {"taken": 1, "candidate": 2, "set aside": 3, "refused": 4},
        "used": [
            row(connections=1),
            row(OTHER, state="set aside", reason="no answer", connections=2),
        ],
        "more": 3,
    }
    actors = answer["actors"]
    actors["/node/proxy:1/resolver"] |= {"registry": False, "age": 200.0}
    actors["/node/proxy:1/listener"]["refused"] = 4
    actors["/node/links/67ccd1f7"] |= {
        "connected": False,
        "since": NOW - 190,
        "age": 200.0,
        "error": EVIL,
    }
    actors["/node/links/01234567"] = link(AWAY, connected=False, since=None, age=None)
    answer |= {
        "restarts": 5,
        "failures": [
            {"path": "/node/endpoint", "restarts": 2, "last_reason": "killed", "since": 1.0},
            {"path": "/node/link", "restarts": 2, "last_reason": "x" * 100, "since": 2.0},
            {"path": "/console", "restarts": 1, "last_reason": "killed", "since": 3.0},
        ],
    }
    assert screen.lines(answer)[2:] == [
        "  instances    10 known, 3 usable, 3 set aside, 4 not verified, as of 3 min ago",
        "  uses         web@1.2.3 5b64a895: newest version, 1 connection",
        "               web@1.2.3 abababab: set aside, no answer, 2 connections",
        "               and 3 more: see `why`",
        "  connections  2 now, 17 since the listener's start, 4 refused",
        "  traffic      last 3.0 s ago",
        "  bytes        1.2 MiB received, 4.1 KiB sent",
        f"  registry     67ccd1f7 away for 3 min, heard 3 min ago: {TAMED}",
        "  registry     01234567 not asked yet",
        f"  restarts     5 (/node/endpoint: killed; /node/link: {'x' * 77}...; "
        "and 1 more: see `tree`)",
    ]


@pytest.mark.parametrize(
    ("states", "says"),
    [({}, "none: no instance is known"), ({"set aside": 2}, "none of them: see `why`")],
)
def test_a_proxy_with_nowhere_to_go(screen: Screen, states: Any, says: str) -> None:
    answer = proxy()
    answer["choices"][0] |= {"states": states, "used": []}
    assert screen.fact(answer, "uses") == [says]


def test_a_proxy_that_starts(screen: Screen) -> None:
    answer = program("proxy", {}, summary={"role": "web@1.x", "port": 0})
    assert screen.lines(answer) == [
        "proxy web@1.x (process 7), up 2 h",
        "  listening    not yet",
        "  connections  0 now, 0 since start",
        "  bytes        0 B received, 0 B sent",
        "  restarts     none",
    ]


# The service


def test_a_service(screen: Screen) -> None:
    assert screen.lines(service()) == [
        "service web@1.2.3 (process 7), up 2 h",
        "  key          5b64a895",
        "  target       127.0.0.1:18080",
        "  health       healthy for 5 min: answered 200 4.6 s ago (http:/)",
        "  registry     67ccd1f7 leased, 21 s left, registered 9.0 s ago",
        "  connections  0 now, 1 since start",
        "  traffic      none yet",
        "  bytes        0 B received, 0 B sent",
        "  restarts     none",
    ]


def held(state: str, **more: Any) -> list[Any]:
    return [{"state": state, "lease": None, "refusal": None} | more]


@pytest.mark.parametrize(
    ("registrations", "says"),
    [
        ([], "not registered"),
        (held("waiting"), "not registered yet"),
        (held("registered"), "registered without a lease"),
        (held("refused", refusal=EVIL), f"refused: {TAMED}"),
        (held("waiting", refusal="later"), "refused: later"),
    ],
)
def test_a_registration(screen: Screen, registrations: Any, says: str) -> None:
    answer = service()
    actors = answer["actors"]
    actors["/node/service:web@1.2.3/announcement"]["registries"] = {}
    actors["/node/links/67ccd1f7"]["registrations"] = registrations
    assert screen.fact(answer, "registry") == [f"67ccd1f7 {says}"]
    actors["/node/links/67ccd1f7"] |= {"connected": False, "error": "gone"}
    assert screen.fact(answer, "registry") == [
        f"67ccd1f7 {says}; away for 2 h, heard 1.5 s ago: gone"
    ]


@pytest.mark.parametrize(
    ("health", "says"),
    [
        (None, "not checked"),
        ({"healthy": None, "since": None, "last_probe_age": None}, "not known yet (http:/)"),
        (
            {"healthy": False, "last_reason": EVIL},
            f"unhealthy for 5 min: {TAMED} 4.6 s ago (http:/)",
        ),
    ],
)
def test_health(screen: Screen, health: Any, says: str) -> None:
    answer = service()
    if health is None:
        del answer["actors"]["/node/service:web@1.2.3/health"]
    else:
        answer["actors"]["/node/service:web@1.2.3/health"] |= health
    assert screen.fact(answer, "health") == [says]


def test_a_service_for_some(screen: Screen) -> None:
    answer = service()
    answer["actors"]["/node/service:web@1.2.3/listener"] |= {"allowed": 1, "refused": 2}
    assert screen.fact(answer, "key") == ["5b64a895, for 1 client only"]
    assert screen.fact(answer, "connections") == ["0 now, 1 since start, 2 refused"]


def test_a_service_that_starts(screen: Screen) -> None:
    answer = program("service", {"/node/links/67ccd1f7": link(REGISTRY)})
    assert screen.lines(answer)[1:] == [
        "  health       not checked",
        "  registry     67ccd1f7 not registered",
        "  connections  0 now, 0 since start",
        "  bytes        0 B received, 0 B sent",
        "  restarts     none",
    ]


# The registry


def test_a_registry(screen: Screen) -> None:
    plain = entry(role=EVIL, key=OTHER, verified=False, instance=None, remaining=None)
    assert screen.lines(registry(entry(), plain)) == [
        "registry (process 7), up 2 h",
        f"  key        {REGISTRY}",
        "  instances  2 of 1 role: 1 verified, 1 unverified",
        "  sessions   2 now, 5 since start",
        "  policy     open: everybody may register and look for services",
        "  bytes      758 B received, 1.1 KiB sent",
        "  restarts   none",
        "",
        "SERVICE" + " " * 40 + "KEY       VERIFIED  LEASE  AGE    INSTANCE",
        f"web@1.2.3{' ' * 38}5b64a895  yes       21 s   5 min  55ad53ba",
        f"{TAMED}@1.2.3  abababab  no        -      5 min  -",
    ]


def test_a_registry_that_refuses(screen: Screen) -> None:
    answer = registry()
    server = answer["actors"]["/node/registry/server"]
    server["allowed"] |= {"register": 3, "query": 1}
    server["counters"] |= {"refused": 2}
    counters = answer["actors"]["/node/registry/table"]["counters"]
    counters |= {"refused.forged": 7, "refused.policy": 0, "refused.limit": 1}
    assert screen.fact(answer, "policy") == ["3 keys may register, 1 key may look for services"]
    assert screen.fact(answer, "refused") == ["2 sessions, 7 forged, 1 limit"]
    server["allowed"] |= {"connect": 2, "register": None}
    assert screen.fact(answer, "policy") == [
        "2 keys may connect, everybody may register, 1 key may look for services"
    ]


def test_a_registry_that_was_restarted(screen: Screen) -> None:
    answer = registry()
    answer["restarts"] = 1
    assert screen.fact(answer, "sessions") == ["2 now, 5 since the server's start"]
    assert screen.fact(answer, "restarts") == ["1"]


def test_a_registry_of_many(screen: Screen) -> None:
    lines = screen.lines(registry(*[entry()] * 20))
    assert len([line for line in lines if line.startswith("web@")]) == 20
    assert not lines[-1].startswith("...")
    answer = registry(*[entry()] * 25, instances=1400)
    lines = screen.lines(answer)
    assert len([line for line in lines if line.startswith("web@")]) == 20
    assert lines[-1] == f"... and 1380 more: hyperseaport list {REGISTRY}"
    assert screen.fact(answer, "instances") == [
        "1400 of 1 role: 25 verified, 0 unverified of the first 25"
    ]


def test_a_registry_that_starts(screen: Screen) -> None:
    assert screen.lines(program("registry", {}, summary={"key": REGISTRY}))[1:] == [
        f"  key       {REGISTRY}",
        "  bytes     0 B received, 0 B sent",
        "  restarts  none",
    ]


# The relay


def test_a_relay(screen: Screen) -> None:
    assert screen.lines(relay()) == [
        "relay (process 7), up 2 h",
        f"  key        {REGISTRY}",
        "  sessions   5 of 3 keys, 12 since start",
        "  pairs      2 now, 1 waiting for the other half, 4 since start",
        "  passed on  2.0 MiB",
        "  each key   64 sessions, 16 MiB/s",
        "  policy     open: everybody may use it",
        "  restarts   none",
    ]


def test_a_relay_that_drops_and_refuses(screen: Screen) -> None:
    answer = relay()
    books = answer["actors"]["/node/relay/books"]
    books |= {"dropped": 7, "keys": 1}
    assert screen.fact(answer, "dropped") == ["7 above the rate (packets)"]
    books |= {"strangers": 2}
    assert screen.fact(answer, "dropped") == ["7 above the rate and 2 from strangers (packets)"]
    assert screen.fact(answer, "refused") == []
    books["counters"] |= {"refused": 3, "ignored": 4}
    answer["actors"]["/node/relay/listener"] |= {"refused": 1, "allowed": 1}
    assert screen.fact(answer, "refused") == ["4 sessions, 4 requests"]
    assert screen.fact(answer, "policy") == ["1 key may"]
    assert screen.fact(answer, "sessions") == ["5 of 1 key, 12 since start"]


def test_a_relay_that_starts(screen: Screen) -> None:
    assert screen.lines(program("relay", {}, summary={"key": REGISTRY}))[1:] == [
        f"  key       {REGISTRY}",
        "  restarts  none",
    ]


# DHT nodes, and what is none of these


def test_dht_nodes(screen: Screen) -> None:
    assert screen.lines(dht()) == [
        "dht (process 7), up 2 h",
        "  restarts  none",
        "",
        "NODE    ADDRESS          KNOWN NODES  REQUESTS",
        "node-0  127.0.0.1:49737  3            50",
        "node-1  not yet          -            0",
    ]


def test_another_program(screen: Screen) -> None:
    answer = program("later", {"/node/x": {"a": {"b": [1]}, "metrics": {"c": 0, "d": 1}}}, role="x")
    assert screen.lines(answer) == [
        "later (process 7), up 2 h",
        "",
        "ACTOR    WHAT       VALUE",
        "/node/x  a.b        [1]",
        "         metrics.d  1",
    ]


# All of them

PROGRAMS = [proxy, service, lambda: registry(entry()), relay, dht]


@pytest.mark.parametrize("make", PROGRAMS)
def test_everything_is_there_when_asked_for(screen: Screen, make: Any) -> None:
    brief, full = screen.lines(make()), screen.lines(make(), verbose=True)
    assert full[: len(brief)] == brief
    shown = "\n".join(full[len(brief) :])
    assert shown.startswith("\nACTOR ")
    for path, fields in make()["actors"].items():
        assert path in shown
        for name in fields:
            assert name in shown
    (document,) = screen.lines(make(), as_json=True)
    (answer,) = json.loads(document)["programs"]
    assert answer == {"control": "/somewhere"} | make()


@pytest.mark.parametrize("make", PROGRAMS)
def test_on_a_terminal(screen: Screen, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = screen.lines(make())
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    drawn = screen.lines(make())
    assert drawn[0] == f"\x1b[1m{plain[0]}\x1b[0m"
    words = [line.split() for line in plain[1:] if line]
    assert [line.split() for line in drawn[1:] if line.strip(" ─")] == words


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every object or list within this one, with each of its keys."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, -(10**400)])
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@given(st.sampled_from(PROGRAMS), st.integers(0, 10_000), json_values | st.none())
@settings(
    deadline=None,
    derandomize=True,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_part_of_an_answer_is_trusted(
    screen: Screen, make: Any, where: int, instead: Any
) -> None:
    """Each with one part of it replaced."""
    answer = copy.deepcopy(make())
    found = list(places(answer))
    holder, key = found[where % len(found)]
    holder[key] = instead
    for verbose in (False, True):
        lines = screen.lines(answer, verbose=verbose)
        assert all(line.isprintable() for line in lines)
        not_understood = lines == ["what /somewhere answers is not understood"]
        assert screen.code == (1 if not_understood else 0)


def test_nothing_is_shown_of_what_is_not_understood_in_the_end(screen: Screen) -> None:
    answer = registry(entry())
    answer["failures"] = 7
    assert screen.lines(answer) == ["what /somewhere answers is not understood"]
