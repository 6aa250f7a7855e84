"""When the processes of a node that serves no HTTP end, and its exit code: decisions without IO, as `lifecycle.py`.

Node 0 decides for all. This node ends when it is told to, when node 0 is gone, or when its own ranks are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from warmroute_worker.child_process import ending
from warmroute_worker.lifecycle import DRAIN_GRACE_SECONDS, KILL_AFTER_SECONDS, NODE_LOST_SECONDS, Actions, Course, Part


@dataclass
class NodeLifecycle(Course):
    """Starting, ready, draining (told to end), released (node 0 has served everything), over."""

    name: str
    """Which node this is."""
    _alive: bool = field(default=True, init=False)
    _released: bool = field(default=False, init=False)
    _has_words: bool = field(default=False, init=False)
    """Node 0 has said how it ends."""
    _waits_for_words: bool = field(default=False, init=False)
    """The engine has ended, and only node 0 knows whether that was right."""

    @property
    def exit_code(self) -> int | None:
        """None while the engine lives, or its end is not explained."""
        return None if self._alive or self._waits_for_words else self._code()

    def ready(self, text: str) -> Actions:
        self._ready = True
        return Actions(say=f"{self.name} is ready ({text})")

    def failed(self, message: str) -> Actions:
        """The ranks have stopped; why, in words."""
        if self._cause is None and not self._released:
            self._cause = message
        return Actions()

    def terminated(self, number: int, now: float) -> Actions:
        """SIGTERM or SIGINT: the first is passed on to node 0, which drains and then ends all; the second kills."""
        if self._draining:
            self._interrupted_by = number
            return Actions(kill=True)
        return self.told_to_drain(now)

    def told_to_drain(self, now: float) -> Actions:
        self._draining = True
        if self._deadline is None:
            # Node 0 ends in time, or kills; this one follows.
            self._deadline = now + self.drain_timeout + DRAIN_GRACE_SECONDS + KILL_AFTER_SECONDS
        return Actions()

    def node_ended(self, words: str | None, now: float) -> Actions:
        """Node 0 has ended; why, in words, or with None: everything was served."""
        if self._released:
            return Actions()
        self._waits_for_words, self._has_words = False, True
        if words is None:
            self._released = True
            self._cause = None
            self._end_by(now + KILL_AFTER_SECONDS)
            return Actions()
        if self._cause is None:
            self._cause = words
        self._end_by(now + NODE_LOST_SECONDS)
        return Actions(stop=words)

    def exited(self, part: Part, pid: int, return_code: int, now: float) -> Actions:
        """`return_code`: negative for the signal that killed it."""
        self._alive = False
        if self._has_words or self._interrupted_by is not None:
            return Actions()
        if return_code and self._cause is None:
            self._cause = f"the {part.value} process (pid {pid}) {ending(return_code)}"
        # Not told to end, its driver may have seen that node 0 is gone before anybody said so. Told to, it may have
        # been in a step with ranks that ended first, which is no error once everything is served.
        in_time = self._deadline is None or now < self._deadline
        self._waits_for_words = in_time and self._draining == bool(return_code)
        if self._waits_for_words:
            self._end_by(now + KILL_AFTER_SECONDS)
        return Actions()

    def tick(self, now: float) -> Actions:
        if self._deadline is None or now < self._deadline:
            return Actions()
        if self._cause is None and not self._released:
            told = "the processes did not end in time after SIGTERM"
            self._cause = told if self._draining else "the engine ended, and nobody told it to"
        self._waits_for_words = False
        return Actions(kill=True)
