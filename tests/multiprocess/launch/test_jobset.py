"""``paramserver launch --manifest``: the JobSet that ``paramserver manifest jobset`` prints, as real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.multiprocess.launch.test_signals import _process
from tests.multiprocess.warm import Warm
from tests.patience import patience

from paramserver.launch.manifests import manifest
from paramserver.launch.manifests.options import ManifestOptions

pytestmark = pytest.mark.multiprocess

PATIENCE = patience(90.0)

FAIL_ONCE = """
import os, pathlib
def fail_once(role, code):
    task = os.environ["REPLICATED_JOB_NAME"] + os.environ["JOB_INDEX"]
    was_here = pathlib.Path(__file__).with_name("was_here")
    if task == role and not was_here.exists():
        was_here.touch()
        sys.exit(code)
"""
SAY = """
import os, signal
print(os.environ["HOSTNAME"], os.environ["PARAMSERVER_RUN_ID"], flush=True)
"""


def written(folder: Path, script: Path, *, text: Callable[[str], str] = str, **options: object) -> Path:
    """The manifest of a run of a chief, a worker and two ps tasks, in a file."""
    given = {"image": "train:1", "script": str(script), "ps": 2, "workers": 2, "name": "train"} | options
    path = folder / "jobset.yaml"
    path.write_text(text(manifest("jobset", ManifestOptions(**given))))  # type: ignore[arg-type]  # by name
    return path


def test_the_printed_manifest_trains_to_the_end(tmp_path: Path, script: Callable[..., Path], warm: Warm) -> None:
    path = script("main(sys.argv[1], 60)")
    file = written(tmp_path, path, args=("$(MODEL_DIR)",), model_dir=str(tmp_path / "model"), evaluator=True)
    done = warm.launch("--manifest", file)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("not done on this machine: ") == 1
    assert re.search(r"ps:1 \| .* ps:1 serves at 127\.0\.0\.1:\d+", done.stderr)
    assert (tmp_path / "model" / "eval").exists()
    assert "started again" not in done.stderr


def test_a_ps_that_is_killed_is_started_again_alone(
    tmp_path: Path, script: Callable[..., Path], warm: Warm, mark: dict[str, str]
) -> None:
    trains = f"main({str(tmp_path / 'model')!r}, 1500, log_step_count_steps=50)"
    path = script("import os", "print('forked by', os.getppid(), flush=True)", trains)
    command = [sys.executable, "-m", "paramserver", "launch", "--manifest", str(written(tmp_path, path))]
    with (
        warm.launcher(mark) as how,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how) as launcher,
    ):
        assert launcher.stdout is not None
        said = ""
        for line in launcher.stdout:
            said += line
            if "chief:0 | forked by" in line:
                parent = int(line.split()[-1])
            if re.search(r"chief:0 \| .*step = [1-9]", line):
                break
        os.kill(_process("ps:1", parent), signal.SIGKILL)
        said += launcher.communicate(timeout=PATIENCE)[0]
    assert launcher.returncode == 0, said
    assert (
        "ps:1 was killed by SIGKILL (code 137); it is started again in 0.5 s (its Job has failed 1 times, limit 3)"
        in said
    )
    assert said.count("ps:1 serves at") == 2
    assert said.count("ps:0 serves at") == 1


def test_a_worker_that_fails_is_started_again_alone(tmp_path: Path, script: Callable[..., Path], warm: Warm) -> None:
    path = script(FAIL_ONCE, "fail_once('worker0', 3)", f"main({str(tmp_path / 'model')!r}, 60)")
    done = warm.launch("--manifest", written(tmp_path, path))
    assert done.returncode == 0, done.stderr
    assert "worker:0 exited with code 3; it is started again in 0.5 s" in done.stderr


def test_the_success_of_the_chief_ends_the_run(tmp_path: Path, warm: Warm) -> None:
    path = tmp_path / "script.py"
    path.write_text(SAY + "if 'worker' in os.environ['HOSTNAME']:\n    signal.pause()\n")
    done = warm.launch("--manifest", written(tmp_path, path))
    assert done.returncode == 0, done.stderr
    assert "the JobSet has succeeded; stopping worker:0" in done.stderr
    assert {line.split()[2] for line in done.stdout.splitlines()} <= {"train-chief-0-0", "train-worker-0-0"}
    assert "ps:0 did not end within 3 s" in done.stderr  # nobody has trained, or said goodbye


@pytest.mark.parametrize("restart_with", ["pods", "jobs"])
def test_the_jobset_fails_after_its_restarts(restart_with: str, tmp_path: Path, warm: Warm) -> None:
    path = tmp_path / "script.py"
    path.write_text(SAY + "if 'worker' in os.environ['HOSTNAME']:\n    raise SystemExit(3)\nsignal.pause()\n")
    done = warm.launch("--manifest", written(tmp_path, path, restarts=1, restart_with=restart_with))
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("worker:0 exited with code 3; it is started again") == 1
    assert f"the JobSet fails after {int(restart_with == 'jobs')} restarts (maxRestarts)" in done.stderr
    assert done.stderr.endswith("error: worker:0 exited with code 3; the run was stopped\n")
    assert done.stdout.count("train-worker-0-0") == 2
    assert done.stdout.count("train-chief-0-0") == 1


def test_the_whole_jobset_is_restarted_where_its_policy_says_so(tmp_path: Path, warm: Warm) -> None:
    path = tmp_path / "script.py"
    path.write_text(SAY + "if 'worker' in os.environ['HOSTNAME']:\n    raise SystemExit(3)\nsignal.pause()\n")

    def edited(text: str) -> str:
        return text.replace("maxRestarts: 0", "maxRestarts: 1")

    done = warm.launch("--manifest", written(tmp_path, path, restarts=0, text=edited))
    assert done.returncode == 3, done.stderr
    assert "Job train-worker-0 has failed (BackoffLimitExceeded); the JobSet is restarted" in done.stderr
    assert [done.stdout.count(f"train-{job}-0-0") for job in ("chief", "worker")] == [2, 2]
    assert len(set(re.findall(r"train-\w+-0-0 (\w+)", done.stdout))) == 1  # of one run


def test_ctrl_c_stops_all(tmp_path: Path, warm: Warm, mark: dict[str, str]) -> None:
    path = tmp_path / "script.py"
    path.write_text(SAY + "signal.pause()\n")
    command = [sys.executable, "-m", "paramserver", "launch", "--manifest", str(written(tmp_path, path))]
    with (
        warm.launcher(mark) as how,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how) as launcher,
    ):
        assert launcher.stdout is not None
        for line in launcher.stdout:
            if "train-chief-0-0" in line:
                break
        launcher.send_signal(signal.SIGINT)
        said = launcher.communicate(timeout=PATIENCE)[0]
    assert launcher.returncode == 130
    assert "started again" not in said


def test_commands_of_a_shell_are_programs_of_their_own(tmp_path: Path, warm: Warm) -> None:
    """Names of the pods are those of JobSet, and a TF_CONFIG of this shell is not one of theirs."""
    path = tmp_path / "script.py"
    path.write_text("")
    program = "  - paramserver\n              - task\n"
    file = written(tmp_path, path, args=("a b",))
    text = file.read_text()
    assert program in text
    shell = "  - sh\n              - -c\n              - 'echo $HOSTNAME ${TF_CONFIG-none} $0 $1'\n"
    file.write_text(text.replace(program, shell))
    done = warm.launch("--manifest", file, env={**os.environ, "TF_CONFIG": "{}"})
    assert done.returncode == 0, done.stderr
    assert f"ps:1 | train-ps-1-0 none {path} a b\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--manifest", "none.yaml"], "error: launch --manifest: none.yaml: No such file or directory\n"),
        (["--manifest", "none.yaml", "train.py"], "error: launch: expected SCRIPT or --manifest FILE, got both"),
        (
            ["--manifest", "none.yaml", "--ps", "1", "--log-dir", "logs", "--log-level", "info"],
            "error: launch --manifest: the manifest says what --log-level, --ps would; leave it out",
        ),
        (["--manifest", "none.yaml", "--mount", "model"], "error: --mount: expected PATH=FOLDER"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "paramserver", "launch", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
