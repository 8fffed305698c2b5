"""Where a ps waits for workers."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket

import pytest
from tests.patience import patience

from paramserver.errors import UnavailableError
from paramserver.memory import shared_file
from paramserver.transport.listener import Listener

TIMEOUT = patience(30.0)


@contextlib.contextmanager
def listening(address="127.0.0.1:0", **options):
    listener = Listener(address, "ps:0", **options)
    try:
        yield listener
    finally:
        listener.close()
        listener.release()


def dial(listener):
    return socket.create_connection(("127.0.0.1", listener.port))


def test_it_listens_by_tcp_and_by_its_local_socket():
    with listening() as listener, dial(listener), socket.socket(socket.AF_UNIX) as local:
        local.connect(f"\0{listener.local_socket}")
        by_tcp, by_socket = listener.sockets
        for each, family in ((by_tcp, socket.AF_INET), (by_socket, socket.AF_UNIX)):
            assert not each.getblocking()
            with each.accept()[0] as accepted:
                assert accepted.family == family


def test_a_port_that_is_taken_is_named():
    with listening() as first, pytest.raises(UnavailableError) as caught:
        Listener(f"127.0.0.1:{first.port}", "ps:3")
    assert caught.value.task == "ps:3"
    assert f"ps:3 cannot listen on 127.0.0.1:{first.port}: {os.strerror(errno.EADDRINUSE)}; " in str(caught.value)


def test_a_host_that_is_not_this_one_still_listens_on_every_interface():
    with listening("ps-0.example.invalid:0") as listener, dial(listener):
        pass


def test_an_inherited_socket_is_used():
    inherited = socket.create_server(("127.0.0.1", 0))
    port = inherited.getsockname()[1]
    with listening(descriptor=inherited.detach()) as listener:
        assert listener.port == port


def test_without_shared_memory_it_listens_by_tcp_only(monkeypatch):
    monkeypatch.setattr(shared_file, "can_share", lambda: False)
    with listening() as listener:
        assert listener.local_socket == ""
        assert [each.family for each in listener.sockets] == [socket.AF_INET]


def test_close_wakes_whoever_waits():
    with listening() as listener:
        listener.close()
        assert select.select([listener.wake], [], [], TIMEOUT)[0] == [listener.wake]


@pytest.mark.parametrize("order", [("close", "close", "release", "release"), ("release", "close", "release", "close")])
def test_it_may_be_closed_in_any_order_and_twice(order):
    listener = Listener("127.0.0.1:0", "ps:0")
    for method in order:
        getattr(listener, method)()
    assert listener.is_closed
