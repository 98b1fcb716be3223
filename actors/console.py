"""The console actor: passes news for people on to whoever shows them."""

from __future__ import annotations

from collections.abc import Callable

from .actor import Actor, ActorAddress, handles


class Console(Actor):
    """Args: a function that takes each piece of news, a message of `actors.messages`. It is called
    in the event loop and must not block."""

    def on_start(self, args: Callable[[object], None]) -> None:
        self._show = args

    @handles(object)
    def _news(self, message: object, _sender: ActorAddress) -> None:
        self._show(message)
