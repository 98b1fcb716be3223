"""Lists what registries have: the services of one role, told of at each change, or all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct
from thespian.actors import ActorAddress

from ..supervisor import Children, WhichChildren
from ..transport.errors import ConnectError
from .actor import Actor, CallTimeout, handles
from .messages import Find, Found, ListRoles, RolesListed, ServiceRecord, Services, Watch

#: Seconds in which a registry must have told its roles.
ROLES_TIMEOUT = 20.0
#: Seconds in which the services of one role must have been told, and roles asked about at a time.
FIND_TIMEOUT = 5.0
AT_ONCE = 32
#: Seconds between two lists of everything.
PAUSE = 2.0

Records = tuple[ServiceRecord, ...]


class ListerArgs(Struct, frozen=True):
    """What is listed: role and range, or everything when it is None; and who is told each list.
    ``again`` lists everything again and again."""

    meta: Mapping[str, Any] | None
    show: Callable[[Records], None]
    again: bool = False


class Lister(Actor):
    """Args: `ListerArgs`. Context: ``links``, ``link``. Dies of a `ConnectError` when no registry
    can tell its roles."""

    def on_start(self, args: ListerArgs) -> None:
        self._args = args
        if args.meta is not None:
            self.send(self.context["link"], Watch(args.meta))
        else:
            self.run(self._list())

    @handles(Services)
    def _services(self, message: Services, _sender: ActorAddress) -> None:
        if message.live:
            self._args.show(message.records)

    async def _list(self) -> None:
        while True:
            roles = await self._roles()
            records: list[ServiceRecord] = []
            for start in range(0, len(roles), AT_ONCE):
                found = await asyncio.gather(*map(self._find, roles[start : start + AT_ONCE]))
                for several in found:
                    records += several
            self._args.show(tuple(records))
            if not self._args.again:
                return
            await asyncio.sleep(PAUSE)

    async def _roles(self) -> list[str]:
        children: Children = await self.call(self.context["links"], WhichChildren())
        links = [child.address for child in children.children if child.address is not None]
        answers = await asyncio.gather(*map(self._roles_of, links))
        told = [answer for answer in answers if answer is not None]
        if not told:
            raise ConnectError(
                "no registry told which roles it has: it is away, or cannot tell; name a ROLE@RANGE"
            )
        return sorted({role for roles in told for role in roles})

    async def _roles_of(self, link: ActorAddress) -> tuple[str, ...] | None:
        try:
            answer: RolesListed = await self.call(link, ListRoles(), ROLES_TIMEOUT)
        except CallTimeout:
            return None
        return answer.roles

    async def _find(self, role: str) -> Records:
        found: Found = await self.call(self.context["link"], Find({"role": role}, FIND_TIMEOUT))
        return found.records
