"""The command line: parse, build a deployment, boot the actor system, print."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .transport import keys
from .transport.errors import HyperseaportError, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from .supervisor import SupervisorSpec
    from .transport.dht.endpoint import EndpointConfig

#: Exit codes beside 0.
FAILURE = 1
USAGE = 2
#: Characters read of a seed file: white space around the seed is fine.
MAX_SEED_FILE = 4096


def main() -> None:
    """Entry point of the `hyperseaport` command."""
    try:
        status = cli.main(prog_name="hyperseaport", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        status = exit_.exit_code
    except click.Abort:
        status = FAILURE
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "hyperseaport"
        click.echo(f"hyperseaport: {error.format_message()} (see {command} --help)", err=True)
        status = USAGE
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except InvalidInput as error:
        click.echo(f"hyperseaport: {error}", err=True)
        status = USAGE
    except HyperseaportError as error:
        click.echo(f"hyperseaport: {error}", err=True)
        status = FAILURE
    sys.exit(status if isinstance(status, int) else 0)


def _key(what: str) -> Callable[[Any, Any, Any], Any]:
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


_PORT = click.IntRange(0, 65535)
_TARGET_PORT = click.IntRange(1, 65535)


def _log_options(command: Callable[..., Any]) -> Callable[..., Any]:
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


def _network_options(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--bootstrap",
        multiple=True,
        metavar="HOST:PORT",
        help="A node of the DHT to join; repeatable. Also HYPERSEAPORT_BOOTSTRAP, separated by "
        "commas. Without either: the public HyperDHT.",
    )(_log_options(command))


def _seed_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--seed",
            metavar="HEX",
            callback=_key("seed"),
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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(version)s")
def cli() -> None:
    """Service registry and TCP proxy over secure p2p."""


@cli.command()
def seed() -> None:
    """Make a seed for a registry."""
    pair = keys.KeyPair.generate()
    _print("")
    _print("Generated a random seed for you!")
    _print(f"--seed {pair.seed.hex()}")
    _print(f"services and proxies will connect with pubkey {pair}")


@cli.command()
@_seed_options
@_network_options
def registry(seed: bytes | None, seed_file: str | None, **network: Any) -> None:
    """Serve a registry under the key of a seed."""
    endpoint = _network(network)
    pair = _key_pair(seed, seed_file)
    if pair is None:
        raise InvalidInput(
            "a registry needs a seed: give --seed-file FILE, HYPERSEAPORT_SEED or --seed HEX "
            "(hyperseaport seed makes one)"
        )
    from .actors import deployment, news

    _serve(deployment.registry_tree(endpoint, pair, news.registry(_print)))


@cli.command()
@click.argument("registry_key", metavar="REGISTRY_KEY", callback=_key("registry key"))
@click.option("-p", "--port", type=_TARGET_PORT, required=True, help="TCP port of the service.")
@click.option("-r", "--role", required=True, metavar="ROLE@VERSION")
@click.option("--host", default="127.0.0.1", show_default=True, help="Host of the service.")
@click.option(
    "--allow",
    metavar="KEY",
    multiple=True,
    callback=_key("client key"),
    help="Key of a client that may connect; repeatable. Without it, everybody may.",
)
@_seed_options
@_network_options
def service(
    registry_key: bytes,
    port: int,
    role: str,
    host: str,
    allow: tuple[bytes, ...],
    seed: bytes | None,
    seed_file: str | None,
    **network: Any,
) -> None:
    """Register the TCP service on PORT as ROLE@VERSION."""
    from .actors import deployment, news

    tree = deployment.service_tree(
        _network(network),
        registry_key,
        role,
        host=host,
        port=port,
        key_pair=_key_pair(seed, seed_file),
        allow=frozenset(allow) or None,
        show=news.service(_print),
    )
    _serve(tree)


@cli.command()
@click.argument("registry_key", metavar="REGISTRY_KEY", callback=_key("registry key"))
@click.option("-p", "--port", type=_PORT, required=True, help="Local TCP port; 0 takes a free one.")
@click.option("-r", "--role", required=True, metavar="ROLE@RANGE")
@click.option("--host", default="127.0.0.1", show_default=True, help="Local address to listen on.")
@_seed_options
@_network_options
def proxy(
    registry_key: bytes,
    port: int,
    role: str,
    host: str,
    seed: bytes | None,
    seed_file: str | None,
    **network: Any,
) -> None:
    """Make the service that matches ROLE@RANGE available on a local PORT."""
    from .actors import deployment, news

    tree = deployment.proxy_tree(
        _network(network),
        registry_key,
        role,
        host=host,
        port=port,
        key_pair=_key_pair(seed, seed_file),
        show=news.proxy(_print, role),
    )
    _serve(tree)


@cli.command()
@click.option("--host", help="Address to serve on, as others reach it.  [default: 127.0.0.1]")
@click.option(
    "--port",
    type=_PORT,
    default=49737,
    show_default=True,
    help="UDP port of the first node, the others take the following ones; 0 takes free ones.",
)
@click.option(
    "--nodes",
    type=click.IntRange(1, 64),
    help="Nodes in this process.  [default: 4; 1 with --bootstrap]",
)
@_network_options
def dht(host: str | None, port: int, nodes: int | None, **network: Any) -> None:
    """Serve DHT nodes: without --bootstrap, the seed of a private network."""
    from .actors import deployment, news

    bootstrap = _bootstrap(network) or ()
    nodes = nodes or (1 if bootstrap else deployment.SEED_NODES)
    tree = deployment.dht_tree(
        bootstrap, host=host, port=port, nodes=nodes, show=news.dht(_print, nodes)
    )
    _log_to(network)
    _serve(tree)


@cli.command()
@_log_options
def demo(**network: Any) -> None:
    """Run the whole thing on this machine: DHT, registry, service, proxy, and one request."""
    from .actors import demo as demonstration

    _log_to(network)
    sys.exit(demonstration.run(_print))


def _print(line: str) -> None:
    """Whoever reads us through a pipe waits for these lines. Once nobody reads any more, they are
    dropped: the program goes on."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _serve(tree: SupervisorSpec) -> None:
    from .actors import deployment

    reason = deployment.run(tree)
    if reason is not None:
        click.echo(f"hyperseaport: {reason}", err=True)
        sys.exit(FAILURE)


