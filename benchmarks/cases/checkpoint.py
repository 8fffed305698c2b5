"""Saving and restoring one ps's values, beside plain safetensors.

A ps in a process of its own holds some large tensors. A chief, which talks to it by shared memory, has it write whole
checkpoints and read them back, in turns with ``safetensors.torch.save_file`` and ``load_file`` of the same tensors in
the same folder.

Rules
    * Both sides end with the values on the disk: the ps does so by itself, after ``save_file`` the file is fsynced. A
      second figure stands beside ``save_file`` alone.
    * Both sides end with the values in tensors that were there before: what ``load_file`` returns is copied into them,
      as ``load_state_dict`` does, because by itself it only maps the file and reads nothing. A second figure stands
      beside ``load_file`` alone.
    * Files are read from the page cache. The first turn does not count, and every other one begins with the other side:
      the first writes after a while are slow, because the system has to find memory for the page cache.
    * With ``--partitioned`` each tensor stands in a file of its own, as partitioned variables do; safetensors still
      writes one file.
    * While the ps saves some more times, a worker pushes to one block after the other. The slowest push counts, and
      beside it the slowest of those that were made while nothing was saved.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

from benchmarks.harness import memory
from benchmarks.harness.arenas import create_arenas
from benchmarks.harness.case import Case
from benchmarks.harness.cluster import start_cluster
from benchmarks.harness.crew import Child, crew
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.figure import Figure, Subject, seconds_each
from benchmarks.harness.options import Options, check_least
from paramserver.checkpoint.model_dir import CheckpointManager
from paramserver.client.client import ParameterClient
from paramserver.distribute.checkpoints import write_checkpoint
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import Range
from paramserver.layout.variables import Shard, VariableSpec
from paramserver.wire.messages import Part, Saved

NUM_TENSORS = 8
WIDTH = 256
END_LIMIT = 30.0
PUSH_INTERVAL = 0.002


class CheckpointOptions(Options, kw_only=True, frozen=True):
    """The values that are saved, and the place where.

    Attributes:
        megabytes: Size of the values that the ps holds.
        folder: Where checkpoints are written, and deleted; it must exist.
        partitioned: Whether each tensor stands in a file of its own.
        seconds: Time in which pushes are made while nothing is saved.
    """

    megabytes: Annotated[int, typer.Option(metavar="MB", help="Values that the ps holds.")] = 1000
    folder: Annotated[Path, typer.Option(metavar="DIR", help="Where to write; it must exist.")] = Path(
        tempfile.gettempdir()
    )
    partitioned: Annotated[bool, typer.Option("--partitioned", help="Have each tensor in a file of its own.")] = False
    seconds: Annotated[float, typer.Option(metavar="S", help="Time of pushes while nothing is saved.")] = 1.0

    def __post_init__(self) -> None:
        check_least(self, "megabytes")
        super().__post_init__()


@dataclass(frozen=True)
class Run:
    """A ps, and the chief and a worker that talk to it.

    Attributes:
        server: The process of the ps.
        chief: Saves and restores.
        worker: Pushes meanwhile.
        layout: The layout of the one arena.
        values: The chief's copy of the ps's values, flat.
    """

    server: Child
    chief: ParameterClient
    worker: ParameterClient
    layout: ArenaLayout
    values: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the chief's copy by name."""
        names = [variable.name for variable in self.layout.variables]
        return dict(zip(names, self.layout.views(self.values), strict=True))


class Pusher(contextlib.AbstractContextManager["Pusher"]):
    """Pushes zeros to one block after the other for the length of a block of code.

    Args:
        run: Its worker pushes.

    Attributes:
        slowest: Seconds of the slowest push.
    """

    def __init__(self, run: Run) -> None:
        self.slowest = 0.0
        self._run = run
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._push_all)

    def __enter__(self) -> Pusher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _push_all(self) -> None:
        for piece in itertools.cycle(self._run.layout.pieces):
            self.slowest = max(self.slowest, seconds_each(partial(self._push, piece)))
            if self._over.wait(PUSH_INTERVAL):
                return

    def _push(self, piece: Range) -> None:
        worker = self._run.worker
        worker.push_pull(worker.plan([[Part(0, "add", (piece,))]], [()]), counts=False)


def measure(options: CheckpointOptions) -> Iterator[Figure]:
    """Save and restore in turns with safetensors; files that are written into the folder are deleted.

    Raises:
        BenchmarkError: If the values that are read are not those that were written, or a process fails.
        ParameterServerError: If the ps refuses.
    """
    layout = _layout(options)
    with _running(layout) as run, tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        plain = {name: tensor.clone() for name, tensor in run.tensors().items()}
        memory.reset_peak(run.server.pid)
        before = memory.read(run.server.pid)
        turns = [_take_turns(run, plain, Path(scratch), turn) for turn in range(options.repeats + 1)][1:]
        after = memory.read(run.server.pid)
        with Pusher(run) as idle:
            time.sleep(options.seconds)
        with Pusher(run) as pusher:
            saved = [_save_shard(run, Path(scratch, f"pushed-{turn}")) for turn in range(options.repeats)]
    kind = "partitioned variables" if options.partitioned else "values"
    subject = partial(Subject, size=layout.nbytes, size_unit="B", unit="s", better="less")
    for ours, other in BESIDE:
        case = f"{ours} of {kind} on {_filesystem(options.folder)}, beside {other}"
        yield subject(case=case, beside=other).figure([(turn[ours], turn[other]) for turn in turns])
    copies = [turn["memory_copy"] for turn in turns]
    pauses = list(zip((each.pause for each in saved), copies, strict=True))
    yield subject(case="pause of the ps in a save", beside="a memory copy").figure(pauses)
    longest = [(max(each.longest_pause for each in saved), statistics.median(copies))]
    yield subject(case="longest pause for a block", beside="a memory copy of all").figure(longest)
    slowest = [(pusher.slowest, idle.slowest)]
    yield subject(case="slowest push to a block in a save", beside="without a save").figure(slowest)
    if after and before:
        extra = [(float(after.peak - before.peak), float(layout.nbytes))]
        yield subject(case="memory of the ps beyond its values", beside="its values", unit="B").figure(extra)


