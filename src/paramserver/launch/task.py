"""``python -m paramserver.launch.task SCRIPT ARGS...``: a user's script as a task of a run.

The script runs as if Python had been given it, except for its end: an error that paramserver raises on purpose is
printed as one line without a traceback, and SIGTERM ends it as ``sys.exit`` does, so that atexit handlers run, and
without output, at any point of the program.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType

from paramserver.errors import ConfigError, ParameterServerError, RunOverError

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
AGAIN = 0.01
"""Seconds after which a SIGTERM that had no effect is sent again."""


def main(arguments: list[str]) -> int:
    """Run a script and return the exit code; a ``SystemExit`` of the script passes through."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    termination = _Termination()
    try:
        _run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except RunOverError as exc:
        _say(str(exc))  # the task came too late to be of use, which is not a failure
    except Exception as exc:  # noqa: BLE001  # any error of the user's script, shown as Python would show it
        if termination.has_caused(exc):
            return TERMINATED
        sys.last_value = exc  # as Python sets it: exit handlers can see that the script failed
        _show(exc)
        return 1
    finally:
        termination.script_is_over = True
    return 0


def _show(exc: Exception) -> None:
    if isinstance(exc, ParameterServerError):
        _say(f"error: {exc}")
        return
    traceback = without_runner(exc.__traceback__)
    sys.excepthook(type(exc), exc.with_traceback(traceback), traceback)


def without_runner(traceback: TracebackType | None) -> TracebackType | None:
    """Return a traceback from where the user's script begins; None if it never began, as with a syntax error."""
    ours = {__file__, runpy.run_path.__code__.co_filename}
    while traceback is not None and traceback.tb_frame.f_code.co_filename in ours:
        traceback = traceback.tb_next
    return traceback


def _run(arguments: list[str]) -> None:
    if not arguments:
        raise ConfigError("launch.task: expected SCRIPT ARGS..., got nothing")
    script = Path(arguments[0])
    if not script.is_file():
        raise ConfigError(f"launch: there is no script {str(script)!r} in {Path.cwd()}")
    sys.argv[:] = arguments
    if not sys.flags.safe_path:
        sys.path[0] = str(script.resolve().parent)
    # Absolute, as Python makes __file__ of the main script, because it has to be valid after a chdir, too.
    runpy.run_path(str(script.absolute()), run_name="__main__")


class _Termination:
    """Ends this process on its first SIGTERM; a second one meets the system's own handler.

    Attributes:
        script_is_over: Whether only exit handlers are left to run, so that there is nothing to end.
    """

    def __init__(self) -> None:
        self.script_is_over = False
        self._owner = os.getpid()
        self._exit: SystemExit | None = None
        signal.signal(signal.SIGTERM, self._terminate)
        sys.unraisablehook = self._drop

    def has_caused(self, exc: BaseException | None) -> bool:
        """Return whether SIGTERM has caused an exception, perhaps indirectly, as when C++ code imports a module."""
        while exc is not None and exc is not self._exit:
            exc = exc.__cause__ or exc.__context__
        return exc is not None

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != self._owner:
            # A process that the script has forked, such as a worker of a DataLoader, inherits this handler, but its
            # parent expects the signal to kill it.
            os.kill(os.getpid(), signal.SIGTERM)
        if not self.script_is_over:
            self._exit = SystemExit(TERMINATED)
            raise self._exit

    def _drop(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Send SIGTERM again later, if it came where Python drops exceptions, such as in a ``__del__``."""
        if self._exit is None or unraisable.exc_value is not self._exit:
            sys.__unraisablehook__(unraisable)
            return
        signal.signal(signal.SIGTERM, self._terminate)
        threading.Timer(AGAIN, os.kill, (self._owner, signal.SIGTERM)).start()


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
