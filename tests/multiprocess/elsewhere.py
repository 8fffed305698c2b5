"""A program as if on another platform: ``python -m tests.multiprocess.elsewhere darwin|win32 FILE FOLDER``.

Names that Python or the system lacks there are taken away after the libraries were imported, which know their platform
by then, and before paramserver is. What cannot be seen this way is the system itself.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import runpy
import signal
import socket
import sys
from types import ModuleType

LIBRARIES = (
    *("asyncio", "concurrent.futures.process", "multiprocessing.synchronize", "subprocess", "tempfile", "pathlib"),
    *("torch", "torch._dynamo", "torch.profiler", "torch.utils.tensorboard", "torch.utils.data"),
    *("torch.export", "torch.nested", "numpy", "numba", "msgspec", "safetensors.torch"),
    *("fsspec.implementations.memory", "typer.rich_utils", "rich.filesize", "rich.live", "rich.table"),
    "rich.traceback",
)

DARWIN: dict[ModuleType, tuple[str, ...]] = {
    os: ("memfd_create", "eventfd", "pidfd_open", "sched_getaffinity", "sched_setaffinity", "sched_yield", "waitid"),
    mmap: ("MADV_HUGEPAGE", "MADV_POPULATE_WRITE", "MAP_POPULATE", "MAP_NORESERVE"),
    signal: ("pidfd_send_signal",),
}
WINDOWS: dict[ModuleType, tuple[str, ...]] = {
    os: (
        *DARWIN[os],
        *("fork", "forkpty", "register_at_fork", "getuid", "geteuid", "getsid", "getpgid", "setsid", "killpg"),
        *("preadv", "pwritev", "pread", "pwrite", "fchmod", "fchown", "O_CLOEXEC", "O_DSYNC", "O_SYNC", "O_DIRECTORY"),
        *("posix_fallocate", "posix_fadvise", "sysconf", "statvfs", "uname", "openpty", "getloadavg", "WNOHANG"),
        *("set_blocking", "get_blocking", "nice", "getpriority", "mkfifo", "sendfile"),
    ),
    mmap: (
        *DARWIN[mmap],
        *("PROT_READ", "PROT_WRITE", "MAP_SHARED", "MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_ANON", "MADV_DONTNEED"),
        *("MADV_WILLNEED", "MADV_NORMAL"),
    ),
    signal: (
        *DARWIN[signal],
        *("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "SIGSTOP", "SIGCONT", "SIGQUIT", "alarm"),
        *("pthread_sigmask", "sigwait", "siginterrupt", "pause", "setitimer"),
    ),
    socket: ("AF_UNIX", "send_fds", "recv_fds", "MSG_CMSG_CLOEXEC", "SOCK_CLOEXEC", "MSG_DONTWAIT"),
}
NO_MODULES = {"darwin": (), "win32": ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "_posixshmem")}


class _NoLibrary(ctypes.CDLL):
    """The C library, without what glibc alone has."""

    def __init__(self, name: str | None, *arguments: object, **options: object) -> None:
        if name is None and sys.platform == "win32":
            raise TypeError("bad argument type for built-in operation")
        super().__init__(name, *arguments, **options)  # type: ignore[arg-type]  # passed on

    def __getattr__(self, name: str) -> object:
        if name in ("mallopt", "malloc_trim", "mallinfo2", "prctl"):
            raise AttributeError(f"dlsym(RTLD_DEFAULT, {name}): symbol not found")
        return super().__getattr__(name)


def main(platform: str, file: str, folder: str) -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    for module, names in (DARWIN if platform == "darwin" else WINDOWS).items():
        for name in names:
            vars(module).pop(name, None)
    for name in NO_MODULES[platform]:
        sys.modules[name] = None  # type: ignore[assignment]  # makes its import fail
    sys.platform, ctypes.CDLL = platform, _NoLibrary  # type: ignore[misc]
    os.chdir(folder)
    sys.argv[:] = [file]
    runpy.run_path(file, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
