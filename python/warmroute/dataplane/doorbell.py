"""How the processes of one router tell each other that somebody who waits may be let in now."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class Doorbell:
    """`fd`: an eventfd that all processes share; None: there is only this one. `on_ring` is called from the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int | None, on_ring: Callable[[], None]) -> None:
        self._loop = loop
        self._fd = fd
        self._on_ring = on_ring
        self._is_listening = False

    def ring(self) -> None:
        """Whoever listens hears it, this process included."""
        if self._fd is not None:
            os.eventfd_write(self._fd, 1)
        elif self._is_listening:
            self._loop.call_soon(self._on_ring)

    def listen(self, wanted: bool) -> None:
        """Only processes in which somebody waits do."""
        if wanted == self._is_listening:
            return
        self._is_listening = wanted
        if self._fd is None:
            return
        if wanted:
            self._loop.add_reader(self._fd, self._rung)
        else:
            self._loop.remove_reader(self._fd)

    def _rung(self) -> None:
        assert self._fd is not None
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:  # another process was faster, and has rung again if there is something left
            return
        self._on_ring()
