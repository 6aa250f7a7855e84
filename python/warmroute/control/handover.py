"""What a control plane leaves to the one that comes after it in the same process (SIGHUP). JSON, since that one may be
of a newer version. Unlike `registry_text` it has the credentials, and goes nowhere but into the same process.
"""

import dataclasses
from typing import Any

from warmroute.control.worker_facts import WorkerFacts
from warmroute.control.worker_spec import WorkerSpec
from warmroute.control.workers import Worker
from warmroute.directory import WorkerAddress


def state_of(worker: Worker) -> dict[str, Any]:
    facts = None if worker.facts is None else dataclasses.asdict(worker.facts)
    return {
        "worker_id": worker.worker_id,
        "spec": dataclasses.asdict(worker.spec),
        "registered_ns": worker.registered_ns,
        "registered_unix_ms": worker.registered_unix_ms,
        "facts": facts,
        "slots": worker.slots,
        "lost": worker.lost,
        "failure": worker.failure,
        "overdue": worker.overdue,
        "drain_deadline_ns": worker.drain_deadline_ns,
    }


def worker_of(state: dict[str, Any]) -> Worker:
    """The other way round. Raises KeyError, TypeError or ValueError when `state_of` did not make it."""
    values = dict(state)
    spec = WorkerSpec(**values.pop("spec"))
    facts = values.pop("facts")
    if facts is not None:
        facts = WorkerFacts(**facts | {"models": tuple(facts["models"])})
    values["slots"] = tuple(values["slots"])
    address = WorkerAddress.of(values["worker_id"], spec.url, spec.api_key)
    return Worker(spec=spec, address=address, facts=facts, **values)
