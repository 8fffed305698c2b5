"""``python -m tests.multihost.enter PID MODULE ARGUMENTS...`` is ``python -m MODULE ARGUMENTS...`` in another host.

The host is the one whose namespaces the process PID has. What is forked has no other thread, as this needs.
"""

import ctypes
import os
import runpy
import sys
from pathlib import Path

NAMESPACES = ("net", "uts", "mnt")  # the mounts last: another /proc might be seen after them


def enter(pid: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for name in NAMESPACES:
        with Path(f"/proc/{pid}/ns/{name}").open() as namespace:
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"cannot enter the {name} namespace of {pid}")
    os.chdir("/tmp")  # noqa: S108  # that of the host, which has no other process


if __name__ == "__main__":
    _, pid, module, *arguments = sys.argv
    enter(pid)
    sys.argv[:] = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
