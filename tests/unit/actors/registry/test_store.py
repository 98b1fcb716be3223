"""What is kept comes back; what is no store of ours is refused, and stays as it was."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hyperseaport
from hyperseaport.actors.registry import store as store_module
from hyperseaport.actors.registry.store import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    CommitFailed,
    Row,
    Store,
    StoreError,
    unpacked,
)
from hyperseaport.transport.errors import Closed, InvalidInput, LocalError

KEY_A, KEY_B, KEY_C = (letter * 32 for letter in (b"a", b"b", b"c"))
#: A lease, and two plain registrations of one key.
LEASE = Row(KEY_A, KEY_A, "web", "1.0.0", "{}", '{"v":1}', b"s" * 64, 7, 1_700_000_000_000, 30.0)
PLAIN = Row(KEY_B, KEY_C, "web", "1.0.0", '{"role":"web"}')
OTHER = Row(KEY_B, KEY_C, "web", "1.0.1", '{"role":"web"}')

NOW = 1_000.0
NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "registry.db"


@contextlib.contextmanager
def opened(path: Path | None, now: float = NOW) -> Iterator[Store]:
    with contextlib.closing(Store(path, clock=lambda: now)) as store:
        yield store


def fill(path: Path, *rows: Row) -> None:
    with opened(path) as store:
        for row in rows:
            store.put(row)
        store.commit()


def kept(path: Path) -> set[Row]:
    with opened(path) as store:
        return set(map(unpacked, store.records()))


def graves(path: Path, now: float = NOW) -> set[tuple[bytes, int, float]]:
    with opened(path, now) as store:
        return set(store.buried())


def read(path: Path) -> tuple[set[Row], set[tuple[bytes, int, float]]]:
    with opened(path) as store:
        return set(map(unpacked, store.records())), set(store.buried())


def contents(path: Path) -> dict[str, bytes]:
    """The file and its log. The lock beside them says nothing."""
    return {file.name: file.read_bytes() for file in path.parent.glob(f"{path.name}*[!k]")}


def refused(path: Path, *words: str) -> None:
    """Assert that it cannot be opened nor read, in one line, and that nothing has changed."""
    before = contents(path)
    with pytest.raises(StoreError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    for word in words:
        assert word in line
    assert contents(path) == before


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process; `path`, `Store` and `Row` are there, the path is its first argument."""
    head = (
        "import sys, os, signal; from pathlib import Path; path = Path(sys.argv[1]);"
        "from hyperseaport.actors.registry.store import *\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(hyperseaport.__file__).parents[1])},
    )


def killed(path: Path, code: str) -> None:
    """Run the code in a process that then ends without a word, its log left behind."""
    with run(code + "\nos.kill(os.getpid(), signal.SIGKILL)", path) as process:
        assert process.wait(30) == -signal.SIGKILL
    assert path.with_name(f"{path.name}-wal").stat().st_size > 0


# What is kept.


def test_a_new_store_is_empty(path: Path) -> None:
    with opened(path) as store:
        assert list(store.records()) == []
        assert list(store.buried()) == []


def test_rows_come_back(path: Path) -> None:
    fill(path, LEASE, PLAIN, OTHER)
    assert kept(path) == {LEASE, PLAIN, OTHER}
    with opened(path) as store:
        (lease,) = (each for each in map(unpacked, store.records()) if each.statement)
    assert lease == LEASE
    assert (type(lease.signature), type(lease.sequence), type(lease.ttl)) == (bytes, int, float)


def test_the_first_four_fields_tell_rows_apart(path: Path) -> None:
    newer = Row(KEY_A, KEY_A, "web", "1.0.0", '{"new":true}', "{}", b"t" * 64, 8, 9, 60.0)
    elsewhere = Row(KEY_B, KEY_A, "web", "1.0.0", "{}")
    fill(path, LEASE, PLAIN)
    fill(path, newer, elsewhere)
    assert kept(path) == {newer, PLAIN, elsewhere}


def test_removed_rows_are_gone(path: Path) -> None:
    fill(path, LEASE, PLAIN, OTHER)
    with opened(path) as store:
        store.remove((KEY_B, KEY_C, "web", "1.0.0"))
        store.remove((KEY_C, KEY_C, "nobody", "1.0.0"))
        store.commit()
    assert kept(path) == {LEASE, OTHER}


