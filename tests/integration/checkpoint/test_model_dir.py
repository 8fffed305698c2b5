"""A whole run whose model_dir is a folder, a file:// URL, or what fsspec reaches (here memory://)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramserver.checkpoint.storage import join, local_copy, storage_of
from paramserver.estimator import (
    BestExporter,
    Estimator,
    EstimatorSpec,
    EvalSpec,
    FinalExporter,
    LatestExporter,
    ModeKeys,
    ProfilerHook,
    RunConfig,
    TrainSpec,
    WarmStartSettings,
    read_eval_metrics,
    stop_if_lower_hook,
    train_and_evaluate,
)


@pytest.fixture(params=["{}", "file://{}", "memory://{}"])
def model_dir(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A place for a run; whatever goes elsewhere is found."""
    for name in ("temporary", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    yield request.param.format(tmp_path / "run")
    expected = {"here", "temporary"} | (set() if request.param.startswith("memory") else {"run"})
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert not list((tmp_path / "here").iterdir())
    assert not [path for path in (tmp_path / "temporary").iterdir() if "torchinductor" not in path.name]


def model_fn(mode: ModeKeys) -> EstimatorSpec:
    model = nn.Linear(2, 1)
    return EstimatorSpec(
        mode,
        model=model,
        loss_fn=lambda model, features, labels: (model(features)[:, 0] - labels).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )


def batches() -> list[tuple[Tensor, Tensor]]:
    features = torch.rand(40, 8, 2, generator=torch.Generator().manual_seed(1))
    return [(part, part @ torch.tensor([2.0, -1.0])) for part in features]


def make(model_dir: str, **arguments: Any) -> Estimator:
    config = RunConfig(seed=1, save_checkpoints_steps=5, save_summary_steps=5, log_step_count_steps=None)
    return Estimator(model_fn, model_dir, config, **arguments)


def train(estimator: Estimator, max_steps: int = 40) -> tuple[dict[str, float], dict[str, str | None]]:
    """The last evaluation, and what each exporter made of it."""
    exporters = [
        BestExporter("best", lambda: torch.zeros(2, 2)),
        LatestExporter("latest", exports_to_keep=1),
        FinalExporter("final", lambda: torch.zeros(2, 2)),
    ]
    enough = stop_if_lower_hook(estimator, "loss", 0.2, run_every_secs=None, run_every_steps=5)
    done = train_and_evaluate(
        estimator,
        TrainSpec(batches, max_steps=max_steps, hooks=[enough, ProfilerHook(save_steps=4)]),
        EvalSpec(batches, steps=4, throttle_secs=0, exporters=exporters),
    )
    assert done is not None
    return done[0], dict(zip(("best", "latest", "final"), done[1], strict=True))


def names(*place: str) -> list[str]:
    return sorted(storage_of(join(*place)).names())


def test_q05_v25_v28_y06_a_whole_run_lies_in_model_dir_and_nowhere_else(model_dir: str) -> None:
    estimator = make(model_dir)
    results, exported = train(estimator)
    place = join(model_dir)  # a file:// URL is shown as the path that it is
    step = results["global_step"]
    assert results["loss"] < 0.2, "else the early stopping is not seen"
    assert 5 < step < 40
    assert estimator.latest_checkpoint() == join(place, f"ckpt-{step:.0f}")
    assert {"worker-0.4.pt.trace.json", "checkpoint", "eval", "export"} <= set(names(place))
    assert sum("tfevents" in name for name in names(place)) == 1
    evaluations = read_eval_metrics(join(model_dir, "eval"))
    assert len(evaluations) >= 2
    assert evaluations[int(step)]["loss"] == pytest.approx(results["loss"])
    assert read_eval_metrics(model_dir).keys() >= {1, 6}, "the training's own summaries"
    assert exported["best"] is None, "it was exported when the training had not ended yet"
    newest = join(place, "export", "best", names(place, "export", "best")[-1])
    for path in (newest, exported["final"]):
        assert path is not None
        assert names(path) == ["model.pt2", "model.safetensors", "signature.json"]
    assert exported["latest"] == join(place, "export", "latest", *names(place, "export", "latest"))
    assert names(exported["latest"]) == ["model.safetensors"]
    losses = [metrics["loss"] for metrics in evaluations.values()]
    better = [loss for i, loss in enumerate(losses) if not i or loss < min(losses[:i])]
    assert len(names(place, "export", "best")) == len(better) > 1


def test_q18_a_run_goes_on_predicts_and_gives_its_values_to_another(model_dir: str) -> None:
    estimator = make(model_dir)
    _, exported = train(estimator, max_steps=10)
    weight, features = estimator.get_variable_value("weight"), torch.eye(2)
    assert estimator.get_variable_names() == ["bias", "weight"]
    predictions = torch.stack(list(estimator.predict(lambda: [features])))
    torch.testing.assert_close(predictions[:, 0], weight[0] + estimator.get_variable_value("bias"))
    assert exported["final"] is not None
    with local_copy(exported["final"]) as folder:
        program = torch.export.load(folder / "model.pt2").module()
    torch.testing.assert_close(program(features), predictions)
    for source in (model_dir, join(model_dir, "ckpt-10"), exported["final"]):
        settings = WarmStartSettings(source, vars_to_warm_start="weight")
        begun = make(join(model_dir, "another"), warm_start_from=settings)
        with_bias = torch.stack(list(begun.predict(lambda: [torch.cat([features, torch.zeros(1, 2)])])))
        torch.testing.assert_close(with_bias[:2, 0] - with_bias[2, 0], weight[0])
    again = make(model_dir)
    again.train(batches, steps=2)
    assert again.evaluate(batches, steps=1)["global_step"] == 12
