"""``python -m benchmarks.checkpoint``: saving and restoring one ps's values, beside plain safetensors in the same run.

A ps in a process of its own holds some large tensors. A chief, which talks to it by shared memory, has it write whole
checkpoints and read them back, in turns with ``safetensors.torch.save_file`` and ``load_file`` of the same tensors in
the same folder. Seconds are medians; ratios are medians of the ratios of neighbours in time, because machines drift.

Rules
    * Both sides end with the values on the disk: the ps does so by itself, after ``save_file`` the file is fsynced. How
      long ``save_file`` takes without is told, too.
    * Both sides end with the values in tensors that were there before: what ``load_file`` returns is copied into them,
      as ``load_state_dict`` does, because by itself it only maps the file and reads nothing.
    * Files are read from the page cache. The first turn does not count, and every other one begins with the other side:
      the first writes after a while are slow, because the system has to find memory for the page cache.
    * With ``--partitioned`` each tensor stands in a file of its own, as partitioned variables do; safetensors still
      writes one file.
    * While the ps saves some more times, a worker pushes to one block after the other; the slowest push is told, and
      the slowest of those that were made while nothing was saved.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks import memory
from benchmarks.processes import BenchmarkError, Child, crew
from benchmarks.step import MIB, fail
from paramserver.checkpoint.model_dir import CheckpointManager
from paramserver.client.client import ParameterClient
from paramserver.cluster import ClusterSpec, TaskId
from paramserver.distribute.checkpoints import write_checkpoint
from paramserver.distribute.connection import to_cluster
from paramserver.errors import ParameterServerError
from paramserver.launch.spec import HOST, NO_ADDRESS
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.variables import Shard, VariableSpec
from paramserver.wire.messages import Part, Saved

NUM_TENSORS = 8
WIDTH = 256
CONNECT_LIMIT = 60.0
END_LIMIT = 30.0
IDLE_SECONDS = 1.0
PUSH_INTERVAL = 0.002
DEFAULT_FOLDER = Path(tempfile.gettempdir())


class Result(msgspec.Struct, kw_only=True):
    """What was measured.

    Attributes:
        values_bytes: What the ps holds.
        is_partitioned: Whether each tensor stands in a file of its own.
        filesystem: Which it is written to.
        repeats: How often each side took its turn.
        save_seconds: Of a whole checkpoint, its indexes and the state file included; a median, as all up to ``map``.
        plain_save_seconds: Of ``save_file`` and an fsync.
        plain_save_alone_seconds: Of ``save_file`` without the fsync.
        save_ratio: ``plain_save`` divided by ``save``, the median of the turns: how many times as fast the ps is.
        save_ratios: The smallest and the largest of them.
        restore_seconds: Of a whole checkpoint.
        plain_load_seconds: Of ``load_file``, and of copying what it maps into tensors that were there.
        plain_map_seconds: Of ``load_file`` alone.
        restore_ratio: As ``save_ratio``.
        restore_ratios: As ``save_ratios``.
        pause_seconds: For which the ps held locks in a save, those of all blocks together; a median.
        longest_pause_seconds: For which it held the lock of one block: what a push may wait for each of its blocks.
        memory_copy_seconds: Of one copy of the values in memory, a median.
        slowest_push_seconds: Of the pushes to one block that were made during saves.
        slowest_idle_push_seconds: Of those that were made in `IDLE_SECONDS` without one.
        extra_memory_bytes: What the ps held at its peak beyond what it held when the turns began; None if not known.
    """

    values_bytes: int
    is_partitioned: bool
    filesystem: str
    repeats: int
    save_seconds: float
    plain_save_seconds: float
    plain_save_alone_seconds: float
    save_ratio: float
    save_ratios: tuple[float, float]
    restore_seconds: float
    plain_load_seconds: float
    plain_map_seconds: float
    restore_ratio: float
    restore_ratios: tuple[float, float]
    pause_seconds: float
    longest_pause_seconds: float
    memory_copy_seconds: float
    slowest_push_seconds: float
    slowest_idle_push_seconds: float
    extra_memory_bytes: int | None


@dataclass(frozen=True)
class Run:
    """A ps, and the chief and a worker who talk to it.

    Attributes:
        server: The process of the ps.
        chief: Saves and restores.
        worker: Pushes meanwhile.
        layout: Of the one arena.
        values: The chief's copy of what the ps holds, flat.
    """

    server: Child
    chief: ParameterClient
    worker: ParameterClient
    layout: ArenaLayout
    values: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """The chief's copy by name."""
        names = [variable.name for variable in self.layout.variables]
        return dict(zip(names, self.layout.views(self.values), strict=True))


