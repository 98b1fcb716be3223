"""Options that several commands share, and what they mean."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..transport import keys
from ..transport.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..actors.control import ControlArgs
    from ..transport.dht.endpoint import EndpointConfig

#: Ways to choose among services: `actors.balance` has them, which is loaded only when needed.
BALANCES = ("highest", "round-robin", "random", "least-connections", "hash")
#: What each user of a relay may have: `transport.dht.relay_server` has these, and is loaded only
#: when needed.
RELAY_SESSIONS = 256
RELAY_RATE = 16 * 1024 * 1024
#: Characters read of a seed file: white space around the seed is fine.
MAX_SEED_FILE = 4096
#: Characters read of a file of keys: some 15,000 keys.
MAX_KEY_FILE = 1024 * 1024


def key(what: str) -> Callable[[Any, Any, Any], Any]:
    """Checks an option or argument of 64 hexadecimal digits; it is never taken for a number."""

    def parse(_context: Any, parameter: Any, value: Any) -> Any:
        if value is None:
            return None
        try:
            if isinstance(value, tuple):
                return tuple(keys.parse_key(each, what) for each in value)
            return keys.parse_key(value, what)
        except InvalidInput as error:
            raise click.BadParameter(str(error), param=parameter) from error

    return parse


def keys_or_files(what: str) -> Callable[[Any, Any, Any], Any]:
    """Checks a repeatable option: keys of 64 hexadecimal digits, or files with one key a line, in
    which a `#` begins a comment. None when it was not given."""

    def parse(_context: Any, parameter: Any, values: tuple[str, ...]) -> frozenset[bytes] | None:
        try:
            found = {each for value in values for each in _keys_in(value, what)}
        except InvalidInput as error:
            raise click.BadParameter(str(error), param=parameter) from error
        return frozenset(found) if values else None

    return parse


def _keys_in(value: str, what: str) -> list[bytes]:
    try:
        return [keys.parse_key(value, what)]
    except InvalidInput:
        if not os.path.exists(value):
            raise
    try:
        with open(value, errors="replace") as file:
            text = file.read(MAX_KEY_FILE + 1)
    except OSError as error:
        raise InvalidInput(f"cannot read {value}: {error.strerror}") from error
    if len(text) > MAX_KEY_FILE:
        raise InvalidInput(f"{value} has more than {MAX_KEY_FILE} characters: too many keys")
    words = (line.partition("#")[0].strip() for line in text.splitlines())
    return [keys.parse_key(word, f"{what} in {value}") for word in words if word]


def relay_through(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--relay-through",
        metavar="KEY",
        multiple=True,
        callback=key("relay key"),
        help="Key of a blind relay where connections begin for which there is no direct path yet; "
        "repeatable.",
    )(command)


def allow_relay(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--allow-relay",
        "allow_relays",
        metavar="KEY|any",
        multiple=True,
        callback=_relays,
        help="Key of a blind relay that is used when a client names it; repeatable. Those of "
        "--relay-through are allowed.",
    )(command)


def _relays(context: Any, parameter: Any, values: tuple[str, ...]) -> frozenset[bytes] | None:
    """None for all."""
    if "any" in values:
        return None
    return frozenset(key("relay key")(context, parameter, values))


def registry_keys(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument(
        "registry_keys",
        metavar="REGISTRY_KEY...",
        nargs=-1,
        required=True,
        callback=key("registry key"),
    )(command)


def registry_key(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("registry_key", metavar="REGISTRY_KEY", callback=key("registry key"))(
        command
    )


PORT = click.IntRange(0, 65535)
TARGET_PORT = click.IntRange(1, 65535)


def logs(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--log-format",
            type=click.Choice(["human", "json"]),
            default="human",
            show_default=True,
            help="How logs are written to standard error.",
        ),
        click.option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"]),
            default="warning",
            show_default=True,
        ),
    ):
        command = option(command)
    return command


def joining(command: Callable[..., Any]) -> Callable[..., Any]:
    """Of a program that nobody looks into."""
    return logs(_bootstrap(command))


def _bootstrap(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--bootstrap",
        multiple=True,
        metavar="HOST:PORT",
        help="A node of the DHT to join; repeatable. Also HYPERSEAPORT_BOOTSTRAP, separated by "
        "commas. Without either: the public HyperDHT.",
    )(command)


def network(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        _bootstrap,
        click.option(
            "--control",
            "control_path",
            type=click.Path(dir_okay=False, path_type=str),
            help="Where the control socket is made.  [default: the platform's place for a user's "
            "sockets]",
        ),
        click.option("--no-control", is_flag=True, help="Make no control socket."),
    ):
        command = option(command)
    return logs(command)


def as_json(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="For programs.")(command)


def where(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--control",
        "target",
        type=click.Path(dir_okay=False, path_type=str),
        help="The control socket to ask.  [default: all of this user's programs]",
    )(command)


def seed(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--seed",
            metavar="HEX",
            callback=key("seed"),
            help="Seed of the key pair, 64 hexadecimal digits. Every user of this machine can read "
            "a command line: prefer --seed-file or HYPERSEAPORT_SEED.",
        ),
        click.option(
            "--seed-file",
            type=click.Path(exists=True, dir_okay=False, path_type=str),
            help="A file that holds the seed.",
        ),
    ):
        command = option(command)
    return command


def key_pair(seed: bytes | None, seed_file: str | None) -> keys.KeyPair | None:
    """The identity that was asked for, the command line before the file before the environment."""
    if seed is None and seed_file is not None:
        seed = keys.parse_key(_read(seed_file), f"seed in {seed_file}")
    if seed is None and os.environ.get("HYPERSEAPORT_SEED"):
        seed = keys.parse_key(os.environ["HYPERSEAPORT_SEED"], "seed in HYPERSEAPORT_SEED")
    return None if seed is None else keys.KeyPair.from_seed(seed)


def own_key_pair(who: str, seed: bytes | None, seed_file: str | None) -> keys.KeyPair:
    """The same for a program that others know by its key, which has to stay what it is."""
    pair = key_pair(seed, seed_file)
    if pair is None:
        raise InvalidInput(
            f"a {who} needs a seed: give --seed-file FILE, HYPERSEAPORT_SEED or --seed HEX "
            "(hyperseaport seed makes one)"
        )
    return pair


def _read(seed_file: str) -> str:
    """The beginning of a file that may be anything."""
    try:
        with open(seed_file, errors="replace") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(MAX_SEED_FILE)
    except OSError as error:
        raise InvalidInput(f"cannot read {seed_file}: {error.strerror}") from error
    if stat.S_ISREG(mode) and mode & 0o077:
        import structlog

        structlog.get_logger().warning(
            "others can read the seed", file=seed_file, advice=f"chmod 600 {seed_file}"
        )
    return text


def control(command: str, network: dict[str, Any], **summary: Any) -> ControlArgs | None:
    """Where the program can be looked into, and what it says of itself there: JSON values."""
    if network["no_control"]:
        return None
    from ..actors.control import ControlArgs
    from ..actors.runtime_files import control_path

    given = network["control_path"]
    path = Path(given).absolute() if given else control_path(command)
    return ControlArgs(path, command, summary)


def pairs(given: tuple[str, ...]) -> dict[str, str]:
    """What options of the form NAME=VALUE say. Raises `InvalidInput`."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise InvalidInput(f"{text!r} is not NAME=VALUE")
        found[name] = value
    return found