def _key_pair(seed: bytes | None, seed_file: str | None) -> keys.KeyPair | None:
    """The identity that was asked for, the command line before the file before the environment."""
    if seed is None and seed_file is not None:
        seed = keys.parse_key(_read(seed_file), f"seed in {seed_file}")
    if seed is None and os.environ.get("HYPERSEAPORT_SEED"):
        seed = keys.parse_key(os.environ["HYPERSEAPORT_SEED"], "seed in HYPERSEAPORT_SEED")
    return None if seed is None else keys.KeyPair.from_seed(seed)


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


def _bootstrap(network: dict[str, Any]) -> tuple[str, ...] | None:
    """What was asked for; None for the public network. Raises `InvalidInput`."""
    from .transport.dht.endpoint import parse_address

    given = network["bootstrap"]
    if not given:
        parts = os.environ.get("HYPERSEAPORT_BOOTSTRAP", "").split(",")
        given = [part.strip() for part in parts if part.strip()]
    for text in given:
        parse_address(text)
    return tuple(given) or None


def _network(network: dict[str, Any]) -> EndpointConfig:
    from .transport.dht.endpoint import EndpointConfig

    _log_to(network)
    bootstrap = _bootstrap(network)
    if bootstrap is None:
        return EndpointConfig()
    return EndpointConfig(bootstrap=bootstrap)


def _log_to(options: dict[str, Any]) -> None:
    """Logs go to standard error, standard output belongs to what users and scripts read."""
    import logging

    import structlog

    renderer: Any
    if options["log_format"] == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
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


if __name__ == "__main__":
    main()
