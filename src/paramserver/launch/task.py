"""``python -m paramserver.launch.task SCRIPT ARGS...``: a user's script as a task of a run.

The script runs as if Python had been given it, except for how it ends: an error that paramserver raises on
purpose is one line and no traceback, and SIGTERM ends it as ``sys.exit`` does, so that atexit handlers run.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType

from paramserver.errors import ConfigError, ParameterServerError, RunOverError

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


def main(arguments: list[str]) -> int:
    """Run a script and return the exit code; a ``SystemExit`` of the script passes through."""
    signal.signal(signal.SIGTERM, _Terminate())
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        _run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except RunOverError as exc:
        _say(str(exc))  # it came too late to be of use, but nothing is wrong with it
    except ParameterServerError as exc:
        sys.last_value = exc  # as Python does it: what runs at exit can see that the script failed
        _say(f"error: {exc}")
        return 1
    except Exception as exc:  # noqa: BLE001  # it is the user's own, and shown as Python would show it
        sys.last_value = exc
        traceback = without_runner(exc.__traceback__)
        sys.excepthook(type(exc), exc.with_traceback(traceback), traceback)
        return 1
    return 0


def without_runner(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback from where the user's script begins; None if it never began, as with a syntax error."""
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
    # Absolute, as Python makes __file__ of the main script: it has to be right after a chdir, too.
    runpy.run_path(str(script.absolute()), run_name="__main__")


class _Terminate:
    """Ends this process on its first SIGTERM; a second one finds the system's own handler."""

    def __init__(self) -> None:
        self._owner = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != self._owner:
            # What the script has forked, such as a worker of a DataLoader, has inherited this handler, but
            # its parent expects it to die of the signal.
            os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit(TERMINATED)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
