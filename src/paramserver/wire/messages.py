"""What tasks say to each other: a closed union of typed structs.

The tensors of a model do not stand in messages: a message says which pieces of which arenas its payload holds, and the
payload follows it as raw bytes (or lies in shared memory already). The variables of a program's own are few and mostly
small: their values stand in the messages, one block of elements at most in each.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from paramserver.layout.arena import ArenaLayout
from paramserver.layout.blocks import Range
from paramserver.layout.settings import Setting
from paramserver.layout.variables import VariableSpec


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The root of all messages. Each subclass says ``frozen`` again for type checkers, which do not inherit it."""


# --- the handshake ---------------------------------------------------------------------------------------------


class Challenge(Message, frozen=True):
    """A ps to whoever connects: who I am, prove who you are; and a shorter way, if you are on my host."""

    task: str
    nonce: bytes
    local_socket: str


class Hello(Message, frozen=True):
    """The answer to a challenge."""

    task: str
    peer: str
    """The task that the sender believes to talk to."""
    incarnation: str
    """One start of a task: a restarted worker has another one."""
    proof: bytes
    nonce: bytes
    lane: str
    """The name of the lane that the sender has chosen."""


class Welcome(Message, frozen=True):
    """A ps has accepted the sender of Hello, and proves that it belongs to the run too."""

    proof: bytes


# --- requests --------------------------------------------------------------------------------------------------


class Declare(Message, frozen=True):
    """The arenas that this ps is to hold. The chief creates them; everyone else is compared with them."""

    arenas: tuple[ArenaLayout, ...]
    create: bool


class Share(Message, frozen=True):
    """Offers the worker's memory for gradients and that for rows, and asks for the ps's values.

    Descriptors travel beside it, in this order.
    """


class Part(msgspec.Struct, frozen=True, array_like=True):
    """What a push does to one arena: run its rule, or assign, or add, on ``ranges`` (None: all of it).

    To a table it does so on as many ``rows``, with the same rule; ``ranges`` is None then.
    """

    arena: int
    operation: Literal["rule", "assign", "add"]
    ranges: tuple[Range, ...] | None = None
    settings: dict[str, Setting] | None = None
    rows: int | None = None


class Push(Message, frozen=True):
    """Gradients, and the wish to have fresh values back. Applied once, however often it arrives.

    The payload holds the rows of tables, then the other parts' ranges, each in the order of the parts; the reply's
    payload holds the arenas of ``pull``, whole. Of a table's rows there are the ids (int64, ascending, none twice), and
    then the rows.
    """

    sequence: int
    """Counts the pushes of one incarnation, from 1."""
    local_step: int
    """The global step whose values the gradients were computed from."""
    counts: bool
    """Whether this is an update of the model (global step + 1) or an assignment."""
    parts: tuple[Part, ...]
    pull: tuple[int, ...]


class Pull(Message, frozen=True):
    """Asks for the values of whole arenas."""

    arenas: tuple[int, ...]


class PullRows(Message, frozen=True):
    """Asks for rows of tables. The payload holds their ids, as in `Push`; the reply's payload holds the rows."""

    wanted: tuple[tuple[int, int], ...]
    """The arena of each table, and how many of its rows."""


class MarkReady(Message, frozen=True):
    """The chief has initialized or restored every variable."""

    global_step: int
    epoch: str = ""
    """A name for the values from now on: updates of those before are none of theirs."""


class AwaitReady(Message, frozen=True):
    """Asks to be told when the chief has initialized the variables; answered within ``timeout`` seconds."""

    timeout: float


class MarkRestored(Message, frozen=True):
    """After `MarkReady`, the chief has restored a checkpoint of this step; None: it has found none to restore."""

    global_step: int | None


class AwaitRestored(Message, frozen=True):
    """Asks to be told when the chief has restored, or training has begun; answered within ``timeout`` seconds."""

    timeout: float


class AwaitWorkers(Message, frozen=True):
    """The chief asks who else still trains; answered when nobody does, or after ``timeout`` seconds."""

    timeout: float
    absent: bool = False
    """Whether those are waited for, too, that are not connected and have not said goodbye."""


class Save(Message, frozen=True):
    """Begin to write this ps's shard of a checkpoint: into the directory if it is there, else through the sender."""

    directory: str
    shard: int
    num_shards: int


class Restore(Message, frozen=True):
    """Begin to read this ps's variables and slots from a whole checkpoint: from the directory, or through the sender.

    The directory is used if it holds the very checkpoint that ``digest`` tells.
    """

    directory: str
    digest: str
    weight_map: dict[str, str]
    slot_map: dict[str, str]


class ReadSlots(Message, frozen=True):
    """Begin to send the slots of variables to the sender, in the files that `Save` would write them into."""

    shard: int
    num_shards: int
    variables: tuple[str, ...]


