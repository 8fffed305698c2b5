"""What a ps answers: each request on an in-process session, and every kind of nonsense that a peer may send."""

import os
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from paramserver.checkpoint.folder import CheckpointFolder, Read, Write
from paramserver.checkpoint.index import SLOTS_INDEX, VALUES_INDEX, digest, write_index
from paramserver.errors import RemoteProtocolError, UnavailableError
from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import BLOCK
from paramserver.layout.rules import describe
from paramserver.layout.variables import VariableSpec
from paramserver.memory.arena_memory import private_store_memory
from paramserver.server import handler
from paramserver.server.handler import RequestHandler
from paramserver.store.membership import Membership, Outlook
from paramserver.store.store import Store
from paramserver.transport.in_process import InProcessSession
from paramserver.wire import messages
from paramserver.wire.messages import Part, Push
from paramserver.wire.values import packed

SGD = describe(torch.optim.SGD([torch.zeros(1)], lr=0.5), 0)
MODEL = (
    ArenaLayout("float32", SGD, (VariableSpec("w", (3,), "float32"), VariableSpec("b", (2,), "float32"))),
    ArenaLayout("int64", None, (VariableSpec("n", (), "int64"),)),
)
W, B = MODEL[0].ranges


class Ps:
    """A handler and a session of a chief that has created `MODEL`."""

    def __init__(self):
        self.store = Store("ps:1", private_store_memory)
        self.membership = Membership("chief:0", ["chief:0", "worker:0"])
        self.handler = RequestHandler(self.store, self.membership)
        self.chief = self.session("chief:0")
        assert self.ask(messages.Declare(MODEL, create=True)) == messages.Declared(ready=False)
        self.chief.gradients = [torch.ones(layout.size, dtype=layout.torch_dtype) for layout in MODEL]

    def session(self, task):
        self.membership.join(task, f"incarnation of {task}")
        return InProcessSession(task, f"incarnation of {task}")

    def ask(self, request, session=None):
        session = session or self.chief
        self.handler.handle(session, request)
        answer, session.answer = session.answer, None
        return answer

    def value(self, span=W, arena=0):
        return self.store.arenas[arena].values[slice(*span)].tolist()


@pytest.fixture
def ps():
    return Ps()


def test_a_push_runs_the_rule_and_counts(ps):
    first = ps.ask(Push(1, 0, True, (Part(0, "rule", None, SGD.settings),), (0,)))
    assert (first.global_step, first.staleness) == (1, 0)
    assert first.seconds > 0
    assert ps.value() == [-0.5] * 3
    second = ps.ask(Push(2, 0, True, (Part(0, "rule", None, {"lr": 1.0}),), (0,)))
    assert (second.global_step, second.staleness) == (2, 1)
    assert ps.value() == [-1.5] * 3


def test_z01_z02_z22_updates_are_applied_as_they_come_and_an_old_one_says_how_old_it_is(ps):
    worker = ps.session("worker:0")
    worker.gradients = [torch.ones(layout.size, dtype=layout.torch_dtype) for layout in MODEL]
    push = Push(1, 0, True, (Part(0, "rule", None, SGD.settings),), (0,))
    answers = [ps.ask(push, session) for session in (ps.chief, worker)]
    assert [(answer.global_step, answer.staleness) for answer in answers] == [(1, 0), (2, 1)]
    assert ps.value() == [-1.0] * 3


def test_an_assignment_does_not_count(ps):
    parts = (Part(0, "assign"), Part(1, "add"), Part(1, "add"))
    assert ps.ask(Push(1, 0, False, parts, ())).global_step == 0
    assert ps.value() == [1.0] * 3
    assert ps.value((0, 1), arena=1) == [2]
    assert ps.store.statistics().updates == 0


def test_a_push_of_ranges_leaves_the_rest_alone(ps):
    ps.ask(Push(1, 0, True, (Part(0, "rule", (B,), SGD.settings),), ()))
    assert ps.value(W) == [0.0] * 3
    assert ps.value(B) == [-0.5] * 2


def test_a_repeated_push_is_answered_and_not_applied_again(ps):
    push = Push(1, 0, True, (Part(0, "rule", None, SGD.settings),), ())
    first, again = ps.ask(push), ps.ask(push)
    assert first.seconds > 0
    assert again == messages.Applied(first.global_step, first.staleness, seconds=0)
    assert ps.value() == [-0.5] * 3


