"""The health check of a service's TCP target: who follows it hears when the target goes and comes.

The target answers for itself alone: that clients reach the service is the registries' affair.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from random import Random, SystemRandom
from typing import Any

from msgspec import Struct, field
from thespian.actors import ActorAddress

from ..transport.errors import InvalidInput
from .actor import Actor, Down, handles
from .messages import Describe, Described, Follow, HealthChanged

#: Bytes of an HTTP answer's first line: what servers send has some twenty.
MAX_STATUS = 1024
#: Bytes of the rest that are read so that the server sees its answer taken. More is not waited for.
MAX_ANSWER = 64 * 1024
#: The part by which an interval may be shorter or longer, so that many checks do not stay in step.
JITTER = 0.1

_NO_HTTP = "the answer is no HTTP"
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")
_PATH = re.compile(r"/[!-~]*")


class TcpCheck(Struct, frozen=True):
    """Healthy when it accepts a connection."""

    def __str__(self) -> str:
        return "tcp"


class HttpCheck(Struct, frozen=True):
    """Healthy when it answers GET with a status of 200 to 399. Raises InvalidInput: no path."""

    #: With its query, as it stands in the request.
    path: str

    def __post_init__(self) -> None:
        if not _PATH.fullmatch(self.path):
            raise InvalidInput(
                f"{self.path!r} is no path of a health check: it begins with / and is ASCII "
                "without spaces, as in http:/health"
            )

    def __str__(self) -> str:
        return f"http:{self.path}"


Check = TcpCheck | HttpCheck


def parse(text: str) -> Check:
    """The check that `tcp` or `http:PATH` asks for. Raises `InvalidInput`."""
    kind, colon, path = text.partition(":")
    if text == "tcp":
        return TcpCheck()
    if kind == "http" and colon:
        return HttpCheck(path)
    raise InvalidInput(f"{text!r} is no health check: write tcp or http:PATH, as in http:/health")


class HealthArgs(Struct, frozen=True):
    """What is probed, and how. Raises InvalidInput: a number that cannot work."""

    host: str
    port: int
    check: Check
    #: Seconds from the end of one probe to the beginning of the next.
    interval: float = 5.0
    #: So many failures in a row make it unhealthy.
    threshold: int = 3
    #: Seconds that one probe may take.
    timeout: float = 2.0
    rng: Random = field(default_factory=SystemRandom)

    def __post_init__(self) -> None:
        if not (0 < self.interval < math.inf and 0 < self.timeout < math.inf):
            raise InvalidInput("a health check's interval and timeout are seconds above 0")
        if not 0 < self.port < 65_536:
            raise InvalidInput("a health check's port is between 1 and 65535")
        if self.threshold < 1:
            raise InvalidInput("a health check's threshold is at least 1")


class Verdict(Struct, frozen=True):
    """What one probe found."""

    healthy: bool
    #: One line.
    reason: str


class _Probe(Struct, frozen=True):
    """It is time."""


class Health(Actor):
    """Tells who has sent it `Follow` whether the target is healthy: now, if that is known, and at
    each change, as `HealthChanged`, for as long as the follower lives.

    Args: `HealthArgs`. The first probe decides at once; then one success makes it healthy, and
    `threshold` failures in a row make it unhealthy.
    """

    def on_start(self, args: HealthArgs) -> None:
        self._args = args
        self._told: HealthChanged | None = None
        # Unix seconds of the last change.
        self._since = 0.0
        self._last: Verdict | None = None
        self._last_at = 0.0
        # In a row.
        self._failures = 0
        self._followers: dict[ActorAddress, None] = {}
        self._begin()
        self.ready()

    @handles(_Probe)
    def _due(self, _message: _Probe, _sender: ActorAddress) -> None:
        self._begin()

    def _begin(self) -> None:
        self.run(probe(self._args), then=lambda verdict: verdict)

    @handles(Verdict)
    def _probed(self, message: Verdict, _sender: ActorAddress) -> None:
        args = self._args
        self._last, self._last_at = message, self.now
        self._failures = 0 if message.healthy else self._failures + 1
        # The next one begins when this one is over: there are never two.
        self.after(args.interval * args.rng.uniform(1 - JITTER, 1 + JITTER), _Probe())
        told = self._told
        if told is not None:
            patient = not message.healthy and self._failures < args.threshold
            if patient or told.healthy == message.healthy:
                return
        self._told = HealthChanged(message.healthy, message.reason)
        self._since = time.time()
        self.log.info("health changed", healthy=message.healthy, reason=message.reason)
        for follower in self._followers:
            self.send(follower, self._told)

    @handles(Follow)
    def _follow(self, _message: Follow, sender: ActorAddress) -> None:
        self.monitor(sender)
        self._followers[sender] = None
        if self._told is not None:
            self.send(sender, self._told)

    @handles(Down)
    def _follower_died(self, message: Down, _sender: ActorAddress) -> None:
        self._followers.pop(message.address, None)

    @handles(Describe)
    def _describe(self, _message: Describe, sender: ActorAddress) -> None:
        told, last = self._told, self._last
        fields: dict[str, Any] = {
            "check": str(self._args.check),
            "healthy": None if told is None else told.healthy,
            # Unix seconds.
            "since": None if told is None else round(self._since, 1),
            # Seconds.
            "last_probe_age": None if last is None else round(self.now - self._last_at, 1),
            "last_reason": "" if last is None else last.reason,
            "failures": self._failures,
        }
        self.send(sender, Described(fields))


async def probe(args: HealthArgs) -> Verdict:
    """Ask the target once. Whatever it does, this returns within ``args.timeout`` seconds."""
    verdict: Verdict | None = None
    writer = None
    try:
        async with asyncio.timeout(args.timeout):
            reader, writer = await asyncio.open_connection(args.host, args.port, limit=MAX_STATUS)
            if isinstance(args.check, TcpCheck):
                return Verdict(True, "accepts connections")
            writer.write(_request(args.host, args.port, args.check.path))
            verdict = _judge(await reader.readline())
            await _take(reader)
    # What happens after the first line of the answer changes nothing.
    except TimeoutError:
        return verdict or Verdict(False, f"no answer within {args.timeout:g} s")
    except OSError as error:
        return verdict or Verdict(False, _reason(error))
    except ValueError as error:
        # The first line is too long, or the host can be no name.
        return verdict or Verdict(False, _NO_HTTP if writer is not None else _one_line(str(error)))
    finally:
        if writer is not None:
            writer.transport.abort()
    return verdict


def _request(host: str, port: int, path: str) -> bytes:
    name = f"[{host}]" if ":" in host else host
    lines = (
        f"GET {path} HTTP/1.1",
        f"Host: {name}:{port}",
        "User-Agent: hyperseaport",
        "Accept: */*",
        "Connection: close",
    )
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def _judge(line: bytes) -> Verdict:
    if not line:
        return Verdict(False, "closed the connection without an answer")
    match = _STATUS.fullmatch(line)
    if match is None:
        return Verdict(False, _NO_HTTP)
    status = int(match[1])
    return Verdict(200 <= status < 400, f"answered {status}")


async def _take(reader: asyncio.StreamReader) -> None:
    """Read what follows: a server whose answer is cut off complains about it."""
    left = MAX_ANSWER
    while left > 0 and (piece := await reader.read(left)):
        left -= len(piece)


def _reason(error: OSError) -> str:
    """asyncio's texts name the address, which people know; several attempts have no number."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return _one_line(error.strerror or str(error))


def _one_line(text: str) -> str:
    return " ".join(text.split())
