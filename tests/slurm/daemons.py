"""A Slurm of its own for tests: a controller and three nodes, on hosts that share nothing but a network and a folder.

Rules
    * The hosts are those of `tests.multihost.hosts`: ``head``, with the controller, from which jobs are submitted, and
      ``n1`` to ``n3``, each with addresses, a host name, ``/tmp`` and ``/dev/shm`` of its own. Ports are free, because
      no other network has them.
    * All processes are in one process namespace, and end with its first one, which ends with its standard input. So a
      test run that is killed leaves nothing.
    * munged has a key of its own, and one socket for all hosts, in the folder that they share.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

from tests.multihost.hosts import Host, Network, why_impossible
from tests.patience import patience

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "salloc", "scancel", "squeue", "sinfo")
NODES = ("n1", "n2", "n3")
CPUS = 8
KILL_WAIT = 25
REQUEUE_WAIT = 10
"""Seconds that a job that is put into the queue again waits there: two minutes on other clusters."""
PATIENCE = patience(20)
"""Seconds after which a test gives up; nothing takes this long when it works."""

CONFIG = """
ClusterName=test
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_wait}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait={kill_wait}
ReturnToService=2
MailProg=/bin/true
NodeName=n[1-3] CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=n[1-3] Default=YES State=UP MaxTime=INFINITE
"""


def why_missing() -> str:
    """Say why this machine cannot run Slurm's daemons; empty if it can."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"needs {', '.join(missing)}: make test-slurm installs them"
    return why_impossible()


class Job:
    """A command that was started on the head, with its output.

    Attributes:
        process: The command.
        said: What it has said so far, on both streams.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said = ""

    def await_word(self, word: str) -> None:
        """Read what it says until it says the word."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if word in line:
                return
        raise AssertionError(f"it never said {word!r}, but {self.said!r}")

    def ends(self) -> int:
        """Its exit code, once it has ended."""
        self.said += self.process.communicate(timeout=PATIENCE)[0]
        return self.process.returncode

    def close(self) -> None:
        """Kill it if it still runs."""
        self.process.kill()
        self.process.communicate()


