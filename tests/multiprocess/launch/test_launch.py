"""Runs of real processes: small programs without torch stand in for the tasks.

A *lifeline* is a named pipe that every process of a run opens for writing. Its reader sees a byte when a
process is ready, and the end of the pipe when no process is left, whoever its parent has become.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.multiprocess.finished_run import Run
from tests.patience import patience

from paramserver.cluster.report import Report
from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError
from paramserver.launch import local
from paramserver.launch.lifecycle import Limits
from paramserver.launch.process import TaskProcess
from paramserver.launch.spec import LaunchSpec, TaskSpec

pytestmark = pytest.mark.multiprocess

PS = TaskId(Role.PS, 0)
CHIEF = TaskId(Role.CHIEF, 0)
WORKER = TaskId(Role.WORKER, 0)
EVALUATOR = TaskId(Role.EVALUATOR, 0)

HANG = "hold(); signal.pause()"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); hold(); signal.pause()"

PATIENCE = patience(20.0)
"""Seconds after which a test gives up; nothing takes this long when it works."""


class Lifeline:
    """See the top of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def wait_ready(self, count: int) -> None:
        """Until ``count`` processes hold the line."""
        while count:
            assert self._poll(select.POLLIN, PATIENCE), f"{count} processes are missing"
            count -= len(os.read(self._reader, count))

    def is_free(self, within: float) -> bool:
        """Whether nobody holds the line any more; somebody must have held it."""
        while self._poll(select.POLLIN | select.POLLHUP, within):
            if not os.read(self._reader, 1024):
                return True
        return False

    def close(self) -> None:
        os.close(self._reader)

    def _poll(self, events: int, timeout: float) -> bool:
        poll = select.poll()
        poll.register(self._reader, events)
        return bool(poll.poll(timeout * 1000))


@pytest.fixture
def lifeline(tmp_path: Path) -> Iterator[Lifeline]:
    line = Lifeline(tmp_path / "lifeline")
    yield line
    line.close()


PRELUDE = """
import os, select, signal, socket, subprocess, sys
HERE = os.environ["HERE"]
crowd = os.open(HERE + "/crowd", os.O_RDWR)
def hold():
    os.write(os.open(HERE + "/lifeline", os.O_WRONLY), b".")
    os.write(crowd, b".")
def meet(count):
    hold()
    while count:
        count -= len(os.read(crowd, count))
def announce(name):
    os.write(os.open(f"{HERE}/{name}", os.O_WRONLY), b"%d" % os.getpid())
def outlive(name):
    with open(f"{HERE}/{name}") as pipe:
        select.select([os.pidfd_open(int(pipe.read(9)))], [], [])
def child(code):
    subprocess.Popen([sys.executable, "-S", "-c", os.environ["PRELUDE"] + code])
"""

Program = Callable[[TaskId, str], TaskSpec]


@pytest.fixture
def program(lifeline: Lifeline) -> Iterator[Program]:
    """Makes a task of some code, which can call these functions.

    ``hold()`` takes the lifeline, ``meet(n)`` does so too and waits until n processes hold it,
    ``announce(name)`` and ``outlive(name)`` make one task wait for the end of another, ``child(code)`` starts
    a process.
    """
    here = lifeline.path.parent
    for name in ("crowd", "a", "b"):
        os.mkfifo(here / name)
    crowd = os.open(here / "crowd", os.O_RDWR)  # keeps what is written by those that have ended
    env = {"HERE": str(here), "PRELUDE": PRELUDE}
    yield lambda task, code: TaskSpec(task, (sys.executable, "-S", "-c", PRELUDE + code), env)
    os.close(crowd)


def test_output_is_taken_apart_by_task_and_stream(program: Program) -> None:
    run = Run(
        program(CHIEF, "print('one'); print('two'); print('odd', file=sys.stderr)"),
        program(WORKER, "print('three')"),
    )
    assert run.code == 0
    assert run.said(CHIEF) == ["one", "two"]
    assert run.said(CHIEF, is_error=True) == ["odd"]
    assert run.said(WORKER) == ["three"]
    assert run.said(None, is_error=True) == []


