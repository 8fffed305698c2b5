"""Saved values by name, from a checkpoint, a model_dir, an exported model, or a safetensors file.

If the place is a URL, an index is fetched when it is opened, and a file of values when one of its values is read.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from paramserver.checkpoint.index import VALUES_INDEX, WEIGHTS_FILE, read_aliases, read_index
from paramserver.checkpoint.model_dir import STATE_FILE, latest_checkpoint, readable
from paramserver.checkpoint.reading import StoredTensor, by_file, stored_tensors
from paramserver.checkpoint.storage import split, storage_of
from paramserver.errors import CheckpointError, did_you_mean


@dataclass(frozen=True)
class SavedValues:
    """The values that are saved in a place. Immutable; nothing stays open.

    Attributes:
        folder: The folder of the files, a path or URL.
        files: The file of each variable.
        aliases: Other names of tied weights, and the variable that each name stands for.
    """

    folder: str
    files: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def at(cls, path: str) -> SavedValues:
        """Return the saved values at a path or URL. Blocks.

        Raises:
            CheckpointError: If there are no values that can be read.
            ConfigError: If fsspec does not support the URL.
        """
        folder, name = split(path)
        storage = storage_of(folder)
        if storage.is_file(name):
            return cls._of_file(folder, name)
        if storage.has(name):
            return cls._in(path)
        raise CheckpointError(f"there is no checkpoint, exported model or safetensors file {path}", path)

    @classmethod
    def _of_file(cls, folder: str, name: str) -> SavedValues:
        with readable(folder, glob.escape(name)) as local:
            names, aliases = _contents(local / name)
        return cls(folder, dict.fromkeys(names, name), aliases)

    @classmethod
    def _in(cls, folder: str) -> SavedValues:
        storage = storage_of(folder)
        if storage.is_file(VALUES_INDEX):
            with readable(folder, VALUES_INDEX) as local:
                return cls(folder, read_index(local / VALUES_INDEX), read_aliases(local / VALUES_INDEX))
        if (newest := latest_checkpoint(folder)) is not None:
            return cls._in(newest)
        if storage.is_file(WEIGHTS_FILE):
            return cls._of_file(folder, WEIGHTS_FILE)
        raise CheckpointError(
            f"{folder} holds no saved values: expected {VALUES_INDEX} of a checkpoint, {STATE_FILE!r} of a model_dir "
            f"with a whole checkpoint, or {WEIGHTS_FILE} of an exported model",
            folder,
        )

    @property
    def names(self) -> list[str]:
        """All names, including those of tied weights, sorted."""
        return sorted({*self.files, *self.aliases})

    def variable(self, name: str) -> str:
        """Return the name by which a value is saved.

        Raises:
            CheckpointError: If there is no value of this name.
        """
        found = self.aliases.get(name, name)
        if found not in self.files:
            hint = did_you_mean(name, self.names) or "; get_variable_names() lists those of an Estimator"
            raise CheckpointError(f"{self.folder} holds no value {name!r}{hint}", self.folder)
        return found

    def stored(self, variables: Iterable[str]) -> Iterator[StoredTensor]:
        """Yield variables file by file; each can be read until the next one is asked for.

        Raises:
            CheckpointError: If a file is missing or cut short.
        """
        for file, names in by_file({name: self.files[name] for name in variables}).items():
            with readable(self.folder, glob.escape(file)) as local:
                yield from stored_tensors(local, dict.fromkeys(names, file))

    def read(self, name: str) -> torch.Tensor:
        """Read the value of a name, to the CPU.

        Raises:
            CheckpointError: If there is no such value, or its file is missing or cut short.
        """
        (value,) = (stored.read() for stored in self.stored([self.variable(name)]))
        return value


def _contents(file: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names in a file, and other names of tied weights, as ``safetensors.torch.save_model`` records them."""
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}; was it cut short?", str(file)) from error
    return names, {name: kept for name, kept in metadata.items() if kept in names}
