"""The command line: help, bad input, dry runs. What the commands call has tests of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from paramserver import cli
from paramserver.cluster import environment
from paramserver.errors import CheckpointError, ConfigError
from paramserver.launch import local
from paramserver.launch.spec import LaunchOptions


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "80"}, prog_name="paramserver")


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[LaunchOptions]:
    """The options that `launch` was called with; nothing is started."""
    calls: list[LaunchOptions] = []

    def launch(options: LaunchOptions, *_: object) -> int:
        calls.append(options)
        return 7

    monkeypatch.setattr(local, "launch", launch)
    return calls


@pytest.mark.parametrize("command", [[], ["launch"], ["task"], ["server"], ["inspect"], ["status"], ["demo"]])
def test_help_fits_in_80_columns(command: list[str]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    assert "..." not in re.sub(r"(?i)\[?(args|addresses)\]?\.\.\.", "", result.output)


def test_the_help_lists_the_environment_variables() -> None:
    shown = " ".join(invoke("--help").output.split())
    for name, text in (*environment.FOR_USERS, *environment.DEFAULTS_OF_LAUNCH, *environment.FROM_LAUNCHERS):
        assert f"{name} {text}" in shown


def test_an_address_that_is_none_is_refused() -> None:
    result = invoke("status", "localhost:")
    assert isinstance(result.exception, ConfigError)
    assert "status: expected host:port, got 'localhost:'" in str(result.exception)


def test_options_of_launch_reach_it_and_its_exit_code_is_ours(script: str, launched: list[LaunchOptions]) -> None:
    result = invoke("launch", "--ps", "2", "--workers", "3", "--evaluator", "--lane", "tcp", "--threads", "4", script)
    assert result.exit_code == 7
    assert launched == [
        LaunchOptions(script=script, ps=2, workers=3, evaluator=True, lane="tcp", threads=4),
    ]


def test_what_follows_the_script_belongs_to_the_script(script: str, launched: list[LaunchOptions]) -> None:
    invoke("launch", script, "--ps", "5", "--help", "--", "-x")
    assert launched == [LaunchOptions(script=script, args=("--ps", "5", "--help", "--", "-x"))]


def test_a_dry_run_shows_all_tasks_and_starts_none(
    script: str, launched: list[LaunchOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_socket(*_: object, **__: object) -> None:
        raise AssertionError("a dry run must bind nothing")

    monkeypatch.setattr("socket.create_server", no_socket)
    result = invoke("launch", "--dry-run", "--ps", "2", "--evaluator", script, "--lr", "0.1")
    assert result.exit_code == 0
    for text in ("# ps:1, listening on 127.0.0.1:<free port>", "# evaluator:0", "PARAMSERVER_TOKEN='***'"):
        assert text in result.output
    assert f"-m paramserver.launch.task {script} --lr 0.1" in result.output
    assert launched == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("launch", "--nonsense", "x.py"), "No such option: --nonsense"),
        (("launch", "--ps", "two", "x.py"), "Invalid value for '--ps'"),
        (("launch",), "Missing argument"),
        (("status", "--timeout", "-1", "a:1"), "Invalid value for '--timeout'"),
        (("lunch",), "No such command 'lunch'"),
    ],
)
def test_a_command_that_makes_no_sense_is_a_usage_error(arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ps", "0"), "ps: expected 1 or more, got 0"),
        (("--workers", "0"), "workers: expected 1 or more, got 0"),
        (("--lane", "udp"), "lane: expected one of auto, shared-memory, tcp, got 'udp'"),
        (("--threads", "0"), "threads: expected 1 or more, got 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options: tuple[str, ...], message: str, script: str) -> None:
    result = invoke("launch", *options, script)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--placement", "PACK"),
            "launch --on local: --placement: an option of --on ray; leave it out",
        ),
        (("--on", "slurm", "--ps-resources", "CPU=1"), "launch --on slurm: --ps-resources: an option of --on ray"),
        (
            ("--on", "ray", "--placement", "PAK"),
            "placement: expected one of 'SPREAD', 'PACK', 'STRICT_SPREAD'",
        ),
        (("--on", "ray", "--worker-resources", "CPU"), "--worker-resources: expected names and amounts"),
    ],
)
def test_options_of_an_engine(options: tuple[str, ...], message: str, script: str) -> None:
    result = invoke("launch", "--dry-run", *options, script)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_a_dry_run_on_ray_needs_no_ray(script: str) -> None:
    result = invoke("launch", "--dry-run", "--on", "ray", "--ps", "2", "--worker-resources", "CPU=3", script)
    assert result.exit_code == 0, result.output
    assert "2: CPU=3\n" in result.output
    assert "# ps:1, an actor on bundle 1" in result.output


def test_a_launch_on_ray_without_ray(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = invoke("launch", "--on", "ray", script)
    assert isinstance(result.exception, ConfigError)
    assert 'Ray is not installed; install it: pip install "paramserver[ray]"' in str(result.exception)


def test_a_script_that_is_not_there_is_refused_also_in_a_dry_run() -> None:
    result = invoke("launch", "--dry-run", "missing.py")
    assert "there is no script 'missing.py'" in str(result.exception)


def test_an_error_is_one_line_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["paramserver", "launch", "missing.py"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: launch: there is no script 'missing.py'")
    assert captured.err.count("\n") == 1


def test_ctrl_c_gives_130(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "launch", interrupted)
    monkeypatch.setattr(sys, "argv", ["paramserver", "launch", script])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def replace_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """Stand in for a module that needs torch; what the command calls in it is all that matters here."""
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))


def test_inspect_shows_a_table_that_fits_and_cuts_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "encoder.layers.11.attention.self.query_key_value.projection.low_rank.weight"
    found = SimpleNamespace(
        path="run/checkpoint-200",
        step=200,
        variables=[(name, "torch.float32", (1024, 64), 262144), ("scale", "float64", (), 8)],
        slots=["exp_avg", "exp_avg_sq"],
    )
    replace_module(monkeypatch, "paramserver.estimator", __path__=[])
    replace_module(monkeypatch, "paramserver.estimator.checkpoint", inspect_checkpoint=lambda _: found)
    result = invoke("inspect", "run")
    assert result.exit_code == 0
    assert "run/checkpoint-200: step 200" in result.output
    assert "slots: exp_avg, exp_avg_sq" in result.output
    rows = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
    assert "".join(row[1].strip() for row in rows) == name + "scale"
    assert [cell.strip() for cell in rows[0][2:5]] == ["float32", "1024 x 64", "262.1 kB"]
    assert [cell.strip() for cell in rows[-1][2:5]] == ["float64", "scalar", "8 bytes"]
    assert max(map(len, result.output.splitlines())) <= 80


def test_a_checkpoint_that_cannot_be_read_is_an_error_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: str) -> None:
        raise CheckpointError(f"{path} is cut short", path)

    replace_module(monkeypatch, "paramserver.estimator", __path__=[])
    replace_module(monkeypatch, "paramserver.estimator.checkpoint", inspect_checkpoint=refuse)
    monkeypatch.setattr(sys, "argv", ["paramserver", "inspect", "run"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "error: run is cut short\n"


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []

    def run_demo(**options: object) -> int:
        calls.append(options)
        return 3

    replace_module(monkeypatch, "paramserver.demo", __path__=[])
    replace_module(monkeypatch, "paramserver.demo.run", run_demo=run_demo)
    assert invoke("demo", "--steps", "5", "--model-dir", "here", "--lane", "tcp").exit_code == 3
    assert calls == [{"steps": 5, "model_dir": "here", "lane": "tcp"}]


PS_CONFIG = {"cluster": {"chief": ["a:1"], "ps": ["b:1"]}, "task": {"type": "ps", "index": 0}}


@pytest.mark.parametrize(("options", "insecure"), [([], False), (["--insecure"], True)])
def test_server_serves(monkeypatch: pytest.MonkeyPatch, options: list[str], insecure: bool) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps(PS_CONFIG))
    served: list[dict[str, bool]] = []
    replace_module(monkeypatch, "paramserver.server.server", run_standard_server=lambda **kw: served.append(kw))
    assert invoke("server", *options).exit_code == 0
    assert served == [{"insecure": insecure}]


def test_a_server_that_cannot_know_who_it_is_says_so_before_it_imports_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps({**PS_CONFIG, "task": {"type": "ps", "index": 7}}))
    monkeypatch.setitem(sys.modules, "paramserver.server.server", None)  # whoever imports it fails
    error = invoke("server").exception
    assert isinstance(error, ConfigError)
    assert "7" in str(error)


def test_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.2.3")
    assert invoke("--version").output == "paramserver 1.2.3\n"


@pytest.mark.multiprocess
def test_launching_does_not_import_torch() -> None:
    modules = "paramserver.cli, paramserver.launch.local, paramserver.launch.task"
    code = f"import {modules}, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


WORKER_CONFIG = {**PS_CONFIG, "task": {"type": "chief", "index": 0}}


@pytest.fixture
def starts_anew(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that this process would have become; it becomes none."""
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr("os.execv", lambda _, command: commands.append(command))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT", "PARAMSERVER_LANE", "PARAMSERVER_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLIBC_TUNABLES", "the user's")
    return commands


