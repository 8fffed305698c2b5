"""The numbers in messages, with the limits that are checked when a message is decoded.

A peer may send any number. Beyond these limits, a number cannot be meant; within them, the store checks what exists.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Count = Annotated[int, Meta(ge=0, lt=1 << 48)]
"""A number of things, or the place of one among them: an arena, a row, an element, a byte of a file."""
FirstStep = Annotated[int, Meta(ge=0, le=1 << 62)]
"""A global step to begin with: any number of updates can follow before one no longer fits into 64 bits."""
Step = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
"""A global step, or a number of steps."""
Sequence = Annotated[int, Meta(ge=1, le=1 << 62)]
"""The number of an update among those of one incarnation."""
Span = tuple[Count, Count]
"""A range ``[start, stop)`` of elements."""
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
"""A time limit."""
TaskName = Annotated[str, Meta(pattern="^[a-z]+:[0-9]{1,9}$")]
"""A task such as ``ps:1``. Names of strangers stand in messages and logs: they cannot hold a line end."""
Token = Annotated[bytes, Meta(max_length=64)]
"""A nonce or a proof."""
Name = Annotated[str, Meta(max_length=255)]
"""A short name."""
