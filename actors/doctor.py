"""Looks at this host from outside: a node that joins the network, is examined, and leaves."""

from __future__ import annotations

import asyncio

from ..supervisor import ChildSpec, Supervisor, SupervisorSpec
from ..transport.dht.endpoint import EndpointConfig
from ..transport.dht.examine import Findings
from ..transport.errors import ConnectError
from .actor import ActorGone, Crashed
from .endpoint import EndpointActor
from .messages import Examine, Examined
from .system import ActorRuntime

#: Seconds for all of it: 6 to join a network in which nobody answers, or 1 where all do, and then 4
#: to 6 to be examined.
LIMIT = 14.0


async def examine(config: EndpointConfig) -> Findings:
    """What this host looks like from outside. Raises `LocalError` for an address that cannot be
    had, `ConnectError` when it takes longer than `LIMIT`."""
    endpoint = ChildSpec("endpoint", EndpointActor, config, shutdown=1.0, wait_ready=LIMIT)
    tree = SupervisorSpec("one_for_one", (endpoint,))
    try:
        async with asyncio.timeout(LIMIT), ActorRuntime() as runtime:
            root = runtime.spawn(Supervisor, tree, name="root")
            await runtime.ready(root)
            address = runtime.find("/root/endpoint")
            if address is None:
                raise ConnectError("the node stopped while it started: try again")
            examined: Examined = await runtime.call(address, Examine())
            return examined.findings
    except ActorGone as gone:
        if isinstance(gone.reason, Crashed) and isinstance(gone.reason.exception, Exception):
            raise gone.reason.exception from gone
        raise ConnectError(f"the node stopped ({gone.reason}): try again") from gone
    except TimeoutError as error:
        raise ConnectError(
            f"the network answers too slowly: nothing was found out in {LIMIT:g} s; try again"
        ) from error