def test_a_task_that_trains_runs_the_script(
    monkeypatch: pytest.MonkeyPatch, starts_anew: list[tuple[str, ...]]
) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps(WORKER_CONFIG))
    ran: list[list[str]] = []
    monkeypatch.setattr("paramserver.launch.task.main", lambda arguments: ran.append(arguments) or 7)
    result = invoke("task", "--lane", "tcp", "--threads", "3", "-m", "package.train", "--lr", "1", "--lane", "x")
    assert result.exit_code == 7
    assert ran == [["-m", "package.train", "--lr", "1", "--lane", "x"]]
    assert (os.environ["PARAMSERVER_LANE"], os.environ["OMP_NUM_THREADS"]) == ("tcp", "3")
    assert "PARAMSERVER_LOG_LEVEL" not in os.environ
    assert starts_anew == []


def test_a_task_that_is_a_ps_serves_and_needs_no_script(
    monkeypatch: pytest.MonkeyPatch, starts_anew: list[tuple[str, ...]]
) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps(PS_CONFIG))
    served: list[dict[str, bool]] = []
    replace_module(monkeypatch, "paramserver.server.server", run_standard_server=lambda **kw: served.append(kw))
    assert invoke("task", "--insecure", "is-not-here.py").exit_code == 0
    assert served == [{"insecure": True}]