def test_output_is_prefixed_on_the_terminal(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    spec = LaunchSpec("run", (program(CHIEF, "print('one')"), program(WORKER, "sys.exit('no')")))
    assert local.run(spec) == 1
    captured = capsys.readouterr()
    assert captured.out == "chief:0 | one\n"
    assert captured.err == "worker:0 | no\nerror: worker:0 exited with code 1\n"


def test_a_line_without_an_end_is_shown(program: Program) -> None:
    assert Run(program(CHIEF, "sys.stdout.write('no end')")).said(CHIEF) == ["no end"]


def test_bytes_that_are_no_text_are_replaced(program: Program) -> None:
    run = Run(program(CHIEF, r"sys.stdout.buffer.write(b'caf\xe9\n')"))
    assert run.said(CHIEF) == ["caf\N{REPLACEMENT CHARACTER}"]


def test_much_output_on_both_streams_does_not_block(program: Program) -> None:
    code = "[print('x' * 1023, file=f) for f in (sys.stdout, sys.stderr) for _ in range(1024)]"
    run = Run(program(CHIEF, code), program(WORKER, code))
    for task in (CHIEF, WORKER):
        assert len(run.said(task)) == len(run.said(task, is_error=True)) == 1024


def test_the_exit_code_is_that_of_the_first_failure(program: Program) -> None:
    run = Run(
        program(WORKER, "announce('a'); sys.exit(4)"),
        program(CHIEF, "outlive('a'); sys.exit(5)"),
    )
    assert run.code == 4
    assert run.said(None, is_error=True) == [
        "worker:0 exited with code 4; the others go on",
        "error: worker:0 exited with code 4; chief:0 exited with code 5; the run was stopped",
    ]


def test_a_failed_worker_does_not_disturb_the_others(program: Program) -> None:
    run = Run(
        program(WORKER, "announce('a'); announce('b'); os.kill(os.getpid(), signal.SIGKILL)"),
        program(CHIEF, "outlive('a'); print('still here')"),
        program(PS, "outlive('b'); print('still here')"),
    )
    assert run.code == 137
    assert run.said(CHIEF) == run.said(PS) == ["still here"]
    assert run.said(None, is_error=True) == [
        "worker:0 was killed by SIGKILL (code 137); the others go on",
        "error: worker:0 was killed by SIGKILL (code 137)",
    ]


@pytest.mark.parametrize("failing", [CHIEF, PS])
def test_a_failed_chief_or_ps_stops_all(program: Program, lifeline: Lifeline, failing: TaskId) -> None:
    others = [task for task in (PS, CHIEF, WORKER, EVALUATOR) if task != failing]
    run = Run(*(program(task, HANG) for task in others), program(failing, "meet(4); sys.exit(6)"))
    assert run.code == 6
    assert lifeline.is_free(within=0)
    assert run.said(None, is_error=True) == [
        f"{failing} exited with code 6; stopping the run",
        f"error: {failing} exited with code 6; the run was stopped",
    ]


def test_the_first_and_the_last_line_name_the_culprit_and_not_its_victims(program: Program) -> None:
    run = Run(
        program(PS, "announce('a'); sys.exit(75)"),
        program(CHIEF, "outlive('a'); sys.exit(6)"),
        program(WORKER, HANG),
    )
    first, last = run.said(None, is_error=True)
    assert run.code == 6
    assert first == "chief:0 exited with code 6; stopping the run"
    assert last == "error: chief:0 exited with code 6; the run was stopped"


def test_ps_tasks_that_stay_are_stopped_after_the_grace(program: Program, lifeline: Lifeline) -> None:
    run = Run(program(PS, HANG), program(CHIEF, "meet(2)"), limits=Limits(grace=0.1))
    assert run.code == 0
    assert lifeline.is_free(within=0)
    assert run.said(None, is_error=True) == ["ps:0 did not end within 0.1 s of the last worker; stopping it"]


def test_an_evaluator_is_waited_for(program: Program) -> None:
    run = Run(
        program(CHIEF, "announce('a')"),
        program(EVALUATOR, "outlive('a'); print('evaluated')"),
        limits=Limits(grace=0.0),
    )
    assert run.code == 0
    assert run.said(EVALUATOR) == ["evaluated"]


def test_a_task_that_ignores_sigterm_is_killed(program: Program, lifeline: Lifeline) -> None:
    limits = Limits(shutdown_timeout=0.1)
    run = Run(program(WORKER, DEAF), program(CHIEF, "meet(2); sys.exit(6)"), limits=limits)
    assert run.code == 6
    assert "worker:0 did not end within 0.1 s of SIGTERM; killing it" in run.said(None, is_error=True)
    assert lifeline.is_free(within=0)


def test_what_tasks_have_started_ends_with_the_run(
    program: Program, lifeline: Lifeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "LINGER", 0.1)
    run = Run(program(CHIEF, f"child({DEAF!r}); meet(2)"))
    assert run.code == 0
    assert lifeline.is_free(within=PATIENCE)


def test_reports_reach_the_caller_and_nonsense_does_not(program: Program) -> None:
    code = r"""
fd = int(os.environ["PARAMSERVER_REPORT_FD"])
os.write(fd, b'{"task":"chief:0","state":"training"}\nnonsense\n{"task":"chief:0","global_step":7}\n')
"""
    run = Run(program(CHIEF, code), reports=True)
    assert run.reports == [
        Report(task="chief:0", state="training"),
        Report(task="chief:0", global_step=7),
    ]


def test_nobody_is_asked_for_reports_that_nobody_reads(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMSERVER_REPORT_FD", "99")  # of a launcher that we are a task of
    assert Run(program(CHIEF, "print('PARAMSERVER_REPORT_FD' in os.environ)")).said(CHIEF) == ["False"]


def test_a_ps_inherits_its_listening_socket(program: Program) -> None:
    serve = """
listener = socket.socket(fileno=int(os.environ["PARAMSERVER_LISTEN_FD"]))
connection, _ = listener.accept()
connection.sendall(b"served")
"""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ask = f"""
connection = socket.create_connection({listener.getsockname()!r})
print(connection.recv(99).decode())
"""
        run = Run(program(PS, serve), program(CHIEF, ask), listeners={PS: listener})
        assert run.said(CHIEF) == ["served"]
        assert listener.fileno() == -1


def test_a_command_that_cannot_be_started_stops_what_was_started(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[TaskId] = []

    class Watched(TaskProcess):
        def close(self) -> None:
            super().close()  # returns when the process has been reaped
            closed.append(self.task)

    monkeypatch.setattr(local, "TaskProcess", Watched)
    with pytest.raises(ConfigError, match="start of chief:0 failed: /no/such/program"):
        Run(program(PS, HANG), TaskSpec(CHIEF, ("/no/such/program",)))
    assert closed == [PS]


@contextlib.contextmanager
def launcher(tmp_path: Path, *tasks: TaskSpec, shutdown_timeout: float = 3.0) -> Iterator[subprocess.Popen[str]]:
    """A launcher as a process of its own, which can be interrupted and killed."""
    script = tmp_path / "launcher.py"
    specs = [(str(task.task), task.command, dict(task.env)) for task in tasks]
    script.write_text(f"""
import sys
from paramserver.cluster.task import TaskId
from paramserver.launch.lifecycle import Limits
from paramserver.launch.local import run
from paramserver.launch.process import TaskProcess
from paramserver.launch.spec import LaunchSpec, TaskSpec
tasks = tuple(TaskSpec(TaskId.parse(task), command, env) for task, command, env in {specs!r})
sys.exit(run(LaunchSpec("run", tasks, limits=Limits(shutdown_timeout={shutdown_timeout}))))
""")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, str(script)], stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_all_within_five_seconds(
    program: Program, lifeline: Lifeline, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    deaf = f"child({DEAF!r}); {DEAF}"
    tasks = [program(PS, HANG), program(CHIEF, HANG), program(WORKER, deaf), program(EVALUATOR, HANG)]
    with launcher(tmp_path, *tasks) as process:
        lifeline.wait_ready(5)
        begin = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
        assert lifeline.is_free(within=patience(5))
        assert time.monotonic() - begin < 5
    assert process.returncode == code
    assert errors.splitlines() == [
        f"stopping the run ({number.name}); once more kills it",
        "worker:0 did not end within 3 s of SIGTERM; killing it",
    ]


def test_sighup_ends_a_run_whose_tasks_do_not_handle_it(program: Program, lifeline: Lifeline, tmp_path: Path) -> None:
    with launcher(tmp_path, program(CHIEF, HANG)) as process:
        lifeline.wait_ready(1)
        process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 129
    assert errors.splitlines()[0] == "stopping the run (SIGHUP); once more kills it"


def test_a_launcher_under_nohup_ignores_sighup(program: Program, lifeline: Lifeline, tmp_path: Path) -> None:
    with ignoring(signal.SIGHUP), launcher(tmp_path, program(CHIEF, HANG)) as process:
        lifeline.wait_ready(1)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors.splitlines()[0]) == (143, "stopping the run (SIGTERM); once more kills it")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_for_the_tasks_is_passed_on_to_those_that_handle_it(
    program: Program, lifeline: Lifeline, tmp_path: Path, number: signal.Signals
) -> None:
    handle = f"signal.signal({int(number)}, lambda *_: sys.exit('was told')); " + HANG
    with launcher(tmp_path, program(WORKER, handle), program(PS, HANG), program(EVALUATOR, HANG)) as process:
        lifeline.wait_ready(3)
        process.send_signal(number)
        assert process.stderr is not None
        assert process.stderr.readline() == "worker:0 | was told\n"
        assert process.stderr.readline() == "worker:0 exited with code 1; the others go on\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)


def test_a_signal_for_tasks_that_do_not_handle_it_kills_nothing(
    program: Program, lifeline: Lifeline, tmp_path: Path
) -> None:
    with launcher(tmp_path, program(CHIEF, HANG)) as process:
        lifeline.wait_ready(1)
        process.send_signal(signal.SIGUSR1)
        assert process.stderr is not None
        assert process.stderr.readline() == "SIGUSR1: no task has a handler for it; the run goes on\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 143


def test_ps_tasks_leave_last(program: Program, lifeline: Lifeline, tmp_path: Path) -> None:
    wait = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}); hold(); signal.sigwait({signal.SIGTERM})\n"
    ps = program(PS, wait + "print('the chief has saved:', os.path.exists(HERE + '/saved'))")
    chief = program(CHIEF, wait + "os.close(os.open(HERE + '/saved', os.O_CREAT))")
    with launcher(tmp_path, ps, chief) as process:
        lifeline.wait_ready(2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=PATIENCE)
    assert said == "ps:0 | the chief has saved: True\n"


