"""An exported model: a folder that runs without this library.

::

    1760000000/            named by the time of the export, in seconds since 1970
      model.safetensors    the weights, as plain PyTorch and Hugging Face's tools read them
      model.pt2            the program: torch.export.load("model.pt2").module()(features)
      signature.json       names, dtypes and shapes of the program's inputs and outputs; the global step; versions
      assets.extra/        files of the user's own

Without an example of the features no program can be written, and the folder holds the weights and the assets only.

Rules
    * The folder is written under a temporary name and then moved into place; see `folder`. If anything fails, no
      folder is left.
    * The program is the model in evaluation mode, with ``predict_fn`` around it if the spec has one. It holds no
      gradients, no optimizer, and not the example that it was traced with.
    * The folder contains no pickled data; every file that is written is checked for it
      (docs/decisions/0010-exported-models.md).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import save_model
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from paramserver import __version__
from paramserver.checkpoint.index import WEIGHTS_FILE
from paramserver.checkpoint.storage import local_file, split, storage_of
from paramserver.distribute.bound.plan import without_compiling
from paramserver.distribute.core.nest import described, is_nest, leaves, map_leaves
from paramserver.errors import ConfigError
from paramserver.estimator.export.folder import new_export
from paramserver.estimator.specs import EstimatorSpec

PROGRAM_FILE = "model.pt2"
SIGNATURE_FILE = "signature.json"
ASSETS_FOLDER = "assets.extra"

logger = logging.getLogger(__name__)


def write_export(
    export_path: str,
    spec: EstimatorSpec,
    global_step: int,
    serving_input: Callable[[], Any] | None = None,
    assets_extra: Mapping[str, str] | None = None,
) -> str:
    """Write a model into a new folder, and return its path. Blocks, for some seconds if a program is written.

    Args:
        export_path: The folder, a path or URL, in which the new folder is made; need not exist.
        spec: The spec, with final values in its model, which is put into evaluation mode without gradients.
        global_step: The global step of the weights.
        serving_input: Returns one example batch of features; None writes no program.
        assets_extra: The path or URL of each file to copy, by its name below ``assets.extra``.

    Raises:
        ConfigError: If an asset is missing or its name leads out of the folder, the example is not a batch, or the
            model cannot be traced.
        OSError: If ``export_path`` cannot be written, or an asset cannot be read.
    """
    assert spec.model is not None  # noqa: S101  # EstimatorSpec has checked it
    _check_assets(assets_extra or {})
    model = without_compiling(spec.model).eval().requires_grad_(False)
    program = None if serving_input is None else trace(_served(spec, model), serving_input())

    def write(folder: Path) -> None:
        save_model(model, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
        if program is None:
            logger.info("the export has no serving_input_fn: only the weights are written, no program that runs them")
        else:
            _write_program(program, folder / PROGRAM_FILE)
            _write_signature(program, folder / SIGNATURE_FILE, global_step)
        _copy(assets_extra or {}, folder / ASSETS_FOLDER)

    return new_export(export_path, write)


# --- the program -------------------------------------------------------------------------------------------------


class _Predicting(nn.Module):
    """A model together with the function that makes its predictions."""

    def __init__(self, model: nn.Module, predict_fn: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._predict = predict_fn

    def forward(self, features: Any) -> Any:
        return self._predict(self.model, features)


def _served(spec: EstimatorSpec, model: nn.Module) -> nn.Module:
    return model if spec.predict_fn is None else _Predicting(model, spec.predict_fn).eval()


def trace(model: nn.Module, example: Any) -> ExportedProgram:
    """Return the program of a model, for batches of any size.

    Args:
        model: The model, called with the features alone.
        example: One batch of features: a tensor, an array, or a nest of them. Their first dimension is the batch;
            scalars have none.

    Raises:
        ConfigError: If the example is not a batch, or the model cannot be traced.
    """
    features = map_leaves(_example, example)
    tensors = [leaf for leaf in leaves(features) if isinstance(leaf, torch.Tensor)]
    if not tensors or any(tensor.ndim and not len(tensor) for tensor in tensors):
        raise ConfigError(
            f"export: serving_input_fn must return one batch of features, a tensor or a nest of tensors with at least "
            f"one row, got {described(example)}"
        )
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]  # torch does not annotate it
    for tensor in tensors:
        if tensor.ndim:
            shapes[tensor] = {0: Dim.DYNAMIC}
    try:
        program = torch.export.export(model, (features,), dynamic_shapes=shapes)  # type: ignore[arg-type]  # takes both
    except Exception as error:  # the model's own code runs here, and may raise any exception
        raise ConfigError(_untraceable(error)) from error
    with contextlib.suppress(ValueError):  # torch 2.6 refuses; `_write_program` refuses its pickled files anyway
        program.example_inputs = None  # the example would be pickled, and is the user's data
    return program


def _example(leaf: Any) -> Any:
    """Return a tensor of at least two rows: from one row, torch.export infers that there is always exactly one."""
    tensor = torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf
    if not isinstance(tensor, torch.Tensor):
        return leaf
    tensor = tensor.detach()
    return torch.cat([tensor, tensor]) if tensor.ndim and len(tensor) == 1 else tensor.clone()


def _untraceable(error: Exception) -> str:
    reason = " ".join(str(error).partition("\n\n")[0].split())  # the rest is advice for users of torch.export
    return (
        "export: torch.export cannot trace the model, so nothing was written. It must be tensor code for any batch "
        "size, without branches on values: change forward or predict_fn, or leave out serving_input_fn to export the "
        f"weights only. The reason was {type(error).__name__}: {reason}"
    )


def _write_program(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)
    if pickled := _pickled_members(path):
        raise ConfigError(
            f"export: the program would hold pickled data ({', '.join(pickled)}), which can run any code when it "
            "is loaded, so nothing was written. Its weights and constants must be plain tensors, written by a "
            f"version of torch that stores them as they are (2.13 does, this is {torch.__version__}); or leave out "
            "serving_input_fn to export the weights only"
        )


def _pickled_members(path: Path) -> list[str]:
    """Return the parts of an archive that loading would unpickle: whole members, or payloads marked in a config."""
    with zipfile.ZipFile(path) as archive:
        whole = [info.filename for info in archive.infolist() if info.filename.endswith(".pt") and info.file_size]
        configs = [archive.read(name) for name in archive.namelist() if name.endswith("_config.json")]
    payloads = [msgspec.json.decode(config)["config"] for config in configs]
    return whole + [name for each in payloads for name, meta in each.items() if meta["use_pickle"]]


# --- the signature -----------------------------------------------------------------------------------------------


def signature(program: ExportedProgram) -> dict[str, Any]:
    """Return dtype and shape of a program's inputs and outputs by name; None for a dimension of any size.

    A tensor alone is called ``features`` or ``predictions``; a tensor in a nest is named by its path, such as ``image``
    or ``logits/0``.

    >>> program = trace(torch.nn.Linear(3, 1), torch.zeros(4, 3))
    >>> signature(program)["inputs"]
    {'features': {'dtype': 'float32', 'shape': [None, 3]}}
    """
    nodes = {node.name: node.meta.get("val") for node in program.graph.nodes}
    ends = program.graph_signature
    taken, returned = ([nodes.get(name) for name in names] for names in (ends.user_inputs, ends.user_outputs))
    (features,), _ = program.call_spec.in_spec.unflatten(taken)
    predictions = program.call_spec.out_spec.unflatten(returned)
    return {"inputs": _described(features, "features"), "outputs": _described(predictions, "predictions")}


def _described(nest: Any, alone: str) -> dict[str, Any]:
    return {
        "/".join(path) or alone: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": [size if isinstance(size, int) else None for size in tensor.shape],
        }
        for path, tensor in _named(nest)
    }


def _named(nest: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Yield the tensors of a nest, each with its path; other leaves are constants of the program, not inputs."""
    if isinstance(nest, torch.Tensor):
        yield path, nest
    elif is_nest(nest):
        names = nest if isinstance(nest, dict) else getattr(nest, "_fields", range(len(nest)))
        for name, part in zip(names, nest.values() if isinstance(nest, dict) else nest, strict=True):
            yield from _named(part, (*path, str(name)))


def _write_signature(program: ExportedProgram, path: Path, global_step: int) -> None:
    versions = {"paramserver": __version__, "torch": str(torch.__version__)}
    content = {**signature(program), "global_step": global_step, "versions": versions}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))


# --- assets ------------------------------------------------------------------------------------------------------


def _check_assets(assets: Mapping[str, str]) -> None:
    for name, source in assets.items():
        if not name or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ConfigError(f"export: assets_extra: expected names below {ASSETS_FOLDER}, got {name!r}")
        place, file = split(str(source))
        if not storage_of(place).is_file(file):
            raise ConfigError(f"export: assets_extra: there is no file {source} to copy to {name!r}")


def _copy(assets: Mapping[str, str], folder: Path) -> None:
    for name, source in assets.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with local_file(*split(str(source))) as file:
            shutil.copyfile(file, folder / name)
