"""Where a ps waits for workers."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket

import pytest
from tests.integration.transport.ipv6 import needs_ipv6
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


@needs_ipv6
def test_a_name_is_listened_on_by_ipv4_and_ipv6():
    """Workers may find an address of either family for it."""
    with listening("ps-0.example.invalid:0") as listener:
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.create_connection((host, listener.port)) as dialed:
                assert dialed.family == family


@needs_ipv6
def test_an_ip_address_is_listened_on_by_its_family_alone():
    with listening("192.0.2.1:0") as listener:
        assert _reached(listener) == ["127.0.0.1"]
    with listening("[2001:db8::1]:0") as listener:
        assert _reached(listener) == ["::1"]
    with listening("[::1]:0") as listener:
        assert _reached(listener) == ["::1"]


@needs_ipv6
def test_a_name_for_ipv6_alone_is_listened_on_and_found(monkeypatch):
    kind = socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, port, *__: [(*kind, ("::1", port, 0, 0))])
    name = "ps-0.example.invalid"
    with listening(f"{name}:0") as listener, socket.create_connection((name, listener.port)) as dialed:
        assert dialed.family == socket.AF_INET6


@needs_ipv6
def test_localhost_may_be_a_name_for_ipv6_alone(monkeypatch):
    create = socket.create_server

    def only_ipv6(address, *, family=socket.AF_INET, **options):
        if family == socket.AF_INET:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return create(("::1", address[1]), family=family, **options)

    monkeypatch.setattr(socket, "create_server", only_ipv6)
    with listening("localhost:0") as listener:
        assert _reached(listener) == ["::1"]


def test_without_ipv6_a_name_is_listened_on_by_ipv4(monkeypatch):
    create = socket.create_server

    def without_ipv6(address, *, family=socket.AF_INET, **options):
        if family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, "no IPv6")
        return create(address, family=family, **options)

    monkeypatch.setattr(socket, "create_server", without_ipv6)
    with listening("ps-0.example.invalid:0") as listener:
        assert _reached(listener) == ["127.0.0.1"]


def _reached(listener):
    """The loopback addresses by which a listener can be reached."""
    reached = []
    for host in ("127.0.0.1", "::1"):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, listener.port)):
            reached.append(host)
    return reached


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