def test_the_last_change_of_a_row_counts(path: Path) -> None:
    with opened(path) as store:
        store.put(LEASE)
        store.remove(LEASE.place)
        store.remove(PLAIN.place)
        store.put(PLAIN)
        store.commit()
    assert kept(path) == {PLAIN}


def test_what_is_not_committed_is_neither_told_nor_kept(path: Path) -> None:
    with opened(path) as store:
        store.put(LEASE)
        store.bury(KEY_A, 1, NOW + 10)
        assert list(store.records()) == []
        assert list(store.buried()) == []
    assert kept(path) == set()
    assert graves(path) == set()


def test_a_commit_without_changes_writes_nothing(path: Path) -> None:
    with opened(path) as store:
        store.put(LEASE)
        store.commit()
        before = contents(path)
        store.commit()
        assert contents(path) == before


def test_buried_keys_come_back_until_their_end(path: Path) -> None:
    with opened(path) as store:
        store.bury(KEY_A, 3, NOW + 10)
        store.bury(KEY_B, 4, NOW + 20)
        store.commit()
    assert graves(path) == {(KEY_A, 3, NOW + 10), (KEY_B, 4, NOW + 20)}
    assert graves(path, NOW + 10) == {(KEY_B, 4, NOW + 20)}
    # The next burial clears away what is over.
    with opened(path, NOW + 15) as store:
        store.bury(KEY_C, 5, NOW + 30)
        store.commit()
    assert graves(path, NOW) == {(KEY_B, 4, NOW + 20), (KEY_C, 5, NOW + 30)}


@pytest.mark.parametrize("apart", [False, True], ids=["one commit", "two commits"])
def test_a_buried_key_can_be_forgotten(path: Path, apart: bool) -> None:
    with opened(path) as store:
        store.bury(KEY_A, 3, NOW + 10)
        store.bury(KEY_B, 4, NOW + 10)
        if apart:
            store.commit()
        store.forget(KEY_A)
        store.forget(KEY_C)
        store.commit()
        assert set(store.buried()) == {(KEY_B, 4, NOW + 10)}
        # It can be buried again, by whatever number.
        store.forget(KEY_B)
        store.bury(KEY_A, 1, NOW + 10)
        store.commit()
    assert graves(path) == {(KEY_A, 1, NOW + 10)}


@pytest.mark.parametrize("apart", [False, True], ids=["one commit", "two commits"])
def test_the_highest_sequence_and_the_latest_end_stay(path: Path, apart: bool) -> None:
    with opened(path) as store:
        store.bury(KEY_A, 9, NOW + 10)
        if apart:
            store.commit()
        store.bury(KEY_A, 3, NOW + 20)
        store.commit()
    assert graves(path) == {(KEY_A, 9, NOW + 20)}


def test_without_a_path_nothing_is_kept() -> None:
    with opened(None) as store:
        store.put(LEASE)
        store.remove(PLAIN.place)
        store.bury(KEY_A, 1, NOW + 10)
        store.commit()
        assert list(store.records()) == []
        assert list(store.buried()) == []


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    texts=st.tuples(*[st.text(st.characters(exclude_categories=())) for _ in range(4)]),
    numbers=st.tuples(*[st.integers(0, 2**63 - 1)] * 2),
    ttl=st.floats(allow_nan=False, allow_infinity=False),
)
def test_any_text_and_any_number_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    texts: tuple[str, str, str, str],
    numbers: tuple[int, int],
    ttl: float,
) -> None:
    path = tmp_path_factory.mktemp("any") / "registry.db"
    row = Row(KEY_A, KEY_B, *texts, b"s" * 64, *numbers, ttl)
    fill(path, row)
    assert kept(path) == {row}
    shutil.rmtree(path.parent)


@pytest.mark.parametrize(
    "row",
    [
        Row(b"short", KEY_A, "a", "1.0.0", "{}"),
        Row(KEY_A, b"", "a", "1.0.0", "{}"),
        Row(KEY_A, KEY_A, "a", "1.0.0", "{}", signature=b"s"),
        Row(KEY_A, KEY_A, "a", "1.0.0", "{}", sequence=2**63),
        Row(KEY_A, KEY_A, "a", "1.0.0", "{}", sequence=-1),
        Row(KEY_A, KEY_A, "a", "1.0.0", "{}", issued=2**63),
        Row(KEY_A, KEY_A, "a", "1.0.0", "{}", ttl=float("nan")),
        Row(KEY_A, KEY_A, "a", "1.0.0", "{}", ttl=float("inf")),
    ],
)
def test_rows_that_do_not_fit_are_refused_when_they_are_put(path: Path, row: Row) -> None:
    with opened(path) as store:
        with pytest.raises(InvalidInput):
            store.put(row)
        store.commit()
        assert list(store.records()) == []


