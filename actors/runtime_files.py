"""Where control sockets lie: one of each running program, in a directory of the user's own.

Its own module, because the commands that look into running programs load nothing else of this
package's heavier parts.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import warnings
from pathlib import Path

from ..transport.errors import LocalError

SUFFIX = ".sock"


def runtime_directory() -> Path:
    """The user's directory for control sockets, which need not exist yet."""
    import platformdirs

    with warnings.catch_warnings():
        # It warns where a login has no such directory and it has to take one in /tmp. We see to
        # owner and mode ourselves.
        warnings.simplefilter("ignore")
        return Path(platformdirs.user_runtime_dir("hyperseaport", appauthor=False))


def control_path(command: str, directory: Path | None = None) -> Path:
    """Where this process has its control socket."""
    return (directory or runtime_directory()) / f"{command}-{os.getpid()}{SUFFIX}"


def own_directory(directory: Path) -> None:
    """Make sure that a directory exists and that nobody else gets at what is in it.

    Raises LocalError: it is somebody else's, open to others, no directory, or cannot be made.
    """
    try:
        for each in (*reversed(directory.parents), directory):
            if not each.exists():
                each.mkdir(0o700, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise LocalError(f"cannot make {directory}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise LocalError(f"{directory} is not a directory: remove it")
    if found.st_uid != os.geteuid():
        raise LocalError(f"{directory} belongs to user {found.st_uid}: choose another directory")
    if found.st_mode & 0o077:
        raise LocalError(f"others may look into {directory}: chmod 700 {directory}")


def bind(path: Path) -> socket.socket:
    """A socket that will listen at `path`, for its owner only. A dead program's is replaced.

    Raises LocalError: a program listens there already, or nothing can.
    """
    if _is_dead(path):
        path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(str(path))
        # Nobody can connect before it listens.
        path.chmod(0o600)
    except OSError as error:
        bound.close()
        # Of a path that is too long, Python says so itself, without a number.
        raise LocalError(f"cannot listen on {path}: {error.strerror or error}") from error
    return bound


def sweep(directory: Path, command: str) -> None:
    """Remove the sockets that processes of this command left when they died."""
    for path in sockets(directory):
        name, _, number = path.stem.rpartition("-")
        if name == command and number.isdecimal() and not _runs(int(number)) and _is_dead(path):
            path.unlink(missing_ok=True)


def sockets(directory: Path) -> list[Path]:
    """The control sockets of this user in a directory, in the order of their names, dead ones
    included."""
    try:
        entries = [*directory.iterdir()]
    except OSError:
        return []
    return sorted(path for path in entries if path.name.endswith(SUFFIX) and _is_own_socket(path))


def _is_own_socket(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid()


def _is_dead(path: Path) -> bool:
    """It is a socket on which nobody listens."""
    if not _is_own_socket(path):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # Whoever listens but is busy has a full queue: that is an error too, but another one.
        probe.setblocking(False)
        try:
            return probe.connect_ex(str(path)) == errno.ECONNREFUSED
        except OSError:
            return False


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
