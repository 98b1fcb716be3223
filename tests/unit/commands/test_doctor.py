"""What people and programs are told of a host, for every kind of it."""

from __future__ import annotations

import json
import sys

import pytest
import structlog
from msgspec.structs import replace

from hyperseaport import cli
from hyperseaport.actors import doctor as examiner
from hyperseaport.commands import doctor
from hyperseaport.transport.dht.endpoint import EndpointConfig
from hyperseaport.transport.dht.examine import Findings
from hyperseaport.transport.dht.messages import Firewall
from hyperseaport.transport.errors import ConnectError

BOOTSTRAP = ("11.0.1.1:49737", "11.0.2.1:49737")
HOME, PUBLIC = "192.168.1.10", "11.0.9.1"

OPEN = Findings(
    (PUBLIC,),
    6,
    (0.005, 0.0405, 0.0421, 0.0423, 0.043, 0.0507),
    Firewall.OPEN,
    ((50001, ((PUBLIC, 50001),)), (50002, ((PUBLIC, 50002),))),
    port_kept=True,
    stable=True,
)
FORWARDED = replace(OPEN, local_hosts=(HOME, "10.0.0.7"), hairpin=True)
CONSISTENT = replace(FORWARDED, firewall=Firewall.CONSISTENT, hairpin=False)
FILTERED = replace(OPEN, firewall=Firewall.CONSISTENT)
RANDOM = replace(
    CONSISTENT,
    firewall=Firewall.RANDOM,
    seen=(
        (50001, tuple((PUBLIC, port) for port in range(7001, 7007))),
        (50002, tuple((PUBLIC, port) for port in range(8001, 8004))),
    ),
    port_kept=False,
    hairpin=None,
)
DISAGREEING = replace(CONSISTENT, firewall=Firewall.UNKNOWN, port_kept=None, hairpin=None)
SMALL = replace(DISAGREEING, asked=2, round_trips=(0.04, 0.05))
ALONE = replace(DISAGREEING, asked=1, round_trips=(0.04,))
UNSTABLE = replace(CONSISTENT, stable=False)
LOSSY = replace(CONSISTENT, asked=16)
SILENT = Findings((HOME,), 2, ())
OFFLINE = Findings(("127.0.0.1",), 2, ())
EVERY = (OPEN, FORWARDED, CONSISTENT, FILTERED, RANDOM, DISAGREEING, SMALL, ALONE, UNSTABLE, LOSSY)

RELAY = (
    "For connections with hosts behind random NATs, start `hyperseaport relay` on a host that "
    "anybody reaches, and give `--relay-through KEY` to the service here or to the proxy here."
)
PUNCHED = (
    "lets only answers in, so both sides have to send first: connections open directly, after one "
    "or two round trips more than with an open host."
)
SEARCHED = (
    "With a host behind a random NAT that takes some seconds, as its port has to be searched for."
)


