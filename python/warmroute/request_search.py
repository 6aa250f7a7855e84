"""Which worker has a request that a client calls so: every data process is asked about its own."""

import asyncio
import logging
from collections.abc import Mapping, Sequence

from warmroute.children import Child

log = logging.getLogger(__name__)

SECONDS = 1.0


class _Question:
    def __init__(self, asked: set[int]) -> None:
        self.asked = asked
        """Processes that have not answered."""
        self.found: list[tuple[str, str]] = []
        self.is_answered = asyncio.Event()

    def answered_by(self, process: int) -> None:
        self.asked.discard(process)
        if not self.asked:
            self.is_answered.set()


class RequestSearch:
    """`children`: by process, as they are now."""

    def __init__(self, children: Mapping[int, Child]) -> None:
        self._children = children
        self._questions: dict[int, _Question] = {}
        self._tickets = 0

    async def find(self, request_id: str) -> list[tuple[str, str]]:
        """(worker id, the request's name there), of everybody who has answered within `SECONDS`."""
        self._tickets += 1
        ticket = self._tickets
        asked = {child.process for child in self._children.values() if child.send({"find": [ticket, request_id]})}
        if not asked:
            return []
        question = self._questions[ticket] = _Question(asked)
        try:
            async with asyncio.timeout(SECONDS):
                await question.is_answered.wait()
        except TimeoutError:
            log.warning("not every process has said whether it has request %s", request_id)
        finally:
            del self._questions[ticket]
        return question.found

    def found(self, process: int, ticket: int, found: Sequence[tuple[str, str]]) -> None:
        """What a process has answered."""
        question = self._questions.get(ticket)
        if question is not None:
            question.found.extend((worker_id, name) for worker_id, name in found)
            question.answered_by(process)

    def gone(self, process: int) -> None:
        """It will not answer any more."""
        for question in self._questions.values():
            question.answered_by(process)
