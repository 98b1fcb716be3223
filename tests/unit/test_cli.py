"""What the command line makes of words, files and the environment. Trees are not run here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog

import hyperseaport
from hyperseaport import cli
from hyperseaport.actors import demo, deployment
from hyperseaport.actors.endpoint import EndpointActor
from hyperseaport.actors.messages import RegistryListening
from hyperseaport.supervisor import SupervisorSpec
from hyperseaport.transport.dht.endpoint import PUBLIC_BOOTSTRAP, EndpointConfig
from hyperseaport.transport.dht.relay_server import RelayLimits
from hyperseaport.transport.keys import KeyPair

SEED = "c84c7034a0309479299d81468b7bc59592a96b3a919fd1ff159aea1879407382"
OTHER = "ab" * 32
THIRD = "cd" * 32
KEY = "5b64a8956d8f2404c4f4b4e6f402ef439f610f7fe297718093641359130b0d45"
LOCAL = "127.0.0.1:9"
COMMANDS = (
    *("seed", "registry", "service", "proxy", "relay", "dht", "demo"),
    *("list", "doctor", "status", "tree", "why", "kill"),
)


def pair(seed: str) -> KeyPair:
    return KeyPair.from_seed(bytes.fromhex(seed))


class Console:
    """Runs commands in this process; trees are kept instead of run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capfd = capfd
        self.trees: list[SupervisorSpec] = []
        #: What the tree that is run dies of.
        self.death: str | None = None
        self.out = self.err = ""

    def __call__(self, *words: str) -> int:
        def run(tree: SupervisorSpec) -> str | None:
            self.trees.append(tree)
            return self.death

        self._monkeypatch.setattr(deployment, "run", run)
        self._monkeypatch.setattr(sys, "argv", ["hyperseaport", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        self.out, self.err = self._capfd.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code

    def refuses(self, *words: str, code: int = 2) -> str:
        """The one line on standard error."""
        assert self(*words) == code
        assert self.out == ""
        assert self.trees == []
        (line,) = self.err.splitlines()
        assert line.startswith("hyperseaport: ")
        return line

    def accepts(self, *words: str) -> SupervisorSpec:
        assert self(*words) == 0, self.err
        return self.trees[-1]

    def args(self, child: str) -> Any:
        """Args of a child of the last tree, by id, wherever it is."""
        left = list(self.trees[-1].children)
        while left:
            each = left.pop()
            if each.id == child:
                return each.args
            if isinstance(each.args, SupervisorSpec):
                left += each.args.children
        raise AssertionError(f"no child {child}")

    @property
    def endpoint(self) -> EndpointConfig:
        config = self.args("endpoint")
        assert isinstance(config, EndpointConfig)
        return config


@pytest.fixture
def console(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Console]:
    for name in ("HYPERSEAPORT_SEED", "HYPERSEAPORT_BOOTSTRAP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield Console(monkeypatch, capfd)
    structlog.reset_defaults()


def secret(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def command(*words: str, environment: Mapping[str, str] | None = None) -> Any:
    """A process of its own, with nothing else of ours in the environment."""
    return subprocess.run(
        [sys.executable, "-m", "hyperseaport.cli", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": "/nowhere"} | dict(environment or {}),
    )


# Without a command


def test_without_a_command_it_helps(console: Console) -> None:
    assert console() in (0, 2)  # as click's versions do
    text = console.out + console.err
    assert text.startswith("Usage: hyperseaport")
    for name in COMMANDS:
        assert f"\n  {name} " in text


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help(console: Console, name: str, option: str) -> None:
    assert console(*name.split(), option) == 0
    assert console.out.startswith(f"Usage: hyperseaport {name}".rstrip())
    assert console.err == ""


def test_version(console: Console) -> None:
    assert console("--version") == 0
    assert console.out == f"{hyperseaport.__version__}\n"


def test_installed_and_as_a_module_it_is_the_same() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"{hyperseaport.__version__}\n")


# Errors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["registri"], "No such command 'registri'"),
        (["--loud"], "No such option"),
        (["seed", "more"], "unexpected extra argument"),
        (["registry"], "a registry needs a seed: give --seed-file FILE"),
        (["registry", "--seed"], "requires an argument"),
        (["registry", "--seed", SEED[1:]], "a seed has 64 hexadecimal digits, this one has 63"),
        (["registry", "--seed", "x" * 64], "a seed has hexadecimal digits only"),
        (["registry", "--seed", SEED, "--bootstrap", "127.0.0.1"], "is not HOST:PORT"),
        (["registry", "--seed", SEED, "--bootstrap", "127.0.0.1:0"], "is not HOST:PORT"),
        (["registry", "--seed", SEED, "--bootstrap", ":1"], "is not HOST:PORT"),
        (["registry", "--seed", SEED, "--log-level", "loud"], "'loud' is not one of"),
        (["registry", "--seed", SEED, "--log-format", "xml"], "'xml' is not one of"),
        (["registry", "--seed-file", "missing"], "'missing' does not exist"),
        (["registry", "--seed-file", "."], "'.' is a directory"),
        (["service"], "Missing argument 'REGISTRY_KEY...'"),
        (["service", KEY, "-r", "a@1.0.0"], "Missing option '-p'"),
        (["service", KEY, "-p", "1"], "Missing option '-r'"),
        (["service", KEY[1:], "-p", "1", "-r", "a@1.0.0"], "a registry key has 64"),
        (["service", KEY, "-p", "0", "-r", "a@1.0.0"], "0 is not in the range"),
        (["service", KEY, "-p", "65536", "-r", "a@1.0.0"], "65536 is not in the range"),
        (["service", KEY, "-p", "http", "-r", "a@1.0.0"], "'http' is not a valid integer range"),
        (["service", KEY, "-p", "1", "-r", "a"], "the role 'a' has no version"),
        (["service", KEY, "-p", "1", "-r", "a@1.x"], "'1.x' is not a version"),
        (["service", KEY, "-p", "1", "-r", ""], "the role '' has no name"),
        (["service", KEY, "-p", "1", "-r", "a@1.0.0", "--allow", "x"], "a client key has 64"),
        (["service", KEY, "-p", "1", "-r", "a@1.0.0", "--seed", "x"], "a seed has 64"),
        (["service", KEY, "-p", "1", "-r", "a@1.0.0", "--allow-relay", "x"], "a relay key has 64"),
        (["proxy", KEY, "-p", "1", "-r", "a@1.x", "--relay-through", "x"], "a relay key has 64"),
        (["proxy", KEY, "-r", "a@1.x"], "Missing option '-p'"),
        (["proxy", KEY, "-p", "-1", "-r", "a@1.x"], "-1 is not in the range"),
        (["proxy", KEY, "-p", "1", "-r", "a@b c d"], "is not a version range"),
        (["relay"], "a relay needs a seed: give --seed-file FILE"),
        (["relay", "--seed", SEED, "--allow", "x"], "a key has 64"),
        (["relay", "--seed", SEED, "--max-sessions", "0"], "0 is not in the range"),
        (["relay", "--seed", SEED, "--max-rate", "1"], "1 is not in the range"),
        (["dht", "--port", "none"], "'none' is not a valid integer range"),
        (["dht", "--nodes", "0"], "0 is not in the range"),
        (["dht", "--nodes", "65"], "65 is not in the range"),
        (["dht", "--port", "65535", "--nodes", "2"], "choose a lower --port"),
        (["dht", "--host", "0.0.0.0", "--port", "0"], "is not an IPv4 address"),
        (["dht", "--bootstrap", "nowhere"], "is not HOST:PORT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words(console: Console, words: list[str], says: str) -> None:
    assert says in console.refuses(*words)


def test_what_the_tree_dies_of_is_one_line_and_exit_code_1(console: Console) -> None:
    console.death = "cannot listen on 127.0.0.1:1 (Address already in use): choose another port"
    assert console("registry", "--seed", SEED, "--bootstrap", LOCAL) == 1
    assert console.out == ""
    assert console.err == f"hyperseaport: {console.death}\n"


def test_an_address_that_is_not_ours_is_exit_code_1(console: Console) -> None:
    line = console.refuses("dht", "--host", "192.0.2.1", "--port", "0", code=1)
    assert "cannot listen on 192.0.2.1" in line


def test_an_interrupt_before_the_tree_runs(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(deployment, "registry_tree", interrupted)
    assert console("registry", "--seed", SEED) == 1
    assert console.err.strip() == ""


# seed


def test_seed_prints_the_lines_that_people_know(console: Console) -> None:
    seeds = set()
    for _ in range(2):
        assert console("seed") == 0
        match = re.fullmatch(
            r"\nGenerated a random seed for you!\n--seed ([0-9a-f]{64})\n"
            r"services and proxies will connect with pubkey ([0-9a-f]{64})\n",
            console.out,
        )
        assert match
        assert str(pair(match[1])) == match[2]
        seeds.add(match[1])
    assert len(seeds) == 2


# The relay


def test_a_relay_and_its_limits(console: Console, tmp_path: Path) -> None:
    console.accepts("relay", "--seed", SEED, "--bootstrap", LOCAL)
    assert console.args("listener").key_pair == pair(SEED)
    assert console.args("listener").allow is console.args("books").allow is None
    assert console.args("books").limits == RelayLimits()
    console.accepts("relay", "--seed", SEED, "--max-sessions", "3", "--max-rate", "5000")
    assert console.args("books").limits == RelayLimits(sessions_per_key=3, rate=5000)
    (tmp_path / "keys").write_text(f"{OTHER}  # one\n")
    console.accepts("relay", "--seed", SEED, "--allow", KEY, "--allow", "keys")
    allowed = frozenset(map(bytes.fromhex, (KEY, OTHER)))
    assert console.args("listener").allow == console.args("books").allow == allowed


# Which seed


def registry_pair(console: Console) -> KeyPair:
    found = console.args("replica")
    assert isinstance(found, KeyPair)
    return found


def test_the_seed_of_the_readme(console: Console) -> None:
    console.accepts("registry", "--seed", SEED, "--bootstrap", LOCAL)
    assert str(registry_pair(console)) == KEY


def test_the_command_line_goes_before_the_file_before_the_environment(
    console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HYPERSEAPORT_SEED", THIRD)
    console.accepts("registry")
    assert registry_pair(console) == pair(THIRD)
    file = secret(tmp_path / "seed", f"  {OTHER}\r\n")
    console.accepts("registry", "--seed-file", file)
    assert registry_pair(console) == pair(OTHER)
    console.accepts("registry", "--seed-file", file, "--seed", SEED)
    assert registry_pair(console) == pair(SEED)


def test_it_is_the_identity_of_services_and_proxies_too(console: Console) -> None:
    console.accepts("service", KEY, "-p", "1", "-r", "a@1.0.0", "--seed", SEED)
    assert console.args("announcement").key_pair == pair(SEED)
    console.accepts("proxy", KEY, "-p", "1", "-r", "a@1.x", "--seed", SEED)
    assert console.args("listener").key_pair == pair(SEED)
    console.accepts("proxy", KEY, "-p", "1", "-r", "a@1.x")
    assert console.args("listener").key_pair != pair(SEED)


@pytest.mark.parametrize(
    "seed", ["1" * 64, "0" * 64, "12345678" * 8, "1" * 31 + "e" + "1" * 32, SEED.upper()]
)
def test_a_seed_is_never_a_number_and_of_any_case(console: Console, seed: str) -> None:
    console.accepts("registry", "--seed", seed)
    assert registry_pair(console) == pair(seed)


@pytest.mark.parametrize("key", [KEY.upper(), "1" * 64])
def test_neither_is_a_registry_key(console: Console, key: str) -> None:
    console.accepts("service", key, "-p", "1", "-r", "a@1.0.0")
    assert console.args("link") == (bytes.fromhex(key),)


@pytest.mark.parametrize("text", ["", "\n", f"--seed {SEED}\n", f"{SEED}\n{SEED}\n", "\x00\xff"])
def test_a_file_that_holds_something_else(console: Console, tmp_path: Path, text: str) -> None:
    file = secret(tmp_path / "seed", text)
    line = console.refuses("registry", "--seed-file", file)
    assert f"seed in {file} has" in line
    # It may be somebody's secret all the same.
    assert SEED not in line


def test_a_file_without_an_end(console: Console) -> None:
    assert "seed in /dev/zero" in console.refuses("registry", "--seed-file", "/dev/zero")


def test_a_file_that_cannot_be_read(console: Console) -> None:
    line = console.refuses("registry", "--seed-file", "/proc/self/mem")
    assert line == "hyperseaport: cannot read /proc/self/mem: Input/output error"


def test_a_bad_seed_in_the_environment(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERSEAPORT_SEED", SEED[1:])
    line = console.refuses("registry")
    assert "a seed in HYPERSEAPORT_SEED has 64 hexadecimal digits" in line
    assert SEED[1:] not in line
    monkeypatch.setenv("HYPERSEAPORT_SEED", "")
    assert "a registry needs a seed" in console.refuses("registry")


@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o400, 0), (0o644, 1), (0o640, 1)])
def test_a_file_that_others_can_read_is_worth_a_warning(
    console: Console, tmp_path: Path, mode: int, warned: int
) -> None:
    file = secret(tmp_path / "seed", SEED, mode)
    console.accepts("registry", "--seed-file", file, "--log-format", "json")
    entries = [json.loads(line) for line in console.err.splitlines()]
    assert len(entries) == warned
    for entry in entries:
        assert entry["level"] == "warning"
        assert entry["advice"] == f"chmod 600 {file}"
        assert SEED not in str(entry)


# Which network


def test_bootstrap_nodes(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    console.accepts("registry", "--seed", SEED)
    assert console.endpoint == EndpointConfig()
    monkeypatch.setenv("HYPERSEAPORT_BOOTSTRAP", " 192.0.2.1:1 ,, 192.0.2.2:2,")
    console.accepts("registry", "--seed", SEED)
    assert console.endpoint.bootstrap == ("192.0.2.1:1", "192.0.2.2:2")
    console.accepts(
        "registry", "--seed", SEED, "--bootstrap", LOCAL, "--bootstrap", "192.0.2.3@name:3"
    )
    assert console.endpoint.bootstrap == (LOCAL, "192.0.2.3@name:3")


@pytest.mark.parametrize("nothing", ["", " ", ",", " , ,"])
def test_an_empty_environment_variable_is_none(
    console: Console, monkeypatch: pytest.MonkeyPatch, nothing: str
) -> None:
    monkeypatch.setenv("HYPERSEAPORT_BOOTSTRAP", nothing)
    console.accepts("registry", "--seed", SEED)
    assert console.endpoint.bootstrap == PUBLIC_BOOTSTRAP


@pytest.mark.parametrize("name", ["registry", "service", "proxy", "dht"])
def test_a_bad_part_of_the_environment(
    console: Console, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words = {
        "registry": ["--seed", SEED],
        "service": [KEY, "-p", "1", "-r", "a@1.0.0"],
        "proxy": [KEY, "-p", "1", "-r", "a@1.x"],
        "dht": ["--port", "0"],
    }[name]
    monkeypatch.setenv("HYPERSEAPORT_BOOTSTRAP", "192.0.2.1:1,nowhere")
    assert "'nowhere' is not HOST:PORT" in console.refuses(name, *words)


# What else is said reaches the tree


def test_service_options(console: Console) -> None:
    words = ["service", KEY, "-p5984", "-r", "couchdb@3.2.2", "--host", "192.0.2.9"]
    console.accepts(*words, "--allow", OTHER, "--allow", THIRD.upper())
    args = console.args("listener")
    assert (args.host, args.port) == ("192.0.2.9", 5984)
    assert console.args("announcement").meta["hash"] == "couchdb|3.2.2|"
    assert args.allow == {bytes.fromhex(OTHER), bytes.fromhex(THIRD)}
    assert [key.hex() for key in console.args("link")] == [KEY]
    console.accepts("service", KEY, "--port", "5984", "--role", "couchdb@3.2.2")
    args = console.args("listener")
    assert (args.host, args.allow) == ("127.0.0.1", None)


def test_proxy_options(console: Console) -> None:
    console.accepts("proxy", KEY, "-p", "0", "-r", "couchdb@3.x", "--host", "127.0.0.2")
    args = console.args("listener")
    assert (args.host, args.reserved is None) == ("127.0.0.2", False)
    assert console.args("resolver").meta["version"] == "3.x"
    console.accepts("proxy", KEY, "-p", "5985", "-r", "couchdb")
    assert console.args("listener").host == "127.0.0.1"


def test_blind_relays(console: Console) -> None:
    first, second = bytes.fromhex(OTHER), bytes.fromhex(THIRD)
    service = ["service", KEY, "-p", "5984", "-r", "couchdb@3.2.2"]
    proxy = ["proxy", KEY, "-p", "5985", "-r", "couchdb"]
    for words in (service, proxy):
        console.accepts(*words)
        assert console.args("listener").relay_through == ()
        console.accepts(*words, "--relay-through", OTHER, "--relay-through", THIRD)
        assert console.args("listener").relay_through == (first, second)
    console.accepts(*service)
    assert console.args("listener").allow_relays == frozenset()
    console.accepts(*service, "--allow-relay", OTHER, "--allow-relay", THIRD)
    assert console.args("listener").allow_relays == {first, second}
    console.accepts(*service, "--allow-relay", OTHER, "--allow-relay", "any")
    assert console.args("listener").allow_relays is None


def test_dht_options(console: Console) -> None:
    def nodes() -> list[EndpointConfig]:
        tree = console.args("node")
        children = [child for child in tree.children if child.actor is EndpointActor]
        return [child.args for child in children]

    console.accepts("dht", "--port", "40000")
    assert [node.port for node in nodes()] == [40000, 40001, 40002, 40003]
    console.accepts("dht", "--port", "40000", "--bootstrap", LOCAL)
    assert nodes() == [EndpointConfig((LOCAL,), "0.0.0.0", 40000)]
    console.accepts("dht", "--host", "127.0.0.1", "--nodes", "2")
    assert [node.port for node in nodes()] == [49737, 49738]


# What is printed


def test_news_go_to_standard_output_line_by_line(console: Console) -> None:
    console.accepts("registry", "--seed", SEED)
    console.args("console")(RegistryListening(bytes.fromhex(KEY)))
    out = console._capfd.readouterr().out
    assert out == f"Registry listening. Connect with pubkey  {KEY}\n"


def test_logs_as_json_are_one_object_a_line(console: Console) -> None:
    console.accepts("registry", "--seed", SEED, "--log-format", "json", "--log-level", "info")
    log = structlog.get_logger().bind(actor="/root")
    log.debug("not shown")
    log.info("shown", reason="two\nlines", key=b"\x01")
    try:
        raise ValueError("with a\ntraceback")
    except ValueError:
        log.exception("failed")
    out, err = console._capfd.readouterr()
    assert out == ""
    entries = [json.loads(line) for line in err.splitlines()]
    assert [entry["event"] for entry in entries] == ["shown", "failed"]
    assert entries[0]["level"] == "info"
    assert entries[0]["actor"] == "/root"
    assert "timestamp" in entries[0]
    assert "ValueError" in entries[1]["exception"]


@pytest.mark.parametrize(("level", "lines"), [("debug", 4), ("warning", 2), ("error", 1)])
def test_log_levels(console: Console, level: str, lines: int) -> None:
    console.accepts("registry", "--seed", SEED, "--log-level", level)
    log = structlog.get_logger()
    for each in ("debug", "info", "warning", "error"):
        getattr(log, each)("event")
    out, err = console._capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == lines
    assert "\x1b" not in err


def test_a_reader_that_has_left_ends_nothing() -> None:
    code = (
        "import os, sys; from hyperseaport.cli import _print\n"
        "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)\n"
        "_print('one'); _print('two'); print('alive', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "alive\n")


@pytest.mark.parametrize("status", [0, 1])
def test_demo_exits_as_the_demonstration_ends(
    console: Console, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(demo, "run", lambda say: say("shown") or status)
    assert console("demo", "--log-level", "error") == status
    assert console.out == "shown\n"


def test_a_real_process_fails_in_one_line() -> None:
    done = command("registry", environment={"HYPERSEAPORT_SEED": "no seed"})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "hyperseaport: a seed in HYPERSEAPORT_SEED has 64 hexadecimal digits, this one has 7\n"
    )
