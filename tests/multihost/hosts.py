"""Hosts that share nothing but a network, on one machine: Linux namespaces on a bridge.

Rules
    * A host has a network, a mount and a UTS namespace: addresses, a host name, ``/etc/hosts``, ``/tmp`` and
      ``/dev/shm`` of its own. Abstract Unix sockets belong to a network namespace. So nothing of one host is seen by
      another, except what goes through the network.
    * Namespaces have no names here. They are those of a process that ends when its standard input does, and go with it.
      So a test run that is killed leaves nothing, and several at once do not meet: each has a bridge of its own.
    * Names are resolved by ``/etc/hosts`` alone; no host reaches anything outside.

A host may be entered from outside while its test waits: ``nsenter --target PID --net --mount --uts``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from tests.integration.transport.ipv6 import has_ipv6
from tests.multiprocess.warm import Task, Warm

ROOT = Path(__file__).parents[2]
ENTER = "tests.multihost.enter"
COMMANDS = ("ip", "tc", "unshare", "nsenter")

HOLD = "echo; exec cat"
"""Tells that all is there, and holds the namespaces until the standard input ends."""

# Programs and packages may lie below /tmp, as in a clone that is made to be tried; these stay visible.
MAKE_HOST = f"""
hostname "$1"; shift
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
touch /dev/shm/hosts; mount --bind /dev/shm/hosts /etc/hosts; rm /dev/shm/hosts
for kept do
    mkdir -p "/dev/shm${{kept#/tmp}}"; mount --bind "$kept" "/dev/shm${{kept#/tmp}}"
