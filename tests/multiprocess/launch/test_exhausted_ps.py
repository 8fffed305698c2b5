"""A real ps that has no descriptors left."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.patience import patience

from paramserver.transport.handshake import connect
from paramserver.transport.identity import OBSERVER, Identity
from paramserver.wire import messages

pytestmark = pytest.mark.multiprocess

PATIENCE = patience(60.0)
LIMIT = 48
ME = Identity(task=OBSERVER, token="a secret", incarnation="once")


@contextlib.contextmanager
def serving(address):
    """A process of its own that serves at an address, with few descriptors."""
    config = {"cluster": {"chief": ["127.0.0.1:1"], "ps": [address]}, "task": {"type": "ps", "index": 0}}
    env = {**os.environ, "TF_CONFIG": json.dumps(config), "PARAMSERVER_TOKEN": ME.token}
    command = [sys.executable, "-m", "paramserver", "server"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)


def status(address):
    lane = connect(address, "ps:0", ME, lane="tcp", timeout=PATIENCE)
    with contextlib.closing(lane):
        lane.start(messages.GetStatus())
        return lane.finish()


def ticks(process):
    """The processor time that a process has used, in hundredths of a second."""
    return sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def test_a_ps_without_descriptors_serves_on_and_accepts_again():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with serving(address) as process:
        assert isinstance(status(address), messages.Status)
        with contextlib.ExitStack() as strangers:
            host, _, port = address.partition(":")
            for _ in range(2 * LIMIT):
                strangers.enter_context(socket.create_connection((host, int(port))))
            line = next(line for line in process.stderr if "cannot take another connection" in line)
            assert "Too many open files; raise the limit (ulimit -n" in line
            threads = len(list(Path(f"/proc/{process.pid}/task").iterdir()))
            before = ticks(process)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.0)
            assert ticks(process) - before < 50
            assert threads < 10
        assert isinstance(status(address), messages.Status)
        process.send_signal(signal.SIGTERM)
        assert "cannot take" not in process.stderr.read()
