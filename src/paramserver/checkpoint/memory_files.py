"""Safetensors files in memory: slots that ps tasks send or fetch without a folder.

Rules
    * A file that is written takes the memory of its tensors as soon as its header is complete: each tensor its own, and
      no more.
    * Several tasks may write one file, each beginning with the header. The headers are equal.
    * A file that is read is never assembled: it consists of its header and the memory of the tensors.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from paramserver.checkpoint.folder import Read, Write
from paramserver.checkpoint.tensor_file import LENGTH_BYTES, TensorSpec, header_length, lay_out, parse_header
from paramserver.errors import CheckpointError
from paramserver.layout.variables import DTYPES
from paramserver.memory.arena_memory import tensor_bytes


class _Segment(NamedTuple):
    """The memory of the bytes of a file from ``begin`` on."""

    begin: int
    content: memoryview


class MemoryFiles:
    """Carries out `Read` and `Write` in memory. Not thread-safe."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}

    def add(self, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add a file of these tensors, which must be contiguous and on the CPU; their memory is used, not copied."""
        self._files[file] = _File.of(tensors)

    def tensor(self, file: str, name: str) -> torch.Tensor:
        """Return a tensor of a file that was written, in its own memory.

        Raises:
            CheckpointError: If the file has no tensor of this name.
        """
        tensors = self._files[file].tensors if file in self._files else {}
        if name not in tensors:
            raise CheckpointError(f"expected {name!r} among the slots that were sent, got {sorted(tensors)}", file)
        return tensors[name]

    def carry_out(self, step: Read | Write) -> None:
        """Read or write.

        Raises:
            CheckpointError: If the file to read does not exist, or the written bytes are not a safetensors file.
        """
        if isinstance(step, Write):
            self._files.setdefault(step.file, _File()).write(step.file, step.offset, step.content)
        elif step.file in self._files:
            self._files[step.file].read(step.offset, step.out)
        else:
            raise CheckpointError(f"expected a file of {sorted(self._files)}, got {step.file!r}", step.file)

    def __repr__(self) -> str:
        return f"<MemoryFiles: {', '.join(self._files) or 'none'}>"


class _File:
    """One file: its header, and its tensors once the header is complete."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._header = bytearray()
        self._segments: list[_Segment] = []

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> _File:
        """Make a file of existing tensors."""
        specs = {name: TensorSpec(str(each.dtype).removeprefix("torch."), each.shape) for name, each in tensors.items()}
        layout, file = lay_out(specs), cls()
        file.tensors, file._header = dict(tensors), bytearray(layout.header)
        file._hold(layout.begins)
        return file

    def write(self, file: str, offset: int, content: memoryview) -> None:
        if not self._segments:
            self._header[offset : offset + len(content)] = content
            self._make_tensors(file)
            return
        for part, at in self._parts(offset, content.nbytes):
            if at.begin:  # else it is the header, which another ps has sent already
                part[:] = content[: len(part)]
            content = content[len(part) :]

    def read(self, offset: int, out: memoryview) -> None:
        for part, _ in self._parts(offset, out.nbytes):
            out[: len(part)] = part
            out = out[len(part) :]

    def _make_tensors(self, file: str) -> None:
        """Take the memory of the tensors, if the header is complete."""
        if len(self._header) < LENGTH_BYTES:
            return
        end = LENGTH_BYTES + header_length(self._header[:LENGTH_BYTES], file)
        if len(self._header) < end:
            return
        found = parse_header(self._header[LENGTH_BYTES:end], file)
        self.tensors = {
            name: torch.empty(each.spec.shape, dtype=DTYPES[each.spec.dtype], device="cpu")
            for name, each in found.items()
        }
        self._hold({name: each.begin for name, each in found.items()})

    def _hold(self, begins: Mapping[str, int]) -> None:
        tensors = [_Segment(begins[name], tensor_bytes(each)) for name, each in self.tensors.items() if each.numel()]
        self._segments = sorted([_Segment(0, memoryview(self._header)), *tensors], key=lambda segment: segment.begin)

    def _parts(self, offset: int, count: int) -> Iterator[tuple[memoryview, _Segment]]:
        """Yield the memory of bytes ``[offset, offset + count)``, piece by piece."""
        at = bisect.bisect_right(self._segments, offset, key=lambda segment: segment.begin) - 1
        while count > 0:
            segment = self._segments[at]
            part = segment.content[offset - segment.begin :][:count]
            yield part, segment
            offset, count, at = offset + len(part), count - len(part), at + 1