def test_the_processes_of_a_task_are_not_signalled_the_task_is(
    program: Program, lifeline: Lifeline, tmp_path: Path
) -> None:
    """A DataLoader's workers are needed for the last batches and the save."""
    told = "signal.signal(signal.SIGTERM, lambda *_: print('the child was told', flush=True))"
    leave = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))"
    tasks = program(CHIEF, f"child({told + '; ' + HANG!r}); {leave}; {HANG}")
    with launcher(tmp_path, tasks) as process:
        lifeline.wait_ready(2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (143, "")
    assert lifeline.is_free(within=PATIENCE)


def test_a_second_ctrl_c_kills_at_once(program: Program, lifeline: Lifeline, tmp_path: Path) -> None:
    with launcher(tmp_path, program(CHIEF, DEAF)) as process:
        lifeline.wait_ready(1)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("stopping the run (SIGINT)")
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
        assert time.monotonic() - begin < Limits().shutdown_timeout / 2
    assert process.returncode == 130
    assert lifeline.is_free(within=PATIENCE)


def test_a_launcher_that_is_killed_leaves_nothing_behind(program: Program, lifeline: Lifeline, tmp_path: Path) -> None:
    with launcher(tmp_path, program(PS, DEAF), program(CHIEF, f"child({DEAF!r}); {DEAF}")) as process:
        lifeline.wait_ready(3)
        process.kill()
        process.wait(PATIENCE)
        assert lifeline.is_free(within=patience(5))


@contextlib.contextmanager
def ignoring(number: signal.Signals) -> Iterator[None]:
    """Processes that are started inside ignore a signal, as under nohup."""
    old = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, old)


