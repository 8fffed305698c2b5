"""``python -m paramserver.launch.task [-m] SCRIPT ARGS...``: a user's script or module as a task of a run.

The script runs as if Python had been given it, except for its end: an error that paramserver raises on purpose is
printed as one line without a traceback, and SIGTERM ends it as ``sys.exit`` does, so that atexit handlers run, and
without output, at any point of the program.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from types import TracebackType

from paramserver.cluster import environment, logs, task_name
from paramserver.cluster.exit_codes import INTERRUPTED, TERMINATED, exit_code
from paramserver.cluster.termination import Termination
from paramserver.errors import ConfigError, ParameterServerError, RunOverError


def main(arguments: list[str]) -> int | str:
    """Run a script and return the argument for ``sys.exit``."""
    try:
        surroundings = environment.read()
        is_launched = surroundings.run_file is not None
        logs.set_up(task_name(), surroundings.log_level, surroundings.log_format, names_task=not is_launched)
    except ConfigError as error:
        _say(f"error: {error}")
        return exit_code(error)
    termination = Termination()
    termination.install()  # exit handlers run after this function
    try:
        _run(arguments)
    except RunOverError as exc:
        _say(str(exc))  # the task came too late to be of use, which is not a failure
    except BaseException as exc:  # noqa: BLE001  # any end of the user's script, shown as Python would show it
        return _end_by(exc, termination)
    finally:
        termination.is_over = True
    return 0


def _end_by(exc: BaseException, termination: Termination) -> int | str:
    """Return the exit code for an exception that has ended the script; exit handlers find it in ``sys.last_value``."""
    if termination.has_caused(exc):
        exc = SystemExit(TERMINATED)
    elif isinstance(exc, KeyboardInterrupt):
        exc = SystemExit(INTERRUPTED)
    if isinstance(exc, SystemExit) and not exc.code:
        return 0
    sys.last_value = exc
    if isinstance(exc, SystemExit):
        return exc.code or 0
    _show(exc)
    return exit_code(exc)


def _show(exc: BaseException) -> None:
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
    if arguments[:1] == ["-m"]:
        _run_module(arguments[1:])
        return
    if not arguments:
        raise ConfigError("launch.task: expected SCRIPT ARGS..., got nothing")
    script = Path(arguments[0])
    if not script.is_file():
        raise ConfigError(f"there is no script {str(script)!r} in {Path.cwd()}")
    sys.argv[:] = arguments
    if not sys.flags.safe_path:
        sys.path[0] = str(script.resolve().parent)
    # Absolute, as Python makes __file__ of the main script, because it has to be valid after a chdir, too.
    runpy.run_path(str(script.absolute()), run_name="__main__")


def _run_module(arguments: list[str]) -> None:
    if not arguments:
        raise ConfigError("launch.task: expected -m MODULE ARGS..., got no module")
    if not sys.flags.safe_path:
        sys.path[0] = str(Path.cwd())
    name = arguments[0]
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a package of the name is missing
        found = None
    if found is None:
        raise ConfigError(f"there is no module {name!r} in {Path.cwd()} or among the installed ones")
    sys.argv[:] = arguments
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