class SlotGroup(msgspec.Struct, frozen=True, array_like=True):
    """Variables, and the settings of their rule with which their slots were made."""

    variables: tuple[str, ...]
    settings: dict[str, Setting]


class LoadSlots(Message, frozen=True):
    """Begin to replace the slots of variables by those in the files that the sender holds; see `Restore`.

    Variables that have none there begin anew.
    """

    groups: tuple[SlotGroup, ...]
    slot_map: dict[str, str]


class Proceed(Message, frozen=True):
    """Go on with what one of the four before began on this connection, for ``timeout`` seconds.

    ``content`` was asked for.

    So a ps that is at work for hours is heard of every second, and ends what nobody waits for any more.
    """

    timeout: float
    content: bytes = b""


class CreateVariable(Message, frozen=True):
    """The chief makes a variable of the program's own, and sends its first values block by block, the first one first.

    It is there for everyone once the last block has come; a variable that is there already keeps its values.
    """

    variable: VariableSpec
    start: int
    values: bytes


class AwaitVariable(Message, frozen=True):
    """Asks to be told when the chief has made a variable; answered within ``timeout`` seconds."""

    variable: VariableSpec
    timeout: float


class ReadVariable(Message, frozen=True):
    """Asks for the elements ``[start, stop)`` of a variable, which lie in one block."""

    variable: str
    start: int
    stop: int


class UpdateVariable(Message, frozen=True):
    """Assigns or adds to elements of one block of a variable, from ``start`` on. Answered with what they are then.

    Applied once, however often it arrives.
    """

    sequence: int
    """Counts as the one of `Push`, with which it shares the numbers."""
    variable: str
    operation: Literal["assign", "add"]
    start: int
    values: bytes


class GetStatus(Message, frozen=True):
    """Asks what a ps holds and has done."""


class Goodbye(Message, frozen=True):
    """The sender has finished (``failure`` empty) or cannot go on."""

    failure: str = ""


# --- replies ---------------------------------------------------------------------------------------------------


class Done(Message, frozen=True):
    """The request was carried out."""


class Declared(Message, frozen=True):
    """The arenas exist and agree. ``ready``: they hold trained or initial values already, of this ``epoch``."""

    ready: bool
    epoch: str = ""


class Applied(Message, frozen=True):
    """A push was applied. ``staleness`` is the global step it met, less its local step; ``seconds`` is what it took."""

    global_step: int
    staleness: int
    seconds: float = 0.0


class State(Message, frozen=True):
    """Whether the variables are initialized, and the global step."""

    ready: bool
    global_step: int


class Values(Message, frozen=True):
    """Elements of a variable of the program's own."""

    values: bytes


class Remaining(Message, frozen=True):
    """The other workers that are still connected."""

    tasks: tuple[str, ...]
    absent: tuple[str, ...] = ()
    """Those that are not, and have not said goodbye, if they were asked for."""


class Underway(Message, frozen=True):
    """There is more to do: `Proceed`."""


class FilePiece(Message, frozen=True):
    """Write this into a file of the checkpoint, which will have ``size`` bytes, and `Proceed`.

    ``is_shared``: other tasks may write into the same pages of it.
    """

    file: str
    size: int
    is_shared: bool
    offset: int
    content: bytes


class Wanted(Message, frozen=True):
    """`Proceed` with these bytes of a file of the checkpoint."""

    file: str
    offset: int
    count: int


class Saved(Message, frozen=True):
    """The files of a shard, and which variable or slot lies in which."""

    weight_map: dict[str, str]
    slot_map: dict[str, str]
    nbytes: int
    pause: float
    """Seconds for which blocks were locked, in all; no push had to wait longer."""
    longest_pause: float = 0.0
    """Seconds for which one block was locked, at most."""


class Status(Message, frozen=True):
    """What a ps holds and has done since it started."""

    task: str
    num_variables: int
    values_bytes: int
    slots_bytes: int
    global_step: int
    updates: int
    mean_staleness: float
    largest_staleness: int
    joined: tuple[str, ...]


class Refused(Message, frozen=True):
    """A request was understood and refused. ``kind`` chooses the exception that the client raises."""

    kind: Literal["refused", "token", "model", "over", "checkpoint", "not finite"]
    message: str
    subject: str = ""


VariableRequest = CreateVariable | AwaitVariable | ReadVariable | UpdateVariable
Request = (
    Declare | Share | Push | Pull | PullRows | MarkReady | AwaitReady | MarkRestored | AwaitRestored | AwaitWorkers
    | Save | Restore | ReadSlots | LoadSlots | Proceed
    | VariableRequest | GetStatus | Goodbye
)  # fmt: skip
Reply = (
    Done | Declared | Applied | State | Values | Remaining | Underway | FilePiece | Wanted | Saved | Status | Refused
)  # fmt: skip
AnyMessage = Challenge | Hello | Welcome | Request | Reply
