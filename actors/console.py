"""The console actor: passes news for people on to whoever shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from .actor import Actor, ActorAddress, Address, handles


class Console(Actor):
    """Args: a function that takes each piece of news, a message of `actors.messages`. It is called
    in the event loop and must not block."""

    def on_start(self, args: Callable[[object], None]) -> None:
        self._show = args

    @handles(object)
    def _news(self, message: object, _sender: ActorAddress) -> None:
        self._show(message)


def tell(actor: Actor, news: object) -> None:
    """Send news to the console of this tree, if there is one. Nobody is restarted when it dies, so
    its successor is looked up."""
    console = actor.context.get("console")
    if console is None or not cast(Address, console).alive:
        console = actor.whereis("/console")
    if console is not None:
        actor.send(console, news)
