"""An exported model: what is in its folder, and what is refused (Q19, Q17)."""

import json
import logging
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from paramserver.checkpoint.storage import join, local_copy, storage_of
from paramserver.errors import ConfigError
from paramserver.estimator import BestExporter, Estimator, EstimatorSpec, EvalSpec, RunConfig, TrainSpec
from paramserver.estimator import train_and_evaluate as run_locally
from paramserver.estimator.export.export import signature, trace, write_export
from paramserver.estimator.specs import ModeKeys


def net():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def spec_of(model, predict_fn=None):
    return EstimatorSpec(ModeKeys.PREDICT, model=model, predict_fn=predict_fn)


def load(exported):
    return torch.export.load(Path(exported, "model.pt2")).module()


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def rows(count):
    return torch.rand(count, 3)


# --- the program


@pytest.mark.parametrize("example_rows", [1, 2, 5])
def test_q19_the_program_is_the_model_for_batches_of_any_size(tmp_path, example_rows):
    model = net()
    program = load(write_export(str(tmp_path), spec_of(model), 7, lambda: rows(example_rows)))
    for batch in map(rows, (1, 2, 3, 8)):
        torch.testing.assert_close(program(batch), model(batch))


def test_the_program_is_in_evaluation_mode_and_needs_no_gradients(tmp_path):
    """Dropout does nothing, statistics stay as they are, and nothing is kept for a backward pass."""
    model = net().train()
    program = load(write_export(str(tmp_path), spec_of(model), 7, lambda: rows(4)))
    batch = rows(3)
    first = program(batch)
    assert torch.equal(first, program(batch))
    assert not first.requires_grad
    assert not any(value.requires_grad for value in program.state_dict().values())
    assert int(program.state_dict()["1.num_batches_tracked"]) == 0


def test_q19_a_predict_fn_is_part_of_the_program(tmp_path):
    def predict(model, features):
        logits = model(features)
        return {"class": logits.argmax(1), "probabilities": logits.softmax(1)}

    model = net()
    exported = write_export(str(tmp_path), spec_of(model, predict), 7, lambda: rows(4))
    batch = rows(3)
    predictions = load(exported)(batch)
    assert torch.equal(predictions["class"], model(batch).argmax(1))
    assert json.loads(Path(exported, "signature.json").read_text())["outputs"] == {
        "class": {"dtype": "int64", "shape": [None]},
        "probabilities": {"dtype": "float32", "shape": [None, 2]},
    }


