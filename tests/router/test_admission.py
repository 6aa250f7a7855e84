"""Who may run, who waits, who is refused: without a loop, time passed in."""

import pytest

from warmroute.config import RouterConfig
from warmroute.dataplane.admission import Admission, QueueFull
from warmroute.engine import build_core

SECOND = 1_000_000_000


class Request:
    def __init__(self) -> None:
        self.admitted_ns: int | None = None
        self.expired = False

    def admitted(self, now_ns: int) -> None:
        assert self.admitted_ns is None
        self.admitted_ns = now_ns

    def waited_too_long(self) -> None:
        self.expired = True


class Bell:
    def __init__(self) -> None:
        self.rings = 0
        self.is_heard = False

    def ring(self) -> None:
        self.rings += 1

    def listen(self, wanted: bool) -> None:
        self.is_heard = wanted


class Door:
    """An admission, and when it wants to be called again."""

    def __init__(self, concurrent: int = -1, queue: int = 100, rate: float | None = None) -> None:
        self.wakes: list[float] = []
        self.bell = Bell()
        config = RouterConfig(
            seed=1,
            hash_seed=1,
            index_memory=1 << 20,
            max_concurrent_requests=concurrent,
            queue_size=queue,
            rate_limit_tokens_per_second=rate,
        )
        self.core = build_core(config)
        self.admission = Admission(self.core, 10 * SECOND, self.wakes.append, self.bell)

    def enter(self, now_ns: int = 0) -> Request:
        request = Request()
        if self.admission.enter(request, now_ns):
            request.admitted(now_ns)
        return request

    @property
    def running_and_waiting(self) -> tuple[int, int]:
        return self.core.admission()[:2]


def test_no_more_run_at_once_and_whoever_waits_is_next() -> None:
    door = Door(concurrent=2)
    requests = [door.enter() for _ in range(5)]
    assert [request.admitted_ns for request in requests] == [0, 0, None, None, None]
    assert door.running_and_waiting == (2, 3)
    assert door.bell.is_heard
    door.admission.leave()
    assert door.bell.rings == 1
    latecomer = door.enter(1)
    door.admission.let_in(2)
    assert [request.admitted_ns for request in [*requests, latecomer]] == [0, 0, 2, None, None, None]
    door.admission.withdraw(requests[3])
    door.admission.leave()
    door.admission.leave()
    door.admission.let_in(3)
    assert [request.admitted_ns for request in [*requests, latecomer]] == [0, 0, 2, None, 3, 3]
    assert door.running_and_waiting == (2, 0)
    assert door.core.admission()[2:] == (5, 0)


def test_a_full_queue_refuses_and_a_long_wait_ends() -> None:
    door = Door(concurrent=1, queue=2)
    door.enter()
    waiting = [door.enter(0), door.enter(SECOND)]
    with pytest.raises(QueueFull):
        door.enter(SECOND)
    door.admission.expire(10 * SECOND - 1)
    assert not waiting[0].expired
    door.admission.expire(10 * SECOND)
    assert [request.expired for request in waiting] == [True, False]
    assert door.running_and_waiting == (1, 1)
    assert door.core.admission()[3] == 2


def test_without_a_queue_nobody_waits() -> None:
    door = Door(concurrent=1, queue=0)
    door.enter()
    with pytest.raises(QueueFull):
        door.enter()
    door.admission.leave()
    assert door.enter().admitted_ns == 0


def test_a_rate_lets_in_a_burst_and_then_one_after_the_other() -> None:
    door = Door(rate=4.0)
    begin = 100 * SECOND
    requests = [door.enter(begin) for _ in range(7)]
    assert sum(request.admitted_ns == begin for request in requests) == 4
    door.admission.let_in(begin)
    assert door.wakes[-1] == pytest.approx(0.25, abs=0.01)
    door.admission.let_in(begin + SECOND // 4)
    assert sum(request.admitted_ns is not None for request in requests) == 5
    assert door.wakes[-1] == pytest.approx(0.25, abs=0.01)
    door.admission.let_in(begin + 10 * SECOND)
    assert door.running_and_waiting == (7, 0)
    # What was not used is not saved for longer than a second.
    assert sum(door.enter(begin + 20 * SECOND).admitted_ns is not None for _ in range(9)) == 4


def test_a_slow_rate_still_lets_one_in() -> None:
    door = Door(rate=0.1)
    begin = 100 * SECOND
    assert (door.enter(begin).admitted_ns, door.enter(begin).admitted_ns) == (begin, None)
    door.admission.let_in(begin)
    assert door.wakes[-1] == pytest.approx(10.0, abs=0.01)
