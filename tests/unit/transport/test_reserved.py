"""Free ports, kept for whoever is going to listen on them."""

from __future__ import annotations

import gc
import socket

import pytest

from hyperseaport.transport.errors import LocalError
from hyperseaport.transport.reserved import ReservedPort

KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM)


def taken(kind: socket.SocketKind, port: int) -> bool:
    with socket.socket(socket.AF_INET, kind) as other:
        try:
            other.bind(("127.0.0.1", port))
        except OSError:
            return True
        return False


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_else_gets_it(kind: socket.SocketKind) -> None:
    reserved = ReservedPort(kind, "127.0.0.1")
    assert taken(kind, reserved.number)
    bound = reserved.take()
    assert bound is not None
    with bound:
        assert bound.getsockname() == ("127.0.0.1", reserved.number)
        assert taken(kind, reserved.number)
    assert not taken(kind, reserved.number)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_taken_once(kind: socket.SocketKind) -> None:
    reserved = ReservedPort(kind, "127.0.0.1")
    bound = reserved.take()
    assert bound is not None
    assert reserved.take() is None
    bound.close()


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_nobody_takes_is_free_again(kind: socket.SocketKind) -> None:
    reserved = ReservedPort(kind, "127.0.0.1")
    number = reserved.number
    del reserved
    gc.collect()
    assert not taken(kind, number)


def test_one_that_is_taken_stays_open_without_it() -> None:
    reserved = ReservedPort(socket.SOCK_STREAM, "127.0.0.1")
    bound = reserved.take()
    assert bound is not None
    del reserved
    gc.collect()
    with bound:
        bound.listen()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_ours(kind: socket.SocketKind, host: str) -> None:
    with pytest.raises(LocalError, match=rf"cannot listen on {host} \(.+\): choose another --host"):
        ReservedPort(kind, host)
