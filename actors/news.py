"""News as the lines that users know: what each command shows (spec: registry 7.4)."""

from __future__ import annotations

from collections.abc import Callable

from .format import inspect
from .messages import (
    EndpointReady,
    LinkConnecting,
    LinkDown,
    LinkUp,
    ProxyListening,
    ProxyRouted,
    ProxyUnrouted,
    Registered,
    RegistrationRefused,
    RegistryListening,
    RelayListening,
    ServiceListening,
    ServiceRecord,
    ServiceRegistered,
    ServiceUnhealthy,
)

Say = Callable[[str], None]
Show = Callable[[object], None]

#: How long without its registry a program says nothing more of that after the first line, in
#: seconds, and how much longer each time.
WAITING_QUIET = 5.0
WAITING_GROWS = 1.5


def registry(say: Say) -> Show:
    """Lines of `hyperseaport registry`."""

    def show(news: object) -> None:
        match news:
            case RegistryListening():
                say(f"Registry listening. Connect with pubkey  {news.public_key.hex()}")
                if who := _open_to(news):
                    say(who)
            case ServiceRegistered():
                say(f"registered service {inspect(news.info)}")

    return show


def service(say: Say) -> Show:
    """Lines of `hyperseaport service`."""
    link = _links(say)

    def show(news: object) -> None:
        match news:
            case ServiceListening():
                say(f"started p2p service on {news.public_key.hex()}")
            case Registered():
                say(f"registered service {inspect(news.meta)}")
            case RegistrationRefused():
                say(f"the registry refuses the service: {news.text}")
            case ServiceUnhealthy():
                say(f"the service is not registered while its target is down: {news.reason}")
            case _:
                link(news)

    return show


def proxy(say: Say, role: str) -> Show:
    """Lines of `hyperseaport proxy`."""
    link = _links(say)

    def show(news: object) -> None:
        match news:
            case LinkUp():
                say("connected to registry")
            case ProxyListening() if news.chosen:
                say(f"listening on {news.host}:{news.port}")
            case ProxyRouted():
                say(f"found service {inspect(_found(news.service))}")
                say(f"proxy from  {news.port} to p2p service {news.service.public_key.hex()}")
            case ProxyUnrouted():
                say(f"waiting for service {role}")
            case _:
                link(news)

    return show


def relay(say: Say) -> Show:
    """Lines of `hyperseaport relay`."""

    def show(news: object) -> None:
        if isinstance(news, RelayListening):
            say(f"Relay listening. Connect through pubkey  {news.public_key.hex()}")
            if news.anybody:
                say("whoever knows this key may use the relay (--allow KEY: only some)")

    return show


def dht(say: Say, nodes: int) -> Show:
    """Lines of `hyperseaport dht`: one, when the last of its nodes serves."""
    addresses: list[str] = []

    def show(news: object) -> None:
        if isinstance(news, EndpointReady):
            addresses.append(f"{news.address[0]}:{news.address[1]}")
            if len(addresses) == nodes:
                say(f"dht node listening on {addresses[0]}")

    return show


def _open_to(news: RegistryListening) -> str:
    """What strangers may do, and how to keep them from it."""
    open_to = {
        "register": (news.anybody_registers, "--allow-register"),
        "look for": (news.anybody_queries, "--allow-query"),
    }
    may = [what for what, (anybody, _) in open_to.items() if anybody]
    options = [option for anybody, option in open_to.values() if anybody]
    if not may:
        return ""
    return (
        f"whoever knows this key may {' and '.join(may)} services "
        f"({', '.join(options)} KEY: only some)"
    )


def _links(say: Say) -> Show:
    """Lines of the sessions with registries. A registry that is away is tried every few seconds;
    the lines about it grow rarer, as nobody reads a thousand of them."""
    #: Until when, in seconds without the registry, nothing more is said of it.
    quiet: dict[bytes, float] = {}

    def show(news: object) -> None:
        match news:
            case LinkConnecting() if news.attempt == 1:
                quiet.pop(news.registry_key, None)
                say(f"connecting to registry {news.registry_key.hex()}")
            case LinkDown() if news.down_for >= quiet.get(news.registry_key, 0.0):
                quiet[news.registry_key] = max(WAITING_QUIET, WAITING_GROWS * news.down_for)
                say(f"waiting for registry {news.registry_key.hex()} ({news.down_for:.0f} s)")

    return show


def _found(record: ServiceRecord) -> dict[str, object]:
    shown: dict[str, object] = {"id": record.public_key.hex()}
    if record.remote_public_key is not None:
        shown["remotePublicKey"] = record.remote_public_key.hex()
    shown["meta"] = record.meta
    return shown
