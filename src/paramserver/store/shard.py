"""A ps's shard of a checkpoint: plain safetensors files, values in one, slots in another.

The names of values are the model's; a slot of variable ``fc.weight`` is called ``fc.weight/exp_avg``. The indexes
that the chief writes beside them (``model.safetensors.index.json``, as Hugging Face's tools read it) say which file
holds what, so that a checkpoint loads into any number of ps tasks.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from paramserver.arena import VariableSpec, pieces
from paramserver.errors import CheckpointError
from paramserver.store.store import Store
from paramserver.store.stored_arena import StoredArena, variable_slots

VALUES_INDEX = "model.safetensors.index.json"
SLOTS_INDEX = "optimizer.safetensors.index.json"


class _Index(msgspec.Struct):
    """What is read of an index: which file holds each tensor."""

    weight_map: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """What `write_shard` wrote: the file of each value and each slot, the bytes, and the seconds pushes may wait."""

    weight_map: dict[str, str]
    slot_map: dict[str, str]
    nbytes: int
    pause: float


def write_shard(store: Store, directory: str, shard: int, num_shards: int) -> WrittenShard:
    """Write the values and slots of a store into two files of ``directory``.

    Pushes go on meanwhile: a block is locked only while it is copied.

    Raises:
        CheckpointError: If the directory cannot be written.
    """
    started = time.perf_counter()
    values, slots = _snapshot(store)
    pause = time.perf_counter() - started
    suffix = f"{shard + 1:05d}-of-{num_shards:05d}.safetensors"
    weight_map = _write(Path(directory) / f"model-{suffix}", values)
    slot_map = _write(Path(directory) / f"optimizer-{suffix}", slots)
    nbytes = sum(tensor.nbytes for tensor in [*values.values(), *slots.values()])
    return WrittenShard(weight_map=weight_map, slot_map=slot_map, nbytes=nbytes, pause=pause)


def _snapshot(store: Store) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    values: dict[str, torch.Tensor] = {}
    slots: dict[str, torch.Tensor] = {}
    for arena in store.arenas:
        flat, runs = arena.snapshot()
        for variable, view, span in zip(
            arena.layout.variables, arena.layout.views(flat), arena.layout.ranges, strict=True
        ):
            values[variable.name] = view
            for name, slot in variable_slots(span, runs):
                slots[f"{variable.name}/{name}"] = slot.view(variable.shape) if slot.ndim else slot.clone()
    return values, slots


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    if not tensors:
        return {}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        with path.open("rb") as written:
            os.fsync(written.fileno())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"writing the checkpoint file {path} failed: {error}; does every ps see model_dir, and may it write there?",
            str(path),
        ) from error
    return dict.fromkeys(tensors, path.name)


def read_shard(store: Store, directory: str) -> None:
    """Read the variables and slots that a store holds from a whole checkpoint of any number of shards.

    Raises:
        CheckpointError: If the checkpoint is cut short, or belongs to another model or optimizer.
    """
    weight_map = read_index(Path(directory) / VALUES_INDEX)
    slot_map = read_index(Path(directory) / SLOTS_INDEX)
    wanted = {variable.name: arena for arena in store.arenas for variable in arena.layout.variables}
    missing = next((name for name in wanted if name not in weight_map), None)
    if missing is not None:
        raise CheckpointError(
            f"checkpoint {directory} has no variable {missing!r}; does it belong to another model?", directory
        )
    for path, names in _by_file(directory, {name: weight_map[name] for name in wanted}):
        for name, tensor in _tensors(path, names):
            _restore_value(wanted[name], name, tensor, directory)
    _restore_slots(wanted, slot_map, directory)


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, by an index.

    Raises:
        CheckpointError: If the index is missing or is none.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no index of a checkpoint: {error}", str(path)) from error


def _by_file(directory: str, weight_map: Mapping[str, str]) -> Iterator[tuple[Path, list[str]]]:
    files: dict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        files[file].append(name)
    for file, names in files.items():
        yield Path(directory) / file, names


def _tensors(path: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint file {path} cannot be read: {error}; was it cut short?", str(path)
        ) from error


def _restore_value(arena: StoredArena, name: str, tensor: torch.Tensor, directory: str) -> None:
    index = next(i for i, variable in enumerate(arena.layout.variables) if variable.name == name)
    variable, span = arena.layout.variables[index], arena.layout.ranges[index]
    found = VariableSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if found != variable:
        raise CheckpointError(
            f"checkpoint {directory}: variable {name!r} is {found.dtype}{list(found.shape)}, "
            f"this model has {variable.dtype}{list(variable.shape)}; does it belong to another model?",
            directory,
        )
    flat = tensor.flatten()
    for start, stop in pieces([span]):
        arena.apply("assign", (start, stop), flat[start - span[0] : stop - span[0]], None)


def _restore_slots(wanted: Mapping[str, StoredArena], slot_map: Mapping[str, str], directory: str) -> None:
    mine = {key: file for key, file in slot_map.items() if key.rpartition("/")[0] in wanted}
    states: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for path, keys in _by_file(directory, mine):
        for key, tensor in _tensors(path, keys):
            variable, _, slot = key.rpartition("/")
            states[variable][slot] = tensor.flatten() if tensor.ndim else tensor
    for name, state in states.items():
        _load_slots(wanted[name], name, state, directory)
    for arena in {id(arena): arena for arena in wanted.values()}.values():
        arena.join_runs()


def _load_slots(arena: StoredArena, name: str, state: dict[str, torch.Tensor], directory: str) -> None:
    span = next(
        span
        for variable, span in zip(arena.layout.variables, arena.layout.ranges, strict=True)
        if variable.name == name
    )
    try:
        arena.load_slots(span, state)
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {directory}: the optimizer state of {name!r} does not fit: {error}; "
            "was it written with another optimizer?",
            directory,
        ) from error
