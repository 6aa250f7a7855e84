"""The event loop: clients, a router, workers. One workload, one router, one seed."""

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from bench.simulator.engine import Job, Worker
from bench.simulator.workload import Request, Segment, Session, Workload


@dataclass(frozen=True, slots=True)
class Placement:
    worker: int
    rank: int
    handle: object = None
    """The router's own."""
    predicted_tokens: int = -1
    """Cached tokens that the router expected; -1: it does not say."""


class Router(Protocol):
    """What is simulated around: sees requests and answers, decides where a request goes. Times in seconds."""

    def select(self, request: Request, now: float) -> Placement | None:
        """None: nobody can get it."""
        ...

    def release(self, placement: Placement, job: Job, now: float) -> None:
        """The answer is whole."""
        ...

    def lost(self, placement: Placement, now: float) -> None:
        """The worker died with the request."""
        ...

    def down(self, worker: int, now: float) -> None: ...

    def up(self, worker: int, now: float) -> None: ...


@dataclass(slots=True)
class Answer:
    """One answered request."""

    asked: float
    first_token: float
    finished: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    predicted_tokens: int
    worker: int

    @property
    def first_token_seconds(self) -> float:
        return self.first_token - self.asked

    @property
    def seconds_per_token(self) -> float:
        """Between tokens after the first; nan when there is one only."""
        return (self.finished - self.first_token) / (self.output_tokens - 1) if self.output_tokens > 1 else math.nan


@dataclass
class Outcome:
    """Everything that happened."""

    answers: list[Answer] = field(default_factory=list)
    reached: list[Request] = field(default_factory=list)
    """In the order in which they were asked."""
    seconds: float = 0.0
    evicted_pages: int = 0
    resent: int = 0


@dataclass(slots=True)
class _Client:
    session: Session
    number: int
    turn: int = 0
    history: tuple[Segment, ...] = ()
    request: Request | None = None
    asked: float = 0.0
    placement: Placement | None = None

    def ask(self, now: float) -> Request:
        turn = self.session.turns[self.turn]
        self.request = Request.make(self.history, turn, self.answer_id)
        self.asked = now
        return self.request

    @property
    def answer_id(self) -> int:
        return -1 - (self.number << 16 | self.turn)

    def hear(self) -> None:
        assert self.request is not None
        answer = Segment("assistant", self.answer_id, self.request.output_tokens)
        self.history = (*self.request.segments, answer)
        self.turn += 1

    @property
    def is_done(self) -> bool:
        return self.turn == len(self.session.turns)


class Simulation:
    def __init__(self, workload: Workload, workers: list[Worker], router: Router) -> None:
        self._workers = workers
        self._router = router
        self._workload = workload
        self._outcome = Outcome()
        self._ties = itertools.count()
        self._events: list[tuple[float, int, str, object]] = []
        self._queue = deque(_Client(session, number) for number, session in enumerate(workload.sessions))
        self._stranded: list[_Client] = []
        """Nobody could get what they ask; they try again when a worker comes back."""
        self._down: set[int] = set()

    def run(self) -> Outcome:
        if self._workload.concurrency:
            for _ in range(min(self._workload.concurrency, len(self._queue))):
                self._at(0.0, "ask", self._queue.popleft())
        else:
            while self._queue:
                client = self._queue.popleft()
                self._at(client.session.start, "ask", client)
        for outage in self._workload.outages:
            self._at(outage.start, "down", outage.worker)
            self._at(outage.start + outage.seconds, "up", outage.worker)
        now = 0.0
        while self._events:
            now, _, what, subject = heapq.heappop(self._events)
            if what == "step":
                self._step(subject, now)  # type: ignore[arg-type]
            elif what == "ask":
                assert isinstance(subject, _Client)
                self._outcome.reached.append(subject.ask(now))
                self._send(subject, now)
            elif what == "down":
                self._go_down(subject, now)  # type: ignore[arg-type]
            else:
                self._go_up(subject, now)  # type: ignore[arg-type]
        self._outcome.seconds = max((answer.finished for answer in self._outcome.answers), default=0.0)
        self._outcome.evicted_pages = sum(rank.cache.evicted for worker in self._workers for rank in worker.ranks)
        return self._outcome

    def _at(self, when: float, what: str, subject: object) -> None:
        heapq.heappush(self._events, (when, next(self._ties), what, subject))

    def _send(self, client: _Client, now: float) -> None:
        request = client.request
        assert request is not None
        placement = self._router.select(request, now)
        if placement is None:
            self._stranded.append(client)
            return
        client.placement = placement
        job = Job(request.keys, request.prompt_tokens, request.output_tokens, now, client)
        worker = self._workers[placement.worker]
        worker.submit(job, placement.rank, now)
        self._at(worker.event, "step", placement.worker)

    def _step(self, number: int, now: float) -> None:
        worker = self._workers[number]
        if number in self._down or worker.event != now:
            return  # announced before its plan changed
        answered = worker.complete()
        if worker.event < math.inf:
            self._at(worker.event, "step", number)
        for job in answered:
            self._answer(job, number, now)

    def _answer(self, job: Job, number: int, now: float) -> None:
        client = job.request
        assert isinstance(client, _Client)
        assert client.placement is not None
        predicted = client.placement.predicted_tokens
        self._router.release(client.placement, job, now)
        self._outcome.answers.append(
            Answer(
                client.asked,
                job.first_token,
                now,
                job.prompt_tokens,
                job.output_tokens,
                job.cached_tokens,
                predicted,
                number,
            )
        )
        client.hear()
        if not client.is_done:
            self._at(now + client.session.think_seconds, "ask", client)
        elif self._queue:
            self._at(now, "ask", self._queue.popleft())

    def _go_down(self, number: int, now: float) -> None:
        self._down.add(number)
        lost = [job.request for job in self._workers[number].kill()]
        clients = [client for client in lost if isinstance(client, _Client)]
        for client in clients:
            assert client.placement is not None
            self._router.lost(client.placement, now)
        self._router.down(number, now)
        for client in clients:
            self._outcome.resent += 1
            self._send(client, now)

    def _go_up(self, number: int, now: float) -> None:
        self._down.discard(number)
        self._router.up(number, now)
        stranded, self._stranded = self._stranded, []
        for client in stranded:
            self._send(client, now)