class Pusher(contextlib.AbstractContextManager["Pusher"]):
    """Pushes zeros to one block after the other for the length of a block of code.

    Args:
        run: Whose worker pushes.

    Attributes:
        slowest: Seconds that the slowest push took.
    """

    def __init__(self, run: Run) -> None:
        self.slowest = 0.0
        self._run = run
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._push)

    def __enter__(self) -> Pusher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _push(self) -> None:
        pieces, count = self._run.layout.pieces, 0
        while not self._over.wait(PUSH_INTERVAL):
            part = Part(0, "add", (pieces[count % len(pieces)],))
            begun = time.perf_counter()
            self._run.worker.push_pull(self._run.worker.plan([[part]], [()]), counts=False)
            self.slowest = max(self.slowest, time.perf_counter() - begun)
            count += 1


def measure(megabytes: int, repeats: int, folder: Path, *, partitioned: bool) -> Result:
    """Save and restore in turns with safetensors; what is written into the folder is deleted.

    Raises:
        BenchmarkError: If what is read is not what was written, or a process fails.
        ParameterServerError: If the ps refuses.
    """
    with _running(_layout(megabytes, partitioned)) as run, tempfile.TemporaryDirectory(dir=folder) as scratch:
        plain = {name: tensor.clone() for name, tensor in run.tensors().items()}
        memory.reset_peak(run.server.pid)
        before = memory.read(run.server.pid)
        turns = [_take_turns(run, plain, Path(scratch), turn) for turn in range(repeats + 1)][1:]
        after = memory.read(run.server.pid)
        with Pusher(run) as idle:
            time.sleep(IDLE_SECONDS)
        with Pusher(run) as pusher:
            saved = [_save_shard(run, Path(scratch, f"pushed-{turn}")) for turn in range(repeats)]
    save_ratios = [turn["plain_save"] / turn["save"] for turn in turns]
    restore_ratios = [turn["plain_load"] / turn["restore"] for turn in turns]
    medians = {f"{name}_seconds": statistics.median(turn[name] for turn in turns) for name in turns[0]}
    return Result(
        values_bytes=run.layout.nbytes,
        is_partitioned=partitioned,
        filesystem=_filesystem(folder),
        repeats=repeats,
        **medians,
        save_ratio=statistics.median(save_ratios),
        save_ratios=(min(save_ratios), max(save_ratios)),
        restore_ratio=statistics.median(restore_ratios),
        restore_ratios=(min(restore_ratios), max(restore_ratios)),
        pause_seconds=statistics.median(each.pause for each in saved),
        longest_pause_seconds=max(each.longest_pause for each in saved),
        slowest_push_seconds=pusher.slowest,
        slowest_idle_push_seconds=idle.slowest,
        extra_memory_bytes=after.peak - before.peak if after and before else None,
    )


