"""A digest inside the checkpoint file, where `torch.load` and every zip reader overlook it.

`torch.save` writes a zip archive. Zip allows a comment at the end of the file; ours is the SHA-256 of all
bytes before it, taken with the comment's length field at zero, that is of the file as `torch.save` wrote it.
The digest finds accidents (a copy that was cut short, a bad disk); it is no signature.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import BinaryIO

_PREFIX = b"n2uq-sha256:"
_COMMENT_LENGTH = len(_PREFIX) + 64  # bytes: the digest is written in hexadecimal
_END_OF_ARCHIVE = b"PK\x05\x06"
_END_LENGTH = 22  # bytes of the record, without the comment that its last two bytes count
_BLOCK = 1 << 20


def seal(file: BinaryIO) -> None:
    """Appends the digest to a complete archive, opened for reading and writing.

    Raises:
        ValueError: The file does not end as an archive without a comment does.
    """
    size = file.seek(0, 2)
    file.seek(max(size - _END_LENGTH, 0))
    end = file.read(_END_LENGTH)
    if not end.startswith(_END_OF_ARCHIVE) or end[-2:] != b"\0\0":
        raise ValueError("file: no plain zip archive, so it cannot be sealed")
    comment = _PREFIX + _digest(file, size).encode()
    file.seek(size - 2)
    file.write(struct.pack("<H", len(comment)) + comment)


def is_intact(path: str | Path) -> bool | None:
    """Returns whether the bytes are those that were sealed; None for a whole archive that never was."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _COMMENT_LENGTH - _END_LENGTH, 0))
        tail = file.read()
        sealed = tail[_END_LENGTH:].startswith(_PREFIX) and tail.startswith(_END_OF_ARCHIVE)
        if not sealed:
            return None if _is_plain_archive(tail) else False
        return tail[_END_LENGTH + len(_PREFIX) :].decode("ascii", "replace") == _digest(
            file, size - _COMMENT_LENGTH
        )


def _is_plain_archive(tail: bytes) -> bool:
    return tail[-_END_LENGTH:].startswith(_END_OF_ARCHIVE) and tail.endswith(b"\0\0")


def _digest(file: BinaryIO, size: int) -> str:
    """Returns the SHA-256 of the first `size` bytes with the last two, the comment's length, read as zero."""
    digest = hashlib.sha256()
    file.seek(0)
    left = size - 2
    while left > 0:
        block = file.read(min(_BLOCK, left))
        if not block:
            break
        digest.update(block)
        left -= len(block)
    digest.update(b"\0\0")
    return digest.hexdigest()
