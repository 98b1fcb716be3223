"""hyperseaport: a service registry and TCP proxy over secure p2p.

async with hyperseaport.Registry(bootstrap=...) as registry: ...
async with hyperseaport.Service("couchdb@3.2.2", registry=KEY, port=5984): ...
async with hyperseaport.Proxy("couchdb@3.x", registry=KEY, port=5985): ...
reader, writer = await hyperseaport.connect("couchdb@^3", registry=KEY)
async for records in hyperseaport.services("couchdb", registry=KEY, watch=True): ...
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .actors.api import DHT as DHT
    from .actors.api import Proxy as Proxy
    from .actors.api import Registry as Registry
    from .actors.api import Service as Service
    from .actors.api import connect as connect
    from .actors.api import services as services
    from .transport.errors import HyperseaportError as HyperseaportError
    from .transport.keys import KeyPair as KeyPair

__version__ = "0.1.0"

# Imported on first use: a command that needs none of it starts at once.
_HOMES = {
    "DHT": ".actors.api",
    "Proxy": ".actors.api",
    "Registry": ".actors.api",
    "Service": ".actors.api",
    "connect": ".actors.api",
    "services": ".actors.api",
    "HyperseaportError": ".transport.errors",
    "KeyPair": ".transport.keys",
}

__all__ = [
    "DHT",
    "HyperseaportError",
    "KeyPair",
    "Proxy",
    "Registry",
    "Service",
    "connect",
    "services",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
