"""A TCP listener of ours in front of a key, without a registry, which no command is:

dial.py PORT KEY RELAY    each connection goes to KEY, and may begin at the blind relay RELAY;
                          prints "ready"
"""

from __future__ import annotations

import asyncio
import os
import sys

from hyperseaport.transport.channel import Channel
from hyperseaport.transport.dht.endpoint import Endpoint, EndpointConfig
from hyperseaport.transport.errors import ConnectError


class Side(asyncio.Protocol):
    """What arrives leaves by the other side."""

    def __init__(self) -> None:
        self.made = asyncio.get_running_loop().create_future()
        self.other: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.made.set_result(transport)

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.write(data)

    def eof_received(self) -> bool:
        if self.other is not None:
            self.other.write_eof()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None:
            self.other.abort()


async def join(endpoint: Endpoint, client: Side, key: bytes, relay: bytes) -> None:
    plain: asyncio.Transport = await client.made
    plain.pause_reading()
    try:
        channel: Channel = await endpoint.connect(key, relay_through=(relay,))
    except ConnectError as error:
        say(str(error))
        plain.abort()
        return
    say("relayed" if channel.relayed else "direct")
    service = Side()
    service.other, client.other = plain, channel
    channel.set_protocol(service)
    plain.resume_reading()


async def main(port: int, key: bytes, relay: bytes) -> None:
    bootstrap = tuple(os.environ["HYPERSEAPORT_BOOTSTRAP"].split(","))
    endpoint = await Endpoint.open(EndpointConfig(bootstrap=bootstrap))
    await endpoint.ready()
    tasks: set[asyncio.Task[None]] = set()

    def accepted() -> Side:
        client = Side()
        task = asyncio.create_task(join(endpoint, client, key, relay))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return client

    server = await asyncio.get_running_loop().create_server(accepted, "127.0.0.1", port)
    say("ready")
    await server.serve_forever()


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), *map(bytes.fromhex, sys.argv[2:4])))
