"""The demonstration: a DHT, a registry, a service and a proxy in one process, and one request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from . import news
from .api import DHT, Proxy, Registry, Service

#: Seconds that the whole demonstration may take.
TIMEOUT = 60.0

_ROLE = "hello@1.2.3"
_RANGE = "hello@1.x"
_BODY = b'{"hello":"from a service that is found by nothing but a public key"}\n'
_RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)


def run(say: Callable[[str], None]) -> int:
    """Show each step as it happens. Returns the exit code."""
    try:
        asyncio.run(asyncio.wait_for(_run(say), TIMEOUT))
    except TimeoutError:
        say(f"the demonstration did not finish within {TIMEOUT:g} s")
        return 1
    return 0


async def _run(say: Callable[[str], None]) -> None:
    http = await asyncio.start_server(_answer, "127.0.0.1", 0)
    http_port = http.sockets[0].getsockname()[1]

    def step(title: str, command: str) -> None:
        say(f"\n# {title}\n$ hyperseaport {command}")

    step("A private DHT: the network on which all others meet.", "dht --port 0")
    async with http, DHT() as dht:
        say(f"dht node listening on {dht.bootstrap[0]}")

        registry = Registry(bootstrap=dht.bootstrap)
        registry.on_news = news.registry(say)
        key = registry.public_key.hex()
        step("A registry. Its public key is all that others need to know.", "registry --seed ...")
        async with registry:
            service = Service(_ROLE, registry=key, port=http_port, bootstrap=dht.bootstrap)
            service.on_news = news.service(say)
            step(
                f"A service: the HTTP server on port {http_port}, under a role and a version.",
                f"service {key[:8]}... -p {http_port} -r {_ROLE}",
            )
            async with service:
                await service.registered()

                proxy = Proxy(_RANGE, registry=key, bootstrap=dht.bootstrap)
                proxy.on_news = news.proxy(say, _RANGE)
                step(
                    "A proxy: whatever matches the range, on a local port.",
                    f"proxy {key[:8]}... -p 0 -r {_RANGE}",
                )
                async with proxy:
                    await proxy.routed()
                    say(f"\n# The service, used locally.\n$ curl http://localhost:{proxy.port}")
                    say((await _get(proxy.port)).decode().strip())


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(_RESPONSE)
    writer.close()


async def _get(port: int) -> bytes:
    """The body of one HTTP request to the local port."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    response = await reader.read()
    writer.close()
    await writer.wait_closed()
    return response.partition(b"\r\n\r\n")[2]
