"""The real routing core in the simulation, and which routers there are by name."""

from bench.simulator.engine import Job, Worker
from bench.simulator.presets import PRESETS
from bench.simulator.simulation import Placement, Router
from bench.simulator.workload import MODEL, Request, Workload
from warmroute._core import Lease, OutcomeKind, policy_names
from warmroute.config import RouterConfig
from warmroute.engine import build_core

_SECOND = 1_000_000_000
_START = 1_000 * _SECOND
"""Of the core's clock: zero would look like never."""


class CoreRouter:
    """The routing core as a router uses it: bodies in, leases out, answers reported."""

    def __init__(self, workload: Workload, policy: str, seed: int) -> None:
        config = RouterConfig(policy=policy, seed=seed, hash_seed=seed)  # type: ignore[arg-type]
        self._good_probes, self._bad_probes = config.health_success_threshold, config.health_failure_threshold
        self.core = build_core(config)
        self._places: dict[int, tuple[int, int]] = {}
        self._heads = []
        for worker in range(workload.workers):
            slots = self.core.add_worker((MODEL,), workload.ranks, workload.engine.kv_tokens, None, _START)
            self._heads.append(slots[0])
            self._probe(worker, True, 0.0)
            self._places.update((slot, (worker, rank)) for rank, slot in enumerate(slots))

    def select(self, request: Request, now: float) -> Placement | None:
        routed = self.core.read(b"/v1/chat/completions", b"", request.body(), _ns(now))
        lease = self.core.select(routed, _ns(now), False)
        return None if lease is None else Placement(*self._places[lease.slot], lease, lease.predicted_cached_tokens)

    def release(self, placement: Placement, job: Job, now: float) -> None:
        lease = placement.handle
        assert isinstance(lease, Lease)
        cached = job.cached_tokens
        prompt, output = job.prompt_tokens, job.output_tokens
        lease.release(OutcomeKind.ANSWERED, 200, _ns(job.first_token), None, None, prompt, output, cached, _ns(now))
        self.core.evict(_ns(now), 0)

    def lost(self, placement: Placement, now: float) -> None:
        lease = placement.handle
        assert isinstance(lease, Lease)
        lease.release(OutcomeKind.NO_ANSWER, 0, -1, None, None, -1, -1, -1, _ns(now))

    def down(self, worker: int, now: float) -> None:
        self._probe(worker, False, now)

    def up(self, worker: int, now: float) -> None:
        self.core.restart_worker(self._heads[worker], _ns(now))
        self._probe(worker, True, now)

    def _probe(self, worker: int, ok: bool, now: float) -> None:
        """As often as it takes: how fast the prober is, is not simulated."""
        for _ in range(self._good_probes if ok else self._bad_probes):
            self.core.observe_probe(self._heads[worker], ok, _ns(now))


def _ns(seconds: float) -> int:
    return _START + round(seconds * _SECOND)


def make_router(name: str, workload: Workload, workers: list[Worker], seed: int) -> Router:
    """By the name of a policy of the core or of a preset. Raises KeyError."""
    if name in policy_names():
        return CoreRouter(workload, name, seed)
    return PRESETS[name](workload, workers, seed)