class Mixed(nn.Module):
    """Takes a nest of features of several dtypes, one of them without a batch."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 3)

    def forward(self, features):
        together = self.table(features["ids"]).sum(1) + features["dense"][0] * features["scale"]
        return together, [together.sum(1), None]


def mixed(count):
    ids = np.arange(count * 2).reshape(count, 2) % 10
    return {"ids": ids, "dense": (torch.ones(count, 3),), "scale": torch.tensor(2.0)}


def tensors(features):
    return {**features, "ids": torch.as_tensor(features["ids"])}


@pytest.mark.parametrize("example_rows", [1, 4])
def test_features_may_be_a_nest_of_tensors_and_arrays(tmp_path, example_rows):
    model = Mixed()
    exported = write_export(str(tmp_path), spec_of(model), 7, lambda: mixed(example_rows))
    features = tensors(mixed(5))
    for ours, theirs in zip(load(exported)(features)[0], model(features)[0], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_signature_names_inputs_and_outputs(tmp_path):
    exported = write_export(str(tmp_path), spec_of(Mixed()), 7, lambda: mixed(4))
    described = json.loads(Path(exported, "signature.json").read_text())
    assert described["inputs"] == {
        "ids": {"dtype": "int64", "shape": [None, 2]},
        "dense/0": {"dtype": "float32", "shape": [None, 3]},
        "scale": {"dtype": "float32", "shape": []},
    }
    assert described["outputs"] == {
        "0": {"dtype": "float32", "shape": [None, 3]},
        "1/0": {"dtype": "float32", "shape": [None]},
    }
    assert described["global_step"] == 7
    assert described["versions"]["torch"] == torch.__version__


class Pair(NamedTuple):
    """Features with names."""

    left: torch.Tensor
    right: torch.Tensor


def test_the_signature_of_one_tensor_and_of_a_named_tuple():
    class Swap(nn.Module):
        def forward(self, pair):
            return pair.right @ pair.left.T

    described = signature(trace(Swap(), Pair(torch.zeros(2, 3), torch.zeros(2, 3))))
    assert list(described["inputs"]) == ["left", "right"]
    assert described["outputs"] == {"predictions": {"dtype": "float32", "shape": [None, None]}}


def test_nothing_in_the_program_is_pickled_and_the_example_is_not_in_it(tmp_path):
    """Zip members that torch.save wrote would be zip archives themselves, with a data.pkl."""
    exported = write_export(str(tmp_path), spec_of(net()), 7, lambda: rows(4))
    with zipfile.ZipFile(Path(exported, "model.pt2")) as archive:
        members = {info.filename: info.file_size for info in archive.infolist()}
        contents = b"".join(archive.read(name) for name in members)
    assert b"data.pkl" not in contents
    assert b'"use_pickle": true' not in contents
    assert [size for name, size in members.items() if "sample_inputs" in name] == [0]


@pytest.mark.parametrize("member", ["data/sample_inputs/model.pt", "data/constants/model_constants_config.json"])
def test_a_program_with_something_pickled_is_refused(tmp_path, monkeypatch, member):
    """As torch.export.save writes tensors of a class of their own, or wrote all of them in earlier versions."""

    def save(program, path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, '{"config": {"offset": {"use_pickle": true}}}')

    monkeypatch.setattr(torch.export, "save", save)
    with pytest.raises(ConfigError, match=r"would hold pickled data \((offset|.*model.pt)\).* nothing was written"):
        write_export(str(tmp_path), spec_of(net()), 7, lambda: rows(4))
    assert names(tmp_path) == []


# --- what cannot be exported


class Branching(nn.Module):
    """Decides by a value."""

    def forward(self, features):
        return features if features.sum() > 0 else -features


class Fixed(nn.Module):
    """Knows one batch size."""

    def forward(self, features):
        return features.view(4, 3) + 1


class Broken(nn.Module):
    """Has a fault of its own."""

    def forward(self, features):
        raise LookupError("no such feature")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Branching, "GuardOnDataDependentSymNode: Could not guard on data-dependent expression"),
        (Fixed, r"UserError: Constraints violated .* specialized it to be a constant \(4\)"),
        (Broken, "LookupError: no such feature"),
    ],
)
def test_a_model_that_cannot_be_traced_is_refused_with_the_reason(tmp_path, model, reason):
    what_to_do = "change forward or predict_fn, or leave out serving_input_fn to export the weights only"
    with pytest.raises(ConfigError, match=f"nothing was written.*{what_to_do}.*{reason}"):
        write_export(str(tmp_path / "export"), spec_of(model()), 7, lambda: rows(4))
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("example", "shown"),
    [(None, "None"), ({"a": "text"}, "a dict"), (torch.zeros(0, 3), r"a Tensor of shape \[0, 3\]")],
)
def test_an_example_that_is_no_batch_is_refused(tmp_path, example, shown):
    with pytest.raises(ConfigError, match=f"serving_input_fn must return one batch of features, .* got {shown}"):
        write_export(str(tmp_path), spec_of(net()), 7, lambda: example)
    assert names(tmp_path) == []


# --- the folder


def test_q19_without_an_example_there_are_the_weights_only_and_a_log_line(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = net()
    exported = write_export(str(tmp_path), spec_of(model), 7)
    assert names(exported) == ["model.safetensors"]
    weights = load_file(Path(exported, "model.safetensors"))
    assert {name: value.tolist() for name, value in weights.items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    assert "no serving_input_fn: only the weights are written" in caplog.text


def test_q19_the_folder_is_named_by_the_time_and_made_in_one_move(tmp_path, monkeypatch):
    """Whoever looks meanwhile finds no folder of that name."""
    moments = []
    rename = Path.rename

    def watched(self, target):
        moments.append((names(tmp_path)[0][:8], names(self)))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    exported = write_export(str(tmp_path), spec_of(net()), 7, lambda: rows(4))
    assert moments == [(".export-", ["model.pt2", "model.safetensors", "signature.json"])]
    assert names(tmp_path) == [Path(exported).name]
    assert len(Path(exported).name) == 10
    assert Path(exported).name.isdigit()


def test_a_folder_can_be_read_by_others(tmp_path):
    """As any folder: not only by who wrote it, as temporary ones."""
    (tmp_path / "plain").mkdir()
    exported = Path(write_export(str(tmp_path), spec_of(net()), 7))
    assert exported.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_q19_assets_are_copied(tmp_path):
    (tmp_path / "words.txt").write_text("a b c")
    source = str(tmp_path / "words.txt")
    exported = write_export(
        str(tmp_path / "export"), spec_of(net()), 7, assets_extra={"vocabulary.txt": source, "more/words.txt": source}
    )
    for name in ("vocabulary.txt", "more/words.txt"):
        assert Path(exported, "assets.extra", name).read_text() == "a b c"


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("words.txt", "missing.txt", "there is no file missing.txt to copy to 'words.txt'"),
        ("../words.txt", os.devnull, "expected names below assets.extra, got '../words.txt'"),
        ("/words.txt", os.devnull, "expected names below assets.extra, got '/words.txt'"),
        ("", os.devnull, "expected names below assets.extra, got ''"),
    ],
)
def test_q19_assets_are_checked_before_anything_is_written(tmp_path, name, source, message):
    with pytest.raises(ConfigError, match=message):
        write_export(str(tmp_path / "export"), spec_of(net()), 7, assets_extra={name: source})
    assert not (tmp_path / "export").exists()


# --- through the Estimator


def model_fn(mode, params):
    torch.manual_seed(3)
    model = nn.Linear(params["width"], 1)
    return EstimatorSpec(
        mode, model=model, loss_fn=lambda model, x, y: (model(x)[:, 0] - y).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip


def batches():
    return [(torch.full((4, 3), float(index)), torch.ones(4)) for index in range(4)]


@pytest.fixture
def estimator(tmp_path, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    config = RunConfig(save_checkpoints_steps=2, log_step_count_steps=None)
    return Estimator(model_fn, str(tmp_path / "run"), config, {"width": 3})


def test_q19_an_estimator_exports_a_checkpoint_and_changes_no_random_state(estimator, tmp_path):
    estimator.train(batches)
    state = torch.get_rng_state()
    asked = []

    def serving_input_fn(mode, params):
        asked.append(mode)
        return torch.rand(2, params["width"])

    earlier = str(Path(estimator.model_dir, "ckpt-2"))
    exported = estimator.export_model(str(tmp_path / "export"), serving_input_fn, checkpoint_path=earlier)
    assert asked == [ModeKeys.PREDICT]
    assert torch.equal(torch.get_rng_state(), state)
    weights = load_file(Path(exported, "model.safetensors"))
    batch = rows(3)
    torch.testing.assert_close(load(exported)(batch), batch @ weights["weight"].T + weights["bias"])
    assert json.loads(Path(exported, "signature.json").read_text())["global_step"] == 2


def test_q19_without_a_checkpoint_the_model_is_exported_as_it_is_warm_started(estimator, tmp_path):
    estimator.train(batches)
    fresh = Estimator(model_fn, str(tmp_path / "fresh"), RunConfig(), {"width": 3}, estimator.model_dir)
    exported = fresh.export_model(str(tmp_path / "export"), lambda: rows(2))
    expected = load_file(Path(estimator.export_model(str(tmp_path / "trained")), "model.safetensors"))
    found = load_file(Path(exported, "model.safetensors"))
    torch.testing.assert_close(found, expected)
    assert json.loads(Path(exported, "signature.json").read_text())["global_step"] == 0


def test_q19_without_a_checkpoint_and_a_warm_start_there_is_nothing_to_export(tmp_path):
    with pytest.raises(ConfigError, match="there is no checkpoint in .*; train first"):
        Estimator(model_fn, str(tmp_path), RunConfig(), {"width": 3}).export_model(str(tmp_path / "export"))


def test_v25_an_exporter_exports_the_program_during_a_training(estimator):
    """In one process an evaluation, and what it exports, comes between two steps."""
    exporter = BestExporter("best", lambda: rows(2))
    specs = TrainSpec(batches), EvalSpec(batches, throttle_secs=0, exporters=exporter)
    run_locally(estimator, *specs)
    exports = names(Path(estimator.model_dir, "export", "best"))
    assert exports
    assert load(Path(estimator.model_dir, "export", "best", exports[-1]))(rows(5)).shape == (5, 1)


# --- at a URL


@pytest.mark.parametrize("url", ["file://{}", "memory://{}"])
def test_q19_a_model_and_its_assets_lie_at_urls(tmp_path, url):
    model, words = net(), url.format(tmp_path / "words.txt")
    storage_of(url.format(tmp_path)).replace("words.txt", b"a b c")
    place = url.format(tmp_path / "export")
    exported = write_export(place, spec_of(model), 7, lambda: rows(4), {"more/words.txt": words})
    assert storage_of(place).names() == [Path(exported).name]
    assert storage_of(join(exported, "assets.extra", "more")).read("words.txt") == b"a b c"
    assert storage_of(exported).is_file("signature.json")
    batch = rows(3)
    with local_copy(exported) as folder:
        torch.testing.assert_close(load(folder)(batch), model(batch))


@pytest.mark.parametrize("source", ["memory://{}/missing", "memory://{}"])
def test_q19_an_asset_that_is_missing_at_its_url_is_refused(tmp_path, source):
    storage_of(f"memory://{tmp_path}").replace("words.txt", b"")
    with pytest.raises(ConfigError, match="there is no file memory://.* to copy to 'words'"):
        write_export(f"memory://{tmp_path}/export", spec_of(net()), 7, assets_extra={"words": source.format(tmp_path)})
    assert storage_of(f"memory://{tmp_path}").names() == ["words.txt"]
