"""The addresses of tasks, checked when they are read. Pure; no name is looked up.

Rules
    * An address is ``host:port``; an IPv6 host stands in brackets, as in a URL: ``[::1]:2222``.
    * Each task has an address of its own.
    * Port 0 stands for no port: chief, workers and evaluator listen on nothing, so they need none. A ps does.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from paramserver.cluster.spec import ClusterSpec
from paramserver.cluster.task import Role
from paramserver.errors import ConfigError

LAST_PORT = 65535


class Address(NamedTuple):
    """A host, without brackets, and a port."""

    host: str
    port: int


def parse_address(text: str, what: str, *, least_port: int = 1) -> Address:
    """Return the host and port of an address.

    Args:
        text: The address.
        what: What the address is of, for messages.
        least_port: The lowest port that is allowed.

    Raises:
        ConfigError: If it is malformed; the message says how to mend it.

    >>> parse_address("localhost:2222", "address of ps:0")
    Address(host='localhost', port=2222)
    >>> parse_address("[::1]:2222", "address of ps:0").host
    '::1'
    >>> parse_address("http://localhost:2222", "address of ps:0")
    Traceback (most recent call last):
    paramserver.errors.ConfigError: address of ps:0: expected host:port, got 'http://localhost:2222'; leave out 'http://'
    """
    if advice := _advice(text, least_port):
        raise ConfigError(f"{what}: expected host:port, got {text!r}; {advice}")
    host, _, port = text.rpartition(":")
    return Address(host.strip("[]"), int(port))


def check_addresses(cluster: ClusterSpec, source: str, *, least_ps_port: int = 1) -> None:
    """Check the addresses of all tasks.

    Args:
        cluster: The cluster.
        source: Where the cluster comes from, for messages.
        least_ps_port: The lowest port of a ps; 0 allows one that the system picks.

    Raises:
        ConfigError: If an address is malformed, or two tasks have the same.
    """
    owners: dict[Address, str] = {}
    for job in cluster.jobs:
        for index in cluster.task_indices(job):
            task, text = f"{job}:{index}", cluster.task_address(job, index)
            address = parse_address(
                text, f"{source}: address of {task}", least_port=least_ps_port if job == Role.PS else 0
            )
            other = owners.setdefault(address._replace(host=address.host.lower()), task)
            if other != task and address.port:
                raise ConfigError(
                    f"{source}: address of {task}: {text!r} is also that of {other}; give each task its own port"
                )


def _advice(text: str, least_port: int) -> str:
    """Return how to mend an address; "" for one that is well-formed."""
    scheme, is_url, _ = text.partition("://")
    if is_url:
        return f"leave out {scheme + '://'!r}"
    if "," in text:
        return f"it names several tasks; write them as a list: {[each.strip() for each in text.split(',')]}"
    if text != "".join(text.split()):
        return "remove the blanks"
    host, _, port = text.rpartition(":")
    return _advice_for_host(text, host) or _advice_for_port(port, least_port)


def _advice_for_host(text: str, host: str) -> str:
    if (_is_ipv6(text.strip("[]")) and not text.startswith("[")) or _is_ipv6(host):
        return "put an IPv6 address in brackets, to tell its port: '[::1]:2222'"
    if ":" not in text or text.endswith("]"):
        return f"it has no port; add one, such as '{text}:2222'"
    if not host:
        return "it has no host; name it as the other tasks reach it"
    inner = host.removeprefix("[").removesuffix("]")
    if len(host) - len(inner) == 2:  # both brackets
        return "" if _is_ipv6(inner) else "brackets are for IPv6 addresses only"
    return "it has more than one colon, or a bracket alone" if set(host) & set("[]:") else ""


def _advice_for_port(port: str, least: int) -> str:
    if not (port.isascii() and port.isdecimal()):
        return f"{port!r} is no port; expected a number from {least} to {LAST_PORT}"
    if not least <= int(port) <= LAST_PORT:
        return f"a port is a number from {least} to {LAST_PORT}"
    return ""


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
