"""Tasks that are forks of one process: as if each were a program of its own, only sooner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.multiprocess.finished_run import Run
from tests.patience import patience

from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError
from paramserver.launch.lifecycle import Limits
from paramserver.launch.spec import TaskSpec

pytestmark = pytest.mark.multiprocess

PATIENCE = patience(60.0)
"""Seconds after which a test gives up; nothing takes this long when it works."""

CHIEF = TaskId(Role.CHIEF, 0)
WORKER = TaskId(Role.WORKER, 0)

RANDOM = """
import random
import numpy, torch
print(random.random(), numpy.random.rand(), torch.rand(()).item(), torch.initial_seed())
"""

SELF_PORTRAIT = """
import json, os, signal, sys
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "name": __name__, "file": __file__, "main": sys.modules["__main__"].__file__,
    "cwd": os.getcwd(), "environment": dict(os.environ), "flags": str(sys.flags),
    "descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task")),
    "leads": os.getpid() == os.getsid(0) == os.getpgid(0), "input": sys.stdin.read(),
    "signals": [str(signal.getsignal(number)).split(" at ")[0] for number in (signal.SIGINT, signal.SIGTERM)],
}))
print("an error", file=sys.stderr)
"""

FAIL_ONCE = """
from pathlib import Path
try:
    Path(__file__).with_name("was_here").mkdir()
except FileExistsError:
    print("again")
else:
    print("fails")
    raise SystemExit(3)
"""


def run(folder: Path, chief: str, worker: str | None = None, *, method: str = "forkserver", **options: object) -> Run:
    """Scripts of a chief, and of a worker if there is one, to their end."""
    codes = {CHIEF: chief} if worker is None else {CHIEF: chief, WORKER: worker}
    return Run(*(_task(folder, task, code) for task, code in codes.items()), start_method=method, **options)


def _task(folder: Path, task: TaskId, code: str) -> TaskSpec:
    script = folder / f"{task.role.value}.py"
    script.write_text(code)
    command = (sys.executable, "-m", "paramserver.launch.task", str(script), "--lr", "0.1")
    return TaskSpec(task, command, {"PYTHONUNBUFFERED": "1", "WHO": str(task)})


def test_a_fork_sees_what_a_program_of_its_own_sees(tmp_path: Path) -> None:
    portraits = []
    for method in ("spawn", "forkserver"):
        done = run(tmp_path, SELF_PORTRAIT, SELF_PORTRAIT, method=method)
        assert (done.code, done.said(WORKER, is_error=True)) == (0, ["an error"])
        portraits.append([json.loads(done.said(task)[0]) for task in (CHIEF, WORKER)])
    assert portraits[0] == portraits[1]
    assert [portrait["environment"]["WHO"] for portrait in portraits[1]] == ["chief:0", "worker:0"]


def test_what_is_preloaded_is_there_before_the_script_begins(tmp_path: Path) -> None:
    code = "import sys; print('colorsys' in sys.modules)"
    assert run(tmp_path, code).said(CHIEF) == ["False"]
    assert run(tmp_path, code, preload=("colorsys",)).said(CHIEF) == ["True"]


def test_what_cannot_be_imported_is_the_scripts_own_to_complain_about(tmp_path: Path) -> None:
    done = run(tmp_path, "import no_such_module", preload=("no_such_module",))
    assert done.code == 1
    assert done.said(CHIEF, is_error=True)[-1] == "ModuleNotFoundError: No module named 'no_such_module'"


HALF_IMPORTED = """
import sys
if hasattr(sys, "registered"):
    raise RuntimeError("already registered")
sys.registered = True
raise OSError("no temporary folder")
"""


LEAKS_REPORTED = """
import os

class nb_meta(type):
    __module__ = "nanobind"

class Watched:
    def __del__(self, write=os.write):
        write(1, b"freed")