def run_task(tmp_path: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, "-m", "paramserver.launch.task", str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_a_script_finds_itself_as_python_itself_would_have_it(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("")
    code = """
import neighbour, sys
print(__name__, __file__, sys.modules["__main__"].__file__)
print(sys.path[0], *sys.argv)
"""
    script = str(tmp_path / "script.py")
    done = run_task(tmp_path, code, "--lr", "0.1")
    assert done.stdout == f"__main__ {script} {script}\n{tmp_path} {script} --lr 0.1\n"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("code", "returncode", "message"),
    [
        ("from paramserver.errors import ConfigError; raise ConfigError('no ps')", 1, "error: no ps\n"),
        ("from paramserver.errors import RunOverError; raise RunOverError('it is over')", 0, "it is over\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise SystemExit(7)", 7, ""),
        ("import sys; sys.exit('no data')", 1, "no data\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
    ],
)
def test_an_end_on_purpose_has_no_traceback(tmp_path: Path, code: str, returncode: int, message: str) -> None:
    done = run_task(tmp_path, code)
    assert (done.returncode, done.stderr) == (returncode, message)


def test_a_users_error_is_shown_as_python_shows_it(tmp_path: Path) -> None:
    code = "def work():\n    raise ValueError('NaN')\n\nwork()\n"
    done = run_task(tmp_path, code)
    alone = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == alone.stderr


def test_a_syntax_error_shows_the_script_only(tmp_path: Path) -> None:
    done = run_task(tmp_path, "a = = 1\n")
    assert done.returncode == 1
    assert "runpy" not in done.stderr
    assert "launch/task.py" not in done.stderr
    assert done.stderr.endswith("SyntaxError: invalid syntax\n")


def test_sigterm_lets_exit_handlers_run(tmp_path: Path) -> None:
    code = """
import atexit, os, signal
atexit.register(print, "cleaned up")
os.kill(os.getpid(), signal.SIGTERM)
signal.pause()
"""
    done = run_task(tmp_path, code)
    assert (done.returncode, done.stdout, done.stderr) == (143, "cleaned up\n", "")


KILL_ITSELF = """
import os, signal
def kill(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    [number for number in range(9)]  # the handler has run by now
"""

WHERE_EXCEPTIONS_ARE_DROPPED = """
class Thing:
    __del__ = kill
Thing()
while True:  # to wait in a call would be to miss a signal that comes just before it
    pass
"""

WHERE_THE_HOOK_IS_INTERRUPTED = (
    """
import paramserver.cluster.termination
paramserver.cluster.termination.AGAIN = 1e-6  # sent before the hook has returned
"""
    + WHERE_EXCEPTIONS_ARE_DROPPED
)

WHERE_AN_ERROR_TAKES_ITS_PLACE = """
try:
    kill()
except BaseException as error:  # as C++ does when a module cannot be imported
    raise ImportError("initialization failed") from error
"""

AFTER_THE_SCRIPT = """
import atexit
atexit.register(print, "cleaned up")
atexit.register(kill)
"""


@pytest.mark.parametrize(
    ("code", "returncode", "said"),
    [
        (WHERE_EXCEPTIONS_ARE_DROPPED, 143, ""),
        (WHERE_THE_HOOK_IS_INTERRUPTED, 143, ""),
        (WHERE_AN_ERROR_TAKES_ITS_PLACE, 143, ""),
        (AFTER_THE_SCRIPT, 0, "cleaned up\n"),
    ],
    ids=[
        "where exceptions are dropped",
        "where the hook is interrupted",
        "where an error takes its place",
        "after the script",
    ],
)
def test_sigterm_ends_a_script_quietly_wherever_it_is(tmp_path: Path, code: str, returncode: int, said: str) -> None:
    done = run_task(tmp_path, KILL_ITSELF + code)
    assert (done.returncode, done.stdout, done.stderr) == (returncode, said, "")


def test_what_a_script_drops_of_its_own_is_shown_as_ever(tmp_path: Path) -> None:
    done = run_task(tmp_path, "class Thing:\n    def __del__(self):\n        raise ValueError('dropped')\n\nThing()\n")
    assert done.returncode == 0
    assert done.stderr.endswith("ValueError: dropped\n")


def test_what_a_script_forks_dies_of_sigterm_as_ever(tmp_path: Path) -> None:
    code = """
import os, signal
reader, writer = os.pipe()
pid = os.fork()
if pid == 0:
    os.write(writer, b".")
    while True:  # to wait in a call would be to miss a signal that comes just before it
        pass
os.read(reader, 1)
os.kill(pid, signal.SIGTERM)
print(os.WTERMSIG(os.waitpid(pid, 0)[1]))
"""
    done = run_task(tmp_path, code)
    assert (done.stdout, done.stderr) == ("15\n", "")


def test_a_module_is_run_as_python_runs_it(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "near.py").write_text("")
    (package / "train.py").write_text("import sys\nfrom . import near\nprint(__name__, sys.argv, sys.path[0])")
    command = [sys.executable, "-m", "paramserver.launch.task", "-m", "package.train", "--lr", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout == f"__main__ {[str(package / 'train.py'), '--lr', '1']} {tmp_path}\n"


@pytest.mark.parametrize("arguments", [[], ["missing.py"], ["-m"], ["-m", "no.such.module"]])
def test_a_missing_script_is_one_line(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "paramserver.launch.task", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


# --- restarts


FAIL_ONCE = """
try:
    os.close(os.open(HERE + "/was_here", os.O_CREAT | os.O_EXCL))
except FileExistsError:
    print("again")
else:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_task_that_is_killed_is_started_again(program: Program) -> None:
    run = Run(program(CHIEF, FAIL_ONCE), program(WORKER, "print('undisturbed')"), limits=Limits(restarts=1))
    assert (run.code, run.said(CHIEF), run.said(WORKER)) == (0, ["again"], ["undisturbed"])
    assert run.said(None, is_error=True) == [
        "chief:0 was killed by SIGKILL (code 137); it is started again in 0.5 s (1 of 1)"
    ]


def test_a_task_that_fails_each_time_has_failed(program: Program) -> None:
    run = Run(program(WORKER, "print('here'); sys.exit(3)"), limits=Limits(restarts=2))
    assert (run.code, run.said(WORKER)) == (3, ["here"] * 3)


def test_a_ps_that_is_started_again_listens_at_the_same_address(program: Program) -> None:
    serve = "print(socket.socket(fileno=int(os.environ['PARAMSERVER_LISTEN_FD'])).getsockname()[1])\n" + FAIL_ONCE
    listener = local.listener()
    port = str(listener.getsockname()[1])
    line_by_line = "sys.stdout.reconfigure(line_buffering=True)\n"
    run = Run(program(PS, line_by_line + serve), listeners={PS: listener}, limits=Limits(restarts=1))
    assert (run.code, run.said(PS)) == (0, [port, port, "again"])
    assert listener.fileno() == -1


def test_what_a_failed_task_has_left_running_is_gone_before_it_is_started_again(
    program: Program, lifeline: Lifeline
) -> None:
    run = Run(
        program(CHIEF, "child('hold(); signal.pause()'); os.read(crowd, 1)\n" + FAIL_ONCE), limits=Limits(restarts=1)
    )
    assert run.code == 0
    assert lifeline.is_free(PATIENCE)