@pytest.mark.parametrize(
    "grave", [(b"short", 1, 1.0), (KEY_A, 2**63, 1.0), (KEY_A, -1, 1.0), (KEY_A, 1, float("inf"))]
)
def test_burials_that_do_not_fit_are_refused(path: Path, grave: tuple[bytes, int, float]) -> None:
    with opened(path) as store, pytest.raises(InvalidInput):
        store.bury(*grave)


def test_a_closed_store_says_so(path: Path) -> None:
    with opened(path) as store:
        store.close()
        store.put(LEASE)
        with pytest.raises(Closed):
            store.commit()
        with pytest.raises(Closed):
            next(store.records())


# The file.


def test_only_the_owner_can_read_it(path: Path) -> None:
    with opened(path) as store:
        store.put(LEASE)
        store.commit()
        modes = {
            file.name: stat.S_IMODE(file.stat().st_mode)
            for file in [path.parent, *path.parent.iterdir()]
        }
    assert modes == {
        "store": 0o700,
        "registry.db": 0o600,
        "registry.db-wal": 0o600,
        "registry.db.lock": 0o600,
    }


def test_it_says_whose_it_is_and_which_version(path: Path) -> None:
    fill(path, LEASE)
    with contextlib.closing(sqlite3.connect(path)) as db:
        pragmas = ("application_id", "user_version", "journal_mode", "integrity_check")
        values = [db.execute(f"PRAGMA {pragma}").fetchone()[0] for pragma in pragmas]
    assert values == [APPLICATION_ID, SCHEMA_VERSION, "wal", "ok"]