BESIDE = (
    ("save", "save_file and fsync"),
    ("save", "save_file"),
    ("restore", "load_file and a copy"),
    ("restore", "load_file"),
)
"""The durations that a turn compares: ours, and the other side's."""


def _take_turns(run: Run, plain: Mapping[str, torch.Tensor], scratch: Path, turn: int) -> dict[str, float]:
    """Have both sides save and load, in the other order than in the turn before, and return the seconds of each action.

    Each side does it twice and the second time counts. A virtual machine may give free memory back to its host within
    seconds, and getting it again for the page cache takes several times as long as writing to it.
    """
    sides = [partial(_take_ours, run, plain), partial(_take_plain, plain)]
    seconds: dict[str, float] = {}
    for side in sides[:: 1 if turn % 2 else -1]:
        for number in range(2):
            place = scratch / f"{turn}-{number}"
            place.mkdir()
            seconds |= side(place)
            shutil.rmtree(place)
            os.sync()  # so that the files of this side cost the next one nothing
    copied = {name: torch.empty_like(tensor) for name, tensor in plain.items()}
    _copy(plain, copied)  # so that its memory is there
    return seconds | {"memory_copy": seconds_each(partial(_copy, plain, copied))}


def _take_ours(run: Run, plain: Mapping[str, torch.Tensor], place: Path) -> dict[str, float]:
    manager, paths = CheckpointManager(str(place)), list[str]()
    save = seconds_each(lambda: paths.append(write_checkpoint(run.chief, manager, 0, {})))
    run.chief.push_pull(run.chief.plan([[Part(0, "add")]], [()]), counts=False)  # there is something to restore
    restore = seconds_each(lambda: run.chief.restore(*paths))
    run.chief.pull([[0]])
    if not all(torch.equal(tensor, plain[name]) for name, tensor in run.tensors().items()):
        raise BenchmarkError("the ps does not hold what was saved")
    return {"save": save, "restore": restore}


def _take_plain(plain: Mapping[str, torch.Tensor], place: Path) -> dict[str, float]:
    file = place / "plain.safetensors"
    mapped: dict[str, torch.Tensor] = {}
    save = seconds_each(lambda: save_file(dict(plain), file))
    fsync = seconds_each(lambda: _fsync(file))
    load = seconds_each(lambda: mapped.update(load_file(file)))
    copy = seconds_each(lambda: _copy(mapped, plain))
    return {
        "save_file and fsync": save + fsync, "save_file": save, "load_file and a copy": load + copy, "load_file": load
    }  # fmt: skip


def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _save_shard(run: Run, place: Path) -> Saved:
    place.mkdir()
    (saved,) = run.chief.save(str(place))
    shutil.rmtree(place)
    return saved


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _layout(options: CheckpointOptions) -> ArenaLayout:
    """Return the layout of tensors of equal sizes: whole variables, or variables of one part."""
    rows = options.megabytes * 1_000_000 // (4 * WIDTH * NUM_TENSORS)
    names = [f"table{index}" for index in range(NUM_TENSORS)]
    shards = [Shard(name, 0, 0, rows) if options.partitioned else None for name in names]
    specs = (VariableSpec(name, (rows, WIDTH), "float32", shard) for name, shard in zip(names, shards, strict=True))
    return ArenaLayout("float32", None, tuple(specs))


@contextlib.contextmanager
def _running(layout: ArenaLayout) -> Iterator[Run]:
    """Run a ps that holds random values, with its two clients."""
    with crew() as its_crew:
        cluster = start_cluster(its_crew, workers=1, shared={})
        (server,) = cluster.servers
        with cluster.client("chief:0", "auto") as chief, cluster.client("worker:0", "auto") as worker:
            (chief_memory,) = create_arenas(chief, [[layout]])
            worker.join([[layout]])
            worker.open()
            yield Run(server, chief, worker, layout, chief_memory.values[0])
            worker.goodbye()
            chief.goodbye()
            server.await_end(END_LIMIT)


def _filesystem(folder: Path) -> str:
    """Return the type of the file system of a folder, such as ``ext4``; "?" where there is no /proc to read it from."""
    with contextlib.suppress(OSError):
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
        return max((len(at), kind) for at, kind in mounts if folder.resolve().is_relative_to(at))[1]
    return "?"


CASE = Case(
    title="Saving and restoring", options=CheckpointOptions, measure=measure, is_in_suite=False, has_one_thread=False
)
