"""What an actor of Ray holds: the process of a task, without Ray."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.patience import patience

from paramserver.cluster.report import Report
from paramserver.cluster.task import Role, TaskId
from paramserver.errors import ConfigError
from paramserver.launch.lifecycle import Ending
from paramserver.launch.output import OutputLine
from paramserver.launch.ray_host import Event, TaskHost
from paramserver.launch.spec import HOST

pytestmark = pytest.mark.multiprocess

PS, CHIEF = TaskId(Role.PS, 0), TaskId(Role.CHIEF, 0)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("TF_CONFIG", "of this process")
    monkeypatch.chdir(tmp_path)
    return str(tmp_path)


def events(host: TaskHost) -> list[Event]:
    found: list[Event] = []
    while not found or not isinstance(found[-1], Ending):
        found += host.events()
    return found


def test_lines_reports_and_the_end_come_in_order(folder: str) -> None:
    host = TaskHost(CHIEF, {"COLOUR": "green"}, HOST)
    report = 'os.write(int(os.environ["PARAMSERVER_REPORT_FD"]), b\'{"task":"chief:0","loss":0.5}\\n\')'
    host.start(("-c", f"import os, sys; print(os.environ['COLOUR']); {report}; sys.exit(3)"), "{}", folder, True)
    found = events(host)
    assert OutputLine(CHIEF, "green", is_error=False) in found
    assert Report(task="chief:0", loss=0.5) in found
    assert found[-1] == Ending(3)


def test_the_cluster_is_a_file_that_is_replaced(folder: str) -> None:
    host = TaskHost(CHIEF, {}, HOST)
    script = "import os; f = os.environ['PARAMSERVER_TF_CONFIG_FILE']; print(open(f).read(), flush=True)"
    wait = "import time\nwhile open(f).read() != 'new': time.sleep(0.01)\nprint('seen', 'TF_CONFIG' in os.environ)"
    host.start(("-c", f"{script}\n{wait}"), "old", folder, False)
    lines = [event.text for event in host.events() if isinstance(event, OutputLine)]
    assert lines == ["old"]
    host.update("new")
    assert next(event for event in events(host) if isinstance(event, OutputLine)).text == "seen False"


def test_the_file_of_the_run_is_gone_when_it_is_over(folder: str) -> None:
    host = TaskHost(CHIEF, {}, HOST)
    script = "import os, time\nwhile os.path.exists(os.environ['PARAMSERVER_RUN_FILE']): time.sleep(0.01)"
    host.start(("-c", script), "{}", folder, False)
    host.end_run()
    assert events(host) == [Ending(0)]


def test_a_ps_inherits_the_socket_whose_address_is_told(folder: str) -> None:
    host = TaskHost(PS, {}, HOST)
    address = host.listen()
    assert address.startswith(f"{HOST}:")
    script = (
        "import os, socket; s = socket.socket(fileno=int(os.environ['PARAMSERVER_LISTEN_FD'])); print(s.getsockname())"
    )
    host.start(("-c", script), "{}", folder, False)
    (line, _) = events(host)
    assert isinstance(line, OutputLine)
    assert line.text == str((HOST, int(address.rpartition(":")[2])))


def test_signals(folder: str) -> None:
    host = TaskHost(CHIEF, {}, HOST)
    host.send(signal.SIGTERM)  # before the start: nothing
    host.start(("-c", "print('here', flush=True); import signal; signal.pause()"), "{}", folder, False)
    host.events()
    host.send(signal.SIGTERM)
    assert events(host)[-1] == Ending(143, signal.SIGTERM)
    host.send(signal.SIGTERM)  # after the end: nothing


def test_a_folder_that_the_node_does_not_have(folder: str) -> None:
    host = TaskHost(CHIEF, {}, HOST)
    with pytest.raises(ConfigError, match=f"chief:0: node {HOST} has no folder /is/not/there.*--working-dir"):
        host.start(("-c", ""), "{}", "/is/not/there", False)
    host.close()


def test_the_process_ends_with_its_actor(folder: str) -> None:
    program = f"""
import os
from paramserver.cluster.task import Role, TaskId
from paramserver.launch.ray_host import TaskHost
host = TaskHost(TaskId(Role.CHIEF, 0), {{}}, "{HOST}")
host.start(("-c", "import os, signal; print(os.getpid(), flush=True); signal.pause()"), "{{}}", None, False)
print(host.events()[0].text, flush=True)
os.kill(os.getpid(), 9)
"""
    actor = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert actor.returncode == -signal.SIGKILL, actor.stderr
    with contextlib.suppress(ProcessLookupError):  # it is gone already
        pidfd = os.pidfd_open(int(actor.stdout))
        ready, _, _ = select.select([pidfd], [], [], patience(2))
        os.close(pidfd)
        assert ready