watched = Watched()
watched.itself = watched
"""


def test_what_was_preloaded_is_freed_at_the_end_if_a_library_counts_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "leaks_reported.py").write_text(LEAKS_REPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
        assert run(tmp_path, "", preload=("leaks_reported",)).said(CHIEF) == ["freed"]


def test_the_error_of_a_preloaded_module_is_that_of_its_first_import(tmp_path: Path) -> None:
    """What a failed import leaves behind in the process that forks does not change the error."""
    (tmp_path / "half_imported.py").write_text(HALF_IMPORTED)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); print('colorsys' in sys.modules); import half_imported"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
        done = run(tmp_path, code, preload=("colorsys", "half_imported", "this"))
    assert (done.code, done.said(CHIEF)) == (1, ["True"])
    assert done.said(CHIEF, is_error=True)[-1] == "OSError: no temporary folder"


def test_each_fork_draws_random_numbers_of_its_own(tmp_path: Path) -> None:
    done = run(tmp_path, RANDOM, RANDOM, preload=("numpy", "torch"))
    (first,), (second,) = done.said(CHIEF), done.said(WORKER)
    assert len(set(first.split()) | set(second.split())) == 8


def test_a_process_has_its_tasks_name(tmp_path: Path) -> None:
    assert run(tmp_path, "print(open('/proc/self/comm').read())").said(CHIEF)[0] == "chief:0"


@pytest.mark.parametrize(
    ("code", "exit_code", "summary"),
    [
        ("raise SystemExit(7)", 7, "error: chief:0 exited with code 7; the run was stopped"),
        (
            "import os; os.kill(os.getpid(), 9)",
            137,
            "error: chief:0 was killed by SIGKILL (code 137); the run was stopped",
        ),
    ],
)
def test_how_a_fork_ends_is_known(tmp_path: Path, code: str, exit_code: int, summary: str) -> None:
    done = run(tmp_path, code, "import signal; signal.pause()")
    assert done.code == exit_code
    assert done.said(None, is_error=True)[-1] == summary


def test_exit_handlers_run_at_the_end_of_a_fork(tmp_path: Path) -> None:
    assert run(tmp_path, "import atexit; atexit.register(print, 'cleaned up')").said(CHIEF) == ["cleaned up"]


def test_a_fork_that_fails_is_started_again(tmp_path: Path) -> None:
    done = run(tmp_path, FAIL_ONCE, limits=Limits(restarts=1))
    assert (done.code, done.said(CHIEF)) == (0, ["fails", "again"])


def test_when_the_process_that_forks_is_gone_the_run_is_stopped(tmp_path: Path) -> None:
    lifeline = tmp_path / "lifeline"
    os.mkfifo(lifeline)
    reader = os.open(lifeline, os.O_RDONLY | os.O_NONBLOCK)
    chief = f"import os; open({str(lifeline)!r}, 'w'); os.kill(os.getppid(), 9)"
    worker = f"import signal; line = open({str(lifeline)!r}, 'w'); signal.pause()"
    with pytest.raises(ConfigError, match="the process that the tasks are forked from, .* ended with code -9"):
        run(tmp_path, chief, worker)
    assert os.read(reader, 1) == b""  # nobody holds it
    os.close(reader)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_launcher_that_ends_while_libraries_are_imported_leaves_nothing(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "slow.py").write_text("""
import signal
lifeline = open("lifeline", "w")
print("imports", file=lifeline, flush=True)
signal.pause()
""")
    os.mkfifo(tmp_path / "lifeline")
    (tmp_path / "script.py").write_text("raise AssertionError('it was started')")
    (tmp_path / "launcher.py").write_text("""
import sys
from paramserver.launch.local import launch
from paramserver.launch.spec import LaunchOptions
sys.exit(launch(LaunchOptions(script="script.py", preload=("slow",))))
""")
    command = [sys.executable, "launcher.py"]
    with (
        subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process,
        (tmp_path / "lifeline").open() as lifeline,
    ):
        assert lifeline.readline() == "imports\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
        assert lifeline.read() == ""  # it ends when nobody holds it
    assert process.returncode == code
    assert errors == ("stopping the run (SIGINT); once more kills it\n" if code == 130 else "")
