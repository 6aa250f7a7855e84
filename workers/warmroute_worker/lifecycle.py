"""When the worker's processes are told to end or killed, and the exit code: the supervisor's decisions, without IO.

Time is an argument, what is to be done is the return value.
"""

from __future__ import annotations

import enum
import signal
from dataclasses import dataclass, field

from warmroute_worker.child_process import ending

KILL_AFTER_SECONDS = 2.5
"""How long the rest may take once one process is dead. With `http.process.LAST_WORDS_SECONDS` in it, below the 5 s in
which a worker whose engine died has to be gone."""
NODE_LOST_SECONDS = 3.5
"""The same from the moment in which another node is gone: the ranks here have to notice first."""
DRAIN_GRACE_SECONDS = 5.0
"""On top of `--drain-timeout`, for the processes to end by themselves."""


class Part(enum.Enum):
    HTTP = "HTTP"
    DRIVER = "engine"


@dataclass(frozen=True)
class Actions:
    """What the supervisor does now."""

    say: str | None = None
    """One line for stderr."""
    forward: int | None = None
    """A signal for the HTTP process."""
    kill: bool = False
    """SIGKILL for everything that lives."""
    stop: str | None = None
    """The ranks of this node stop, for this reason."""


@dataclass
class Course:
    """What the supervisors of all nodes have in common; `terminated` and the others are each one's own."""

    drain_timeout: float
    _ready: bool = field(default=False, init=False)
    _draining: bool = field(default=False, init=False)
    _deadline: float | None = field(default=None, init=False)
    _cause: str | None = field(default=None, init=False)
    _interrupted_by: int | None = field(default=None, init=False)

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do."""
        return self._deadline

    @property
    def cause(self) -> str | None:
        """The first thing that went wrong."""
        return self._cause

    @property
    def is_serving(self) -> bool:
        """Whether all is ready, of all nodes."""
        return self._ready

    @property
    def is_draining(self) -> bool:
        """Whether it, or any node, was told to end."""
        return self._draining

    def _code(self) -> int:
        """The exit code, once nothing lives."""
        if self._interrupted_by is not None:
            return 128 + self._interrupted_by
        return 0 if self._cause is None else 1

    def _end_by(self, deadline: float) -> None:
        """Sooner, if it was to end sooner."""
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)


@dataclass
class Lifecycle(Course):
    """Starting, ready, draining (told to end), ending (a part has died: `_deadline` is set), over (no part lives)."""

    address: str
    _alive: set[Part] = field(default_factory=lambda: set(Part), init=False)
    _served: bool = field(default=False, init=False)

    @property
    def exit_code(self) -> int | None:
        """None while a part lives."""
        return None if self._alive else self._code()

    def ready(self, text: str) -> Actions:
        self._ready = True
        return Actions(say=f"ready on {self.address} ({text})")

    def failed(self, message: str) -> Actions:
        """The driver, or the HTTP process, said why it cannot go on. Its own words beat what its exit looks like."""
        if not self._served:
            self._cause = message
        return Actions()

    def terminated(self, number: int, now: float) -> Actions:
        """SIGTERM or SIGINT: the first drains, the second kills."""
        if self._draining:
            self._interrupted_by = number
            return Actions(kill=True)
        self._draining = True
        if self._deadline is None:
            self._deadline = now + self.drain_timeout + DRAIN_GRACE_SECONDS
        return Actions(forward=signal.SIGTERM)

    def told_to_drain(self, now: float) -> Actions:
        """Another node was told to end; all of them do, or none."""
        return Actions() if self._draining else self.terminated(signal.SIGTERM, now)

    def node_ended(self, words: str | None, now: float) -> Actions:
        """Another node ends; why, in words, or with None: cleanly, as it was told."""
        if words is None or self._served or self._cause is not None:
            return Actions()
        self._cause = words
        self._end_by(now + NODE_LOST_SECONDS)
        return Actions(stop=words)

    def exited(self, part: Part, pid: int, return_code: int, now: float) -> Actions:
        """`return_code`: negative for the signal that killed it."""
        self._alive.discard(part)
        clean = self._draining and return_code in (0, -signal.SIGTERM)
        if clean and part is Part.HTTP:
            # Every request is answered. How the driver ends, which loses its only peer, does not matter any more, and
            # it may well have ended before its peer was seen to.
            self._served = True
            self._cause = None
        if not clean and not self._served and self._cause is None and self._interrupted_by is None:
            self._cause = f"the {part.value} process (pid {pid}) {ending(return_code)}"
        self._end_by(now + KILL_AFTER_SECONDS)
        # Nothing runs without the HTTP process; the driver's death it sees itself and ends what runs with an error.
        return Actions(kill=part is Part.HTTP and not clean)

    def tick(self, now: float) -> Actions:
        if self._deadline is None or now < self._deadline:
            return Actions()
        if self._draining and self._cause is None and len(self._alive) == len(Part):
            self._cause = "the processes did not end in time after SIGTERM"
        return Actions(kill=True)
