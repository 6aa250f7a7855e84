"""Files of lines that several processes append to: whole lines only, a few at a time."""

from __future__ import annotations

import os

# Lines wait here before they are written: a request must not wait for a disk.
_BUFFER_BYTES = 1 << 16


class LineFile:
    """`path`: `-` is the standard output. Raises OSError when it cannot be opened."""

    def __init__(self, path: str) -> None:
        is_stdout = path == "-"
        self._fd = os.dup(1) if is_stdout else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
        self._lines: list[str] = []
        self._size = 0

    def write(self, line: str) -> None:
        """Without its end."""
        self._lines.append(line)
        self._size += len(line)
        if self._size >= _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._lines:
            return
        data = memoryview(("\n".join(self._lines) + "\n").encode())
        self._lines.clear()
        self._size = 0
        while data:  # once, unless a signal or a full disk comes between
            data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        self.flush()
        os.close(self._fd)
