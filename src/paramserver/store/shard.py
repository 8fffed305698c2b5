"""A ps's shard of a checkpoint: plain safetensors files, values in one, slots in another.

The names of values are the model's; a slot of variable ``fc.weight`` is called ``fc.weight/exp_avg``. The indexes
that the chief writes beside them (``model.safetensors.index.json``, as Hugging Face's tools read it) say which file
holds what, so that a checkpoint loads into any number of ps tasks.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from paramserver.arena import Range, VariableSpec, pieces
from paramserver.checkpoint_files import SLOTS_INDEX, VALUES_INDEX, read_index, read_tensors
from paramserver.errors import CheckpointError
from paramserver.store.store import Store
from paramserver.store.stored_arena import StoredArena, variable_slots


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
    for arena in store.held:
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


class _Place(NamedTuple):
    """Where a variable lies in a store."""

    arena: StoredArena
    spec: VariableSpec
    span: Range


def read_shard(store: Store, directory: str) -> None:
    """Read the variables and slots that a store holds from a whole checkpoint of any number of shards.

    Raises:
        CheckpointError: If the checkpoint is cut short, or belongs to another model or optimizer.
    """
    folder = Path(directory)
    weight_map = read_index(folder / VALUES_INDEX)
    slot_map = read_index(folder / SLOTS_INDEX)
    places = _places(store)
    missing = next((name for name in places if name not in weight_map), None)
    if missing is not None:
        raise CheckpointError(
            f"checkpoint {directory} has no variable {missing!r}; does it belong to another model?", directory
        )
    for name, tensor in read_tensors(folder, {name: weight_map[name] for name in places}):
        _restore_value(places[name], tensor, directory)
    _restore_slots(places, slot_map, folder)
    for arena in store.held:
        arena.join_runs()


def _places(store: Store) -> dict[str, _Place]:
    return {
        spec.name: _Place(arena, spec, span)
        for arena in store.held
        for spec, span in zip(arena.layout.variables, arena.layout.ranges, strict=True)
    }


def _restore_value(place: _Place, tensor: torch.Tensor, directory: str) -> None:
    arena, spec, span = place
    found = VariableSpec(spec.name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if found != spec:
        raise CheckpointError(
            f"checkpoint {directory}: variable {spec.name!r} is {found.dtype}{list(found.shape)}, "
            f"this model has {spec.dtype}{list(spec.shape)}; does it belong to another model?",
            directory,
        )
    flat = tensor.flatten()
    for start, stop in pieces([span]):
        arena.apply("assign", (start, stop), flat[start - span[0] : stop - span[0]], None)


def _restore_slots(places: Mapping[str, _Place], slot_map: Mapping[str, str], folder: Path) -> None:
    mine = {key: file for key, file in slot_map.items() if key.rpartition("/")[0] in places}
    states: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in read_tensors(folder, mine):
        variable, _, slot = key.rpartition("/")
        states[variable][slot] = tensor.flatten() if tensor.ndim else tensor
    for name, state in states.items():
        try:
            places[name].arena.load_slots(places[name].span, state)
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {folder}: the optimizer state of {name!r} does not fit: {error}; "
                "was it written with another optimizer?",
                str(folder),
            ) from error
