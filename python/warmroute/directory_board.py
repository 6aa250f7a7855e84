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
        self.version = memoryview(self._memory)[: _VERSION.size].cast("Q")
        """One number, of the last text: cheap to look at."""

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

    def read(self) -> tuple[int, bytes]:
        """(version, text) that was written last; b"" before the first."""
        while True:
            version = self.version[0]
            which = version % 2
            length, checksum = _TEXT.unpack_from(self._memory, _VERSION.size + which * _TEXT.size)
            start = _TEXTS_AT + which * CAPACITY
            text = self._memory[start : start + length]
            # Overtaken by a writer who was twice as fast: the sum is wrong.
            if zlib.crc32(text) == checksum:
                return version, text
