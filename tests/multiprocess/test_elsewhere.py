"""On macOS and Windows, as far as Linux can play them: one process trains, and what needs several says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.patience import patience

pytestmark = pytest.mark.multiprocess

OWN_LOOP = """
import torch, paramserver as ps

def train(prepare):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(600, 900), torch.nn.BatchNorm1d(900), torch.nn.Linear(900, 1))
    model, optimizer = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 600)).square().sum().backward()
        optimizer.step()
    return model

strategy = ps.ParameterServerStrategy()
trained = train(strategy.prepare)
for one, other in zip(trained.parameters(), train(lambda *both: both).parameters(), strict=True):
    assert torch.equal(one, other)
strategy.save("saved")
before = [parameter.clone() for parameter in trained.parameters()]
strategy.restore("saved")
assert all(map(torch.equal, before, trained.parameters()))
print("trained", strategy.global_step)
"""

ESTIMATOR = """
import sys, torch, paramserver as ps

def model_fn(mode):
    model = torch.nn.Sequential(torch.nn.Embedding(300_000, 4), torch.nn.Flatten(), torch.nn.Linear(8, 1))
    return ps.estimator.EstimatorSpec(
        mode,
        model=model,
        loss_fn=lambda model, x, y: (model(x) - y).square().mean(),
        optimizer=torch.optim.Adam(model.parameters()),
        predict_fn=lambda model, x: model(x),
    )

data = lambda: [(torch.randint(300_000, (4, 2)), torch.ones(4, 1)) for _ in range(6)]
estimator = ps.estimator.Estimator(model_fn, "run", ps.estimator.RunConfig(save_checkpoints_steps=2))
estimator.train(data)
print("trained", estimator.evaluate(data)["global_step"], len(list(estimator.predict(data))))
if sys.platform == "darwin":  # torch's own export asks for a module of Windows
    estimator.export_model("export", lambda: torch.zeros(2, 2, dtype=torch.int64))
"""

COMMAND = """
import sys
from paramserver.cli import main
for command in (["launch", "program.py"], ["demo"]):
    sys.argv[1:] = command
    try:
        main()
    except SystemExit as end:
        assert end.code == 1
"""

SERVER = """
import paramserver as ps
try:
    ps.Server.create_local_server()
except ps.errors.ConfigError as error:
    print(error)
"""

WORKER = """
import torch, paramserver as ps
cluster = ps.ClusterSpec({"chief": ["a:0"], "ps": ["localhost:1"]})
strategy = ps.ParameterServerStrategy(ps.SimpleClusterResolver(cluster, task_type="chief", task_id=0))
model = torch.nn.Linear(1, 1)
try:
    strategy.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
except ps.errors.ConfigError as error:
    print(error)
"""

PROGRAMS = {"own loop": OWN_LOOP, "server": SERVER, "worker": WORKER, "estimator": ESTIMATOR, "launch": COMMAND}
SEPARATOR = "\nprint('next', flush=True)\n"
WORD = "Linux only (on Windows: WSL 2), and this is {}; training in one process works here: run the program without"


@pytest.fixture(scope="module", params=["darwin", "win32"])
def platform(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def said(platform: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each of the programs prints on a platform, one after the other in one process."""
    folder = tmp_path_factory.mktemp(platform)
    program = folder / "program.py"
    program.write_text(SEPARATOR.join(PROGRAMS.values()))
    done = subprocess.run(
        (sys.executable, "-m", "tests.multiprocess.elsewhere", platform, str(program), str(folder)),
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=patience(60),
    )
    assert "Traceback" not in done.stdout, done.stdout
    return dict(zip(PROGRAMS, map(" ".join, map(str.split, done.stdout.split("next\n"))), strict=True))


@pytest.mark.parametrize("program", ["own loop", "estimator"])
def test_one_process_trains(said: dict[str, str], program: str) -> None:
    assert "trained" in said[program]


@pytest.mark.parametrize(
    ("program", "what"),
    [
        ("server", "serving as ps:0: "),
        ("worker", "connecting to ps:0: "),
        ("launch", "error: launch: "),
        ("launch", "error: demo: "),
    ],
)
def test_what_needs_several_processes_says_where_it_works(
    said: dict[str, str], platform: str, program: str, what: str
) -> None:
    assert what + WORD.format(platform) in said[program]
