from collections.abc import Callable
from typing import Protocol

from thespian.actors import Actor

class _Creator(Protocol):
    def create(self, klass: type[Actor]) -> Actor: ...

def withPossibleInitArgs(**kwargs: object) -> _Creator: ...  # noqa: N802
def actualActorClass(  # noqa: N802
    actorClass: type[Actor] | str,  # noqa: N803
    loadModule: Callable[[str], object] | None = None,  # noqa: N803
) -> type[Actor]: ...
