"""The directory as several processes see it: one writes it down, the others read it when its version has changed.

A memory file that only the router's own processes have, since it holds the workers' keys. Two texts in turn: whoever
reads one does so while the other is written.
"""

import mmap
import os
import struct
import zlib

CAPACITY = 4 << 20
"""Bytes of a text: about 1,000 for each of 4,096 workers. Pages that nobody uses cost nothing."""

_VERSION = struct.Struct("<Q")
_TEXT = struct.Struct("<QI")  # length, CRC-32
_TEXTS_AT = 64
_SIZE = _TEXTS_AT + 2 * CAPACITY


class BoardFull(MemoryError):  # noqa: N818
    """The text has more than `CAPACITY` bytes."""


class Board:
    """`fd`: of a board that another process has made."""

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("warmroute-directory")
            os.ftruncate(fd, _SIZE)
        self.fd = fd
        self._memory = mmap.mmap(fd, _SIZE)
        self._seen = bytes(_VERSION.size)

    def write(self, text: bytes) -> None:
        """By one process only. Raises BoardFull, and changes nothing."""
        if len(text) > CAPACITY:
            raise BoardFull
        version = _VERSION.unpack_from(self._memory)[0] + 1
        header = _VERSION.size + version % 2 * _TEXT.size
        start = _TEXTS_AT + version % 2 * CAPACITY
        _TEXT.pack_into(self._memory, header, len(text), zlib.crc32(text))
        self._memory[start : start + len(text)] = text
        _VERSION.pack_into(self._memory, 0, version)

    @property
    def has_changed(self) -> bool:
        """Since this process has read it last."""
        return self._memory[: _VERSION.size] != self._seen

    def read(self) -> bytes:
        """The last text that was written; b"" before the first."""
        while True:
            seen = self._memory[: _VERSION.size]
            which = _VERSION.unpack(seen)[0] % 2
            length, checksum = _TEXT.unpack_from(self._memory, _VERSION.size + which * _TEXT.size)
            start = _TEXTS_AT + which * CAPACITY
            text = self._memory[start : start + length]
            # Overtaken by a writer who was twice as fast: the sum is wrong.
            if zlib.crc32(text) == checksum:
                self._seen = seen
                return text
