"""What the router says about itself. Pure: used by the data plane (which answers) and by the control app."""

import json

from warmroute._core import Core


def liveness() -> tuple[int, str, bytes]:
    """(status, content type, body). 200 as long as the process turns: also without workers, also while draining."""
    return 200, "text/plain; charset=utf-8", b"OK"


def readiness(core: Core, *, draining: bool) -> tuple[int, str, bytes]:
    """(status, content type, body). 200 when a worker can take a request and the router is not going away."""
    available, registered = core.readiness()
    reason = "draining" if draining else "insufficient healthy workers" if available == 0 else None
    answer: dict[str, str | int] = {"status": "ready"} if reason is None else {"status": "not ready", "reason": reason}
    answer |= {"healthy_workers": available, "total_workers": registered}
    return 200 if reason is None else 503, "application/json", json.dumps(answer).encode()
