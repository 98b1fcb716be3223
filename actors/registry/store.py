"""What the registry knows, kept in one SQLite file across restarts and kills.

What was put, removed and buried is collected in memory; `Store.commit` writes all of it in one
transaction, which is there after ``kill -9`` once `commit` has returned. The file is in WAL mode
with ``synchronous=NORMAL``: a commit costs a write and no fsync, so a power cut may take the last
commits, and never half of one.

A file that cannot be used is refused with one line, and stays byte for byte as it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import sqlite3
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any
from zlib import crc32

from ...transport.errors import Closed, InvalidInput, LocalError

#: `HSPR`: how SQLite, `file` and we tell this file from those of other applications.
APPLICATION_ID = 0x48535052
#: What brings a file of version n to version n + 1, at index n. An empty file has version 0. All
#: that a file needs happens in one transaction. Published steps never change: add another.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # Texts are UTF-8 in blobs: what JSON can say, unpaired surrogates included, fits in there.
        # `record` is `HEAD`, meta, signature, statement: a column each would make reading a
        # third slower. `checksum` finds what SQLite does not: bytes that changed inside a value.
        """CREATE TABLE service (
            service_key BLOB NOT NULL, holder BLOB NOT NULL, role BLOB NOT NULL,
            version BLOB NOT NULL, record BLOB NOT NULL, checksum INTEGER NOT NULL,
            PRIMARY KEY (service_key, holder, role, version)
        ) WITHOUT ROWID""",
        """CREATE TABLE buried (
            service_key BLOB PRIMARY KEY, sequence INTEGER NOT NULL, until REAL NOT NULL,
            checksum INTEGER NOT NULL
        ) WITHOUT ROWID""",
        "CREATE INDEX buried_until ON buried (until)",
    ),
)
SCHEMA_VERSION = len(MIGRATIONS)
#: What an SQLite integer holds: sequences come from the network, and JSON knows no limit.
MAX_INTEGER = 2**63 - 1
#: Bytes of the write-ahead log that stay on the disk when a large batch has been moved into the
#: database: SQLite moves it at 1,000 pages, 4 MiB.
MAX_IDLE_LOG = 8 * 1024 * 1024
#: How a record begins: sequence, issued, ttl, bytes of the meta object, bytes of the signature (0
#: for a plain registration).
HEAD = struct.Struct("<qqdIB")

_KEY = 32
_SIGNATURE = 64
# The parts of a database's first 100 bytes that tell whose it is (SQLite file format, 1.3).
_HEADER = struct.Struct(">16s44xI4xI28x")
_MAGIC = b"SQLite format 3\0"
_GRAVE = struct.Struct("<qd")

_PUT = "INSERT OR REPLACE INTO service VALUES (?, ?, ?, ?, ?, ?)"
_REMOVE = "DELETE FROM service WHERE (service_key, holder, role, version) = (?, ?, ?, ?)"
_BURY = "INSERT OR REPLACE INTO buried VALUES (?, ?, ?, ?)"
_EXHUME = "DELETE FROM buried WHERE until <= ?"
_FORGET = "DELETE FROM buried WHERE service_key = ?"
# Of most rows both keys are the same, which is not read twice.
_ROWS = """SELECT service_key, nullif(holder, service_key), role, version, record, checksum
    FROM service"""
_BURIED = "SELECT * FROM buried"


#: Service key, holder, role, version: what tells rows apart.
Place = tuple[bytes, bytes, str, str]
#: A row as it lies in the file, as a start has all of them and needs little of each: its place, and
#: `HEAD`, meta, signature and statement in one.
Record = tuple[bytes, bytes, str, str, bytes]


class _Changed(Exception):
    """A row is not what was written."""


class StoreError(LocalError):
    """The file cannot be used; it is as it was."""


class CommitFailed(StoreError):
    """Nothing of what was put, removed and buried since the last commit is in the file. The store
    still has it: `commit` may be called again."""


@dataclass(slots=True, unsafe_hash=True)
class Row:
    """A service as one holder registered it. The first four fields tell rows apart."""

    #: 32 bytes.
    service_key: bytes
    #: 32 bytes: the key of the connection that registered it; of a lease, the service key.
    holder: bytes
    role: str
    version: str
    #: JSON text.
    meta: str
    #: Of a lease: the signed text as it came, 64 bytes, and what the text says. Else empty.
    statement: str = ""
    signature: bytes = b""
    sequence: int = 0
    #: Unix milliseconds.
    issued: int = 0
    #: Seconds.
    ttl: float = 0.0

    @property
    def place(self) -> Place:
        return self.service_key, self.holder, self.role, self.version


class Store:
    """Rows, and the highest sequence of keys that have none: "buried" ones.

    `records` and `buried` tell what has been committed. One store uses a file at a time: it holds a
    lock until `close` or its process's end, however that comes.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        """Open the file, or make it (mode 0600, and its folder with 0700); ``None`` keeps nothing.
        `clock` tells the Unix time in seconds.

        Raises StoreError: it is no database, damaged, of a newer version, another application's,
        in use, or cannot be read and written.
        """
        self._path = path if path is None else Path(os.path.realpath(path))
        self._clock = clock
        # None for a row that goes. Bounded by who calls `commit`: one change a row.
        self._changes: dict[Place, Row | None] = {}
        # None for one that goes.
        self._graves: dict[bytes, tuple[int, float] | None] = {}
        self._opened = contextlib.ExitStack()
        self._db: sqlite3.Connection | None = None
        if self._path is None:
            return
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, _locked(self._path))
            self._db = _connected(self._path, _is_empty(self._path))
            opened.callback(self._db.close)
            self._opened = opened.pop_all()

    def records(self) -> Iterator[Record]:
        """All rows, in no particular order. Raises StoreError: the file turns out damaged, and has
        been closed."""
        texts = _Texts()
        with self._reading(_ROWS) as rows:
            for key, other, role, version, content, checksum in rows:
                holder = key if other is None else other
                _check(checksum, key, holder, role, version, content)
                yield key, holder, texts[role], texts[version], content

    def buried(self) -> Iterator[tuple[bytes, int, float]]:
        """Key, sequence and end (Unix seconds) of those whose end has not come. Raises StoreError:
        as `records`."""
        now = self._clock()
        with self._reading(_BURIED) as records:
            for key, sequence, until, checksum in records:
                _check(checksum, key, _numbers(sequence, until))
                if until > now:
                    yield key, sequence, until

    def put(self, row: Row) -> None:
        """Make or replace a row, at the next commit. Raises InvalidInput: a number or a key that
        does not fit."""
        if not len(row.service_key) == len(row.holder) == _KEY:
            raise InvalidInput(f"a row's keys have {_KEY} bytes each")
        if len(row.signature) not in (0, _SIGNATURE) or not math.isfinite(row.ttl):
            raise InvalidInput(f"a row's signature has {_SIGNATURE} bytes, its ttl is finite")
        _check_integer(row.sequence)
        _check_integer(row.issued)
        if self._path is not None:
            self._changes[row.place] = row

    def remove(self, place: Place) -> None:
        """Take out the row that is there, if there is one, at the next commit."""
        if self._path is not None:
            self._changes[place] = None

    def bury(self, key: bytes, sequence: int, until: float) -> None:
        """Remember a key's highest sequence until then (Unix seconds), at the next commit. A
        higher one and a later end that are known for it stay. Raises InvalidInput: as `put`."""
        if len(key) != _KEY or not math.isfinite(until):
            raise InvalidInput(f"a key has {_KEY} bytes, its end is finite")
        _check_integer(sequence)
        if self._path is not None:
            before = self._graves.get(key) or (0, 0.0)
            self._graves[key] = max(sequence, before[0]), max(until, before[1])

    def forget(self, key: bytes) -> None:
        """Take out a buried key, if it is there, at the next commit."""
        if self._path is not None:
            self._graves[key] = None

    def commit(self) -> None:
        """Make what has changed since the last commit durable against ``kill -9``: all of it in
        one transaction.

        Raises CommitFailed: nothing of it was written (a full disk, say), and all of it stays for
        the next attempt.
        """
        if self._path is None:
            return
        if self._db is None:
            raise Closed(f"the store {self._path} is closed: open it again")
        if not self._changes and not self._graves:
            return
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            self._write(db)
            db.execute("COMMIT")
        except BaseException as error:
            # Most failures have ended the transaction by now, not all.
            if db.in_transaction:
                db.execute("ROLLBACK")
            if isinstance(error, sqlite3.DatabaseError):
                raise CommitFailed(_line(self._path, error)) from error
            raise
        self._changes.clear()
        self._graves.clear()

    def close(self) -> None:
        """Let go of the file. What has not been committed is lost. Can be called twice."""
        self._db = None
        self._opened.close()

    def _write(self, db: sqlite3.Connection) -> None:
        # In the file's order: what is near there is written at once.
        changes = sorted(self._changes.items(), key=itemgetter(0))
        gone = [place for place, row in changes if row is None]
        here = [row for _, row in changes if row is not None]
        if gone:
            db.executemany(_REMOVE, ((*place[:2], *map(_encoded, place[2:])) for place in gone))
        if here:
            db.executemany(_PUT, map(_values, here))
        if self._graves:
            graves = sorted(self._graves.items())
            db.execute(_EXHUME, (self._clock(),))
            db.executemany(_FORGET, [(key,) for key, grave in graves if grave is None])
            db.executemany(_BURY, [_grave(db, key, *grave) for key, grave in graves if grave])

    @contextlib.contextmanager
    def _reading(self, query: str) -> Iterator[Iterable[Any]]:
        if self._path is None:
            yield ()
            return
        if self._db is None:
            raise Closed(f"the store {self._path} is closed: open it again")
        try:
            with contextlib.closing(self._db.execute(query)) as records:
                yield records
        except (sqlite3.DatabaseError, _Changed) as error:
            _keep_log(self._db)
            self.close()
            raise StoreError(_line(self._path, error)) from error


def _locked(path: Path) -> int:
    """A descriptor that keeps other registries out until it is closed.

    SQLite's own lock comes on top, and keeps all other programs out. It alone would not do: it is
    lost as soon as this process closes any descriptor of the file, as `_is_empty` does.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(
            f"cannot keep the registry's table in {path}: {error.strerror or error} ({lock}); "
            "choose a file in a folder that can be written"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise StoreError(
            f"the store {path} is in use by another running registry: stop that one, or give this "
            "one a file of its own"
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise StoreError(
            f"cannot lock {lock}: {error.strerror or error}; choose a file on a local disk"
        ) from error
    return descriptor


def _is_empty(path: Path) -> bool:
    """True for a file without content, which is made if there is none. Raises StoreError: not a
    file of ours. Looks without SQLite, which writes to a file as soon as it finds a log beside."""
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise StoreError(f"the store {path} is no regular file: choose another one")
            head = file.read(_HEADER.size)
        log = path.with_name(f"{path.name}-wal")
        has_log = log.exists() and log.stat().st_size > 0
    except OSError as error:
        raise StoreError(
            f"cannot open the store {path}: {error.strerror or error}; see to its permissions, or "
            "choose another file"
        ) from error
    if not head and has_log:
        # SQLite would take the log for a leftover and delete it.
        raise StoreError(
            f"the store {path} is empty, but {log.name} beside it holds changes: put the file back "
            "that it belongs to, or move it away"
        )
    if not head:
        return True
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise StoreError(f"{path} is no SQLite database: choose another file for the store")
    _, version, application = _HEADER.unpack(head)
    if application != APPLICATION_ID:
        raise StoreError(
            f"{path} is another application's database: choose another file for the store"
        )
    _check_version(path, version)
    return False


def _connected(path: Path, empty: bool) -> sqlite3.Connection:
    """The only connection to the file, which has the newest schema then. Raises StoreError."""
    try:
        db = sqlite3.connect(path, isolation_level=None, timeout=0.0)
    except sqlite3.DatabaseError as error:
        raise StoreError(_line(path, error)) from error
    try:
        db.text_factory = bytes
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA synchronous=NORMAL")
        # The log may know of a later version than the file's header.
        (version,) = db.execute("PRAGMA user_version").fetchone()
        _check_version(path, version)
        if not empty:
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != b"ok":
                raise _damaged(path, verdict.decode(errors="replace").splitlines()[-1])
        _migrate(db, version)
        # Only now: so an identifiable header is in the file itself from its beginning, not just in
        # its log.
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA journal_size_limit={MAX_IDLE_LOG}")
    except BaseException as error:
        _keep_log(db)
        db.close()
        if isinstance(error, sqlite3.DatabaseError):
            raise StoreError(_line(path, error)) from error
        raise
    return db


def _keep_log(db: sqlite3.Connection) -> None:
    """Have the file left alone by the `close` that must come next: it would move the log, which a
    killed registry may have left, into it. What is interrupted is that."""
    db.interrupt()


def _migrate(db: sqlite3.Connection, version: int) -> None:
    if version == SCHEMA_VERSION:
        return
    db.execute("BEGIN EXCLUSIVE")
    for step in MIGRATIONS[version:]:
        for statement in step:
            db.execute(statement)
    db.execute(f"PRAGMA application_id={APPLICATION_ID}")
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    db.execute("COMMIT")


def _check_version(path: Path, version: int) -> None:
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"the store {path} has version {version}, this program knows {SCHEMA_VERSION}: it was "
            "written by a newer hyperseaport; use that one, or another file"
        )


def _check_integer(number: int) -> None:
    if not 0 <= number <= MAX_INTEGER:
        raise InvalidInput(f"a sequence or time in a store is between 0 and {MAX_INTEGER}")


def _line(path: Path | None, error: sqlite3.DatabaseError | _Changed) -> str:
    """What is wrong with the file, and what to do."""
    if isinstance(error, _Changed):
        return str(_damaged(path, str(error)))
    # The kind of an error is the lowest byte of its code.
    match error.sqlite_errorcode & 0xFF:
        # The last: tables that are not what they were made as.
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_ERROR:
            return str(_damaged(path, str(error)))
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return (
                f"the store {path} is in use by another program: stop that one, or choose another "
                "file"
            )
        case sqlite3.SQLITE_FULL:
            return f"the store {path} cannot be written, its disk is full: make room there"
    return (
        f"the store {path} cannot be read and written ({error}): see to its disk and to its "
        "permissions"
    )


def _damaged(path: Path | None, what: str) -> StoreError:
    return StoreError(
        f"the store {path} is damaged ({what}): put a copy of it back, or move it away with what "
        "lies beside it, to begin with an empty one"
    )


def packed(row: Row) -> Record:
    meta, statement = _encoded(row.meta), _encoded(row.statement)
    head = HEAD.pack(row.sequence, row.issued, row.ttl, len(meta), len(row.signature))
    return *row.place, b"".join((head, meta, row.signature, statement))


def unpacked(record: Record) -> Row:
    key, holder, role, version, content = record
    sequence, issued, ttl, meta_size, signature_size = HEAD.unpack_from(content)
    signature = HEAD.size + meta_size
    statement = signature + signature_size
    return Row(
        key,
        holder,
        role,
        version,
        _decoded(content[HEAD.size : signature]),
        _decoded(content[statement:]),
        content[signature:statement],
        sequence,
        issued,
        ttl,
    )


def _values(row: Row) -> tuple[Any, ...]:
    """In the order of the columns."""
    role, version = map(_encoded, (row.role, row.version))
    values = (row.service_key, row.holder, role, version, packed(row)[-1])
    return *values, crc32(b"".join(values))


def _grave(db: sqlite3.Connection, key: bytes, sequence: int, until: float) -> tuple[Any, ...]:
    """In the order of the columns; with what is known already, if that is more."""
    known = db.execute("SELECT sequence, until FROM buried WHERE service_key = ?", (key,))
    for old_sequence, old_until in known:
        sequence, until = max(sequence, old_sequence), max(until, old_until)
    return key, sequence, until, crc32(key + _numbers(sequence, until))


def _check(checksum: int, *blobs: bytes) -> None:
    try:
        intact = crc32(b"".join(blobs)) == checksum
    except TypeError:
        intact = False  # A value has become one of another type.
    if not intact:
        raise _Changed("a row does not fit its checksum")


def _numbers(sequence: int, until: float) -> bytes:
    try:
        return _GRAVE.pack(sequence, until)
    except struct.error:
        return b""


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class _Texts(dict[bytes, str]):
    """Roles and versions: many rows have the same, and share it."""

    def __missing__(self, data: bytes) -> str:
        text = self[data] = _decoded(data)
        return text


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
