"""What `doctor` says of this host: what it looks like from outside, what follows from that for
connections, and what can be done about it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from ..transport.dht.examine import APART, Findings
from ..transport.dht.messages import Firewall
from ..transport.dht.nat import ENOUGH
from ..transport.errors import ConnectError
from .output import document, facts, heading, say

#: Ports that are shown of a socket: a random NAT has another one for each node.
FEW = 4
#: The part of all nodes that must answer for nothing to be said about the others: in a public
#: network some are always gone.
MOST = 0.6

KINDS = {
    Firewall.OPEN: "open",
    Firewall.CONSISTENT: "consistent",
    Firewall.RANDOM: "random",
    Firewall.UNKNOWN: "unknown",
}
_KINDS_TOLD = {
    Firewall.OPEN: "open: strangers get in",
    Firewall.CONSISTENT: "consistent: one place for each socket, and only answers get in",
    Firewall.RANDOM: "random: another port for each destination",
    Firewall.UNKNOWN: "unknown",
}


def show(findings: Findings, bootstrap: Sequence[str], *, as_json: bool = False) -> None:
    """Show it to people, or as JSON as one line: ``reachable``, ``nat`` (`open`, `consistent`,
    `random` or `unknown`), ``local`` (IPv4 addresses), ``sockets`` (of two, ``port`` and ``seen``,
    which are ``host:port``), ``port_kept``, ``stable``, ``hairpin`` (each null when not known),
    ``nodes`` (``asked``, ``answered``, ``min_ms``, ``median_ms``, ``max_ms``), ``means`` and
    ``do`` (sentences).

    Raises ConnectError: nobody has answered, so that nothing can be reached from here.
    """
    if as_json:
        document(_as_json(findings, bootstrap))
    if not findings.reachable:
        raise ConnectError(unreachable(findings, bootstrap))
    if not as_json:
        _as_text(findings)


def unreachable(findings: Findings, bootstrap: Sequence[str]) -> str:
    """One line on what it may be that nobody answers."""
    elsewhere = any(not each.startswith(("127.", "localhost")) for each in bootstrap)
    if elsewhere and all(host.startswith("127.") for host in findings.local_hosts):
        return "this host is in no network: no interface but the loopback has an IPv4 address"
    return (
        f"the DHT cannot be reached, no answer from {', '.join(bootstrap)}: this host is offline, "
        "UDP is blocked here, or nothing runs there; let UDP out to any port, or give --bootstrap"
    )


def meaning(findings: Findings) -> list[str]:
    """What follows for services and proxies on this host: sentences."""
    said = list(_meaning_of_kind(findings))
    if findings.stable is False:
        said.append(
            "The same nodes saw this host somewhere else a few seconds later: a router forgets "
            "what it has let out, or the way out changes. Connections break when that happens."
        )
    answered = len(findings.round_trips)
    if answered < MOST * findings.asked:
        said.append(
            f"{findings.asked - answered} of {findings.asked} nodes did not answer: they are gone, "
            "or packets get lost on the way."
        )
    return said


def _meaning_of_kind(findings: Findings) -> tuple[str, ...]:
    answered = len(findings.round_trips)
    match findings.firewall:
        case Firewall.OPEN:
            return (
                "Anybody reaches this host: connections open directly, whatever the other side is "
                "behind.",
            )
        case Firewall.CONSISTENT:
            guard = "The NAT" if findings.translated else "A firewall"
            return (
                f"{guard} lets only answers in, so both sides have to send first: connections open "
                "directly, after one or two round trips more than with an open host.",
                "With a host behind a random NAT that takes some seconds, as its port has to be "
                "searched for.",
            )
        case Firewall.RANDOM:
            return (
                "The NAT takes another port for each destination, so nobody can tell beforehand "
                "where this host will be seen.",
                "With an open host connections open directly. With a host behind a consistent NAT "
                "that takes some seconds, as the port has to be searched for. With a host behind "
                "another random NAT they open only through a relay.",
            )
        case _:
            why = "The nodes do not agree on where this host is"
            if answered < ENOUGH:
                nodes = "1 node answers" if answered == 1 else f"{answered} nodes answer"
                why = f"Only {nodes}, and it takes {ENOUGH} to tell what a NAT does"
            return (f"{why}: only connections with open hosts are certain to open.",)


def advice(findings: Findings) -> list[str]:
    """What the user can do: sentences."""
    said = list(_advice_for_kind(findings))
    if findings.stable is False:
        said.append(
            "Have the router remember UDP for 30 seconds or more, and try again: `hyperseaport "
            "doctor`."
        )
    return said


def _advice_for_kind(findings: Findings) -> tuple[str, ...]:
    match findings.firewall:
        case Firewall.OPEN:
            return (
                "Nothing. Should two other hosts of yours not reach each other, this is a place "
                "for the relay between them: `hyperseaport relay`.",
            )
        case Firewall.CONSISTENT if not findings.translated:
            return ("Nothing. Letting UDP in would make connections open faster.",)
        case Firewall.CONSISTENT:
            return ("Nothing.",)
        case Firewall.RANDOM:
            return (
                "For connections with hosts behind random NATs, start `hyperseaport relay` on a "
                "host that anybody reaches, and give `--relay-through KEY` to the service here or "
                "to the proxy here.",
                "Or have the router keep the port of each socket, which routers call "
                "endpoint-independent mapping, full cone or static port.",
            )
        case _ if len(findings.round_trips) < ENOUGH:
            return (
                "Add nodes to the network: `hyperseaport dht --nodes 4` is four of them. If it has "
                "more than have answered, see whether UDP gets to them.",
            )
        case _:
            return (
                "See that all UDP leaves this host by one way (no second router, no VPN for a part "
                "of it), and try again.",
            )


def _as_text(findings: Findings) -> None:
    heading("this host from outside")
    least, middle, most = _round_trips(findings)
    answered = f"{len(findings.round_trips)} of {findings.asked} answer"
    facts(
        (
            ("local", ", ".join(findings.local_hosts)),
            *((f"port {port}", _places(seen)) for port, seen in findings.seen),
            ("NAT", _kind_told(findings)),
            ("port kept", _yes(findings.port_kept)),
            ("stable", f"{_yes(findings.stable)}, over {APART:g} s"),
            ("hairpin", _yes(findings.hairpin) if findings.translated else "not needed"),
            ("DHT nodes", f"{answered}: {least:.0f} / {middle:.0f} / {most:.0f} ms"),
        )
    )
    for title, sentences in (
        ("what it means", meaning(findings)),
        ("what to do", advice(findings)),
    ):
        say()
        heading(title)
        for sentence in sentences:
            say(f"  {sentence}")


def _kind_told(findings: Findings) -> str:
    if findings.translated or findings.firewall == Firewall.UNKNOWN:
        return _KINDS_TOLD[findings.firewall]
    return "none" if findings.firewall == Firewall.OPEN else "none, but only answers get in"


def _places(seen: Sequence[tuple[str, int]]) -> str:
    if not seen:
        return "nobody sees it"
    more = f" and {len(seen) - FEW} more" if len(seen) > FEW else ""
    return f"seen at {', '.join(f'{host}:{port}' for host, port in seen[:FEW])}{more}"


def _yes(known: bool | None) -> str:
    return "not known" if known is None else "yes" if known else "no"


def _round_trips(findings: Findings) -> tuple[float, float, float]:
    """Milliseconds: the least, the median, the greatest."""
    times = [seconds * 1000 for seconds in findings.round_trips]
    return times[0], median(times), times[-1]


def _as_json(findings: Findings, bootstrap: Sequence[str]) -> dict[str, Any]:
    reachable = findings.reachable
    times = [round(each, 1) for each in _round_trips(findings)] if reachable else [None] * 3
    return {
        "reachable": reachable,
        "nat": KINDS[findings.firewall],
        "local": list(findings.local_hosts),
        "sockets": [
            {"port": port, "seen": [f"{host}:{number}" for host, number in seen]}
            for port, seen in findings.seen
        ],
        "port_kept": findings.port_kept,
        "stable": findings.stable,
        "hairpin": findings.hairpin,
        "nodes": {
            "asked": findings.asked,
            "answered": len(findings.round_trips),
            **dict(zip(("min_ms", "median_ms", "max_ms"), times, strict=True)),
        },
        "means": meaning(findings) if reachable else [unreachable(findings, bootstrap)],
        "do": advice(findings) if reachable else [],
    }