@pytest.mark.parametrize(
    ("findings", "means", "todo"),
    [
        (
            OPEN,
            [
                "Anybody reaches this host: connections open directly, whatever the other side is "
                "behind."
            ],
            [
                "Nothing. Should two other hosts of yours not reach each other, this is a place "
                "for the relay between them: `hyperseaport relay`."
            ],
        ),
        (CONSISTENT, [f"The NAT {PUNCHED}", SEARCHED], ["Nothing."]),
        (
            FILTERED,
            [f"A firewall {PUNCHED}", SEARCHED],
            ["Nothing. Letting UDP in would make connections open faster."],
        ),
        (
            RANDOM,
            [
                "The NAT takes another port for each destination, so nobody can tell beforehand "
                "where this host will be seen.",
                "With an open host connections open directly. With a host behind a consistent NAT "
                "that takes some seconds, as the port has to be searched for. With a host behind "
                "another random NAT they open only through a relay.",
            ],
            [
                RELAY,
                "Or have the router keep the port of each socket, which routers call "
                "endpoint-independent mapping, full cone or static port.",
            ],
        ),
        (
            DISAGREEING,
            [
                "The nodes do not agree on where this host is: only connections with open hosts "
                "are certain to open."
            ],
            [
                "See that all UDP leaves this host by one way (no second router, no VPN for a part "
                "of it), and try again."
            ],
        ),
        (
            SMALL,
            [
                "Only 2 nodes answer, and it takes 3 to tell what a NAT does: only connections "
                "with open hosts are certain to open."
            ],
            [
                "Add nodes to the network: `hyperseaport dht --nodes 4` is four of them. If it has "
                "more than have answered, see whether UDP gets to them."
            ],
        ),
        (
            UNSTABLE,
            [
                f"The NAT {PUNCHED}",
                SEARCHED,
                "The same nodes saw this host somewhere else a few seconds later: a router forgets "
                "what it has let out, or the way out changes. Connections break when that happens.",
            ],
            [
                "Nothing.",
                "Have the router remember UDP for 30 seconds or more, and try again: `hyperseaport "
                "doctor`.",
            ],
        ),
        (
            LOSSY,
            [
                f"The NAT {PUNCHED}",
                SEARCHED,
                "10 of 16 nodes did not answer: they are gone, or packets get lost on the way.",
            ],
            ["Nothing."],
        ),
    ],
    ids=["open", "consistent", "filtered", "random", "disagreeing", "small", "unstable", "lossy"],
)
def test_what_it_means_and_what_to_do(
    findings: Findings, means: list[str], todo: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.meaning(findings) == means
    assert doctor.advice(findings) == todo
    doctor.show(findings, BOOTSTRAP)
    lines = capsys.readouterr().out.splitlines()
    at, then = lines.index("what it means"), lines.index("what to do")
    assert lines[at + 1 : then - 1] == [f"  {each}" for each in means]
    assert lines[then + 1 :] == [f"  {each}" for each in todo]


def test_one_node_is_one_node() -> None:
    (said,) = [each for each in doctor.meaning(ALONE) if "Only" in each]
    assert said.startswith("Only 1 node answers, and it takes 3 ")


def told(findings: Findings, capsys: pytest.CaptureFixture[str]) -> list[str]:
    doctor.show(findings, BOOTSTRAP)
    lines = capsys.readouterr().out.splitlines()
    return lines[: lines.index("")]


def test_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(CONSISTENT, capsys) == [
        "this host from outside",
        "  local       192.168.1.10, 10.0.0.7",
        "  port 50001  seen at 11.0.9.1:50001",
        "  port 50002  seen at 11.0.9.1:50002",
        "  NAT         consistent: one place for each socket, and only answers get in",
        "  port kept   yes",
        "  stable      yes, over 3 s",
        "  hairpin     no",
        "  DHT nodes   6 of 6 answer: 5 / 42 / 51 ms",
    ]
    assert told(RANDOM, capsys)[2:8] == [
        "  port 50001  seen at 11.0.9.1:7001, 11.0.9.1:7002, 11.0.9.1:7003, 11.0.9.1:7004 and 2 "
        "more",
        "  port 50002  seen at 11.0.9.1:8001, 11.0.9.1:8002, 11.0.9.1:8003",
        "  NAT         random: another port for each destination",
        "  port kept   no",
        "  stable      yes, over 3 s",
        "  hairpin     not known",
    ]


@pytest.mark.parametrize(
    ("findings", "nat"),
    [
        (OPEN, "none"),
        (FORWARDED, "open: strangers get in"),
        (FILTERED, "none, but only answers get in"),
        (DISAGREEING, "unknown"),
        (replace(DISAGREEING, local_hosts=(PUBLIC,)), "unknown"),
    ],
)
def test_the_kind(findings: Findings, nat: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"  NAT         {nat}" in told(findings, capsys)


def test_other_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert "  hairpin     not needed" in told(OPEN, capsys)
    assert "  stable      no, over 3 s" in told(UNSTABLE, capsys)
    assert "  port kept   not known" in told(DISAGREEING, capsys)
    unseen = replace(CONSISTENT, seen=((50001, ()), (50002, ((PUBLIC, 50002),))))
    assert "  port 50001  nobody sees it" in told(unseen, capsys)


def test_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show(RANDOM, BOOTSTRAP, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told.pop("means") == doctor.meaning(RANDOM)
    assert told.pop("do") == doctor.advice(RANDOM)
    assert told == {
        "reachable": True,
        "nat": "random",
        "local": [HOME, "10.0.0.7"],
        "sockets": [
            {"port": 50001, "seen": [f"11.0.9.1:{port}" for port in range(7001, 7007)]},
            {"port": 50002, "seen": ["11.0.9.1:8001", "11.0.9.1:8002", "11.0.9.1:8003"]},
        ],
        "port_kept": False,
        "stable": True,
        "hairpin": None,
        "nodes": {"asked": 6, "answered": 6, "min_ms": 5.0, "median_ms": 42.2, "max_ms": 50.7},
    }


@pytest.mark.parametrize("findings", EVERY)
def test_every_kind_has_a_name_and_sentences(
    findings: Findings, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.show(findings, BOOTSTRAP, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["nat"] in ("open", "consistent", "random", "unknown")
    for sentence in (*said["means"], *said["do"]):
        assert sentence.endswith(".")


BLOCKED_LINE = (
    "the DHT cannot be reached, no answer from 11.0.1.1:49737, 11.0.2.1:49737: this host is "
    "offline, UDP is blocked here, or nothing runs there; let UDP out to any port, or give "
    "--bootstrap"
)
OFFLINE_LINE = "this host is in no network: no interface but the loopback has an IPv4 address"


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("findings", "line"), [(SILENT, BLOCKED_LINE), (OFFLINE, OFFLINE_LINE)])
def test_nobody_answers(
    findings: Findings, line: str, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConnectError) as raised:
        doctor.show(findings, BOOTSTRAP, as_json=as_json)
    assert str(raised.value) == line
    printed = capsys.readouterr().out
    if not as_json:
        assert printed == ""
        return
    told = json.loads(printed)
    assert (told["reachable"], told["means"], told["do"]) == (False, [line], [])
    assert told["nodes"]["median_ms"] is None


def test_a_private_network_on_this_host_needs_no_interface() -> None:
    assert "127.0.0.1:9" in doctor.unreachable(OFFLINE, ["127.0.0.1:9"])


class Command:
    """`hyperseaport doctor` on a host of which nothing is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, findings: Findings) -> None:
        self._monkeypatch = monkeypatch
        self._findings = findings
        self.configs: list[EndpointConfig] = []
        monkeypatch.setattr(examiner, "examine", self._examine)
        monkeypatch.delenv("HYPERSEAPORT_BOOTSTRAP", raising=False)

    async def _examine(self, config: EndpointConfig) -> Findings:
        self.configs.append(config)
        return self._findings

    def __call__(self, *words: str) -> int:
        self._monkeypatch.setattr(sys, "argv", ["hyperseaport", "doctor", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        structlog.reset_defaults()
        code = stopped.value.code
        assert isinstance(code, int)
        return code


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = Command(monkeypatch, CONSISTENT)
    assert command() == 0
    assert capsys.readouterr().out.startswith("this host from outside\n")
    assert command("--json", "--bootstrap", BOOTSTRAP[0], "--host", HOME) == 0
    assert json.loads(capsys.readouterr().out)["nat"] == "consistent"
    assert command.configs == [
        EndpointConfig(),
        EndpointConfig(bootstrap=BOOTSTRAP[:1], host=HOME),
    ]


def test_the_command_where_nobody_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command(monkeypatch, SILENT)
    words = [word for each in BOOTSTRAP for word in ("--bootstrap", each)]
    assert command(*words) == 1
    assert capsys.readouterr() == ("", f"hyperseaport: {BLOCKED_LINE}\n")
    assert command("--bootstrap", "nowhere") == 2