class Slurm:
    """The hosts and the daemons. A context manager.

    Attributes:
        folder: The folder that all hosts share.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="paramserver-slurm-", dir="/var/tmp"))  # outside /tmp
        self._network = Network()
        self._jobs: list[Job] = []
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._first = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", "echo; cat; exit"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._first.communicate()  # its standard input ends, and so do all processes
        for daemon in self._daemons:
            daemon.wait()
        self._network.__exit__()
        shutil.rmtree(self.folder)

    def write(self, name: str, text: str) -> str:
        """Write a file that all hosts see, and return its path."""
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def start(self, *command: str, env: Mapping[str, str] | None = None) -> Job:
        """Start a command on the head."""
        process = subprocess.Popen(
            self._on(self._network.hosts["head"], *command),
            cwd=self.folder,
            env=self._environment(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._jobs.append(Job(process))
        return self._jobs[-1]

    def run(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """Run a command on the head, which ends with 0, and return what it has said."""
        job = self.start(*command, env=env)
        code = job.ends()
        assert code == 0, f"{command} has ended with {code}: {job.said}"
        return job.said

    def submit(self, name: str, script: str, *options: str, arguments: tuple[str, ...] = ()) -> str:
        """Submit a batch job whose output goes to ``NAME-ELEMENT.out``, and return its id."""
        for old in self.folder.glob(f"{name}*.out"):
            old.unlink()
        path = self.write(f"{name}.sbatch", script if script.startswith("#!") else f"#!/bin/sh\n{script}\n")
        output = f"--output={self.folder}/{name}-%a.out" if any("--array" in each for each in options) else ""
        return self.run(
            "sbatch", "--parsable", output or f"--output={self.folder}/{name}.out", *options, path, *arguments
        ).strip()

    def await_true(self, what: str, is_there: Callable[[], bool]) -> None:
        """Wait until something is there."""
        end = time.monotonic() + PATIENCE
        while not is_there():
            if time.monotonic() > end:
                raise AssertionError(f"{what}; logs:\n{''.join(self._logs())}")

    def await_no_jobs(self) -> None:
        """Wait until all jobs have ended."""
        self.await_true("jobs are left", lambda: not self.run("squeue", "--noheader"))

    def await_output(self, name: str, word: str) -> None:
        """Wait until a batch job has written the word."""
        self.await_true(f"{name} lacks {word!r}", lambda: word in self.output(name))

    def output(self, name: str) -> str:
        """Return what a batch job has written so far."""
        path = self.folder / f"{name}.out"
        return path.read_text() if path.exists() else ""

    def path(self, host: str, path: str) -> Path:
        """Return the path from outside of a file that only one host sees."""
        return self._network.hosts[host].path(path)

    def kill_task(self, number: int) -> None:
        """Kill the process that is a task of the only step."""
        is_task = re.compile(rb"(^|\0)SLURM_STEP_ID=")
        (found,) = [pid for pid, env in self._processes(f"SLURM_PROCID={number}") if is_task.search(env)]
        os.kill(found, signal.SIGKILL)

    def signal_process(self, argument: bytes, number: int) -> None:
        """Send a signal to the process on the head whose command has the argument."""
        (found,) = [
            pid
            for pid, _ in self._processes("SLURM_JOB_ID=")
            if (words := Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
            and argument in words
            and b"-m" in words[:2]
        ]
        os.kill(found, number)

    def _processes(self, variable: str) -> Iterator[tuple[int, bytes]]:
        """Yield the processes of this Slurm's jobs with a variable in their environment, and this environment."""
        marks = (f"SLURM_CONF={self.folder}/slurm.conf".encode(), variable.encode())
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                env = (process / "environ").read_bytes()
                if all(re.search(rb"(^|\0)" + re.escape(mark), env) for mark in marks):
                    yield int(process.name), env

    def clean_up(self) -> None:
        """End all jobs and commands."""
        for job in self._jobs:
            job.close()
        self._jobs.clear()
        self.run("scancel", "--user=root")
        self.await_no_jobs()
        self._jobs.clear()

    def _start(self) -> None:
        self.folder.chmod(0o755)  # as munged demands
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        config = self.write(
            "slurm.conf", CONFIG.format(folder=self.folder, cpus=CPUS, kill_wait=KILL_WAIT, requeue_wait=REQUEUE_WAIT)
        )
        assert self._first.stdout is not None
        self._first.stdout.readline()
        head, *nodes = self._network.add("head", *NODES)
        self._network.spread_own_names("ipv4")
        for host in (head, *nodes):  # their /proc shows the processes of the namespace
            subprocess.run(self._on(host, "mount", "-t", "proc", "proc", "/proc"), check=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
        self._daemon(head, "munged", "--foreground", *options)
        self.await_true("munged does not start", (self.folder / "munge.socket").exists)
        self._daemon(head, "slurmctld", "-D", "-f", config)
        for host in nodes:
            self._daemon(host, "slurmd", "-D", "-f", config)
        self.await_true("the nodes are not idle", lambda: self._states() == ["idle"] * len(NODES))

    def _states(self) -> list[str]:
        job = self.start("sinfo", "--noheader", "--Node", "--format=%T")
        job.ends()
        return job.said.split()

    def _daemon(self, host: Host, *command: str) -> None:
        with (self.folder / f"{host.name}-{command[0]}.log").open("wb") as log:
            process = subprocess.Popen(
                self._on(host, *command), env=self._environment({}), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._daemons.append(process)

    def _environment(self, env: Mapping[str, str]) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": f"{self.folder}/slurm.conf", **env}

    def _on(self, host: Host, *command: str) -> list[str]:
        (child,) = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text().split()
        namespaces = [f"--{name}={host.namespace(kind)}" for name, kind in (("net", "net"), ("mount", "mnt"))]
        inside = ["nsenter", *namespaces, f"--uts={host.namespace('uts')}", f"--pid=/proc/{child}/ns/pid", "--"]
        return [*inside, "sh", "-c", 'cd "$0"; exec "$@"', str(self.folder), *command]

    def _logs(self) -> Iterator[str]:
        for log in sorted(self.folder.glob("*.log")):
            yield f"== {log.name}\n{log.read_text(errors='replace')[-2000:]}\n"