def test_pull_tells_the_global_step(ps):
    ps.ask(messages.MarkReady(41))
    assert ps.ask(messages.Pull((0, 1))) == messages.State(True, 41)


def test_await_ready_answers_after_its_time(ps):
    assert ps.ask(messages.AwaitReady(0.0)) == messages.State(False, 0)
    ps.ask(messages.MarkReady(3))
    assert ps.ask(messages.AwaitReady(60.0)) == messages.State(True, 3)


def test_await_workers_names_who_is_left(ps):
    worker = ps.session("worker:0")
    assert ps.ask(messages.AwaitWorkers(0.0)) == messages.Remaining(("worker:0",))
    assert ps.ask(messages.Goodbye(), worker) == messages.Done()
    assert ps.ask(messages.AwaitWorkers(60.0)) == messages.Remaining(())


@pytest.mark.parametrize("timeout", [float("nan"), float("inf"), 1e300, -1.0])
def test_no_wait_is_longer_than_the_limit(ps, timeout, monkeypatch):
    monkeypatch.setattr(handler, "LONGEST_WAIT", 0.0)
    ps.session("worker:0")
    assert ps.ask(messages.AwaitReady(timeout)) == messages.State(False, 0)
    assert ps.ask(messages.AwaitWorkers(timeout)) == messages.Remaining(("worker:0",))


def test_status_says_what_is_held_and_done(ps):
    ps.ask(Push(1, 0, True, (Part(0, "rule", None, SGD.settings),), ()))
    assert ps.ask(messages.GetStatus()) == messages.Status(
        task="ps:1", num_variables=3, values_bytes=MODEL[0].nbytes + 8, slots_bytes=0, global_step=1, updates=1,
        mean_staleness=0.0, largest_staleness=0, joined=("chief:0",),
    )  # fmt: skip


# --- checkpoints: what takes long is done bit by bit


def carry_out(ps, request, folder):
    """Ask for something and go on until it is done, as a peer that lends a folder; the last answer, and all kinds."""
    kinds, content, answer = [], b"", ps.ask(request)
    while isinstance(answer, (messages.Underway, messages.FilePiece, messages.Wanted)):
        kinds.append(type(answer))
        if isinstance(answer, messages.FilePiece):
            folder.carry_out(Write(*msgspec.structs.astuple(answer)[:-1], memoryview(answer.content)))
        content = bytearray(answer.count if isinstance(answer, messages.Wanted) else 0)
        if content:
            folder.carry_out(Read(answer.file, answer.offset, memoryview(content)))
        answer = ps.ask(messages.Proceed(0.0, bytes(content)))
    return answer, set(kinds)


def open_files(folder):
    links = [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()]
    return [link for link in links if link.startswith(str(folder))]


def finish(folder, saved):
    """Write the indexes, as the chief does; the request to restore it."""
    for name, files in ((VALUES_INDEX, saved.weight_map), (SLOTS_INDEX, saved.slot_map)):
        write_index(folder.path / name, files)
    return messages.Restore(str(folder.path), digest(folder.path), saved.weight_map, saved.slot_map)


def test_b01_a_ps_writes_its_shard_itself_and_says_that_it_is_still_at_it(ps, tmp_path):
    ps.ask(Push(1, 0, True, (Part(0, "rule", None, SGD.settings),), ()))
    with CheckpointFolder(tmp_path) as folder:
        saved, kinds = carry_out(ps, messages.Save(str(tmp_path), 0, 1), folder)
        assert (set(saved.weight_map), kinds) == ({"w", "b", "n"}, {messages.Underway})
        assert saved.pause >= saved.longest_pause > 0
        request = finish(folder, saved)
        ps.store.arenas[0].values.zero_()
        assert carry_out(ps, request, folder) == (messages.Done(), {messages.Underway})
    assert ps.value() == [-0.5] * 3


