"""The command line: parse, build a deployment, boot the actor system, print."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .commands import options
from .transport import keys
from .transport.errors import HyperseaportError, InvalidInput

if TYPE_CHECKING:
    from .supervisor import SupervisorSpec

#: Exit codes beside 0.
FAILURE = 1
USAGE = 2


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
@options.seed
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=str),
    help="Where registrations are kept. Also HYPERSEAPORT_DATA_DIR.  [default: the platform's "
    "place for a user's data]",
)
@click.option("--memory", is_flag=True, help="Keep nothing: a restarted registry begins empty.")
@click.option(
    "--allow-register",
    metavar="KEY|FILE",
    multiple=True,
    callback=options.keys_or_files("key"),
    help="Key that may register services, its own or those it connects for; repeatable. A file has "
    "one key a line. Without it, everybody may who knows the registry's key.",
)
@click.option(
    "--allow-query",
    metavar="KEY|FILE",
    multiple=True,
    callback=options.keys_or_files("key"),
    help="Key that may look for services; repeatable. Without it, everybody may.",
)
@options.network
def registry(
    seed: bytes | None,
    seed_file: str | None,
    data_dir: str | None,
    memory: bool,
    allow_register: frozenset[bytes] | None,
    allow_query: frozenset[bytes] | None,
    **network: Any,
) -> None:
    """Serve a registry under the key of a seed."""
    endpoint = options.endpoint(network)
    pair = options.own_key_pair("registry", seed, seed_file)
    if memory and data_dir is not None:
        raise InvalidInput("--memory keeps nothing: leave --data-dir out")
    from .actors import deployment, news

    tree = deployment.registry_tree(
        endpoint,
        pair,
        news.registry(_print),
        store=None if memory else options.registry_store(pair, data_dir),
        allow_register=allow_register,
        allow_query=allow_query,
        control=options.control("registry", network, key=str(pair)),
    )
    _serve(tree)


@cli.command()
@options.registry_keys
@click.option(
    "-p", "--port", type=options.TARGET_PORT, required=True, help="TCP port of the service."
)
@click.option("-r", "--role", required=True, metavar="ROLE@VERSION")
@click.option("--host", default="127.0.0.1", show_default=True, help="Host of the service.")
@click.option("-t", "--tag", "tags", multiple=True, metavar="TEXT", help="A tag; repeatable.")
@click.option(
    "--metadata",
    multiple=True,
    metavar="NAME=VALUE",
    help="What else clients are told of the service; repeatable.",
)
@click.option(
    "--allow",
    metavar="KEY|FILE",
    multiple=True,
    callback=options.keys_or_files("client key"),
    help="Key of a client that may connect; repeatable. A file has one key a line. Without it, "
    "everybody may.",
)
@options.relay_through
@options.allow_relay
@click.option(
    "--health-check",
    metavar="tcp|http:PATH",
    help="Register the service only while it answers.",
)
@click.option(
    "--health-interval",
    type=click.FloatRange(0.1, 3600),
    default=5.0,
    show_default=True,
    help="Seconds between checks.",
)
@click.option(
    "--health-threshold",
    type=click.IntRange(1, 1000),
    default=3,
    show_default=True,
    help="Checks that fail one after the other until the service counts as down.",
)
@options.seed
@options.network
def service(
    registry_keys: tuple[bytes, ...],
    port: int,
    role: str,
    host: str,
    tags: tuple[str, ...],
    metadata: tuple[str, ...],
    allow: frozenset[bytes] | None,
    relay_through: tuple[bytes, ...],
    allow_relays: frozenset[bytes] | None,
    health_check: str | None,
    health_interval: float,
    health_threshold: int,
    seed: bytes | None,
    seed_file: str | None,
    **network: Any,
) -> None:
    """Register the TCP service on PORT as ROLE@VERSION, with each of the registries."""
    from .actors import deployment, news

    check = None
    if health_check is not None:
        from .actors import health

        check = health.HealthArgs(
            host, port, health.parse(health_check), health_interval, health_threshold
        )
    tree = deployment.service_tree(
        options.endpoint(network),
        registry_keys,
        role,
        host=host,
        port=port,
        key_pair=options.key_pair(seed, seed_file),
        allow=allow,
        relay_through=relay_through,
        allow_relays=allow_relays,
        show=news.service(_print),
        tags=tags,
        metadata=options.pairs(metadata),
        health=check,
        control=options.control("service", network, role=role, port=port),
    )
    _serve(tree)


@cli.command()
@options.registry_keys
@click.option(
    "-p", "--port", type=options.PORT, required=True, help="Local TCP port; 0 takes a free one."
)
@click.option("-r", "--role", required=True, metavar="ROLE@RANGE")
@click.option("--host", default="127.0.0.1", show_default=True, help="Local address to listen on.")
@click.option(
    "--balance",
    type=click.Choice(options.BALANCES),
    default="highest",
    show_default=True,
    help="Which of several services that match a connection goes to.",
)
@click.option(
    "--connect-timeout",
    type=click.FloatRange(0.1, 3600),
    default=10.0,
    show_default=True,
    help="Seconds in which a connection must have reached a service.",
)
@click.option(
    "--no-wait", is_flag=True, help="Close a connection at once when no service is known."
)
@click.option(
    "--verified-only",
    is_flag=True,
    help="Use only services that have signed their registration with their own key.",
)
@options.relay_through
@options.seed
@options.network
def proxy(
    registry_keys: tuple[bytes, ...],
    port: int,
    role: str,
    host: str,
    balance: str,
    connect_timeout: float,
    no_wait: bool,
    verified_only: bool,
    relay_through: tuple[bytes, ...],
    seed: bytes | None,
    seed_file: str | None,
    **network: Any,
) -> None:
    """Make the service that matches ROLE@RANGE available on a local PORT."""
    from .actors import deployment, news

    tree = deployment.proxy_tree(
        options.endpoint(network),
        registry_keys,
        role,
        host=host,
        port=port,
        key_pair=options.key_pair(seed, seed_file),
        show=news.proxy(_print, role),
        balance=balance,
        connect_timeout=connect_timeout,
        wait=not no_wait,
        verified_only=verified_only,
        relay_through=relay_through,
        control=options.control("proxy", network, role=role, port=port),
    )
    _serve(tree)


@cli.command()
@options.seed
@click.option(
    "--allow",
    metavar="KEY|FILE",
    multiple=True,
    callback=options.keys_or_files("key"),
    help="Key that may use the relay; repeatable. A file has one key a line. Without it, everybody "
    "may who knows the relay's key.",
)
@click.option(
    "--max-sessions",
    type=click.IntRange(1, 10_000),
    default=options.RELAY_SESSIONS,
    show_default=True,
    help="Sessions that each key may have at a time. A Node program has one for each connection "
    "through the relay, ours one for all.",
)
@click.option(
    "--max-rate",
    type=click.IntRange(1024),
    default=options.RELAY_RATE,
    show_default=True,
    metavar="BYTES/S",
    help="What the relay passes on for each key; it drops what exceeds that.",
)
@options.network
def relay(
    seed: bytes | None,
    seed_file: str | None,
    allow: frozenset[bytes] | None,
    max_sessions: int,
    max_rate: int,
    **network: Any,
) -> None:
    """Relay connections of those who cannot reach each other, under the key of a seed. The relay
    cannot read them."""
    endpoint = options.endpoint(network)
    pair = options.own_key_pair("relay", seed, seed_file)
    from .actors import deployment, news
    from .transport.dht.relay_server import RelayLimits

    tree = deployment.relay_tree(
        endpoint,
        pair,
        news.relay(_print),
        limits=RelayLimits(sessions_per_key=max_sessions, rate=max_rate),
        allow=allow,
        control=options.control(
            "relay", network, key=str(pair), max_sessions=max_sessions, max_rate=max_rate
        ),
    )
    _serve(tree)


@cli.command()
@click.option("--host", help="Address to serve on, as others reach it.  [default: 127.0.0.1]")
@click.option(
    "--port",
    type=options.PORT,
    default=49737,
    show_default=True,
    help="UDP port of the first node, the others take the following ones; 0 takes free ones.",
)
@click.option(
    "--nodes",
    type=click.IntRange(1, 64),
    help="Nodes in this process.  [default: 4; 1 with --bootstrap]",
)
@options.network
def dht(host: str | None, port: int, nodes: int | None, **network: Any) -> None:
    """Serve DHT nodes: without --bootstrap, the seed of a private network."""
    from .actors import deployment, news

    options.log_to(network)
    bootstrap = options.bootstrap(network) or ()
    nodes = nodes or (1 if bootstrap else deployment.SEED_NODES)
    tree = deployment.dht_tree(
        bootstrap,
        host=host,
        port=port,
        nodes=nodes,
        show=news.dht(_print, nodes),
        control=options.control("dht", network),
    )
    _serve(tree)


@cli.command()
@options.logs
def demo(**network: Any) -> None:
    """Run the whole thing on this machine: DHT, registry, service, proxy, and one request."""
    from .actors import demo as demonstration

    options.log_to(network)
    sys.exit(demonstration.run(_print))


@cli.command("list")
@options.registry_key
@click.argument("role", metavar="[ROLE@RANGE]", required=False)
@options.as_json
@click.option("--watch", is_flag=True, help="Go on, and show each change.")
@options.network
def list_(
    registry_key: bytes,
    role: str | None,
    as_json: bool,
    watch: bool,
    **network: Any,
) -> None:
    """List the services that a registry knows, or those of ROLE@RANGE."""
    import asyncio

    from .actors import api
    from .commands import listing

    endpoint = options.endpoint(network)
    lists = api.services(role, registry=registry_key, watch=watch, bootstrap=endpoint.bootstrap)
    asyncio.run(listing.show(lists, as_json=as_json, watch=watch))


@cli.command()
@options.as_json
@click.option("--host", metavar="HOST", help="Local address to look from.  [default: any]")
@options.joining
def doctor(as_json: bool, host: str | None, **network: Any) -> None:
    """Show what this host looks like from outside, and what that means for connections."""
    import asyncio

    from msgspec.structs import replace

    from .actors import doctor as examiner
    from .commands import doctor as report

    endpoint = options.endpoint(network)
    if host is not None:
        endpoint = replace(endpoint, host=host)
    findings = asyncio.run(examiner.examine(endpoint))
    report.show(findings, endpoint.bootstrap, as_json=as_json)


@cli.command()
@options.as_json
@click.option("-v", "--verbose", is_flag=True, help="Also everything that the actors show.")
@options.where
def status(**asked: Any) -> None:
    """Show what the programs of this machine do."""
    from .commands import looking

    sys.exit(looking.status(**asked))


@cli.command()
@options.as_json
@options.where
def tree(**asked: Any) -> None:
    """Show the living actors, how often each was restarted, and why."""
    from .commands import looking

    sys.exit(looking.tree(**asked))


@cli.command()
@click.argument("role", metavar="[ROLE@RANGE]", required=False)
@options.as_json
@options.where
def why(role: str | None, **asked: Any) -> None:
    """Show why a proxy takes each known instance, or passes it over."""
    from .commands import looking

    sys.exit(looking.why(role, **asked))


@cli.command()
@click.argument("path", metavar="PATH")
@options.as_json
@options.where
def kill(path: str, **asked: Any) -> None:
    """Kill an actor, such as /node/link, to see the tree heal."""
    from .commands import looking

    sys.exit(looking.kill(path, **asked))


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


if __name__ == "__main__":
    main()
