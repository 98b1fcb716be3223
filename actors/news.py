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
    ServiceListening,
    ServiceRecord,
    ServiceRegistered,
)

Say = Callable[[str], None]
Show = Callable[[object], None]


def registry(say: Say) -> Show:
    """Lines of `hyperseaport registry`."""

    def show(news: object) -> None:
        match news:
            case RegistryListening():
                say(f"Registry listening. Connect with pubkey  {news.public_key.hex()}")
            case ServiceRegistered():
                say(f"registered service {inspect(news.info)}")

    return show


def service(say: Say) -> Show:
    """Lines of `hyperseaport service`."""

    def show(news: object) -> None:
        match news:
            case ServiceListening():
                say(f"started p2p service on {news.public_key.hex()}")
            case Registered():
                say(f"registered service {inspect(news.meta)}")
            case RegistrationRefused():
                say(f"the registry refuses the service: {news.text}")
            case _:
                _link(say, news)

    return show


def proxy(say: Say, role: str) -> Show:
    """Lines of `hyperseaport proxy`."""

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
                _link(say, news)

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


def _link(say: Say, news: object) -> None:
    match news:
        case LinkConnecting() if news.attempt == 1:
            say(f"connecting to registry {news.registry_key.hex()}")
        case LinkDown():
            say(f"waiting for registry {news.registry_key.hex()} ({news.down_for:.0f} s)")


def _found(record: ServiceRecord) -> dict[str, object]:
    shown: dict[str, object] = {"id": record.public_key.hex()}
    if record.remote_public_key is not None:
        shown["remotePublicKey"] = record.remote_public_key.hex()
    shown["meta"] = record.meta
    return shown