done
mount --move /dev/shm /tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
{HOLD}
"""
MAKE_SWITCH = f"""
ip link add name bridge type bridge mcast_snooping 0
ip link set bridge up
{HOLD}
"""


def why_impossible() -> str:
    """Say why this machine cannot have such hosts; empty if it can."""
    if sys.platform != "linux" or os.geteuid():
        return "needs Linux and root, to make network namespaces"
    if missing := [command for command in COMMANDS if shutil.which(command) is None]:
        return f"needs {', '.join(missing)}; install iproute2 and util-linux"
    made = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "sh", "-ec", MAKE_SWITCH],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return f"this system makes no network namespaces with a bridge: {made.stderr.strip()}" if made.returncode else ""


class Namespaces:
    """Namespaces of their own.

    Args:
        script: Runs inside and holds them.
        arguments: The arguments of the script.

    Attributes:
        pid: The process whose namespaces they are.
    """

    def __init__(self, script: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "--", "sh", "-ec", script, "sh", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise AssertionError(f"no namespaces could be made: exit code {self._process.wait()}")

    def batch(self, command: str, lines: Iterable[str]) -> None:
        """Carry out lines of ``ip`` or ``tc`` inside."""
        subprocess.run(
            ["nsenter", "--target", str(self.pid), "--net", command, "-batch", "-"],
            input="\n".join(lines),
            text=True,
            check=True,
        )

    def close(self) -> None:
        """Let them go. Processes inside must have ended."""
        self._process.communicate()


class Host:
    """One host, which its `Network` makes.

    Args:
        name: Its name.
        number: Its number among the hosts of its network; the last part of its addresses.
        switch: The namespaces with the bridge.
        warm: Starts the processes, if `start` is called.

    Attributes:
        ipv4: Its IPv4 address.
        ipv6: Its IPv6 address.
        root: Its files, as seen from outside.
    """

    def __init__(self, name: str, number: int, switch: Namespaces, warm: Warm | None) -> None:
        self.name = name
        self.ipv4 = f"10.0.0.{number}"
        self.ipv6 = f"fd00::{number:x}"
        self._warm = warm
        self._switch = switch
        self._port = f"port{number}"
        below_tmp = {path for path in (str(ROOT), sys.prefix, sys.base_prefix) if path.startswith("/tmp/")}  # noqa: S108
        self._namespaces = Namespaces(MAKE_HOST, name, *sorted(below_tmp))
        self.root = Path(f"/proc/{self._namespaces.pid}/root")
        plug = f"link add name {self._port} type veth peer name eth0 netns {self._namespaces.pid}"
        switch.batch("ip", [plug, f"link set {self._port} master bridge up"])
        self._namespaces.batch(
            "ip",
            [
                "link set lo up",
                f"addr add {self.ipv4}/24 dev eth0",
                *([f"addr add {self.ipv6}/64 dev eth0 nodad"] if has_ipv6() else []),
                "link set eth0 up",
            ],
        )

    def path(self, path: str) -> Path:
        """Return the path from outside of a file in this host."""
        return self.root / path.lstrip("/")

    def write(self, path: str, text: str) -> str:
        """Write a file of this host, and return its path there."""
        self.path(path).write_text(text)
        return path

    def start(self, module: str, *arguments: str, env: Mapping[str, str]) -> Task:
        """Start ``python -m MODULE ARGUMENTS...`` in ``/tmp`` of this host, with torch imported already."""
        assert self._warm is not None
        return self._warm.task(ENTER, str(self._namespaces.pid), module, *arguments, env=env)

    def namespace(self, kind: str) -> str:
        """Return the file of one of its namespaces: ``net``, ``mnt`` or ``uts``."""
        return f"/proc/{self._namespaces.pid}/ns/{kind}"

    def run(self, *command: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command in this host to its end."""
        namespaces = ("--target", str(self._namespaces.pid), "--net", "--mount", "--uts")
        return subprocess.run(
            ["nsenter", *namespaces, "--", "sh", "-ec", 'cd /tmp; exec "$@"', "sh", *command],
            env=None if env is None else {**os.environ, **env},
            capture_output=True,
            text=True,
            check=False,
        )

    def unplug(self) -> None:
        """Take its cable out: nothing goes in or out any more, and no one is told."""
        self._switch.batch("ip", [f"link set {self._port} down"])

    def plug(self) -> None:
        """Put the cable back."""
        self._switch.batch("ip", [f"link set {self._port} up"])

    def limit(self, rate: str) -> None:
        """Limit what goes in, and what goes out, to a rate such as ``100mbit``."""
        for where, device in ((self._switch, self._port), (self._namespaces, "eth0")):
            where.batch("tc", [f"qdisc replace dev {device} root tbf rate {rate} burst 128kb latency 50ms"])

    def close(self) -> None:
        """Remove it."""
        self._namespaces.close()


class Network:
    """Hosts on one bridge. A context manager.

    Args:
        warm: Starts their processes; None for hosts whose processes are started by others.

    Attributes:
        hosts: By name.
    """

    def __init__(self, warm: Warm | None = None) -> None:
        self.hosts: dict[str, Host] = {}
        self._warm = warm
        self._switch = Namespaces(MAKE_SWITCH)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts.values():
            host.close()
        self._switch.close()

    def add(self, *names: str) -> list[Host]:
        """Add hosts, which know no names yet."""
        made = [Host(name, len(self.hosts) + number, self._switch, self._warm) for number, name in enumerate(names, 1)]
        self.hosts |= {host.name: host for host in made}
        return made

    def spread(self, names: Mapping[str, Iterable[str]]) -> None:
        """Tell all hosts the addresses of names, instead of those that they knew."""
        lines = [f"{address} {name}" for name, addresses in names.items() for address in addresses]
        for host in self.hosts.values():
            host.write("/etc/hosts", "\n".join(["127.0.0.1 localhost", "::1 localhost", *lines, ""]))

    def spread_own_names(self, *families: str) -> None:
        """Tell all hosts the names of all hosts, with their addresses of ``ipv4``, ``ipv6`` or both."""
        self.spread({host.name: [getattr(host, family) for family in families] for host in self.hosts.values()})