def test_b01_a_ps_that_does_not_see_the_folder_goes_through_its_peer(ps, tmp_path):
    ps.ask(Push(1, 0, True, (Part(0, "rule", None, SGD.settings),), ()))
    with CheckpointFolder(tmp_path) as folder:
        saved, kinds = carry_out(ps, messages.Save("/nowhere/ckpt-1.tmp-12", 0, 1), folder)
        assert kinds == {messages.Underway, messages.FilePiece}
        request = finish(folder, saved)
        folder.flush()
        assert load_file(tmp_path / saved.weight_map["w"])["w"].tolist() == [-0.5] * 3
        ps.store.arenas[0].values.zero_()
        elsewhere = msgspec.structs.replace(request, directory="/nowhere/ckpt-1")
        assert carry_out(ps, elsewhere, folder) == (messages.Done(), {messages.Underway, messages.Wanted})
    assert ps.value() == [-0.5] * 3


def test_another_checkpoint_of_the_same_name_is_not_mistaken_for_the_one_that_is_meant(ps, tmp_path):
    """As a host may have it where model_dir is not shared."""
    with CheckpointFolder(tmp_path) as folder:
        saved, _ = carry_out(ps, messages.Save(str(tmp_path), 0, 1), folder)
        request = msgspec.structs.replace(finish(folder, saved), digest="of another one")
        assert carry_out(ps, request, folder) == (messages.Done(), {messages.Underway, messages.Wanted})


def test_what_a_peer_sends_must_be_what_was_asked_for(ps):
    assert ps.ask(messages.Restore("/nowhere", "", {"w": "f", "b": "f", "n": "f"}, {})) == messages.Underway()
    assert ps.ask(messages.Proceed(0.0)) == messages.Wanted("f", 0, 8)
    with pytest.raises(RemoteProtocolError, match="expected 8 bytes of checkpoint file f, got 3"):
        ps.ask(messages.Proceed(0.0, b"123"))
    assert "nothing to go on with" in ps.ask(messages.Proceed(0.0)).message


def test_a_job_ends_with_its_connection(ps, tmp_path):
    ps.ask(messages.Save(str(tmp_path), 0, 1))
    assert ps.ask(messages.Proceed(0.0)) == messages.Underway()
    stranger = ps.session("worker:0")
    assert "nothing to go on with" in ps.ask(messages.Proceed(0.0), stranger).message
    assert open_files(tmp_path)
    del ps.chief
    assert not open_files(tmp_path)


def test_a_restore_that_fails_is_refused_and_over(ps, tmp_path):
    request = messages.Restore(str(tmp_path), digest(tmp_path), {"w": "gone", "b": "gone", "n": "gone"}, {})
    assert ps.ask(request) == messages.Underway()
    refusal = ps.ask(messages.Proceed(60.0))
    assert (refusal.kind, refusal.subject) == ("checkpoint", str(tmp_path / "gone"))
    assert "nothing to go on with" in ps.ask(messages.Proceed(0.0)).message


# --- a failed run


def test_a_failed_chief_is_told_to_everyone(ps):
    ps.ask(messages.Goodbye("ValueError: no data"))
    worker = InProcessSession("worker:0", "x")
    push, declare = Push(1, 0, True, (), ()), messages.Declare(MODEL, create=False)
    for request in (push, declare, messages.Pull(()), messages.AwaitReady(60.0)):
        refusal = ps.ask(request, worker)
        assert isinstance(refusal, messages.Refused), request
        assert "chief:0 failed" in refusal.message
        assert "no data" in refusal.message


def test_a_failed_worker_disturbs_nobody(ps):
    worker = ps.session("worker:0")
    assert ps.ask(messages.Goodbye("ValueError: no data"), worker) == messages.Done()
    assert ps.ask(messages.Pull((0,))) == messages.State(True, 0)


def test_a_goodbye_counts_also_when_its_sender_does_not_wait_for_the_answer(ps):
    def gone(*_):
        raise UnavailableError("chief:0 went away", "chief:0")

    ps.chief.reply = gone
    with pytest.raises(UnavailableError):
        ps.handler.handle(ps.chief, messages.Goodbye())
    assert ps.membership.outlook is Outlook.ABSENT


# --- nonsense

