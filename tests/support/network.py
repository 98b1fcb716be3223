"""A private network with one registry, and services and proxies of both kinds on it, on demand."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from .peers import (
    DHTS,
    REGISTRIES,
    SERVICES,
    Kind,
    NodeProxy,
    OurProxy,
    Peer,
    Proxy,
    Service,
    seed,
)
from .servers import Backend, answering


@dataclass(slots=True)
class Chain:
    """Proxy -> service -> backend, known to work. Clients connect to `proxy.port`."""

    proxy: Proxy
    service: Service
    backend: Backend


class Network:
    """A DHT and a registry of the given kinds. One service of each kind, shared by its proxies.

    Its processes live until `close`, across tests. What failed to start once fails at once later.
    """

    def __init__(self, home: Path, dht: Kind, registry: Kind) -> None:
        self._home = home
        self._registry_kind = registry
        self._peers: list[Peer] = []
        self._services: dict[Kind, Service] = {}
        self._backends: dict[Kind, Backend] = {}
        self._chains: dict[tuple[Kind, Kind], Chain] = {}
        self._failed: dict[str, str] = {}
        self.dht = DHTS[dht](self._folder("dht"))
        self._peers.append(self.dht)

    async def start(self) -> None:
        """Return once the registry serves."""
        await self.dht.ready()
        start = REGISTRIES[self._registry_kind]
        self.registry = start(
            self._folder("registry"), self.dht.bootstrap, seed=seed(self._home.name)
        )
        self._peers.append(self.registry)
        await self.registry.ready()

    @contextlib.asynccontextmanager
    async def chain(self, service: Kind, proxy: Kind) -> AsyncIterator[Chain]:
        """The pair's chain, started now if this is its first use; its backend serves meanwhile."""
        front = await self._service(service)
        backend = self._backends[service]
        async with backend.serving():
            if (service, proxy) not in self._chains:
                role = f"{service}-files@1.x"
                back = await self.proxy(proxy, role)
                self._chains[service, proxy] = Chain(back, front, backend)
            chain = self._chains[service, proxy]
            yield chain
        assert not backend.errors, backend.errors
        for peer in (self.dht, self.registry, chain.service, chain.proxy):
            code = peer.process.returncode
            assert code is None, f"{peer.process.name} ended with exit code {code}"

    async def proxy(self, kind: Kind, role: str, *, reader_registry: bool = False) -> Proxy:
        """A new proxy that answers; its backend must be serving.

        Only a Node proxy can have a reader registry.
        """
        with self._once(f"{kind} proxy for {role}, reader registry {reader_registry}") as name:
            place = self._folder(name), self.dht.bootstrap, self.registry.key
            if kind == "node":
                proxy: Proxy = NodeProxy(*place, role=role, reader_registry=reader_registry)
            else:
                assert not reader_registry
                proxy = OurProxy(*place, role=role)
            self._peers.append(proxy)
            await proxy.ready()
            await answering(proxy.port)
        return proxy

    def close(self) -> None:
        for peer in reversed(self._peers):
            peer.close()
        for backend in self._backends.values():
            backend.close()

    async def _service(self, kind: Kind) -> Service:
        if kind not in self._services:
            with self._once(f"{kind} service") as name:
                backend = self._backends[kind] = Backend()
                place = self._folder(name), self.dht.bootstrap, self.registry.key
                role = f"{kind}-files@1.2.3"
                service = SERVICES[kind](*place, port=backend.port, role=role)
                self._peers.append(service)
                await service.ready()
                self._services[kind] = service
        return self._services[kind]

    @contextlib.contextmanager
    def _once(self, name: str) -> Iterator[str]:
        assert name not in self._failed, f"{name} failed before: {self._failed[name]}"
        try:
            yield name
        except AssertionError as error:
            self._failed[name] = str(error)
            raise

    def _folder(self, name: str) -> Path:
        folder = self._home / f"{len(self._peers)}-{name.split()[0]}"
        folder.mkdir(parents=True)
        return folder