def _take_turns(run: Run, plain: dict[str, torch.Tensor], scratch: Path, turn: int) -> dict[str, float]:
    """Both sides save and load, the other one first than in the turn before; the seconds that each thing took.

    Each does it twice and the second time counts. A virtual machine may give free memory back to its host within
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
            os.sync()  # what this side leaves behind must cost the next one nothing
    copied = {name: torch.empty_like(tensor) for name, tensor in plain.items()}
    for name, tensor in copied.items():
        tensor.copy_(plain[name])  # so that its memory is there
    return seconds | {"memory_copy": _seconds(lambda: [copied[name].copy_(plain[name]) for name in plain])}


def _take_ours(run: Run, plain: dict[str, torch.Tensor], place: Path) -> dict[str, float]:
    manager, paths = CheckpointManager(str(place)), list[str]()
    save = _seconds(lambda: paths.append(write_checkpoint(run.chief, manager, 0, {})))
    run.chief.push_pull(run.chief.plan([[Part(0, "add")]], [()]), counts=False)  # there is something to restore
    restore = _seconds(lambda: run.chief.restore(*paths))
    run.chief.pull([[0]])
    if not all(torch.equal(tensor, plain[name]) for name, tensor in run.tensors().items()):
        raise BenchmarkError("the ps does not hold what was saved")
    return {"save": save, "restore": restore}


def _take_plain(plain: dict[str, torch.Tensor], place: Path) -> dict[str, float]:
    file = place / "plain.safetensors"
    save = _seconds(lambda: save_file(plain, file))
    fsync = _seconds(lambda: _fsync(file))
    mapped: dict[str, torch.Tensor] = {}
    load = _seconds(lambda: mapped.update(load_file(file)))
    copy = _seconds(lambda: [tensor.copy_(mapped[name]) for name, tensor in plain.items()])
    return {
        "plain_save": save + fsync, "plain_save_alone": save, "plain_load": load + copy, "plain_map": load
    }  # fmt: skip


def _save_shard(run: Run, place: Path) -> Saved:
    place.mkdir()
    (saved,) = run.chief.save(str(place))
    shutil.rmtree(place)
    return saved


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _layout(megabytes: int, partitioned: bool) -> ArenaLayout:
    """Tensors of equal sizes: whole variables, or variables of one part."""
    rows = megabytes * 1_000_000 // (4 * WIDTH * NUM_TENSORS)
    names = [f"table{index}" for index in range(NUM_TENSORS)]
    shards = [Shard(name, 0, 0, rows) if partitioned else None for name in names]
    specs = (VariableSpec(name, (rows, WIDTH), "float32", shard) for name, shard in zip(names, shards, strict=True))
    return ArenaLayout("float32", None, tuple(specs))


@contextlib.contextmanager
def _running(layout: ArenaLayout) -> Iterator[Run]:
    """A ps process that holds random values, and its two clients."""
    token = secrets.token_hex(16)
    with crew() as its_crew, socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        jobs = {"chief": [NO_ADDRESS], "worker": [NO_ADDRESS], "ps": [f"{HOST}:{port}"]}
        env = {
            "TF_CONFIG": json.dumps({"cluster": jobs, "task": {"type": "ps", "index": 0}}),
            "PARAMSERVER_TOKEN": token,
        }
        server = its_crew.start_server("ps:0", env, listener)
        chief, worker = (
            to_cluster(ClusterSpec(jobs), TaskId.parse(task), CONNECT_LIMIT, token=token, lane="auto")
            for task in ("chief:0", "worker:0")
        )
        with contextlib.closing(chief), contextlib.closing(worker):
            values = _assign_random_values(chief, layout)
            worker.join([[layout]])
            worker.open()
            yield Run(server, chief, worker, layout, values)
            worker.goodbye()
            chief.goodbye()
            server.await_end(END_LIMIT)


def _assign_random_values(chief: ParameterClient, layout: ArenaLayout) -> torch.Tensor:
    chief.create([[layout]])
    (worker_memory,) = chief.open()
    worker_memory.gradients[0].uniform_()
    chief.push_pull(chief.plan([[Part(0, "assign")]], [[0]]), counts=False)
    chief.mark_ready(0)
    return worker_memory.values[0]


def _filesystem(folder: Path) -> str:
    """The type of the file system of a folder, such as ``ext4``; "?" where there is no /proc to read it from."""
    with contextlib.suppress(OSError):
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
        return max((len(at), kind) for at, kind in mounts if folder.resolve().is_relative_to(at))[1]
    return "?"


def print_result(result: Result) -> None:
    """Show the result to people."""
    megabytes = result.values_bytes / 1e6
    variables = "partitioned variables" if result.is_partitioned else "values"
    shown = Table(title=f"a checkpoint of {megabytes:,.0f} MB of {variables} on {result.filesystem}")
    for column in ("", "this", "safetensors", "times as fast", "safetensors alone"):
        shown.add_column(column, justify="right")
    saves = result.save_seconds, result.plain_save_seconds, result.plain_save_alone_seconds
    restores = result.restore_seconds, result.plain_load_seconds, result.plain_map_seconds
    rows = [
        ("save", saves, result.save_ratio, result.save_ratios),
        ("restore", restores, result.restore_ratio, result.restore_ratios),
    ]
    for name, seconds, ratio, (low, high) in rows:
        ours, plain, alone = (f"{each:.3f} s" for each in seconds)
        shown.add_row(name, ours, plain, f"{ratio:.2f} ({low:.2f} to {high:.2f})", alone)
    shown.caption = "safetensors: save_file and fsync, load_file and a copy; alone: save_file, load_file"
    console = Console()
    console.print(shown)
    console.print(
        f"pause of the ps: {result.pause_seconds * 1e3:.0f} ms in all, {result.longest_pause_seconds * 1e3:.2f} ms "
        f"for a block; a memory copy of its values takes {result.memory_copy_seconds * 1e3:.0f} ms"
    )
    console.print(
        f"slowest push to a block: {result.slowest_push_seconds * 1e3:.1f} ms during a save, "
        f"{result.slowest_idle_push_seconds * 1e3:.1f} ms without"
    )
    if result.extra_memory_bytes is not None:
        console.print(f"memory of the ps beyond its values, at the most: {result.extra_memory_bytes / MIB:.0f} MiB")


def main(
    megabytes: Annotated[int, typer.Option(metavar="MB", help="Values that the ps holds.")] = 1000,
    repeats: Annotated[int, typer.Option(metavar="R", help="How often each side takes its turn.")] = 5,
    folder: Annotated[Path, typer.Option(metavar="DIR", help="Where to write; it must exist.")] = DEFAULT_FOLDER,
    partitioned: Annotated[bool, typer.Option("--partitioned", help="Have each tensor in a file of its own.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of a table.")] = False,
) -> None:
    """Measure saving and restoring through the public API, beside safetensors."""
    try:
        result = measure(megabytes, repeats, folder, partitioned=partitioned)
    except (BenchmarkError, ParameterServerError, OSError) as error:
        raise fail(error) from error
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
    else:
        print_result(result)


if __name__ == "__main__":
    typer.run(main)
