"""What ranks tell each other about a failure: two short records, read with suspicion."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

_MAX_TEXT = 300  # characters; a reader takes at most 1024 bytes


@dataclass(frozen=True)
class Answer:
    """What a rank says when asked.

    Attributes:
        handed_over: Messages that it has handed to the exchange so far.
        doing: What it is doing, for example ``"forward pass of step 7"``.
    """

    handed_over: int
    doing: str

    def encode(self) -> bytes:
        """Return the bytes to send."""
        return json.dumps(asdict(self) | {"doing": plain(self.doing)}).encode()

    @staticmethod
    def decode(message: bytes) -> Answer | None:
        """Return the answer in a message, or None if there is none."""
        found = _fields(message, {"handed_over": int, "doing": str})
        return None if found is None else Answer(found["handed_over"], plain(found["doing"]))


@dataclass(frozen=True)
class Notice:
    """What a rank tells the others before it ends by an error.

    Attributes:
        rank: Its number.
        text: What happened, to be read after ``"rank 2 "``.
        origin: Whether the failure began there, and not with another rank.
    """

    rank: int
    text: str
    origin: bool

    def encode(self) -> bytes:
        """Return the bytes to send."""
        return json.dumps(asdict(self) | {"text": plain(self.text)}).encode()

    @staticmethod
    def decode(message: bytes) -> Notice | None:
        """Return the notice in a message, or None if there is none."""
        found = _fields(message, {"rank": int, "text": str, "origin": bool})
        return None if found is None else Notice(found["rank"], plain(found["text"]), found["origin"])


def plain(text: str) -> str:
    """Return a text as one line of printable ASCII that fits into a message."""
    line = " ".join(text.split())
    line = "".join(letter if " " <= letter <= "~" else "?" for letter in line)
    return line if len(line) <= _MAX_TEXT else line[: _MAX_TEXT - 3] + "..."


def _fields(message: bytes, kinds: dict[str, type]) -> dict[str, Any] | None:
    try:
        found = json.loads(message)
    except ValueError:
        return None
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        return None
    return found if all(type(found[name]) is kind for name, kind in kinds.items()) else None
