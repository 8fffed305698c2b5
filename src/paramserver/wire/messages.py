"""The messages between tasks: a closed union of typed structs.

Messages do not contain the tensors of a model: a message names the pieces of arenas in its payload, and the payload
follows as raw bytes (or is in shared memory already). The program's own variables are few and mostly small: messages
contain their values, at most one block of elements in each.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.settings import Setting
from paramserver.layout.variables import VariableSpec
from paramserver.wire.numbers import Count, FirstStep, Name, Seconds, Sequence, Span, Step, TaskName, Token


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The base of all messages. Each subclass repeats ``frozen`` for type checkers, which do not inherit it."""


# --- the handshake ---------------------------------------------------------------------------------------------


class Challenge(Message, frozen=True):
    """Sent by a ps to a task that connects: names the ps, and asks for proof that the task belongs to the run.

    ``local_socket`` names a shorter way for tasks on the same host.
    """

    task: TaskName
    nonce: Token
    local_socket: Name


class Hello(Message, frozen=True):
    """The answer to a challenge."""

    task: TaskName
    peer: TaskName
    """The task that the sender expects at the other end."""
    incarnation: Name
    """One start of a task: a restarted worker has another incarnation."""
    proof: Token
    nonce: Token
    lane: Name
    """The name of the lane that the sender has chosen."""
    heartbeat: Seconds = 0.0
    """If it is not 0, this connection is for heartbeats alone, and one is due within so many seconds."""


class Welcome(Message, frozen=True):
    """Accepts the sender of a `Hello`, and proves that the ps belongs to the run too."""

    proof: Token


# --- requests --------------------------------------------------------------------------------------------------


class Declare(Message, frozen=True):
    """The arenas that the ps is to hold. The chief creates them; those of other workers are compared with them."""

    arenas: tuple[ArenaLayout, ...]
    create: bool


class Share(Message, frozen=True):
    """Offers the worker's memory for gradients and for rows, and asks for the memory of the ps's values.

    File descriptors are passed beside this message, in this order.
    """


class Part(msgspec.Struct, frozen=True, array_like=True):
    """The operation of a push on one arena: run its rule, assign, or add, on ``ranges`` (None: on all of it).

    On a table, the operation applies to as many ``rows``, all with the same settings; ``ranges`` is None then.
    """

    arena: Count
    operation: Literal["rule", "assign", "add"]
    ranges: tuple[Span, ...] | None = None
    settings: dict[str, Setting] | None = None
    rows: Count | None = None


class Push(Message, frozen=True):
    """Pushes gradients and asks for fresh values. Applied once, however often it arrives.

    The payload holds the rows of tables and then the ranges of the other parts, each in the order of the parts; the
    payload of the reply holds the whole arenas of ``pull``. For the rows of a table, it holds their ids (int64,
    ascending and unique) and then their values.
    """

    sequence: Sequence
    """Number of the push among those of one incarnation, counted from 1."""
    local_step: Step
    """The global step whose values the gradients were computed from."""
    counts: bool
    """Whether this is an update of the model (global step + 1) or an assignment."""
    parts: tuple[Part, ...]
    pull: tuple[Count, ...]


class Pull(Message, frozen=True):
    """Asks for the values of whole arenas."""

    arenas: tuple[Count, ...]


class PullRows(Message, frozen=True):
    """Asks for rows of tables. The payload holds their ids, as in `Push`; the payload of the reply holds the rows."""

    wanted: tuple[tuple[Count, Count], ...]
    """The arena of each table, and the number of its rows."""


class MarkReady(Message, frozen=True):
    """Says that the chief has initialized or restored every variable."""

    global_step: FirstStep
    epoch: str = ""
    """A name for the values from now on: updates of earlier values must not be applied to them."""


class AwaitReady(Message, frozen=True):
    """Asks for a reply as soon as the chief has initialized the variables, or after ``timeout`` seconds."""

    timeout: float


class MarkRestored(Message, frozen=True):
    """Says, after `MarkReady`, that the chief has restored a checkpoint of this step; None if there was none."""

    global_step: FirstStep | None


class AwaitRestored(Message, frozen=True):
    """Asks for a reply as soon as the chief has restored, or training has begun, or after ``timeout`` seconds."""

    timeout: float


class AwaitWorkers(Message, frozen=True):
    """Asks, for the chief, which workers still train; answered when none does, or after ``timeout`` seconds."""

    timeout: float
    absent: bool = False
    """Whether to wait also for workers that are not connected and have not said goodbye."""


class Save(Message, frozen=True):
    """Asks to write the ps's shard of a checkpoint: into the directory if the ps sees it, else through the sender."""

    directory: str
    shard: Count
    num_shards: Count


class Restore(Message, frozen=True):
    """Asks to read the ps's variables and slots from a whole checkpoint: from the directory, or through the sender.

    The ps reads the directory itself if its checkpoint has this ``digest``.
    """

    directory: str
    digest: str
    weight_map: dict[str, str]
    slot_map: dict[str, str]


class ReadSlots(Message, frozen=True):
    """Asks to send the slots of variables to the sender, in the files into which `Save` would write them."""

    shard: Count
    num_shards: Count
    variables: tuple[str, ...]


class SlotGroup(msgspec.Struct, frozen=True, array_like=True):
    """Variables, and the settings of their rule with which their slots were made."""

    variables: tuple[str, ...]
    settings: dict[str, Setting]