def registry_store(pair: keys.KeyPair, data_dir: str | None) -> Path:
    """The file in which the registry of this key keeps its registrations."""
    asked = data_dir or os.environ.get("HYPERSEAPORT_DATA_DIR")
    if not asked:
        import platformdirs

        asked = platformdirs.user_data_dir("hyperseaport")
    return Path(asked) / f"registry-{pair.public_key.hex()[:16]}.sqlite"


def bootstrap(network: dict[str, Any]) -> tuple[str, ...] | None:
    """What was asked for; None for the public network. Raises `InvalidInput`."""
    from ..transport.machine import parse_address

    given = network["bootstrap"]
    if not given:
        parts = os.environ.get("HYPERSEAPORT_BOOTSTRAP", "").split(",")
        given = [part.strip() for part in parts if part.strip()]
    for text in given:
        parse_address(text)
    return tuple(given) or None


def endpoint(network: dict[str, Any]) -> EndpointConfig:
    from ..transport.dht.endpoint import EndpointConfig

    log_to(network)
    asked = bootstrap(network)
    return EndpointConfig() if asked is None else EndpointConfig(bootstrap=asked)


def log_to(options: dict[str, Any]) -> None:
    """Logs go to standard error, standard output belongs to what users and scripts read."""
    import logging

    import structlog

    renderer: Any
    if options["log_format"] == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        # Not the default, which prints the values of variables: there may be secrets among them.
        plain = structlog.dev.plain_traceback
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=plain
        )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            getattr(logging, options["log_level"].upper())
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