SLURM_PS = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "0",
}


@pytest.mark.parametrize(("given", "linger"), [(None, "20"), ("5", "5")])
def test_a_task_of_slurm_is_told_its_cluster_and_lingers(
    monkeypatch: pytest.MonkeyPatch, starts_anew: list[tuple[str, ...]], given: str | None, linger: str
) -> None:
    for name, value in {**SLURM_PS, "PARAMSERVER_LINGER": given or "", "TF_CONFIG": ""}.items():
        monkeypatch.setenv(name, value)
    if given is None:
        monkeypatch.delenv("PARAMSERVER_LINGER")
    replace_module(monkeypatch, "paramserver.server.server", run_standard_server=lambda **_: None)
    assert invoke("task", "--cluster", "slurm", "is-not-here.py").exit_code == 0
    assert json.loads(os.environ["TF_CONFIG"])["cluster"] == {"ps": ["n1:20496"], "chief": ["n2:0"]}
    assert os.environ["PARAMSERVER_LINGER"] == linger


def test_a_task_starts_its_program_once_more_for_the_tunables_of_glibc(
    monkeypatch: pytest.MonkeyPatch, starts_anew: list[tuple[str, ...]]
) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps(WORKER_CONFIG))
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr("paramserver.launch.task.main", lambda _: 0)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "bin/paramserver", "task", "train.py"])
    invoke("task", "train.py")
    assert starts_anew == [(sys.executable, "-X", "dev", "bin/paramserver", "task", "train.py")]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.tcache_count=0"


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (None, (), "TF_CONFIG is not set, so this process cannot know which task of a cluster it is"),
        ({"task": PS_CONFIG["task"]}, (), "TF_CONFIG: 'cluster' is missing"),
        ({"cluster": PS_CONFIG["cluster"]}, (), "TF_CONFIG: 'task' is missing"),
        ({**PS_CONFIG, "task": {"type": "ps", "index": 7}}, (), "task ps:7 is not in the cluster"),
        (PS_CONFIG, ("--lane", "udp"), "lane: expected one of auto, shared-memory, tcp, got 'udp'"),
        (PS_CONFIG, ("--threads", "0"), "threads: expected 1 or more, got 0"),
        (PS_CONFIG, ("--heartbeat-timeout", "-1"), "heartbeat timeout: expected seconds, 0 or more, got -1.0"),
        (PS_CONFIG, ("--log-level", "loud"), "log level: expected one of debug, info, warning, error, got 'loud'"),
    ],
)
def test_a_task_that_cannot_be_is_refused_before_anything_is_set(
    config: object, options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps(config) if config else "")
    monkeypatch.setattr("os.execv", None)
    error = invoke("task", *options, "train.py").exception
    assert isinstance(error, ConfigError)
    assert message in str(error)


def test_a_task_without_a_script_is_a_usage_error() -> None:
    assert "Missing argument" in invoke("task").output