class LoadSlots(Message, frozen=True):
    """Asks to replace the slots of variables by those in files that the sender holds; see `Restore`.

    Variables without slots in these files begin anew.
    """

    groups: tuple[SlotGroup, ...]
    slot_map: dict[str, str]


class Proceed(Message, frozen=True):
    """Asks to go on for ``timeout`` seconds with what `Save`, `Restore`, `ReadSlots` or `LoadSlots` began.

    ``content`` holds the bytes that the last reply asked for.

    So a ps that works for hours reports every second, and stops work that no task waits for any more.
    """

    timeout: float
    content: bytes = b""


class CreateVariable(Message, frozen=True):
    """Creates one of the program's own variables, for the chief. Sends its first values block by block, in order.

    Other tasks see the variable when its last block has come; a variable that exists already keeps its values.
    """

    variable: VariableSpec
    start: Count
    values: bytes


class AwaitVariable(Message, frozen=True):
    """Asks for a reply as soon as the chief has created a variable, or after ``timeout`` seconds."""

    variable: VariableSpec
    timeout: float


class ReadVariable(Message, frozen=True):
    """Asks for the elements ``[start, stop)`` of a variable, all in one block."""

    variable: str
    start: Count
    stop: Count


class UpdateVariable(Message, frozen=True):
    """Assigns or adds to elements of one block of a variable, from ``start`` on. The reply holds their new values.

    Applied once, however often it arrives.
    """

    sequence: Sequence
    """Number of the update; updates and pushes share one sequence of numbers."""
    variable: str
    operation: Literal["assign", "add"]
    start: Count
    values: bytes


class GetStatus(Message, frozen=True):
    """Asks for the contents and counters of a ps."""


class Heartbeat(Message, frozen=True):
    """Says that the sender is alive; any answer says the same of the ps."""


class Goodbye(Message, frozen=True):
    """Says that the sender has finished (``failure`` empty) or cannot go on."""

    failure: str = ""


# --- replies ---------------------------------------------------------------------------------------------------


class Done(Message, frozen=True):
    """Says that the request was carried out."""


class Declared(Message, frozen=True):
    """Says that the arenas exist and agree.

    ``ready``: they hold trained or initial values already, of this ``epoch``.
    """

    ready: bool
    epoch: str = ""


class Applied(Message, frozen=True):
    """Says that a push was applied.

    ``staleness`` is the global step when it was applied less its local step; ``seconds`` is the time it took.
    """

    global_step: Step
    staleness: Step
    seconds: float = 0.0
    read_at: Step | None = None
    """The global step before this push when the first of its `EarlyValues` was read; None if there were none."""


class EarlyValues(Message, frozen=True):
    """Carries the values that a push pulls, block by block while the push is still under way. `Applied` follows."""


class State(Message, frozen=True):
    """Says whether the asked or awaited state is there (``ready``), and the global step."""

    ready: bool
    global_step: Step


class Values(Message, frozen=True):
    """Elements of one of the program's own variables."""

    values: bytes


class Remaining(Message, frozen=True):
    """The other workers that are still connected."""

    tasks: tuple[str, ...]
    absent: tuple[str, ...] = ()
    """Workers that are not connected and have not said goodbye, if they were asked for."""


class Underway(Message, frozen=True):
    """Says that there is more to do, and asks for `Proceed`."""


class FilePiece(Message, frozen=True):
    """Asks to write this into a file of the checkpoint, which will have ``size`` bytes, and then for `Proceed`.

    ``is_shared``: other tasks may write into the same pages of the file.
    """

    file: str
    size: Count
    is_shared: bool
    offset: Count
    content: bytes


class Wanted(Message, frozen=True):
    """Asks for `Proceed` with these bytes of a file of the checkpoint."""

    file: str
    offset: Count
    count: Count


class Saved(Message, frozen=True):
    """The files of a shard: ``weight_map`` and ``slot_map`` name the file of each variable and slot."""

    weight_map: dict[str, str]
    slot_map: dict[str, str]
    nbytes: Count
    pause: float
    """Seconds for which blocks were locked in total; no push had to wait longer."""
    longest_pause: float = 0.0
    """Seconds for which one block was locked at most."""


class Status(Message, frozen=True):
    """The contents of a ps, and its counters since it started."""

    task: str
    num_variables: Count
    values_bytes: Count
    slots_bytes: Count
    global_step: Step
    updates: Step
    mean_staleness: float
    largest_staleness: Step
    joined: tuple[str, ...]


class Refused(Message, frozen=True):
    """Says that a request was understood and refused. ``kind`` determines the exception that the client raises."""

    kind: Literal["refused", "token", "model", "over", "checkpoint", "not finite", "failed", "unavailable"]
    message: str
    subject: str = ""


VariableRequest = CreateVariable | AwaitVariable | ReadVariable | UpdateVariable
Request = (
    Declare | Share | Push | Pull | PullRows | MarkReady | AwaitReady | MarkRestored | AwaitRestored | AwaitWorkers
    | Save | Restore | ReadSlots | LoadSlots | Proceed
    | VariableRequest | GetStatus | Heartbeat | Goodbye
)  # fmt: skip
Reply = (
    Done | Declared | Applied | EarlyValues | State | Values | Remaining | Underway | FilePiece | Wanted | Saved
    | Status | Refused
)  # fmt: skip
AnyMessage = Challenge | Hello | Welcome | Request | Reply
