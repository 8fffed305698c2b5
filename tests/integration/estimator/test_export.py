"""An exported model in a fresh process, which knows nothing of this library (Q19)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from tests.patience import patience
from torch import nn

from paramserver.estimator import EstimatorSpec, ModeKeys
from paramserver.estimator.export.export import write_export

SERVE = """
import json, sys
import torch
program = torch.export.load(sys.argv[1]).module()
predictions = [program({"x": torch.full((rows, 3), 0.5)})["y"].tolist() for rows in (1, 2, 7)]
assert not any(name.split(".")[0] == "paramserver" for name in sys.modules)
print(json.dumps(predictions))
"""


class Net(nn.Module):
    """A model whose code the fresh process does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"y": self.layers(features["x"])}


def test_q19_a_program_runs_without_this_library_and_without_the_models_code(tmp_path: Path) -> None:
    model = Net()
    exported = write_export(
        str(tmp_path), EstimatorSpec(ModeKeys.PREDICT, model=model), 7, lambda: {"x": torch.zeros(4, 3)}
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", SERVE, str(Path(exported, "model.pt2"))],
        capture_output=True, text=True, timeout=patience(100), check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for predicted, rows in zip(json.loads(done.stdout), (1, 2, 7), strict=True):
        expected = model({"x": torch.full((rows, 3), 0.5)})["y"]
        torch.testing.assert_close(torch.tensor(predicted), expected)
