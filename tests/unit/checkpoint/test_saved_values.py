"""Saved values at a URL: file://, and what fsspec reaches (here memory://). test_warm_start has those in folders."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_model
from torch import nn

from paramserver.checkpoint.index import write_index
from paramserver.checkpoint.model_dir import CheckpointManager
from paramserver.checkpoint.saved_values import SavedValues
from paramserver.checkpoint.storage import RemoteStorage, join, storage_of
from paramserver.errors import CheckpointError
from paramserver.estimator.export.folder import new_export

VALUES = {"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.ones(3)}


@pytest.fixture(params=["file://{}", "memory://{}"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URL of a model_dir; of what is fetched from it nothing stays."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield request.param.format(tmp_path / "run")
    assert not list((tmp_path / "temporary").iterdir())


def put_checkpoint(model_dir: str) -> str:
    """A checkpoint with a file for each value; ``tied`` is another name of ``bias``."""
    manager = CheckpointManager(model_dir)
    folder = manager.temporary_path(3)
    files = {name: f"model-{name}.safetensors" for name in VALUES}
    for name, file in files.items():
        Path(folder, file).write_bytes(save({name: VALUES[name]}))
    write_index(Path(folder, "model.safetensors.index.json"), files, aliases={"tied": "bias"})
    return manager.publish(folder, 3)


def put_export(model_dir: str) -> str:
    model = nn.Linear(2, 3)
    model.load_state_dict(VALUES)
    model.tied = model.bias
    return new_export(join(model_dir, "export"), lambda folder: save_model(model, str(folder / "model.safetensors")))


@pytest.mark.parametrize("kind", ["checkpoint", "model_dir", "exported model", "file", "[odd] file"])
def test_q18_values_are_read_from_a_url(place: str, kind: str) -> None:
    if kind in ("checkpoint", "model_dir"):
        path = put_checkpoint(place) if kind == "checkpoint" else put_checkpoint(place) and place
    elif kind == "[odd] file":
        storage_of(place).replace("a[1]*.safetensors", save(VALUES | {"tied": VALUES["bias"].clone()}))
        path = join(place, "a[1]*.safetensors")
    else:
        path = put_export(place)
        path = join(path, "model.safetensors") if kind == "file" else path
    saved = SavedValues.at(path)
    assert saved.names == ["bias", "tied", "weight"]
    assert torch.equal(saved.read("weight"), VALUES["weight"])
    assert torch.equal(saved.read("tied"), VALUES["bias"])
    assert {stored.name: stored.shape for stored in saved.stored(["weight"])} == {"weight": (3, 2)}


def test_only_what_is_asked_for_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_checkpoint(f"memory://{tmp_path}/run")
    fetched: list[str] = []
    files = RemoteStorage(path)._files
    get_file = files.get_file
    monkeypatch.setattr(files, "get_file", lambda source, to: (fetched.append(Path(to).name), get_file(source, to)))
    saved = SavedValues.at(path)
    assert fetched == ["model.safetensors.index.json"]
    saved.read("bias")
    assert fetched[1:] == ["model-bias.safetensors"]


def test_a_place_without_values_is_named(place: str) -> None:
    with pytest.raises(CheckpointError, match=f"there is no checkpoint, exported model or safetensors file {place}"):
        SavedValues.at(place)
    storage_of(place).replace("notes", b"no tensors")
    with pytest.raises(CheckpointError, match="run holds no saved values: expected model.safetensors.index.json"):
        SavedValues.at(place)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors: .*; was it cut short?") as error:
        SavedValues.at(join(place, "notes"))
    assert join(place) in str(error.value)


def test_a_file_that_is_missing_is_an_error_of_the_checkpoint(place: str) -> None:
    path = put_checkpoint(place)
    saved = SavedValues.at(path)
    storage_of(path).delete("model-bias.safetensors")
    with pytest.raises(CheckpointError, match=f"{join(place)}/ckpt-3.*model-bias.safetensors"):
        saved.read("bias")
    assert torch.equal(saved.read("weight"), VALUES["weight"])
    with pytest.raises(CheckpointError, match="holds no value 'wait'; did you mean 'weight'?"):
        saved.read("wait")