def test_the_header_is_in_the_file_itself_from_the_beginning(path: Path) -> None:
    # Not only in the log: how else would a next start know the file after a kill?
    with opened(path):
        assert path.read_bytes()[68:72] == APPLICATION_ID.to_bytes(4, "big")


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    fill(tmp_path / "registry.db", LEASE)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_an_empty_file_is_a_new_store(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    fill(path, LEASE)
    assert kept(path) == {LEASE}


def test_what_a_killed_registry_committed_is_there(path: Path) -> None:
    killed(path, "s = Store(path); s.put(Row(b'a' * 32, b'a' * 32, 'r', 'v', 'm')); s.commit()")
    assert kept(path) == {Row(KEY_A, KEY_A, "r", "v", "m")}


# One registry at a time.


def test_a_second_store_is_refused(path: Path) -> None:
    with opened(path) as first:
        # Twice: a refused one must not take the first one's lock away when it goes.
        for _ in range(2):
            with pytest.raises(StoreError, match="another running registry"):
                Store(path)
        with run("try: Store(path)\nexcept StoreError as error: print(error)", path) as second:
            output, _ = second.communicate(timeout=30)
        assert output.count("\n") == 1
        assert "in use by another running registry" in output
        first.put(LEASE)
        first.commit()
    assert kept(path) == {LEASE}


def test_a_link_to_the_file_is_the_same_file(path: Path, tmp_path: Path) -> None:
    with opened(path):
        link = tmp_path / "link.db"
        link.symlink_to(path)
        with pytest.raises(StoreError, match="another running registry"):
            Store(link)


def test_other_programs_are_kept_out(path: Path) -> None:
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('{}')"
    with opened(path) as store:
        store.put(LEASE)
        store.commit()
        intruder = subprocess.run(
            [sys.executable, "-c", code.format("DELETE FROM service"), path],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert "locked" in intruder.stderr
    assert kept(path) == {LEASE}


def test_a_file_in_use_by_another_program_is_refused(path: Path) -> None:
    fill(path, LEASE)
    code = (
        "import sqlite3; db = sqlite3.connect(path); db.execute('BEGIN IMMEDIATE')\n"
        "print('here', flush=True); sys.stdin.read()"
    )
    with run(code, path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "here\n"
        with pytest.raises(StoreError, match="in use by another program"):
            Store(path)
        other.kill()
    assert kept(path) == {LEASE}


# What is refused.


def test_no_database(path: Path) -> None:
    path.parent.mkdir()
    for content in (b"x", b"{}" * 500, b"SQLite format 3\0", bytes(4096)):
        path.write_bytes(content)
        refused(path, "no SQLite database", "choose another file")


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_another_applications_database(path: Path, mode: str) -> None:
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA journal_mode={mode}")
        db.execute("CREATE TABLE service (a)")
    refused(path, "another application's", "choose another file")


def test_another_applications_log(path: Path) -> None:
    killed(
        path,
        "path.parent.mkdir(); import sqlite3; db = sqlite3.connect(path)\n"
        "db.execute('PRAGMA journal_mode=wal'); db.execute('CREATE TABLE a (b)')",
    )
    refused(path, "another application's")


@pytest.mark.parametrize("in_log", [False, True], ids=["in the file", "in the log"])
def test_a_newer_version(path: Path, in_log: bool) -> None:
    fill(path, LEASE)
    change = "import sqlite3; db = sqlite3.connect(path); db.execute('PRAGMA user_version=9')"
    if in_log:
        killed(path, change)
    else:
        with run(change, path) as process:
            assert process.wait(30) == 0
    refused(path, "version 9", "newer hyperseaport")


def test_a_log_without_its_file(path: Path) -> None:
    killed(path, "s = Store(path); s.put(Row(b'a' * 32, b'a' * 32, 'r', 'v', 'm')); s.commit()")
    path.write_bytes(b"")
    refused(path, "registry.db-wal", "put the file back")


def test_no_regular_file(path: Path) -> None:
    path.parent.mkdir()
    path.mkdir()
    with pytest.raises(StoreError, match="Is a directory"):
        Store(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="no regular file"):
        Store(path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/registry\.db.*choose a file in a folder"):
        Store(tmp_path / "file" / "registry.db")


@pytest.mark.parametrize("locked", ["folder", "file"])
def test_a_place_that_cannot_be_written(locked: str) -> None:
    with unprivileged_folder() as folder:
        path = folder / "registry.db"
        fill(path, LEASE)
        before = contents(path)
        if locked == "folder":
            path.with_name("registry.db.lock").unlink()
            folder.chmod(0o500)
        else:
            path.chmod(0o400)
        with pytest.raises(StoreError, match=rf"{path}.*Permission denied.*choose"):
            Store(path)
        folder.chmod(0o700)
        path.chmod(0o600)
        assert contents(path) == before
        assert kept(path) == {LEASE}


@contextlib.contextmanager
def unprivileged_folder() -> Iterator[Path]:
    """A folder whose owner we are meanwhile, and not root, to whom everything is permitted."""
    with contextlib.ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, -1)
            os.seteuid(NOBODY)
            undo.callback(os.seteuid, 0)
        yield folder


# Damage.


def many() -> list[Row]:
    rng = random.Random(5)
    rows = []
    for number in range(400):
        key = rng.randbytes(32)
        meta = "m" * rng.randrange(800)
        rows.append(Row(key, key, f"role{number}", "1.0.0", meta, "s" * 300, b"s" * 64, number))
    rows.append(Row(KEY_A, KEY_A, "large", "1.0.0", "m" * 60_000))
    return rows


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a store with many rows and buried keys."""
    path = tmp_path_factory.mktemp("healthy") / "registry.db"
    with opened(path) as store:
        for row in many():
            store.put(row)
            store.bury(row.service_key, row.sequence, NOW + 10)
        store.commit()
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_file(path: Path, healthy: bytes, share: float) -> None:
    path.parent.mkdir()
    path.write_bytes(healthy[: int(len(healthy) * share)])
    refused(path, "damaged", "put a copy of it back")


def test_an_overwritten_page(path: Path, healthy: bytes) -> None:
    path.parent.mkdir()
    pages = len(healthy) // 4096
    for page in random.Random(2).sample(range(1, pages), 20):
        damaged = bytearray(healthy)
        damaged[page * 4096 : (page + 1) * 4096] = random.Random(page).randbytes(4096)
        path.write_bytes(damaged)
        refused(path, "damaged", "put a copy of it back")


def test_no_flipped_bit_changes_what_is_told(path: Path, healthy: bytes) -> None:
    # In the space that no row uses a bit does not matter. Everywhere else the file is refused.
    path.parent.mkdir()
    rng = random.Random(3)
    rows = set(many())
    ends = {(row.service_key, row.sequence, NOW + 10) for row in rows}
    found = 0
    for _ in range(100):
        damaged = bytearray(healthy)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        told = None
        with contextlib.suppress(StoreError):
            told = read(path)
        if told is None:
            found += 1
            assert path.read_bytes() == damaged
        else:
            assert told == (rows, ends)
    assert 30 < found < 100


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE service SET record = 'text'",
        "UPDATE service SET record = zeroblob(40)",
        "UPDATE service SET checksum = 5",
        "UPDATE service SET service_key = 7",
        "UPDATE buried SET sequence = 'many'",
        "UPDATE buried SET until = until + 1",
        "DROP TABLE service",
        "DROP TABLE buried",
        "PRAGMA user_version = 0",
    ],
)
def test_rows_that_are_not_what_was_written(path: Path, damage: str) -> None:
    with opened(path) as store:
        store.put(LEASE)
        store.bury(KEY_A, 1, NOW + 10)
        store.commit()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(damage)
    refused(path, "damaged")


def test_a_refused_file_does_not_swallow_its_log(path: Path, healthy: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(healthy)
    killed(path, "s = Store(path); s.put(Row(b'a' * 32, b'a' * 32, 'r', 'v', 'm')); s.commit()")
    log = path.with_name("registry.db-wal").read_bytes()
    # One damage is found by the probe, one only when rows are read.
    for at, byte in ((healthy.index(b"s" * 300) + 9, b"t"), (2 * 4096, b"\xff")):
        path.write_bytes(healthy[:at] + byte + healthy[at + 1 :])
        refused(path, "damaged")
        assert path.with_name("registry.db-wal").read_bytes() == log
    path.write_bytes(healthy)
    assert Row(KEY_A, KEY_A, "r", "v", "m") in kept(path)


# A commit that fails.


def limit_pages(store: Store) -> Callable[[], object]:
    """SQLite finds its disk full."""
    db = store._db
    assert db is not None
    db.execute("PRAGMA max_page_count=1")
    return lambda: db.execute("PRAGMA max_page_count=1000000")


def limit_file(_store: Store) -> Callable[[], object]:
    """The operating system lets no file grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("limit", "words"), [(limit_pages, "its disk is full"), (limit_file, "see to its disk")]
)
def test_a_failed_commit_leaves_nothing_and_can_be_repeated(
    path: Path, limit: Callable[[Store], Callable[[], object]], words: str
) -> None:
    large = Row(KEY_C, KEY_C, "large", "1.0.0", "m" * 100_000)
    with opened(path) as store:
        store.put(LEASE)
        store.commit()
        unlimit = limit(store)
        try:
            for _ in range(2):
                store.put(large)
                store.put(PLAIN)
                store.remove(LEASE.place)
                store.bury(KEY_A, 1, NOW + 10)
                with pytest.raises(CommitFailed, match=words) as caught:
                    store.commit()
                assert isinstance(caught.value, LocalError)
                assert str(path) in str(caught.value)
                assert set(map(unpacked, store.records())) == {LEASE}
                assert list(store.buried()) == []
        finally:
            unlimit()
        store.commit()
        assert set(map(unpacked, store.records())) == {large, PLAIN}
    assert kept(path) == {large, PLAIN}
    assert graves(path) == {(KEY_A, 1, NOW + 10)}


def test_a_failed_commit_is_not_there_after_a_restart(path: Path) -> None:
    with opened(path) as store:
        store.put(LEASE)
        store.commit()
        limit_pages(store)
        store.put(Row(KEY_C, KEY_C, "large", "1.0.0", "m" * 100_000))
        with pytest.raises(CommitFailed):
            store.commit()
    assert kept(path) == {LEASE}


# Versions.


def test_an_older_version_is_brought_up_in_one_transaction(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(path, LEASE, PLAIN)
    step = ("CREATE TABLE more (a)", "INSERT INTO more VALUES (1)")
    monkeypatch.setattr(store_module, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    # One that fails half-way leaves the file at its version.
    failing = (*store_module.MIGRATIONS, (*step, "INSERT INTO nowhere VALUES (1)"))
    monkeypatch.setattr(store_module, "MIGRATIONS", failing)
    with pytest.raises(StoreError):
        Store(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert db.execute("SELECT name FROM sqlite_master WHERE name = 'more'").fetchall() == []
    monkeypatch.setattr(store_module, "MIGRATIONS", (*store_module.MIGRATIONS[:-1], step))
    assert kept(path) == {LEASE, PLAIN}
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION + 1,)
        assert db.execute("SELECT a FROM more").fetchall() == [(1,)]
    # And only once.
    assert kept(path) == {LEASE, PLAIN}
