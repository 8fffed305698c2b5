"""The memory that belongs to a process, as Linux counts it.

Rules
    * A page of an anonymous shared file counts for the process that created the file, and for no other. That is the
      process that maps it for writing: the file is sealed against writing by others.
    * A page of a file on disk, such as a library's code, belongs to the page cache and counts for no process. A peak
      contains such pages, because the kernel keeps one peak for everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SHARED_FILE = "/memfd:paramserver"

_MAPPING = re.compile(
    r"^[0-9a-f]+-[0-9a-f]+ (?P<access>\S{4}) \S+ \S+ (?P<inode>\d+) *(?P<path>.*)\n(?P<fields>(?:\w+:.*\n?)*)",
    re.MULTILINE,
)
_FIELD = re.compile(r"(\w+): +(\d+) kB")
_RESET_PEAK = "5"  # proc_pid_clear_refs(5)


class Mapping(NamedTuple):
    """A range of a process's address space."""

    path: str
    inode: int
    is_writable: bool
    resident: int
    anonymous: int


class Memory(NamedTuple):
    """The bytes of a process.

    Attributes:
        now: Bytes at the moment of reading.
        peak: Largest number of bytes since the start or `reset_peak`, with pages of files on disk.
    """

    now: int
    peak: int


def read(pid: int) -> Memory | None:
    """Return the memory of a process; None where there is no /proc to read it from."""
    process = Path(f"/proc/{pid}")
    try:
        mappings = list(parse(process.joinpath("smaps").read_text()))
        status = process.joinpath("status").read_text()
    except OSError:
        return None
    return Memory(own(mappings), high_water_mark(status) - foreign(mappings))


def reset_peak(pid: int) -> None:
    """Count the peak from now on, where the system can."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return  # the peak then is that of the whole life, which is larger


def own(mappings: list[Mapping]) -> int:
    """Return the bytes of private memory and of the shared files that the process created."""
    created = {mapping.inode: mapping.resident for mapping in mappings if _is_shared(mapping) and mapping.is_writable}
    return sum(mapping.anonymous for mapping in mappings if not _is_shared(mapping)) + sum(created.values())


def foreign(mappings: list[Mapping]) -> int:
    """Return the bytes of other processes' shared files that are mapped here."""
    return sum(mapping.resident for mapping in mappings if _is_shared(mapping) and not mapping.is_writable)


def high_water_mark(status: str) -> int:
    """Return the peak of the resident memory in the text of /proc/PID/status."""
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def parse(smaps: str) -> Iterator[Mapping]:
    """Yield the mappings in the text of /proc/PID/smaps."""
    for match in _MAPPING.finditer(smaps):
        fields = {name: int(kib) * 1024 for name, kib in _FIELD.findall(match["fields"])}
        yield Mapping(
            path=match["path"],
            inode=int(match["inode"]),
            is_writable="w" in match["access"],
            resident=fields.get("Rss", 0),
            anonymous=fields.get("Anonymous", 0),
        )


def _is_shared(mapping: Mapping) -> bool:
    return mapping.path.startswith(SHARED_FILE)