NONSENSE = {
    "an arena that is not there": Push(1, 0, True, (Part(2, "add"),), ()),
    "an arena before the first": Push(1, 0, True, (Part(-1, "add"),), ()),
    "to pull an arena that is not there": Push(1, 0, True, (), (7,)),
    "to pull an arena before the first": Push(1, 0, True, (), (-1,)),
    "a rule where there is none": Push(1, 0, True, (Part(1, "rule", None, SGD.settings),), ()),
    "a range beyond the end": Push(1, 0, True, (Part(0, "add", ((0, 10**9),)),), ()),
    "a range before the start": Push(1, 0, True, (Part(0, "add", ((-4, 2),)),), ()),
    "a range that runs backwards": Push(1, 0, True, (Part(0, "add", ((4, 2),)),), ()),
    "an unknown setting": Push(1, 0, True, (Part(0, "rule", None, {"params": 1.0}),), ()),
    "a good part and a bad one": Push(1, 0, True, (Part(0, "add"), Part(0, "add", ((9, 99),))), ()),
    "a pull of an arena that is not there": messages.Pull((2,)),
}


@pytest.mark.parametrize("request_", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_refused_and_changes_nothing(ps, request_):
    refusal = ps.ask(request_)
    assert isinstance(refusal, messages.Refused)
    assert "ps:1" in refusal.message
    assert ps.value() == [0.0] * 3
    assert ps.store.global_step == 0
    first = ps.ask(Push(1, 0, True, (Part(0, "rule", None, SGD.settings),), (0,)))
    assert (first.global_step, first.staleness) == (1, 0)
    assert first.seconds > 0


@pytest.mark.parametrize("settings", [{"lr": None}, {"lr": (0.1, 0.2)}])
def test_a_setting_that_torch_chokes_on_is_refused_and_the_next_push_is_good(ps, settings):
    refusal = ps.ask(Push(1, 0, True, (Part(0, "rule", None, {**SGD.settings, **settings}),), ()))
    assert isinstance(refusal, messages.Refused)
    ps.store.arenas[0].values.zero_()
    assert ps.ask(Push(2, 0, True, (Part(0, "rule", None, SGD.settings),), (0,))).global_step == 1
    assert ps.value() == [-0.5] * 3


def test_what_is_no_request_breaks_the_protocol(ps):
    with pytest.raises(RemoteProtocolError, match="chief:0 sent Done"):
        ps.ask(messages.Done())


def test_t14_a_worker_that_waits_for_a_chief_with_nothing_to_do_is_told(ps):
    worker = ps.session("worker:0")
    ps.ask(messages.Goodbye())
    answer = ps.ask(messages.AwaitReady(0.0), worker)
    assert answer == messages.Refused("over", "worker:0 came after the end: chief:0 has finished the run")


# --- variables of the program's own

TABLE = VariableSpec("table", (2, 2), "float32")
LARGE = VariableSpec("large", (2 * BLOCK,), "int8")


@pytest.fixture
def table(ps):
    """A ps that holds `TABLE`, of ones."""
    assert ps.ask(create(TABLE, torch.ones(4))) == messages.Declared(ready=True)
    return ps


def create(variable, values, start=0):
    return messages.CreateVariable(variable, start, packed(values))


def update(sequence, values, start=0, operation="add", name="table"):
    return messages.UpdateVariable(sequence, name, operation, start, packed(values))


def values(*elements):
    return messages.Values(packed(torch.tensor(elements, dtype=torch.float32)))


def test_w09_a_ps_carries_out_assignments_and_answers_with_what_they_made(table):
    assert table.ask(update(1, torch.arange(4.0))) == values(1, 2, 3, 4)
    assert table.ask(update(2, torch.zeros(2), start=1, operation="assign")) == values(0, 0)
    assert table.ask(messages.ReadVariable("table", 0, 4)) == values(1, 0, 0, 4)
    assert table.ask(messages.ReadVariable("table", 2, 3)) == values(0)


def test_a_repeated_assignment_is_answered_and_not_carried_out_again(table):
    """Its number is one of those of pushes."""
    worker = table.session("worker:0")
    ones = torch.ones(4)
    assert [table.ask(update(1, ones)) for _ in range(3)] == [values(2, 2, 2, 2)] * 3
    assert table.ask(update(1, ones), worker) == values(3, 3, 3, 3)
    assert table.ask(Push(1, 0, True, (Part(0, "rule", None, SGD.settings),), ())) == messages.Applied(0, 0)
    assert table.ask(update(2, ones)) == values(4, 4, 4, 4)


def test_a_worker_waits_for_a_variable_and_is_told_of_the_global_step(table):
    table.ask(messages.MarkReady(7))
    assert table.ask(messages.AwaitVariable(TABLE, 60.0)) == messages.State(True, 7)
    assert table.ask(messages.AwaitVariable(LARGE, 0.0)) == messages.State(False, 7)
    refusal = table.ask(messages.AwaitVariable(VariableSpec("table", (4,), "float32"), 60.0))
    assert (refusal.kind, refusal.subject) == ("model", "table")


def test_a_worker_that_waits_for_a_variable_of_a_chief_that_has_finished_is_told(ps):
    worker = ps.session("worker:0")
    ps.ask(messages.Goodbye())
    assert ps.ask(messages.AwaitVariable(TABLE, 0.0), worker).kind == "over"


def test_a_large_variable_comes_block_by_block(ps):
    block = torch.ones(BLOCK, dtype=torch.int8)
    assert ps.ask(create(LARGE, block)) == messages.Declared(ready=False)
    assert ps.ask(create(LARGE, block, BLOCK)) == messages.Declared(ready=True)
    assert ps.ask(update(1, block, BLOCK, name="large")) == messages.Values(packed(2 * block))
    assert ps.ask(messages.ReadVariable("large", BLOCK - 1, BLOCK)) == messages.Values(b"\1")


def test_status_counts_variables_of_the_programs_own(table):
    status = table.ask(messages.GetStatus())
    assert (status.num_variables, status.values_bytes) == (4, MODEL[0].nbytes + 8 + 16)


def test_a12_a_checkpoint_holds_variables_of_the_programs_own(table, tmp_path):
    table.ask(messages.Save(str(tmp_path), 0, 1))
    assert set(table.ask(messages.Proceed(60.0)).weight_map) == {"w", "b", "n", "table"}


VARIABLE_NONSENSE = {
    "an update of what is not there": update(1, torch.ones(1), name="chair"),
    "a read of what is not there": messages.ReadVariable("chair", 0, 1),
    "elements beyond the end": update(1, torch.ones(5)),
    "elements before the start": update(1, torch.ones(1), start=-1),
    "no elements": update(1, torch.ones(0)),
    "a read beyond the end": messages.ReadVariable("table", 0, 10**9),
    "a read that runs backwards": messages.ReadVariable("table", 3, 1),
    "a broken element": messages.UpdateVariable(1, "table", "add", 0, b"123"),
    "another shape": create(VariableSpec("table", (4,), "float32"), torch.ones(4)),
    "another dtype": create(VariableSpec("table", (2, 2), "int32"), torch.ones(4, dtype=torch.int32)),
    "a dtype that is none": messages.CreateVariable(VariableSpec("c", (), "complex64"), 0, b"12345678"),
    "more than there is memory": create(VariableSpec("huge", (1 << 60,), "float64"), torch.ones(1)),
}


@pytest.mark.parametrize("request_", VARIABLE_NONSENSE.values(), ids=VARIABLE_NONSENSE)
def test_nonsense_about_variables_is_refused_and_changes_nothing(table, request_):
    refusal = table.ask(request_)
    assert isinstance(refusal, messages.Refused)
    assert "ps:1" in refusal.message
    assert list(table.store.variables) == ["table"]
    assert table.ask(update(1, torch.ones(4))) == values(2, 2, 2, 2)


def test_a_failed_chief_is_told_to_those_that_use_variables(table):
    worker = table.session("worker:0")
    table.ask(messages.Goodbye("ValueError: no data"))
    read, wait = messages.ReadVariable("table", 0, 4), messages.AwaitVariable(TABLE, 60.0)
    for request in (update(1, torch.ones(4)), read, wait):
        assert "no data" in table.ask(request, worker).message


def test_each_request_has_a_handler():
    """But for the one that a lane of shared memory answers itself, and the one that concerns no model."""
    requests = set(get_args(messages.Request)) - {messages.Share, messages.Heartbeat}
    assert RequestHandler(Store("ps:0", private_store_memory), Membership("chief:0", ["chief:0"])).requests == requests
