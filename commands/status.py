"""What `status` says of a program: what a person takes in at a glance, and on demand all that its
actors show of themselves.

The fields are those that actors answer to `Describe` and `Measure`. One that is being restarted
shows none, and what it would say is left out or is unknown.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .output import Row, facts, heading, say, seconds, short, size, table

Fields = Mapping[str, Any]

#: Instances that are shown of a registry: `list` has them all.
MAX_INSTANCES = 20
#: Actors whose failures are shown: `tree` has them all.
MAX_FAILURES = 2
#: Characters of a reason that others gave.
MAX_REASON = 80


@dataclass(slots=True)
class _View:
    """What is shown of a program."""

    #: Beside the name of the command.
    name: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    headers: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)
    #: Below the table.
    note: str = ""


def show(ok: Fields, verbose: bool = False) -> None:
    """Show the answer to `status` (`actors.control`). Of a program that is none of ours, whatever
    it is, everything.

    Raises ArithmeticError, AttributeError, LookupError, TypeError, ValueError or RecursionError:
    it is not understood.
    """
    describe = _VIEWS.get(ok["command"])
    everything = list(_everything(ok)) if verbose or describe is None else None
    view = _View() if describe is None else describe(ok, ok["actors"])
    name = " ".join(filter(None, (str(ok["command"]), view.name)))
    title = f"{name} (process {ok['pid']}), up {seconds(ok['uptime'])}"
    if describe is not None:
        view.facts.append(("restarts", _restarts(ok)))
    heading(title)
    facts(view.facts)
    if view.rows:
        say()
        table(view.headers, view.rows)
    if view.note:
        say(view.note)
    if everything is not None:
        say()
        table(("ACTOR", "WHAT", "VALUE"), everything)


# The programs


def _proxy(ok: Fields, actors: Fields) -> _View:
    listener, resolver = _shown(actors, "listener"), _shown(actors, "resolver")
    view = _View(_role(resolver, "range") or str(ok["summary"].get("role", "")))
    balance = f", balance {resolver['balance']}" if "balance" in resolver else ""
    listening = f"{listener['address']}:{listener['port']}" if listener else "not yet"
    view.facts.append(("listening", listening + balance))
    for choice in ok.get("choices", ())[:1]:
        view.facts += _choice(choice, resolver)
    view.facts += _traffic(ok, actors, listener)
    view.facts += [("registry", _session(link)) for link in _links(actors)]
    return view


def _choice(choice: Fields, resolver: Fields) -> Iterator[tuple[str, str]]:
    states = choice["states"]
    known = sum(states.values())
    aside, refused = states.get("set aside", 0), states.get("refused", 0)
    text = f"{known} known, {known - aside - refused} usable, {aside} set aside"
    if refused:
        text += f", {refused} not verified"
    if resolver.get("registry") is False:
        text += f", as of {seconds(resolver.get('age'))} ago"
    yield "instances", text
    name = "uses"
    for row in choice["used"]:
        yield name, _used(row)
        name = ""
    if choice["more"]:
        yield name, f"and {choice['more']} more: see `why`"
    if not choice["used"]:
        yield name, "none of them: see `why`" if known else "none: no instance is known"


def _used(row: Fields) -> str:
    text = f"{_role(row, 'version')} {short(row['key'])}: "
    if row["state"] == "set aside":
        text += "set aside, "
    text += _cut(row["reason"])
    connections = row["connections"]
    return text + (f", {_plural(connections, 'connection')}" if connections else "")


def _service(ok: Fields, actors: Fields) -> _View:
    listener, announcement = _shown(actors, "listener"), _shown(actors, "announcement")
    view = _View(_role(announcement, "version") or str(ok["summary"].get("role", "")))
    if listener:
        allowed = listener["allowed"]
        clients = "" if allowed is None else f", for {_plural(allowed, 'client')} only"
        view.facts.append(("key", short(listener["key"]) + clients))
        view.facts.append(("target", listener["target"]))
    view.facts.append(("health", _health(_shown(actors, "health"))))
    answers = announcement.get("registries", {})
    for link in _links(actors):
        answer = answers.get(link["registry"], {})
        view.facts.append(("registry", _registration(link, answer)))
    view.facts += _traffic(ok, actors, listener)
    return view


def _health(health: Fields) -> str:
    if not health:
        return "not checked"
    if health["healthy"] is None:
        return f"not known yet ({health['check']})"
    state = "healthy" if health["healthy"] else "unhealthy"
    probed = seconds(health["last_probe_age"])
    return (
        f"{state} for {_since(health['since'])}: {_cut(health['last_reason'])} {probed} ago "
        f"({health['check']})"
    )


def _registration(link: Fields, answer: Fields) -> str:
    text = f"{short(link['registry'])} "
    held = next(iter(link["registrations"]), None)
    if held is None:
        text += "not registered"
    elif held["state"] == "leased":
        text += f"leased, {seconds(held['lease'])} left"
    elif held["state"] == "registered":
        text += "registered without a lease"
    elif held["refusal"]:
        text += f"refused: {_cut(held['refusal'])}"
    else:
        text += "not registered yet"
    if answer.get("registered"):
        text += f", registered {seconds(answer['age'])} ago"
    return text if link["connected"] else f"{text}; {_away(link)}"


def _registry(ok: Fields, actors: Fields) -> _View:
    server, held = _shown(actors, "server"), _shown(actors, "table")
    key = str(server.get("public_key") or ok["summary"].get("key", ""))
    view = _View(facts=[("key", key)])
    if held:
        view.facts.append(("instances", _instances(held)))
    if server:
        began = server["counters"].get("accepted", 0)
        sessions = f"{server['sessions']} now, {began} since {_start(ok, 'server')}"
        view.facts += [("sessions", sessions), ("policy", _policy(server["allowed"]))]
    refused = _refusals(server.get("counters", {}), held.get("counters", {}))
    if refused:
        view.facts.append(("refused", refused))
    view.facts.append(("bytes", _bytes(actors)))
    services = held.get("services", ())
    view.headers = ("SERVICE", "KEY", "VERIFIED", "LEASE", "AGE", "INSTANCE")
    view.rows = [_instance(each) for each in services[:MAX_INSTANCES]]
    more = held.get("instances", 0) - len(view.rows)
    if more > 0:
        view.note = f"... and {more} more: hyperseaport list {key}"
    return view


def _instances(held: Fields) -> str:
    services, number = held["services"], held["instances"]
    verified = sum(bool(each["verified"]) for each in services)
    text = f"{number} of {_plural(held['roles'], 'role')}: {verified} verified, "
    text += f"{len(services) - verified} unverified"
    return text if number <= len(services) else f"{text} of the first {len(services)}"


def _policy(allowed: Fields) -> str:
    if all(each is None for each in allowed.values()):
        return "open: everybody may register and look for services"
    may = {"connect": "connect", "register": "register", "query": "look for services"}
    return ", ".join(
        f"{'everybody' if number is None else _plural(number, 'key')} may {may[what]}"
        for what, number in allowed.items()
        if number is not None or what != "connect"
    )


def _refusals(server: Fields, held: Fields) -> str:
    counted = [("sessions", server.get("refused", 0))]
    for name, number in held.items():
        kind, _, reason = name.partition(".")
        if kind == "refused":
            counted.append((reason, number))
    return ", ".join(f"{number} {reason}" for reason, number in counted if number)


def _instance(entry: Fields) -> Row:
    return (
        _role(entry, "version"),
        short(entry["key"]),
        "yes" if entry["verified"] else "no",
        seconds(entry["remaining"]),
        seconds(entry["age"]),
        short(entry["instance"] or "-"),
    )


def _dht(_ok: Fields, actors: Fields) -> _View:
    rows: list[Row] = []
    for path, fields in actors.items():
        metrics = fields.get("metrics")
        if metrics is None:
            continue
        # Those of others, that is: what came and is no answer to its own, nor nonsense.
        asked = metrics.get("dht.received", 0) - sum(
            metrics.get(f"dht.{name}", 0)
            for name in ("ignored", "malformed", "unmatched", "responses")
        )
        address = fields.get("address", "not yet")
        rows.append((path.rpartition("/")[2], address, fields.get("nodes", "-"), asked))
    return _View(headers=("NODE", "ADDRESS", "KNOWN NODES", "REQUESTS"), rows=rows)


def _relay(ok: Fields, actors: Fields) -> _View:
    listener, books = _shown(actors, "listener"), _shown(actors, "books")
    summary = ok["summary"]
    view = _View(facts=[("key", str(listener.get("public_key") or summary.get("key", "")))])
    if books:
        counted = books["counters"]
        now = f"{books['sessions']} of {_plural(books['keys'], 'key')}"
        view.facts.append(("sessions", f"{now}, {counted['accepted']} since {_start(ok, 'books')}"))
        now = f"{books['pairs']} now, {books['waiting']} waiting for the other half"
        view.facts.append(("pairs", f"{now}, {counted['paired']} since {_start(ok, 'books')}"))
        view.facts.append(("passed on", size(books["bytes"])))
        reasons = (("above the rate", books["dropped"]), ("from strangers", books["strangers"]))
        dropped = [f"{number} {what}" for what, number in reasons if number]
        if dropped:
            view.facts.append(("dropped", f"{' and '.join(dropped)} (packets)"))
        reasons = (
            ("sessions", counted["refused"] + listener.get("refused", 0)),
            ("requests", counted["ignored"]),
        )
        refused = [f"{number} {what}" for what, number in reasons if number]
        if refused:
            view.facts.append(("refused", ", ".join(refused)))
    if "max_rate" in summary:
        rate, sessions = size(summary["max_rate"]), summary["max_sessions"]
        view.facts.append(("each key", f"{_plural(sessions, 'session')}, {rate}/s"))
    if listener:
        allowed = listener["allowed"]
        may = "open: everybody may use it" if allowed is None else f"{_plural(allowed, 'key')} may"
        view.facts.append(("policy", may))
    return view


_VIEWS: Mapping[str, Callable[[Fields, Fields], _View]] = {
    "proxy": _proxy,
    "service": _service,
    "registry": _registry,
    "dht": _dht,
    "relay": _relay,
}

# What several programs have


def _shown(actors: Fields, name: str) -> Fields:
    """What the first actor of this name shows; nothing when there is none."""
    for path, fields in actors.items():
        if path.rpartition("/")[2] == name:
            found: Fields = fields
            return found
    return {}


def _links(actors: Fields) -> list[Fields]:
    return [fields for path, fields in actors.items() if path.startswith("/node/links/")]


def _traffic(ok: Fields, actors: Fields, listener: Fields) -> Iterator[tuple[str, str]]:
    now = _shown(actors, "pipes").get("children", 0)
    text = f"{now} now, {listener.get('accepted', 0)} since {_start(ok, 'listener')}"
    refused = listener.get("refused")
    yield "connections", f"{text}, {refused} refused" if refused else text
    endpoint = _shown(actors, "endpoint")
    if "traffic_age_s" in endpoint:
        age = endpoint["traffic_age_s"]
        # What `healthy` is worth: bytes of clients and of the service went through.
        yield "traffic", "none yet" if age is None else f"last {seconds(age)} ago"
    yield "bytes", _bytes(actors)


def _start(ok: Fields, who: str) -> str:
    """Since when an actor has counted: it may have been among those that were restarted."""
    return f"the {who}'s start" if ok.get("restarts") else "start"


def _bytes(actors: Fields) -> str:
    metrics = _shown(actors, "endpoint").get("metrics", {})
    received, sent = metrics.get("bytes.received", 0), metrics.get("bytes.sent", 0)
    return f"{size(received)} received, {size(sent)} sent"


def _session(link: Fields) -> str:
    key = short(link["registry"])
    if not link["connected"]:
        return f"{key} {_away(link)}"
    return f"{key} connected for {_since(link['since'])}, heard {seconds(link['age'])} ago"


def _away(link: Fields) -> str:
    if link["since"] is None:
        return "not asked yet"
    text = f"away for {_since(link['since'])}, heard {seconds(link['age'])} ago"
    return f"{text}: {_cut(link['error'])}" if link["error"] else text


def _restarts(ok: Fields) -> str:
    failures = ok.get("failures", ())
    number = str(ok.get("restarts", 0) or "none")
    if not failures:
        return number
    shown = [f"{each['path']}: {_cut(each['last_reason'])}" for each in failures[:MAX_FAILURES]]
    if len(failures) > MAX_FAILURES:
        shown.append(f"and {len(failures) - MAX_FAILURES} more: see `tree`")
    return f"{number} ({'; '.join(shown)})"


def _role(fields: Fields, version: str) -> str:
    role, wanted = fields.get("role", ""), fields.get(version)
    return f"{role}@{wanted}" if wanted else str(role)


def _since(unix: float) -> str:
    return seconds(max(time.time() - unix, 0.0))


def _cut(text: object) -> str:
    text = str(text)
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."


def _plural(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


# Everything


def _everything(ok: Fields) -> Iterator[tuple[str, str, str]]:
    for name, value in _flat(ok["summary"]):
        yield "", name, value
    for path, fields in ok["actors"].items():
        for name, value in _flat(fields):
            if _is_idle(name, value):
                continue
            yield path, name, value
            path = ""


def _is_idle(name: str, value: object) -> bool:
    """A counter that has not counted anything: there are dozens."""
    return name.startswith("metrics.") and value == "0"


def _flat(fields: Fields, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The values in nested objects, by dotted names."""
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{name}", text
