"""A real redis-server behind a service, and redis-cli at the proxy."""

from __future__ import annotations

import random

from support.ports import free_port
from support.stage import Stage, output, program
from support.waiting import until

PACKAGE = "redis-server"


async def redis_server(stage: Stage) -> int:
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    server = stage.run("redis", [program("redis-server", PACKAGE), *options])
    await server.line("Ready to accept connections")
    return port


async def redis_cli(port: int, *arguments: str, given: bytes = b"") -> bytes:
    command = [program("redis-cli", "redis-tools"), "-h", "127.0.0.1", "-p", str(port)]
    return await output([*command, *arguments], given=given)


async def test_set_get_and_a_large_value(stage: Stage) -> None:
    service, proxy = await stage.chain(await redis_server(stage), "redis")
    async with stage.undisturbed(service, proxy):
        assert await redis_cli(proxy.port, "SET", "name", "hyperseaport") == b"OK\n"
        assert await redis_cli(proxy.port, "GET", "name") == b"hyperseaport\n"
        large = random.Random(1).randbytes(1024 * 1024)
        assert await redis_cli(proxy.port, "-x", "SET", "large", given=large) == b"OK\n"
        assert await redis_cli(proxy.port, "GET", "large") == large + b"\n"


async def test_a_pipeline_of_ten_thousand(stage: Stage) -> None:
    service, proxy = await stage.chain(await redis_server(stage), "pipeline")
    commands = b"".join(b"INCRBY total %d\r\n" % number for number in range(10_000))
    async with stage.undisturbed(service, proxy):
        replies = await redis_cli(proxy.port, "--pipe", given=commands)
        assert b"errors: 0, replies: 10000" in replies
        assert await redis_cli(proxy.port, "GET", "total") == b"%d\n" % sum(range(10_000))


async def test_publish_reaches_a_subscriber(stage: Stage) -> None:
    service, proxy = await stage.chain(await redis_server(stage), "pubsub")
    cli = [program("redis-cli", "redis-tools"), "-h", "127.0.0.1", "-p", str(proxy.port)]
    async with stage.undisturbed(service, proxy):
        with stage.run("subscriber", [*cli, "SUBSCRIBE", "news"]) as subscriber:
            await subscriber.line(r"^subscribe\nnews\n1$")

            async def heard() -> bool:
                return await redis_cli(proxy.port, "PUBLISH", "news", "land ahoy") == b"1\n"

            await until(heard, "the message has one receiver", deadline=10)
            await subscriber.line(r"^message\nnews\nland ahoy$")
