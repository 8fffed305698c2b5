"""The sockets on which a ps waits for workers: one TCP address, and one local socket for workers on the same host."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket

from paramserver.errors import AddressError
from paramserver.layout.lanes import check_platform
from paramserver.memory import shared_file

BACKLOG = 1024


class Listener:
    """Listens for connections, which `reception` accepts. Any thread may call `close`.

    Args:
        address: ``host:port`` to bind; port 0 lets the system choose. The host is the name by which workers reach this
            task, so the task listens on all interfaces, unless the host is a loopback address: on those of IPv4 or IPv6
            for an IP address, and on all for a name.
        task: The listening task, for messages.
        descriptor: An inherited listening socket to use instead of ``address``.

    Attributes:
        is_closed: Whether `close` was called.
        sockets: The listening sockets; they do not block.
        local_socket: The abstract name of the local socket; "" if there is none.

    Raises:
        ConfigError: If this system has no lanes.
        AddressError: If the address cannot be bound.
    """

    def __init__(self, address: str, task: str, descriptor: int | None = None) -> None:
        check_platform(f"serving as {task}")
        self.is_closed = False
        self.sockets = [_listen(address, task) if descriptor is None else socket.socket(fileno=descriptor)]
        self._port: int = self.sockets[0].getsockname()[1]
        self.local_socket = f"paramserver-{secrets.token_hex(16)}" if shared_file.can_share() else ""
        if self.local_socket:
            self.sockets.append(_listen_locally(self.local_socket))
        for listening in self.sockets:
            listening.setblocking(False)
        self._wake: tuple[int, ...] = os.pipe()

    @property
    def port(self) -> int:
        """TCP port of the listening socket."""
        return self._port

    @property
    def is_exposed(self) -> bool:
        """Whether tasks on other hosts may reach it: it listens on an address that is not a loopback address."""
        hosts = [each.getsockname()[0] for each in self.sockets if each.family != socket.AF_UNIX]
        return not all(map(_is_loopback, hosts))

    @property
    def wake(self) -> int:
        """A descriptor that becomes readable at `close`."""
        return self._wake[0]

    def release(self) -> None:
        """Close the sockets, after the reception has ended or if it never began. Idempotent."""
        self.is_closed = True
        for listening in self.sockets:
            listening.close()
        self.sockets = []
        for descriptor in self._wake:
            os.close(descriptor)
        self._wake = ()

    def close(self) -> None:
        """Have the reception end. Idempotent, and safe in a signal handler."""
        if not self.is_closed:
            self.is_closed = True
            os.write(self._wake[1], b"\0")


def _listen(address: str, task: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        return _listen_as(host, host if _is_loopback(host) else "", int(port))
    except OSError as error:
        raise AddressError(
            f"{task} cannot listen on {address}: {_reason(error)}; "
            "is another process using that port, or is the address in TF_CONFIG wrong?",
            task,
        ) from error


def _listen_as(host: str, interface: str, port: int) -> socket.socket:
    """Listen on the family of a host that is an IP address, and on IPv4 and IPv6 for a name.

    Workers look the name up themselves, and may find an address of either family.
    """
    if ":" in host:
        return socket.create_server((interface, port), family=socket.AF_INET6, backlog=BACKLOG)
    if not interface and not _is_ipv4(host) and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # the system knows IPv6, and it is switched off
                raise
    try:
        return socket.create_server((interface, port), backlog=BACKLOG)
    except socket.gaierror:  # "localhost", where it is a name for IPv6 only
        return socket.create_server((interface, port), family=socket.AF_INET6, backlog=BACKLOG)


def _listen_locally(name: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(f"\0{name}")
    listening.listen(BACKLOG)
    return listening


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def _reason(error: OSError) -> str:
    is_of_lookup = isinstance(error, socket.gaierror)  # whose numbers are none of errno
    return str(error.strerror) if is_of_lookup else os.strerror(error.errno or 0)
